"""Pushing to the Hugging Face Hub and pulling from it, over HTTP, against a stand-in for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub import serving
from packed import EVEN, packed_model
from tiny import token_ids

import gatepack as gp

TESTS = Path(__file__).parent


def client(what, folder, **variables):
    paths = (TESTS.parent / "python", TESTS / "support")
    done = subprocess.run(
        [sys.executable, str(TESTS / "support" / "hub_client.py"), what, str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HF_HOME": str(folder / "home"),
            "HF_TOKEN": "hf_stand_in",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **variables,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_no_folder_is_a_snapshot_of_the_hub(tmp_path, monkeypatch):
    model = packed_model(**EVEN)
    model.save_pretrained(tmp_path / "m")
    asked = []

    def snapshot(name, allow_patterns, **options):
        asked.append((name, options))
        return str(tmp_path / "m")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    options = {"revision": "v1", "local_files_only": True}
    found = gp.from_pretrained("owner/packed", dtype=torch.float32, **options)
    assert torch.equal(found(token_ids()).logits, model(token_ids()).logits)
    assert asked == [("owner/packed", options)]
    for local in (tmp_path / "none", "./none", Path("owner/packed")):
        with pytest.raises(ValueError, match="is not a checkpoint: it has no config.json"):
            gp.from_pretrained(local)
    assert len(asked) == 1


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    def snapshot(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ValueError, match="owner/packed is no folder, and .* it: TimeoutError"):
        gp.from_pretrained("owner/packed")


@pytest.mark.slow
def test_push_then_pull_then_offline(tmp_path):
    with serving() as (address, repos):
        client("push", tmp_path, HF_ENDPOINT=address)
        assert repos.keys() == {"owner/packed", "owner/gated", "owner/coded"}
        assert {"config.json", "model.safetensors", "README.md"} <= repos["owner/packed"].keys()
        config = json.loads(repos["owner/coded"]["config.json"])
        assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_gatepack.")
        assert "modeling_gatepack.py" in repos["owner/coded"]
        assert not any(name.endswith((".bin", ".pt")) for files in repos.values() for name in files)
        client("pull", tmp_path, HF_ENDPOINT=address)
    # The Hub is gone; what was pulled lies in its cache.
    snapshots = tmp_path / "home" / "hub" / "models--owner--coded" / "snapshots"
    assert len(list(snapshots.iterdir())) == 1
    client("pull", tmp_path, HF_HUB_OFFLINE="1")

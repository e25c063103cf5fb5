"""Saves happen whole or not at all."""

import errno
import os

import pytest
import torch
from checkpoints import entries, gated, logits_of

import gatepack as gp
from gatepack import checkpoint, files


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_at(monkeypatch, owner, name, call):
    """Makes the call-th call (from 1) of owner.name raise ENOSPC."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            full_disk()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return calls


class TestInterruptedSave:
    @pytest.fixture
    def saved(self, tmp_path):
        old, _ = gated()
        gp.save_pretrained(old, tmp_path / "m")
        (tmp_path / "m" / "notes.txt").write_text("mine")
        (tmp_path / "m" / "runs").mkdir()
        (tmp_path / "m" / "runs" / "log").write_text("1")
        return tmp_path / "m", old

    def check_unchanged(self, folder, old):
        assert entries(folder.parent) == ["m"]
        assert (folder / "notes.txt").read_text() == "mine" and (
            folder / "runs" / "log"
        ).read_text() == "1"
        assert torch.equal(logits_of(gp.from_pretrained(folder)), logits_of(old))

    @pytest.mark.parametrize("point", ["model", "manifest", "hash", "flush", "tokenizer"])
    def test_failed_write(self, saved, monkeypatch, point):
        folder, old = saved
        new, _ = gated(pattern="single")
        tokenizer = None
        if point == "model":
            partial = new.save_pretrained
            monkeypatch.setattr(new, "save_pretrained", lambda d: (partial(d), full_disk()))
        elif point == "tokenizer":
            tokenizer = type("Tokenizer", (), {"save_pretrained": full_disk})()
        elif point == "flush":
            fail_at(monkeypatch, os, "fsync", 2)
        else:
            monkeypatch.setattr(
                checkpoint, "write_manifest" if point == "manifest" else "file_sha256", full_disk
            )
        with pytest.raises(
            OSError,
            match=f"saving to {folder} failed, what was there is unchanged: .*No space left",
        ):
            gp.save_pretrained(new, folder, tokenizer)
        monkeypatch.undo()
        self.check_unchanged(folder, old)

    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_failed_swap_by_renames(self, saved, monkeypatch, call):
        folder, old = saved
        new, _ = gated(pattern="single")
        monkeypatch.setattr(files.ctypes, "CDLL", full_disk)
        calls = fail_at(monkeypatch, os, "rename", call)
        with pytest.raises(OSError, match="what was there is unchanged"):
            gp.save_pretrained(new, folder)
        assert len(calls) >= call
        monkeypatch.undo()
        self.check_unchanged(folder, old)

    @pytest.mark.parametrize("call", [1, 2])
    def test_failed_link_of_foreign_files(self, saved, monkeypatch, call):
        folder, old = saved
        new, _ = gated(pattern="single")
        fail_at(monkeypatch, os, "link", call)
        with pytest.raises(OSError, match="what was there is unchanged"):
            gp.save_pretrained(new, folder)
        monkeypatch.undo()
        self.check_unchanged(folder, old)

    def test_foreign_files_are_copied_where_there_are_no_links(self, saved, monkeypatch):
        def refuse(*_, **__):
            raise OSError(errno.EPERM, "Operation not permitted")

        folder, _ = saved
        new, _ = gated(pattern="single")
        monkeypatch.setattr(os, "link", refuse)
        gp.save_pretrained(new, folder)
        self.check_unchanged(folder, new)

    def test_no_room_for_a_folder(self, saved, monkeypatch):
        folder, old = saved
        monkeypatch.setattr(files.tempfile, "mkdtemp", full_disk)
        with pytest.raises(OSError, match=f"cannot write beside {folder}"):
            gp.save_pretrained(gated(pattern="single")[0], folder)
        monkeypatch.undo()
        self.check_unchanged(folder, old)

    @pytest.mark.parametrize("exchange", [True, False])
    def test_foreign_files_survive_and_superseded_ones_do_not(self, saved, monkeypatch, exchange):
        folder, _ = saved
        (folder / "model-00001-of-00002.safetensors").write_text("old shard")
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(weights)
        new, _ = gated(pattern="single")
        if not exchange:
            monkeypatch.setattr(files.ctypes, "CDLL", full_disk)
        gp.save_pretrained(new, folder)
        assert entries(folder.parent) == ["m"]
        assert {"notes.txt", "runs", "adapter_model.safetensors"} <= set(entries(folder))
        assert "model-00001-of-00002.safetensors" not in entries(folder)
        assert torch.equal(logits_of(gp.from_pretrained(folder)), logits_of(new))

    def test_first_save_that_fails_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint, "write_manifest", full_disk)
        with pytest.raises(OSError, match="No space left"):
            gp.save_pretrained(gated()[0], tmp_path / "a" / "m")
        assert entries(tmp_path / "a") == []

    def test_a_file_in_the_way_is_refused(self, tmp_path):
        (tmp_path / "m").write_text("a file")
        with pytest.raises(OSError, match="m is not a folder"):
            gp.save_pretrained(gated()[0], tmp_path / "m")
        assert (tmp_path / "m").read_text() == "a file"

    def test_a_link_to_the_folder_stays_a_link(self, tmp_path):
        model, _ = gated()
        gp.save_pretrained(model, tmp_path / "m")
        (tmp_path / "latest").symlink_to(tmp_path / "m")
        gp.save_pretrained(model, tmp_path / "latest")
        assert (tmp_path / "latest").is_symlink() and entries(tmp_path) == ["latest", "m"]

    def test_permissions_follow_the_umask(self, tmp_path):
        gp.save_pretrained(gated()[0], tmp_path / "m")
        mask = os.umask(0)
        os.umask(mask)
        assert (tmp_path / "m").stat().st_mode & 0o777 == 0o777 & ~mask

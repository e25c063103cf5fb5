"""What a user does with the Hub: python hub_client.py push|pull FOLDER."""

import sys
from pathlib import Path

import torch
from letters import letter_tokenizer
from packed import UNEVEN, packed_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model, token_ids
from transformers import AutoModelForCausalLM

import gatepack as gp
from gatepack.models import load_model


@torch.no_grad()
def logits_of(model):
    return model.eval()(token_ids()).logits


def push(folder: Path) -> None:
    packed, gated = packed_model(**UNEVEN), tiny_model("llama", torch.float32)
    gates = gp.attach(gated, gp.GateConfig(target=0.5, noise=0.0))
    gates.close("model.layers.0.mlp:channels", [1, 2])
    packed.push_to_hub("owner/packed")
    letter_tokenizer().push_to_hub("owner/packed")
    gated.save_pretrained(folder / "gated", push_to_hub=True, repo_id="owner/gated")
    gp.export(packed, folder / "export", "hf")
    coded = AutoModelForCausalLM.from_pretrained(folder / "export", trust_remote_code=True)
    coded.push_to_hub("owner/coded")
    save_file(
        {"packed": logits_of(packed), "gated": logits_of(gated)}, folder / "logits.safetensors"
    )


def pull(folder: Path) -> None:
    expected = load_file(folder / "logits.safetensors")
    for name in ("packed", "gated"):
        assert torch.equal(logits_of(gp.from_pretrained(f"owner/{name}")), expected[name]), name
    model, tokenizer = load_model("owner/packed")
    assert torch.equal(logits_of(model), expected["packed"]) and len(tokenizer) > 1
    refuses(lambda: gp.from_pretrained("owner/none"), "is no folder, and the Hugging Face Hub")
    # Nothing runs the folder's code unasked, with which transformers loads it.
    assert torch.equal(logits_of(gp.from_pretrained("owner/coded")), expected["packed"])
    load = AutoModelForCausalLM.from_pretrained
    refuses(lambda: load("owner/coded", trust_remote_code=False), "mismatch")
    assert not any("modeling_gatepack" in name for name in sys.modules)
    coded = load("owner/coded", trust_remote_code=True)
    assert type(coded).__name__ == "PackedLlamaForCausalLM"
    assert torch.equal(logits_of(coded), expected["packed"])


def refuses(call, message: str) -> None:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"expected a refusal: {message}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"push": push, "pull": pull}[sys.argv[1]](Path(sys.argv[2]))

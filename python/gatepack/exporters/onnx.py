"""Stage 6, export: one ONNX file, input_ids [batch, tokens] -> logits, through torch.onnx.

The whole sequence is computed at once: there is no key/value cache and no padding mask.
"""

from pathlib import Path

import torch
from torch import nn

from gatepack.exporters.parity import auto_class, compare_logits
from gatepack.exporters.source import Source
from gatepack.optional import require
from gatepack.quality import evaluating, input_device

FILE = "model.onnx"


class Logits(nn.Module):
    """The model as a function of token ids alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


class Session(nn.Module):
    """onnxruntime in the place of the model: logits on the CPU for token ids.

    The embedding only tells the vocabulary's size and the device.
    """

    def __init__(self, path: Path, config):
        super().__init__()
        import onnxruntime

        self.config = config
        self.runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.embedding = nn.Embedding(config.vocab_size, 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids):
        from transformers.modeling_outputs import CausalLMOutput

        (logits,) = self.runtime.run(None, {"input_ids": input_ids.cpu().numpy()})
        return CausalLMOutput(logits=torch.from_numpy(logits))


def refuse(source: Source) -> None:
    """ValueError for a model without token logits; ImportError where a package is missing."""
    require("format 'onnx'", "onnx", "onnxscript", "onnxruntime")
    if auto_class(source.stock_class().__name__) != "AutoModelForCausalLM":
        raise ValueError(
            f"format 'onnx' cannot hold {type(source.model).__name__}: expected a ...ForCausalLM"
        )
    if source.model.dtype != torch.float32:
        raise ValueError(
            f"format 'onnx' needs weights in float32, got {source.model.dtype}: pass "
            "dtype='float32'"
        )


def write(source: Source, folder: Path) -> list[str]:
    """Writes model.onnx; returns what it does not carry."""
    example = torch.ones(2, 8, dtype=torch.long, device=input_device(source.model))
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with evaluating(source.model), torch.no_grad():
        torch.onnx.export(
            Logits(source.model).eval(),
            (example,),
            folder / FILE,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": shape},
            dynamo=True,
            verbose=False,
        )
    return [
        "the key/value cache: each call computes all tokens",
        "a padding mask: the sequences of one batch have equal lengths",
    ]


def check(source: Source, folder: Path, windows: torch.Tensor) -> dict:
    import onnxruntime

    session = Session(folder / FILE, source.config)
    return compare_logits(source.model, session, windows, f"onnxruntime {onnxruntime.__version__}")

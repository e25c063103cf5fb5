"""Stage 6, export: one ONNX file with a key/value cache for onnxruntime, through torch.onnx.

Inputs: input_ids [batch, tokens]; attention_mask [batch, past + tokens], 0 for padding;
past_key_values.N.key and .value [batch, key/value heads of layer N, past, head_dim], where past 0
begins a text. Outputs: logits [batch, tokens, vocabulary]; present.N.key and .value, the past of
the next call. The names are those of optimum's task text-generation-with-past.
"""

from pathlib import Path

import torch
from torch import nn

from gatepack.exporters.parity import (
    NEW_TOKENS,
    PROMPTS,
    auto_class,
    compare_logits,
    greedy_tokens,
    prompts_of,
    torch_logits,
)
from gatepack.exporters.source import Source
from gatepack.optional import require
from gatepack.quality import evaluating, forward_arguments, input_device

FILE = "model.onnx"


class Step(nn.Module):
    """The model as a function of tensors alone: the tokens, their mask, keys and values."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.has_positions = "position_ids" in forward_arguments(model)

    def forward(self, input_ids, attention_mask, past):
        from transformers import DynamicCache

        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            use_cache=True,
            **({"position_ids": positions} if self.has_positions else {}),
        )
        return output.logits, *_tensors(output.past_key_values)


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

    def run(self, input_ids: torch.Tensor, past: dict | None = None) -> tuple[torch.Tensor, dict]:
        """(logits, the past with these tokens); past: as returned, None for the beginning."""
        batch, tokens = input_ids.shape
        past = self._no_past(batch) if past is None else past
        seen = next(iter(past.values())).shape[2]
        feeds = {
            "input_ids": input_ids.cpu().numpy(),
            "attention_mask": torch.ones(batch, seen + tokens, dtype=torch.long).numpy(),
        }
        logits, *present = self.runtime.run(None, {**feeds, **past})
        return torch.from_numpy(logits), dict(zip(past, present, strict=True))

    def _no_past(self, batch: int) -> dict:
        return {
            each.name: torch.zeros(batch, each.shape[1], 0, each.shape[3]).numpy()
            for each in self.runtime.get_inputs()[2:]
        }

    def forward(self, input_ids):
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.run(input_ids)[0])


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
    from transformers import DynamicCache

    device = input_device(source.model)
    # Sizes 0 and 1 would be taken for constants.
    ids, mask = (torch.ones(2, size, dtype=torch.long, device=device) for size in (3, 8))
    with evaluating(source.model), torch.no_grad():
        # Without the config, as in Step: no layer forgets what lies behind its window.
        cache = DynamicCache()
        source.model(input_ids=mask[:, :5], past_key_values=cache, use_cache=True)
        past = _tensors(cache)
        names = [f"{i}.{what}" for i in range(len(past) // 2) for what in ("key", "value")]
        torch.onnx.export(
            Step(source.model).eval(),
            (ids, mask, past),
            folder / FILE,
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{n}" for n in names)],
            output_names=["logits", *(f"present.{n}" for n in names)],
            dynamic_shapes={
                "input_ids": {0: "batch", 1: "tokens"},
                "attention_mask": {0: "batch", 1: "past_and_tokens"},
                "past": [{0: "batch", 2: "past"} for _ in past],
            },
            dynamo=True,
            verbose=False,
        )
    return []


def check(source: Source, folder: Path, windows: torch.Tensor) -> dict:
    """Figures of onnxruntime on windows, whole and token by token; ParityError past rounding."""
    import onnxruntime

    session = Session(folder / FILE, source.config)
    found = compare_logits(source.model, session, windows, f"onnxruntime {onnxruntime.__version__}")
    same = 0
    for prompt in prompts_of(windows):
        ours = greedy_tokens(lambda ids: torch_logits(source.model, ids), prompt, NEW_TOKENS)
        same += ours == _greedy(session, prompt, NEW_TOKENS)
    return {**found, "greedy": {"same": same, "prompts": PROMPTS, "tokens": NEW_TOKENS}}


def _greedy(session: Session, prompt: list[int], count: int) -> list[int]:
    """greedy_tokens with the cache: after the prompt, each call has one token."""
    logits, past = session.run(torch.tensor([prompt]))
    found = [int(logits[0, -1].argmax())]
    while len(found) < count:
        logits, past = session.run(torch.tensor([found[-1:]]), past)
        found.append(int(logits[0, -1].argmax()))
    return found


def _tensors(cache) -> list[torch.Tensor]:
    """Keys and values of each layer, one after another."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]

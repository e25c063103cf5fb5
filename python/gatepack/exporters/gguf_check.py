"""Stage 6, export: that a GGUF file holds the model's weights, and llama.cpp computes with them.

Both are checked by themselves. The file's tensors are read back and may differ from the model's by
one rounding of their type. llama.cpp is then compared with torch on these very tensors: it rounds
what goes into each matrix product to the matrix's type (8 bits for q8_0, in blocks of 32), and may
be as far from torch, which does not, as torch is when it does the same.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from gatepack.exporters.parity import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    PROMPTS,
    greedy_tokens,
    prompts_of,
    refuse_perplexity,
    torch_logits,
)
from gatepack.exporters.source import Source, cast_copy
from gatepack.quality import ParityError, perplexity
from gatepack.rounding import Apart, judge, last_place, logits_by_window, rounding_effect

# Half a unit in the last place, of an element or, for q8_0, of the largest of its block; a scale of
# q8_0 is itself a float16.
_STEP = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127 + 2.0**-11}
_BLOCK = 32
_SMALLEST_HALF = 2.0**-24


def read_back(source: Source, path: Path, places: dict[str, tuple[str, torch.Tensor | None]]):
    """(the model with the file's weights in float32, module name -> type of its matrix).

    places: GGUF name -> (name in the state dict, order of its rows there or None). Raises
    ParityError, naming the tensor, for one that is not the model's, rounded once.
    """
    import gguf

    stored = cast_copy(source.model, torch.float32)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    own, weights = source.model.state_dict(), stored.state_dict()
    kinds = {}
    with torch.no_grad():
        for name, (place, order) in places.items():
            kind = found[name].tensor_type
            values = torch.from_numpy(gguf.quants.dequantize(found[name].data, kind).copy())
            rows = torch.empty_like(values)
            rows[slice(None) if order is None else order] = values
            expected = own[place].detach().float().cpu()
            if rows.shape != expected.shape or not _is_rounded(rows, expected, kind.name):
                raise ParityError(f"{path.name}: {name} is not {place}, rounded to {kind.name}")
            weights[place].copy_(rows)
            kinds[place.removesuffix(".weight")] = kind.name
    stored.tie_weights()
    return stored.eval(), kinds


def _is_rounded(values: torch.Tensor, exact: torch.Tensor, kind: str) -> bool:
    scale = exact.abs()
    if kind == "Q8_0":
        blocks = scale.reshape(*scale.shape[:-1], -1, _BLOCK)
        scale = blocks.amax(-1, keepdim=True).expand_as(blocks).reshape(exact.shape)
    return bool(((values - exact).abs() <= _STEP[kind] * scale + _SMALLEST_HALF).all())


def compare_llama_cpp(source: Source, stored: nn.Module, kinds: dict, path: Path, windows) -> dict:
    """Figures of llama.cpp on windows; ParityError past what its rounding explains."""
    import llama_cpp

    what = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
    sample = windows[:4].cpu()
    stored = stored.to("cpu")
    with _running(path, max(sample.shape[1], PROMPT_TOKENS + NEW_TOKENS)) as (runner, logits_of):
        tokenized = sum(_same_tokens(runner, source.tokenizer, row) for row in sample)
        theirs = [logits_of(row.tolist()) for row in sample]
        continued = [
            (prompt, greedy_tokens(logits_of, prompt, NEW_TOKENS)) for prompt in prompts_of(windows)
        ]
    found = Apart.of(logits_by_window(stored, sample), theirs, sample)
    effect = rounding_effect(stored, sample, _roundings(stored, kinds))
    judged = judge(found, stored, sample, lambda: effect, what)
    nats = [
        nn.functional.cross_entropy(logits[:-1], row[1:].long(), reduction="none")
        for row, logits in zip(sample, theirs, strict=True)
    ]
    figures = {
        "model": perplexity(source.model, sample),
        "stored": perplexity(stored, sample),
        "export": torch.cat(nats).double().mean().exp().item(),
    }
    refuse_perplexity(figures["stored"], figures["export"], what, effect)
    return {
        "consumer": what,
        **judged,
        "perplexity": figures,
        "greedy": _greedy(source.model, stored, continued, effect),
        "tokenized": {"same": tokenized, "texts": len(sample)},
    }


@contextlib.contextmanager
def _running(path: Path, context: int) -> Iterator[tuple]:
    """(llama.cpp's model, function from ids [n] to its logits [n, vocabulary]).

    Keys and values stay in float32.
    """
    import llama_cpp

    runner = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )

    def logits_of(ids: list[int]) -> torch.Tensor:
        done = runner.n_tokens
        if ids[:done] != runner.input_ids[:done].tolist() or done >= len(ids):
            runner.reset()
        runner.eval(ids[runner.n_tokens :])
        return torch.from_numpy(runner.scores[: len(ids)].copy())

    try:
        yield runner, logits_of
    finally:
        runner.close()


def _same_tokens(runner, tokenizer, ids: torch.Tensor) -> bool:
    text = tokenizer.decode(ids)
    return runner.tokenize(text.encode(), special=True) == tokenizer(text).input_ids


def _roundings(model: nn.Module, kinds: dict[str, str]) -> dict[nn.Module, Callable]:
    """What llama.cpp rounds the input of each linear to; a tied head has the embedding's type."""
    forms = {"F32": last_place, "F16": _to(torch.float16), "BF16": _to(torch.bfloat16)}
    forms["Q8_0"] = _to_blocks
    return {
        module: forms[kinds.get(name) or kinds["model.embed_tokens"]]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(dtype).to(x.dtype)


def _to_blocks(x: torch.Tensor) -> torch.Tensor:
    """x as q8_0: per block of 32 a float16 scale, largest / 127, and integers."""
    blocks = x.reshape(*x.shape[:-1], -1, _BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scale > 0, blocks / scale, 0.0).round()
    return (steps * scale.half().float()).reshape(x.shape)


def _greedy(model: nn.Module, stored: nn.Module, continued: list, effect: Apart) -> dict:
    """How many of llama.cpp's continuations are the model's, and those of the stored weights.

    ties: how many part from the latter where the two tokens' logits are closer than rounding, at
    its 90th percentile, moves them.
    """
    reach = 2 * effect.logits.quantile(0.9).item()
    found = {"same": 0, "same_stored": 0, "ties": 0, "prompts": PROMPTS, "tokens": NEW_TOKENS}
    for prompt, theirs in continued:
        ours = greedy_tokens(lambda ids: torch_logits(model, ids), prompt, NEW_TOKENS)
        kept = greedy_tokens(lambda ids: torch_logits(stored, ids), prompt, NEW_TOKENS)
        found["same"] += ours == theirs
        found["same_stored"] += kept == theirs
        if kept != theirs:
            at = next(i for i in range(NEW_TOKENS) if kept[i] != theirs[i])
            logits = torch_logits(stored, prompt + kept[:at])[-1]
            found["ties"] += (logits[kept[at]] - logits[theirs[at]]).item() <= reach
    return found

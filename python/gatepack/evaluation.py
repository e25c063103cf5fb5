"""Stage 7, command line: a language model's quality and speed on given inputs, as one report."""

import contextlib
import functools
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

import gatepack
from gatepack.data import load_documents, split_documents
from gatepack.files import plain, read_safetensors, refuse_folder, write_json, write_safetensors
from gatepack.inspection import identify
from gatepack.models import load_model, torch_device, torch_dtype
from gatepack.optional import require
from gatepack.progress import Log
from gatepack.quality import TokenScores, input_device, token_scores
from gatepack.regression import FORMAT_VERSION
from gatepack.resume import State, fingerprint, state_of
from gatepack.scoring import (
    ChoiceScores,
    Question,
    load_questions,
    score_questions,
    wilson_interval,
)
from gatepack.texts import TextScore, check_windows, score_text, sha256_of, windows_of
from gatepack.timing import Measurement, environment, measure, seconds_of

DEFAULT_TEXT = "Python's manual, held out"
POOLED = "pooled"


@dataclass(frozen=True)
class EvalConfig:
    """What evaluate reads and how much of it.

    texts, ood: files or folders as load_documents takes them, in and out of the model's domain.
    choices: .jsonl files as load_questions takes them. tasks: names that lm-eval knows. Without any
    of the four, the text is every sixth topic of Python's manual, which the demo holds out.
    windows: at most so many per text, 0 for all of it; length and stride in tokens, stride None for
    length // 2. questions: the first so many of a file (and lm-eval's limit), 0 for all.
    batch_size: windows or choices per forward, at most. latency: also time the model, on one
    sequence.
    """

    texts: tuple[Path, ...] = ()
    ood: tuple[Path, ...] = ()
    choices: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ()
    windows: int = 32
    length: int = 512
    stride: int | None = None
    questions: int = 0
    batch_size: int = 4
    latency: bool = True
    prompt_tokens: int = 256
    new_tokens: int = 32
    repeats: int = 5

    def __post_init__(self):
        check_windows(self.length, self.stride, self.windows)
        if self.questions < 0:
            raise ValueError(f"questions must be >= 0 (0 for all), got {self.questions}")
        for name in ("batch_size", "prompt_tokens", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


def evaluate(
    model: nn.Module,
    tokenizer,
    config: EvalConfig | None = None,
    *,
    name: str = "",
    base: tuple[nn.Module, object] | None = None,
    log: Log | None = None,
) -> dict:
    """Scores a causal language model on texts, questions and tasks, and times it; a report.

    The report is plain JSON: format, model (what was scored), environment, settings, and entries,
    each with kind, name, inputs (what must be equal for two entries to be compared) and metrics.
    Several texts also give one pooled entry. Entries of kind "ood" have ratio_to_text, their
    perplexity over that of the in-domain texts. base, (model, tokenizer): scored on the same
    inputs; entries then have the base's metrics and relative_change, new / base - 1, of perplexity
    (where both tokenizers give equally many tokens) and bits per byte. log shows the progress; None
    for bars on stderr. Raises ValueError with one
    sentence on what to change, and ImportError if tasks are asked for and lm-eval is missing.
    """
    config = EvalConfig() if config is None else config
    return _evaluate(model, tokenizer, config, name, base, "", log or Log(), None)


def _evaluate(model, tokenizer, config, name, base, base_name, log, out: Path | None) -> dict:
    """evaluate; with out, what is scored is kept beside it until it is written."""
    if not callable(tokenizer):
        raise ValueError(f"tokenizer must be one of transformers, got {type(tokenizer).__name__}")
    if not isinstance(config, EvalConfig):
        raise ValueError(f"config must be an EvalConfig or None, got {type(config).__name__}")
    _require_lm_eval(config)
    texts, questions = _load_texts(config), _load_choices(config)
    state = None
    if out is not None:
        models = [model] if base is None else [model, base[0]]
        inputs = {
            "settings": plain(asdict(config)),
            "models": [fingerprint(each) for each in models],
            "inputs": sha256_of([*_documents(texts), *map(repr, questions.values())]),
            "environment": environment(input_device(model)),
            "version": gatepack.__version__,
        }
        state = State.open(state_of(out), inputs)
    entries = _quality(model, tokenizer, texts, questions, config, name or "the model", log, state)
    if base is not None:
        others = _quality(*base, texts, questions, config, "the base model", log, state)
        for entry, other in zip(entries, others, strict=True):
            _set_beside(entry, other)
    entries += _once(state, "tasks", lambda: _tasks(model, tokenizer, config))
    if config.latency:
        once = None if state is None else state.once
        entries.append(_latency(model, config, None if base is None else base[0], once))
    report = {
        "format": FORMAT_VERSION,
        "model": identify(model, name),
        "base": None if base is None else identify(base[0], base_name),
        "environment": environment(input_device(model)),
        "settings": plain(asdict(config)),
        "entries": entries,
    }
    if state is not None:
        write_json(out, report)
        state.clear()
    return report


def _documents(texts: dict[str, dict[str, list[str]]]) -> Iterator[str]:
    for kind, named in texts.items():
        for name, documents in named.items():
            yield f"{kind} {name} {sha256_of(documents)}"


def _once(state: State | None, name: str, compute: Callable[[], object]):
    return compute() if state is None else state.once(name, compute)


def _score_once(state: State | None, name: str, compute: Callable[[], TextScore]) -> TextScore:
    """compute's score of a text, stored as safetensors, or what is stored."""
    if state is None:
        return compute()
    path = state.folder / f"{sha256_of([name])[:16]}.safetensors"
    if not path.is_file():
        score = compute()
        facts = {"bytes": str(score.bytes), "sha256": score.sha256}
        write_safetensors(path, dict(vars(score.scores)), facts)
        return score
    tensors, facts = read_safetensors(path)
    return TextScore(TokenScores(**tensors), int(facts["bytes"]), facts["sha256"])


def run(
    model: str,
    config: EvalConfig,
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    out: Path | None = None,
    log: Log | None = None,
) -> dict:
    """evaluate on models by name (as load_model takes them); the report, also written to out.

    The file is written whole or not at all; cut off, a run with the same models, inputs and
    settings does not score again the texts and questions that are done, which OUT.resume keeps.
    Raises ValueError for an unknown dtype or device, a folder in the place of out, and an
    unfinished run with other settings.
    """
    if out is not None:
        refuse_folder(out)
    _require_lm_eval(config)
    (scored, tokenizer), beside = _load(model, base, device, dtype)
    out = None if out is None else Path(out)
    return _evaluate(scored, tokenizer, config, model, beside, base or "", log or Log(), out)


def plan(
    model: str,
    config: EvalConfig,
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> dict:
    """What run would score and how long it would take; writes nothing.

    texts: windows of each. questions: of each file. seconds: of texts, questions and timing, from
    one window, one question of each file and one repeat; lm-eval's tasks come on top. Raises as run
    does.
    """
    _require_lm_eval(config)
    texts, questions = _load_texts(config), _load_choices(config)
    loaded, beside = _load(model, base, device, dtype)
    models = [loaded] if beside is None else [loaded, beside]
    counts = {}
    seconds = 0.0
    for scored, tokenizer in models:
        for kind, named in texts.items():
            for name, documents in named.items():
                with _naming(name):
                    ids, mask, _ = windows_of(
                        scored, tokenizer, documents, config.length, config.stride, config.windows
                    )
                counts[f"{kind} {name}"] = len(ids)
                seconds += len(ids) * seconds_of(token_scores, scored, ids[:1], mask[:1])
        for asked in questions.values():
            seconds += len(asked) * seconds_of(score_questions, scored, tokenizer, asked[:1])
    if config.latency:
        other = None if beside is None else beside[0]
        seconds += config.repeats * _measure(loaded[0], config, other, 1).seconds
    return {
        "model": identify(loaded[0], model),
        "base": None if beside is None else identify(beside[0], base),
        "texts": counts,
        "questions": {name: len(asked) for name, asked in questions.items()},
        "tasks": list(config.tasks),
        "seconds": seconds,
        "environment": environment(input_device(loaded[0])),
    }


def _load(model: str, base: str | None, device: str, dtype: str) -> tuple[tuple, tuple | None]:
    """(model, tokenizer) on the device, and the same of base, where there is one."""
    place, precision = torch_device(device), torch_dtype(dtype)
    names = [model] if base is None else [model, base]
    pairs = [load_model(name, precision) for name in names]
    first, *others = [(each.to(place), tokenizer) for each, tokenizer in pairs]
    return first, others[0] if others else None


def _load_texts(config: EvalConfig) -> dict[str, dict[str, list[str]]]:
    """kind -> name -> documents."""
    texts = {
        kind: {name: load_documents(path) for name, path in _named(paths).items()}
        for kind, paths in (("text", config.texts), ("ood", config.ood))
    }
    if not any((config.texts, config.ood, config.choices, config.tasks)):
        texts["text"] = {DEFAULT_TEXT: split_documents(load_documents(None))[1]}
    return texts


def _load_choices(config: EvalConfig) -> dict[str, list[Question]]:
    most = config.questions or None
    return {name: load_questions(path)[:most] for name, path in _named(config.choices).items()}


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    """Paths by file name, or by the path as given where two have the same name."""
    paths = [Path(path) for path in dict.fromkeys(paths)]
    names = [path.name for path in paths]
    return {
        path.as_posix() if names.count(path.name) > 1 or path.name == POOLED else path.name: path
        for path in paths
    }


def _quality(
    model, tokenizer, texts, questions, config: EvalConfig, title: str, log: Log, state
) -> list[dict]:
    entries = []
    for kind, named in texts.items():
        found = {}
        for name, documents in named.items():
            with log.bar(f"{title} on {name}", "window") as tell, _naming(name):
                score = functools.partial(
                    score_text,
                    model,
                    tokenizer,
                    documents,
                    length=config.length,
                    stride=config.stride,
                    windows=config.windows,
                    batch_size=config.batch_size,
                    progress=tell,
                )
                found[name] = _score_once(state, f"{title} {kind} {name}", score)
        if len(found) > 1:
            found[POOLED] = TextScore.joined(list(found.values()))
        entries += [_text_entry(kind, name, score, config) for name, score in found.items()]
    _set_ratio_to_text(entries)
    for name, asked in questions.items():
        total = sum(len(question.choices) for question in asked)
        with log.bar(f"{title} on {name}", "choice", total) as tell, _naming(name):
            entry = _once(
                state,
                f"{title} choices {name}",
                lambda asked=asked, name=name, tell=tell: _choices_entry(
                    name, score_questions(model, tokenizer, asked, config.batch_size, tell)
                ),
            )
        entries.append(entry)
    return entries


def _text_entry(kind: str, name: str, score: TextScore, config: EvalConfig) -> dict:
    stride = check_windows(config.length, config.stride, config.windows)
    return {
        "kind": kind,
        "name": name,
        "inputs": {"sha256": score.sha256, "length": config.length, "stride": stride},
        "bytes": score.bytes,
        "tokens": len(score.scores.nats),
        "metrics": score.metrics(),
        "token_accuracy": score.scores.hit.double().mean().item(),
    }


def _set_ratio_to_text(entries: list[dict]) -> None:
    """Sets the perplexity of what is out of domain against that of what is in it, pooled."""
    inside = [entry for entry in entries if entry["kind"] == "text"]
    for entry in entries:
        if inside and entry["kind"] == "ood":
            perplexity = inside[-1]["metrics"]["perplexity"]
            entry["ratio_to_text"] = entry["metrics"]["perplexity"] / perplexity


def _choices_entry(name: str, scores: ChoiceScores) -> dict:
    entry = {
        "kind": "choices",
        "name": name,
        "inputs": {"sha256": sha256_of(json.dumps(asdict(each)) for each in scores.questions)},
        "questions": len(scores.questions),
        "chance": scores.chance,
        "truncated": scores.truncated,
        "metrics": {},
        "interval": {},
    }
    for metric, per_byte in (("accuracy", False), ("accuracy_per_byte", True)):
        hits = scores.hits(per_byte)
        entry["metrics"][metric] = hits.double().mean().item()
        entry["interval"][metric] = list(wilson_interval(int(hits.sum()), len(hits)))
    entry["metrics"]["calibration_error"] = scores.calibration_error
    return entry


def _set_beside(entry: dict, base: dict) -> None:
    """Adds the base's metrics and how perplexity and bits per byte differ from them."""
    entry["base"] = base["metrics"]
    alike = {"bits_per_byte": entry["inputs"] == base["inputs"]}
    alike["perplexity"] = alike["bits_per_byte"] and entry.get("tokens") == base.get("tokens")
    entry["relative_change"] = {
        metric: entry["metrics"][metric] / base["metrics"][metric] - 1
        for metric in ("perplexity", "bits_per_byte")
        if metric in entry["metrics"] and alike[metric]
    }


def _require_lm_eval(config: EvalConfig) -> None:
    if config.tasks:
        require(f"tasks={','.join(config.tasks)}", "lm-eval")


def _tasks(model: nn.Module, tokenizer, config: EvalConfig) -> list[dict]:
    """One entry per task that lm-eval reports, groups and their members included."""
    if not config.tasks:
        return []
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(config.tasks),
            limit=config.questions or None,
            log_samples=False,
        )
    except KeyError as error:
        raise ValueError(f"lm-eval does not have the task {error}") from error
    return [_task_entry(name, values, found) for name, values in found["results"].items()]


def _task_entry(name: str, values: dict, found: dict) -> dict:
    """values: {"acc,none": 0.5, "acc_stderr,none": 0.1, ...}, a metric and its filter."""
    numbers = {
        key: float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }
    metrics = {key: value for key, value in numbers.items() if "_stderr," not in key}
    better = found.get("higher_is_better", {}).get(name, {})
    samples = found.get("n-samples", {}).get(name, {})
    return {
        "kind": "task",
        "name": name,
        "inputs": {
            "version": found.get("versions", {}).get(name),
            "n_shot": found.get("n-shot", {}).get(name),
            "samples": samples.get("effective"),
        },
        "metrics": metrics,
        "stderr": {key: value for key, value in numbers.items() if key not in metrics},
        "higher_is_better": {key: better.get(key.partition(",")[0]) for key in metrics},
    }


def _latency(
    model: nn.Module, config: EvalConfig, base: nn.Module | None, once: Callable | None
) -> dict:
    measured = _measure(model, config, base, config.repeats, once)
    return {
        "kind": "latency",
        "name": "random prompts",
        "inputs": {
            "device": measured.device,
            "machine": platform.machine(),
            "threads": measured.threads,
            "prompt_tokens": measured.prompt_tokens,
            "new_tokens": measured.new_tokens,
            "batch_size": measured.batch_size,
        },
        "metrics": _milliseconds(measured),
        "measurement": measured.to_dict(),
    }


def _measure(model, config: EvalConfig, base, repeats: int, once=None) -> Measurement:
    return measure(
        model,
        dense=base,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        repeats=repeats,
        once=once,
    )


def _milliseconds(measured: Measurement) -> dict[str, float]:
    """Median ms per token of each phase that the model has."""
    rates = {"prefill": measured.model.prefill, "decode": measured.model.decode}
    return {
        f"{phase}_ms_per_token": 1000 / rate.median
        for phase, rate in rates.items()
        if rate is not None
    }


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

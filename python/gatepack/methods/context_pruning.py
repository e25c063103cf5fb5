"""Stage 4, methods: contextual pruning (Mini-GPTs): remove what stays quiet on a domain's text."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gatepack.compensation import add_removed_means, check_biases
from gatepack.data import split_documents, to_windows
from gatepack.gates import GateSet
from gatepack.layers import hf_model
from gatepack.methods.context_statistics import (
    ContextStatistics,
    Quiet,
    context_statistics,
    quiet_units,
)
from gatepack.methods.one_shot import OneShot, fine_tune, open_gates, worth
from gatepack.methods.statistics import Batch
from gatepack.packing import PackReport
from gatepack.quality import input_device, vocabulary_size
from gatepack.texts import score_text
from gatepack.training import FineTuning, TrainConfig
from gatepack.vocab import most_frequent, shrink_vocabulary, tokenizer_record

RULES = ("thresholds", "budget")


@dataclass(frozen=True)
class ContextRun:
    """model, tokenizer: after everything. report: what was removed. scores: "base", "pruned" and
    "tuned" -> metrics on the held-out text (perplexity, bits_per_byte, ...). losses: by step.
    dropped_tokens: rows that the embedding lost."""

    model: nn.Module
    tokenizer: object
    report: PackReport
    scores: dict[str, dict[str, float]]
    losses: list[float]
    dropped_tokens: int


@dataclass(frozen=True)
class ContextPruning(OneShot):
    """Closes units whose mean absolute activation on a domain's text is at most a threshold.

    rule="thresholds", as published: one absolute threshold for the whole network. A channel goes if
    mean |x| of the linear that reads it is <= tau_activation or <= tau_linear, or if a linear that
    makes it is quiet: mean |y| <= tau_linear or, where the channel then is constant (no second
    factor), mean |y - b|. In fc1 -> act -> fc2, whatever act is, that x is the published
    activation; in SwiGLU it is act(a) * u, which decides, because act(a) alone says nothing of u. A
    head goes if all its lanes do, by o_proj's input or v's output. rule="budget" (ours): mean |x|,
    averaged over the lanes of a unit, with one threshold that meets the target of `gates`.

    compensate: what goes leaves its mean in the bias of the linear that read it, b += W[:, c]
    E[x_c]. tau_embedding: tokens whose share of the whole training text is <= it leave the
    vocabulary; 0 drops unseen ones, -1 (default) none. vocabulary_target (ours): instead, the kept
    fraction of the vocabulary, the most frequent tokens. Bytes, special tokens and the parts of
    kept ones stay, so that the shrunk tokenizer spells any text. window, calibration_windows: so
    many windows of the training text, from its beginning, are calibrated on. every: documents 0,
    every, 2 * every, ... are held out. Source: Mini-GPTs, arXiv 2312.12682, whose code zeroes and
    removes nothing, and calibrates, tunes and evaluates on the same text.
    """

    rule: str = "thresholds"
    tau_linear: float = 1e-3
    tau_activation: float = 1e-3
    tau_embedding: float = -1
    vocabulary_target: float | None = None
    compensate: bool = True
    window: int = 2048
    calibration_windows: int = 40
    every: int = 6

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {self.rule!r}")
        for field in ("tau_linear", "tau_activation"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must be a number >= 0, got {getattr(self, field)!r}")
        if self.tau_embedding != -1 and not 0 <= self.tau_embedding < 1:
            raise ValueError(f"tau_embedding must be -1 or in [0, 1), got {self.tau_embedding!r}")
        if self.vocabulary_target is not None and not 0 < self.vocabulary_target < 1:
            raise ValueError(
                f"vocabulary_target must be None or in (0, 1), got {self.vocabulary_target!r}"
            )
        if self.vocabulary_target is not None and self.tau_embedding >= 0:
            raise ValueError(
                f"vocabulary_target must be None with tau_embedding={self.tau_embedding}, got "
                f"{self.vocabulary_target}"
            )
        for field, least in (("window", 2), ("calibration_windows", 1), ("every", 2)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be >= {least}, got {getattr(self, field)}")

    def run(
        self,
        model: nn.Module,
        tokenizer,
        documents: Sequence[str],
        train: TrainConfig | None = None,
        *,
        held_out: Sequence[str] | None = None,
        length: int = 512,
        eval_windows: int = 0,
        folder: str | os.PathLike | None = None,
        on_step: Callable[[FineTuning], None] | None = None,
    ) -> ContextRun:
        """Calibrates, prunes, packs and tunes on training documents, scores on held-out ones.

        documents: the domain's text; held_out: what to score on, by default every `every`-th of
        the distinct documents. With tau_embedding or vocabulary_target, tokens leave the model and
        the tokenizer, and all text is encoded anew; perplexities of tokens then differ in what a
        token is, bits per byte do not. length, eval_windows: of gatepack.texts.score_text. Raises
        ValueError if a document is on both sides, if the training text has fewer than
        calibration_windows windows, or for a tokenizer that cannot be shrunk.
        """
        train = TrainConfig() if train is None else train
        shrinks = self.tau_embedding >= 0 or self.vocabulary_target is not None
        record = tokenizer_record(tokenizer) if shrinks else None
        training, held_out = split_text(documents, held_out, self.every)
        ids = to_windows(training, tokenizer, 1).reshape(-1)
        calibration = self._calibration(ids)
        windows = to_windows(training, tokenizer, train.window)
        scores: dict[str, dict[str, float]] = {}

        def score(name: str) -> None:
            found = score_text(model, tokenizer, held_out, length=length, windows=eval_windows)
            scores[name] = found.metrics()

        score("base")
        report = self.prune(model, calibration)
        dropped = 0
        if shrinks:
            counts = token_counts([ids], vocabulary_size(model))
            if self.vocabulary_target is None:
                keep = self.kept_tokens(counts, tokenizer.all_special_ids).nonzero().squeeze(1)
            else:
                size = round(self.vocabulary_target * len(counts))
                keep = torch.tensor(most_frequent(record, counts, size))
            vocabulary, tokenizer = shrink_vocabulary(hf_model(model), tokenizer, keep.tolist())
            dropped = vocabulary.size - len(vocabulary.keep)
            windows = to_windows(training, tokenizer, train.window)
        score("pruned")
        windows = windows.to(input_device(model))
        losses, model = fine_tune(model, windows, train, folder, on_step)
        score("tuned")
        return ContextRun(model, tokenizer, report, scores, losses, dropped)

    def quiet(self, model: nn.Module, batches: Iterable[Batch]) -> Quiet:
        """What the thresholds find in a gated model; closes nothing."""
        gates = open_gates(model)
        return self._quiet(gates, context_statistics(gates, batches))

    def kept_tokens(self, counts: torch.Tensor, special: Iterable[int] = ()) -> torch.Tensor:
        """Which tokens stay, bool [V]: count / total > tau_embedding, and the special ones."""
        total = int(counts.sum())
        if total == 0:
            raise ValueError("counts hold no token, so every one of them would go")
        keep = counts.double() / total > self.tau_embedding
        keep[torch.tensor(sorted(special), dtype=torch.int64, device=keep.device)] = True
        return keep

    def _calibration(self, ids: torch.Tensor) -> list[torch.Tensor]:
        found = len(ids) // self.window
        if found < self.calibration_windows:
            raise ValueError(
                f"the training text has {found} windows of {self.window} tokens, "
                f"calibration_windows asks for {self.calibration_windows}: give more text or lower "
                "either"
            )
        return list(ids[: self.calibration_windows * self.window].reshape(-1, 1, self.window))

    def _check(self, gates: GateSet) -> None:
        if self.compensate:
            check_biases(gates)

    def _measure(self, gates: GateSet, batches: Iterable[Batch]) -> ContextStatistics:
        return context_statistics(gates, batches)

    def _metric(self, gates: GateSet, measured: ContextStatistics) -> dict[str, torch.Tensor]:
        return {
            name: measured.inputs[measured.readers[name]].reshape(gate.size, gate.lanes).mean(1)
            for name, gate in gates.items()
        }

    def _score(self, gates: GateSet, measured: ContextStatistics) -> dict[str, torch.Tensor]:
        return worth(gates, self._metric(gates, measured))

    def _masks(self, gates: GateSet, measured: ContextStatistics) -> Mapping[str, torch.Tensor]:
        scores = self._score(gates, measured)
        if self.rule == "budget":
            return gates.plan(scores).masks
        found = self._quiet(gates, measured).open
        for name, mask in found.items():
            if not mask.any():
                raise ValueError(
                    f"tau_linear={self.tau_linear} and tau_activation={self.tau_activation} would "
                    f"close every unit of {name!r}: lower them, or use rule='budget'"
                )
        return found

    def _quiet(self, gates: GateSet, measured: ContextStatistics) -> Quiet:
        return quiet_units(gates, measured, self.tau_linear, self.tau_activation)

    def _close(
        self, gates: GateSet, masks: Mapping[str, torch.Tensor], measured: ContextStatistics
    ) -> None:
        gates.set_open(masks)
        if self.compensate:
            add_removed_means(gates, masks, measured.means)


def split_text(
    documents: Sequence[str], held_out: Sequence[str] | None = None, every: int = 6
) -> tuple[list[str], list[str]]:
    """(training, held out) documents, none of them on both sides; white space does not tell apart.

    Without held_out, documents 0, every, 2 * every, ... of the distinct ones are held out. Raises
    ValueError if a given held-out document is also among the others.
    """
    distinct = {" ".join(document.split()): document for document in reversed(documents)}
    distinct = dict(reversed(distinct.items()))
    if held_out is None:
        return split_documents(list(distinct.values()), every)
    for index, document in enumerate(held_out):
        if " ".join(document.split()) in distinct:
            raise ValueError(
                f"held_out[{index}] is also a training document: what is scored must be new"
            )
    if not documents or not held_out:
        raise ValueError(
            f"documents and held_out must not be empty, got {len(documents)} and {len(held_out)}"
        )
    return list(distinct.values()), list(held_out)


def token_counts(batches: Iterable[torch.Tensor], vocabulary: int) -> torch.Tensor:
    """How often each token occurs in token ids of any shape, int64 [vocabulary]."""
    counts = None
    for ids in batches:
        found = torch.bincount(ids.reshape(-1), minlength=vocabulary)
        counts = found if counts is None else counts + found
    if counts is None or len(counts) != vocabulary:
        raise ValueError(
            f"token ids must be in [0, {vocabulary}), and at least one batch is needed; got "
            f"{'none' if counts is None else len(counts) - 1}"
        )
    return counts

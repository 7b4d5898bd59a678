"""Perplexity of a model on text, and how far it has moved from the original on the same text.

Both models run the same windows layer by layer, and their logits meet one batch at a time: nothing of the size of
vocabulary × text is ever kept.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compress.calib.reading import text_files
from moe_compress.calib.routing import RoutingLog, routing_drift
from moe_compress.calib.text import load_windows
from moe_compress.errors import DataError, RunError
from moe_compress.model import MoEModel
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Progress
from moe_compress.recipe import Evaluation

# Positions whose logits are turned into log-probabilities at a time.
_POSITIONS = 512


@dataclass
class Score:
    """Sums over the predicted tokens of one file.

    Attributes:
        tokens: predicted tokens.
        nll: Σ −log p(token), nats.
        kl: Σ KL(original ‖ this), nats; stays 0 without an original.
        agreed: tokens where both models' most likely next token is the same.
    """

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per predicted token."""
        return math.exp(self.nll / self.tokens) if self.tokens else math.nan


@dataclass
class TextScores:
    """Scores per file stem, of this model and, where there is one, of the original on the same windows; how far each
    layer's routing has moved; "before" or "after" → RoutingLog.experts_per_token, where experts are skipped; and
    what was counted of texts that the original and this model wrote."""

    after: dict[str, Score] = field(default_factory=dict)
    before: dict[str, Score] = field(default_factory=dict)
    routing: dict[int, dict[str, float]] = field(default_factory=dict)
    used: dict[str, dict[str, Any]] = field(default_factory=dict)
    written: tuple[dict[str, float], dict[str, float]] | None = None

    def generation(self, which: int) -> dict[str, Any]:
        """ "generation" of the original (0) or this model (1); empty where nothing was written."""
        return {"generation": self.written[which]} if self.written is not None else {}

    def summary(self, which: str) -> dict[str, Any]:
        """ "perplexity" per file of "before" or "after"; "experts_per_token" where experts are skipped."""
        found: dict[str, Any] = {"perplexity": {name: score.perplexity for name, score in getattr(self, which).items()}}
        return found | ({"experts_per_token": self.used[which]} if which in self.used else {})

    def drift(self) -> dict[str, Any]:
        """ "kl" (mean nats per token), "agreement" (share of tokens) per file, "routing" per layer; empty without an
        original."""
        if not self.before:
            return {}
        return {
            "kl": {name: score.kl / score.tokens for name, score in self.after.items()},
            "agreement": {name: score.agreed / score.tokens for name, score in self.after.items()},
            "routing": {str(layer): values for layer, values in self.routing.items()},
        }


@dataclass(frozen=True)
class WindowBatch:
    """Windows of one file that run together.

    Attributes:
        name: file stem.
        ids: token ids [B, S].
        first: for each window, the first token whose prediction counts.
    """

    name: str
    ids: Tensor
    first: list[int]


def load_text(tokenizer: Any, wanted: Evaluation, vocabulary: int | None = None) -> list[WindowBatch]:
    """Windows of each file, in batches. Raises DataError when two files share a stem, or one can't be used."""
    batches: list[WindowBatch] = []
    stems: dict[str, Path] = {}
    for file in find_files(wanted.text):
        if file.stem in stems:
            raise DataError(f"{stems[file.stem]} and {file} would have the same name in the report: rename one")
        stems[file.stem] = file
        windows = load_windows(
            file, tokenizer, wanted.length, field=wanted.field, max_tokens=wanted.max_tokens, vocab_size=vocabulary
        )
        for ids, rows in windows.batches(wanted.batch_size):
            batches.append(WindowBatch(file.stem, ids, [windows.first[i] for i in rows]))
    return batches


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files that paths, folders and globs name, in order. Raises DataError for one that names nothing."""
    found: list[Path] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            found += text_files(Path(pattern))[0]
            continue
        matches = sorted(Path(p) for p in glob.glob(pattern)) if glob.has_magic(pattern) else [Path(pattern)]
        if not matches or not matches[0].is_file():
            raise DataError(f"no text file at {pattern}")
        found += matches
    return found


def score_text(
    model: MoEModel,
    batches: Sequence[WindowBatch],
    original: MoEModel | None,
    hold: Path | None,
    progress: Progress,
    slots: Mapping[int, Sequence[int]] | None = None,
) -> TextScores:
    """Run windows through a model, and through the original beside it, one layer of each in memory.

    `slots`: layer → where each expert of the original is now (see routing_drift).
    """
    logs = [RoutingLog(sum(batch.ids.numel() for batch in batches)) for _ in range(2)]
    inputs = [{"input_ids": batch.ids} for batch in batches]
    with ExitStack() as stack:
        sweeps = []
        for number, each in enumerate((model, original)):
            if each is not None:
                own = hold / str(number) if hold is not None else None
                if own is not None:
                    own.mkdir(parents=True, exist_ok=True)
                sweeps.append(stack.enter_context(Sweep(each, inputs, own)))
        for sweep, log in zip(sweeps, logs, strict=False):
            for step in sweep:
                step.advance(log.observe)
                progress.layer(step.index)
        outputs = [sweep.outputs() for sweep in sweeps]
        scores = score_batches(batches, outputs[0], outputs[1] if len(outputs) > 1 else None)
        if original is not None:
            scores.routing = routing_drift(logs[1], logs[0], slots)
        scores.used = experts_used(logs[0], logs[1] if original is not None else None, has_rules(model, original))
        return scores


def has_rules(*models: MoEModel | None) -> bool:
    """Whether any of the models skips experts."""
    return any(model.block(i).rules for model in models if model is not None for i in model.moe_layers)


def experts_used(after: RoutingLog, before: RoutingLog | None, skipping: bool) -> dict[str, dict[str, Any]]:
    """`TextScores.used`: nothing where no experts are skipped."""
    logs = {"after": after, "before": before}
    return {name: log.experts_per_token() for name, log in logs.items() if log is not None and skipping}


def score_batches(
    batches: Sequence[WindowBatch],
    logits: Iterator[tuple[int, Tensor]],
    original: Iterator[tuple[int, Tensor]] | None = None,
) -> TextScores:
    """Scores from logits [B, S, V] of each batch, in order, and those of the original on the same batches.

    Raises RunError when a model's logits are not numbers.
    """
    scores = TextScores()
    for number, output in logits:
        reference = next(original)[1] if original is not None else None
        batch = batches[number]
        after = scores.after.setdefault(batch.name, Score())
        before = scores.before.setdefault(batch.name, Score()) if reference is not None else None
        for row, first in enumerate(batch.first):
            targets = batch.ids[row, first:].to(output.device)
            kept = slice(first - 1, -1)
            _add_row(after, before, targets, output[row, kept], None if reference is None else reference[row, kept])
        for which, score in (("model", after), ("original", before)):
            if score is not None and not math.isfinite(score.nll):
                raise RunError(f"the {which}'s predictions on {batch.name} are not numbers: its weights are damaged")
    return scores


def _add_row(after: Score, before: Score | None, targets: Tensor, logits: Tensor, reference: Tensor | None) -> None:
    for start in range(0, len(targets), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        wanted = targets[part].unsqueeze(1)
        log_p = logits[part].float().log_softmax(-1)
        after.tokens += len(wanted)
        after.nll -= float(log_p.gather(1, wanted).double().sum())
        if reference is None or before is None:
            continue
        log_q = reference[part].float().log_softmax(-1).to(log_p.device)
        before.tokens += len(wanted)
        before.nll -= float(log_q.gather(1, wanted).double().sum())
        # A token that the original rules out counts nothing. By rounding a sum may be negative; a divergence is not.
        terms = torch.where(log_q > -math.inf, log_q.exp() * (log_q - log_p), 0.0)
        after.kl += float(terms.sum(-1).double().clamp_min(0).sum())
        after.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

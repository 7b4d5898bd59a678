"""Log-likelihoods of token sequences from a model with one decoder layer in memory.

The contract: all sequences go through the layers together, so that each layer is read once for all of them, and once
more for every `CALLS` batches or quarter of the free memory's worth of hidden states. Log-probabilities are computed in
float32 whatever the model's dtype, and summed in float64. How the sequences are spread over batches depends on nothing
but them: equal calls give equal numbers.

Sequences of a batch are padded on the right, without an attention mask. In a causal model no position sees a later one,
so padding changes nothing but rounding. That would not hold where later positions matter: attention in both directions
(prefix, encoder-decoder and diffusion models), or tokens that compete for room (experts with a capacity, or experts
that choose their tokens). No model that `MoEModel` opens and that predicts the next token is of that kind.

Letters: B sequences, S positions, V entries of the vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from moe_compress.errors import RunError
from moe_compress.model import MoEModel
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Progress

# Token ids of a context and of what is to be scored after it.
Pair = tuple[list[int], list[int]]
# Log-likelihood (nats), and whether greedy decoding would give the same tokens.
Likelihood = tuple[float, bool]

# Positions whose logits are turned into log-probabilities at a time.
POSITIONS = 512
# Logits of one batch may take this much (bytes, as float32): long sequences go in smaller batches. A constant, not a
# share of the memory, because what runs together changes the last digits.
LOGITS = 1 << 30
# Batches that wait in one sweep at most: each is a thread, and containers often allow only a few thousand.
CALLS = 1000
# What a waiting batch holds per token, in multiples of its hidden state: a layer's input and its output, position
# embeddings, the residual streams that some families keep side by side.
STATES = 4


@dataclass(frozen=True)
class _Batch:
    """Sequences that run together, longest first; logits of its last `keep` positions are needed."""

    rows: tuple[tuple[int, ...], ...]
    keep: int

    @property
    def width(self) -> int:
        return len(self.rows[0])

    def inputs(self) -> Tensor:
        """[B, S], padded with id 0 as lm-eval does it."""
        ids_BS = torch.zeros(len(self.rows), self.width, dtype=torch.int64)
        for row, tokens in enumerate(self.rows):
            ids_BS[row, : len(tokens)] = torch.tensor(tokens)
        return ids_BS


class StreamedLikelihood:
    """Call it with all pairs at once.

    Args:
        model: on disk or in memory.
        batch_size: sequences that run together at most.
        length: tokens that the model sees at once; longer contexts lose their beginning.
        progress: told of every layer.
    """

    def __init__(self, model: MoEModel, batch_size: int, length: int, progress: Progress):
        self._model = model
        self._batch_size = batch_size
        self._length = length
        self._progress = progress
        self._vocabulary, self._hidden = model.module.get_input_embeddings().weight.shape
        # Without it the head makes logits of all positions, of which a few are read.
        self._keeps = "logits_to_keep" in inspect.signature(model.module.forward).parameters

    def __call__(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Of each pair's second part, after the first. Raises RunError when the model's predictions are not numbers."""
        # The last token is only predicted. Pairs that differ in nothing else (answers of one token) share a row.
        sharing: dict[tuple[int, ...], list[int]] = {}
        for number, (context, wanted) in enumerate(pairs):
            sharing.setdefault(tuple((context + wanted)[-(self._length + 1) : -1]), []).append(number)
        reads = {row: max(len(pairs[number][1]) for number in numbers) for row, numbers in sharing.items()}
        found: list[Likelihood] = [(math.nan, False)] * len(pairs)
        for batches in self._sweeps(self._batches(reads)):
            with Sweep(self._model, [self._arguments(batch) for batch in batches]) as sweep:
                for step in sweep:
                    step.advance()
                    self._progress.layer(step.index)
                for index, logits_BSV in sweep.outputs():
                    skipped = batches[index].width - logits_BSV.shape[1]  # positions at the front without logits
                    for tokens, logits_SV in zip(batches[index].rows, logits_BSV, strict=True):
                        for number in sharing[tokens]:
                            wanted = pairs[number][1]
                            end = len(tokens) - skipped
                            found[number] = _likelihood(logits_SV[end - len(wanted) : end], wanted)
        return finite(found)

    def _batches(self, reads: dict[tuple[int, ...], int]) -> list[_Batch]:
        """Rows of similar length together, longest first; `reads`: how many positions at its end each row needs."""
        batches: list[_Batch] = []
        rows: list[tuple[int, ...]] = []
        keep = 0
        for row in sorted(reads, key=lambda row: (-len(row), row)):
            width = len(rows[0]) if rows else len(row)
            needed = max(keep, width - len(row) + reads[row])
            size = 4 * (len(rows) + 1) * (needed if self._keeps else width) * self._vocabulary
            if rows and (len(rows) == self._batch_size or size > LOGITS):
                batches.append(_Batch(tuple(rows), keep))
                rows, needed = [], reads[row]
            rows.append(row)
            keep = needed
        return [*batches, _Batch(tuple(rows), keep)] if rows else batches

    def _sweeps(self, batches: Sequence[_Batch]) -> Iterator[list[_Batch]]:
        """Batches that go through the layers together: all, if there is room for their hidden states and threads."""
        room = _free_memory(self._model.device) // 4
        part: list[_Batch] = []
        held = 0
        for batch in batches:
            state = self._hidden * self._model.dtype.itemsize
            size = STATES * len(batch.rows) * batch.width * state
            if part and (len(part) == CALLS or held + size > room):
                yield part
                part, held = [], 0
            part.append(batch)
            held += size
        if part:
            yield part

    def _arguments(self, batch: _Batch) -> dict[str, Any]:
        ids = {"input_ids": batch.inputs()}
        return {**ids, "logits_to_keep": batch.keep} if self._keeps else ids


def _likelihood(logits_SV: Tensor, wanted: Sequence[int]) -> Likelihood:
    """Of the tokens `wanted` [S], from the logits that predict them."""
    total, greedy = 0.0, True
    for start in range(0, len(wanted), POSITIONS):
        log_p = logits_SV[start : start + POSITIONS].float().log_softmax(-1)
        ids_S = torch.tensor(wanted[start : start + POSITIONS], device=log_p.device)
        total += float(log_p.gather(1, ids_S.unsqueeze(1)).double().sum())
        greedy = greedy and bool((log_p.argmax(-1) == ids_S).all())
    return total, greedy


def finite(found: list[Likelihood]) -> list[Likelihood]:
    """The same, or RunError when one is not a number."""
    if any(math.isnan(value) for value, _ in found):
        raise RunError("the model's predictions are not numbers: its weights are damaged")
    return found


def _free_memory(device: torch.device) -> int:
    """Bytes that are free where hidden states will be."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)

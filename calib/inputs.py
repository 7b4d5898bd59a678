"""What a block read during a sweep, kept for solvers that look at one layer's experts a few at a time.

Keeping the inputs [T, H] costs far less than keeping what solvers need of them (a second moment [H, H] per expert), so
moments are made per chunk of experts, from these inputs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe_compress.model import FusedExperts, Tap
from moe_compress.model.dispatch import Dispatch, grouped_squares

from .statistics import Accumulator

T = TypeVar("T")


@dataclass
class Moments:
    """Second moments of a chunk of experts, sums over the rows routed to each.

    Attributes:
        experts: numbers of the experts.
        rows_C: rows seen by each, float64; where rows are weighed, Σ w.
        input_CHH: Σ x xᵀ, float32; Σ w x xᵀ.
        activation_CII: Σ a aᵀ, float32; Σ w a aᵀ.
    """

    experts: range
    rows_C: Tensor
    input_CHH: Tensor
    activation_CII: Tensor


class BlockInputs:
    """Inputs and routing of one block over a whole sweep. Give `observe` to a sweep's step, then read.

    Attributes:
        hidden_TH: experts' inputs.
        index_TK, weight_TK: routing as the model used it.
        token_weight_T: what each token counts; None where all count 1.
        sequence_T: sequence that each token belongs to; None where that isn't known.
        stored: names relative to the layer → dtype in which the layer's tensors will be stored.
        original_TH: what the original's experts put out for the same tokens; None unless the pass asks for it
            (`Pass.beside_original`).
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sequences: list[Tensor | None] = []
        self.stored: dict[str, torch.dtype] = {}
        self.original_TH: Tensor | None = None
        self._counted: list[Tensor] = []
        self._weighed = False
        self._last: Callable[[], Tap | None] = lambda: None
        self._found: dict[Hashable, Any] = {}

    def observe(self, tap: Tap) -> None:
        """Keep one batch, once if several who share these inputs show it one after another."""
        if self._last() is tap:
            return
        self._last = weakref.ref(tap)
        self._found.clear()
        self._parts.append((tap.hidden_TH, tap.index_TK, tap.weight_TK))
        self._sequences.append(tap.sequence_T)
        self._weighed |= tap.token_weight_T is not None
        self._counted.append(tap.counted_T)

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        if len(self._parts) > 1:
            hidden, index, weight = (torch.cat(column) for column in zip(*self._parts, strict=True))
            self._parts = [(hidden, index, weight)]
        return self._parts[0]

    @property
    def hidden_TH(self) -> Tensor:
        """Experts' inputs."""
        return self._joined()[0]

    @property
    def index_TK(self) -> Tensor:
        """Chosen experts."""
        return self._joined()[1]

    @property
    def weight_TK(self) -> Tensor:
        """Routing weights."""
        return self._joined()[2]

    @property
    def token_weight_T(self) -> Tensor | None:
        """What each token counts; None where all count 1."""
        return torch.cat(self._counted) if self._weighed else None

    def counted(self, dispatch: Dispatch) -> Tensor:
        """What each row of a dispatch of these tokens counts: its token's weight, float64 [R], 1 where all count 1."""
        counted_T = self.token_weight_T
        if counted_T is None:
            return torch.ones(len(dispatch.row_R), dtype=torch.float64, device=dispatch.row_R.device)
        return counted_T[dispatch.token_R].double()

    @property
    def sequence_T(self) -> Tensor | None:
        """Sequence of each token; None where that isn't known."""
        known = [part for part in self._sequences if part is not None]
        return torch.cat(known) if len(known) == len(self._sequences) else None

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return int(self.hidden_TH.shape[0])

    def once(self, what: Hashable, find: Callable[[], T]) -> T:
        """What follows from these inputs, found when it is first asked for; `what` says all else that it depends on."""
        if what not in self._found:
            self._found[what] = find()
        found: T = self._found[what]
        return found

    def moments(
        self,
        experts: FusedExperts,
        memory_limit: int = 1 << 30,
        row_weight: Callable[[Dispatch], Tensor] | None = None,
    ) -> Iterator[Moments]:
        """Second moments, a chunk of experts at a time, so many that one takes about `memory_limit` bytes.

        Every row counts what its token does (`token_weight_T`), times what `row_weight` says, both not negative: given
        the dispatch of a chunk's rows, [R].
        """
        weights, counted_T = experts.weights(), self.token_weight_T
        hidden, neurons = experts.hidden_size, weights.up.shape[1]
        dispatch = Dispatch.of(self.index_TK, self.weight_TK, experts.num_experts)
        # Per expert: two moments, and its rows at every stage of the way to the down projection.
        moments = hidden**2 + neurons**2
        sizes = [4 * (moments + rows * (hidden + 4 * neurons)) for rows in dispatch.counts]
        for chunk in chunks(sizes, memory_limit):
            _, part = dispatch.part(chunk)
            input_RH = self.hidden_TH[part.token_R]
            activation, _ = experts.with_weights(weights.part(chunk), input_RH, part)
            inward, outward, rows_C = input_RH.float(), activation.float(), part.counts_E.double()
            weights_R = [w for w in (row_weight and row_weight(part), _of(counted_T, part)) if w is not None]
            if weights_R:
                weight_R = functools.reduce(torch.mul, (w.double() for w in weights_R))
                rows_C = torch.zeros_like(rows_C).index_add_(0, part.expert_R, weight_R)
                root = weight_R.sqrt().float().unsqueeze(1)  # on both sides: the sums stay symmetric
                inward, outward = inward * root, outward * root
            yield Moments(
                chunk,
                rows_C.cpu(),
                grouped_squares(inward, part.offsets_E),
                grouped_squares(outward, part.offsets_E),
            )


class KeepsInputs(Accumulator):
    """An accumulator that needs all that the block read together: `inputs`.

    A sweep gives all of them in a block the same ones, so text is kept once, and what follows from it found once.
    """

    def __init__(self) -> None:
        self.inputs = BlockInputs()


def _of(counted_T: Tensor | None, dispatch: Dispatch) -> Tensor | None:
    return None if counted_T is None else counted_T[dispatch.token_R]


def chunks(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Consecutive ranges of items whose sizes sum to at most `limit`; a larger item is a range of its own."""
    start, total = 0, 0
    for item, size in enumerate(sizes):
        if item > start and total + size > limit:
            yield range(start, item)
            start, total = item, 0
        total += size
    if sizes:
        yield range(start, len(sizes))

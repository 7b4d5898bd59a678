"""What is measured of a block's experts at every width that they may get: what such statistics share.

Letters: E experts, M matrices of an expert (gate, up, down, as many as there are), B candidate widths, R rows (token,
expert), H hidden size of the experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from moe_compress.calib.inputs import BlockInputs, chunks
from moe_compress.calib.statistics import Accumulator, Statistic
from moe_compress.model import MoEBlock
from moe_compress.model.dispatch import Dispatch

from .grid import Grid, dequantize
from .rotation import Rotate, Rotations
from .rtn import round_to_nearest
from .scores import experts_of
from .solver import SolverOptions
from .space import Space, spaces_of

if TYPE_CHECKING:
    from .options import MixedOptions

# Bytes of rows and re-quantized weights at a time.
_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class AtWidths(Statistic):
    """A statistic with a result per width, of dense experts, on the grids that will be used.

    `bits`: the widths. `group_size`, `symmetric`: of their grids. `rotate`: how matrices are rotated before they are
    rounded (see rotation.py). `smoothing`: the solver's options that factors follow from (see space.py), empty where
    there are none.
    """

    bits: tuple[float, ...] = (1, 2, 3, 4, 8)
    group_size: int = 64
    symmetric: bool = True
    rotate: Rotate = "none"
    smoothing: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: MixedOptions, **own: Any) -> Self:
        """On the grids of a pass, with what else it is asked."""
        return cls(
            bits=tuple(options.widths),
            group_size=options.group_size,
            symmetric=options.symmetric,
            rotate=options.rotate,
            smoothing=options.smoothing,
            **own,
        )

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic. Raises UnsupportedModelError for experts that aren't dense."""
        experts_of(block)
        return self.accumulator(block)

    @abstractmethod
    def accumulator(self, block: MoEBlock) -> Accumulator:
        """A fresh accumulator for a block, whose experts are dense."""

    def spaces(self, block: MoEBlock, inputs: BlockInputs) -> dict[str, list[Space]]:
        """Projection → where its matrices will be rounded at each width, by what the block read."""
        experts = experts_of(block)
        rotations = Rotations.of_layer(self.rotate, block.layer, experts.hidden_size, experts.intermediate_size)
        options = SolverOptions(**self.smoothing)
        what = ("spaces", self.bits, rotations, options.model_dump_json())
        return inputs.once(what, lambda: spaces_of(block, self.bits, rotations, options, inputs))

    def rounded(self, matrix_EOK: Tensor, bits: float, space: Space) -> Tensor:
        """Matrices rounded to nearest in a space, and back."""
        turned = space.turned(matrix_EOK)
        return space.back(dequantize(round_to_nearest(turned, self.grid(bits)), turned.dtype)).to(matrix_EOK.dtype)

    def grid(self, bits: float) -> Grid:
        """The grid of a width."""
        return Grid.of_width(bits, self.group_size, self.symmetric)


class Change(NamedTuple):
    """What rounding changes the outputs of a chunk of experts by, before their routing weights.

    Attributes:
        experts: where they are among all. dispatch: counts them from 0.
        place, column: what is rounded, and at which width: the latter two indices of [E, M, B].
        change_RH: float32, exact outputs less those of rounded weights.
    """

    experts: slice
    dispatch: Dispatch
    place: int
    column: int
    change_RH: Tensor


@dataclass(frozen=True)
class OutputChanges(AtWidths):
    """A statistic of what experts' outputs change by when one expert alone is rounded to nearest, all else exact.

    `per_matrix`: one matrix of an expert alone is rounded instead of all its matrices, and results are [E, M, B], M in
    the order gate (where there is one), up, down; otherwise they are [E, B].
    """

    per_matrix: bool = False

    def changes(self, block: MoEBlock, inputs: BlockInputs) -> Iterator[Change]:
        """All changes on what the block read, a chunk of experts at a time, so that each is rounded once per width."""
        experts, spaces = experts_of(block), self.spaces(block, inputs)
        weights = experts.weights()
        names = [name for name, _ in weights.matrices()]
        together = [[name] for name in names] if self.per_matrix else [names]
        dispatch = Dispatch.of(inputs.index_TK, inputs.weight_TK, experts.num_experts)
        dense = weights.parameters // experts.num_experts
        row = 5 * experts.hidden_size + 4 * weights.up.shape[1]
        for chunk in chunks([12 * dense + 4 * rows * row for rows in dispatch.counts], _CHUNK_BYTES):
            _, part = dispatch.part(chunk)
            if not len(part.row_R):
                continue
            own, input_RH = weights.part(chunk), inputs.hidden_TH[part.token_R]
            exact_RH = experts.with_weights(own, input_RH, part)[1]
            for column, bits in enumerate(self.bits):
                rounded = {n: self.rounded(m, bits, spaces[n][column].part(chunk)) for n, m in own.matrices()}
                for place, changed in enumerate(together):
                    mixed = replace(own, **{name: rounded[name] for name in changed})
                    change_RH = exact_RH - experts.with_weights(mixed, input_RH, part)[1]
                    yield Change(slice(chunk.start, chunk.stop), part, place, column, change_RH.float())

    def zeros(self, block: MoEBlock, *more: int) -> Tensor:
        """A sum per expert, matrix (one, where experts are rounded whole) and width, float64 on the CPU."""
        experts = experts_of(block)
        matrices = len(experts.weights().matrices()) if self.per_matrix else 1
        return torch.zeros(experts.num_experts, matrices, len(self.bits), *more, dtype=torch.float64)

    def shaped(self, sums_EMB: Tensor) -> Tensor:
        """As results are."""
        return sums_EMB if self.per_matrix else sums_EMB[:, 0]

"""What is measured of a block's experts at every width that they may get: what such statistics share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from moe_compress.calib.statistics import Accumulator, Statistic
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock

from .grid import Grid, dequantize
from .rotation import Rotate, Rotations
from .rtn import round_to_nearest

if TYPE_CHECKING:
    from .options import MixedOptions


@dataclass(frozen=True)
class AtWidths(Statistic):
    """A statistic with a result per width, of dense experts, on the grids that will be used.

    `bits`: the widths. `group_size`, `symmetric`: of their grids. `rotate`: how matrices are rotated before they are
    rounded (see rotation.py).
    """

    bits: tuple[float, ...] = (1, 2, 3, 4, 8)
    group_size: int = 64
    symmetric: bool = True
    rotate: Rotate = "none"

    @classmethod
    def of(cls, options: MixedOptions, **own: Any) -> Self:
        """On the grids of a pass, with what else it is asked."""
        return cls(
            bits=tuple(options.widths),
            group_size=options.group_size,
            symmetric=options.symmetric,
            rotate=options.rotate,
            **own,
        )

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic. Raises UnsupportedModelError for experts that are quantized already."""
        if block.kind != "fused":
            raise UnsupportedModelError(f"layer {block.layer} is quantized already")
        experts = FusedExperts(block.experts_module)
        sizes = experts.hidden_size, experts.intermediate_size
        return self.accumulator(experts, Rotations.of_layer(self.rotate, block.layer, *sizes))

    @abstractmethod
    def accumulator(self, experts: FusedExperts, rotations: Rotations) -> Accumulator:
        """A fresh accumulator for these experts, whose matrices will be rotated so."""

    def grid(self, bits: float) -> Grid:
        """The grid of a width."""
        return Grid.of_width(bits, self.group_size, self.symmetric)

    def rounded(self, weights: ExpertWeights, bits: float, rotations: Rotations) -> ExpertWeights:
        """Experts whose matrices are rounded to nearest at a width; biases as they are."""
        grid, values = self.grid(bits), dict(weights.items())
        for name, matrix in weights.matrices():
            if (turn := rotations.of(name)) is None:
                values[name] = dequantize(round_to_nearest(matrix, grid), matrix.dtype)
            else:
                turned = dequantize(round_to_nearest(turn(matrix.float()), grid))
                values[name] = turn.back(turned).to(matrix.dtype)
        return ExpertWeights(**values)

"""What is measured of a block's experts at every width that they may get: what such statistics share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from moe_compress.calib.statistics import Accumulator, Statistic
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import ExpertWeights, FusedExperts, MoEBlock

from .grid import Grid, dequantize
from .rtn import round_to_nearest


@dataclass(frozen=True)
class AtWidths(Statistic):
    """A statistic with a result per width, of dense experts, on the grids that will be used.

    `bits`: the widths. `group_size`, `symmetric`: of their grids.
    """

    bits: tuple[float, ...] = (1, 2, 3, 4, 8)
    group_size: int = 64
    symmetric: bool = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic. Raises UnsupportedModelError for experts that are quantized already."""
        if block.kind != "fused":
            raise UnsupportedModelError(f"layer {block.layer} is quantized already")
        return self.accumulator(FusedExperts(block.experts_module))

    @abstractmethod
    def accumulator(self, experts: FusedExperts) -> Accumulator:
        """A fresh accumulator for these experts."""

    def grid(self, bits: float) -> Grid:
        """The grid of a width."""
        return Grid.of_width(bits, self.group_size, self.symmetric)

    def rounded(self, weights: ExpertWeights, bits: float) -> ExpertWeights:
        """Experts whose matrices are rounded to nearest at a width; biases as they are."""
        grid, values = self.grid(bits), dict(weights.items())
        for name, matrix in weights.matrices():
            values[name] = dequantize(round_to_nearest(matrix, grid), matrix.dtype)
        return ExpertWeights(**values)

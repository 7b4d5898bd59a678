"""How much of round-to-nearest's error GPTQ leaves of each matrix: what costs measured by rounding are scaled with.

It differs much between matrices. On the demo checkpoint 5 % are left at the gate and up projections of layer 0, whose
inputs are strongly correlated, and 70 % at some down projections; a program that doesn't know that gives layer 0 bits
that it doesn't need.

Letters: E experts, C experts of a chunk, M matrices of an expert, B candidate widths, H hidden, I neurons, K input
features of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.inputs import KeepsInputs
from moe_compress.calib.statistics import Accumulator, Result
from moe_compress.model import MoEBlock, Tap

from .at_widths import AtWidths
from .gptq import column_costs, foreseen_share, gptq, shrink_hessians
from .grid import Grid, Quantized, dequantize
from .low_rank import shares_left
from .rtn import output_error, round_to_nearest
from .scores import experts_of
from .space import Space

# Moments made at a time; solvers take about as much again.
_CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class SolverGain(AtWidths):
    """Share of round-to-nearest's error tr(ΔW·H·ΔWᵀ) that GPTQ leaves, on the grids that will be used.

    Result: `share` [E, M, B], M in the order gate (where there is one), up, down; 1 for experts that saw no token.
    With `ranks`: also `left` [E, M, B, ranks], what a low-rank pair of each rank, the best for H, leaves of GPTQ's
    error. Its spectrum is that of δ·diag(R), H = R Rᵀ, where δ is rounding's error, if GPTQ's targets round as the
    weights do (see gptq.py): its columns are as independent as δ's, each R_jj times as large.
    `solve`: GPTQ really runs, on every matrix at every width, which takes B times as long as quantizing does;
    otherwise the share is foreseen from H alone (`gptq.foreseen_share`). H is shrunk as for GPTQ, towards the mean of
    the experts that are measured together (`shrinkage`: tokens that it counts for). Each token counts in it as much as
    it weighs.
    """

    name: ClassVar[str] = "solver_gain"
    weighs_tokens: ClassVar[bool] = True
    damping: float = 0.01
    shrinkage: float | None = None
    solve: bool = False
    ranks: tuple[int, ...] = ()

    def accumulator(self, block: MoEBlock) -> Accumulator:
        """See AtWidths."""
        return _Shares(self, block)


class _Shares(KeepsInputs):
    def __init__(self, settings: SolverGain, block: MoEBlock):
        super().__init__()
        self.settings, self.block = settings, block

    def update(self, tap: Tap) -> None:
        self.inputs.observe(tap)

    def result(self) -> Result:
        own, experts = self.settings, experts_of(self.block)
        spaces, weights = own.spaces(self.block, self.inputs), experts.weights()
        names = [name for name, _ in weights.matrices()]
        share = torch.ones(experts.num_experts, len(names), len(own.bits), dtype=torch.float64)
        left = torch.ones(*share.shape, len(own.ranks), dtype=torch.float64)
        for moments in self.inputs.moments(experts, _CHUNK_BYTES):
            if not moments.rows_C.any():
                continue
            here, seen_C = slice(moments.experts.start, moments.experts.stop), moments.rows_C > 0
            part = dict(weights.part(moments.experts).matrices())
            for read_CKK, readers in ((moments.input_CHH, names[:-1]), (moments.activation_CII, names[-1:])):
                matrices = {name: part[name] for name in readers}
                spaces_B = [space.part(moments.experts) for space in spaces[readers[0]]]
                for name, column, share_C, left_CR in self._shares(matrices, read_CKK, moments.rows_C, spaces_B):
                    share[here, names.index(name), column] = torch.where(seen_C, share_C.cpu(), 1.0)
                    left[here, names.index(name), column] = torch.where(seen_C.unsqueeze(1), left_CR.cpu(), 1.0)
        return {"share": share, **({"left": left} if own.ranks else {})}

    def _shares(
        self, matrices: Mapping[str, Tensor], moment_CKK: Tensor, rows_C: Tensor, spaces_B: Sequence[Space]
    ) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """Projection, place of a width, and `_share`, of all that read what the moments are of."""
        own = self.settings
        for space in dict.fromkeys(spaces_B):
            hessian_CKK = shrink_hessians(space.of_moment(moment_CKK), rows_C.to(moment_CKK.device), own.shrinkage)
            costs = None if own.solve else column_costs(hessian_CKK, own.damping)
            for name, matrix_COK in matrices.items():
                turned_COK = space.turned(matrix_COK)
                for column in (b for b, other in enumerate(spaces_B) if other is space):
                    yield name, column, *self._share(turned_COK, hessian_CKK, costs, own.grid(own.bits[column]))

    def _share(
        self, weight_COK: Tensor, hessian_CKK: Tensor, costs: tuple[Tensor, Tensor] | None, grid: Grid
    ) -> tuple[Tensor, Tensor]:
        """What GPTQ leaves, [C], and what pairs leave of that, [C, ranks]; foreseen where `costs` are given."""

        def error(quantized: Quantized) -> Tensor:
            return dequantize(quantized).sub_(weight_COK)

        rounded_COK, ranks = error(round_to_nearest(weight_COK, grid)), list(self.settings.ranks)
        read_CKK: Tensor | None = None
        if costs is not None:
            share_C = foreseen_share(rounded_COK.square().sum(1), *costs)
            left_COK = rounded_COK.mul_(costs[1].sqrt().unsqueeze(1))  # R_jj times as large, and nothing correlated
        else:
            left_COK = error(gptq(weight_COK, hessian_CKK, grid, damping=self.settings.damping).quantized)
            before_C, read_CKK = output_error(rounded_COK, hessian_CKK).sum(1), hessian_CKK
            share_C = torch.where(before_C > 0, output_error(left_COK, hessian_CKK).sum(1) / before_C, 1.0)
        return share_C, shares_left(left_COK, read_CKK, ranks) if ranks else share_C[:, None][:, :0]

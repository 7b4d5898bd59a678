"""Better codes and scales than a greedy pass finds: one at a time, each the best given all others.

Contract: pure, float32 inside. Every step is the exact minimum of tr(Δ H Δᵀ), Δ = W − Ŵ, along one code or one scale,
so the error never grows (but for rounding; callers compare). A sweep visits a row's groups in turn, in each the scale
first and then its codes; all rows of all experts at once.

With the gradient P = Δ H at hand, the best scale of a group with levels l moves by l·P / lᵀHl over its columns, and the
best code of column j is the one nearest to ŵ_j + P_j / H_jj. Coordinate descent over codes is QuantEase (Behdin et al.
2023, arXiv 2309.01885); scales move with it here, rounded as they will be stored before anything depends on them. P is
computed for a panel of columns when a sweep gets there, by one large matrix product, and kept exact within it by small
ones: so a sweep is one multiplication of Δ with H, and nothing has to be known of P before.

Codes are found in units of their group's scale s, with y_j = l_j + P_j / (s H_jj) at hand, what level j would best be
if it needn't be whole: the new level is the nearest, its step d = l' − l takes d H_jk / H_kk off every y_k, and the
error changes by s² H_jj d (d − 2 (y_j − l)). So a column takes four short steps, and no product to know its gain.

Shape letters: E experts, O output features, K input features, G groups along K, C columns of a panel, g of a group, b
of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_compress.quant.grid import Quantized, level_of_ratio, level_range

BLOCK = 16  # columns between two small matrix products inside a group
PANEL = 256  # columns, at least, of which the gradient is computed at once: products of fewer rows are slower


class Polished(NamedTuple):
    """`quantized`, and what every row's tr(Δ H Δᵀ) and ‖Δ‖² changed by on the way there: [E, O] float64."""

    quantized: Quantized
    change_EO: Tensor
    squares_EO: Tensor


def polish(weight_EOK: Tensor, hessian_EKK: Tensor, quantized: Quantized, sweeps: int = 1) -> Polished:
    """`quantized` with codes and scales moved to where tr(Δ H Δᵀ) is less, zero points as they are.

    `hessian_EKK`: symmetric positive semidefinite, float32. The shapes are those of `gptq`, which calls this.
    """
    grid, dtype = quantized.grid, quantized.scale.dtype
    columns, groups = weight_EOK.shape[-1], quantized.scale.shape[-1]
    size = columns // groups
    # Columns as rows, as in gptq: whatever the loop reads and writes is contiguous.
    scale_EGO = quantized.scale.float().transpose(1, 2).contiguous()
    zero_EGO = None if quantized.zero is None else quantized.zero.float().transpose(1, 2).contiguous()
    low, _ = level_range(grid, None if zero_EGO is None else zero_EGO.repeat_interleave(size, 1))
    level_EKO = quantized.codes.transpose(1, 2).float().contiguous().add_(low)
    delta_EKO = torch.empty_like(level_EKO).copy_(weight_EOK.transpose(1, 2))
    grouped = (len(delta_EKO), groups, size, -1)
    delta_EKO.view(grouped).addcmul_(level_EKO.view(grouped), scale_EGO[:, :, None], value=-1)
    change_EO = scale_EGO.new_zeros(scale_EGO[:, 0].shape, dtype=torch.float64)
    squares_EO = change_EO - delta_EKO.square().sum(1)
    panel = size * max(1, PANEL // size)
    diagonal_EK1 = hessian_EKK.diagonal(dim1=1, dim2=2)[..., None]
    # A column without weight keeps its code.
    inverse_EK1 = 1 / torch.where(diagonal_EK1 > 0, diagonal_EK1, torch.inf)
    codes = _Codes(level_EKO[:, :size])
    for _ in range(sweeps):
        for first in range(0, columns, panel):
            last = min(first + panel, columns)
            gradient_ECO = torch.bmm(hessian_EKK[:, first:last], delta_EKO)
            for start in range(first, last, size):
                own, scale_EO = slice(start, start + size), scale_EGO[:, start // size]
                low, high = level_range(grid, None if zero_EGO is None else zero_EGO[:, start // size])
                hessian_Egg, level_EgO = hessian_EKK[:, own, own], level_EKO[:, own]
                local_EgO = gradient_ECO[:, start - first : start - first + size]
                moved_EgO = _move_scale(scale_EO, level_EgO, local_EgO, hessian_Egg, change_EO, dtype)
                # A group without a scale keeps its codes.
                per_level_EO = 1 / torch.where(scale_EO == 0, torch.inf, scale_EO)
                wanted_EgO = local_EgO.mul_(inverse_EK1[:, own]).mul_(per_level_EO[:, None]).add_(level_EgO)
                step_EgO, gain_EO = codes.move(level_EgO, wanted_EgO, hessian_Egg, inverse_EK1[:, own], low, high)
                change_EO -= gain_EO.mul_(scale_EO).mul_(scale_EO)
                moved_EgO.addcmul_(step_EgO, scale_EO[:, None], value=-1)
                delta_EKO[:, own] += moved_EgO
                if own.stop < last:
                    hessian_ECg = hessian_EKK[:, own.stop : last, own]
                    gradient_ECO[:, own.stop - first :].baddbmm_(hessian_ECg, moved_EgO)
    squares_EO += delta_EKO.square_().sum(1)
    low, _ = level_range(grid, None if zero_EGO is None else zero_EGO.repeat_interleave(size, 1))
    found = Quantized(
        level_EKO.sub_(low).to(torch.uint8).transpose(1, 2).contiguous(),
        scale_EGO.to(dtype).transpose(1, 2).contiguous(),
        quantized.zero,
        grid,
    )
    return Polished(found, change_EO, squares_EO)


def _move_scale(
    scale_EO: Tensor,
    level_EgO: Tensor,
    local_EgO: Tensor,
    hessian_Egg: Tensor,
    change_EO: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Give a group's scales their best values, in place; `local_EgO`, the gradient of its columns, and the change of
    the error follow. Returns what Δ changed by."""
    product_EgO = torch.bmm(hessian_Egg, level_EgO)
    spare_EgO = product_EgO * level_EgO
    curvature_EO = spare_EgO.sum(1)
    slope_EO = torch.mul(local_EgO, level_EgO, out=spare_EgO).sum(1)
    best_EO = scale_EO + slope_EO / torch.where(curvature_EO > 0, curvature_EO, torch.inf)
    move_EO = best_EO.to(dtype).float().sub_(scale_EO)
    # Rounding may end on the far side of the minimum; a scale that would overflow or change its sign stays.
    gain_EO = move_EO * (2 * slope_EO - move_EO * curvature_EO)
    moves_EO = (gain_EO > 0) & move_EO.isfinite() & ((scale_EO + move_EO) * scale_EO > 0)
    move_EO, gain_EO = torch.where(moves_EO, move_EO, 0), torch.where(moves_EO, gain_EO, 0)
    scale_EO += move_EO
    change_EO -= gain_EO
    local_EgO.addcmul_(product_EgO, move_EO[:, None], value=-1)
    return torch.mul(level_EgO, move_EO[:, None], out=spare_EgO).neg_()


class _Codes:
    """Moves the codes of one group after another. Its buffers' views are made once: making them anew for each column
    would take longer than what is done with them."""

    def __init__(self, like_EgO: Tensor):
        self.new_EgO, self.step_EgO, self.wanted_EgO, self.old_EgO = (torch.empty_like(like_EgO) for _ in range(4))
        size = like_EgO.shape[1]
        self.coupling_Egg = like_EgO.new_empty(len(like_EgO), size, size)
        columns = (x.unbind(1) for x in (self.wanted_EgO, self.new_EgO, self.old_EgO, self.step_EgO))
        stops = [min(column - column % BLOCK + BLOCK, size) for column in range(size)]
        rests = [self.wanted_EgO[:, column + 1 : stop] for column, stop in enumerate(stops)]
        couplings = [self.coupling_Egg[:, column + 1 : stop, column, None] for column, stop in enumerate(stops)]
        self.columns = list(zip(*columns, [x[:, None] for x in self.step_EgO.unbind(1)], rests, couplings, strict=True))

    def move(
        self,
        level_EgO: Tensor,
        wanted_EgO: Tensor,
        hessian_Egg: Tensor,
        inverse_Eg1: Tensor,
        low: Tensor | float,
        high: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        """Give each level its best value given all others, column by column, in place.

        Returns the steps, in a buffer that the next call overwrites, and what the error of every row lost by them, in
        units of its squared scale.
        """
        size = level_EgO.shape[1]
        self.wanted_EgO.copy_(wanted_EgO)
        self.old_EgO.copy_(level_EgO)
        torch.mul(hessian_Egg, inverse_Eg1, out=self.coupling_Egg)
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            for wanted_EO, new_EO, old_EO, step_EO, step_E1O, rest_EbO, coupling_Eb1 in self.columns[start:stop]:
                level_of_ratio(wanted_EO, low, high, out=new_EO)
                torch.sub(new_EO, old_EO, out=step_EO)
                rest_EbO.addcmul_(coupling_Eb1, step_E1O, value=-1)
            if stop < size:
                coupling_Ebb = self.coupling_Egg[:, stop:, start:stop]
                self.wanted_EgO[:, stop:].baddbmm_(coupling_Ebb, self.step_EgO[:, start:stop], alpha=-1)
        level_EgO.copy_(self.new_EgO)
        # (y − l)² − (y − l')² of every column, y as it was when its turn came.
        gain_EgO = torch.sub(self.wanted_EgO, self.new_EgO, out=self.new_EgO).mul_(2).add_(self.step_EgO)
        gain_E1O = torch.bmm(hessian_Egg.diagonal(dim1=1, dim2=2)[:, None], gain_EgO.mul_(self.step_EgO))
        return self.step_EgO, gain_E1O[:, 0]

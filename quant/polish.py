"""Better codes and scales than a greedy pass finds: one at a time, each the best given all others.

Contract: pure, float32 inside. Every step is the exact minimum of tr(Δ H Δᵀ), Δ = W − Ŵ, along one code or one scale,
so the error never grows (but for rounding; callers compare). A sweep visits a row's groups in turn, in each the scale
first and then its codes; all rows of all experts at once.

With the gradient P = Δ H at hand, the best scale of a group with levels l moves by l·P / lᵀHl over its columns, and the
best code of column j is the one nearest to ŵ_j + P_j / H_jj. Coordinate descent over codes is QuantEase (Behdin et al.
2023, arXiv 2309.01885); scales move with it here, rounded as they will be stored before anything depends on them. P is
computed for a panel of columns when a sweep gets there, by one large matrix product, and kept exact within it by small
ones: so a sweep is one multiplication of Δ with H, and nothing has to be known of P before. What a group's change D
does to the error is D·(2 P + D H), which needs no product with all of H either.

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
    for _ in range(sweeps):
        for first in range(0, columns, panel):
            last = min(first + panel, columns)
            gradient_ECO = torch.bmm(hessian_EKK[:, first:last], delta_EKO)
            for start in range(first, last, size):
                own, group = slice(start, start + size), start // size
                before_EgO = delta_EKO[:, own].clone()
                low, high = level_range(grid, None if zero_EGO is None else zero_EGO[:, group])
                local_EgO = gradient_ECO[:, start - first : start - first + size].clone()
                hessian_Egg, at_work = hessian_EKK[:, own, own], (level_EKO[:, own], delta_EKO[:, own], local_EgO)
                _move_scale(scale_EGO[:, group], *at_work, hessian_Egg, dtype)
                _move_codes(scale_EGO[:, group], *at_work, hessian_Egg, low, high)
                moved_EgO = torch.sub(delta_EKO[:, own], before_EgO, out=before_EgO)
                slope_EgO = gradient_ECO[:, start - first : start - first + size].mul(2)
                change_EO += slope_EgO.baddbmm_(hessian_Egg, moved_EgO).mul_(moved_EgO).sum(1)
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
    scale_EO: Tensor, level_EgO: Tensor, delta_EgO: Tensor, local_EgO: Tensor, hessian_Egg: Tensor, dtype: torch.dtype
) -> None:
    """Give a group's scales their best values, in place; `local_EgO`, the gradient of its columns, follows."""
    product_EgO = torch.bmm(hessian_Egg, level_EgO)
    curvature_EO = (product_EgO * level_EgO).sum(1)
    slope_EO = (local_EgO * level_EgO).sum(1)
    best_EO = scale_EO + slope_EO / torch.where(curvature_EO > 0, curvature_EO, torch.inf)
    move_EO = best_EO.to(dtype).float().sub_(scale_EO)
    # Rounding may end on the far side of the minimum; a scale that would overflow or change its sign stays.
    gain_EO = move_EO * (2 * slope_EO - move_EO * curvature_EO)
    move_EO = torch.where((gain_EO > 0) & move_EO.isfinite() & ((scale_EO + move_EO) * scale_EO > 0), move_EO, 0)
    scale_EO += move_EO
    delta_EgO.addcmul_(level_EgO, move_EO[:, None], value=-1)
    local_EgO.addcmul_(product_EgO, move_EO[:, None], value=-1)


def _move_codes(
    scale_EO: Tensor,
    level_EgO: Tensor,
    delta_EgO: Tensor,
    local_EgO: Tensor,
    hessian_Egg: Tensor,
    low: Tensor | float,
    high: Tensor | float,
) -> None:
    """Give each code of a group its best value given all others, column by column, in place."""
    size = level_EgO.shape[1]
    # The best value of a code is ŵ_j + P_j / H_jj; a column without weight, and a group without a scale, keep theirs.
    diagonal_Eg1 = hessian_Egg.diagonal(dim1=1, dim2=2)[..., None]
    inverse_Eg1 = 1 / torch.where(diagonal_Eg1 > 0, diagonal_Eg1, torch.inf)
    per_level_EO = 1 / torch.where(scale_EO == 0, torch.inf, scale_EO)
    move_EbO = torch.empty_like(level_EgO[:, :BLOCK])
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        for column in range(start, stop):
            level_EO, move_EO = level_EgO[:, column], move_EbO[:, column - start]
            ratio_EO = (local_EgO[:, column] * inverse_Eg1[:, column]).mul_(per_level_EO).add_(level_EO)
            found_EO = level_of_ratio(ratio_EO, low, high)
            torch.sub(found_EO, level_EO, out=move_EO).mul_(scale_EO)
            level_EO.copy_(found_EO)
            rest_EbO = local_EgO[:, column + 1 : stop]
            rest_EbO.addcmul_(hessian_Egg[:, column + 1 : stop, column, None], move_EO[:, None], value=-1)
        moved_EbO = move_EbO[:, : stop - start]
        delta_EgO[:, start:stop] -= moved_EbO
        if stop < size:
            local_EgO[:, stop:].baddbmm_(hessian_Egg[:, stop:, start:stop], moved_EbO, alpha=-1)

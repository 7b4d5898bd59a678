"""Better codes and scales than a greedy pass finds: one at a time, each the best given all others.

Contract: pure, float32 inside. Every step is the exact minimum of tr(Δ H Δᵀ), Δ = W − Ŵ, along one code or one scale,
so the error never grows (but for rounding; callers compare). A sweep visits a row's groups in turn, in each the scale
first and then its codes; all rows of all experts at once.

With the gradient P = Δ H at hand, the best scale of a group with levels l moves by l·P / lᵀHl over its columns, and the
best code of column j is the one nearest to ŵ_j + P_j / H_jj. Coordinate descent over codes is QuantEase (Behdin et al.
2023, arXiv 2309.01885); scales move with it here, rounded as they will be stored before anything depends on them. P is
kept exact for the columns at work, and brought up to date for all others once per group, by one matrix product.

Shape letters: E experts, O output features, K input features, G groups along K, g columns of a group, b of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.quant.grid import Quantized, level_range, nearest_level

BLOCK = 16  # columns between two small matrix products inside a group


def polish(weight_EOK: Tensor, hessian_EKK: Tensor, quantized: Quantized, sweeps: int = 1) -> Quantized:
    """`quantized` with codes and scales moved to where tr(Δ H Δᵀ) is less, zero points as they are.

    `hessian_EKK`: symmetric positive semidefinite, float32. The shapes are those of `gptq`, which calls this.
    """
    grid, dtype = quantized.grid, quantized.scale.dtype
    groups = quantized.scale.shape[-1]
    size = weight_EOK.shape[-1] // groups
    # Columns as rows, as in gptq: whatever the loop reads and writes is contiguous.
    scale_EGO = quantized.scale.float().transpose(1, 2).contiguous()
    zero_EGO = None if quantized.zero is None else quantized.zero.float().transpose(1, 2).contiguous()
    low, _ = level_range(grid, None if zero_EGO is None else zero_EGO.repeat_interleave(size, 1))
    level_EKO = quantized.codes.transpose(1, 2).float().contiguous().add_(low)
    delta_EKO = weight_EOK.transpose(1, 2).float() - level_EKO * scale_EGO.repeat_interleave(size, 1)
    gradient_EKO = torch.bmm(hessian_EKK, delta_EKO)
    for _ in range(sweeps):
        for group in range(groups):
            own = slice(group * size, (group + 1) * size)
            before_EgO = delta_EKO[:, own].clone()
            low, high = level_range(grid, None if zero_EGO is None else zero_EGO[:, group])
            local_EgO = gradient_EKO[:, own].clone()
            hessian_Egg = hessian_EKK[:, own, own]
            _move_scale(scale_EGO[:, group], level_EKO[:, own], delta_EKO[:, own], local_EgO, hessian_Egg, dtype)
            _move_codes(scale_EGO[:, group], level_EKO[:, own], delta_EKO[:, own], local_EgO, hessian_Egg, low, high)
            gradient_EKO.baddbmm_(hessian_EKK[:, :, own], delta_EKO[:, own] - before_EgO)
    low, _ = level_range(grid, None if zero_EGO is None else zero_EGO.repeat_interleave(size, 1))
    return Quantized(
        level_EKO.sub_(low).to(torch.uint8).transpose(1, 2).contiguous(),
        scale_EGO.to(dtype).transpose(1, 2).contiguous(),
        quantized.zero,
        grid,
    )


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
    diagonal_Eg1 = hessian_Egg.diagonal(dim1=1, dim2=2)[..., None].contiguous()
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        before_EbO = delta_EgO[:, start:stop].clone()
        for column in range(start, stop):
            level_EO, diagonal_E1 = level_EgO[:, column], diagonal_Eg1[:, column]
            # The best value is ŵ_j + P_j / H_jj; a column without weight keeps its code.
            best_EO = torch.addcmul(
                local_EgO[:, column] / torch.where(diagonal_E1 > 0, diagonal_E1, torch.inf), scale_EO, level_EO
            )
            found_EO = nearest_level(best_EO, scale_EO, low, high)
            move_EO = (found_EO - level_EO).mul_(scale_EO)
            level_EgO[:, column] = found_EO
            delta_EgO[:, column] -= move_EO
            rest_EbO = local_EgO[:, column + 1 : stop]
            rest_EbO.addcmul_(hessian_Egg[:, column + 1 : stop, column, None], move_EO[:, None], value=-1)
        if stop < size:
            change_EbO = delta_EgO[:, start:stop] - before_EbO
            local_EgO[:, stop:].baddbmm_(hessian_Egg[:, stop:, start:stop], change_EbO)

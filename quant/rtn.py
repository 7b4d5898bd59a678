"""Round-to-nearest, and the measure by which every quantizer of a linear layer is judged.

Contract: pure functions, float32 inside. With an `importance` (a Hessian's diagonal) the scales of round-to-nearest
heed the data, but no weight makes up for another's rounding: that is `moe_compress.quant.gptq`.

Shape letters: E experts, O output features, K input features, B columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.errors import InputError
from moe_compress.quant.grid import Grid, Quantized, Search, encode, find_scales

ERROR_BLOCK = 512


def round_to_nearest(
    weight: Tensor,
    grid: Grid,
    *,
    importance: Tensor | None = None,
    search: Search = "mse",
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Quantized:
    """Quantize `weight` [..., O, K]: the best scale of every group, then the nearest codes.

    Arguments and errors are those of `find_scales`.
    """
    scale, zero = find_scales(weight, grid, importance=importance, search=search, scale_dtype=scale_dtype)
    return Quantized(encode(weight, scale, zero, grid), scale, zero, grid)


def output_error(difference_EOK: Tensor, hessian_EKK: Tensor) -> Tensor:
    """Σ_t (ΔW x_t)² of every output feature, float64 [E, O], for ΔW [E, O, K] and H = Σ_t x_t x_tᵀ [E, K, K].

    Summed over O it is tr(ΔW H ΔWᵀ), the squared error of the layer's output on the calibration tokens, in units of H.
    As H is symmetric, only its blocks on and above the diagonal are read. Never negative, even by rounding.
    Raises InputError for shapes that don't fit.
    """
    experts, _, in_features = difference_EOK.shape
    if hessian_EKK.shape != (experts, in_features, in_features):
        raise InputError(f"hessian has shape {list(hessian_EKK.shape)}, not {[experts, in_features, in_features]}")
    error_EO = difference_EOK.new_zeros(difference_EOK.shape[:2], dtype=torch.float64)
    for start in range(0, in_features, ERROR_BLOCK):
        stop = min(start + ERROR_BLOCK, in_features)
        rows_EOB = difference_EOK[:, :, start:stop].float()
        product_EOB = torch.bmm(rows_EOB, hessian_EKK[:, start:stop, start:stop].float())
        if start:
            left_EOb, below_EbB = difference_EOK[:, :, :start].float(), hessian_EKK[:, :start, start:stop].float()
            product_EOB.baddbmm_(left_EOb, below_EbB, alpha=2)
        error_EO += product_EOB.mul_(rows_EOB).sum(-1, dtype=torch.float64)
    return error_EO.clamp_min_(0)

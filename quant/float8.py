"""Eight-bit floats (e4m3) with a scale per row or per block, and what servers do to activations.

Contract: pure functions, float32 inside. A weight is `scale · code`, with a float32 scale per block of r × c weights;
the code is the nearest e4m3 number, at most ±448. Scales are found before codes and stored as they were found.

An e4m3 number has three bits behind its leading one over sixteen binades, so a scale that is twice as large gives the
same codes but for the smallest weights: what a search can gain lies within one octave, 5 % of the squared error of rows
of 2048 and 2 % of that of blocks. Clipping never paid.

torch converts to and from e4m3 number by number; the same by integer arithmetic is five to ten times faster on a CPU.

Shape letters: E experts, O output and K input features, R rows of activations, M × N blocks of r × c weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moe_compress.errors import InputError, RunError
from moe_compress.quant.side_by_side import share_out

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
# Scales that a search tries, times the one that puts the largest weight on the largest number.
FACTORS = tuple(2 ** (step / 8) for step in range(1, 8))
# Smallest scales of activations, as vLLM's kernels have them: of a token, and of a group.
LEAST_TOKEN_SCALE = 1 / (LARGEST * 512)
LEAST_MAXIMUM = 1e-10
CHUNK_WEIGHTS = {"cpu": 1 << 17, "cuda": 1 << 25}


def float8_scales(weight_EOK: Tensor, block: tuple[int, int], search: str = "mse") -> Tensor:
    """The scale of every block, float32 [E, M, N].

    Args:
        weight_EOK: weights.
        block: rows and columns of a block; they divide O and K.
        search: "none" puts the largest weight on 448; "mse" tries an octave of scales, and is never worse in squared
            error.

    The scale of an all-zero block is 1. Raises InputError for what doesn't fit, RunError for weights that are not
    finite.
    """
    if search not in ("none", "mse"):
        raise InputError(f"unknown search {search!r} for 8-bit floats; known: none, mse")
    tiles_BrNc = _tiles(weight_EOK, block)
    scale_BN = torch.empty(tiles_BrNc.shape[0], tiles_BrNc.shape[2], device=weight_EOK.device)

    def fit(rows: slice) -> None:
        scale_BN[rows] = _chunk_scales(tiles_BrNc[rows].float(), search)

    share_out(fit, _chunks(tiles_BrNc), weight_EOK.device)
    return scale_BN.view(len(weight_EOK), -1, scale_BN.shape[1])


def encode_float8(weight_EOK: Tensor, scale_EMN: Tensor, block: tuple[int, int]) -> Tensor:
    """The nearest codes, e4m3 [E, O, K]; what is beyond ±448 scales becomes ±448."""
    tiles_BrNc, scale_BN = _tiles(weight_EOK, block), scale_EMN.flatten(0, 1)
    codes_BrNc = torch.empty(tiles_BrNc.shape, dtype=E4M3, device=weight_EOK.device)

    def round_part(rows: slice) -> None:
        ratio = tiles_BrNc[rows].float() / scale_BN[rows, None, :, None]
        codes_BrNc[rows] = ratio.clamp_(-LARGEST, LARGEST).to(E4M3)

    share_out(round_part, _chunks(tiles_BrNc), weight_EOK.device)
    return codes_BrNc.view(weight_EOK.shape)


def decode_float8(codes: Tensor) -> Tensor:
    """The numbers that e4m3 `codes` stand for, float32. Not for NaN."""
    if codes.device.type != "cpu":
        return codes.float()
    # Exponent and mantissa are in the same order in both; the exponents' biases differ by 120, and multiplying makes
    # small numbers normal.
    bits = codes.view(torch.uint8).to(torch.int32)
    sign = (bits & 0x80) << 24
    return ((bits & 0x7F) << 20).bitwise_or_(sign).view(torch.float32).mul_(2.0**120)


def spread_scales(scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Scales per block [..., M, N] as scales per weight, [..., M·r, N·c], or [..., M·r, N] where that broadcasts."""
    rows, columns = block
    scale = scale if scale.shape[-1] == 1 else scale.repeat_interleave(columns, -1)
    return scale if rows == 1 else scale.repeat_interleave(rows, -2)


def quantized_inputs(input_RK: Tensor, share: int, is_float: bool) -> Tensor:
    """Activations as a server reads them: quantized when they come, dequantized here, float32 [R, K].

    Args:
        input_RK: activations.
        share: inputs of a row that share a scale, -1 for the whole row.
        is_float: e4m3, or integers from -127 to 127.

    As vLLM's kernels do it: the scale is the largest magnitude over 448 or 127, and ties of integers go to even.
    """
    rows, columns = input_RK.shape
    width = columns if share == -1 else share
    part = input_RK.float().reshape(rows, columns // width, width)
    largest = part.abs().amax(-1, keepdim=True).clamp_min_(LEAST_MAXIMUM)
    if not is_float:
        return (part * (127 / largest)).round_().mul_(largest / 127).view(rows, columns)
    scale = largest / LARGEST
    if share == -1:
        scale.clamp_min_(LEAST_TOKEN_SCALE)
    return _round((part / scale).clamp_(-LARGEST, LARGEST)).mul_(scale).view(rows, columns)


def _chunk_scales(tiles_BrNc: Tensor, search: str) -> Tensor:
    largest_BN = tiles_BrNc.abs().amax((1, 3))
    if not largest_BN.isfinite().all():
        raise RunError("the weights contain NaN or infinity")
    plain_BN = largest_BN / LARGEST
    plain_BN = torch.where(plain_BN == 0, 1.0, plain_BN)  # of zeros, or of numbers so small that the quotient is none
    if search == "none":
        return plain_BN
    best_BN, least_BN = plain_BN, _error(tiles_BrNc, plain_BN)
    for factor in FACTORS:
        tried_BN = plain_BN * factor
        error_BN = _error(tiles_BrNc, tried_BN)
        better_BN = error_BN < least_BN
        best_BN, least_BN = torch.where(better_BN, tried_BN, best_BN), torch.minimum(error_BN, least_BN)
    return best_BN


def _error(tiles_BrNc: Tensor, scale_BN: Tensor) -> Tensor:
    """Σ (w − ŵ)² of every block, [B, N]."""
    scale = scale_BN[:, None, :, None]
    rounded = _round((tiles_BrNc / scale).clamp_(-LARGEST, LARGEST))
    return rounded.mul_(scale).sub_(tiles_BrNc).square_().sum((1, 3))


def _round(value: Tensor) -> Tensor:
    """`value` (float32, within ±448; it is overwritten) rounded to the nearest e4m3 number, ties to even.

    Adding 1.5 · 2^(e + 20) to a number of exponent e leaves three bits of its mantissa; below 2^-6 steps stay 2^-9.
    """
    exponent = (value.view(torch.int32) & 0x7F800000).clamp_(min=(127 - 6) << 23)
    magic = exponent.add_((20 << 23) | 0x400000).view(torch.float32)
    return value.add_(magic).sub_(magic)


def _tiles(weight_EOK: Tensor, block: tuple[int, int]) -> Tensor:
    """[E, O, K] as [B, r, N, c], B all rows of blocks."""
    experts, out_features, in_features = weight_EOK.shape
    rows, columns = block
    if out_features % rows or in_features % columns:
        raise InputError(f"blocks of {rows}×{columns} don't tile matrices of {out_features}×{in_features}")
    return weight_EOK.reshape(experts * (out_features // rows), rows, in_features // columns, columns)


def _chunks(tiles_BrNc: Tensor) -> Iterator[slice]:
    """Slices of B of about CHUNK_WEIGHTS weights each."""
    limit = CHUNK_WEIGHTS.get(tiles_BrNc.device.type, CHUNK_WEIGHTS["cuda"])
    step = max(1, limit // math.prod(tiles_BrNc.shape[1:]))
    for start in range(0, len(tiles_BrNc), step):
        yield slice(start, start + step)

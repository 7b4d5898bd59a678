"""Eight-bit floats (e4m3) with a scale per row or per block, and what servers do to activations.

Contract: pure functions, float32 inside. A weight is `scale · code`, with a float32 scale per block of r × c weights;
the code is the nearest e4m3 number, at most ±448. Scales are found before codes and stored as they were found.

An e4m3 number has three bits behind its leading one over sixteen binades, so a scale that is twice as large gives the
same codes but for the smallest weights: what a search can gain lies within one octave, and in clipping.

Shape letters: E experts, O output and K input features, R rows of activations, M × N blocks of r × c weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.errors import InputError, RunError

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
# Scales that a search tries, times the one that puts the largest weight on the largest number. Below 1 it is clipped.
FACTORS = tuple(2 ** (step / 8) for step in range(-4, 8))
# Smallest scales of activations, as vLLM's kernels have them: of a token, and of a group.
LEAST_TOKEN_SCALE = 1 / (LARGEST * 512)
LEAST_MAXIMUM = 1e-10
CHUNK_WEIGHTS = 1 << 22


def float8_scales(weight_EOK: Tensor, block: tuple[int, int], search: str = "mse") -> Tensor:
    """The scale of every block, float32 [E, M, N].

    Args:
        weight_EOK: weights.
        block: rows and columns of a block; they divide O and K.
        search: "none" puts the largest weight on 448; "mse" tries an octave of scales and some that clip, and is never
            worse in squared error.

    The scale of an all-zero block is 1. Raises InputError for what doesn't fit, RunError for weights that aren't finite.
    """
    if search not in ("none", "mse"):
        raise InputError(f"unknown search {search!r} for 8-bit floats; known: none, mse")
    parts = [_chunk_scales(chunk, block, search) for chunk in _chunks(weight_EOK)]
    return torch.cat(parts)


def encode_float8(weight_EOK: Tensor, scale_EMN: Tensor, block: tuple[int, int]) -> Tensor:
    """The nearest codes, e4m3 [E, O, K]; what is beyond ±448 scales becomes ±448."""
    codes_EOK = torch.empty(weight_EOK.shape, dtype=E4M3, device=weight_EOK.device)
    start = 0
    for chunk in _chunks(weight_EOK):
        stop = start + len(chunk)
        blocks = _blocks(chunk.float(), block)
        codes = _nearest(blocks, _spread(scale_EMN[start:stop]))
        codes_EOK[start:stop] = codes.reshape(chunk.shape)
        start = stop
    return codes_EOK


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
    part = input_RK.float().reshape(rows, -1, columns if share == -1 else share)
    largest = part.abs().amax(-1, keepdim=True).clamp_min_(LEAST_MAXIMUM)
    if not is_float:
        return (part * (127 / largest)).round_().mul_(largest / 127).view(rows, columns)
    scale = largest / LARGEST
    if share == -1:
        scale.clamp_min_(LEAST_TOKEN_SCALE)
    return (part / scale).clamp_(-LARGEST, LARGEST).to(E4M3).float().mul_(scale).view(rows, columns)


def _chunk_scales(weight_EOK: Tensor, block: tuple[int, int], search: str) -> Tensor:
    blocks_EMrNc = _blocks(weight_EOK.float(), block)
    largest_EMN = blocks_EMrNc.abs().amax((2, 4))
    if not largest_EMN.isfinite().all():
        raise RunError("the weights contain NaN or infinity")
    plain_EMN = torch.where(largest_EMN == 0, LARGEST, largest_EMN) / LARGEST
    if search == "none":
        return plain_EMN
    best_EMN, least_EMN = plain_EMN, _error(blocks_EMrNc, plain_EMN)
    for factor in FACTORS:
        tried_EMN = torch.where(largest_EMN == 0, plain_EMN, plain_EMN * factor)
        error_EMN = _error(blocks_EMrNc, tried_EMN)
        better_EMN = error_EMN < least_EMN
        best_EMN, least_EMN = torch.where(better_EMN, tried_EMN, best_EMN), torch.minimum(error_EMN, least_EMN)
    return best_EMN


def _error(blocks_EMrNc: Tensor, scale_EMN: Tensor) -> Tensor:
    """Σ (w − ŵ)² of every block, [E, M, N]."""
    scale = _spread(scale_EMN)
    return _nearest(blocks_EMrNc, scale).float().mul_(scale).sub_(blocks_EMrNc).square_().sum((2, 4))


def _nearest(blocks_EMrNc: Tensor, scale: Tensor) -> Tensor:
    return (blocks_EMrNc / scale).clamp_(-LARGEST, LARGEST).to(E4M3)


def _spread(scale_EMN: Tensor) -> Tensor:
    return scale_EMN[:, :, None, :, None]


def _blocks(weight_EOK: Tensor, block: tuple[int, int]) -> Tensor:
    """[E, O, K] as [E, M, r, N, c]."""
    experts, out_features, in_features = weight_EOK.shape
    rows, columns = block
    if out_features % rows or in_features % columns:
        raise InputError(f"blocks of {rows}×{columns} don't tile matrices of {out_features}×{in_features}")
    return weight_EOK.reshape(experts, out_features // rows, rows, in_features // columns, columns)


def _chunks(weight_EOK: Tensor) -> tuple[Tensor, ...]:
    """Experts in runs of about CHUNK_WEIGHTS weights."""
    experts, out_features, in_features = weight_EOK.shape
    return weight_EOK.split(max(1, min(experts, CHUNK_WEIGHTS // (out_features * in_features))))

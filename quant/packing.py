"""Bit-dense packing of small unsigned integers: 32 codes of b bits are exactly b int32 words, for every b from 1 to 8.

Contract: along the last dimension, code i occupies the bits [i·b, (i+1)·b) of the row, counted from the lowest bit of
the row's first word; a code may straddle two words. A row has ceil(K·b / 32) words and the bits left over are 0. This
is the dense layout of compressed-tensors ≥ 0.18 (whose codes are signed: it adds 2^(b−1) before packing; in
`Quantized.codes` that is added already). `unpack(pack(codes, bits), bits, K)` is `codes`, for every K.

How it works: on a little-endian machine the words are one stream of bits, and each b bytes hold 8 codes. A field of 2,
4 or 8 codes is read as one integer and spread to one byte per code by moving its upper half up, then the upper half of
each half, and so on: two passes of vector instructions per step and no gather. Packing is the same backwards. Both work
in chunks that stay in cache, so they need little memory beyond their result.

Ternary codes, 1.58 bits, have no whole number of bits: trits.py holds five of them in a byte.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from moe_compress.errors import InputError
from moe_compress.quant.trits import TERNARY, pack_trits, trit_words, unpack_trits

# bits -> (codes per field, the integer that holds one byte per code of a field). A field's packed size is whole bytes.
FIELDS = {
    1: (8, torch.int64),
    2: (4, torch.int32),
    3: (8, torch.int64),
    4: (2, torch.int16),
    5: (8, torch.int64),
    6: (4, torch.int32),
    7: (8, torch.int64),
}
CHUNK_CODES = {"cpu": 1 << 20, "cuda": 1 << 27}


def packed_words(in_features: int, bits: float) -> int:
    """How many int32 words a row of `in_features` codes takes: ceil(K · bits / 32); ternary: ceil(K / 20)."""
    return trit_words(in_features) if bits == TERNARY else -(-in_features * int(bits) // 32)


def pack(codes: Tensor, bits: float) -> Tensor:
    """`codes` uint8 [..., K] as int32 words [..., ceil(K · bits / 32)].

    Raises InputError when `bits` is not 1 to 8 or 1.58, the codes are not uint8, or one of them doesn't fit.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() == 0:
        raise InputError(f"codes to pack must be a uint8 tensor [..., K], not {codes.dtype} {list(codes.shape)}")
    if bits == TERNARY:
        return pack_trits(codes)
    bits = int(bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise InputError(f"a code of {int(codes.max())} doesn't fit {bits} bits")
    in_features = codes.shape[-1]
    words = packed_words(in_features, bits)
    padding = -in_features % 32
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    rows = codes.shape[:-1]
    whole_words = packed_words(codes.shape[-1], bits)
    stream = codes.contiguous().view(-1)
    packed = (stream.clone() if bits == 8 else _compress(stream, bits)).view(torch.int32)
    return packed.view(*rows, whole_words)[..., :words].contiguous()


def unpack(words: Tensor, bits: float, in_features: int) -> Tensor:
    """The uint8 codes [..., K] of int32 `words` [..., ceil(K · bits / 32)], with K = `in_features`.

    Raises InputError when `bits` is not 1 to 8 or 1.58, the words are not int32, or a row has another number of words.
    """
    _check_bits(bits)
    if words.dtype != torch.int32 or words.dim() == 0 or words.shape[-1] != packed_words(in_features, bits):
        raise InputError(
            f"{in_features} codes of {bits} bits are int32 [..., {packed_words(in_features, bits)}], "
            f"not {words.dtype} {list(words.shape)}"
        )
    if bits == TERNARY:
        return unpack_trits(words, in_features)
    bits = int(bits)
    rows = words.shape[:-1]
    padding = -words.shape[-1] % bits
    if padding:
        words = torch.nn.functional.pad(words, (0, padding))
    packed = words.contiguous().view(-1).view(torch.uint8)
    codes = packed.clone() if bits == 8 else _spread(packed, bits)
    return codes.view(*rows, words.shape[-1] // bits * 32)[..., :in_features].contiguous()


def _spread(packed: Tensor, bits: int) -> Tensor:
    """The codes, one per byte, of a stream of packed bytes; both are whole fields."""
    count, container = FIELDS[bits]
    packed_bytes = count * bits // 8
    fields = packed.view(-1, packed_bytes)
    codes = torch.empty(len(fields) * count, dtype=torch.uint8, device=packed.device)
    out = codes.view(container)
    step = _chunk_fields(packed, count)
    spare = torch.empty(min(step, len(fields)), dtype=container, device=packed.device)
    for start in range(0, len(fields), step):
        field = out[start : start + step]
        if packed_bytes == 1:
            field.copy_(fields[start : start + step, 0])
        else:
            _copy_lanes(field.zero_().view(torch.uint8).view(-1, count), fields[start : start + step], packed_bytes)
        upper = spare[: len(field)]
        half = count // 2
        while half:
            # x + upper · (2^shift − 1) moves the upper half of every part up by `shift`, in two passes.
            torch.bitwise_and(field, _halves(bits * half, 8 * 2 * half, bits * half, 8 * count), out=upper)
            field.add_(upper, alpha=(1 << (8 - bits) * half) - 1)
            half //= 2
    return codes


def _compress(codes: Tensor, bits: int) -> Tensor:
    """The stream of packed bytes of `codes`, one per byte; both are whole fields."""
    count, container = FIELDS[bits]
    packed_bytes = count * bits // 8
    fields = codes.view(container)
    packed = torch.empty(len(fields), packed_bytes, dtype=torch.uint8, device=codes.device)
    step = _chunk_fields(codes, count)
    for start in range(0, len(fields), step):
        field = fields[start : start + step].clone()
        upper = torch.empty_like(field)
        half = 1
        while half < count:
            torch.bitwise_and(field, _halves(8 * half, 8 * 2 * half, bits * half, 8 * count), out=upper)
            field.bitwise_xor_(upper).bitwise_or_(upper.bitwise_right_shift_((8 - bits) * half))
            half *= 2
        _copy_lanes(packed[start : start + step], field.view(torch.uint8).view(-1, count), packed_bytes)
    return packed.view(-1)


def _copy_lanes(target: Tensor, source: Tensor, size: int) -> None:
    """Copy the first `size` bytes of every row, lane by lane: twice as fast as one copy of many short rows."""
    if size % 2 == 0:
        target, source, size = target.view(torch.int16), source.view(torch.int16), size // 2
    for lane in range(size):
        target[:, lane] = source[:, lane]


def _halves(offset: int, period: int, width: int, total: int) -> int:
    """A mask of `width` bits at `offset`, repeated every `period` bits up to `total`; never the sign bit."""
    return sum(((1 << width) - 1) << start for start in range(offset, total, period))


def _chunk_fields(codes: Tensor, count: int) -> int:
    """How many fields to work on at a time."""
    return CHUNK_CODES.get(codes.device.type, CHUNK_CODES["cuda"]) // count


def _check_bits(bits: float) -> None:
    if bits != TERNARY and bits not in range(1, 9):
        raise InputError(f"packing takes 1 to 8 bits or {TERNARY}, not {bits}")
    if sys.byteorder != "little":
        raise InputError("packing needs a little-endian machine")

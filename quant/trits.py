"""Packing of ternary codes, 1.58 bits: five codes of {0, 1, 2} in a byte, twenty in an int32 word (1.6 bits each).

Contract: along the last dimension, byte j of a row holds the codes 5j to 5j + 4 as one number in base 3, the first code
its lowest digit: Σ code[5j + i] · 3^i, at most 242. A row has ceil(K / 20) words, bytes in little-endian order; codes
beyond the last are 0. `unpack_trits(pack_trits(codes), K)` is `codes`, for every K.

Five in a byte is within 1 % of the entropy, log2 3 = 1.585, and a byte is unpacked by one look-up in a table of 1.2 KB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.errors import InputError

TERNARY = 1.58  # the width's name in recipes and files; what it takes is 1.6 bits
PER_BYTE, PER_WORD = 5, 20
CHUNK_BYTES = {"cpu": 1 << 18, "cuda": 1 << 26}


def trit_words(in_features: int) -> int:
    """How many int32 words a row of `in_features` ternary codes takes: ceil(K / 20)."""
    return -(-in_features // PER_WORD)


def pack_trits(codes: Tensor) -> Tensor:
    """`codes` uint8 [..., K] as int32 words [..., ceil(K / 20)]. Raises InputError for a code above 2."""
    if codes.numel() and int(codes.max()) > 2:
        raise InputError(f"a code of {int(codes.max())} isn't ternary: 0, 1 or 2")
    rows, words = codes.shape[:-1], trit_words(codes.shape[-1])
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % PER_WORD)).view(*rows, words * 4, PER_BYTE)
    packed = padded[..., PER_BYTE - 1].clone(memory_format=torch.contiguous_format)
    for digit in reversed(range(PER_BYTE - 1)):
        packed.mul_(3).add_(padded[..., digit])
    return packed.view(torch.int32)


def unpack_trits(words: Tensor, in_features: int) -> Tensor:
    """The uint8 codes [..., K] of int32 `words` [..., ceil(K / 20)], with K = `in_features`."""
    stream = words.contiguous().view(-1).view(torch.uint8)
    table = _table(words.device)
    codes = torch.empty(len(stream), PER_BYTE, dtype=torch.uint8, device=words.device)
    step = CHUNK_BYTES.get(words.device.type, CHUNK_BYTES["cuda"])
    for start in range(0, len(stream), step):
        part = slice(start, start + step)
        torch.index_select(table, 0, stream[part].int(), out=codes[part])
    return codes.view(*words.shape[:-1], words.shape[-1] * PER_WORD)[..., :in_features].contiguous()


def _table(device: torch.device) -> Tensor:
    """Byte → its five codes, [256, 5]; bytes above 242 are never written."""
    byte = torch.arange(256, device=device)
    return torch.stack([byte // 3**i % 3 for i in range(PER_BYTE)], dim=1).to(torch.uint8)

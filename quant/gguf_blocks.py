"""The block types of GGUF that this toolkit writes: what each holds, byte by byte, and the weights that it stands for.

Contract: a row of K weights is K / `weights` blocks of `size` bytes, one after the other. `fields` say what numbers a
block is made of, `join` puts them into bytes, `dequantize` gives the weights that llama.cpp reads from them: the
float32 operations are those of the `gguf` package in the same order, so the values are equal bit for bit.

    plain     F32, F16, BF16                         the number itself
    single    Q4_0 Q5_0 Q8_0 IQ4_NL TQ1_0 TQ2_0      d · level
    offset    Q4_1 Q5_1                              d · code + m
    scaled    Q3_K Q6_K IQ4_XS                       (d · scale of the sub-block) · level
    affine    Q2_K Q4_K Q5_K                         (d · scale) · code − (dmin · minimum of the sub-block)

Layouts: the GGUF type descriptions of ggml; sizes are those of `gguf.constants.GGML_QUANT_SIZES`.

Letters: N blocks, S sub-blocks, n weights of a sub-block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_compress.checkpoint.gguf_file import STORED
from moe_compress.errors import RecipeError, nearest

Kind = Literal["plain", "single", "offset", "scaled", "affine"]

# The 16 levels of IQ4_NL and IQ4_XS.
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """A type of blocks.

    Attributes:
        name: as llama.cpp calls it.
        kind: see above.
        subblocks: parts of a block with a scale of their own.
        low, high: smallest and largest level (for `offset` and `affine` the code).
        scale_low, scale_high: smallest and largest integer scale of a sub-block (minimum likewise).
        levels: where they aren't consecutive integers.
    """

    name: str
    kind: Kind
    subblocks: int = 1
    low: int = 0
    high: int = 0
    scale_low: int = 0
    scale_high: int = 0
    levels: tuple[int, ...] = ()

    @property
    def number(self) -> int:
        """In the file."""
        return STORED[self.name][0]

    @property
    def weights(self) -> int:
        """Weights of a block."""
        return STORED[self.name][1]

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return STORED[self.name][2]

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.size / self.weights

    def fits(self, length: int) -> bool:
        """Whether a row of so many weights is whole blocks."""
        return length % self.weights == 0

    def row_bytes(self, length: int) -> int:
        """Bytes of a row. Raises ValueError where it isn't whole blocks."""
        if not self.fits(length):
            raise ValueError(f"rows of {length} weights are not whole blocks of {self.weights} ({self.name})")
        return length // self.weights * self.size


TYPES: dict[str, BlockType] = {
    t.name: t
    for t in (
        BlockType("F32", "plain"),
        BlockType("F16", "plain"),
        BlockType("BF16", "plain"),
        BlockType("Q4_0", "single", low=-8, high=7),
        BlockType("Q4_1", "offset", high=15),
        BlockType("Q5_0", "single", low=-16, high=15),
        BlockType("Q5_1", "offset", high=31),
        BlockType("Q8_0", "single", low=-128, high=127),
        BlockType("Q2_K", "affine", subblocks=16, high=3, scale_high=15),
        BlockType("Q3_K", "scaled", subblocks=16, low=-4, high=3, scale_low=-32, scale_high=31),
        BlockType("Q4_K", "affine", subblocks=8, high=15, scale_high=63),
        BlockType("Q5_K", "affine", subblocks=8, high=31, scale_high=63),
        BlockType("Q6_K", "scaled", subblocks=16, low=-32, high=31, scale_low=-128, scale_high=127),
        BlockType("IQ4_NL", "single", low=-127, high=113, levels=_NONLINEAR),
        BlockType("IQ4_XS", "scaled", subblocks=8, low=-127, high=113, scale_low=-32, scale_high=31, levels=_NONLINEAR),
        BlockType("TQ1_0", "single", low=-1, high=1),
        BlockType("TQ2_0", "single", low=-1, high=1),
    )
}

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Fields(NamedTuple):
    """What blocks are made of.

    Attributes:
        codes_NK: code of every weight, from 0, uint8 (level − `low`; IQ4: place in the list of levels).
        d_N: scale of the block, float16.
        m_N: `offset`: what is added; `affine`: scale of the minima, float16.
        scale_NS, minimum_NS: integers of the sub-blocks, int16.
    """

    codes_NK: Tensor
    d_N: Tensor
    m_N: Tensor | None = None
    scale_NS: Tensor | None = None
    minimum_NS: Tensor | None = None


def find_type(name: str) -> BlockType:
    """The type of that name. Raises RecipeError with the nearest there is."""
    if name not in TYPES:
        raise RecipeError(f"GGUF type {name!r} is not one that is written here{nearest(name, TYPES)}")
    return TYPES[name]


def join_plain(weight: Tensor, kind: BlockType) -> Tensor:
    """Numbers as they are stored: [..., K] → uint8 [..., K · bytes]."""
    return weight.to(_DTYPES[kind.name]).contiguous().view(torch.uint8)


def join(fields: Fields, kind: BlockType) -> Tensor:
    """Blocks from their fields: uint8 [N, size]."""
    codes, d = fields.codes_NK, _bytes(fields.d_N)
    count = len(codes)
    name = kind.name
    if name == "Q8_0":
        return torch.cat([d, (codes.to(torch.int16) - 128).to(torch.int8).view(torch.uint8)], -1)
    if name in ("Q4_0", "IQ4_NL"):
        return torch.cat([d, _crumbs(codes.view(count, 2, 16), 4)], -1)
    if name in ("Q5_0", "Q4_1", "Q5_1"):
        parts = [d] if fields.m_N is None else [d, _bytes(fields.m_N)]
        if kind.name != "Q4_1":
            parts.append(_crumbs((codes >> 4).view(count, 4, 8).transpose(1, 2), 1))
        return torch.cat([*parts, _crumbs((codes & 15).view(count, 2, 16), 4)], -1)
    if name == "TQ1_0":
        return torch.cat([_trits(codes), d], -1)
    if name == "TQ2_0":
        return torch.cat([_crumbs(codes.view(count, 2, 4, 32), 2).flatten(1), d], -1)
    assert fields.scale_NS is not None
    scale = (fields.scale_NS - min(0, kind.scale_low)).to(torch.uint8)
    if name == "Q3_K":
        low = _crumbs((codes & 3).view(count, 2, 4, 32), 2).flatten(1)
        mask = _crumbs((codes >> 2).view(count, 8, 32), 1)
        parts = [_crumbs((scale & 15).view(count, 2, 8), 4), _crumbs((scale >> 4).view(count, 4, 4), 2)]
        return torch.cat([mask, low, *parts, d], -1)
    if name == "Q6_K":
        low = _crumbs((codes & 15).view(count, 2, 2, 64), 4).flatten(1)
        high = _crumbs((codes >> 4).view(count, 2, 4, 32), 2).flatten(1)
        return torch.cat([low, high, fields.scale_NS.to(torch.int8).view(torch.uint8), d], -1)
    if name == "IQ4_XS":
        high = _crumbs((scale >> 4).view(count, 2, 4).transpose(1, 2), 2)
        low = _crumbs((scale & 15).view(count, 4, 2).transpose(1, 2), 4)
        return torch.cat([d, high, low, _crumbs(codes.view(count, 8, 2, 16), 4).flatten(1)], -1)
    assert fields.minimum_NS is not None
    assert fields.m_N is not None
    minimum = fields.minimum_NS.to(torch.uint8)
    if name == "Q2_K":
        packed = _crumbs(codes.view(count, 2, 4, 32), 2).flatten(1)
        return torch.cat([scale | (minimum << 4), packed, d, _bytes(fields.m_N)], -1)
    first = [(v[:, :4] & 63) | ((v[:, 4:] >> 4) << 6) for v in (scale, minimum)]
    both = [*first, (scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << 4)]
    high_bits = [_crumbs((codes >> 4).view(count, 8, 32), 1)] if name == "Q5_K" else []
    low = _crumbs((codes & 15).view(count, 4, 2, 32), 4).flatten(1)
    return torch.cat([d, _bytes(fields.m_N), *both, *high_bits, low], -1)


def split(blocks_NB: Tensor, kind: BlockType) -> Fields:
    """Fields of blocks uint8 [N, size]: the inverse of `join`. Not for `plain` types."""
    count, name, half = len(blocks_NB), kind.name, kind.weights // 2

    def at(start: int, stop: int) -> Tensor:
        return blocks_NB[:, start:stop]

    def number(start: int) -> Tensor:
        return at(start, start + 2).contiguous().view(torch.float16).view(count)

    if name == "Q8_0":
        return Fields((at(2, 34).contiguous().view(torch.int8).to(torch.int16) + 128).to(torch.uint8), number(0))
    if name in ("Q4_0", "IQ4_NL"):
        return Fields(_spread(at(2, 18), 4).flatten(1), number(0))
    if name in ("Q5_0", "Q4_1", "Q5_1"):
        m, start = (number(2), 4) if kind.kind == "offset" else (None, 2)
        low = _spread(at(kind.size - 16, kind.size), 4).flatten(1)
        if name == "Q4_1":
            return Fields(low, number(0), m)
        high = _spread(at(start, start + 4), 1).transpose(1, 2).flatten(1)
        return Fields(low | (high << 4), number(0), m)
    if name == "TQ1_0":
        return Fields(_untrits(at(0, 52)), number(52))
    if name == "TQ2_0":
        return Fields(_spread(at(0, 64).reshape(count, 2, 32), 2).flatten(1), number(64))
    if name == "Q3_K":
        codes = _spread(at(32, 96).reshape(count, 2, 32), 2).flatten(1) | (_spread(at(0, 32), 1).flatten(1) << 2)
        scale = _spread(at(96, 104), 4).flatten(1) | (_spread(at(104, 108), 2).flatten(1) << 4)
        return Fields(codes, number(108), None, scale.to(torch.int16) - 32)
    if name == "Q6_K":
        low = _spread(at(0, 128).reshape(count, 2, 64), 4).flatten(1)
        high = _spread(at(128, 192).reshape(count, 2, 32), 2).flatten(1)
        scale = at(192, 208).contiguous().view(torch.int8).to(torch.int16)
        return Fields(low | (high << 4), number(208), None, scale)
    if name == "IQ4_XS":
        high = _spread(at(2, 4), 2).transpose(1, 2).flatten(1)
        low = _spread(at(4, 8), 4).transpose(1, 2).flatten(1)
        codes = _spread(at(8, 136).reshape(count, 8, 16), 4).flatten(1)
        return Fields(codes, number(0), None, (low | (high << 4)).to(torch.int16) - 32)
    if name == "Q2_K":
        codes = _spread(at(16, 80).reshape(count, 2, 32), 2).flatten(1)
        scale, minimum = at(0, 16) & 15, at(0, 16) >> 4
        return Fields(codes, number(80), number(82), scale.to(torch.int16), minimum.to(torch.int16))
    first, second, both = at(4, 8), at(8, 12), at(12, 16)
    scale = torch.cat([first & 63, (both & 15) | ((first >> 6) << 4)], -1).to(torch.int16)
    minimum = torch.cat([second & 63, (both >> 4) | ((second >> 6) << 4)], -1).to(torch.int16)
    codes = _spread(at(kind.size - half, kind.size).reshape(count, 4, 32), 4).flatten(1)
    if name == "Q5_K":
        codes = codes | (_spread(at(16, 48), 1).flatten(1) << 4)
    return Fields(codes, number(0), number(2), scale, minimum)


def dequantize(blocks: Tensor, kind: BlockType) -> Tensor:
    """Weights in float32 from rows of blocks: uint8 [..., bytes] → [..., K]."""
    if kind.kind == "plain":
        return blocks.contiguous().view(_DTYPES[kind.name]).float()
    fields = split(blocks.reshape(-1, kind.size), kind)
    shape = (*blocks.shape[:-1], blocks.shape[-1] // kind.size * kind.weights)
    count = len(fields.codes_NK)
    codes = fields.codes_NK.view(count, kind.subblocks, -1)
    d = fields.d_N.float().view(count, 1, 1)
    level = level_table(kind, blocks.device)[codes.int()] if kind.levels else codes.float() + kind.low
    if kind.kind == "single":
        return (d * level).view(shape)
    if kind.kind == "offset":
        assert fields.m_N is not None
        return (d * level + fields.m_N.float().view(count, 1, 1)).view(shape)
    assert fields.scale_NS is not None
    scaled = d * fields.scale_NS.float().unsqueeze(-1)
    if kind.kind == "scaled":
        return (scaled * level).view(shape)
    assert fields.m_N is not None
    assert fields.minimum_NS is not None
    return (scaled * level - fields.m_N.float().view(count, 1, 1) * fields.minimum_NS.float().unsqueeze(-1)).view(shape)


def level_table(kind: BlockType, device: torch.device | str = "cpu") -> Tensor:
    """The levels of a type whose levels are no consecutive integers, float32."""
    return torch.tensor(kind.levels, dtype=torch.float32, device=device)


def _bytes(value_N: Tensor) -> Tensor:
    """float16 [N] → its bytes [N, 2]."""
    return value_N.to(torch.float16).contiguous().view(torch.uint8).view(-1, 2)


def _crumbs(parts: Tensor, bits: int) -> Tensor:
    """[..., P, W] of small numbers → bytes [..., W], part p at bits p · bits."""
    shift = torch.arange(parts.shape[-2], dtype=torch.uint8, device=parts.device) * bits
    return (parts << shift.unsqueeze(-1)).sum(-2, dtype=torch.uint8)  # no bit is set twice


def _spread(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_crumbs`: bytes [..., W] → [..., 8 / bits, W]."""
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-2) >> shift.unsqueeze(-1)) & ((1 << bits) - 1)


# TQ1_0: five ternary digits in a byte, as a fraction of 3^5 that is rounded up to a fraction of 256. First 160 weights
# (five runs of 32), then 80 (five of 16), then 16 (four of 4).
_RUNS = ((0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4))


def _trits(codes_NK: Tensor) -> Tensor:
    parts = []
    for start, stop, digits, width in _RUNS:
        power = torch.tensor([3 ** (4 - i) for i in range(digits)], dtype=torch.int32, device=codes_NK.device)
        value = (codes_NK[:, start:stop].reshape(-1, digits, width).int() * power.view(-1, 1)).sum(1)
        parts.append(((value * 256 + 242) // 243).to(torch.uint8))
    return torch.cat(parts, -1)


def _untrits(packed_NB: Tensor) -> Tensor:
    parts, at = [], 0
    for _, _, digits, width in _RUNS:
        power = torch.tensor([3**i for i in range(digits)], dtype=torch.int32, device=packed_NB.device)
        value = (packed_NB[:, at : at + width].int().unsqueeze(1) * power.view(-1, 1)) & 255
        parts.append(((value * 3) >> 8).to(torch.uint8).flatten(1))
        at += width
    return torch.cat(parts, -1)

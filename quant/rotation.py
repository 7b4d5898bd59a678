"""Randomised Hadamard rotations of what a projection reads: outliers are spread evenly before a matrix is quantized.

Contract: for orthogonal Q, W x = (W Q)(Qᵀ x). The matrix is stored rotated and its input is rotated at run time, so a
rotation changes nothing but what quantizing loses. Q = D S: signs D, then a block-diagonal S of normalised Hadamard
matrices, of the largest power of two that divides the size (768: three blocks of 256). As S is symmetric, the same
function rotates the rows of a matrix and an input: v → (v ∘ d) S.

A Hadamard matrix of 2^m is a Kronecker product: where it is large, two small matrix products take its place.

Source: QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), there for down projections' inputs too; incoherence by random
signs from QuIP# (Tseng et al. 2024, arXiv 2402.04396).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# What is rotated of a layer: nothing, what down projections read, or what all projections of experts read.
Rotate = Literal["none", "down", "both"]

AT_ONCE = 256  # blocks up to this size are one product: for more, two of about the root of the size are less work


@dataclass(frozen=True)
class Rotation:
    """Q of a size: bit i of `signs` is 1 where element i changes its sign first."""

    size: int
    signs: int

    @classmethod
    def random(cls, size: int, seed: int) -> Rotation:
        """With signs from a seed."""
        bits = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).tolist()
        return cls(size, sum(bit << i for i, bit in enumerate(bits)))

    @classmethod
    def from_json(cls, values: dict[str, int | str]) -> Rotation:
        """The reverse of `to_json`."""
        return cls(int(values["size"]), int(str(values["signs"]), 16))

    def to_json(self) -> dict[str, int | str]:
        """As it stands in config.json: the signs as a hexadecimal number."""
        return {"size": self.size, "signs": f"{self.signs:x}"}

    def __call__(self, value: Tensor) -> Tensor:
        """Rotate the last dimension of an input, or of a matrix [..., O, K]: v → v Q."""
        return _blocks(value * _signs(self.size, self.signs, value.device, value.dtype))

    def back(self, value: Tensor) -> Tensor:
        """v → v Qᵀ: undo it."""
        return _blocks(value) * _signs(self.size, self.signs, value.device, value.dtype)

    def both_sides(self, moment: Tensor) -> Tensor:
        """A second moment [..., K, K] of inputs as one of rotated inputs: Qᵀ M Q."""
        return self(self(moment).transpose(-2, -1)).transpose(-2, -1)


@dataclass(frozen=True)
class Rotations:
    """How what experts' projections read is rotated: what gate and up read (`inward`), what down reads."""

    inward: Rotation | None = None
    down: Rotation | None = None

    @classmethod
    def of_layer(cls, rotate: Rotate, layer: int, hidden: int, neurons: int) -> Rotations:
        """Those of a decoder layer; its number is their seed."""
        inward = Rotation.random(hidden, layer) if rotate == "both" else None
        return cls(inward, None if rotate == "none" else Rotation.random(neurons, layer))

    def of(self, projection: str) -> Rotation | None:
        """How what a projection reads is rotated."""
        return self.down if projection == "down" else self.inward

    def turned(self, projection: str, value: Tensor) -> Tensor:
        """A projection's matrix [..., O, K], or what it reads, in float32 where it is rotated and else as it is."""
        rotation = self.of(projection)
        return value if rotation is None else rotation(value.float())

    def of_moment(self, projection: str, moment: Tensor) -> Tensor:
        """The second moment [..., K, K] of what a projection reads, of that rotated."""
        rotation = self.of(projection)
        return moment if rotation is None else rotation.both_sides(moment)


NO_ROTATIONS = Rotations()


@functools.lru_cache(maxsize=64)
def _signs(size: int, signs: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor([-1.0 if signs >> i & 1 else 1.0 for i in range(size)], dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[size, size], orthogonal and symmetric; element i, j is negative where i and j share an odd number of bits."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).to(device, dtype)


def _blocks(value: Tensor) -> Tensor:
    """Every block of the last dimension times its Hadamard matrix: as one product, or two of factors of a large one."""
    size = value.shape[-1] & -value.shape[-1]
    left = 1 if size <= AT_ONCE else 1 << (size.bit_length() // 2)
    right = size // left
    # Plain products of many rows: batches of small matrices take several times as long.
    rotated: Tensor = value.reshape(-1, right) @ _hadamard(right, value.device, value.dtype)
    if left > 1:
        swapped = rotated.view(-1, left, right).transpose(1, 2).reshape(-1, left)
        rotated = (swapped @ _hadamard(left, value.device, value.dtype)).view(-1, right, left).transpose(1, 2)
    return rotated.reshape(value.shape)

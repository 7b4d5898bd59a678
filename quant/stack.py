"""Matrices of several experts in one encoding: the tensors that the `native` format stores, and how they are read.

docs/format.md specifies them byte by byte.

Letters: S experts of a stack, O/K output and input features, G groups, W words of a row, R rows by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_compress.quant.gguf_blocks import TYPES
from moe_compress.quant.grid import Grid, Quantized
from moe_compress.quant.packing import pack, packed_words
from moe_compress.quant.run_packed import dense, multiply
from moe_compress.quant.trits import TERNARY

_EVERY = slice(None)


@dataclass(frozen=True)
class Encoding:
    """How the matrices of a stack are stored.

    Attributes:
        bits: width of a code, 1.58 for ternary ones; 0 for dense weights.
        group_size: weights that share a scale (along the input), -1 for a whole row.
        symmetric: no zero points are stored.
        dtype: of the scales, or of dense weights.
        blocks: name of a GGUF block type, which says all; the others then don't count.
    """

    bits: float
    group_size: int = -1
    symmetric: bool = True
    dtype: str = "bfloat16"
    blocks: str = ""

    @property
    def name(self) -> str:
        """Name of its tensors: "b3g64", "t158g64" (ternary), "dense", "gguf_Q4_K"; "z" where zero points are stored."""
        if self.blocks:
            return f"gguf_{self.blocks}"
        if self.bits == 0:
            return "dense"
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        width = "t158" if self.bits == TERNARY else f"b{self.bits}"
        return f"{width}{group}{'' if self.symmetric else 'z'}"

    @property
    def grid(self) -> Grid:
        """The grid of the codes."""
        return Grid(self.bits, self.group_size, self.symmetric)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the scales, or of dense weights."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def matrix_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of one stored matrix, scales, zero points and padding included."""
        if self.blocks:
            return out_features * TYPES[self.blocks].row_bytes(in_features)
        size = self.torch_dtype.itemsize
        if self.bits == 0:
            return out_features * in_features * size
        groups = self.grid.groups(in_features)
        zeros = 0 if self.symmetric else 4 * packed_words(groups, self.bits)
        return out_features * (4 * packed_words(in_features, self.bits) + groups * size + zeros)

    def to_json(self) -> dict[str, Any]:
        """As it stands in config.json."""
        if self.blocks:
            return {"bits": 0, "blocks": self.blocks}
        values: dict[str, Any] = {"bits": self.bits, "dtype": self.dtype}
        if self.bits:
            values |= {"group_size": self.group_size, "symmetric": self.symmetric}
        return values


class Stack(nn.Module):
    """The same projection of several experts in one encoding.

    Parameters (never trained): `codes` int32 [S, O, W], `scale` [S, O, G], `zero` int32 [S, O, Wz] if asymmetric; or
    `weight` [S, O, K]; or `blocks` uint8 [S, O, bytes of a row].
    """

    def __init__(self, encoding: Encoding, count: int, out_features: int, in_features: int, device: str = "meta"):
        super().__init__()
        self.encoding = encoding
        self.out_features, self.in_features = out_features, in_features

        def tensor(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(count, *shape, dtype=dtype, device=device), requires_grad=False)

        if encoding.blocks:
            self.blocks = tensor(out_features, TYPES[encoding.blocks].row_bytes(in_features), dtype=torch.uint8)
            return
        if encoding.bits == 0:
            self.weight = tensor(out_features, in_features, dtype=encoding.torch_dtype)
            return
        groups = encoding.grid.groups(in_features)
        self.codes = tensor(out_features, packed_words(in_features, encoding.bits), dtype=torch.int32)
        self.scale = tensor(out_features, groups, dtype=encoding.torch_dtype)
        if not encoding.symmetric:
            self.zero = tensor(out_features, packed_words(groups, encoding.bits), dtype=torch.int32)

    @classmethod
    def holding(cls, value: Quantized | Tensor) -> Stack:
        """A stack with these matrices: quantized [S, O, K], or dense weights of that shape."""
        if isinstance(value, Tensor):
            count, out_features, in_features = value.shape
            stack = cls(Encoding(0, dtype=name_of(value.dtype)), count, out_features, in_features)
            stack.weight = nn.Parameter(value.contiguous(), requires_grad=False)
            return stack
        count, out_features, in_features = value.codes.shape
        grid = value.grid
        encoding = Encoding(grid.bits, grid.group_size, grid.symmetric, name_of(value.scale.dtype))
        stack = cls(encoding, count, out_features, in_features)
        stack.codes = nn.Parameter(pack(value.codes, grid.bits), requires_grad=False)
        stack.scale = nn.Parameter(value.scale.contiguous(), requires_grad=False)
        if value.zero is not None:
            stack.zero = nn.Parameter(pack(value.zero, grid.bits), requires_grad=False)
        return stack

    @classmethod
    def of_blocks(cls, blocks_SOB: Tensor, name: str, in_features: int) -> Stack:
        """A stack with matrices in GGUF blocks: uint8 [S, O, bytes of a row] of the type `name`."""
        count, out_features, _ = blocks_SOB.shape
        stack = cls(Encoding(0, blocks=name), count, out_features, in_features)
        stack.blocks = nn.Parameter(blocks_SOB.contiguous(), requires_grad=False)
        return stack

    def forward(
        self,
        slots: list[int],
        work: Tensor | torch.dtype,
        counts: list[int] | None = None,
        backward: bool = False,
        rows: slice | Tensor = _EVERY,
    ) -> Tensor:
        """The matrices in some slots in a dtype (of each, some rows), [len(slots), O, K]; or, given rows [R, K] and how
        many are each slot's, these times the slots' matrices, [R, O] (`backward`: [R, O] → [R, K]). A call, so that
        offloading hooks see it."""
        if isinstance(work, Tensor):
            return multiply(self, work, slots, counts or [], backward)
        index = torch.tensor(slots, device=next(self.parameters()).device)
        return dense(self, index[:, None] if isinstance(rows, Tensor) else index, rows, work)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(keeping_dtype(fn), recurse)
        return self


def keeping_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `module.to` does to a tensor, without the cast: scales and biases stay what was stored, in any dtype."""

    def moved(tensor: Tensor) -> Tensor:
        result = move(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved


def name_of(dtype: torch.dtype) -> str:
    """As config.json has it."""
    return str(dtype).removeprefix("torch.")

"""Linear layers, embeddings and heads whose weights stay packed: what stands in a model for those beside the experts.

The matrix is a stack of one, in the same encodings and the same bits as an expert's (quant/packed.py). While running,
a linear layer's rows are unpacked some at a time, and of embeddings only the rows that are looked up; a dense copy of a
large matrix never exists. A head that shares the embeddings' weights has none of its own.

Letters: V tokens of the vocabulary, O/K output and input features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from .stack import Encoding, Stack


class _Matrix(nn.Module):
    """A packed matrix in a module tree: the stack is a child that is called like its encoding.

    Attributes:
        dtype: what the dense weights would have now; `.to(dtype)` changes it, and nothing that is stored.
    """

    kind = "packed_matrix"

    def __init__(self, stack: Stack, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.name = stack.encoding.name
        self.add_module(self.name, stack)

    @property
    def stack(self) -> Stack:
        """The packed matrix."""
        return self.get_submodule(self.name)  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """(output, input) features; (tokens, hidden size) of embeddings."""
        return self.stack.out_features, self.stack.in_features

    @property
    def weight(self) -> Tensor:
        """The dense matrix, unpacked anew each time: for classes that look at a layer's weights or their dtype."""
        return self.rows(slice(None), self.dtype)

    def rows(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of the matrix, unpacked."""
        return self.stack([0], dtype, rows=rows)[0]  # type: ignore[no-any-return]

    def product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """input · Wᵀ + bias, [..., K] → [..., O]; some rows of W are unpacked at a time, all where gradients pass."""
        if torch.is_grad_enabled() and input.requires_grad:
            return functional.linear(input, self.rows(slice(None), input.dtype), bias)
        rows_RK = input.reshape(-1, input.shape[-1])
        output: Tensor = self.stack([0], rows_RK, [len(rows_RK)])
        output = output if bias is None else output + bias
        return output.view(*input.shape[:-1], output.shape[-1])

    def describe(self) -> dict[str, Any]:
        """JSON from which `build` makes the module again."""
        return self.stack.encoding.to_json()

    def packed_tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, a bias excepted."""
        return {f"{self.name}.{n}": t for n, t in self.stack.state_dict().items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self


class PackedLinear(_Matrix):
    """A linear layer. `bias`: [O] or None, in any dtype."""

    bias: nn.Parameter | None

    def __init__(self, stack: Stack, bias: nn.Parameter | None, dtype: torch.dtype):
        super().__init__(stack, dtype)
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = self.shape

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] → [..., O]."""
        bias = self.bias
        return self.product(input, None if bias is None else bias.to(input.dtype))


class PackedEmbedding(_Matrix):
    """Embeddings; also the product of a head that shares their weights."""

    def __init__(self, stack: Stack, padding_idx: int | None, dtype: torch.dtype):
        super().__init__(stack, dtype)
        self.num_embeddings, self.embedding_dim = self.shape
        self.padding_idx = padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] → [..., K]: only rows that occur are unpacked, each once."""
        tokens, place = input.unique(return_inverse=True)
        return self.rows(tokens, self.dtype)[place]


class PackedHead(nn.Module):
    """A head that shares the packed embeddings' weights: none of its own, so nothing that could come apart.

    Attributes:
        embeddings: outside the module tree: it is there already.
    """

    kind = "packed_head"
    embeddings: PackedEmbedding
    bias: nn.Parameter | None

    def __init__(self, embeddings: PackedEmbedding, bias: nn.Parameter | None):
        super().__init__()
        object.__setattr__(self, "embeddings", embeddings)
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = embeddings.shape

    @property
    def weight(self) -> Tensor:
        """The dense matrix, unpacked."""
        return self.embeddings.weight

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] → [..., V]."""
        return self.embeddings.product(input, None if self.bias is None else self.bias.to(input.dtype))


def packed(module: nn.Module, stack: Stack, dtype: torch.dtype) -> PackedLinear | PackedEmbedding:
    """What stands for a linear layer or embeddings (dense or packed) with these weights, its bias the same tensor.

    `dtype` is that of dense weights: embeddings come out in it.
    """
    if isinstance(module, nn.Embedding | PackedEmbedding):
        return PackedEmbedding(stack, module.padding_idx, dtype)  # type: ignore[arg-type]
    if isinstance(module, nn.Linear | PackedLinear):
        return PackedLinear(stack, module.bias, dtype)  # type: ignore[arg-type]
    raise TypeError(f"{type(module).__name__} has no plain matrix")


def build(module: nn.Module, values: Mapping[str, Any], dtype: torch.dtype) -> PackedLinear | PackedEmbedding:
    """The module that `describe` described, tensors on the meta device, in place of one with these sizes."""
    rows, columns = (
        (module.num_embeddings, module.embedding_dim)
        if isinstance(module, nn.Embedding | PackedEmbedding)
        else (module.out_features, module.in_features)
    )
    return packed(module, Stack(Encoding(**values), 1, rows, columns), dtype)  # type: ignore[arg-type]


def tie(embeddings: PackedEmbedding, head: nn.Module) -> PackedHead:
    """What stands for a head that shares the embeddings' weights."""
    return PackedHead(embeddings, head.bias)  # type: ignore[arg-type]

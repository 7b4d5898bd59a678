"""Second moments of what the linear layers beside the experts read, while a decoder layer runs.

Letters: K input features, T tokens, R rows of inputs.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class LinearMoments(Mapping[str, Tensor]):
    """Σ w x xᵀ [K, K], float32, of each linear layer's inputs, by module path; those that read the same share a tensor.

    Args:
        layer: the decoder layer.
        paths: module paths of linear layers in it.
        token_weights: of each of the layer's forwards to come, what its tokens count, w [T]; None where all count 1.

    Attributes:
        unweighed: paths whose inputs are no rows of those tokens, so that all of them count 1.

    Use as a context manager around the layer's forwards, then read. Which modules read the same is seen in the first
    forward: the very same tensor reached them. A module that was never reached has no moment.
    """

    def __init__(self, layer: nn.Module, paths: Iterable[str], token_weights: Iterable[Tensor | None] = ()):
        self.unweighed: set[str] = set()
        self._layer, self._token_weights = layer, iter(token_weights)
        self._weight_T: Tensor | None = None
        self._modules = {path: layer.get_submodule(path) for path in paths}
        self._first: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._seen: list[tuple[str, Tensor]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> LinearMoments:
        self._handles.append(self._layer.register_forward_pre_hook(self._next))
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._reader(path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen = []

    def __getitem__(self, path: str) -> Tensor:
        return self._sums[self._first[path]]

    def __iter__(self) -> Any:
        return iter(self._first)

    def __len__(self) -> int:
        return len(self._first)

    def _next(self, _layer: nn.Module, _arguments: Any) -> None:
        self._weight_T = next(self._token_weights, None)

    def _reader(self, path: str) -> Any:
        def read(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            input = arguments[0]
            if path not in self._first:
                # Tensors of this forward are held until the next, so no other can have taken their place in memory.
                self._first[path] = next((p for p, seen in self._seen if seen is input), path)
                self._seen.append((path, input))
            weight_R = self._rows_weights(path, input)
            first = self._first[path]
            if first != path:
                return
            read_RK = input.detach().reshape(-1, input.shape[-1]).float()
            if weight_R is not None:
                read_RK = read_RK * weight_R.sqrt().unsqueeze(1)  # on both sides: the sum stays symmetric
            if path not in self._sums:
                self._sums[path] = torch.zeros(2 * (read_RK.shape[1],), device=read_RK.device)
            self._sums[path].addmm_(read_RK.T, read_RK)

        return read

    def _rows_weights(self, path: str, input: Tensor) -> Tensor | None:
        """What each row of an input counts, in float32; several rows in turn may be of one token (heads, streams)."""
        if self._weight_T is None:
            return None
        tokens = len(self._weight_T)
        if tokens not in itertools.accumulate(input.shape[:-1], operator.mul):
            self.unweighed.add(path)
            return None
        rows = math.prod(input.shape[:-1])
        return self._weight_T.to(input.device, torch.float32).repeat_interleave(rows // tokens)

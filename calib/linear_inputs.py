"""Second moments of what the linear layers beside the experts read, while a decoder layer runs.

Letters: K input features, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class LinearMoments(Mapping[str, Tensor]):
    """Σ x xᵀ [K, K], float32, of each linear layer's inputs, by module path; those that read the same share a tensor.

    Args:
        layer: the decoder layer.
        paths: module paths of linear layers in it.

    Use as a context manager around the layer's forwards, then read. Which modules read the same is seen in the first
    forward: the very same tensor reached them. A module that was never reached has no moment.
    """

    def __init__(self, layer: nn.Module, paths: Iterable[str]):
        self._modules = {path: layer.get_submodule(path) for path in paths}
        self._first: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._seen: list[tuple[str, Tensor]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> LinearMoments:
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

    def _reader(self, path: str) -> Any:
        def read(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            input = arguments[0]
            if path not in self._first:
                # Tensors of this forward are held until the next, so no other can have taken their place in memory.
                self._first[path] = next((p for p, seen in self._seen if seen is input), path)
                self._seen.append((path, input))
            first = self._first[path]
            if first != path:
                return
            read_TK = input.detach().reshape(-1, input.shape[-1]).float()
            if path not in self._sums:
                self._sums[path] = torch.zeros(2 * (read_TK.shape[1],), device=read_TK.device)
            self._sums[path].addmm_(read_TK.T, read_TK)

        return read

"""A checkpoint folder seen with quantized tensors as the dense ones that they stand for, computed when they are read.

Promise: opening computes nothing; a decoded tensor exists only while whoever asked for it holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reader import Checkpoint, Lazy, TensorInfo


@dataclass(frozen=True)
class Decoded:
    """A dense tensor that the folder holds in parts.

    Attributes:
        parts: names of the tensors that it is computed from.
        decode: they → the dense tensor.
        dtype, shape: of the dense tensor.
    """

    parts: tuple[str, ...]
    decode: Callable[..., Tensor]
    dtype: torch.dtype
    shape: tuple[int, ...]


class DecodedCheckpoint(Checkpoint):
    """A folder in which quantized tensors are presented dense, and config.json without its `quantization_config`.

    Args:
        folder: the checkpoint.
        method: how it is quantized, for people to read.
        decoded: name of a dense tensor → how it is computed.
        hidden: further tensors that are of use to quantized weights only.

    Attributes:
        method: as given.
        stored_bytes: bytes of all tensors in the folder.
    """

    def __init__(
        self, folder: str | Path, method: str, decoded: Mapping[str, Decoded], hidden: Sequence[str] = ()
    ) -> None:
        super().__init__(folder)
        self.method = method
        self.stored_bytes = self.nbytes
        self._stored = self.tensors
        self._decoded = dict(decoded)
        gone = {*hidden, *(part for entry in decoded.values() for part in entry.parts)}
        presented = {name: info for name, info in self._stored.items() if name not in gone}
        for name, entry in self._decoded.items():
            first = self._stored[entry.parts[0]]
            size = math.prod(entry.shape) * entry.dtype.itemsize
            presented[name] = TensorInfo(first.file, entry.dtype, entry.shape, first.offset, size)
        self.tensors = presented

    @property
    def config(self) -> dict[str, Any]:
        """config.json as it would be of the dense checkpoint."""
        return {key: value for key, value in super().config.items() if key != "quantization_config"}

    def get(self, name: str) -> Tensor:
        """The tensor; a decoded one is computed anew by every call."""
        entry = self._decoded.get(name)
        if entry is None:
            return super().get(name)
        return entry.decode(*(Checkpoint.get(self, part) for part in entry.parts))

    def slice(self, name: str) -> Any:
        """Lazy handle on a tensor."""
        return Lazy(self, name) if name in self._decoded else super().slice(name)

    def _info(self, name: str) -> TensorInfo:
        # A weight and what it is decoded from may have the same name: files are looked up by what is stored.
        return self._stored[name] if name in self._stored else super()._info(name)

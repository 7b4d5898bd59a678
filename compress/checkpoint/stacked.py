"""A checkpoint folder seen with runs of equal tensors as one, stacked when it is read.

Files that hold the experts one by one are read into models that hold them stacked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compress.errors import CheckpointError

from .reader import Checkpoint, Lazy, TensorInfo


class StackedCheckpoint(Checkpoint):
    """A folder in which some tensors are presented stacked.

    Args:
        folder: the checkpoint.
        stacks: new name → names of the tensors of equal shape and dtype that make it, in order.
        hidden: names that are not presented at all; their bytes count with a stack that has parts of the same module.
        turned: stacks of matrices that are presented transposed.

    Raises CheckpointError when the tensors of a stack aren't alike.
    """

    def __init__(
        self,
        folder: str | Path,
        stacks: Mapping[str, Sequence[str]],
        hidden: Sequence[str] = (),
        turned: Collection[str] = (),
    ):
        super().__init__(folder)
        self._stored = self.tensors
        self._stacks = dict(stacks)
        self._turned = frozenset(turned)
        stacked = {part for parts in self._stacks.values() for part in parts}
        unread: Counter[str] = Counter()  # bytes of a module's other tensors
        for name in set(hidden) - stacked:
            unread[_module(name)] += self._info(name).nbytes
        infos = {}
        for name, parts in self._stacks.items():
            members = [self._info(part) for part in parts]
            first = members[0]
            for part, info in zip(parts, members, strict=True):
                if (info.shape, info.dtype) != (first.shape, first.dtype):
                    raise CheckpointError(
                        f"{self.folder}: {part!r} is {info.dtype} {list(info.shape)}, {parts[0]!r} is {first.dtype} "
                        f"{list(first.shape)}; the experts of a layer must be alike"
                    )
            shape = first.shape[::-1] if name in self._turned else first.shape
            stored = sum(info.nbytes for info in members) + sum(unread.pop(_module(part), 0) for part in parts)
            infos[name] = replace(first, shape=(len(parts), *shape), nbytes=stored)
        self.tensors = {n: i for n, i in self._stored.items() if n not in stacked and n not in set(hidden)} | infos

    def get(self, name: str) -> Tensor:
        """The tensor; a stack is made anew by every call."""
        parts = self._stacks.get(name)
        if parts is None:
            return super().get(name)
        tensors = [Checkpoint.get(self, part) for part in parts]
        return torch.stack([t.T for t in tensors] if name in self._turned else tensors)

    def slice(self, name: str) -> Any:
        """Lazy handle on a tensor or a stack."""
        return Lazy(self, name) if name in self._stacks else super().slice(name)

    def _info(self, name: str) -> TensorInfo:
        return self._stored[name] if name in self._stored else super()._info(name)


def _module(name: str) -> str:
    return name.rpartition(".")[0]

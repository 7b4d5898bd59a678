"""Where statistics and finished layers of a run go: the contract, and the one that keeps everything in memory.

The other is the workspace beside the output (checkpoint/workspace.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from moe_compress.calib.collect import MemoryStore, StatisticStore
from moe_compress.model.disk import Overlay


class Commits(Protocol):
    """Where one pass's finished layers go."""

    def plan(self) -> dict[str, Any] | None:
        """The saved plan, or None."""

    def save_plan(self, plan: dict[str, Any]) -> None:
        """Keep the plan."""

    def has(self, layer: int) -> bool:
        """Whether the layer is finished."""

    def commit(
        self, layer: int, tensors: dict[str, Tensor], description: dict[str, Any], report: dict[str, Any]
    ) -> None:
        """Keep a changed layer (OUTER: what lies outside): all of it or nothing. See Overlay."""

    def report(self, layer: int) -> dict[str, Any]:
        """What was reported of a finished layer."""

    def drop(self, layer: int) -> None:
        """The layer's tensors won't be read again."""


class Storage(Protocol):
    """Where statistics and commits go."""

    def statistics(self, model_state: str, data: str) -> StatisticStore:
        """The store for one state of the model and one set of data."""

    def pass_store(self, number: int, name: str) -> Commits:
        """The commits of a recipe's pass."""


class CommittedBlocks:
    """The overlay that a workspace's commits form: of each layer the newest."""

    def __init__(self, stores: Sequence[Overlay]):
        self._stores = list(stores)

    def get(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """See Overlay."""
        for store in reversed(self._stores):
            changed = store.get(layer)
            if changed is not None:
                return changed
        return None


@dataclass
class MemoryStorage:
    """Storage for a model in memory: changes are in the model itself, only plans and reports are kept."""

    stores: dict[tuple[str, str], MemoryStore] = field(default_factory=dict)
    passes: dict[int, MemoryCommits] = field(default_factory=dict)

    def statistics(self, model_state: str, data: str) -> StatisticStore:
        """See Storage."""
        return self.stores.setdefault((model_state, data), MemoryStore())

    def pass_store(self, number: int, name: str) -> MemoryCommits:
        """See Storage."""
        return self.passes.setdefault(number, MemoryCommits())


@dataclass
class MemoryCommits:
    """Commits of a pass on a model in memory. `planned`: layers are being changed, or were."""

    planned: bool = False
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)

    def plan(self) -> dict[str, Any] | None:
        """Plans are made anew."""
        return None

    def save_plan(self, plan: dict[str, Any]) -> None:
        """The outcome holds it."""
        self.planned = True

    def has(self, layer: int) -> bool:
        """Whether the layer was changed."""
        return layer in self.reports

    def commit(
        self, layer: int, tensors: dict[str, Tensor], description: dict[str, Any], report: dict[str, Any]
    ) -> None:
        """The model itself holds the tensors."""
        self.reports[layer] = report

    def report(self, layer: int) -> dict[str, Any]:
        """What the pass reported of a layer."""
        return self.reports[layer]

    def drop(self, layer: int) -> None:
        """Nothing is held."""

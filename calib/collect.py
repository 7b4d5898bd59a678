"""One sweep that measures everything that is asked for, and a store that never measures the same thing twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moe_compress.model import MoEModel
from moe_compress.model.shape import ModelShape
from moe_compress.model.sweep import Batch, Sweep
from moe_compress.progress import Progress

from .statistics import Result, Statistic


class StatisticStore(Protocol):
    """Where measured results wait: one per layer and statistic, for one state of the model and one set of data."""

    def get(self, layer: int, key: str) -> Result | None:
        """What was measured, or None."""

    def put(self, layer: int, key: str, result: Result) -> None:
        """Keep what was measured."""


@dataclass
class MemoryStore:
    """A store that forgets when the process ends."""

    results: dict[tuple[int, str], Result] = field(default_factory=dict)

    def get(self, layer: int, key: str) -> Result | None:
        """See StatisticStore."""
        return self.results.get((layer, key))

    def put(self, layer: int, key: str, result: Result) -> None:
        """See StatisticStore."""
        self.results[layer, key] = result


@dataclass(frozen=True)
class Profile:
    """What is known about a model before a pass decides.

    Attributes:
        shape: sizes of its layers.
        store: measured statistics.
        decoder_layers: number of decoder layers, dense ones included.
    """

    shape: ModelShape
    store: StatisticStore
    decoder_layers: int

    def of(self, layer: int, statistic: Statistic) -> Result:
        """What a statistic measured in a layer. Raises KeyError when it wasn't asked for."""
        result = self.store.get(layer, statistic.key)
        if result is None:
            raise KeyError(f"{statistic.key} was not collected for layer {layer}")
        return result


def collect(
    model: MoEModel,
    sweep: Sweep,
    statistics: Sequence[Statistic],
    store: StatisticStore,
    tokens: int,
    progress: Progress,
) -> None:
    """Measure what `store` lacks, layer by layer, in one sweep.

    Args:
        model: the model that `sweep` runs over.
        sweep: entered, at the first layer.
        statistics: what to measure; those with equal keys are measured once.
        store: results are put there as soon as a layer is done.
        tokens: tokens of the whole sweep.
        progress: told about every layer.
    """
    wanted = {statistic.key: statistic for statistic in statistics}
    for step in sweep:
        block = step.layer.block
        if block is not None:
            missing = {k: s for k, s in wanted.items() if store.get(step.index, k) is None}
            accumulators = {key: statistic.start(block, tokens) for key, statistic in missing.items()}

            def observe(tap, accumulators=accumulators):  # type: ignore[no-untyped-def]
                for accumulator in accumulators.values():
                    accumulator.update(tap)

            step.advance(observe if accumulators else None)
            for key, accumulator in accumulators.items():
                store.put(step.index, key, accumulator.result())
        else:
            step.advance()
        progress.layer(step.index)


def missing(
    model: MoEModel, statistics: Sequence[Statistic], store: StatisticStore
) -> list[Statistic]:
    """Those statistics that the store lacks for some layer."""
    return [s for s in statistics if any(store.get(i, s.key) is None for i in model.moe_layers)]


__all__ = ["Batch", "MemoryStore", "Profile", "StatisticStore", "collect", "missing"]

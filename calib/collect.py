"""One sweep that measures everything that is asked for, and a store that never measures the same thing twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from moe_compress.checkpoint.writer import all_finite
from moe_compress.errors import RunError, UnsupportedModelError
from moe_compress.model import MoEBlock, MoEModel, Tap
from moe_compress.model.backward import BackwardStep, GradientSweep
from moe_compress.model.beside import OUTER
from moe_compress.model.losses import Loss
from moe_compress.model.shape import ModelShape
from moe_compress.model.sweep import Step, Sweep
from moe_compress.progress import Progress

from .inputs import BlockInputs, KeepsInputs
from .statistics import LayerStatistic, Result, Statistic


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
    sweep: Sweep, statistics: Sequence[Statistic], store: StatisticStore, progress: Progress, loss: Loss | None = None
) -> None:
    """Measure what `store` lacks, layer by layer, in one sweep.

    Args:
        sweep: entered, at the first layer; a GradientSweep where statistics with gradients are among them.
        statistics: what to measure; those with equal keys are measured once.
        store: results are put there as soon as a layer is done.
        progress: told about every layer, on the way there and on the way back.
        loss: what gradients are of.
    """
    forward = {s.key: s for s in statistics if not s.gradients}
    backward = {s.key: s for s in statistics if s.gradients}
    if not backward:
        _collect(sweep.model, sweep, forward, store, progress)
    else:
        assert isinstance(sweep, GradientSweep)
        assert loss is not None
        _collect(sweep.model, sweep, forward, store, progress, to_the_end=True)
        _collect(sweep.model, sweep.backward(loss), backward, store, progress)
    for key, statistic in _lacking(sweep.model, OUTER, [*forward.values()], store).items():
        if isinstance(statistic, LayerStatistic):
            _put(sweep.model, store, OUTER, key, statistic.measure_outer(sweep.model, sweep))


def _collect(
    model: MoEModel,
    steps: Iterable[Step],
    wanted: dict[str, Statistic],
    store: StatisticStore,
    progress: Progress,
    to_the_end: bool = False,
) -> None:
    lacking = {
        i: own for i in (*range(len(model.layers)), OUTER) if (own := _lacking(model, i, [*wanted.values()], store))
    }
    for step in steps:
        own = lacking.pop(step.index, {})
        for key, statistic in own.items():
            if isinstance(statistic, LayerStatistic):
                _put(model, store, step.index, key, statistic.measure(model, step))
        blocks = {k: s for k, s in own.items() if not isinstance(s, LayerStatistic)}
        if blocks and step.layer.block is not None:
            _measure(model, step, step.layer.block, blocks, store)
        else:
            step.advance()
        progress.layer(step.index)
        if not lacking and not to_the_end:
            break  # what lies behind is measured already


def _lacking(
    model: MoEModel, layer: int, statistics: Sequence[Statistic], store: StatisticStore
) -> dict[str, Statistic]:
    """What the store lacks of a layer."""

    def measures(statistic: Statistic) -> bool:
        return layer in (statistic.layers(model) if isinstance(statistic, LayerStatistic) else model.moe_layers)

    return {s.key: s for s in statistics if measures(s) and store.get(layer, s.key) is None}


def _measure(
    model: MoEModel, step: Step, block: MoEBlock, lacking: dict[str, Statistic], store: StatisticStore
) -> None:
    accumulators = {key: statistic.start(block, step.tokens) for key, statistic in lacking.items()}
    inputs = BlockInputs()
    for accumulator in accumulators.values():
        if isinstance(accumulator, KeepsInputs):
            accumulator.inputs = inputs

    def observe(tap: Tap) -> None:
        for accumulator in accumulators.values():
            accumulator.update(tap)

    with ExitStack() as stack:
        if any(statistic.reads_attention for statistic in lacking.values()):
            stack.enter_context(_watched(step, block))
        if isinstance(step, BackwardStep):
            step.advance(observe, list(dict.fromkeys(n for s in lacking.values() for n in s.parameters(block))))
        else:
            step.advance(observe)
    with step.readable():
        for key, accumulator in accumulators.items():
            _put(model, store, step.index, key, accumulator.result())


@contextmanager
def _watched(step: Step, block: MoEBlock) -> Iterator[None]:
    """Let taps say what attention tokens receive.

    Raises UnsupportedModelError where the layer computes something else when it is watched: families may ask for the
    name of what they attend by.
    """
    plain = step.behind(0)
    with block.watching_attention() as attention:
        seen = step.behind(0)
        if plain is not None and seen is not None and float((seen - plain).norm()) > 1e-3 * float(plain.norm()):
            raise UnsupportedModelError(
                f"{attention.where} computes something else while its attention is watched: set `protect: norm`"
            )
        yield


def collect_from_weights(
    model: MoEModel, statistics: Sequence[Statistic], store: StatisticStore, progress: Progress
) -> None:
    """Measure what `store` lacks of statistics that don't read text, one layer after another; nothing runs."""
    for index in model.moe_layers:
        if lacking := [s for s in statistics if store.get(index, s.key) is None]:
            with model.layer(index) as layer, model.editing(layer):
                assert layer.block is not None
                for statistic in lacking:
                    _put(model, store, index, statistic.key, statistic.start(layer.block, 0).result())
        progress.layer(index)


def _put(model: MoEModel, store: StatisticStore, layer: int, key: str, result: Result) -> None:
    for name, value in result.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            where = f"layer {layer}" if layer != OUTER else "embeddings and head"
            last = layer if layer != OUTER else len(model.layers) - 1
            raise RunError(f"{where}: {key}.{name} is not finite: {_culprit(model, last)}")
    store.put(layer, key, result)


def _culprit(model: MoEModel, index: int) -> str:
    """Which weights are not numbers: of the layer, else of one before it, else of what lies around the layers."""
    if model.weights is not None:
        source, inside = model.source, {n for i in range(len(model.layers)) for n in model.weights.layer_names(i)}
        layers = [sorted(model.weights.layer_names(i)) for i in range(index, -1, -1)]
        for name in [*(n for names in layers for n in names), *sorted(source.tensors.keys() - inside)]:
            if not all_finite(source.get(name)):
                where = source.folder / source.tensors[name].file
                return f"tensor {name!r} in {where} holds values that are not numbers; copy or download the file again"
    return "the layer's weights, or what it reads, hold values that are not numbers"


def missing(model: MoEModel, statistics: Sequence[Statistic], store: StatisticStore) -> list[Statistic]:
    """Those statistics that the store lacks for some layer."""
    everywhere = (*range(len(model.layers)), OUTER)
    return [s for s in statistics if any(_lacking(model, i, [s], store) for i in everywhere)]

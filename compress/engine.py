"""Carrying out passes on a model, whether its layers come from a folder or are in memory.

For each pass: measure what its plan needs (one sweep), plan (all layers, nothing changed), then change layer by layer
and commit each. A pass that reads inputs sees, in every layer, what the layers before it hand on after their change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_compress.applying import Applying
from moe_compress.calib.collect import Profile, StatisticStore, collect, collect_from_weights, missing
from moe_compress.calib.statistics import Result
from moe_compress.calib.text import TokenBatches
from moe_compress.checkpoint.workspace import short_digest
from moe_compress.constants import GGUF
from moe_compress.errors import InputError, RunError
from moe_compress.model import MoEModel
from moe_compress.model.backward import GradientSweep
from moe_compress.model.beside import OUTER, Matrix
from moe_compress.model.losses import NextToken
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.model.sweep import Batch, Step, Sweep
from moe_compress.passes import Lesson, Pass, Plan
from moe_compress.progress import Monitor
from moe_compress.storage import Commits, Storage


@dataclass
class Calibrated:
    """Calibration text, ready to run.

    Attributes:
        text: token batches and their account; None where no pass needs any.
        batch_size: sequences of one forward.
        hold: folder for hidden states, or None for memory.
        hold_all: the same for sweeps that go back, which hold those of every layer.
    """

    text: TokenBatches | None
    batch_size: int = 8
    hold: Path | None = None
    hold_all: Path | None = None

    @property
    def digest(self) -> str:
        """Identifies the data."""
        return self.text.digest if self.text is not None else ""

    @property
    def tokens(self) -> int:
        """Tokens of a sweep."""
        return self.text.tokens if self.text is not None else 0

    def of(self, domains: Sequence[str] | None) -> Calibrated:
        """The sequences with one of these tags alone; all for None."""
        if self.text is None or domains is None:
            return self
        return replace(self, text=self.text.chosen([i for i, tag in enumerate(self.text.domain) if tag in domains]))

    def batches(self) -> list[Batch]:
        """Arguments of each forward."""
        if self.text is None:
            raise RunError("a pass needs calibration text, and the recipe names none")
        return self.text.forwards(self.batch_size)


@dataclass
class Outcome:
    """What one pass did.

    Attributes:
        name, options: of the pass.
        plan: what it decided.
        reports: decoder layer, or OUTER → what was done.
        shape: of the model afterwards.
    """

    name: str
    options: dict[str, Any]
    plan: Plan
    shape: ModelShape
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What passes work on and with.

    Attributes:
        model: changed in place; its overlay shows what `storage` holds.
        calibrated: calibration text.
        storage: statistics and commits; what it already holds is not done again.
        monitor: stages.
        opens_original: opens the original once more, for passes that learn from it. None: there is none.
    """

    model: MoEModel
    calibrated: Calibrated
    storage: Storage
    monitor: Monitor
    opens_original: Callable[[], MoEModel] | None = None

    def original(self, step: Pass) -> MoEModel:
        """The original, opened for a pass. Raises InputError where there is none."""
        if self.opens_original is None:
            raise InputError(f"{step.name} learns from the original, and that is missing")
        return self.opens_original()


def run_passes(work: Work, passes: Sequence[Pass], before: ModelShape, fingerprint: str) -> list[Outcome]:
    """Carry out passes in order.

    Args:
        work: what they work on and with.
        passes: checked against the shapes already (feasibility).
        before: the model's shape before the first.
        fingerprint: identifies the model before the first.
    """
    model, outcomes, state, shapes = work.model, list[Outcome](), fingerprint, [before]
    for number, step in enumerate(passes):
        shape, step.start = shapes[-1], shapes[number - step.round]
        commits = work.storage.pass_store(number, step.name)
        own = replace(work, calibrated=work.calibrated.of(step.domains()))
        if step.learns() and not all(commits.has(i) for i in model.moe_layers):
            step.learned = _learned(own, step, shape, slots_after(outcomes, before), state)
        plan = _plan(own, step, shape, commits, state, work.calibrated)
        concerned = sorted({*model.moe_layers, *plan.beside})
        if unfinished := [i for i in concerned if not commits.has(i)]:
            earlier = [work.storage.pass_store(n, p.name) for n, p in enumerate(passes[:number])]
            _apply(own, step, Applying(model, step, plan, commits, earlier), unfinished)
        reports = {i: commits.report(i) for i in concerned}
        shapes.append(step.settle(_shape_after(shape, reports)))
        options = step.options.model_dump(mode="json")
        outcomes.append(Outcome(step.name, options, plan, shapes[-1], reports))
        state = short_digest([state, step.name, options, plan.to_json(), work.calibrated.digest])
    return outcomes


def slots_after(outcomes: Sequence[Outcome], before: ModelShape) -> dict[int, list[int]]:
    """Layer → where each expert that the layer had before all passes is now, −1 if it is gone."""
    slots = {index: list(range(layer.num_experts)) for index, layer in before.layers.items()}
    for outcome in outcomes:
        for index, own in slots.items():
            moved = outcome.reports[index].get("slots")
            if moved is not None:
                slots[index] = [moved[slot] if slot >= 0 else -1 for slot in own]
    return slots


def _learned(work: Work, step: Pass, shape: ModelShape, slots: dict[int, list[int]], state: str) -> dict[int, Result]:
    """What a pass learns, kept beside the statistics of the model that it learns on."""
    model, calibrated = work.model, work.calibrated
    if calibrated.text is None:
        raise InputError(f"{step.name} learns on calibration text, and that is missing")
    store = work.storage.statistics(state, calibrated.digest)
    key = f"{step.name}({json.dumps(step.options.model_dump(mode='json'), sort_keys=True)})"
    kept = {i: result for i in model.moe_layers if (result := store.get(i, key)) is not None}
    if len(kept) == len(model.moe_layers):
        return kept
    with work.monitor.stage(f"{step.name}: learn") as progress:
        found = step.learn(
            Lesson(
                model=model,
                source=work.original(step) if step.needs_original() else model,
                shape=shape,
                text=calibrated.text,
                batch_size=calibrated.batch_size,
                slots=slots,
                hold=calibrated.hold,
                hold_all=calibrated.hold_all,
                progress=progress,
            )
        )
    for index, result in found.items():
        store.put(index, key, result)
    return found


def _plan(work: Work, step: Pass, shape: ModelShape, commits: Commits, state: str, whole: Calibrated) -> Plan:
    """The saved plan, or a new one from what is measured now. `whole`: of which the pass may see some sequences."""
    store = work.storage.statistics(state, work.calibrated.digest)
    step.profile = Profile(shape, store, len(work.model.layers))
    saved = commits.plan()
    if saved is not None:
        return Plan.from_json(saved)
    _measure(work, step, store)
    with work.monitor.stage(f"{step.name}: plan"):
        plan = step.plan(step.profile)
    if undecided := sorted(shape.layers.keys() - plan.layers.keys()):
        raise RunError(f"{step.name}: `plan` decides nothing for layers {undecided}, which have experts")
    notes = [*plan.notes, *_said_of_text(step, work.calibrated, whole), *_left_behind(work.model, shape, step)]
    values = replace(plan, notes=notes).to_json()
    try:
        as_resumed = json.loads(json.dumps(values))  # keys of decisions are text
    except (TypeError, ValueError) as error:
        raise RunError(f"{step.name}: `plan` isn't plain data: {error}") from error
    commits.save_plan(values)
    return Plan.from_json(as_resumed)


def _measure(work: Work, step: Pass, store: StatisticStore) -> None:
    """Put what a pass's plan reads and the store lacks into it: first what weights alone tell, then one sweep."""
    model, lacking = work.model, missing(work.model, step.statistics(), store)
    if blind := [statistic for statistic in lacking if not statistic.reads_text]:
        with work.monitor.stage(f"{step.name}: look at weights", len(model.layers)) as progress:
            collect_from_weights(model, blind, store, progress)
    lacking = [statistic for statistic in lacking if statistic.reads_text]
    if not lacking:
        return
    back = any(statistic.gradients for statistic in lacking)
    batches = work.calibrated.batches()
    with (
        work.monitor.stage(f"{step.name}: measure", len(model.layers) * (1 + back)) as progress,
        GradientSweep(model, batches, work.calibrated.hold_all)
        if back
        else Sweep(model, batches, work.calibrated.hold) as sweep,
    ):
        collect(sweep, lacking, store, progress, NextToken(batches))


def _apply(work: Work, step: Pass, applying: Applying, unfinished: list[int]) -> None:
    """Change what isn't finished, layer by layer."""
    with work.monitor.stage(f"{step.name}: apply", len(work.model.layers)) as progress:
        layers = [index for index in unfinished if index != OUTER]
        if len(layers) < len(unfinished):
            applying.outside()
        if step.needs_inputs() and layers:
            with _side_by_side(work, step) as pairs:
                for at, other in pairs:
                    applying.with_inputs(at, other)
                    progress.layer(at.index)
        else:
            for index in layers:
                applying.alone(index)
                progress.layer(index)


@contextmanager
def _side_by_side(work: Work, step: Pass) -> Iterator[Iterable[tuple[Step, Step | None]]]:
    """One step per layer of a sweep of the model, and of one of the original beside it where the pass asks for it."""
    batches, hold = work.calibrated.batches(), work.calibrated.hold
    with ExitStack() as stack:
        own = stack.enter_context(Sweep(work.model, batches, hold))
        if step.beside_original() is None:
            yield ((at, None) for at in own)
            return
        if hold is not None:
            hold = hold / "original"
            hold.mkdir(exist_ok=True)
        yield zip(own, stack.enter_context(Sweep(work.original(step), batches, hold)), strict=True)


def _said_of_text(step: Pass, own: Calibrated, whole: Calibrated) -> list[str]:
    """Notes where not all of the calibration text, or not its weights, reach a pass."""
    if own.text is None or whole.text is None:
        return []
    notes = []
    unweighed = sorted({s.name for s in step.statistics() if not s.weighs_tokens})
    if unweighed and own.text.modality_weights is not None:
        notes.append(f"modality_weights don't reach {', '.join(unweighed)}")
    if own is not whole:
        which = ", ".join(step.domains() or ())
        notes.append(f"measured on {len(own.text)} of {len(whole.text)} calibration sequences: {which}")
    return notes


def _left_behind(model: MoEModel, shape: ModelShape, step: Pass) -> list[str]:
    """A note where a draft layer is carried over with experts that config.json's numbers will no longer fit."""
    unowned = model.weights.unowned if model.weights is not None else []
    if step.round or step.target.quantized_format == GGUF or not any(".experts." in name for name in unowned):
        return []
    then = step.forecast(shape).layers
    fewer = any(layer.num_experts != then[i].num_experts for i, layer in shape.layers.items())
    narrower = any(layer.intermediate != then[i].intermediate for i, layer in shape.layers.items())
    if narrower and isinstance(model.narrowed({i: layer.intermediate for i, layer in then.items()}), str):
        narrower = False  # config.json keeps the width
    if not fewer and not narrower:
        return []
    return [
        f"{len(unowned)} tensors that aren't the model's own ({unowned[0]}, …) stay as they are: config.json's numbers "
        "no longer fit the experts of that draft layer, so serve the result without speculative decoding by it"
    ]


def _shape_after(shape: ModelShape, reports: dict[int, dict[str, Any]]) -> ModelShape:
    """Sizes with what reports (decoder layer, or OUTER → report) say of blocks and of what was packed beside them."""
    packed = {i: _packed(shape.matrices[i], done) for i, report in reports.items() if (done := report.get("beside"))}
    shape = shape.with_matrices(packed).with_layers({i: _changed(s, reports[i]) for i, s in shape.layers.items()})
    change = sum(report.get("other_bytes_change", 0) for report in reports.values())
    return replace(shape, other_bytes=shape.other_bytes + change)


def _packed(matrices: list[Matrix], done: dict[str, dict[str, Any]]) -> list[Matrix]:
    return [
        replace(m, bytes=done[m.path]["bytes"], bits=done[m.path]["bits"]) if m.path in done else m for m in matrices
    ]


def _changed(layer: LayerShape, report: dict[str, Any]) -> LayerShape:
    return replace(
        layer.with_width(report.get("neurons", layer.intermediate)),
        num_experts=report["num_experts"],
        kind=report["kind"],
        bytes=report["expert_bytes"],
        neurons=report.get("all_neurons", 0),
        rules=tuple(report.get("rules", ())),
    )

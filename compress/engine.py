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
from moe_compress.calib.collect import Profile, collect, collect_from_weights, missing
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


def run_passes(
    model: MoEModel,
    passes: Sequence[Pass],
    shape: ModelShape,
    calibrated: Calibrated,
    storage: Storage,
    fingerprint: str,
    monitor: Monitor,
    source: Callable[[], MoEModel] | None = None,
) -> list[Outcome]:
    """Carry out passes in order; what `storage` already holds is not done again.

    Args:
        model: the model; its overlay shows what `storage` holds.
        passes: checked against the shapes already (feasibility).
        shape: of the model before.
        calibrated: calibration text.
        storage: statistics and commits.
        fingerprint: identifies the model before.
        monitor: stages.
        source: opens the original once more, for passes that learn from it.
    """
    outcomes: list[Outcome] = []
    state, before, shapes = fingerprint, shape, [shape]
    for number, step in enumerate(passes):
        step.start = shapes[number - step.round]
        commits = storage.pass_store(number, step.name)
        own = calibrated.of(step.domains())
        if step.learns() and not all(commits.has(i) for i in model.moe_layers):
            slots = slots_after(outcomes, before)
            step.learned = _learned(model, step, source, shape, slots, own, storage, state, monitor)
        plan = _plan(model, step, shape, calibrated, storage, commits, state, monitor)
        concerned = sorted({*model.moe_layers, *plan.beside})
        unfinished = [i for i in concerned if not commits.has(i)]
        if unfinished:
            with monitor.stage(f"{step.name}: apply", len(model.layers)) as progress:
                earlier = [storage.pass_store(n, p.name) for n, p in enumerate(passes[:number])]
                applying = Applying(model, step, plan, commits, earlier)
                if OUTER in unfinished:
                    applying.outside()
                    unfinished.remove(OUTER)
                if step.needs_inputs() and unfinished:
                    with _side_by_side(model, step, source, own) as pairs:
                        for at, other in pairs:
                            applying.with_inputs(at, other)
                            progress.layer(at.index)
                else:
                    for index in unfinished:
                        applying.alone(index)
                        progress.layer(index)
        reports = {i: commits.report(i) for i in concerned}
        shape = step.settle(_shape_after(shape, reports))
        options = step.options.model_dump(mode="json")
        outcomes.append(Outcome(step.name, options, plan, shape, reports))
        shapes.append(shape)
        state = short_digest([state, step.name, options, plan.to_json(), calibrated.digest])
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


def _learned(
    model: MoEModel,
    step: Pass,
    source: Callable[[], MoEModel] | None,
    shape: ModelShape,
    slots: dict[int, list[int]],
    calibrated: Calibrated,
    storage: Storage,
    state: str,
    monitor: Monitor,
) -> dict[int, Result]:
    """What a pass learns, kept beside the statistics of the model that it learns on."""
    if calibrated.text is None:
        raise InputError(f"{step.name} learns on calibration text, and that is missing")
    store = storage.statistics(state, calibrated.digest)
    key = f"{step.name}({json.dumps(step.options.model_dump(mode='json'), sort_keys=True)})"
    kept = {i: result for i in model.moe_layers if (result := store.get(i, key)) is not None}
    if len(kept) == len(model.moe_layers):
        return kept
    with monitor.stage(f"{step.name}: learn") as progress:
        found = step.learn(
            Lesson(
                model=model,
                source=_original(step, source) if step.needs_original() else model,
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


def _original(step: Pass, source: Callable[[], MoEModel] | None) -> MoEModel:
    if source is None:
        raise InputError(f"{step.name} learns from the original, and that is missing")
    return source()


@contextmanager
def _side_by_side(
    model: MoEModel, step: Pass, source: Callable[[], MoEModel] | None, calibrated: Calibrated
) -> Iterator[Iterable[tuple[Step, Step | None]]]:
    """One step per layer of a sweep of the model, and of one of the original beside it where the pass asks for it."""
    batches, hold = calibrated.batches(), calibrated.hold
    with ExitStack() as stack:
        own = stack.enter_context(Sweep(model, batches, hold))
        if step.beside_original() is None:
            yield ((at, None) for at in own)
            return
        if hold is not None:
            hold = hold / "original"
            hold.mkdir(exist_ok=True)
        yield zip(own, stack.enter_context(Sweep(_original(step, source), batches, hold)), strict=True)


def _plan(
    model: MoEModel,
    step: Pass,
    shape: ModelShape,
    calibrated: Calibrated,
    storage: Storage,
    commits: Commits,
    state: str,
    monitor: Monitor,
) -> Plan:
    whole, calibrated = calibrated, calibrated.of(step.domains())
    store = storage.statistics(state, calibrated.digest)
    step.profile = Profile(shape, store, len(model.layers))
    saved = commits.plan()
    if saved is not None:
        return Plan.from_json(saved)
    lacking = missing(model, step.statistics(), store)
    if blind := [statistic for statistic in lacking if not statistic.reads_text]:
        with monitor.stage(f"{step.name}: look at weights", len(model.layers)) as progress:
            collect_from_weights(model, blind, store, progress)
    lacking = [statistic for statistic in lacking if statistic.reads_text]
    if lacking:
        back = any(statistic.gradients for statistic in lacking)
        batches = calibrated.batches()
        with (
            monitor.stage(f"{step.name}: measure", len(model.layers) * (1 + back)) as progress,
            GradientSweep(model, batches, calibrated.hold_all)
            if back
            else Sweep(model, batches, calibrated.hold) as sweep,
        ):
            collect(sweep, lacking, store, progress, NextToken(batches))
    with monitor.stage(f"{step.name}: plan"):
        plan = step.plan(step.profile)
    if undecided := sorted(shape.layers.keys() - plan.layers.keys()):
        raise RunError(f"{step.name}: `plan` decides nothing for layers {undecided}, which have experts")
    unweighed = sorted({s.name for s in step.statistics() if not s.weighs_tokens})
    if unweighed and calibrated.text is not None and calibrated.text.modality_weights is not None:
        plan = replace(plan, notes=[*plan.notes, f"modality_weights don't reach {', '.join(unweighed)}"])
    if calibrated is not whole and calibrated.text is not None and whole.text is not None:
        which = ", ".join(step.domains() or ())
        note = f"measured on {len(calibrated.text)} of {len(whole.text)} calibration sequences: {which}"
        plan = replace(plan, notes=[*plan.notes, note])
    plan = replace(plan, notes=[*plan.notes, *_left_behind(model, shape, step)])
    values = plan.to_json()
    commits.save_plan(values)
    return Plan.from_json(json.loads(json.dumps(values)))  # as a resumed run reads it: keys of decisions are text


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

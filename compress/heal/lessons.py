"""How routers are taught by the original: layer by layer in one sweep, or all together by backward sweeps.

Letters: T tokens, H hidden, C classes that a router scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_compress.calib.batches import TokenBatches
from moe_compress.calib.routing import RoutingLog, carried, chances, router_divergence, routing_drift
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import Layer, MoEBlock, MoEModel, Tap
from moe_compress.model.backward import GradientSweep, differentiable, run_differentiably
from moe_compress.model.losses import Divergence
from moe_compress.model.sweep import Batch, Step, Sweep
from moe_compress.model.tap import hidden_behind
from moe_compress.passes import Lesson

if TYPE_CHECKING:
    from .router import RouterOptions


@dataclass(frozen=True)
class Judged:
    """How a model does on held-out text: mean KL(original ‖ model) of the next token, nats; routing_drift per layer."""

    kl: float
    routing: dict[int, dict[str, float]]


class Routers:
    """Values of all routers' parameters, to be put into layers as they come to life.

    Attributes:
        values: layer → name relative to the layer → value, as it will be stored.
    """

    def __init__(self, model: MoEModel):
        self.model = model
        self.values: dict[int, dict[str, Tensor]] = {}
        self._first: dict[int, dict[str, Tensor]] = {}

    def put(self, layer: Layer) -> None:
        """Into a live layer; remembers what was there at first."""
        if layer.block is None:
            return
        with self.model.editing(layer) as block:
            assert block is not None
            own = parameters(block)
            if layer.index not in self._first:
                self._first[layer.index] = self.rounded(layer.index, {n: p.detach() for n, p in own.items()})
                self.values[layer.index] = self._first[layer.index]
            # Copies: live parameters are trained in place.
            values = self.values[layer.index].items()
            block.assign({n: v.to(own[n].device, own[n].dtype, copy=True) for n, v in values})

    def rounded(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU, in the dtypes in which the layer is stored."""
        stored = self.model.stored_dtypes(index)
        return {n: t.detach().to("cpu", stored.get(n, t.dtype), copy=True) for n, t in tensors.items()}

    def reset(self) -> None:
        """Back to what was there at first."""
        self.values = dict(self._first)

    def restore(self) -> None:
        """A model in memory gets back what it had (in a folder nothing has changed)."""
        if self.model.weights is None:
            values, self.values = self.values, dict(self._first)
            for index in self._first:
                with self.model.layer(index) as layer:
                    self.put(layer)
            self.values = values


def parameters(block: MoEBlock) -> dict[str, nn.Parameter]:
    """What of a block is trained: its router's parameters, named relative to the layer."""
    inside = block.router_path + "."
    return {n: p for n, p in block.module.named_parameters() if n.startswith(inside) and p.is_floating_point()}


@contextmanager
def both(lesson: Lesson, inputs: Sequence[Batch], back: bool = False) -> Iterator[tuple[Any, Sweep]]:
    """Sweeps of the model and of the original over the same text."""
    hold = lesson.hold_all if back else lesson.hold
    kind = GradientSweep if back else Sweep
    with (
        kind(lesson.model, inputs, _folder(hold, "model")) as own,
        Sweep(lesson.source, inputs, _folder(lesson.hold, "original")) as theirs,
    ):
        yield own, theirs


def judge(lesson: Lesson, text: TokenBatches, routers: Routers) -> Judged:
    """The model with these routers beside the original."""
    inputs = text.forwards(lesson.batch_size)
    logs = [RoutingLog(text.tokens) for _ in range(2)]
    with both(lesson, inputs) as (own, theirs):
        for step in theirs:
            step.advance(logs[0].observe)
            lesson.progress.layer(step.index)
        for step in own:
            routers.put(step.layer)
            step.advance(logs[1].observe)
            lesson.progress.layer(step.index)
        loss = Divergence(inputs, theirs.outputs())
        kl = sum(loss(number, logits)[0] for number, logits in own.outputs())
    return Judged(kl, routing_drift(logs[0], logs[1], lesson.slots))


# --- layer by layer --------------------------------------------------------------------------------------------------


def teach_layers(
    lesson: Lesson, taught: TokenBatches, held: TokenBatches, routers: Routers, options: RouterOptions
) -> dict[int, tuple[float, float]]:
    """One sweep of the model and one of the original beside it; each router is trained where both wait.

    Later layers see what the healed ones before them hand on. Two layers are in memory.

    Returns:
        Layer → objective on the held-out sequences before and after.
    """
    inputs = taught.forwards(lesson.batch_size)
    lessons = len(inputs)
    found: dict[int, tuple[float, float]] = {}
    with both(lesson, inputs + held.forwards(lesson.batch_size)) as (own, theirs):
        for step, other in zip(own, theirs, strict=True):
            routers.put(step.layer)
            if step.layer.block is not None:
                taps: list[Tap] = []
                other.advance(taps.append)
                targets = [_target(tap, lesson.slots[step.index], options.objective) for tap in taps]
                del taps
                found[step.index] = _teach(step, targets, lessons, routers, options)
                routers.put(step.layer)
            step.advance()
            lesson.progress.layer(step.index)
    return found


def _target(tap: Tap, slots: Sequence[int], objective: str) -> Tensor:
    """What the original says of one batch."""
    if objective == "hidden":
        if tap.behind_TH is None:
            raise UnsupportedModelError(
                f"layer {tap.layer} returns no hidden state per token: set `objective: routing` in heal.router"
            )
        return tap.behind_TH
    if tap.logits_TE is None:
        raise UnsupportedModelError(
            f"layer {tap.layer}: its router returns no logits: set `objective: hidden` in heal.router"
        )
    found = chances(tap)
    return carried(found, slots, found.shape[1] - len(slots) + max(slots) + 1)


def _loss(step: Step, number: int, target: Tensor, objective: str) -> Tensor:
    """How far one batch is from its target, mean over tokens: of the hidden state relative to it, or KL of routing."""
    run = run_differentiably(step, number, through=False)
    if objective == "hidden":
        hidden = hidden_behind(run.output, len(target))
        assert hidden is not None, "the original's layer returns what this one doesn't"
        change = (hidden - target.to(hidden)).float().square().sum(-1)
        return (change / target.float().square().sum(-1).clamp_min(1e-30).to(change.device)).mean()
    ((tap, _),) = run.caught
    assert tap.logits_TE is not None, "the original's router returns what this one doesn't"
    found = chances(tap)
    return router_divergence(target.to(found), found).mean()


def _teach(
    step: Step, targets: Sequence[Tensor], lessons: int, routers: Routers, options: RouterOptions
) -> tuple[float, float]:
    """Train one live layer's router on the first `lessons` batches; the best by the others stays."""
    index = step.index
    order = torch.Generator().manual_seed(options.seed)

    def judged() -> float:
        with torch.no_grad():
            losses = [_loss(step, n, targets[n], options.objective) for n in range(lessons, len(targets))]
        return float(torch.stack(losses).double().mean())

    assert step.layer.block is not None
    with differentiable(step, list(parameters(step.layer.block))) as live:
        student = _Student(live, options)
        first = best = judged()
        for _ in range(options.epochs):
            for number in torch.randperm(lessons, generator=order).tolist():
                with torch.enable_grad():
                    loss = _loss(step, number, targets[number], options.objective)
                student.step(torch.autograd.grad(loss, list(live.values()), allow_unused=True))
                student.show(live)
            values = routers.rounded(index, student.values())
            _show(values, live)
            now = judged()
            if now < best:
                best, routers.values[index] = now, values
            student.show(live)
    return first, best


# --- all together ----------------------------------------------------------------------------------------------------


def teach_model(
    lesson: Lesson, taught: TokenBatches, held: TokenBatches, routers: Routers, options: RouterOptions, first: float
) -> None:
    """Steps of AdamW on all routers at once; the gradient of each is one sweep forth and back, beside the original's.

    After every epoch the held-out text is judged; the best routers stay.
    """
    order = torch.Generator().manual_seed(options.seed)
    best, kept = first, dict(routers.values)
    students: dict[int, _Student] = {}
    for _ in range(options.epochs):
        for rows in torch.randperm(len(taught), generator=order).split(options.sequences_per_step):
            inputs = taught.chosen(sorted(rows.tolist())).forwards(lesson.batch_size)
            with both(lesson, inputs, back=True) as (own, theirs):
                for step in theirs:
                    step.advance()
                    lesson.progress.layer(step.index)
                for step in own:
                    routers.put(step.layer)
                    step.advance()
                    lesson.progress.layer(step.index)
                for step in own.backward(Divergence(inputs, theirs.outputs(), options.temperature)):
                    routers.put(step.layer)
                    if step.layer.block is not None:
                        live = parameters(step.layer.block)
                        students.setdefault(step.index, _Student(routers.values[step.index], options))
                        step.advance(None, list(live))
                        students[step.index].step([step.gradients[n] for n in live])
                    lesson.progress.layer(step.index)
            for index, student in students.items():
                routers.values[index] = routers.rounded(index, student.values())
        now = judge(lesson, held, routers).kl
        if now < best:
            best, kept = now, dict(routers.values)
    routers.values = kept


class _Student:
    """One router's parameters in float32, and AdamW on them. The step is relative to the size of the parameters, so
    that one rate suits routers of any scale."""

    def __init__(self, values: Mapping[str, Tensor], options: RouterOptions):
        self._masters = {n: v.detach().to("cpu", torch.float32, copy=True) for n, v in values.items()}
        total = sum(v.double().square().sum() for v in self._masters.values())
        size = float(total / max(1, sum(v.numel() for v in self._masters.values()))) ** 0.5
        self._optimizer = torch.optim.AdamW(
            list(self._masters.values()), lr=options.rate * size, weight_decay=options.weight_decay, foreach=False
        )

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """One step along gradients in the order of the parameters."""
        for master, gradient in zip(self._masters.values(), gradients, strict=True):
            master.grad = None if gradient is None else gradient.to("cpu", torch.float32)
        self._optimizer.step()

    def values(self) -> dict[str, Tensor]:
        """The parameters as they are now."""
        return dict(self._masters)

    def show(self, live: Mapping[str, nn.Parameter]) -> None:
        """Write them into live parameters."""
        _show(self._masters, live)


def _show(values: Mapping[str, Tensor], live: Mapping[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)


def _folder(hold: Path | None, name: str) -> Path | None:
    if hold is None:
        return None
    (hold / name).mkdir(exist_ok=True)
    return hold / name

"""How much a model loses when layers lose experts, found by running it that way.

Contract: the model is as it was afterwards. A loss is KL(the model before ‖ with fewer experts) of the next token, mean
in nats over the text, with the routers' own choice among what is left. Each is two sweeps: one layer in memory, and all
of a folder's layers read twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from moe_compress.calib.batches import TokenBatches
from moe_compress.model import Layer, MoEModel
from moe_compress.model.losses import Divergence
from moe_compress.model.sweep import Sweep
from moe_compress.passes import Lesson

# Numbers of experts, besides all of them, that are tried in each layer at most.
TRIED = 6


@contextmanager
def reduced(model: MoEModel, layer: Layer, keep: Sequence[int]) -> Iterator[None]:
    """Within the context a live layer has only these experts."""
    with model.editing(layer):
        assert layer.block is not None
        tensors, description = layer.block.state()
        layer.block.keep(list(keep))
    try:
        yield
    finally:
        with model.editing(layer):
            layer.block.restructure(description)
            layer.block.assign(tensors)


def loss_of(lesson: Lesson, text: TokenBatches, keep: Mapping[int, Sequence[int]]) -> float:
    """What the model loses on `text` when layers keep only these experts (layer → experts)."""
    inputs = text.forwards(lesson.batch_size)
    model = lesson.model
    with (
        Sweep(model, inputs, _folder(lesson.hold, "before")) as before,
        Sweep(model, inputs, _folder(lesson.hold, "after")) as after,
    ):
        for step in before:
            step.advance()
            lesson.progress.layer(step.index)
        for step in after:
            own = keep.get(step.index)
            if own is not None and step.layer.block is not None and len(own) < step.layer.block.num_experts:
                with reduced(model, step.layer, own):
                    step.advance()
            step.advance()
            lesson.progress.layer(step.index)
        loss = Divergence(inputs, before.outputs())
        return sum(loss(number, logits)[0] for number, logits in after.outputs())


def measured_costs(
    lesson: Lesson,
    text: TokenBatches,
    orders: Mapping[int, Sequence[int]],
    floors: Mapping[int, int],
    steps: Mapping[int, int],
) -> dict[int, dict[int, float]]:
    """Layer → experts kept → loss when that layer alone keeps so many, for up to TRIED numbers and for all (0).

    Args:
        lesson: the model.
        text: to measure on.
        orders: layer → its experts, the first to go in front.
        floors: layer → the least that it may keep.
        steps: layer → experts that go at a time.
    """
    found: dict[int, dict[int, float]] = {}
    for index, order in orders.items():
        numbers = list(range(floors[index], len(order), steps[index]))
        tried = {numbers[round(i * (len(numbers) - 1) / max(1, TRIED - 1))] for i in range(TRIED)} if numbers else set()
        found[index] = {len(order): 0.0}
        for count in sorted(tried):
            found[index][count] = loss_of(lesson, text, {index: sorted(order[len(order) - count :])})
    return found


def _folder(hold: Path | None, name: str) -> Path | None:
    if hold is None:
        return None
    (hold / name).mkdir(exist_ok=True)
    return hold / name

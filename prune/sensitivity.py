"""How much a model loses when layers lose experts, found by running it that way.

Contract: the model is as it was afterwards. A loss is KL(the model before ‖ with fewer experts) of the next token, mean
in nats over the text, with the routers' own choice among what is left. Each is two sweeps: one layer in memory, and all
of a folder's layers read twice. Where what is left is solved again, as in a plan that is judged by what it will give,
the second sweep also takes the text that it is solved on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from moe_compress.calib.batches import TokenBatches
from moe_compress.calib.inputs import BlockInputs
from moe_compress.model import Layer, MoEBlock, MoEModel
from moe_compress.model.losses import Divergence
from moe_compress.model.sweep import Sweep
from moe_compress.passes import Lesson

# Numbers of experts, besides all of them, that are tried in each layer at most.
TRIED = 6

# Takes all experts but these out of a block; what it reads, where that is known.
TakeOut = Callable[[MoEBlock, Sequence[int], BlockInputs | None], object]


def just_keep(block: MoEBlock, keep: Sequence[int], inputs: BlockInputs | None = None) -> None:
    """Remove all experts but these, and do nothing else."""
    block.keep(list(keep))


@contextmanager
def changed(model: MoEModel, layer: Layer, change: Callable[[MoEBlock], object]) -> Iterator[None]:
    """Within the context a live layer's block is changed, its weights rounded as they would be stored."""
    with model.editing(layer):
        block = layer.block
        assert block is not None
        module = block.experts_module
        held = dict(module.named_parameters(recurse=False))
        tensors, description = block.state()
        change(block)
        model.round_block(layer)
    try:
        yield
    finally:
        with model.editing(layer):
            if block.kind != description["kind"]:  # what took the module's place has taken its weights away
                for name, parameter in held.items():
                    module.register_parameter(name, parameter)
                block.replace_experts(module)
            block.restructure(description)
            block.assign(tensors)


def loss_of(
    lesson: Lesson,
    text: TokenBatches,
    keep: Mapping[int, Sequence[int]],
    take_out: TakeOut = just_keep,
    reads: TokenBatches | None = None,
) -> float:
    """What the model loses on `text` when layers keep only these experts (layer → experts).

    Args:
        lesson: the model.
        text: to measure on.
        keep: layer → experts that stay.
        take_out: how the others go. It may not change tensors in place.
        reads: what `take_out` is shown as a block's inputs, behind the layers before it as they are changed; None: it
            needs none.
    """
    inputs = text.forwards(lesson.batch_size)
    model, more = lesson.model, reads.forwards(lesson.batch_size) if reads is not None else []
    with (
        Sweep(model, inputs, _folder(lesson.hold, "before")) as before,
        Sweep(model, [*inputs, *more], _folder(lesson.hold, "after")) as after,
    ):
        for step in before:
            step.advance()
            lesson.progress.layer(step.index)
        for step in after:
            own = keep.get(step.index)
            if own is not None and step.layer.block is not None and len(own) < step.layer.block.num_experts:
                seen = BlockInputs() if more else None
                if seen is not None:
                    step.run(seen.observe, range(len(inputs), len(inputs) + len(more)), inputs_only=True)
                    seen.stored = model.stored_dtypes(step.index)
                with changed(model, step.layer, lambda block: take_out(block, own, seen)):  # noqa: B023
                    step.advance()
            step.advance()
            lesson.progress.layer(step.index)
        loss = Divergence(inputs, before.outputs())
        judged = itertools.islice(after.outputs(), len(inputs))
        return sum(loss(number, logits)[0] for number, logits in judged)


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

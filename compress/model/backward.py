"""Gradients with one decoder layer in memory: a forward sweep that keeps what every layer read, and the way back.

Forward, the model's own calls run with autograd on, and each layer hands them its output as a leaf. So what a family
does between its layers, before the first and behind the last is recorded as it happened, and the layers are not.
Backward, from the last layer to the first: the layer is brought to life and recomputed from what it read, the gradient
at its output becomes the gradient at its input, and the recording carries that to the layers before. Together this is
plain autograd on the whole model, whatever passes from layer to layer as arguments and results.

What passes otherwise is refused by name: containers that layers write for later ones (shared keys and values).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_compress.errors import RunError, UnsupportedModelError

from . import offload
from .losses import Loss
from .model import Layer
from .sweep import Step, Sweep
from .tap import GradientTap, Tap, observe
from .tensors import map_tensors

# How far a recomputed layer may be from what it first returned, relative to its norm. A token near a tie may be routed
# elsewhere where kernels with and without autograd differ; a layer that was given something else is far beyond.
_TOLERANCE = {torch.float64: 1e-2, torch.float32: 1e-2}
_TOLERANCE_16 = 1e-1


class _Passed(NamedTuple):
    """One batch at one layer: what the layer read, with the recording behind it, and the leaves that it returned."""

    arguments: Any
    leaves: Any


class GradientSweep(Sweep):
    """A sweep that can go back: iterate to the end as in a Sweep, then iterate `backward(loss)`.

    Holds what every layer read, so one set of hidden states per layer (in files, with `hold`), and up to two sets of
    gradients.

    Attributes:
        loss: its value, once `backward` has begun.
    """

    _recording = True
    loss: float = math.nan

    def __enter__(self) -> GradientSweep:
        self._tape: list[dict[int, _Passed]] = [{} for _ in self._calls]
        super().__enter__()
        self._stack.callback(self._tape.clear)
        return self

    def pass_on(self, number: int, index: int, output: Any) -> Any:
        """Hand on leaves, and remember them beside what the layer read."""
        arguments = self._calls[number].arguments
        self._refuse_containers(index, arguments)
        leaves = map_tensors(self.held(output, f"hidden-{number}-{index}"), _leaf)
        self._tape[number][index] = _Passed(arguments, leaves)
        return leaves

    def backward(self, loss: Loss) -> Iterator[BackwardStep]:
        """One step per layer, from the last to the first, after the forward sweep has gone through all of them.

        Raises UnsupportedModelError where the model's logits give no such loss or something between its layers can't be
        gone back through, RunError when the loss isn't a number.
        """
        self.loss = 0.0
        for number, call in enumerate(self._calls):
            self._resume(call)
            if call.layer is not None:
                raise RuntimeError(f"batch {number} is still at layer {call.layer}")
            logits, call.output = call.output, None
            with torch.no_grad():
                value, gradient = loss(number, logits.detach())
            self.loss += value
            self._carry(number, len(self._layers), [(logits, gradient)])
            del logits, gradient
        if not math.isfinite(self.loss):
            raise RunError(f"the loss is {self.loss}: the model's weights are damaged")
        self.model.release_outer()
        for index in sorted(self._tape[0], reverse=True):
            with self.model.layer(index) as layer:
                for call, tape in zip(self._calls, self._tape, strict=True):
                    call.arguments = tape[index].arguments
                step = BackwardStep(self, layer)
                yield step
                step.advance()

    def _carry(self, number: int, index: int, gradients: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Through what call `number` recorded before layer `index`, to the leaves of the layers before it."""
        earlier = [(i, leaf) for i, passed in self._tape[number].items() if i < index for leaf in floats(passed.leaves)]
        roots = [(t, g.to(t.device, t.dtype)) for t, g in gradients if g is not None and t.requires_grad]
        if not roots or not earlier:
            return
        # Layers may share a part of the recording: it goes with the leaves.
        tensors, values = [t for t, _ in roots], [g for _, g in roots]
        torch.autograd.backward(tensors, values, retain_graph=True, inputs=[leaf for _, leaf in earlier])
        for place, (i, leaf) in enumerate(earlier):
            if leaf.grad is not None:
                leaf.grad = self.held(leaf.grad, f"gradient-{number}-{i}-{place}")

    def forget(self, number: int, index: int) -> None:
        """Let go of what call `number` left at a layer that is done."""
        del self._tape[number][index]
        self._calls[number].arguments = None
        for what in ("hidden", "gradient"):
            for file in self._hold.glob(f"{what}-{number}-{index}-*.bin") if self._hold is not None else ():
                file.unlink()

    def _refuse_containers(self, index: int, arguments: Any) -> None:
        """Raise UnsupportedModelError when layers have written into something that they share."""
        positional, keywords = arguments
        for name, value in [*enumerate(positional), *keywords.items()]:
            plain = value is None or isinstance(value, Tensor | bool | int | float | str | tuple | list | dict)
            if not plain and (not hasattr(value, "__len__") or len(value)):
                raise UnsupportedModelError(
                    f"no gradients for {type(self.model.module).__name__}: its layers hand each other state through a "
                    f"{type(value).__name__} ({name}, at layer {index}) instead of arguments and results"
                )


class BackwardStep(Step):
    """One decoder layer, live, with the gradient at its output known; `run` runs it on what it read, as in a Step.

    Attributes:
        gradients: after `advance`, the gradients of the loss at the parameters that it was asked for.
    """

    _sweep: GradientSweep

    def __init__(self, sweep: GradientSweep, layer: Layer):
        super().__init__(sweep, layer)
        self.gradients: dict[str, Tensor] = {}

    def advance(self, observer: Any = None, parameters: Sequence[str] = ()) -> None:
        """Take the gradient of every batch through the layer. Without a call, happens at the end.

        Args:
            observer: gets a GradientTap for each batch.
            parameters: names, relative to the layer, of parameters whose gradients are wanted too.

        Raises RunError when the recomputed layer is not what it was.
        """
        if self._advanced:
            return
        self._advanced = True
        for number in range(len(self._sweep._calls)):
            self._backward(number, observer, parameters)
            self._sweep.forget(number, self.index)

    def _backward(self, number: int, observer: Callable[[GradientTap], None] | None, names: Sequence[str]) -> None:
        passed = self._sweep._tape[number][self.index]
        with differentiable(self, names) as wanted:
            run = run_differentiably(self, number, catch=observer is not None)
            self._check(run.output, passed.leaves)
            ends = [
                (now, then.grad)
                for now, then in zip(floats(run.output), floats(passed.leaves), strict=True)
                if then.grad is not None and now.requires_grad
            ]
            if not ends:
                raise UnsupportedModelError(
                    f"no gradients for {type(self._sweep.model.module).__name__}: its logits don't depend on what "
                    f"layer {self.index} returns"
                )
            found = torch.autograd.grad(
                [now for now, _ in ends],
                [*(leaf for _, leaf in run.inputs), *wanted.values()],
                [gradient.to(now.device) for now, gradient in ends],
                allow_unused=True,
            )
        reached = dict(zip(wanted, found[len(run.inputs) :], strict=True))
        own = {n: torch.zeros_like(wanted[n]) if g is None else g for n, g in reached.items()}
        for name, gradient in own.items():
            wide = gradient if gradient.dtype == torch.float64 else gradient.float()
            self.gradients[name] = self.gradients[name] + wide if name in self.gradients else wide
        if observer is not None and run.caught:
            behind = map_tensors(passed.leaves, lambda leaf: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
            with torch.no_grad(), self.readable():
                for tap, at in run.caught:
                    observer(_finished(tap, at, passed.leaves, behind, own))
        self._sweep._carry(number, self.index, [(o, g) for (o, _), g in zip(run.inputs, found, strict=False)])

    def _check(self, output: Any, leaves: Any) -> None:
        for now, then in zip(floats(output), floats(leaves), strict=True):
            error = float((now.detach().cpu() - then.detach().cpu()).norm()) / (float(then.detach().norm()) or 1.0)
            if not error <= _TOLERANCE.get(then.dtype, _TOLERANCE_16):
                raise RunError(
                    f"layer {self.index} of {type(self._sweep.model.module).__name__}, run again on what it read, is "
                    f"{error:.1%} away from what it returned before: it depends on something else, so there are no "
                    "gradients for it"
                )


class DifferentiableRun(NamedTuple):
    """A layer that has run with autograd on.

    Attributes:
        output: what it returned, with its graph.
        inputs: what it read where that requires gradients: (as it waited, the leaf that stood in for it).
        caught: taps with their graph, and the gradients at their tensors, which a backward fills in.
    """

    output: Any
    inputs: list[tuple[Tensor, Tensor]]
    caught: list[tuple[Tap, dict[str, Tensor]]]


@contextmanager
def differentiable(step: Step, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Within the context the step's layer can run with autograd on; gives the named parameters, the only ones with
    gradients."""
    layer = step.layer.module
    with ExitStack() as stack:
        if step.on_hooks:
            stack.enter_context(offload.real(layer.modules()))
            stack.enter_context(offload.runnable(layer))
        parameters = {n: p for n, p in layer.named_parameters() if p.is_floating_point()}
        before = {n: p.requires_grad for n, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        try:
            yield {name: parameters[name] for name in names}
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(before[name])


def run_differentiably(step: Step, number: int, *, catch: bool = True, through: bool = True) -> DifferentiableRun:
    """Run batch `number` through a step's layer with autograd on, within `differentiable`.

    Args:
        step: of any sweep.
        number: of the batch, which waits before the layer.
        catch: keep taps.
        through: gradients at what the layer reads are wanted, not only at parameters.
    """
    device = offload.execution_device(step.layer.module) if step.on_hooks else step.device
    inputs: list[tuple[Tensor, Tensor]] = []

    def enter(tensor: Tensor) -> Tensor:
        # The first is the hidden state. Before the first layer it needs no gradient, but what lies behind it does.
        if not tensor.is_floating_point() or not through or (inputs and not tensor.requires_grad):
            return tensor.detach().to(device)
        leaf = tensor.detach().to(device).requires_grad_()
        inputs.append((tensor, leaf))
        return leaf

    caught: list[tuple[Tap, dict[str, Tensor]]] = []

    def watch(tap: Tap) -> None:
        gradients: dict[str, Tensor] = {}
        # Hooks, not the tensors themselves: a block may go on to write into them.
        for name in ("output_TH", "weight_TK"):
            tensor: Tensor = getattr(tap, name)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, name=name: gradients.__setitem__(name, gradient.detach()))
        caught.append((tap, gradients))

    positional, keywords = map_tensors(step.arguments(number), enter)
    with torch.enable_grad(), ExitStack() as stack:
        if catch and step.layer.block is not None:
            stack.enter_context(observe(step.layer.block, watch, *step.labels(number)))
        output = step.layer.module(*positional, **keywords)
    return DifferentiableRun(output, inputs, caught)


def floats(value: Any) -> list[Tensor]:
    """The tensors of real numbers in nested containers, in a fixed order."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) if tensor.is_floating_point() else None)
    return found


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _finished(tap: Tap, at: dict[str, Tensor], leaves: Any, behind: Any, parameters: dict[str, Tensor]) -> GradientTap:
    """The tap without its graph, with the gradients."""
    parts = tap._parts
    if parts is not None:
        dispatch = replace(parts[0], weight_R=parts[0].weight_R.detach())
        parts = (dispatch, parts[1].detach(), parts[2].detach())
    return GradientTap(
        tap.layer,
        tap.experts,
        tap.hidden_TH.detach(),
        tap.index_TK,
        tap.weight_TK.detach(),
        tap.output_TH.detach(),
        None if tap.logits_TE is None else tap.logits_TE.detach(),
        tap.sequence_T,
        map_tensors(leaves, Tensor.detach),
        map_tensors(tap.router_arguments, Tensor.detach),
        tap.modality_T,
        tap.token_weight_T,
        tap.classes,
        tap.received_T,
        parts,
        gradient_TH=at.get("output_TH", torch.zeros_like(tap.output_TH)),
        weight_gradient_TK=at.get("weight_TK", torch.zeros_like(tap.weight_TK)),
        layer_gradient=behind,
        parameters=parameters,
    )

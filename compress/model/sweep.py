"""Running many batches through a model with one decoder layer in memory.

The model's own forward drives: each batch is one call of it, suspended whenever it reaches a decoder layer. While all
calls wait before layer i, that layer is brought to life, run for every batch, and let go; then all calls go on to
layer i + 1. So masks, position embeddings, per-layer inputs, states that layers hand to each other and whatever else
a family does between its layers are the family's own, and nothing about it is known here.

Calls (calls.py) go on one after another, in a fixed order, and the layers themselves run in the caller's thread: no
concurrency, the same numbers in every run.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.errors import RunError
from moe_compress.heap import release_freed

from . import hf, offload
from .calls import Aborted, Call, Stub
from .model import Layer, MoEModel
from .tap import Observer, Tap, hidden_behind, observe
from .tensors import map_tensors, to_device

# Arguments of one forward. Beside them, for whoever observes and not for the model: what every token is of and counts.
Batch = Mapping[str, Any]
MODALITY, TOKEN_WEIGHT = "token_modality", "token_weight"


class Sweep:
    """Batches on their way through the decoder layers. Iterate for one `Step` per layer, then read `outputs`.

    Args:
        model: on disk or in memory.
        batches: keyword arguments of the model's forward for each call, `input_ids` first; `MODALITY` [b, s] (whole
            numbers) and `TOKEN_WEIGHT` [b, s] among them go to the taps instead.
        hold: folder for hidden states (memory-mapped files), or None to hold them in memory.

    Use as a context manager: leaving it restores the model and ends all calls.
    """

    # Whether calls record what they compute between the layers (backward.py).
    _recording = False

    def __init__(self, model: MoEModel, batches: Sequence[Batch], hold: Path | None = None):
        self.model = model
        self.batches = batches
        beside = (MODALITY, TOKEN_WEIGHT)
        arguments = [{k: v for k, v in batch.items() if k not in beside} for batch in batches]
        self._calls = [Call(model.module, batch, model.device, model.dtype, self._recording) for batch in arguments]
        self._labels = [[b[k].reshape(-1).to(model.device) if k in b else None for k in beside] for b in batches]
        self._hold = hold
        self._numbers = itertools.count()
        self._stack = ExitStack()
        rows = [next(iter(b.values())).shape for b in arguments]
        starts = torch.tensor([0, *(r[0] for r in rows)]).cumsum(0).tolist()
        self._sequences = [
            (start + torch.arange(r[0])).repeat_interleave(r[1]) for start, r in zip(starts[:-1], rows, strict=True)
        ]

    def __enter__(self) -> Sweep:
        self._layers = self.model.layers
        self._stubs = nn.ModuleList([Stub(index, layer) for index, layer in enumerate(self._layers)])
        training = self.model.module.training
        self.model.module.eval()
        self._stack.callback(self.model.module.train, training)
        self._stack.enter_context(hf.implementation(self.model.module))
        self._stack.enter_context(torch.no_grad())
        self._stack.callback(release_freed)
        self._stack.callback(self.model.release_outer)
        self._stack.callback(self._abort)
        if self._hold is not None:
            # The model's own frame keeps the embedded text as long as the call lasts.
            embeddings = self.model.module.get_input_embeddings()
            handle = embeddings.register_forward_hook(self._hold_embedded)
            self._stack.callback(handle.remove)
        try:
            for call in self._calls:
                self._resume(call)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[Step]:
        # The outer weights that embeddings needed are not needed again before the head.
        self.model.release_outer()
        for index in range(len(self._layers)):
            waiting = {call.layer for call in self._calls}
            if waiting == {index}:
                with self.model.layer(index) as layer:
                    step = Step(self, layer)
                    yield step
                    step.advance()
            elif any(position is None or position <= index for position in waiting):
                raise RuntimeError(f"calls wait at different layers {waiting} before layer {index}")
            # Otherwise this forward passes the layer by, for every batch alike.

    def outputs(self) -> Iterator[tuple[int, Tensor]]:
        """(batch number, logits) of each call, one at a time; call after the last layer."""
        for number, call in enumerate(self._calls):
            self._resume(call)
            if call.layer is not None:
                raise RuntimeError(f"batch {number} is still at layer {call.layer}")
            output, call.output = call.output, None
            yield number, output

    @property
    def tokens(self) -> int:
        """Tokens of all batches."""
        return sum(len(sequence) for sequence in self._sequences)

    def reaching(self, module: nn.Module, number: int) -> Tensor:
        """What a module behind the last layer reads in one batch's call, which ends there; call after the last layer.

        Raises RuntimeError when it isn't reached.
        """
        seen: list[Tensor] = []

        def stop(_module: nn.Module, arguments: Any) -> None:
            seen.append(arguments[0])
            raise Aborted

        handle = module.register_forward_pre_hook(stop)
        try:
            self._resume(self._calls[number])
        finally:
            handle.remove()
        if not seen:
            raise RuntimeError(f"batch {number} doesn't reach {type(module).__name__}")
        return seen[0]

    def _hold_embedded(self, _module: nn.Module, _arguments: Any, output: Any) -> Any:
        return self.held(output, f"embedded-{next(self._numbers)}")

    def pass_on(self, number: int, index: int, output: Any) -> Any:
        """What call `number` goes on with, of what layer `index` returned for it."""
        # Two files in turn: the call's frame still holds the layer's input while its output is written.
        return self.held(output, f"hidden-{number}-{index % 2}")

    def held(self, output: Any, name: str) -> Any:
        """Large tensors of a layer's output where they wait: mapped from files if the sweep holds on disk."""
        folder = self._hold
        if folder is None:
            return output
        count = itertools.count()

        def write(tensor: Tensor) -> Tensor:
            if tensor.numel() * tensor.element_size() < 1 << 20:
                return tensor
            file = folder / f"{name}-{next(count)}.bin"
            _reserve(file, tensor.numel() * tensor.element_size())
            mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
            return mapped.copy_(tensor)

        with torch.no_grad():
            return map_tensors(output, write)

    def _resume(self, call: Call) -> None:
        """Let a call go on; only meanwhile do stubs stand in the tree, so that layers load into their own places."""
        parent_path, _, name = self.model.stack.rpartition(".")
        parent = self.model.module.get_submodule(parent_path)
        setattr(parent, name, self._stubs)
        try:
            call.resume()
        finally:
            setattr(parent, name, self._layers)

    def _abort(self) -> None:
        for call in self._calls:
            call.abort()


class Step:
    """One decoder layer, live, with every batch waiting in front of it.

    Attributes:
        layer: the live layer.
        index: its number.
    """

    def __init__(self, sweep: Sweep, layer: Layer):
        self.layer = layer
        self.index = layer.index
        self._sweep = sweep
        self._advanced = False

    @property
    def tokens(self) -> int:
        """Tokens of all batches."""
        return self._sweep.tokens

    def sample(self, tokens: int) -> tuple[list[int], int]:
        """The first batches that have so many tokens together, or all; and how many they have."""
        numbers, total = [], 0
        for number, sequence in enumerate(self._sweep._sequences):
            if total >= tokens:
                break
            numbers.append(number)
            total += len(sequence)
        return numbers, total

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return self._sweep.model.device

    @property
    def on_hooks(self) -> bool:
        """Whether the layer belongs to a model in memory, whose weights hooks may bring in."""
        return self._sweep.model.weights is None

    def arguments(self, number: int) -> Any:
        """(positional arguments, keywords) with which batch `number` waits before the layer."""
        return self._sweep._calls[number].arguments

    def labels(self, number: int) -> tuple[Tensor | None, ...]:
        """What taps of a batch say of its tokens: sequence, modality, weight (see `observe`)."""
        return (self._sweep._sequences[number], *self._sweep._labels[number])

    @property
    def token_weights(self) -> list[Tensor | None]:
        """What the tokens [T] of each batch count; None where all count 1."""
        return [self.labels(number)[2] for number in range(len(self._sweep._calls))]

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Within the context the layer's weights can be read outside its forward (offloaded ones are brought in)."""
        if not self.on_hooks:
            yield
            return
        with offload.real(self.layer.module.modules()):
            yield

    def through(self, layer: Layer) -> Step:
        """The same batches in front of another model's live layer, to `run` them through it."""
        return Step(self._sweep, layer)

    def run(
        self, observer: Observer | None = None, numbers: Iterable[int] | None = None, inputs_only: bool = False
    ) -> None:
        """Run every batch, or those of `numbers`, through the layer and drop the results; a Tap of each is observed.

        With `inputs_only`, for an observer that asks for nothing behind the experts' inputs, they don't run if fused.
        """
        for number in range(len(self._sweep._calls)) if numbers is None else numbers:
            self._forward(number, observer, inputs_only)

    def advance(self, observer: Observer | None = None) -> None:
        """Run every batch through the layer and let it go on to the next. Without a call, happens at the end."""
        if self._advanced:
            return
        self._advanced = True
        last = self.index == len(self._sweep._layers) - 1
        for number, call in enumerate(self._sweep._calls):
            output = self._forward(number, observer)
            call.value = self._sweep.pass_on(number, self.index, output)
            if not last:  # behind the last layer come norm and head: only when somebody asks for outputs
                self._sweep._resume(call)

    def behind(self, number: int) -> Tensor | None:
        """Hidden states [T, H] behind the layer of one batch, every stream of them; None where it returns none.

        The batch goes on waiting in front of the layer.
        """
        tokens = len(self._sweep._sequences[number])
        hidden = hidden_behind(self._forward(number, None), tokens)
        return None if hidden is None else hidden.reshape(tokens, -1)

    def _forward(self, number: int, observer: Observer | None, inputs_only: bool = False) -> Any:
        call = self._sweep._calls[number]
        arguments, keywords = to_device(call.arguments, self._sweep.model.device)
        taps: list[Tap] = []
        with torch.no_grad():
            with ExitStack() as stack:
                if observer is not None and self.layer.block is not None:
                    labels = self.labels(number)
                    watching = observe(self.layer.block, taps.append, *labels, inputs_only=inputs_only)
                    stack.enter_context(watching)
                output = self.layer.module(*arguments, **keywords)
            # Handed on only now: what a change of the block weighs depends on the hidden state behind the layer. Some
            # observers run the experts again, and offloaded weights have left by now.
            if taps and observer is not None:
                with self.readable():
                    for tap in taps:
                        tap.layer_output = None if inputs_only else output
                        observer(tap)
        return output


def _reserve(file: Path, size: int) -> None:
    """Have room for a file before it is mapped: writing through a map to a full disk would end the process."""
    with file.open("ab") as handle:
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(handle.fileno(), 0, size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise RunError(
                    f"the disk is full: {file.parent} has no room for hidden states; free some space and run the same "
                    "command again, with fewer `sequences`, or with `hidden_states: memory` if they fit there"
                ) from error

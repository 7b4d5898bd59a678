"""Models whose weights accelerate keeps elsewhere (another device, CPU memory, disk) between calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from accelerate.utils import named_module_tensors
from torch import nn


@contextmanager
def real(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Offloaded tensors of these modules (not of what is inside them) can be read within the context.

    The modules must not run within the context.
    """
    hooks = [(module, hook) for module in modules if (hook := _offloading(module)) is not None]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)


@contextmanager
def editable(layer: nn.Module) -> Iterator[None]:
    """Offloaded tensors in `layer` are real within the context; what they hold at its end is what stays.

    The layer must not run within the context: its hooks would load the old values over the new ones.
    """
    hooks = {module: hook for module in layer.modules() if (hook := _offloading(module)) is not None}
    with real(hooks):
        yield
        for module, hook in hooks.items():
            # Changed or not, the tensors now live in CPU memory: accelerate's own map may be read-only files.
            hook.weights_map = {
                name: tensor.to("cpu")
                for name, tensor in named_module_tensors(
                    module, include_buffers=hook.offload_buffers, recurse=False, remove_non_persistent=True
                )
            }
    device = next((hook.execution_device for hook in hooks.values()), None)
    for module in layer.modules():
        if device is not None and module not in hooks and any(True for _ in module.parameters(recurse=False)):
            add_hook_to_module(module, AlignDevicesHook(device, offload=True))


def inherit(before: nn.Module, after: nn.Module) -> None:
    """Let a module that takes the place of another run where that ran, and wait where that waited between calls."""
    hook = _align(getattr(before, "_hf_hook", None))
    if hook is None:
        return
    for module in after.modules():
        if module is after or any(True for _ in module.parameters(recurse=False)):
            own = AlignDevicesHook(hook.execution_device, offload=hook.offload, io_same_device=module is after)
            add_hook_to_module(module, own)


@contextmanager
def runnable(module: nn.Module) -> Iterator[None]:
    """What is in `module` runs on its tensors as they are: within `editable`, where hooks would load old values."""
    hooked = {m: m.forward for m in module.modules() if hasattr(m, "_hf_hook") and hasattr(m, "_old_forward")}
    for inner in hooked:
        inner.forward = inner._old_forward  # type: ignore[assignment]
    try:
        yield
    finally:
        for inner, forward in hooked.items():
            inner.forward = forward  # type: ignore[assignment]


def execution_device(module: nn.Module) -> torch.device:
    """Where a module's inputs must be."""
    hooks = (_align(getattr(m, "_hf_hook", None)) for m in module.modules())  # of packed matrices, the parts have them
    for hook in hooks:
        if hook is not None and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _offloading(module: nn.Module) -> AlignDevicesHook | None:
    hook = _align(getattr(module, "_hf_hook", None))
    return hook if hook is not None and hook.offload else None


def _align(hook: ModelHook | None) -> AlignDevicesHook | None:
    if isinstance(hook, SequentialHook):
        return next((h for h in hook.hooks if isinstance(h, AlignDevicesHook)), None)
    return hook if isinstance(hook, AlignDevicesHook) else None

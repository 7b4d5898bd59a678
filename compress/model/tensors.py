"""Parameters and buffers by dotted name, their memory, and tensors in nested values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def get_tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer, by dotted name."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)  # type: ignore[no-any-return]


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer, by dotted name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        old = owner._parameters.get(leaf)
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=old is not None and old.requires_grad)


def to_meta(module: nn.Module, *, recurse: bool = True, above: int = 0) -> None:
    """Let go of parameters larger than `above` bytes; shapes and dtypes stay. Buffers stay."""
    for part in module.modules() if recurse else (module,):
        for leaf, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta and parameter.numel() * parameter.element_size() > above:
                part._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


def map_tensors(value: Any, function: Any) -> Any:
    """`function` applied to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, function) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, function) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    return value


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`."""
    return map_tensors(value, lambda tensor: tensor.to(device))

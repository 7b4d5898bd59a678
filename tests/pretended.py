"""A device that isn't there: its tensors lie in main memory and meet only each other, as on a GPU.

Operations that mix it with the CPU fail as CUDA's do, but for those that CUDA allows too: copies, scalars, and indices
that wait on the CPU. So what a GPU would refuse is found on a machine without one. Importing this gives the process a
torch backend for good; tests import it in a process of its own (on_device.py).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class There(Tensor):
    """A tensor on the device: `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:  # no operation: reads memory
            return args[0].held.tolist()
        if func is Tensor.numpy:
            raise TypeError(f"can't convert a tensor on {DEVICE} to numpy")
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # makes tensors of lists where no dispatch sees it
            args = (args[0], as_index(args[1]), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def as_index(index: Any) -> Any:
    """An index with tensors for lists."""
    if isinstance(index, tuple):
        return tuple(map(as_index, index))
    return torch.tensor(index, dtype=None if index else torch.long) if isinstance(index, list) else index


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on the CPU; its results are where its arguments are, or where they are wanted."""
    there = [v for v in tree_leaves((args, kwargs)) if isinstance(v, There)]
    wanted = kwargs.get("device")
    result_there = bool(there) if wanted is None else torch.device(wanted).type == NAME
    if func is aten.copy_.default:
        result_there = isinstance(args[0], There)
    elif there and func not in COPIES:
        refuse_mixed(func, args, kwargs)
    if wanted is not None and result_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda v: v.held if isinstance(v, There) else v, (args, kwargs))
    if func is aten.histc.default and not args[0].is_floating_point():  # CUDA knows it of integers, the CPU doesn't
        found = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    else:
        found = func(*args, **kwargs)
    same = {id(v.held): v for v in there}  # what is changed in place stays the tensor that it was

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in same:
            return same[id(value)]
        return There(value) if result_there else value

    return tree_map(placed, found)


def refuse_mixed(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError where CUDA would."""
    if func in INDEXED:
        if not isinstance(args[0], There):
            raise RuntimeError(f"{func}: indices on {DEVICE} into a tensor on the CPU")
        args = (args[0], args[2:])
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and not isinstance(value, There) and value.dim():
            raise RuntimeError(f"{func}: a tensor on {value.device}, {list(value.shape)}, and one on {DEVICE}")


class Operations(TorchDispatchMode):
    """Makes tensors there and moves them there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """`torch.tensor` reaches no dispatch on its way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The device, while this lasts, in threads too that start meanwhile."""

    def run_there(thread: threading.Thread) -> None:
        with Functions(), Operations():
            plain(thread)

    plain = threading.Thread.run
    with pytest.MonkeyPatch.context() as patched, Functions(), Operations():
        patched.setattr(threading.Thread, "run", run_there)
        yield DEVICE

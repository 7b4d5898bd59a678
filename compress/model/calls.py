"""A forward of a model that can be suspended wherever it reaches a decoder layer, and go on when the layer has run.

A suspended call needs a stack of its own: each runs in a thread. Only one thread runs at any time: whoever resumes a
call waits until it is suspended again or finished, and its errors are raised there.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .tensors import map_tensors


class Aborted(BaseException):
    """Ends a suspended call from inside."""


_CURRENT = threading.local()


class Call:
    """One forward of the model, in a thread of its own, suspended at decoder layers.

    Attributes:
        layer: where it waits; None before the first layer and when it is finished.
        arguments: (positional arguments, keywords) with which it waits there.
        value: what the layer returns to it: to be set before it is resumed.
        output: logits, when it is finished.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        recording: bool,
    ):
        self.layer: int | None = None
        self.arguments: Any = None
        self.value: Any = None
        self.output: Any = None
        self._error: BaseException | None = None
        self._aborted = False
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._work = (module, batch, device, dtype)
        self._recording = recording

    def resume(self) -> None:
        """Run until the call waits at the next layer or is finished."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def abort(self) -> None:
        """End the call where it waits."""
        if self._thread is not None and self._thread.is_alive():
            self._aborted = True
            self._go.release()
            self._thread.join()
        self.arguments = self.value = None

    def wait_at(self, layer: int, arguments: Any) -> Any:
        """Called by a stub, inside the thread: hand over the layer's arguments, wait for its output."""
        self.layer, self.arguments = layer, arguments
        self._stopped.release()
        self._go.acquire()
        if self._aborted:
            raise Aborted
        value, self.value, self.arguments = self.value, None, None
        return value

    def _run(self) -> None:
        self._go.acquire()
        _CURRENT.call = self
        module, batch, device, dtype = self._work
        try:
            with torch.set_grad_enabled(self._recording):
                # Pixels and the like come in the dtype of the modules that read them.
                keywords = map_tensors(dict(batch), lambda t: t.to(device, dtype if t.is_floating_point() else None))
                # Nothing is generated, and a layer that runs twice would read its own keys and values.
                result = module(**{**no_cache(module), **keywords})
                self.output = result.logits if hasattr(result, "logits") else result[0]
        except Aborted:
            pass
        except BaseException as error:  # handed to the caller's thread by resume()
            self._error = error
        finally:
            self.layer = None
            self._stopped.release()


def no_cache(module: nn.Module) -> dict[str, bool]:
    """What keeps a model from caching keys and values. Many classes hand the switch on without naming it."""
    accepted = inspect.signature(module.forward).parameters
    switch = "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return {"use_cache": False} if switch else {}


class Stub(nn.Module):
    """Stands in for a decoder layer: looks like it, and suspends the call that reaches it."""

    def __init__(self, index: int, layer: nn.Module):
        super().__init__()
        self.__dict__["_index"] = index
        self.__dict__["_layer"] = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Hand the arguments over and wait for what the layer puts out."""
        return _CURRENT.call.wait_at(self.__dict__["_index"], (arguments, keywords))

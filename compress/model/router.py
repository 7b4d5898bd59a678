"""What a router decides, whatever its family: read from what it returned, or asked of it.

Letters: T tokens, H hidden size, E experts (classes of the router), K slots per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_compress.errors import UnsupportedModelError

from . import families


@dataclass(frozen=True)
class Routing:
    """What a router decides for T tokens.

    Attributes:
        logits_TE: router logits as the model's own router returns them (some families return probabilities).
        index_TK, weight_TK: chosen experts and the weights that multiply their outputs.
    """

    logits_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor


def read_routing(output: Any, tokens: int) -> Routing | None:
    """What a router returned, whatever the order; None where it returned scores alone.

    The order of (logits, weights, index) changed between versions of transformers; dtypes and shapes don't.
    """
    if not isinstance(output, tuple):
        return None
    tensors = [value for value in output[:3] if isinstance(value, Tensor)]
    chosen = [value for value in tensors if not value.is_floating_point()]
    if len(tensors) != 3 or len(chosen) != 1:
        return None
    index = chosen[0].reshape(tokens, -1)
    first, second = (value.reshape(tokens, -1) for value in tensors if value.is_floating_point())
    logits, weight = (first, second) if second.shape == index.shape else (second, first)
    return Routing(logits, index, weight)


def ask_router(router: nn.Module, parent: nn.Module, where: str, hidden_TH: Tensor, context: Mapping[str, Any]) -> Any:
    """What a family's own router returns for these hidden states.

    Args:
        router, parent: of one block.
        where: the layer, for the message.
        hidden_TH: what the router reads.
        context: what else it may read, by the names of its parameters.

    Raises UnsupportedModelError where it reads something that isn't there.
    """
    arguments: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(router.forward).parameters.items())[1:]:
        if hasattr(parent, name):  # a correction bias that lives on the block
            arguments[name] = getattr(parent, name)
        elif name in context:
            arguments[name] = context[name]
        elif parameter.default is inspect.Parameter.empty:
            raise UnsupportedModelError(f"{type(router).__name__} of {where} also reads {name!r}")
    sequences = type(router).__name__ in families.ROUTERS_OF_SEQUENCES
    return router(hidden_TH.unsqueeze(0) if sequences else hidden_TH, **arguments)


class _ChosenError(Exception):
    """Ends a block's forward before its experts."""


def route_through(parent: nn.Module, experts: nn.Module, hidden_TH: Tensor, logits: Tensor) -> Routing:
    """For routers that only score: let the block choose, and catch what it would send to the experts."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, arguments: Any) -> None:
        caught[:] = arguments[1:3]
        raise _ChosenError

    # In front of rules: what the router chose. Neither they nor the experts run.
    handle = experts.register_forward_pre_hook(catch, prepend=True)
    try:
        parent(hidden_TH.unsqueeze(0))
    except _ChosenError:
        pass
    finally:
        handle.remove()
    index, weight = caught
    return Routing(logits.reshape(len(hidden_TH), -1), index, weight)

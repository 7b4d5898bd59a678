"""Rules between a router and its experts: what the router chose goes in, what the experts are to do comes out.

`Routes` is a chain of rules (rules.py) in front of whatever experts module a block has, dense or packed: its child
`routing`, described by JSON values in `MoEBlock.state`, with what doesn't fit into those as parameters. What computes,
what observes (`Tap`) and what counts here see the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.errors import UnsupportedModelError

from . import hf
from .attention import Attention
from .experts import FusedExperts
from .rules import Choice, RouteRule, executed

CHILD = "routing"


class Routes(nn.Module):
    """The rules of one block, in the order in which they apply, and a count of what they let through.

    Attributes:
        tokens: tokens seen since `reset`.
        attention: what the layer's attention says of tokens, where a rule reads it.
    """

    def __init__(self, rules: Iterable[RouteRule]):
        super().__init__()
        for number, rule in enumerate(rules):
            self.add_module(str(number), rule)
        self.reset()
        self.logits: Any = None  # what the router returned, between its call and the experts'
        self.attention: Attention | None = None

    @property
    def rules(self) -> list[RouteRule]:
        """The rules."""
        return list(self.children())  # type: ignore[arg-type]

    @property
    def reads_logits(self) -> bool:
        """Whether a rule needs the router's logits."""
        return any(rule.reads_logits for rule in self.rules)

    @property
    def reads_attention(self) -> bool:
        """Whether a rule needs the attention that tokens receive."""
        return any(rule.reads_attention for rule in self.rules)

    @property
    def executed(self) -> int:
        """Slots that an expert served since `reset`."""
        return int(self._executed)

    def reset(self) -> None:
        """Count from 0."""
        self.tokens = 0
        self._executed: Any = 0

    def describe(self) -> list[dict[str, Any]]:
        """JSON of all rules."""
        return [rule.describe() for rule in self.rules]

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        """Index and weight [T, K] after all rules."""
        logits, self.logits = self.logits, None
        if self.reads_logits and not isinstance(logits, Tensor):
            raise UnsupportedModelError(
                "a routing rule reads the router's logits, and this family's router returns none"
            )
        flat = logits.reshape(len(hidden_TH), -1) if isinstance(logits, Tensor) else None
        received = self.attention.read(len(hidden_TH)) if self.attention is not None else None
        for rule in self.rules:
            if not rule.by_expert:
                weight_TK = weight_TK.masked_fill(index_TK >= experts, 0)
            index_TK, weight_TK = rule(Choice(hidden_TH, index_TK, weight_TK, experts, flat, received))
        self.tokens += len(hidden_TH)
        with torch.no_grad():
            self._executed = self._executed + executed(index_TK, weight_TK, experts).sum()  # no wait for a device
        return index_TK, weight_TK


def rule_prefix(path: str) -> str:
    """What the names of rules' parameters begin with, given the path of an experts module."""
    return f"{path}.{CHILD}."


def routes_of(experts: nn.Module) -> Routes | None:
    """The rules in front of an experts module, or None."""
    found = getattr(experts, CHILD, None)
    return found if isinstance(found, Routes) else None


def install(experts: nn.Module, router: nn.Module, routes: Routes, read: Callable[[Any, int], Any]) -> None:
    """Put rules in front of an experts module, in the place of what stands there.

    Args:
        experts, router: of one block.
        routes: the rules.
        read: (what the router returned, tokens) → its routing, None where it returned scores alone.
    """
    experts.add_module(CHILD, routes)
    # Functions of this module, that find the rules when they run: copies of the model have rules of their own.
    if _reroute not in experts._forward_pre_hooks.values():
        experts.register_forward_pre_hook(_reroute)
    for number, hook in list(router._forward_hooks.items()):
        if getattr(hook, "func", None) is _remember:
            del router._forward_hooks[number]
    if routes.reads_logits:
        router.register_forward_hook(functools.partial(_remember, routes, read))


def _reroute(experts: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden_TH, index_TK, weight_TK, *rest = arguments
    count = FusedExperts(experts).num_experts if hf.is_fused_experts(experts) else experts.num_experts
    return hidden_TH, *getattr(experts, CHILD)(hidden_TH, index_TK, weight_TK, count), *rest


def _remember(routes: Routes, read: Callable[[Any, int], Any], _router: nn.Module, arguments: Any, output: Any) -> None:
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    tokens = tensors[0].numel() // tensors[0].shape[-1] if tensors else 0
    routing = read(output, tokens) if tokens else None
    routes.logits = routing.logits_TE if routing is not None else output


def experts_per_token(model: nn.Module, *, reset: bool = False) -> float | None:
    """Experts that a token really used, mean over tokens and over layers with rules, since the last reset.

    None where no layer has rules, or none has run. `reset`: count anew from here.
    """
    every = [module for module in model.modules() if isinstance(module, Routes)]
    shares = [routes.executed / routes.tokens for routes in every if routes.tokens]
    if reset:
        for routes in every:
            routes.reset()
    return sum(shares) / len(shares) if shares else None

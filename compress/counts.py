"""How many experts a layer keeps: the option that pruning and merging share, and the choice under routing groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from moe_compress.errors import RecipeError
from moe_compress.model.families import infeasible
from moe_compress.model.shape import LayerShape


class ExpertCounts(BaseModel):
    """`keep` (a share) or `experts` (a number); a pass's options inherit it."""

    keep: float | None = Field(
        default=None, gt=0, le=1, description="Share of the experts that a layer keeps, e.g. 0.75"
    )
    experts: int | None = Field(default=None, ge=1, description="Instead of `keep`: the number of experts per layer")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.keep is None) == (self.experts is None):
            raise ValueError("give either `keep` (a share, e.g. 0.75) or `experts` (a number)")
        return self


def kept_slots(keep: Sequence[int], experts: int) -> list[int]:
    """Where each of so many experts is once only those of `keep` are left, −1 if it is gone."""
    slots = [-1] * experts
    for slot, expert in enumerate(keep):
        slots[expert] = slot
    return slots


class Routed(Protocol):
    """Whatever says how many experts a layer routes to, and how: its shape, or its block."""

    @property
    def num_experts(self) -> int:
        """Experts."""

    @property
    def top_k(self) -> int:
        """Experts per token."""

    @property
    def groups(self) -> tuple[int, int] | None:
        """(routing groups, groups a token may use) or None."""


def kept_count(name: str, index: int, layer: Routed, options: ExpertCounts) -> int:
    """Experts that a layer keeps, checked against its routing. Raises RecipeError with the numbers."""
    count = options.experts if options.experts is not None else round(layer.num_experts * (options.keep or 1.0))
    if layer.groups and options.experts is None:
        count = round(count / layer.groups[0]) * layer.groups[0]
    if count > layer.num_experts:
        raise RecipeError(f"{name}: layer {index} has {layer.num_experts} experts, {count} can't be kept")
    problem = infeasible(layer.top_k, layer.groups, count)
    if problem:
        raise RecipeError(f"{name}: layer {index} {problem}")
    return count


def ranked(scores: Tensor, layer: LayerShape, protected: Sequence[int]) -> Tensor:
    """Experts of each routing group, the one to keep first in front: [groups, experts per group]."""
    scores = scores.double().clone()
    if protected:
        scores[list(protected)] = float("inf")
    groups = layer.routing_groups
    size = layer.num_experts // groups
    order = scores.view(groups, size).argsort(dim=1, descending=True, stable=True)
    return order + size * torch.arange(groups).unsqueeze(1)


def least_kept(layer: LayerShape, protected: Sequence[int]) -> int:
    """Experts that a layer must keep for the protected to be among them, as many of every routing group."""
    groups = layer.routing_groups
    size = layer.num_experts // groups
    return groups * max(Counter(e // size for e in protected).values(), default=0)


def chosen(scores: Tensor, count: int, layer: LayerShape, protected: Sequence[int]) -> list[int]:
    """The `count` best experts, ascending; the same number from every routing group; the protected among them.

    Raises RecipeError when the protected are more.
    """
    if (least := least_kept(layer, protected)) > count:
        raise RecipeError(f"{len(protected)} experts are protected, for which {least} must be kept, not {count}")
    order = ranked(scores, layer, protected)
    return sorted(order[:, : count // len(order)].flatten().tolist())

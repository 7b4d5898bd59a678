"""Rows of routed tokens times the matrices of a stack (quant/stack.py), for experts that share matrices or have none.

Letters: E experts, O/K output and input features, R rows by expert, T different tokens among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_compress.model.dispatch import Dispatch
from moe_compress.quant.run_packed import FEW_ROWS
from moe_compress.quant.stack import Stack


@dataclass(frozen=True)
class Rows:
    """Rows in the order of the slots that they are for; `index` is None where that is the order they have."""

    index: Tensor | None
    slots: list[int]
    counts: list[int]


def grouped(slots_E: Sequence[int], dispatch: Dispatch) -> Rows:
    """Rows of the experts that have a slot (not −1), sorted by slot."""
    if len(dispatch.expert_R) <= FEW_ROWS:
        return _few_grouped(slots_E, dispatch.expert_R)
    counts = dispatch.counts_E.cpu()
    slot_E = torch.tensor(list(slots_E))
    total = torch.zeros(int(slot_E.max()) + 1 if len(slot_E) else 0, dtype=torch.int64)
    held = slot_E >= 0
    total.index_add_(0, slot_E[held], counts[held])
    slots = total.nonzero().flatten()
    found = slots.tolist(), total[slots].tolist()
    if bool(held.all()) and bool((slot_E.diff() >= 0).all()):
        return Rows(None, *found)
    slot_R = slot_E.repeat_interleave(counts)
    order = slot_R.argsort(stable=True)
    return Rows(order[slot_R[order] >= 0].to(dispatch.expert_R.device), *found)


def _few_grouped(slots_E: Sequence[int], expert_R: Tensor) -> Rows:
    """`grouped` without a dozen calls, each of which costs more than counting few rows by hand."""
    places: dict[int, list[int]] = {}
    for row, expert in enumerate(expert_R.tolist()):
        if slots_E[expert] >= 0:
            places.setdefault(slots_E[expert], []).append(row)
    slots = sorted(places)
    order = [row for slot in slots for row in places[slot]]
    counts = [len(places[slot]) for slot in slots]
    if order == list(range(len(expert_R))):
        return Rows(None, slots, counts)
    return Rows(torch.tensor(order, dtype=torch.int64, device=expert_R.device), slots, counts)  # it may be empty


def ordered_times(stack: Stack, rows: Rows, sorted_RK: Tensor) -> Tensor:
    """Rows that are in order, times the matrices of their slots."""
    if not rows.slots:
        return sorted_RK.new_zeros(0, stack.out_features)
    if torch.is_grad_enabled() and sorted_RK.requires_grad:
        output: Tensor = _Product.apply(sorted_RK, stack, rows.slots, rows.counts)
        return output
    return stack(rows.slots, sorted_RK, rows.counts)  # type: ignore[no-any-return]


def spread(part_RO: Tensor, rows: Rows, count: int) -> Tensor:
    """The rows in their own places, zeros where there is none."""
    if rows.index is None:
        return part_RO
    return part_RO.new_zeros(count, part_RO.shape[1]).index_copy(0, rows.index, part_RO)


def routed_times(stack: Stack, slots_E: Sequence[int], input_RK: Tensor, dispatch: Dispatch) -> Tensor:
    """Each expert's rows times the matrix of its slot; zeros where it has none (−1)."""
    rows = grouped(slots_E, dispatch)
    part = ordered_times(stack, rows, input_RK if rows.index is None else input_RK[rows.index])
    return spread(part, rows, len(input_RK))


def once_per_token(stack: Stack, input_RK: Tensor, dispatch: Dispatch) -> Tensor:
    """Rows times the stack's only matrix, each token once."""
    if len(dispatch.row_R) <= FEW_ROWS:
        rows: dict[int, int] = {}
        place = [rows.setdefault(t, len(rows)) for t in dispatch.token_R.tolist()]
        first = [place.index(number) for number in range(len(rows))]
        if first == place:
            return ordered_times(stack, Rows(None, [0] if place else [], [len(place)]), input_RK)
        return ordered_times(stack, Rows(None, [0], [len(first)]), input_RK[first])[place]
    token, place_R = dispatch.token_R.unique(return_inverse=True)
    if not len(token):
        return input_RK.new_zeros(0, stack.out_features)
    row = torch.arange(len(place_R), device=place_R.device)
    first_T = row.new_zeros(len(token)).scatter_(0, place_R.flip(0), row.flip(0))
    return ordered_times(stack, Rows(None, [0], [len(token)]), input_RK[first_T])[place_R]


def picked(stack: Stack, slots: list[int], dtype: torch.dtype) -> Tensor:
    """Dense matrices of some slots; zeros for −1."""
    held = [i for i, slot in enumerate(slots) if slot >= 0]
    if len(held) == len(slots):
        return stack(slots, dtype)  # type: ignore[no-any-return]
    device = next(stack.parameters()).device
    dense = torch.zeros(len(slots), stack.out_features, stack.in_features, dtype=dtype, device=device)
    if held:
        dense[held] = stack([slots[i] for i in held], dtype)
    return dense


def numbered(held: Sequence[bool]) -> list[int]:
    """A number for each that is held, in order; −1 for the others."""
    number = -1
    return [(number := number + 1) if one else -1 for one in held]


class _Product(torch.autograd.Function):
    """Rows times matrices of a stack, whose backward converts them again: no graph holds on to converted ones."""

    @staticmethod
    def forward(ctx: Any, input_RK: Tensor, stack: Stack, slots: list[int], counts: list[int]) -> Tensor:
        ctx.held = stack, slots, counts
        return stack(slots, input_RK, counts)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient_RO: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        stack, slots, counts = ctx.held
        return stack(slots, gradient_RO.contiguous(), counts, True), None, None, None

"""How a change of a block changes its routing, on the very inputs that it was calibrated with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_compress.model import Tap

from .inputs import BlockInputs


class RoutingChange:
    """Compares the routing of a changed block with what it was, on the same inputs in the same order.

    Args:
        before: what the block read and how it routed before the change.
        slots: for each expert before, its slot after the change, -1 if it is gone; None if experts kept their numbers.
    """

    def __init__(self, before: BlockInputs, slots: Sequence[int] | None):
        self._index_TK, self._weight_TK = before.index_TK, before.weight_TK
        self._slots = None if slots is None else torch.tensor(list(slots))
        self._seen = 0
        self._kept_choices = 0
        self._choices = 0
        self._kept_weight = 0.0
        self._weight = 0.0

    def observe(self, tap: Tap) -> None:
        """Take one batch after the change into account."""
        rows = slice(self._seen, self._seen + tap.hidden_TH.shape[0])
        self._seen = rows.stop
        before = self._index_TK[rows]
        if self._slots is not None:
            before = self._slots.to(before.device)[before]
        hit_TK = (before.unsqueeze(-1) == tap.index_TK.unsqueeze(1)).any(-1) & (before >= 0)
        weight = self._weight_TK[rows].double()
        self._choices += hit_TK.numel()
        self._kept_choices += int(hit_TK.sum())
        self._weight += float(weight.sum())
        self._kept_weight += float(weight[hit_TK].sum())

    def result(self) -> dict[str, Any]:
        """`kept_choices`: share of the former choices that are still made (in their new slots); `kept_weight`: of the
        routing weight that they had."""
        return {
            "kept_choices": self._kept_choices / max(1, self._choices),
            "kept_weight": self._kept_weight / self._weight if self._weight else 0.0,
        }


def merged_slots(groups: Sequence[Sequence[int]], experts: int) -> list[int]:
    """Slot of each expert when each group becomes one expert, in order of its first given member."""
    slots = torch.full((experts,), -1, dtype=torch.int64)
    for slot, members in enumerate(groups):
        slots[torch.tensor(list(members))] = slot
    return slots.tolist()


__all__ = ["RoutingChange", "Tensor", "merged_slots"]

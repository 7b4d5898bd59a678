"""How a change of a block changes its routing, on the very inputs that it was calibrated with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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
        self._experts = len(slots) if slots is not None else 1 << 62
        self._seen = 0
        self._kept_choices = 0
        self._choices = 0
        self._kept_weight = 0.0
        self._weight = 0.0

    def observe(self, tap: Tap) -> None:
        """Take one batch after the change into account."""
        rows = slice(self._seen, self._seen + tap.hidden_TH.shape[0])
        self._seen = rows.stop
        # Zero weights and indices beyond the last expert are slots that nobody serves: no choices (see Dispatch.of).
        before, weight = self._index_TK[rows], self._weight_TK[rows].double()
        served = (weight != 0) & (before < self._experts)
        if self._slots is not None:
            before = self._slots.to(before.device)[before.clamp_max(self._experts - 1)]
        after = tap.index_TK.masked_fill(tap.weight_TK == 0, -2)
        hit_TK = (before.unsqueeze(-1) == after.unsqueeze(1)).any(-1) & (before >= 0) & served
        self._choices += int(served.sum())
        self._kept_choices += int(hit_TK.sum())
        self._weight += float(weight[served].sum())
        self._kept_weight += float(weight[hit_TK].sum())

    def result(self) -> dict[str, Any]:
        """`kept_choices`: share of the former choices that are still made (in their new slots); `kept_weight`: of the
        routing weight that they had."""
        return {
            "kept_choices": self._kept_choices / max(1, self._choices),
            "kept_weight": self._kept_weight / self._weight if self._weight else 0.0,
        }

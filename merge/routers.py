"""Router rows of merged experts.

A group's row can't be exact: that any of the members is chosen follows log Σ exp of their logits, which no row gives
unless the members' rows differ by a constant only. The row nearest to that function (least squares on the calibration
tokens) did worse on the demo model than the dominant member's own, so it is no option. What a bias on the logits can
hold of it, `router: folded` puts there: where the members' rows are equal, that is all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compress.model import MoEBlock


def router_mixing(
    how: str, groups: Sequence[Sequence[int]], weights: Sequence[Tensor], dominant: Sequence[int]
) -> Tensor:
    """What each group's row has of the members' rows, [groups, experts] float64.

    Args:
        how: "weighted" (by `weights`), "mean"; anything else is the dominant member's.
        groups, weights: members of each group, and their weights.
        dominant: one member of each.
    """
    mixing = torch.zeros(len(groups), sum(map(len, groups)), dtype=torch.float64)
    for slot, (members, weight, own) in enumerate(zip(groups, weights, dominant, strict=True)):
        if how == "weighted":
            row = weight / weight.sum()
        elif how == "mean":
            row = torch.full_like(weight, 1 / len(weight))
        else:
            row = torch.tensor([float(e == own) for e in members], dtype=torch.float64)
        mixing[slot, torch.tensor(list(members))] = row.double()
    return mixing


class FoldedBias:
    """Log Σ exp over each group's members of the bias on the router's logits. Made before the block is regrouped.

    With equal biases it adds log n for n members: as likely as all of them together, if their rows agree.

    Attributes:
        missing: why there is nothing to fold, or None.
    """

    def __init__(self, block: MoEBlock, groups: Sequence[Sequence[int]]):
        name = f"{block.router_path}.bias"
        self.missing: str | None = None
        if name not in block.axes.tensors or f"{block.router_path}.weight" not in block.axes.tensors:
            kind = type(block.router).__name__
            self.missing = f"{kind} has no bias on its logits: groups keep their dominant member's row as it is"
            return
        bias = block.router.get_parameter("bias").detach().double()
        self._folded = torch.stack([bias[torch.tensor(list(g), device=bias.device)].logsumexp(0) for g in groups])

    def put(self, block: MoEBlock) -> None:
        """Write the folded biases into the regrouped block."""
        if self.missing is None:
            block.router.get_parameter("bias").data.copy_(self._folded)

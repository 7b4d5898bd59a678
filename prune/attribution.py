"""Criteria by gradient attribution: what the loss would do without an expert, to first order, from one backward sweep.

Letters: E experts, T tokens, R rows (token, expert), H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.statistics import Accumulator, Result, Statistic, counted_rows
from moe_compress.model import GradientTap, MoEBlock, Tap

from .criteria import Measured, Selection, criterion


@dataclass(frozen=True)
class OutputAttribution(Statistic):
    """What the next token's loss owes to each expert's contribution z_te = g_te·f_e(x_t), to first order.

    With a_te = ⟨∂L/∂y_t, z_te⟩, y_t what the experts module puts out and L the loss summed over the text: taking z_te
    away changes L by -a_te to first order, all else (the routing, too) as it is.

    Result, each [E], sums over routed tokens divided by the tokens of the text (nats per token): `signed` Σ a;
    `absolute` Σ |a|; `squared` Σ a². Each token counts as much as it weighs.
    """

    name: ClassVar[str] = "output_attribution"
    gradients: ClassVar[bool] = True
    weighs_tokens: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _AttributionSums(block.num_experts, tokens)


class _AttributionSums(Accumulator):
    def __init__(self, experts: int, tokens: int):
        self.tokens = tokens
        self.sums = torch.zeros(3, experts, dtype=torch.float64)

    def update(self, tap: Tap) -> None:
        assert isinstance(tap, GradientTap)
        dispatch = tap.dispatch
        # The sweep's loss is a mean: times T it is a sum over the text, of the size of one token's.
        owed_R = (tap.expert_gradient_RH.double() * tap.output_RH.double()).sum(dim=-1) * self.tokens
        counted = counted_rows(tap, dispatch) / self.tokens
        rows = torch.stack([owed_R, owed_R.abs(), owed_R.square()]) * counted
        self.sums.index_add_(1, dispatch.expert_R.cpu(), rows.cpu())

    def result(self) -> Result:
        signed, absolute, squared = self.sums
        return {"signed": signed, "absolute": absolute, "squared": squared}


@criterion(
    "attribution",
    "first-order attribution, −Σ_t ⟨∂L/∂z_te, z_te⟩ with z_te what the expert adds: by how much the loss would grow "
    "without it (as skeletonization, Mozer and Smolensky 1988, does for neurons)",
    OutputAttribution(),
    comparable=True,
)
def attribution(measured: Measured, _: Selection) -> Tensor:
    """Nats per token that the loss would grow by without the expert, to first order; negative where it would fall."""
    return -measured["output_attribution"]["signed"]


@criterion(
    "attribution_abs",
    "Σ_t |⟨∂L/∂z_te, z_te⟩|: expected sensitivity of the loss to a mask on the expert, as for attention heads in "
    "arXiv 1905.10650",
    OutputAttribution(),
    comparable=True,
)
def attribution_abs(measured: Measured, _: Selection) -> Tensor:
    """What the expert moves the loss by, per token, whichever way."""
    return measured["output_attribution"]["absolute"]


@criterion(
    "attribution_squared",
    "Σ_t ⟨∂L/∂z_te, z_te⟩²: first-order Taylor importance of a gate on the expert, as for channels in arXiv 1906.10771",
    OutputAttribution(),
    comparable=True,
)
def attribution_squared(measured: Measured, _: Selection) -> Tensor:
    """Twice what the empirical Fisher says that the loss grows by without the expert, nats per token."""
    return measured["output_attribution"]["squared"]

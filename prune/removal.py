"""What it costs the next token's loss when experts are gone: a statistic of the backward sweep.

Letters: T tokens, E experts, R rows (token, expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.statistics import Accumulator, Result, Statistic, counted_rows
from moe_compress.model import GradientTap, MoEBlock, Tap


@dataclass(frozen=True)
class RemovalLoss(Statistic):
    """The empirical Fisher information along what experts add to the tokens that they serve.

    Result: `fisher` [E, E] float64, F_ij = Σ_t u_ti·u_tj / T, with u_te = γ_t·(g_te·f_e(x_t)) and γ_t the gradient at
    the experts' output of the loss summed over the text. For any set of experts half the sum of its rows and columns
    estimates, to second order, KL(before ‖ after) of the next token in nats per token when the set is dropped and no
    token is routed anew: what the removed experts added together, along the gradient, squared. One [E, E] matrix per
    layer, so any number of sets can be asked afterwards.
    """

    name: ClassVar[str] = "removal_loss"
    gradients: ClassVar[bool] = True
    weighs_tokens: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _FisherSums(block.num_experts, tokens)


class _FisherSums(Accumulator):
    def __init__(self, experts: int, tokens: int):
        self.tokens = tokens
        self.fisher = torch.zeros(experts, experts, dtype=torch.float64)

    def update(self, tap: Tap) -> None:
        assert isinstance(tap, GradientTap)
        dispatch, count = tap.dispatch, len(self.fisher)
        # The sweep's loss is a mean: times T it is a sum over the text, of the size of one token's.
        along_R = (tap.expert_gradient_RH.double() * tap.output_RH.double()).sum(-1) * self.tokens
        along_R *= counted_rows(tap, dispatch).sqrt()
        along_TE = torch.zeros(dispatch.tokens, count, dtype=torch.float64, device=along_R.device)
        along_TE.index_put_((dispatch.token_R, dispatch.expert_R), along_R, accumulate=True)
        self.fisher += (along_TE.T @ along_TE).cpu() / self.tokens

    def result(self) -> Result:
        return {"fisher": self.fisher}


def dropping_costs(fisher_EE: Tensor, order: list[int]) -> Tensor:
    """What it costs to drop the first n of `order`, for every n from 0: [E + 1] float64, nats per token."""
    ordered = fisher_EE.double()[order][:, order]
    added = ordered.diagonal() + 2 * ordered.tril(-1).sum(dim=1)
    return torch.cat([added.new_zeros(1), added.cumsum(0).clamp_min(0)]) / 2

"""The criterion `gram_greedy`: one expert after another, each the one that adds least to the block's output error."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.calib.outputs import OutputGram

from .criteria import Measured, Selection, criterion

# Between experts whose removal costs the same, relative to the mean cost: keeps their scores in order of removal.
_STEP = 1e-12


def removal_order(gram_EE: Tensor, groups: int, protected: list[int]) -> list[int]:
    """Experts in the order in which greedy backward elimination removes them.

    The error of removing a set S is Σ_t ‖Σ_{e in S} g_te·f_e(x_t)‖² = Σ_{i, j in S} M_ij, exact as long as no token is
    routed anew. Removing e on top of S adds M_ee + 2·Σ_{j in S} M_ej (negative where e undoes what S did).

    Args:
        gram_EE: M (statistic `output_gram`).
        groups: routing groups of equal size, of which each loses an expert before any loses another.
        protected: experts that are the last of their group to go.
    """
    gram = gram_EE.double()
    experts = len(gram)
    group_E = torch.arange(experts) // (experts // groups)
    cost_E = gram.diagonal().clone()
    removed = torch.zeros(experts, dtype=torch.bool)
    kept_on = torch.zeros(experts, dtype=torch.bool)
    kept_on[protected] = True
    order = []
    for round_number in range(experts // groups):
        lost_E = torch.bincount(group_E[removed], minlength=groups)[group_E]
        free = torch.bincount(group_E[~removed & ~kept_on], minlength=groups)[group_E] > 0
        open_E = ~removed & (lost_E == round_number) & ~(kept_on & free)
        for _ in range(groups):
            expert = int(cost_E.masked_fill(~open_E, float("inf")).argmin())
            order.append(expert)
            removed[expert] = True
            open_E &= group_E != group_E[expert]
            cost_E += 2 * gram[expert]
    return order


def added(gram_EE: Tensor, order: list[int]) -> Tensor:
    """What each expert adds to the error of those before it, in that order: [E]."""
    ordered = gram_EE.double()[order][:, order]
    return ordered.diagonal() + 2 * ordered.tril(-1).sum(dim=1)


@criterion(
    "gram_greedy",
    "greedy backward elimination on Σ_t ‖Σ_{e removed} g_te·f_e(x_t)‖², the block's output error without re-routing: "
    "NAEE's objective (arXiv 2402.14800) where its search over all sets is too long",
    OutputGram(),
    comparable=True,
)
def gram_greedy(measured: Measured, asked: Selection) -> Tensor:
    """What each expert adds to the error when it goes, Σ_t of each token's error beside its hidden state's ‖h_t‖².

    The order is greedy in the error itself. Adjacent steps of which the later costs less are given their mean (isotonic
    regression): then the lowest scores are the first to go for every number of experts, and layers compare by what
    the next expert costs. Where hidden states aren't known, all is relative to the layer's output, Σ_t ‖y_t‖².
    """
    groups = asked.layer.routing_groups
    result = measured["output_gram"]
    order = removal_order(result["gram"], groups, list(asked.protected))
    relative = result["relative"] if "relative" in result else result["gram"] / result["gram"].sum().clamp_min(1e-300)
    rounds = isotonic(added(relative, order).view(-1, groups).mean(dim=1)).clamp_min(0)
    rising = rounds + _STEP * rounds.mean().clamp_min(1e-300) * torch.arange(len(rounds))
    scores = torch.empty(len(order), dtype=torch.float64)
    scores[order] = rising.repeat_interleave(groups)
    return scores


def isotonic(values: Tensor) -> Tensor:
    """The nearest non-decreasing sequence in least squares (pool adjacent violators): [N] → [N], same sum."""
    pools: list[tuple[float, int]] = []  # mean, length
    for value in values.tolist():
        mean, length = value, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, length = (mean * length + before * many) / (length + many), length + many
        pools.append((mean, length))
    return torch.cat([torch.full((length,), mean, dtype=torch.float64) for mean, length in pools])

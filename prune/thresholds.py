"""Settings of rules that skip experts, from calibration routing, for a wanted number of experts per token.

Letters: S tokens of a sample, K slots per token, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_compress.budget.knapsack import solve_arrays
from moe_compress.model.rules import ratios, shares_before


def cut(values: Tensor, below: int) -> float:
    """A number with exactly `below` of the values beneath it (float32, as rules compare), or as near as ties allow.

    0 where all must be above and 2 where none may be: values lie between 0 and 1.
    """
    ordered = values.float().sort().values
    count = len(ordered)
    below = min(max(below, 0), count)
    if 0 < below < count and ordered[below - 1] == ordered[below]:  # a tie: all of it beneath, or all of it above
        tied = ordered[below]
        first, behind = (int(torch.searchsorted(ordered, tied, right=right)) for right in (False, True))
        below = first if below - first <= behind - below else behind
    if below == 0:
        return 0.0
    if below == count:
        return 2.0
    under, over = ordered[below - 1], ordered[below]
    middle = ((under.double() + over.double()) / 2).float()
    return float(middle if middle > under else over)


def ratio_threshold(weight_SK: Tensor, safe_S: Tensor, wanted: float) -> float:
    """The threshold of rule `ratio` that leaves `wanted` experts per token on average over the sample.

    Args:
        weight_SK: weights from the largest down, 0 where nobody serves.
        safe_S: tokens that keep all.
        wanted: average over all tokens, protected ones included.
    """
    served = weight_SK > 0
    kept = int(served[:, 0].sum()) + int(served[safe_S, 1:].sum())  # whatever the threshold
    open_N = ratios(weight_SK)[~safe_S, 1:][served[~safe_S, 1:]]
    return cut(open_N, len(open_N) - (round(wanted * len(weight_SK)) - kept))


def median_threshold(weight_SK: Tensor) -> float:
    """NAEE's: the median over tokens of the second weight over the first."""
    return float(ratios(weight_SK)[:, 1].median())


def share_threshold(weight_SK: Tensor, wanted: float) -> float:
    """The share of rule `top_p` that leaves `wanted` experts per token on average; arguments as above."""
    served = weight_SK > 0
    open_N = shares_before(weight_SK)[:, 1:][served[:, 1:]]
    return cut(open_N, round(wanted * len(weight_SK)) - int(served[:, 0].sum()))


def allocate_k(cost_L: Mapping[int, Sequence[float]], wanted: float, minimum: int = 1) -> dict[int, int]:
    """Experts per token of each layer, at least `minimum`, their mean at most `wanted`, at the least total cost.

    A multiple-choice program, solved to optimality (LExI minimises the same sum by evolution; Alloc-MoE by dynamic
    programming).

    Args:
        cost_L: layer → cost of 1, 2, … K experts per token.
        wanted: mean over layers, at least `minimum`.
        minimum: of every layer.
    """
    layers, most = list(cost_L), max(len(costs) for costs in cost_L.values())
    size = np.tile(np.arange(1, most + 1, dtype=np.int64), (len(layers), 1))
    cost = np.zeros((len(layers), most))
    mask = np.zeros((len(layers), most), dtype=np.bool_)
    for row, costs in enumerate(cost_L.values()):
        cost[row, : len(costs)] = costs
        mask[row, min(minimum, len(costs)) - 1 : len(costs)] = True
    budget = math.floor(wanted * len(layers) + 1e-9)
    found = solve_arrays(cost, size, budget, mask, gap=0.0, names=[f"layer {i}" for i in layers])
    return {layer: int(choice) + 1 for layer, choice in zip(layers, found.choice, strict=True)}

"""The criterion `stun`: experts whose router rows are alike do alike; of every cluster of them one stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.calib.statistics import Accumulator, Result, Statistic
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEBlock, Tap

from .criteria import Measured, Selection, criterion

# What the weights that are worked on at a time may take.
_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class WeightGrams(Statistic):
    """Inner products between experts of what belongs to each: no token has a part in it.

    Result, float64: `router` [E, E] of the router's rows; `experts` [E, E] of all weights of the experts, end to end.
    Raises UnsupportedModelError where the router has no matrix with a row for each expert.
    """

    name: ClassVar[str] = "weight_grams"
    weighs_tokens: ClassVar[bool] = True  # no token is read

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Grams(block)


class _Grams(Accumulator):
    def __init__(self, block: MoEBlock):
        self.block = block

    def update(self, tap: Tap) -> None:
        pass

    def result(self) -> Result:
        state, count = self.block.module.state_dict(), self.block.num_experts
        rows = [
            state[name].movedim(dim, 0)[:count]
            for name, (dim, _) in self.block.axes.tensors.items()
            if name.startswith(self.block.router_path + ".") and state[name].dim() == 2
        ]
        if not rows:
            raise UnsupportedModelError(f"layer {self.block.layer}: its router has no matrix with a row per expert")
        weights = [tensor for _, tensor in self.block.experts.weights().items()]
        return {"router": _gram(rows), "experts": _gram(weights)}


def _gram(tensors: list[Tensor]) -> Tensor:
    """Σ over tensors [E, …] of the inner products between their experts' parts, [E, E]."""
    experts = len(tensors[0])
    gram = torch.zeros(experts, experts, dtype=torch.float64)
    for tensor in tensors:
        step = max(1, _CHUNK_BYTES * tensor.shape[1] // (8 * tensor.numel()))
        for part in tensor.split(step, dim=1):
            flat = part.reshape(experts, -1).double()
            gram += (flat @ flat.T).cpu()
    return gram


def clusters(distance_EE: Tensor, group_E: Tensor, each: int, protected: list[int]) -> Tensor:
    """Agglomerative clustering by complete linkage, until every routing group has `each` clusters: cluster of each [E].

    Two clusters are as far apart as their farthest members. Clusters never cross routing groups, and no two protected
    experts share one (a group with more of them than `each` keeps more clusters).
    """
    experts = len(distance_EE)
    far = distance_EE.double().clone()
    far[group_E.unsqueeze(0) != group_E.unsqueeze(1)] = float("inf")
    guarded = torch.zeros(experts, dtype=torch.bool)
    guarded[protected] = True
    far[guarded.unsqueeze(0) & guarded.unsqueeze(1)] = float("inf")
    far.fill_diagonal_(float("inf"))
    cluster = torch.arange(experts)
    left = torch.bincount(group_E)
    while bool((left > each).any()):
        done = left[group_E] <= each
        open_EE = far.masked_fill(done.unsqueeze(1) | done.unsqueeze(0), float("inf"))
        nearest = int(open_EE.argmin())
        first, second = sorted(divmod(nearest, experts))
        if open_EE[first, second].isinf():
            break
        cluster[cluster == second] = first
        joined = torch.maximum(far[first], far[second])
        far[first], far[:, first] = joined, joined
        far[second], far[:, second] = float("inf"), float("inf")
        far[first, first] = float("inf")
        left[group_E[first]] -= 1
    return cluster


@criterion(
    "stun",
    "STUN (arXiv 2409.06211), its structured stage: experts clustered by the distance of their router rows, of each "
    "cluster the expert stays whose weights are nearest to the cluster's mean",
    WeightGrams(),
    ranks=False,
)
def stun(measured: Measured, asked: Selection) -> Tensor:
    """1 for the experts that stand for their cluster, 0 for the others.

    As many clusters as experts stay, where the paper finds a threshold for that number; by router rows alone (its
    coefficients 1 and 0: co-activation has no part).
    """
    groups = asked.layer.routing_groups
    experts = asked.layer.num_experts
    router, weights = (measured["weight_grams"][key].double() for key in ("router", "experts"))
    norm = router.diagonal()
    distance = (norm.unsqueeze(0) + norm.unsqueeze(1) - 2 * router).clamp_min(0).sqrt()
    group_E = torch.arange(experts) // (experts // groups)
    cluster = clusters(distance, group_E, asked.keep // groups, list(asked.protected))
    member_EE = (cluster.unsqueeze(0) == cluster.unsqueeze(1)).double()
    share_EE = member_EE / member_EE.sum(dim=1, keepdim=True)
    # ‖w_e − mean‖² less what is the same for all members. Two of a pair are equally near: the first stands for both.
    off_E = weights.diagonal() - 2 * (share_EE * weights).sum(dim=1)
    off_E[list(asked.protected)] = float("-inf")
    nearest_E = off_E.expand(experts, experts).masked_fill(member_EE == 0, float("inf")).amin(dim=1)
    near = off_E <= nearest_E + 1e-9 * weights.diagonal().mean()
    first = (near.unsqueeze(0) & (member_EE > 0)).double().argmax(dim=1)
    return (first == torch.arange(experts)).double()

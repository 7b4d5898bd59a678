"""How many groups each layer's experts form, so that what all layers lose by merging is least for the number left.

What a layer loses is foreseen from what was measured of the unchanged one: of each expert's outputs, what no multiple
of its group's mean output gives. That counts neither what averaging weights in the place of outputs adds, nor what
refitting takes off, nor whom the router chooses once rows are gone.

Letters: E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_compress.errors import RecipeError
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.prune.choice import Guards, Protected, cheapest_counts

from .grouping import Group

# Numbers of experts for which a layer's cost is found; those between them are interpolated.
COUNTS = 17


@dataclass(frozen=True)
class MergingCost:
    """What grouping the experts of a layer costs.

    Attributes:
        similarity_EE: mean cosine between outputs, on the same tokens.
        energy_E: Σ over an expert's tokens of g²‖f‖² / ‖h‖², h the hidden state behind the layer: so layers compare.
        usage_E: weights of members.
    """

    similarity_EE: Tensor
    energy_E: Tensor
    usage_E: Tensor

    def of(self, groups: Sequence[Sequence[int]]) -> float:
        """Σ_e energy_e · (1 − cos²(u_e, m_e)), m_e = Σ_j w_j u_j over the members j of e's group.

        u are the experts' normalised outputs over all tokens, put end to end, of which the cosines are inner products.
        Sizes are left out: how large an expert's outputs are on its own tokens says little of those on others', and a
        refit sets them again.
        """
        alike_EE = self.similarity_EE.double()
        label_E = torch.empty(len(alike_EE), dtype=torch.int64)
        for number, members in enumerate(groups):
            label_E[torch.tensor(list(members))] = number
        share_EG = torch.nn.functional.one_hot(label_E, len(groups)).double()
        weight_EG = share_EG * self.usage_E.double().unsqueeze(1)
        weight_EG = torch.where(weight_EG.sum(0) > 0, weight_EG, share_EG)  # as when they are merged
        weight_EG = weight_EG / weight_EG.sum(0)
        cross_EG = alike_EE @ weight_EG
        norm_G = (weight_EG * cross_EG).sum(0).clamp_min(1e-300)
        given_E = cross_EG.gather(1, label_E.unsqueeze(1)).squeeze(1).square() / norm_G[label_E]
        return float((self.energy_E * (1 - given_E).clamp_min(0)).sum())


def merging_floors(
    name: str, shape: ModelShape, total: int, minimum: int | None, bound: int | None, alone: Protected
) -> dict[int, int]:
    """Layer → groups that it has at the least: for its routing, its experts that stay alone, and the bound on groups.

    Raises RecipeError where these are more than `total`.
    """
    floors = Guards(minimum, name=name).floors(shape, total, {})
    for index, layer in shape.layers.items():
        size = layer.num_experts // layer.routing_groups
        for first in range(0, layer.num_experts, size):
            single = sum(first <= e < first + size for e in alone.get(index, []))
            joined = size - single
            least = single + (-(-joined // bound) if bound else min(joined, 1))
            floors[index] = max(floors[index], layer.routing_groups * least)
    if sum(floors.values()) > total:
        raise RecipeError(
            f"{name}: {total} experts are to be left, but for super experts, `minimum` and `max_group` the layers need "
            f"{sum(floors.values())}; lower `minimum`, raise `max_group`, or keep more"
        )
    return floors


def counts_by_cost(
    shape: ModelShape,
    uniform: Mapping[int, int],
    floors: Mapping[int, int],
    costs: Mapping[int, MergingCost],
    grouped: Callable[[list[tuple[int, int]]], list[list[Group]]],
) -> tuple[dict[int, int], dict[str, Any]]:
    """How many groups each layer has, as many in all as in the uniform plan, so that the sum of their costs is least.

    Args:
        shape: of the layers.
        uniform: layer → groups in the uniform plan.
        floors: layer → groups that it has at the least.
        costs: layer → what its groups cost.
        grouped: (layer, number of groups) of several layers → their groups.

    Returns:
        Layer → groups; and what a plan tells: the numbers, and what is expected to be lost, with these and uniformly.
    """
    tried = [(i, n) for i, layer in shape.layers.items() for n in _grid(layer, floors[i])]
    known: dict[int, dict[int, float]] = {i: {} for i in shape.layers}
    for (i, n), groups in zip(tried, grouped(tried), strict=True):
        known[i][n] = costs[i].of([g.members for g in groups])
    counts = cheapest_counts(shape, known, sum(uniform.values()), floors)
    expected = [
        sum(float(np.interp(n, list(known[i]), list(known[i].values()))) for i, n in plan.items())
        for plan in (uniform, counts)
    ]
    return counts, {
        "experts_by_global": list(counts.values()),
        "expected_cost_uniform": expected[0],
        "expected_cost_global": expected[1],
    }


def _grid(layer: LayerShape, floor: int) -> list[int]:
    """Numbers of groups for which the cost of a layer is found, its floor and all experts among them."""
    steps = (layer.num_experts - floor) // layer.routing_groups
    places = np.linspace(0, steps, min(COUNTS, steps + 1)).round().astype(int)
    return [floor + int(place) * layer.routing_groups for place in places]

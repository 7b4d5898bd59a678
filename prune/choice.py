"""How many experts each layer keeps, and which: the same number everywhere, globally, or by what each number costs.

Contract: pure functions on scores and shapes. Every layer keeps at least what its routing, its protected experts and
the guards ask for; group-limited layers keep whole steps of one expert per group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_compress.budget.knapsack import solve_arrays
from moe_compress.counts import chosen, least_kept, ranked
from moe_compress.errors import RecipeError, RunError
from moe_compress.model.shape import LayerShape, ModelShape

Protected = Mapping[int, list[int]]


@dataclass(frozen=True)
class Guards:
    """What every layer keeps in any case.

    Attributes:
        minimum: experts; None for twice the top-k.
        most_removed: of its experts at most this share goes.
        start: what that is a share of, where a round isn't the first; None: the shape that is asked about.
        name: of the pass, for messages.
    """

    minimum: int | None = None
    most_removed: float = 1.0
    start: ModelShape | None = None
    name: str = "prune.experts"

    def floors(self, shape: ModelShape, total: int, protected: Protected) -> dict[int, int]:
        """Experts that each layer keeps in any case. Raises RecipeError when they are more than `total`."""
        floors: dict[int, int] = {}
        for index, layer in shape.layers.items():
            step = layer.routing_groups
            least = self.minimum if self.minimum is not None else min(layer.num_experts, 2 * layer.top_k)
            whole = (self.start or shape).layers[index].num_experts
            share = math.ceil(round((1 - self.most_removed) * whole, 9))
            least = max(least, share, layer.top_k, least_kept(layer, protected.get(index, [])))
            if layer.groups:
                groups, used = layer.groups
                least = max(least, 2 * groups, -(-layer.top_k * groups // used))
            floors[index] = min(layer.num_experts, -(-least // step) * step)
        if sum(floors.values()) > total:
            also = ", raise `most_removed`" if self.most_removed < 1 else ""
            raise RecipeError(
                f"{self.name}: {total} experts are to be kept, but each layer keeps a minimum and these sum to "
                f"{sum(floors.values())}; lower `minimum`{also}, or keep more"
            )
        return floors


def shares(scores: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Every layer's scores as shares of their sum. Raises RunError for negative ones, of which that says nothing."""
    if negative := [i for i, found in scores.items() if bool((found < 0).any())]:
        raise RunError(
            f"prune.experts: scores of layers {negative} are negative, and scope: global and `below` compare shares of "
            "their sum; use scope: uniform, or another criterion"
        )
    return {index: found / found.sum().clamp_min(1e-300) for index, found in scores.items()}


def best(
    shape: ModelShape, scores: Mapping[int, Tensor], counts: Mapping[int, int], protected: Protected
) -> dict[int, list[int]]:
    """Layer → its `counts[layer]` best experts."""
    return {i: chosen(scores[i], counts[i], layer, protected.get(i, [])) for i, layer in shape.layers.items()}


def evened(shape: ModelShape, counts: Mapping[int, int]) -> dict[int, int]:
    """The most even numbers of experts that layers can keep which sum to those of `counts`.

    `counts` themselves where layers have so many; where an earlier round has left a layer fewer, it keeps what it has,
    and those that keep fewest keep more, a routing group's worth at a time.
    """
    kept = {i: min(counts[i], layer.num_experts) for i, layer in shape.layers.items()}
    left = sum(counts.values()) - sum(kept.values())
    while left > 0:
        room = [
            i
            for i, layer in shape.layers.items()
            if kept[i] + layer.routing_groups <= layer.num_experts and layer.routing_groups <= left
        ]
        if not room:
            break
        least = min(room, key=lambda i: (kept[i], i))
        kept[least] += shape.layers[least].routing_groups
        left -= shape.layers[least].routing_groups
    return kept


def standing(
    shape: ModelShape, scores: Mapping[int, Tensor], below: float, goals: Mapping[int, int], protected: Protected
) -> dict[int, int]:
    """How many experts of each layer have at least `below` times an even share of its scores, protected ones or not.

    At least `goals`, and of every routing group as many as of the one with the most of them.
    """
    kept = {}
    for index, share in shares(scores).items():
        layer = shape.layers[index]
        stays = share >= below / len(share)
        stays[list(protected.get(index, []))] = True
        most = int(stays.view(layer.routing_groups, -1).sum(dim=1).max())
        kept[index] = min(layer.num_experts, max(goals[index], most * layer.routing_groups))
    return kept


def global_counts(
    shape: ModelShape, scores: Mapping[int, Tensor], total: int, guards: Guards, protected: Protected
) -> dict[int, int]:
    """How many of the `total` highest scores of all layers, which are comparable, each layer has."""
    floors = guards.floors(shape, total, protected)
    units: list[tuple[float, int, int]] = []  # score, layer, number of experts that come with it
    for index, layer in shape.layers.items():
        step = layer.routing_groups
        order = ranked(scores[index], layer, protected.get(index, []))
        price = scores[index][order].mean(dim=0)  # of each further step
        units += [(float(price[n // step]), index, step) for n in range(floors[index], layer.num_experts, step)]
    kept = dict(floors)
    left = total - sum(kept.values())
    for _, index, step in sorted(units, key=lambda u: (-u[0], u[1])):
        if step <= left:
            kept[index] += step
            left -= step
    return kept


def removal_order(scores: Tensor, layer: LayerShape, protected: list[int]) -> list[int]:
    """Experts, the first to go in front; of every routing group one after the other."""
    return ranked(scores, layer, protected).flip(1).T.flatten().tolist()


def cheapest_counts(
    shape: ModelShape, costs: Mapping[int, Mapping[int, float]], total: int, floors: Mapping[int, int]
) -> dict[int, int]:
    """How many experts each layer keeps so that what is lost in all layers together is least, `total` kept.

    Args:
        shape: of the layers.
        costs: layer → experts kept → what that costs, among them all of the layer's experts (mostly 0). Between the
            numbers that are there, costs are interpolated; keeping more is never taken to cost more.
        total: experts that are kept in all layers together.
        floors: layer → experts that it keeps in any case.
    """
    rows: list[tuple[list[int], list[float]]] = []
    for index, layer in shape.layers.items():
        counts = list(range(floors[index], layer.num_experts + 1, layer.routing_groups))
        known = sorted(costs[index])
        found = np.interp(counts, known, [costs[index][n] for n in known])
        rows.append((counts, np.minimum.accumulate(found).tolist()))
    # However little, keeping more is better: all that may be kept is kept.
    little = 1e-9 * max(1e-30, max(row[0] for _, row in rows))
    width = max(len(counts) for counts, _ in rows)
    cost_UC, size_UC = np.zeros((len(rows), width)), np.zeros((len(rows), width), dtype=np.int64)
    mask_UC = np.zeros((len(rows), width), dtype=np.bool_)
    for u, (counts, row) in enumerate(rows):
        size_UC[u, : len(counts)], mask_UC[u, : len(counts)] = counts, True
        cost_UC[u, : len(counts)] = [c - little * n for c, n in zip(row, counts, strict=True)]
    solved = solve_arrays(cost_UC, size_UC, total, mask_UC, names=[f"layer {i}" for i in shape.layers])
    return {i: int(size_UC[u, c]) for u, (i, c) in enumerate(zip(shape.layers, solved.choice, strict=True))}


def as_mask(keep: list[int], experts: int) -> Tensor:
    """Numbers of experts as [E] booleans."""
    mask = torch.zeros(experts, dtype=torch.bool)
    mask[keep] = True
    return mask

"""Who gets which width: a layer's units and what each width costs them → one width per matrix, within a budget.

Contract: pure functions on arrays. What is returned fits the budget in real bytes, all matrices of a unit have the same
width, and a protected expert's units have the largest. A rule that can't meet the budget raises BudgetError.

Letters: E experts, M matrices of an expert (gate, up, down), U units, B widths, from small to large.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moe_compress.budget.integer import Bools, Floats, Ints
from moe_compress.budget.knapsack import Solution, solve_arrays
from moe_compress.errors import BudgetError
from moe_compress.units import show_bytes

Unit = Literal["matrix", "expert", "projection", "layer"]
Rule = Literal["program", "greedy", "uniform"]

# What a target gives widths to → the units that it loads: the same, or coarser.
LOADED: dict[str, tuple[Unit, ...]] = {
    "matrix": ("matrix", "expert", "projection", "layer"),
    "expert": ("expert", "layer"),
    "projection": ("projection", "layer"),
    "layer": ("layer",),
}


@dataclass(frozen=True)
class Choices:
    """What the units of one layer may get.

    Attributes:
        unit_EM: which unit each matrix belongs to, [E, M].
        cost_UB, size_UB: what each width costs each unit, and its bytes.
        mask_UB: which widths a unit may get.
    """

    unit_EM: Ints
    cost_UB: Floats
    size_UB: Ints
    mask_UB: Bools

    @classmethod
    def of(cls, unit_EM: Ints, cost: Floats, size_MB: Ints, protected: Sequence[int]) -> Choices:
        """From costs of matrices [E, M, B], or of whole experts [E, B] if no unit is smaller than one."""
        count = int(unit_EM.max()) + 1
        widths = size_MB.shape[1]
        cost_UB = np.zeros((count, widths))
        if cost.ndim == 2 and (unit_EM != unit_EM[:, :1]).any():
            raise ValueError("costs of whole experts don't say what one matrix costs")
        np.add.at(cost_UB, unit_EM[:, 0] if cost.ndim == 2 else unit_EM, cost)
        size_UB = np.zeros((count, widths), np.int64)
        np.add.at(size_UB, unit_EM, np.broadcast_to(size_MB, (*unit_EM.shape, widths)))
        mask_UB = np.ones((count, widths), dtype=np.bool_)
        mask_UB[unit_EM[list(protected)].flatten(), :-1] = False
        return cls(unit_EM, cost_UB, size_UB, mask_UB)


@dataclass(frozen=True)
class Allocation:
    """What a rule decided.

    Attributes:
        column_U: layer → the width (its position among the B) of every unit.
        summary: cost, and what is known of how good it is.
        notes: what the user should know.
    """

    column_U: dict[int, Ints]
    summary: dict[str, Any]
    notes: tuple[str, ...] = ()


def unit_of(unit: Unit, experts: int, matrices: int, tie_gate_up: bool = False) -> Ints:
    """The number of the unit that each matrix belongs to, [E, M]."""
    expert, matrix = np.indices((experts, matrices))
    if tie_gate_up and matrices == 3:
        matrix = np.maximum(matrix - 1, 0)
    number = {"matrix": expert * matrices + matrix, "expert": expert, "projection": matrix, "layer": 0 * expert}[unit]
    unit_EM: Ints = np.unique(number, return_inverse=True)[1].reshape(experts, matrices).astype(np.int64)
    return unit_EM


def program(choices: dict[int, Choices], budget: int, cover: int = 0) -> Allocation:
    """The multiple-choice program over all these layers: least total cost within the budget.

    `cover`: in every layer, each of so many of the largest widths is given to some unit (PMQ, arXiv 2410.06270, Eq. 5:
    the two largest). A layer where the plain optimum doesn't do so gets these widths where they cost least at the
    optimum's own price of a byte, and the program is solved again for all others. The gap says how far that is from the
    program without the condition, which no plan with it can beat.
    """
    layers = list(choices)
    widths = max(c.cost_UB.shape[1] for c in choices.values())
    choices = {i: _padded(c, widths) for i, c in choices.items()}
    held = {i: c.mask_UB.copy() for i, c in choices.items()}
    cost, size = (np.concatenate([getattr(c, name) for c in choices.values()]) for name in ("cost_UB", "size_UB"))
    ends = np.cumsum([len(c.cost_UB) for c in choices.values()])[:-1]
    free: Solution | None = None
    while True:
        mask = np.concatenate(list(held.values()))
        solution = solve_arrays(cost, size, budget, mask, gap=0.0)
        column_U = dict(zip(layers, np.split(solution.choice, ends), strict=True))
        free = free or solution
        short = [i for i in layers if not _covered(column_U[i], choices[i], cover)]
        if not short:
            break
        for index in short:
            _hold(held[index], choices[index], solution.price, cover, index)
    gap = 0.0 if solution.cost == free.bound else (solution.cost - free.bound) / max(abs(solution.cost), 1e-300)
    summary = {"solver": solution.solver, "gap": max(0.0, float(gap)), "cost": float(solution.cost)}
    return Allocation(column_U, summary, (solution.note,) if solution.note else ())


def _padded(choices: Choices, widths: int) -> Choices:
    """With more columns, which nobody may take."""
    more = ((0, 0), (0, widths - choices.cost_UB.shape[1]))
    cost_UB: Floats = np.pad(choices.cost_UB, more)
    size_UB: Ints = np.pad(choices.size_UB, more)
    mask_UB: Bools = np.pad(choices.mask_UB, more)
    return Choices(choices.unit_EM, cost_UB, size_UB, mask_UB)


def _covered(column_U: Ints, choices: Choices, cover: int) -> bool:
    widths = choices.cost_UB.shape[1]
    return set(range(widths - cover, widths)) <= set(column_U.tolist())


def _hold(mask_UB: Bools, choices: Choices, price: float, cover: int, layer: int) -> None:
    """Leave some unit only the largest width, another only the next, …: those that lose least by it at that price."""
    widths = choices.cost_UB.shape[1]
    if len(mask_UB) < cover:
        raise BudgetError(f"layer {layer} has {len(mask_UB)} units, and {cover} widths are each to be given to one")
    worth_UB = np.where(choices.mask_UB, choices.cost_UB + price * choices.size_UB, np.inf)
    loss_UB = worth_UB - worth_UB.min(axis=1, keepdims=True)
    taken = np.zeros(len(mask_UB), dtype=np.bool_)
    for column in range(widths - 1, widths - 1 - cover, -1):
        unit = int(np.where(taken, np.inf, loss_UB[:, column]).argmin())
        if taken[unit] or not np.isfinite(loss_UB[unit, column]):
            raise BudgetError(f"layer {layer} has no unit left that may get its width number {column + 1}")
        taken[unit] = True
        mask_UB[unit] = np.arange(widths) == column


def greedy(choices: dict[int, Choices], budget: int) -> Allocation:
    """Start everybody at the largest width; lower by one width whoever's cost rises least, until the budget is met.

    EdgeMoE (arXiv 2308.14352): experts ranked by what each alone loses at a smaller width. Rises are not divided by the
    bytes that they save, as there; where all units and steps save the same bytes, that makes no difference.
    """
    column_U = {i: np.full(len(c.cost_UB), c.cost_UB.shape[1] - 1, dtype=np.int64) for i, c in choices.items()}
    size = sum(int(c.size_UB[:, -1].sum()) for c in choices.values())
    heap: list[tuple[float, int, int, int]] = []

    def offer(layer: int, unit: int, column: int) -> None:
        own = choices[layer]
        if column > 0 and own.mask_UB[unit, column - 1]:
            rise = float(own.cost_UB[unit, column - 1] - own.cost_UB[unit, column])
            heapq.heappush(heap, (rise, layer, unit, column))

    for layer, columns in column_U.items():
        for unit, column in enumerate(columns.tolist()):
            offer(layer, unit, column)
    while size > budget:
        if not heap:
            raise BudgetError(
                f"the least that the units take is {show_bytes(size)}, and the budget is {show_bytes(max(0, budget))}"
            )
        _, layer, unit, column = heapq.heappop(heap)
        size += int(choices[layer].size_UB[unit, column - 1] - choices[layer].size_UB[unit, column])
        column_U[layer][unit] = column - 1
        offer(layer, unit, column - 1)
    cost = sum(float(c.cost_UB[np.arange(len(c.cost_UB)), column_U[i]].sum()) for i, c in choices.items())
    return Allocation(column_U, {"solver": "greedy", "cost": cost})


def uniform(choices: dict[int, Choices], budget: int, spread: bool = True) -> Allocation:
    """In every layer the same mixture of the two widths around the budget, spread evenly over the units; costs unseen.

    Protected units get the largest width, the others what is left. Without `spread` all get the smaller of the two.
    """
    free = {i: np.flatnonzero(c.mask_UB[:, :-1].any(axis=1)) for i, c in choices.items()}
    widths = next(iter(choices.values())).size_UB.shape[1]
    if widths == 1:
        free = {i: np.arange(len(c.size_UB)) for i, c in choices.items()}
    sizes = sum(c.size_UB[free[i]].sum(axis=0) for i, c in choices.items())
    fixed = sum(int(c.size_UB[:, -1].sum() - c.size_UB[free[i], -1].sum()) for i, c in choices.items())
    left = budget - fixed
    affordable = np.flatnonzero(sizes <= left)
    if not len(affordable):
        raise BudgetError(
            f"super experts at the largest width leave {show_bytes(max(0, left))} of the budget, and the others take "
            f"{show_bytes(int(sizes[0]))} at the smallest: allow more, or set `protect_super_experts: false`"
        )
    low = int(affordable[-1])
    high = min(low + 1, widths - 1)
    spare = int(sizes[high] - sizes[low])
    share = (left - int(sizes[low])) / spare if spare and spread else 0.0
    column_U = {}
    for index, own in choices.items():
        column_U[index] = np.full(len(own.size_UB), widths - 1, dtype=np.int64)
        position = np.arange(len(free[index]))
        step = np.floor((position + 1) * share + 1e-9) - np.floor(position * share + 1e-9)
        column_U[index][free[index]] = np.where(step > 0, high, low)
    return Allocation(column_U, {})


def by_layer(
    choices: dict[int, Choices], budgets: dict[int, int], rule: Callable[[dict[int, Choices], int], Allocation]
) -> Allocation:
    """Each layer by itself within its own budget, as one."""
    parts = [rule({i: own}, budgets[i]) for i, own in choices.items()]
    summary: dict[str, Any] = {"solver": ", ".join(sorted({p.summary["solver"] for p in parts}))}
    summary["cost"] = sum(p.summary["cost"] for p in parts)
    if all("gap" in p.summary for p in parts):
        summary["gap"] = max(p.summary["gap"] for p in parts)
    notes = dict.fromkeys(note for p in parts for note in p.notes)
    return Allocation({i: c for p in parts for i, c in p.column_U.items()}, summary, tuple(notes))

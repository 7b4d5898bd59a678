"""One multiple-choice program: of every unit exactly one choice, within a size budget, at the least total cost.

Every allocation of this toolkit is this program: bits per expert, matrix or layer, rank, pruned or not. The contract:
what is returned fits the budget in exact integer arithmetic, `bound` is a proven lower bound of what any admissible
plan costs, `gap` says how far apart the two are, and nothing is returned where nothing fits.

How. The Lagrangian relaxation of the budget row is solved exactly: per unit the lower convex hull of its choices, then
all hulls' increments by falling gain per byte. This gives the multiplier `lam` and each choice's
reduced cost r >= 0, what it loses against its unit's best choice at that price of a byte. Any plan costs exactly

    bound + (sum of r over its choices) + lam * (size left unused)

so a plan's excess over the bound is a sum of non-negative terms: nothing cancels, whatever the costs' scales. A choice
whose r alone reaches the excess of the plan in hand is in no better plan and is dropped, which leaves the integer
program few units. Its objective is the excess, in units of the excess in hand, so a solver's tolerances are relative to
the gap that is left and not to costs that may span twelve decades.

Letters: U units, C choices of a unit, F those of them that no other choice of the unit dominates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe_compress.errors import BudgetError, RecipeError, RunError, nearest

from .integer import EXACT, Bools, Dual, Floats, Ints, close_gap, find_backend

SOLVERS = ("auto", "highs", "cbc", "lagrange")
AUTO_GAP = 1e-4  # where `auto` stops if no gap is asked for: costs are models, and off by far more
MAX_BINARIES = 50_000  # `auto` starts no larger integer program; what `_improve` leaves has hundreds
SWAPS = 64  # rounds of `_improve`, each a sort of the choices that are left


@dataclass(frozen=True)
class Solution:
    """A plan that fits, and what is known of it.

    `choice[u]`: the column chosen for row u, [U] int64. `size`: bytes. `cost`: of this plan; `bound`: no admissible
    plan costs less (an integer program proves this to 1e-6 of the gap it was given); `gap`: (cost - bound) / |cost|.
    `price`: what a byte costs in the relaxation, 0 where everything fits. `solver`: who proved it, lagrange, highs or
    cbc. `seconds`: that all of it took. `note`: one line if something didn't go as asked (a time limit, no integer
    solver), else empty.
    """

    choice: Ints
    size: int
    cost: float
    bound: float
    gap: float
    price: float
    solver: str
    seconds: float
    note: str


def solve_arrays(
    cost_UC: Floats,
    size_UC: Ints,
    budget: int,
    mask_UC: Bools | None = None,
    *,
    solver: str = "auto",
    gap: float | None = None,
    time_limit: float | None = None,
    names: Sequence[str] | None = None,
) -> Solution:
    """Minimise the sum of `cost[u, choice[u]]` with the sum of `size[u, choice[u]]` at most `budget`.

    `cost_UC`: finite, of any sign, [U, C] float64. `size_UC`: bytes >= 0, [U, C] int64. `mask_UC`: which choices are
    allowed, [U, C] bool; None allows all. `names`: the units', for messages.

    `solver`: `lagrange` starts no integer program; `highs` (if highspy is installed) and `cbc` close with one whatever
    gap is left; `auto` does that only if the gap is above what is asked, with highs if there is one, else cbc.
    `gap`: relative, enough to stop at; None is 1e-4 for `auto` and 0 for `highs` and `cbc`. `time_limit`: seconds for
    the integer program; if they don't suffice, the best plan found, its gap, and a note.

    Equal arguments give equal plans unless a time limit was hit. Of identical choices the first is taken, of equally
    good increments the earlier unit's.

    Raises: `BudgetError` if no plan fits (says the least size there is) or a unit has no allowed choice; `RunError` for
    a cost that isn't finite (names the unit); `RecipeError` for an unknown or missing solver; `ValueError` for wrong
    shapes or negative sizes.
    """
    started = time.perf_counter()
    if solver not in SOLVERS:
        raise RecipeError(f"unknown solver {solver!r}{nearest(solver, SOLVERS)}")
    if gap is not None and not 0 <= gap < math.inf:
        raise RecipeError(f"gap must be 0 or more, not {gap}")
    backend = "" if solver == "lagrange" else find_backend(solver)
    front = _frontier(*_checked(cost_UC, size_UC, mask_UC, names))
    rows = np.arange(len(front.cost))
    least = int(front.size[:, 0].sum())
    if least > budget:
        raise BudgetError(f"the budget of {_human(budget)} is too small: the least size reachable is {_human(least)}")

    dual = _relax(front, int(budget) - least)
    at_U = _improve(front, dual, _fill_up(dual))
    excess, proven, proved_by, note = dual.excess(at_U), 0.0, "lagrange", ""
    wanted = (AUTO_GAP if solver == "auto" else 0.0) if gap is None else gap
    cost = math.fsum(front.cost[rows, at_U].tolist())
    if cost - excess < cost - wanted * abs(cost) and solver != "lagrange":  # an excess below round-off is none
        kept_UF = dual.kept(excess)
        binaries = int(kept_UF.sum())
        if not backend:
            note = "no integer solver is installed (pip install highspy): this is the Lagrangian plan"
        elif solver == "auto" and binaries > MAX_BINARIES:
            note = f"an integer program of {binaries:,} binaries was not started: this is the Lagrangian plan"
        else:
            # Relative to the final cost, which lies between the bound and this plan's.
            allowed = wanted * min(abs(cost), abs(cost - excess)) if (cost > 0) == (cost > excess) else 0.0
            allowed *= 1 - EXACT
            try:
                at_U, proven, note = close_gap(dual, kept_UF, at_U, backend, allowed, time_limit)
            except RunError as error:
                if solver != "auto":
                    raise
                note = f"{error}: this is the Lagrangian plan"
            # What is cheaper by less than the solver's tolerance, this arithmetic still sees.
            at_U = _improve(front, dual, at_U)
            proven = min(proven, dual.excess(at_U))
            proved_by = backend if proven or dual.excess(at_U) < excess else proved_by
            excess = dual.excess(at_U)
    cost = math.fsum(front.cost[rows, at_U].tolist())
    bound = cost - (excess - proven)
    return Solution(
        choice=front.column[rows, at_U],
        size=int(front.size[rows, at_U].sum()),
        cost=cost,
        bound=bound,
        gap=0.0 if bound == cost else (cost - bound) / abs(cost) if cost else math.inf,
        price=dual.lam / dual.step,
        solver=proved_by,
        seconds=time.perf_counter() - started,
        note=note,
    )


class _Frontier(NamedTuple):
    """Each unit's undominated choices by rising size and falling cost, left-aligned; [U, F] each."""

    column: Ints  # of the C
    size: Ints
    cost: Floats  # inf where a unit has fewer than F
    valid: Bools


def _checked(cost: Floats, size: Ints, mask: Bools | None, names: Sequence[str] | None) -> tuple[Floats, Ints, Bools]:
    """The arguments as arrays of their types, or the reason why they can't be used."""
    cost_UC, size_UC = np.asarray(cost, dtype=np.float64), np.asarray(size)
    mask_UC = np.ones(cost_UC.shape, dtype=np.bool_) if mask is None else np.asarray(mask, dtype=np.bool_)
    if cost_UC.ndim != 2 or not cost_UC.shape == size_UC.shape == mask_UC.shape:
        raise ValueError(f"cost, size and mask must be [U, C], not {cost_UC.shape}, {size_UC.shape}, {mask_UC.shape}")
    if not len(cost_UC):
        cost_UC, size_UC, mask_UC = np.zeros((0, 1)), np.zeros((0, 1), np.int64), np.zeros((0, 1), np.bool_)
    if not np.issubdtype(size_UC.dtype, np.integer) or (size_UC < 0)[mask_UC].any():
        raise ValueError("sizes must be whole bytes, 0 or more")
    if np.where(mask_UC, size_UC, 0).max(axis=1, initial=0).sum(dtype=np.float64) >= 2**62:
        raise ValueError("sizes must add up to less than 2**62 bytes")
    named = [repr(name) for name in names] if names is not None else range(len(cost_UC))
    if (bad := np.flatnonzero(~mask_UC.any(axis=1))).size:
        raise BudgetError(f"unit {named[bad[0]]} has no allowed choice ({bad.size} such units)")
    if (bad := np.flatnonzero((mask_UC & ~(np.abs(cost_UC) < 1e300)).any(axis=1))).size:  # NaN too; sums stay finite
        values = ", ".join(map(str, cost_UC[bad[0]][mask_UC[bad[0]]]))
        raise RunError(f"unit {named[bad[0]]} has costs that are not finite: {values} ({bad.size} such units)")
    return cost_UC, size_UC.astype(np.int64), mask_UC


def _frontier(cost_UC: Floats, size_UC: Ints, mask_UC: Bools) -> _Frontier:
    """Drop every choice for which its unit has one no larger and no dearer (of identical ones keep the first)."""
    size = np.where(mask_UC, size_UC, np.iinfo(np.int64).max)
    cost = np.where(mask_UC, cost_UC, np.inf)
    order = np.lexsort((cost, size), axis=-1)  # stable, so of identical choices the first comes first
    size, cost = np.take_along_axis(size, order, 1), np.take_along_axis(cost, order, 1)
    before = np.minimum.accumulate(np.insert(cost, 0, np.inf, axis=1), axis=1)[:, :-1]
    valid = cost < before
    keep = np.argsort(~valid, axis=1, kind="stable")[:, : int(valid.sum(axis=1).max(initial=1))]
    column, size, cost, valid = (np.take_along_axis(a, keep, 1) for a in (order, size, cost, valid))
    return _Frontier(column, np.where(valid, size, 0), np.where(valid, cost, np.inf), valid)


def _relax(front: _Frontier, room: int) -> Dual:
    """Take the hulls' increments by falling gain per byte up to the first that doesn't fit in `room` bytes."""
    steps_UF = np.where(front.valid, front.size - front.size[:, :1], 0)
    divisor = int(np.gcd.reduce(steps_UF, axis=None)) or 1
    steps_UF, room = steps_UF // divisor, room // divisor
    unit, at, gain = np.arange(len(steps_UF)), np.zeros(len(steps_UF), dtype=np.int64), np.full(len(steps_UF), np.inf)
    column, walked = np.arange(steps_UF.shape[1]), [(unit[:0], at[:0], at[:0], gain[:0])]
    while unit.size:  # one step along all hulls: from `at` to the choice with the most gain per byte
        ahead = front.valid[unit] & (column > at[:, None])
        steps = np.where(ahead, steps_UF[unit] - steps_UF[unit, at][:, None], 1)
        slope = np.where(ahead, front.cost[unit, at][:, None] - front.cost[unit], -1.0) / steps
        to = column[-1] - np.argmax(slope[:, ::-1], axis=1)  # the farthest of equally good ones
        top = np.take_along_axis(slope, to[:, None], 1)[:, 0]
        far = np.take_along_axis(steps, to[:, None], 1)[:, 0]
        more = top > 0
        # Gains fall along a hull; round-off must not undo that.
        unit, at, gain = unit[more], to[more], np.minimum(gain, top)[more]
        walked.append((unit, at, far[more], gain))
    units, targets, steps, gains = (np.concatenate(part) for part in zip(*walked, strict=True))
    order = np.argsort(-gains, kind="stable")
    rest = np.stack([units, targets, steps], axis=1)[order]
    fit = int(np.searchsorted(np.cumsum(rest[:, 2]), room, side="right"))
    base = np.zeros(len(steps_UF), dtype=np.int64)
    np.maximum.at(base, rest[:fit, 0], rest[:fit, 1])
    lam = float(gains[order[fit]]) if fit < len(rest) else 0.0
    own = np.take_along_axis(front.cost, base[:, None], 1), np.take_along_axis(steps_UF, base[:, None], 1)
    reduced = np.where(front.valid, (front.cost - own[0]) + lam * (steps_UF - own[1]), np.inf)
    return Dual(lam, divisor, room, steps_UF, base, np.maximum(reduced, 0.0), rest[fit:])


def _fill_up(dual: Dual) -> Ints:
    """The relaxation's plan and what still fits of the increments after it, of each unit in order."""
    at_U, left = dual.base.copy(), dual.unused(dual.base)
    blocked: set[int] = set()
    for unit, target, steps in dual.rest.tolist():
        if not left:
            break
        if steps > left:
            blocked.add(unit)
        elif unit not in blocked:
            at_U[unit], left = target, left - steps
    return at_U


def _improve(front: _Frontier, dual: Dual, at_U: Ints) -> Ints:
    """Change one or two units at a time while that helps, each time the best pair there is.

    With many units this takes the excess from about one increment's gain down by orders of magnitude, and it is the
    excess that decides how many choices the integer program is left with.
    """
    rows = np.arange(len(at_U))
    for _ in range(SWAPS):
        excess, left = dual.excess(at_U), dual.unused(at_U)
        if not excess:
            break
        movable = dual.kept(excess)
        movable[rows, dual.base] = True
        movable[rows, at_U] = False
        unit, to = np.nonzero(movable)
        steps, gain = dual.steps[unit, to] - dual.steps[unit, at_U[unit]], front.cost[unit, at_U[unit]]
        gain = gain - front.cost[unit, to]
        # By size, with the move of no unit among them, so that a single move is a pair too.
        unit, to, steps, gain = np.append(unit, -1), np.append(to, 0), np.append(steps, 0), np.append(gain, 0.0)
        order = np.lexsort((unit, steps))
        unit, to, steps, gain = unit[order], to[order], steps[order], gain[order]
        record = gain == np.maximum.accumulate(gain)
        best_up_to = np.maximum.accumulate(np.where(record, np.arange(len(gain)), 0))
        fitting = np.searchsorted(steps, left - steps, side="right") - 1
        partner = best_up_to[np.maximum(fitting, 0)]
        both = np.where((fitting >= 0) & (unit[partner] != unit), gain + gain[partner], -np.inf)
        first = int(np.argmax(both))
        moves = [move for move in (first, int(partner[first])) if unit[move] >= 0]
        changed = at_U.copy()
        changed[unit[moves]] = to[moves]
        if not both[first] > 0 or dual.excess(changed) >= excess:
            break
        at_U = changed
    return at_U


def _human(size: int) -> str:
    """`'12.346 GB (12,345,678,901 bytes)'`."""
    return f"{size / 1e9:.3f} GB ({size:,} bytes)"

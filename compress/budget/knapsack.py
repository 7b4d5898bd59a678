"""One multiple-choice program: of every unit exactly one choice, within a size budget, at the least total cost.

Every allocation of this toolkit is this program: bits per expert, matrix or layer, rank, pruned or not. The contract:
what is returned fits the budget in exact integer arithmetic, `bound` is a proven lower bound of what any admissible
plan costs, `gap` says how far apart the two are, and nothing is returned where nothing fits.

How. The Lagrangian relaxation of the budget row is solved exactly: per unit the lower convex hull of its choices, then
all hulls' increments by falling gain per byte (`methods.md` F3). This gives the multiplier `lam` and each choice's
reduced cost r >= 0, what it loses against its unit's best choice at that price of a byte. Any plan costs exactly

    bound + (sum of r over its choices) + lam * (size left unused)

so a plan's excess over the bound is a sum of non-negative terms: nothing cancels, whatever the costs' scales. A choice
whose r alone reaches the excess of the plan in hand is in no better plan and is dropped, which leaves the integer
program few units. Its objective is the excess, in units of the excess in hand, so a solver's tolerances are relative to
the gap that is left and not to costs that may span twelve decades.

Letters: U units, C choices of a unit, F those of them that no other choice of the unit dominates.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pulp
from numpy.typing import NDArray

from moe_compress.errors import BudgetError, RecipeError, RunError, nearest

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SOLVERS = ("auto", "highs", "cbc", "lagrange")
AUTO_GAP = 1e-4  # where `auto` stops if no gap is asked for: costs are models, and off by far more
MAX_BINARIES = 50_000  # `auto` starts no larger integer program; what `_improve` leaves has hundreds
SWAPS = 64  # rounds of `_improve`, each a sort of the choices that are left
EXACT = 1e-6  # what an integer solver's tolerances leave open, in parts of the gap that it was given to close


@dataclass(frozen=True)
class Choice:
    """One option of a unit: `size` in bytes, `cost` in a unit of measure that the whole program shares."""

    label: Hashable
    size: int
    cost: float


@dataclass(frozen=True)
class Unit:
    """What gets exactly one of its choices: an expert, a matrix, a layer."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Outcome:
    """What is known of a plan that fits.

    `size`: bytes. `cost`: of this plan; `bound`: no admissible plan costs less (an integer program proves this to 1e-6
    of the gap it was given); `gap`: (cost - bound) / |cost|. `solver`: who proved it, lagrange, highs or cbc. `note`:
    one line if something didn't go as asked (a time limit, no integer solver), else empty.
    """

    size: int
    cost: float
    bound: float
    gap: float
    solver: str
    seconds: float
    note: str


@dataclass(frozen=True)
class ArraySolution(Outcome):
    """`choice[u]` is the column chosen for row u, [U] int64."""

    choice: Ints


@dataclass(frozen=True)
class Solution(Outcome):
    """`choice` maps each unit's name to the label chosen, in the units' order."""

    choice: dict[str, Hashable]


def solve(
    units: Sequence[Unit],
    budget_bytes: int,
    *,
    equal: Sequence[Sequence[str]] | None = None,
    solver: str = "auto",
    gap: float | None = None,
    time_limit: float | None = None,
) -> Solution:
    """`solve_arrays` for units with names and choices with labels.

    Each group in `equal` lists units that must take the same label (one bit-width per layer); groups that share a unit
    are one group. A group is solved as one unit, whose choices are the labels that all its members have.

    Raises: as `solve_arrays`; `BudgetError` for a group with an unknown unit or without a common label; `ValueError`
    for a unit name, or a label within a unit, that occurs twice.
    """
    started = time.perf_counter()
    labels = {unit.name: {choice.label: choice for choice in unit.choices} for unit in units}
    if len(labels) != len(units):
        raise ValueError("two units have the same name")
    if twice := [unit.name for unit in units if len(labels[unit.name]) != len(unit.choices)]:
        raise ValueError(f"unit {twice[0]!r} has a label twice")

    groups = _groups(list(labels), equal or ())
    common = [[label for label in labels[g[0]] if all(label in labels[name] for name in g)] for g in groups]
    shape = len(groups), max((len(row) for row in common), default=0)
    cost_UC, size_UC = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    mask_UC = np.zeros(shape, dtype=np.bool_)
    for u, (group, row) in enumerate(zip(groups, common, strict=True)):
        if not row and len(group) > 1:
            raise BudgetError(f"units {', '.join(group[:4])} … must take the same choice but have none in common")
        for c, label in enumerate(row):
            members = [labels[name][label] for name in group]
            cost_UC[u, c] = sum(choice.cost for choice in members)
            size_UC[u, c] = sum(choice.size for choice in members)
            mask_UC[u, c] = True
    names = [group[0] if len(group) == 1 else f"{group[0]} … {group[-1]}" for group in groups]
    limits: dict[str, Any] = {"solver": solver, "gap": gap, "time_limit": time_limit}
    found = solve_arrays(cost_UC, size_UC, budget_bytes, mask_UC, names=names, **limits)
    chosen = {name: common[u][found.choice[u]] for u, group in enumerate(groups) for name in group}
    fields: dict[str, Any] = vars(found) | {"seconds": time.perf_counter() - started}
    return Solution(**fields | {"choice": {name: chosen[name] for name in labels}})


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
) -> ArraySolution:
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
    backend = "" if solver == "lagrange" else _backend(solver)
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
                at_U, proven, note = _integer(dual, kept_UF, at_U, backend, allowed, time_limit)
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
    return ArraySolution(
        size=int(front.size[rows, at_U].sum()),
        cost=cost,
        bound=bound,
        gap=0.0 if bound == cost else (cost - bound) / abs(cost) if cost else math.inf,
        solver=proved_by,
        seconds=time.perf_counter() - started,
        note=note,
        choice=front.column[rows, at_U],
    )


class _Frontier(NamedTuple):
    """Each unit's undominated choices by rising size and falling cost, left-aligned; [U, F] each."""

    column: Ints  # of the C
    size: Ints
    cost: Floats  # inf where a unit has fewer than F
    valid: Bools


@dataclass(frozen=True)
class _Dual:
    """The relaxation's solution. Sizes count from each unit's smallest choice, in steps of their common divisor.

    Only whole steps can be used up, so the budget is rounded down to one: where experts have equal sizes this alone
    makes the bound tight.
    """

    lam: float  # cost per step
    room: int  # the budget less all smallest choices, in steps
    steps: Ints  # [U, F]
    base: Ints  # [U], the relaxation's own plan, which fits; r == 0 there
    reduced: Floats  # [U, F], r; inf where there is no choice
    rest: Ints  # [N, 3], the increments that don't fit: unit, target, steps

    def unused(self, at_U: Ints) -> int:
        """What the plan leaves of the budget, in steps."""
        return self.room - int(self.steps[np.arange(len(at_U)), at_U].sum())

    def excess(self, at_U: Ints) -> float:
        """The plan's cost above the bound."""
        return math.fsum([*self.reduced[np.arange(len(at_U)), at_U].tolist(), self.lam * self.unused(at_U)])

    def kept(self, excess: float) -> Bools:
        """Which choices, other than the relaxation's, a plan of no more than this excess may contain."""
        kept_UF = self.reduced <= excess
        kept_UF[np.arange(len(self.base)), self.base] = False
        return kept_UF


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


def _relax(front: _Frontier, room: int) -> _Dual:
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
    return _Dual(lam, room, steps_UF, base, np.maximum(reduced, 0.0), rest[fit:])


def _fill_up(dual: _Dual) -> Ints:
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


def _improve(front: _Frontier, dual: _Dual, at_U: Ints) -> Ints:
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


def _integer(
    dual: _Dual, kept_UF: Bools, at_U: Ints, backend: str, allowed: float, time_limit: float | None
) -> tuple[Ints, float, str]:
    """A plan at least as good as `at_U`, the excess below which none was proven to be, and a note."""
    excess = dual.excess(at_U)
    unit, to = np.nonzero(kept_UF)
    steps, room = dual.steps[unit, to] - dual.steps[unit, dual.base[unit]], dual.unused(dual.base)
    # Coefficients up to 1e6 keep single steps well above the solvers' tolerances on the row.
    scale = max(1.0, float(np.abs(steps).max(initial=1)) / 1e6)
    proven, note, tightened = 0.0, "", 0
    for attempt in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pulp 3 announces pulp 4
            program = pulp.LpProblem("allocation", pulp.LpMinimize)
            x = [pulp.LpVariable(f"x{i}", cat="Binary") for i in range(len(unit))]
            most = math.floor(excess / dual.lam * (1 + 1e-9))  # steps, which are whole
            unused = pulp.LpVariable("unused", lowBound=0, upBound=most / scale)
            price = [*(dual.reduced[unit, to] / excess).tolist(), dual.lam * scale / excess if most else 0.0]
            program += pulp.LpAffineExpression([*zip([*x, unused], price, strict=True)])
            weight = zip(x, (steps / scale).tolist(), strict=True)
            program += pulp.LpAffineExpression([*weight, (unused, 1.0)]) == (room - tightened) / scale
            # A unit none of whose variables is 1 has the relaxation's choice.
            for low, high in itertools.pairwise(np.flatnonzero(np.diff(unit, prepend=-1, append=-1)).tolist()):
                if high - low > 1:
                    program += pulp.LpAffineExpression([(v, 1.0) for v in x[low:high]]) <= 1
            reached, said = _run(program, backend, allowed / excess, time_limit)
        if not attempt:
            proven, note = reached * excess, said
        if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            break
        chosen = np.flatnonzero([(v.value() or 0) > 0.5 for v in x])
        found = dual.base.copy()
        found[unit[chosen]] = to[chosen]
        over = -dual.unused(found)
        if over <= 0:
            at_U = found if dual.excess(found) < excess else at_U
            break
        tightened += over  # within the solver's tolerance but over the budget: ask again with less room
    best = dual.excess(at_U)
    return at_U, best if proven > best - EXACT * excess else max(proven, 0.0), note


def _run(program: Any, backend: str, allowed: float, time_limit: float | None) -> tuple[float, str]:
    """Solve in place. The lower bound that was proven, and a note if that isn't the optimum."""
    options = {"msg": False, "gapAbs": allowed, "gapRel": 0.0, "timeLimit": time_limit}
    try:
        if backend == "highs":
            program.solve(pulp.HiGHS(threads=1, mip_feasibility_tolerance=1e-9, **options))
        else:
            # By default CBC skips every plan that isn't 1e-5 better than the one it has. `threads=1` would start its
            # threaded search, which hung until the time limit in 3 of 333 runs; without, it has no threads.
            program.solve(_cbc(options=["increment 1e-9", "primalT 1e-9"], **options))
    except pulp.PulpSolverError as error:
        raise RunError(f"the solver {backend} failed: {error}") from error
    bound = program.solverModel.getInfo().mip_dual_bound if backend == "highs" else 0.0  # CBC tells only in its log
    bound = bound if math.isfinite(bound) else 0.0
    if program.sol_status == pulp.LpSolutionOptimal:
        return max(bound, float(pulp.value(program.objective)) - allowed), ""
    return bound, f"{backend} stopped before it was done (time limit: {time_limit} s): the gap is what it left open"


def _backend(solver: str) -> str:
    """`highs`, `cbc`, or for `auto` '' if there is neither; `RecipeError` if the one asked for is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if solver in ("auto", "highs") and pulp.HiGHS(msg=False).available():
            return "highs"
        if solver in ("auto", "cbc") and _cbc(msg=False).available():
            return "cbc"
    if solver == "auto":
        return ""
    package = "highspy" if solver == "highs" else "pulp[cbc]"
    raise RecipeError(f"the solver {solver!r} is not installed: pip install {package}, or take 'auto'")


def _cbc(**options: Any) -> Any:
    """CBC: bundled with pulp up to 3, an extra from 4 on."""
    return getattr(pulp, "PULP_CBC_CMD", pulp.COIN_CMD)(**options)


def _groups(names: Sequence[str], equal: Sequence[Sequence[str]]) -> list[list[str]]:
    """All names in their order, those that must be equal in one group."""
    group_of = {name: [name] for name in names}
    for wanted in equal:
        for name in wanted:
            if name not in group_of:
                raise BudgetError(f"unknown unit {name!r} among those that must be equal{nearest(name, names)}")
            group, other = group_of[wanted[0]], group_of[name]
            if group is not other:
                group += other
                group_of |= dict.fromkeys(other, group)
    order = {name: i for i, name in enumerate(names)}
    unique = {id(group): group for group in group_of.values()}
    return [sorted(group, key=order.__getitem__) for group in unique.values()]


def _human(size: int) -> str:
    """`'12.346 GB (12,345,678,901 bytes)'`."""
    return f"{size / 1e9:.3f} GB ({size:,} bytes)"

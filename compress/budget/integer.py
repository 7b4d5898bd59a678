"""The integer program behind knapsack.py: closes with pulp's solvers the gap that the relaxation leaves open.

The promise: the plan returned fits the budget in exact integer arithmetic and is no worse than the one given, whatever
the solver says; no plan has less excess than what is returned as proven; nothing of pulp is used elsewhere.

Excess, `lam` and reduced costs r are what knapsack.py says they are. Letters: U units, F undominated choices of a unit,
N increments.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

from moe_compress.errors import RecipeError, RunError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

EXACT = 1e-6  # what an integer solver's tolerances leave open, in parts of the gap that it was given to close


@dataclass(frozen=True)
class Dual:
    """The relaxation's solution. Sizes count from each unit's smallest choice, in steps of their common divisor.

    Only whole steps can be used up, so the budget is rounded down to one: where experts have equal sizes this alone
    makes the bound tight.
    """

    lam: float  # cost per step
    step: int  # bytes
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


def close_gap(
    dual: Dual, kept_UF: Bools, at_U: Ints, backend: str, allowed: float, time_limit: float | None
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
            program.solve(_Highs(threads=1, mip_feasibility_tolerance=1e-9, **options))
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


class _Highs(pulp.HiGHS):  # type: ignore[misc]
    """HiGHS without what newer ones print about themselves when they are made, before any option can be set."""

    def createAndConfigureSolver(self, lp: Any) -> None:
        """See pulp. Only this moment is unheard; from here on `msg` is obeyed."""
        heard, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 1)
            super().createAndConfigureSolver(lp)
        finally:
            os.dup2(heard, 1)
            os.close(heard)
            os.close(nowhere)


def find_backend(solver: str) -> str:
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

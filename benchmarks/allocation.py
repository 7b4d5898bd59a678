"""The allocation program at full size: this package's solver beside CBC and HiGHS on the same program, unreduced.

    python benchmarks/allocation.py [--layers 48] [--experts 128] [--limit 300] [--bits 3.0] [--only ours|highs|cbc]

Every matrix of every expert gets one of six widths (bytes at group 64) so that the sum of costs is least within the
budget: layers · experts · 3 units, six choices each. Costs fall fourfold per bit, times a sensitivity drawn lognormally
per layer, expert and matrix, times noise. `gap`: how far the plan's cost is above what the solver has proven to be the
least, relative to it; beside it, to the best bound that any of them proved.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pulp

from moe_compress.budget.knapsack import solve_arrays
from moe_compress.quant.stack import Encoding

WIDTHS = (1, 2, 3, 4, 6, 8)
HIDDEN, NEURONS, GROUP = 2048, 768, 64


def program(layers: int, experts: int, bits: float, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Costs [U, 6], sizes [U, 6] and the budget."""
    generator = np.random.default_rng(seed)
    layer = generator.lognormal(0, 0.7, (layers, 1, 1, 1))
    expert = generator.lognormal(0, 1.0, (layers, experts, 1, 1))
    matrix = generator.lognormal(0, 0.5, (layers, experts, 3, 1))
    noise = generator.lognormal(0, 0.1, (layers, experts, 3, len(WIDTHS)))
    cost = (layer * expert * matrix * noise * 4.0 ** -np.array(WIDTHS)).reshape(-1, len(WIDTHS))
    sides = ((NEURONS, HIDDEN), (NEURONS, HIDDEN), (HIDDEN, NEURONS))
    size = np.array([[Encoding(width, GROUP).matrix_bytes(*side) for width in WIDTHS] for side in sides])
    budget = int(bits * layers * experts * 3 * HIDDEN * NEURONS / 8)
    return cost, np.tile(size, (layers * experts, 1)).astype(np.int64), budget


def whole(cost: np.ndarray, size: np.ndarray, budget: int, solver: str, limit: int) -> tuple[float, float, float]:
    """Seconds, cost and proven bound of the full program by an integer solver; costs in units of their sum's scale."""
    start = time.perf_counter()
    unit = cost.min(axis=1).sum()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", DeprecationWarning)
        problem = pulp.LpProblem("allocation", pulp.LpMinimize)
        chosen = [[pulp.LpVariable(f"x{u}_{c}", cat="Binary") for c in range(cost.shape[1])] for u in range(len(cost))]
        flat = [variable for row in chosen for variable in row]
        problem += pulp.LpAffineExpression([*zip(flat, (cost / unit).flatten().tolist(), strict=True)])
        mega = (size / 1e6).flatten().tolist()
        problem += pulp.LpAffineExpression([*zip(flat, mega, strict=True)]) <= budget / 1e6
        for row in chosen:
            problem += pulp.LpAffineExpression([(variable, 1.0) for variable in row]) == 1
        log = Path(folder) / "log.txt"
        if solver == "highs":
            problem.solve(pulp.HiGHS(msg=False, threads=1, timeLimit=limit, gapRel=0.0, gapAbs=0.0))
            bound = float(problem.solverModel.getInfo().mip_dual_bound) * unit
        else:
            make = getattr(pulp, "PULP_CBC_CMD", pulp.COIN_CMD)
            problem.solve(make(msg=False, timeLimit=limit, gapRel=0.0, gapAbs=0.0, logPath=str(log)))
            told = log.read_text()
            lines = re.findall(r"(?:Lower bound|best possible|Continuous objective value is)[:\s]*([-\d.e+]+)", told)
            bound = float(lines[-1]) * unit if lines else float("nan")  # as its log prints it: eight digits
        seconds = time.perf_counter() - start
        picked = np.array([[variable.value() or 0 for variable in row] for row in chosen])
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return seconds, float("nan"), bound
    rows, columns = np.arange(len(cost)), picked.argmax(axis=1)
    over = int(size[rows, columns].sum()) - budget
    if over > 0:
        print(f"  {solver}'s plan is {over} bytes over the budget")
    value = float(cost[rows, columns].sum())
    return seconds, value, value if problem.sol_status == pulp.LpSolutionOptimal else min(bound, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--limit", type=int, default=300, help="seconds for each solver on the full program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="ours,highs,cbc")
    arguments = parser.parse_args()
    cost, size, budget = program(arguments.layers, arguments.experts, arguments.bits, arguments.seed)
    print(f"{len(cost):,} units, {cost.size:,} choices, {arguments.bits} bits, {budget:,} bytes")
    rows: list[tuple[str, float, float, float]] = []
    if "ours" in arguments.only:
        for name, options in (
            ("Lagrangian alone", {"solver": "lagrange"}),
            ("ours, to a gap of 1e-4", {}),
            ("ours, to optimality", {"gap": 0.0, "time_limit": float(arguments.limit)}),
        ):
            found = solve_arrays(cost, size, budget, **options)
            rows.append((f"{name} ({found.solver})", found.seconds, found.cost, found.bound))
    for solver in ("highs", "cbc"):
        if solver in arguments.only:
            full = whole(cost, size, budget, solver, arguments.limit)
            rows += [(f"{solver}, full program", *full)]
    best = max(bound for _, _, _, bound in rows if bound == bound)
    print(f"\n{'':36}{'seconds':>10}{'cost':>22}{'own gap':>12}{'to best bound':>16}")
    for name, seconds, value, bound in rows:
        own, common = ((value - b) / abs(value) for b in (bound, best))
        print(f"{name:36}{seconds:10.1f}{value:22.14g}{own:12.1e}{common:16.1e}", flush=True)


if __name__ == "__main__":
    main()

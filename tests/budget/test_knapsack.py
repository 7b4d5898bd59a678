"""The multiple-choice program against brute force, an independent dynamic program, and itself (every solver path)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.budget import integer, knapsack
from moe_compress.budget.knapsack import Solution, solve_arrays
from moe_compress.errors import BudgetError, RecipeError, RunError

EXACT = ("highs", "cbc")


def brute(cost: Any, size: Any, budget: int, mask: Any = None) -> float:
    """The least cost over all combinations; inf if none fits."""
    allowed = [[c for c in range(len(row)) if mask is None or mask[u][c]] for u, row in enumerate(cost)]
    best = math.inf
    for pick in itertools.product(*allowed):
        if sum(int(size[u][c]) for u, c in enumerate(pick)) <= budget:
            best = min(best, math.fsum(float(cost[u][c]) for u, c in enumerate(pick)))
    return best


def by_size(cost: Any, size: Any, budget: int) -> float:
    """The least cost by dynamic programming over exact total sizes."""
    best = [0.0] + [math.inf] * budget
    for costs, sizes in zip(cost, size, strict=True):
        step = [math.inf] * (budget + 1)
        for c, s in zip(costs, sizes, strict=True):
            for total in range(int(s), budget + 1):
                step[total] = min(step[total], best[total - int(s)] + float(c))
        best = step
    return min(best)


def assert_solved(found: Solution, cost: Any, size: Any, budget: int, best: float, *, exact: bool) -> None:
    """The plan is one, its numbers are its own, and the bound holds."""
    rows = range(len(cost))
    assert found.size == sum(int(size[u][found.choice[u]]) for u in rows) <= budget
    assert found.cost == pytest.approx(math.fsum(float(cost[u][found.choice[u]]) for u in rows), rel=1e-12, abs=1e-300)
    room = 1e-12 * max(abs(float(value)) for row in cost for value in row)
    assert found.bound <= best + room
    assert best - room <= found.cost
    assert found.bound <= found.cost
    assert found.gap == (
        0.0 if found.bound == found.cost else pytest.approx((found.cost - found.bound) / abs(found.cost))
    )
    if exact:
        assert found.cost <= best + room
        assert found.gap == 0.0


def convex(units: int, seed: int = 0) -> tuple[Any, Any]:
    """Costs like quantization errors (fourfold per bit, log-normal sensitivities), sizes of three matrix shapes."""
    rng = np.random.default_rng(seed)
    bits = np.array([1, 2, 3, 4, 5, 8])
    decay = 4.0 ** (-bits * (1 + 0.1 * rng.normal(size=(units, 1))))
    cost = np.exp(rng.normal(0, 1.5, (units, 1)) + 0.05 * rng.normal(size=(units, 6))) * decay
    weights = rng.choice([2048 * 768, 2048 * 1024, 1408 * 2048], (units, 1))
    return cost, weights * bits // 8 + weights // 128 * 2


@pytest.mark.parametrize("solver", knapsack.SOLVERS)
@pytest.mark.parametrize("seed", range(12))
def test_small_problems_agree_with_brute_force(solver: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    units, choices = int(rng.integers(1, 6)), int(rng.integers(1, 6))
    # Costs over twelve decades in half of the cases, negative ones, sizes up to 1e12 without a common divisor.
    cost = rng.normal(size=(units, choices)) * 10.0 ** rng.integers(
        -6 * (seed % 2), 6 * (seed % 2) + 1, (units, choices)
    )
    size = rng.integers(0, 10 ** (2 + seed), (units, choices))
    mask = rng.random((units, choices)) < 0.8
    mask[:, 0] = True
    least, most = np.where(mask, size, 1 << 60).min(1).sum(), np.where(mask, size, 0).max(1).sum()
    for budget in {int(least + part * (most - least)) for part in (0.0, 0.2, 0.5, 0.8, 1.0)}:
        found = solve_arrays(cost, size, budget, mask, solver=solver)
        assert mask[np.arange(units), found.choice].all()
        assert_solved(found, cost, size, budget, brute(cost, size, budget, mask), exact=solver in EXACT)
        if solver == "auto":
            assert found.gap <= knapsack.AUTO_GAP
            exact = solve_arrays(cost, size, budget, mask, gap=0.0)
            assert_solved(exact, cost, size, budget, brute(cost, size, budget, mask), exact=True)
    with pytest.raises(BudgetError):
        solve_arrays(cost, size, int(least) - 1, mask, solver=solver)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_lagrange_is_valid_and_reduction_exact(data: st.DataObject) -> None:
    """Small whole numbers make ties, duplicates, zero costs and exactly met budgets frequent."""
    units, choices = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    small = st.lists(st.lists(st.integers(0, 6), min_size=choices, max_size=choices), min_size=units, max_size=units)
    cost, size = np.array(data.draw(small), dtype=float), np.array(data.draw(small))
    budget = data.draw(st.integers(0, 30))
    best = brute(cost, size, budget)
    if best == math.inf:
        with pytest.raises(BudgetError):
            solve_arrays(cost, size, budget)
        return
    assert_solved(solve_arrays(cost, size, budget, solver="lagrange"), cost, size, budget, best, exact=False)
    assert_solved(solve_arrays(cost, size, budget, gap=0.0), cost, size, budget, best, exact=True)


@pytest.mark.parametrize("solver", EXACT)
def test_agrees_with_a_dynamic_program(solver: str) -> None:
    rng = np.random.default_rng(5)
    for units, budget in ((12, 100), (20, 260), (40, 900)):
        cost, size = rng.exponential(size=(units, 6)), rng.integers(1, 40, (units, 6))
        found = solve_arrays(cost, size, budget, solver=solver)
        assert_solved(found, cost, size, budget, by_size(cost, size, budget), exact=True)


def test_dropping_choices_loses_nothing() -> None:
    """Against the plain binary program, with none of the reductions."""
    cost, size = convex(60, seed=3)
    budget = int(size[:, 2].sum())
    program = pulp.LpProblem("plain", pulp.LpMinimize)
    x = [[pulp.LpVariable(f"x{u}_{c}", cat="Binary") for c in range(6)] for u in range(60)]
    program += pulp.lpSum(float(cost[u, c]) * x[u][c] for u in range(60) for c in range(6))
    program += pulp.lpSum(int(size[u, c]) / 1e6 * x[u][c] for u in range(60) for c in range(6)) <= budget / 1e6
    for row in x:
        program += pulp.lpSum(row) == 1
    program.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0.0, gapAbs=0.0, timeLimit=60))
    plain = pulp.value(program.objective)
    for solver in EXACT:
        found = solve_arrays(cost, size, budget, solver=solver)
        assert found.gap == 0.0
        assert found.cost == pytest.approx(plain, rel=1e-7)


def test_costs_over_twelve_decades_are_all_decided() -> None:
    """A unit whose costs are 1e-12 of another's still gets its best choice."""
    rng = np.random.default_rng(7)
    cost = np.sort(rng.random((10, 3)))[:, ::-1] * 10.0 ** np.linspace(-6, 6, 10)[:, None]
    size = np.sort(rng.integers(1, 1000, (10, 3)))
    budget = int(size[:, 0].sum() + (size[:, 2] - size[:, 0]).sum() * 0.6)
    best = min(
        (
            sorted((float(cost[u, c]) for u, c in enumerate(pick)), reverse=True)
            for pick in itertools.product(range(3), repeat=10)
            if size[np.arange(10), pick].sum() <= budget
        ),
        key=math.fsum,
    )
    for solver in EXACT:
        found = solve_arrays(cost, size, budget, solver=solver)
        assert sorted(cost[np.arange(10), found.choice].tolist(), reverse=True) == best


def test_large_problem_is_bounded_and_closed() -> None:
    cost, size = convex(20_000)
    budget = int(size[:, 2].sum() * 0.93) + 12_345
    quick = solve_arrays(cost, size, budget, solver="lagrange")
    exact = solve_arrays(cost, size, budget, solver="cbc", time_limit=60)
    assert exact.gap == 0.0
    assert quick.bound <= exact.cost <= quick.cost
    assert quick.gap < 1e-4
    assert max(quick.size, exact.size) <= budget
    auto = solve_arrays(cost, size, budget)
    assert (auto.solver, auto.cost) == ("lagrange", quick.cost)  # good enough for `auto`, which then stops


def test_equal_sizes_need_no_integer_program() -> None:
    """Only whole steps can be spent, and rounding the budget down to one makes the bound tight."""
    cost, _ = convex(500)
    size = np.broadcast_to(np.array([1, 2, 3, 4, 5, 8]) * 196_608 + 24_576, cost.shape)
    found = solve_arrays(np.minimum.accumulate(cost, 1), size, int(size[:, 2].sum()) + 99_999)
    assert (found.gap, found.solver) == (0.0, "lagrange")


def test_many_units_of_one_choice_and_the_empty_problem() -> None:
    assert solve_arrays(np.ones((1000, 1)), np.ones((1000, 1), dtype=int), 1000).cost == 1000
    empty = solve_arrays(np.zeros((0, 0)), np.zeros((0, 0), dtype=int), 0)
    assert (empty.size, empty.cost, empty.gap) == (0, 0.0, 0.0)


@pytest.mark.parametrize("solver", knapsack.SOLVERS)
def test_columns_are_those_of_the_arguments(solver: str) -> None:
    """Whatever the order of sizes and costs in a row: here the largest stands in the middle, the smallest last."""
    cost, size = np.array([[5.0, 1.0, 9.0], [0.4, 0.1, 0.5]]), np.array([[20, 40, 0], [20, 40, 0]])
    for budget, choice in ((80, [1, 1]), (60, [1, 0]), (40, [1, 2]), (0, [2, 2])):
        found = solve_arrays(cost, size, budget, solver=solver)
        assert found.choice.tolist() == choice
        assert found.size == budget
        assert found.gap == 0.0 or solver == "lagrange"


def test_first_of_identical_choices_and_zero_costs() -> None:
    cost, size = np.zeros((1, 3)), np.array([[5, 5, 4]])
    found = solve_arrays(cost, size, 10)
    assert found.choice.tolist() == [2]  # no dearer and smaller
    assert (found.cost, found.bound, found.gap) == (0.0, 0.0, 0.0)
    assert solve_arrays(cost[:, :2], size[:, :2], 10).choice.tolist() == [0]


@pytest.mark.parametrize("solver", knapsack.SOLVERS)
def test_same_problem_same_plan(solver: str) -> None:
    cost, size = convex(300, seed=1)
    cost = np.round(cost, 2)  # many ties
    budget = int(size[:, 1].sum() * 1.1)
    first, again = (solve_arrays(cost, size, budget, solver=solver) for _ in range(2))
    assert (first.choice == again.choice).all()
    assert first.bound == again.bound


def test_infeasible_says_how_little_there_is() -> None:
    with pytest.raises(BudgetError) as caught:
        solve_arrays(np.array([[1.0, 0.0]]), np.array([[3_000_000_000, 6_000_000_000]]), 2_500_000_000)
    assert str(caught.value) == (
        "the budget of 2.500 GB (2,500,000,000 bytes) is too small: "
        "the least size reachable is 3.000 GB (3,000,000,000 bytes)"
    )
    assert "\n" not in str(caught.value)
    with pytest.raises(BudgetError, match="unit 'b' has no allowed choice"):
        solve_arrays(np.ones((2, 1)), np.full((2, 1), 3), 10, np.array([[True], [False]]), names=["a", "b"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e305])
def test_costs_that_are_not_numbers(value: float) -> None:
    with pytest.raises(RunError, match=r"unit 'b' has costs that are not finite: 1\.0, "):
        solve_arrays(np.array([[1.0, 2.0], [1.0, value]]), np.full((2, 2), 3), 10, names=["a", "b"])
    # A choice that isn't allowed may cost anything.
    assert solve_arrays(np.array([[value, 1.0]]), np.ones((1, 2), dtype=int), 5, np.array([[False, True]])).cost == 1.0


def test_wrong_arguments() -> None:
    ones = np.ones((2, 2), dtype=int)
    with pytest.raises(RecipeError, match="unknown solver 'hihgs'; did you mean 'highs'"):
        solve_arrays(ones, ones, 5, solver="hihgs")
    with pytest.raises(RecipeError, match="gap must be"):
        solve_arrays(ones, ones, 5, gap=-0.1)
    with pytest.raises(ValueError, match=r"must be \[U, C\]"):
        solve_arrays(ones, ones[:1], 5)
    sizes: list[Any] = [-ones, ones * 0.5]
    for size in sizes:
        with pytest.raises(ValueError, match="whole bytes"):
            solve_arrays(ones, size, 5)
    with pytest.raises(ValueError, match="2\\*\\*62"):
        solve_arrays(ones, ones * 2**61, 5)


def hard() -> tuple[Any, Any, int]:
    """A problem whose Lagrangian plan isn't proven optimal."""
    cost = np.array([[9.0, 4.0, 0.0], [9.0, 5.0, 0.0], [8.0, 4.1, 0.0], [7.0, 3.0, 0.0]])
    size = np.array([[0, 7, 11], [0, 6, 13], [0, 5, 10], [0, 4, 9]])
    return cost, size, 26


def test_without_highspy(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, size, budget = hard()
    best = brute(cost, size, budget)
    assert solve_arrays(cost, size, budget, solver="lagrange").gap > 0
    assert solve_arrays(cost, size, budget).solver == "highs"
    monkeypatch.setattr(pulp.HiGHS, "available", lambda self: False)
    found = solve_arrays(cost, size, budget, gap=0.0)
    assert_solved(found, cost, size, budget, best, exact=True)
    assert found.solver == "cbc"
    assert 0 < solve_arrays(cost, size, budget).gap <= knapsack.AUTO_GAP
    with pytest.raises(RecipeError, match="'highs' is not installed: pip install highspy"):
        solve_arrays(cost, size, budget, solver="highs")
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "available", lambda self: False)
    found = solve_arrays(cost, size, budget)
    assert_solved(found, cost, size, budget, best, exact=False)
    assert found.solver == "lagrange"
    assert "no integer solver is installed" in found.note


def test_limits_are_noted_and_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, size, budget = hard()
    best = brute(cost, size, budget)
    monkeypatch.setattr(knapsack, "MAX_BINARIES", 1)
    found = solve_arrays(cost, size, budget)
    assert_solved(found, cost, size, budget, best, exact=False)
    assert "binaries was not started" in found.note

    def gives_up(program: Any, *_: object) -> tuple[float, str]:
        program.sol_status = pulp.LpSolutionNoSolutionFound
        return 0.0, "highs did not finish"

    def fails(*_: object) -> tuple[float, str]:
        raise RunError("the solver highs failed: no such luck")

    monkeypatch.setattr(knapsack, "MAX_BINARIES", 50)
    monkeypatch.setattr(integer, "_run", fails)
    with pytest.raises(RunError, match="no such luck"):
        solve_arrays(cost, size, budget, solver="highs")
    found = solve_arrays(cost, size, budget)
    assert_solved(found, cost, size, budget, best, exact=False)
    assert found.note == "the solver highs failed: no such luck: this is the Lagrangian plan"

    monkeypatch.setattr(integer, "_run", gives_up)
    found = solve_arrays(cost, size, budget, solver="highs")
    assert_solved(found, cost, size, budget, best, exact=False)
    assert found.note == "highs did not finish"
    assert found.solver == "lagrange"


@pytest.mark.parametrize("solver", EXACT)
def test_solvers_print_nothing(solver: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Not even from C, past Python's streams; and what is printed afterwards is."""
    assert solve_arrays(*hard(), solver=solver).solver == solver
    print("heard", flush=True)
    assert capfd.readouterr() == ("heard\n", "")


@pytest.mark.parametrize("solver", EXACT)
def test_a_time_limit_that_is_hit(solver: str) -> None:
    rng = np.random.default_rng(0)
    size = rng.integers(10**8, 10**9, (60, 4))  # strongly correlated: hard for branch and bound
    cost = -(size + 10**8).astype(float)
    budget = int(size.mean(1).sum())
    found = solve_arrays(cost, size, budget, solver=solver, time_limit=0.5)
    assert found.size <= budget
    assert found.bound <= found.cost
    assert found.seconds < 20
    if found.gap:
        assert "time limit: 0.5 s" in found.note


@pytest.mark.parametrize("solver", EXACT)
def test_asked_gap_is_kept(solver: str) -> None:
    for seed in range(4):
        cost, size = convex(30, seed)
        budget = int(size[:, 1].sum() * 1.2)
        best = solve_arrays(cost, size, budget, solver=solver).cost
        for gap in (1e-3, 0.02, 0.5):
            found = solve_arrays(cost, size, budget, solver=solver, gap=gap)
            assert found.gap <= gap * (1 + 1e-9)
            assert found.bound <= best * (1 + 1e-12)
            assert found.cost <= best * (1 + gap * 1.01)


@pytest.mark.parametrize("solver", EXACT)
def test_a_solution_within_tolerance_but_over_budget_is_not_returned(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes of 1e12 bytes, so that a row tolerance is many bytes; the solver is made to overdraw by one byte."""
    cost, size, budget = hard()
    size = size * 10**12 + np.arange(12).reshape(4, 3) % 5
    budget = budget * 10**12 + 2
    calls = []
    run = integer._run

    def overdraws(program: Any, *rest: Any) -> tuple[float, str]:
        result = run(program, *rest)
        calls.append(1)
        if len(calls) == 1:
            for variable in program.variables():
                if variable.name != "unused":
                    variable.varValue = 1.0
        return result

    monkeypatch.setattr(integer, "_run", overdraws)
    found = solve_arrays(cost, size, budget, solver=solver)
    assert calls
    assert_solved(found, cost, size, budget, brute(cost, size, budget), exact=False)

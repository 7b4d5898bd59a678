"""Who gets which width, against every allocation there is (small cases), and what presets and targets make of it."""

import itertools
import json

import numpy as np
import pytest
import torch
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mixed import Given, expert_bytes, shape_of

import moe_compress
from moe_compress.errors import BudgetError, RecipeError
from moe_compress.export.targets import find_target
from moe_compress.quant.allocate import Choices, by_layer, greedy, program, unit_of
from moe_compress.quant.costs import COSTS, cost
from moe_compress.quant.grid import WIDTHS
from moe_compress.quant.mixed import QuantizeMixed
from moe_compress.quant.options import PRESETS

UNITS = ["matrix", "expert", "projection", "layer"]


def same_unit(unit, tied, one, other):
    """Whether two matrices (expert, number) of a layer with gates share a unit, by what units are said to be."""
    alike = one[1] == other[1] or (tied and {one[1], other[1]} == {0, 1})
    return {"matrix": one[0] == other[0] and alike, "expert": one[0] == other[0], "projection": alike, "layer": True}[
        unit
    ]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("unit", UNITS)
def test_units(unit, tied):
    unit_EM = unit_of(unit, 4, 3, tied)
    every = list(itertools.product(range(4), range(3)))
    for one, other in itertools.product(every, every):
        assert (unit_EM[one] == unit_EM[other]) == same_unit(unit, tied, one, other)
    assert sorted(set(unit_EM.flatten())) == list(range(unit_EM.max() + 1))
    without_gate = unit_of(unit, 4, 2, tied)  # up and down are never tied
    assert len(set(without_gate.flatten())) == {"matrix": 8, "expert": 4, "projection": 2, "layer": 1}[unit]


def drawn(seed, unit, tied, experts=2, widths=3, protected=()):
    """Random costs per matrix (falling) and sizes (rising, different per matrix), and the choices made of them."""
    generator = np.random.default_rng(seed)
    cost_EMB = np.sort(generator.random((experts, 3, widths)))[..., ::-1] * 10.0 ** generator.uniform(
        -2, 1, (experts, 3, 1)
    )
    size_MB = np.cumsum(generator.integers(1, 9, (3, widths)), axis=1)
    return (
        cost_EMB,
        size_MB,
        Choices.of(unit_of(unit, experts, 3, tied), cost_EMB.copy(), size_MB.astype(np.int64), protected),
    )


def every_plan(unit, tied, experts, widths):
    """All [E, 3] assignments whose units are of one width."""
    matrices = list(itertools.product(range(experts), range(3)))
    for values in itertools.product(range(widths), repeat=len(matrices)):
        plan = dict(zip(matrices, values, strict=True))
        if all(plan[a] == plan[b] for a, b in itertools.combinations(matrices, 2) if same_unit(unit, tied, a, b)):
            yield np.array(values).reshape(experts, 3)


def worth(plan, cost_EMB, size_MB):
    expert, matrix = np.indices(plan.shape)
    return cost_EMB[expert, matrix, plan].sum(), size_MB[matrix, plan].sum()


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    unit=st.sampled_from(UNITS),
    tied=st.booleans(),
    share=st.floats(0.05, 0.95),
    fixed=st.booleans(),
)
def test_cheapest_of_all_plans_for_every_unit(seed, unit, tied, share, fixed):
    """Against all assignments of three widths to six matrices; the protected expert's units have the largest width."""
    protected = [1] if fixed else []
    cost_EMB, size_MB, choices = drawn(seed, unit, tied, protected=protected)
    least, most = 2 * size_MB[:, 0].sum(), 2 * size_MB[:, -1].sum()
    budget = int(least + share * (most - least))
    allowed = [
        (value, size)
        for plan in every_plan(unit, tied, 2, 3)
        if not fixed or (plan[1] == 2).all()
        for value, size in [worth(plan, cost_EMB, size_MB)]
        if size <= budget
    ]
    if not allowed:
        with pytest.raises(BudgetError):
            program({0: choices}, budget)
        return
    found = program({0: choices}, budget)
    plan = found.column_U[0][choices.unit_EM]
    value, size = worth(plan, cost_EMB, size_MB)
    assert value == pytest.approx(min(v for v, _ in allowed), rel=1e-9)
    assert size <= budget
    assert found.summary["cost"] == pytest.approx(value)
    if fixed:
        assert (plan[1] == 2).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.floats(1.0, 2.0))
def test_cover(seed, bits):
    """Somebody in every layer has each of the two largest widths; the gap bounds what the best such plan is ahead."""
    layers = {i: drawn(seed + i, "expert", False, experts=3) for i in range(2)}
    sizes = {i: size.sum(0) for i, (_, size, _) in layers.items()}
    budget = int(sum(3 * (s[0] + (bits - 1) * (s[-1] - s[0])) for s in sizes.values()))
    best = None
    for tried in itertools.product(range(3), repeat=6):
        parts = {0: tried[:3], 1: tried[3:]}
        if all({1, 2} <= set(own) for own in parts.values()):
            size = sum(sizes[i][b] for i, own in parts.items() for b in own)
            value = sum(layers[i][0][e, :, b].sum() for i, own in parts.items() for e, b in enumerate(own))
            if size <= budget:
                best = value if best is None else min(best, value)
    choices = {i: c for i, (_, _, c) in layers.items()}
    if best is None:
        with pytest.raises(BudgetError):
            program(choices, budget, cover=2)
        return
    try:
        found = program(choices, budget, cover=2)
    except BudgetError:
        return  # the units that it held didn't fit: it says so, and gives no plan that breaks a promise
    assert all({1, 2} <= set(found.column_U[i].tolist()) for i in layers)
    assert sum(sizes[i][b] for i in layers for b in found.column_U[i]) <= budget
    assert found.summary["cost"] >= best - 1e-9
    assert found.summary["cost"] - best <= found.summary["gap"] * found.summary["cost"] + 1e-9
    assert program({0: choices[0]}, budget).summary["cost"] <= program({0: choices[0]}, budget, cover=2).summary["cost"]


@pytest.mark.parametrize("unit", ["matrix", "expert"])
def test_greedy_takes_the_smallest_rise_each_time(unit):
    """Against a search of all units in every step."""
    for seed in range(5):
        layers = {i: drawn(10 * seed + i, unit, False, experts=3, widths=4, protected=[0] if i else []) for i in (0, 1)}
        choices = {i: c for i, (_, _, c) in layers.items()}
        at = {(i, u): 3 for i, c in choices.items() for u in range(len(c.cost_UB))}
        budget = int(0.6 * sum(c.size_UB[:, 3].sum() for c in choices.values()))
        while sum(choices[i].size_UB[u, b] for (i, u), b in at.items()) > budget:
            rises = {
                (choices[i].cost_UB[u, b - 1] - choices[i].cost_UB[u, b], i, u)
                for (i, u), b in at.items()
                if b and choices[i].mask_UB[u, b - 1]
            }
            _, layer, unit_number = min(rises)
            at[layer, unit_number] -= 1
        found = greedy(choices, budget)
        assert {(i, u): int(b) for i, own in found.column_U.items() for u, b in enumerate(own)} == at
        assert (found.column_U[1][np.unique(choices[1].unit_EM[0])] == 3).all()  # the protected expert
        with pytest.raises(BudgetError):
            greedy(choices, 3)


def test_each_layer_within_its_own_budget():
    layers = {i: drawn(i, "matrix", True)[2] for i in range(3)}
    budgets = {i: int(c.size_UB.sum(0).mean()) for i, c in layers.items()}
    found = by_layer(layers, budgets, program)
    for index, own in layers.items():
        alone = program({index: own}, budgets[index])
        assert found.column_U[index].tolist() == alone.column_U[index].tolist()
    assert found.summary["cost"] == pytest.approx(
        sum(program({i: c}, budgets[i]).summary["cost"] for i, c in layers.items())
    )


# ---- The pass ----


@pytest.fixture
def given_costs():
    """A cost that reads what the profile holds."""

    @cost("given", "tests", per_matrix=True)
    def evaluate(measured, asked):
        return CURRENT[asked.index]

    yield
    del COSTS["given"]


CURRENT: dict[int, torch.Tensor] = {}


def planned(shape, target="native", seed=0, **options):
    options = {"group_size": 32, "widths": [2, 3, 4, 8], "cost": "given", **options}
    step = QuantizeMixed(QuantizeMixed.Options(**options), find_target(target))
    step.forecast(shape)
    generator = torch.Generator().manual_seed(seed)
    for index, layer in shape.layers.items():
        drawn = torch.rand(layer.num_experts, 3, len(options["widths"]), generator=generator, dtype=torch.float64)
        CURRENT[index] = drawn.sort(descending=True).values
    return step.plan(Given(shape))


@pytest.mark.parametrize("unit", [None, *UNITS])
@pytest.mark.parametrize("allocation", ["program", "greedy", "uniform"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_real_bytes_for_every_unit(unit, allocation, scope, given_costs):
    """What the widths take, counted anew matrix by matrix, is what is said, and within the budget."""
    shape = shape_of(6, 8, 4, biases=40)
    plan = planned(shape, unit=unit, allocation=allocation, scope=scope, bits=3.4)
    used = 0
    for index, decision in plan.layers.items():
        layer, bits = shape.layers[index], decision["bits"]
        for expert in range(layer.num_experts):
            whole = [expert_bytes(layer, bits[name][expert], 32) - layer.biases * 2 for name in ("gate", "up", "down")]
            # All matrices of a layer have as many weights; rows are padded alike at these sizes.
            used += sum(whole) // 3 + layer.biases * 2
        widths = np.array([bits[name] for name in ("gate", "up", "down")]).T
        coarse = {"matrix": "expert", None: "expert", "projection": "layer"}
        own = coarse.get(unit, unit) if allocation == "uniform" else unit or "matrix"
        for a, b in itertools.combinations(itertools.product(range(layer.num_experts), range(3)), 2):
            assert not same_unit(own, True, a, b) or widths[a] == widths[b]
    assert plan.summary["expert_bytes"] == used <= plan.summary["budget_bytes"]
    assert json.loads(json.dumps(plan.to_json())) == plan.to_json()


def test_servers_get_one_width_per_layer(given_costs):
    """Whatever the cost is known of; a smaller unit is refused with what the target loads."""
    shape = shape_of(6, 8, 4)
    plan = planned(shape, target="vllm", bits=4.0)
    for decision in plan.layers.values():
        assert len({width for own in decision["bits"].values() for width in own}) == 1
    for unit in ("matrix", "expert", "projection"):
        with pytest.raises(RecipeError, match=r"'vllm' loads one width per layer, not per .*layer"):
            planned(shape, target="vllm", bits=4.0, unit=unit)
    with pytest.raises(RecipeError, match=r"'pmq' is known of whole experts"):
        planned(shape, bits=4.0, cost="pmq", unit="matrix")


def test_presets_are_what_papers_say():
    """And the user's own options win."""

    def options(**given):
        return QuantizeMixed.Options(bits=3, **given)

    pmq = options(preset="pmq")
    assert (pmq.cost, pmq.scope, pmq.unit, pmq.widths, pmq.cover) == ("pmq", "layer", "expert", [1, 2, 3], 2)
    assert (pmq.alpha, pmq.beta, pmq.gamma, pmq.pmq_variant) == (1, 1.5, 2, "paper")
    assert options(preset="pmq", widths=[2, 4], scope="global").widths == [2, 4]
    mxmoe = options(preset="mxmoe")
    assert (mxmoe.unit, mxmoe.tie_gate_up, mxmoe.scope, mxmoe.cost) == ("matrix", True, "layer", "norm")
    gemq = options(preset="gemq")
    assert (gemq.cost, gemq.scope, gemq.unit, gemq.widths) == ("gradient", "global", "expert", [1, 2, 3])
    alphaq = options(preset="alphaq")
    assert (alphaq.unit, alphaq.scope, alphaq.widths, alphaq.alphaq_gamma) == ("matrix", "global", [2, 3, 4, 8], 1)
    edgemoe = options(preset="edgemoe")
    assert (edgemoe.allocation, edgemoe.unit, edgemoe.widths) == ("greedy", "expert", [2, 4, 8])
    assert options(preset="quantmoe-bench").widths == [2, 4]
    for name in PRESETS:
        QuantizeMixed(options(preset=name, group_size=32), find_target("native")).forecast(shape_of(6, 8))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_native_format_takes_every_width_that_may_be_asked_for(width):
    options = QuantizeMixed.Options(bits=9, widths=[width], group_size=32)
    then = QuantizeMixed(options, find_target("native")).forecast(shape_of(6, 8))
    assert {layer.kind for layer in then.layers.values()} == {"packed"}


def test_weights_alone_need_no_text(tmp_path):
    """AlphaQ and round-to-nearest from disk to disk without calibration; what reads text is refused before any work."""
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(tmp_path / "source")

    def run(name, **options):
        recipe = {"model": str(tmp_path / "source"), "output": str(tmp_path / name), "passes": []}
        options = {"bits": 10.0, "group_size": 4, "widths": [4, 8], "method": "rtn", **options}
        recipe["passes"].append({"quantize.mixed": {"protect_super_experts": False, **options}})
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
        return moe_compress.run(tmp_path / f"{name}.yaml").report

    report = run("out", preset="alphaq")
    assert [s["name"] for s in report["stages"] if "quantize" in s["name"]] == [
        "quantize.mixed: look at weights",
        "quantize.mixed: plan",
        "quantize.mixed: apply",
    ]
    summary = report["passes"][0]["summary"]
    assert all(summary["matrices_per_width"].values())
    assert summary["expert_bytes"] <= summary["budget_bytes"]
    assert "cost: alphaq" in report["passes"][0]["notes"][0]
    for options in ({"cost": "relative"}, {"preset": "alphaq", "method": "gptq"}, {"cost": "frequency"}):
        with pytest.raises(RecipeError, match="measures the model on text"):
            run("refused", **options)

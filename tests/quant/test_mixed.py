"""`quantize.mixed`: who gets which width for given costs, and that its bytes are the file's.

What an expert costs at a width is given here (tests/quant/test_cost.py is about the costs themselves).
"""

import itertools
import json

import numpy as np
import pytest
import torch
from families import discover, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_compress
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import BudgetError, RecipeError
from moe_compress.export.targets import find_target
from moe_compress.model import MoEModel
from moe_compress.model.shape import LayerShape, ModelShape, model_shape
from moe_compress.quant import mixed
from moe_compress.quant.mixed import QuantizeMixed

WIDTHS = [1, 2, 3, 4, 8]


def expert_bytes(layer, bits, group):
    """By docs/format.md, one expert: codes in whole words per row, scales in 2 bytes, biases as they were."""

    def matrix(rows, columns):
        groups = 1 if group == -1 else columns // group
        return rows * (4 * -(-columns * bits // 32) + 2 * groups)

    sides = [(layer.intermediate, layer.hidden)] * (layer.matrices - 1) + [(layer.hidden, layer.intermediate)]
    return sum(itertools.starmap(matrix, sides)) + layer.biases * layer.weight_bytes


def shape_of(*counts, hidden=64, intermediate=(32, 96), biases=0):
    layers = {}
    for number, count in enumerate(counts):
        width = intermediate[number % len(intermediate)]
        layer = LayerShape(count, 1, None, hidden, width, 3, biases, 2, 0)
        layers[2 * number + 1] = layer.with_experts(count)
    return ModelShape(layers, 10_000)


class Given:
    """A profile with shapes; costs and super experts come from the fixtures below."""

    decoder_layers = 9

    def __init__(self, shape):
        self.shape = shape

    def of(self, layer, statistic):
        return {"maximum": torch.ones(self.shape.layers[layer].num_experts)}


def planned(shape, costs, monkeypatch, protected=None, target="native", **options):
    """The plan for costs [layer → [E, B]]."""
    options = {"group_size": 32, "widths": WIDTHS, **options}
    if target == "native":
        options = {"unit": "expert", **options}
    step = QuantizeMixed(QuantizeMixed.Options(**options), find_target(target))
    monkeypatch.setattr(QuantizeMixed, "_costs", lambda self, profile, index: costs[index])
    monkeypatch.setattr(mixed, "measured_super_experts", lambda *_: protected or {})
    step.forecast(shape)
    return step.plan(Given(shape))


def random_costs(shape, seed, widths=WIDTHS):
    """Falling with the width, as costs do; very different between experts."""
    generator = np.random.default_rng(seed)
    scale = {i: 10.0 ** generator.uniform(-3, 1, (layer.num_experts, 1)) for i, layer in shape.layers.items()}
    return {
        i: scale[i] * np.sort(generator.random((layer.num_experts, len(widths))))[:, ::-1]
        for i, layer in shape.layers.items()
    }


def total(plan, shape, group=32):
    return sum(expert_bytes(shape.layers[i], b, group) for i, own in plan.layers.items() for b in own["bits"]["down"])


def cost_of(bits, costs, widths):
    return sum(costs[i][e][widths.index(b)] for i, own in bits.items() for e, b in enumerate(own))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.floats(2.1, 8.6), fixed=st.booleans())
def test_cheapest_of_all_allocations(seed, bits, fixed):
    """Against every allocation of three widths to five experts in two layers, with and without a protected one."""
    shape, widths = shape_of(2, 3), [2, 3, 8]
    costs = random_costs(shape, seed, widths)
    protected = {3: [1]} if fixed else {}
    budget = int(bits * sum(layer.weights for layer in shape.layers.values()) / 8)
    best = None
    for choice in itertools.product(widths, repeat=5):
        tried = {1: choice[:2], 3: choice[2:]}
        size = sum(expert_bytes(shape.layers[i], b, 32) for i, own in tried.items() for b in own)
        if size <= budget and (not fixed or tried[3][1] == 8):
            cost = cost_of(tried, costs, widths)
            best = cost if best is None else min(best, cost)
    with pytest.MonkeyPatch.context() as patch:
        if best is None:
            with pytest.raises(BudgetError):
                planned(shape, costs, patch, protected, bits=bits, widths=widths)
            return
        plan = planned(shape, costs, patch, protected, bits=bits, widths=widths)
    assert cost_of({i: own["bits"]["down"] for i, own in plan.layers.items()}, costs, widths) == pytest.approx(
        best, rel=1e-9
    )
    assert total(plan, shape) <= budget
    if fixed:
        assert plan.layers[3]["bits"]["down"][1] == 8
        assert plan.layers[3]["protected"] == [1]


@pytest.mark.parametrize("allocation", ["program", "uniform"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("group", [32, 16, -1])
def test_budgets_hold(allocation, scope, group, monkeypatch):
    """In real bytes, for the whole or for each layer; and little of it is left over."""
    shape = shape_of(16, 24, 8, biases=40)
    weights = sum(layer.weights for layer in shape.layers.values())
    for bits in (2.3, 3.0, 4.7, 9.5):
        plan = planned(
            shape, random_costs(shape, 1), monkeypatch, bits=bits, allocation=allocation, scope=scope, group_size=group
        )
        used, budget = total(plan, shape, group), int(bits * weights / 8)
        assert plan.summary["expert_bytes"] == used <= plan.summary["budget_bytes"] == budget
        most = sum(la.num_experts * expert_bytes(la, 8, group) for la in shape.layers.values())
        assert used > 0.9 * min(budget, most)
        for index, own in plan.layers.items():
            assert set(own["bits"]["down"]) <= set(WIDTHS)
            layer = shape.layers[index]
            if scope == "layer" and allocation == "program":
                share = budget * layer.weights // weights
                assert sum(expert_bytes(layer, b, group) for b in own["bits"]["down"]) <= share
            if allocation == "uniform":
                assert len(set(own["bits"]["down"])) <= 2


def test_size_is_of_the_whole_checkpoint(monkeypatch):
    shape = shape_of(16, 24)
    costs = random_costs(shape, 2)
    plan = planned(shape, costs, monkeypatch, size="150 kB")
    assert total(plan, shape) + shape.other_bytes <= 150_000
    assert total(plan, shape) + shape.other_bytes > 145_000
    with pytest.raises(BudgetError, match="budget"):
        planned(shape, costs, monkeypatch, size="30 kB")
    with pytest.raises(BudgetError, match="budget"):
        planned(shape, costs, monkeypatch, size="5 kB")  # less than everything else takes


@pytest.mark.parametrize("allocation", ["program", "uniform"])
def test_one_width_per_layer_where_the_target_wants_it(allocation, monkeypatch):
    shape = shape_of(4, 6, 8, 6)
    costs = random_costs(shape, 3, [4, 8])
    settings = {"target": "sglang", "widths": [4, 8], "allocation": allocation}
    plan = planned(shape, costs, monkeypatch, bits=7.0, **settings)
    assert all(len(set(own["bits"]["down"])) == 1 for own in plan.layers.values())
    assert plan.summary["expert_bytes"] <= plan.summary["budget_bytes"]
    if allocation == "program":
        best = min(
            cost_of(tried, costs, [4, 8])
            for choice in itertools.product([4, 8], repeat=4)
            if bytes_of(tried := {i: [b] * len(costs[i]) for i, b in zip(costs, choice, strict=True)}, shape)
            <= plan.summary["budget_bytes"]
        )
        found = {i: own["bits"]["down"] for i, own in plan.layers.items()}
        assert cost_of(found, costs, [4, 8]) == pytest.approx(best, rel=1e-9)
    protected = planned(shape, costs, monkeypatch, {3: [2]}, bits=7.0, **settings)
    assert protected.layers[3]["bits"]["down"] == [8] * 6


def bytes_of(bits, shape):
    """What a server's format takes: beside codes and scales, two 32-bit integers per matrix."""
    extra = find_target("sglang").matrix_bytes
    return sum(expert_bytes(shape.layers[i], b, 32) + 3 * extra for i, own in bits.items() for b in own)


def test_super_experts_get_the_largest_width(monkeypatch):
    shape = shape_of(16, 24)
    protected = {1: [3, 7], 3: [0]}
    for allocation in ("program", "uniform"):
        plan = planned(shape, random_costs(shape, 4), monkeypatch, protected, bits=2.9, allocation=allocation)
        assert [plan.layers[1]["bits"]["down"][e] for e in (3, 7)] == [8, 8]
        assert plan.layers[3]["bits"]["down"][0] == 8
        assert plan.layers[1]["protected"] == [3, 7]
        assert total(plan, shape) <= plan.summary["budget_bytes"]
        assert any("super experts [3, 7] get 8 bits" in note for note in plan.notes)
        for row in plan.summary["layers"]:
            own = plan.layers[row["layer"]]["bits"]
            assert {w: row[f"at {w}"] for w in WIDTHS} == {w: sum(b.count(w) for b in own.values()) for w in WIDTHS}
        assert sum(row["bytes"] for row in plan.summary["layers"]) == plan.summary["expert_bytes"]
        everyone = {i: list(range(layer.num_experts)) for i, layer in shape.layers.items()}
        with pytest.raises(BudgetError):
            planned(shape, random_costs(shape, 4), monkeypatch, everyone, bits=2.9, allocation=allocation)


def test_uniform_is_spread_evenly(monkeypatch):
    """The control doesn't look at costs: the same share of the wider width in every layer."""
    shape = shape_of(16, 16, intermediate=(32,))
    plan = planned(shape, None, monkeypatch, bits=3.75, allocation="uniform", protect_super_experts=False)
    assert plan.layers[1]["bits"]["down"] == plan.layers[3]["bits"]["down"]
    assert sorted(plan.layers[1]["bits"]["down"]) == [3] * 12 + [4] * 4
    assert plan.layers[1]["bits"]["down"] == [3, 3, 3, 4] * 4
    assert total(plan, shape) == plan.summary["budget_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3.0, "group_size": 48}, "group_size 48 doesn't divide.*32 does"),
        ({"bits": 0.9}, "the budget is"),
        ({"size": "1 KB", "bits": None}, "of `size` 1 kB, what stays as it is takes 10 kB, so the budget is 0 bytes"),
        ({"bits": 3.0, "target": "transformers"}, "loads no quantized experts"),
        (
            {"bits": 6.0, "target": "sglang", "widths": [4, 8], "rotate": "down"},
            "'sglang' can't rotate.*target: native",
        ),
        (
            {"bits": 6.0, "target": "vllm", "widths": [4, 8], "rotate": "both", "unit": "layer"},
            "'vllm' can't rotate.*target: native",
        ),
        ({"bits": 6.0, "target": "sglang"}, "loads 4, 8 bits, not 1, 2, 3"),
    ],
)
def test_what_cannot_be_is_refused_by_shapes_alone(options, message, monkeypatch):
    with pytest.raises((RecipeError, BudgetError), match=message):
        planned(shape_of(4, 4), None, monkeypatch, **options)


# ---- From the plan to the file ----


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("qwen3_moe", torch.bfloat16),
        ("gpt_oss", torch.bfloat16),
        ("gpt_oss", torch.float32),
        ("nemotron_h", torch.float32),
        pytest.param(
            "muse_spark", torch.bfloat16, marks=pytest.mark.skipif("muse_spark" not in discover(), reason="too new")
        ),
    ],
)
def test_bytes_are_the_files(name, stored, tmp_path):
    """Planned, reported and measured sizes are those of the written tensors; the budget includes everything."""
    tiny_model(name).to(stored).save_pretrained(tmp_path / "source")
    before = model_shape(MoEModel.open(tmp_path / "source"))
    with Checkpoint(tmp_path / "source") as source:
        assert before.total_bytes == source.nbytes
    options = {"bits": 11.0, "group_size": 4, "widths": [4, 8], "symmetric": name != "nemotron_h"}
    options |= {"allocation": "uniform", "method": "rtn", "protect_super_experts": False}
    recipe = {
        "model": str(tmp_path / "source"),
        "output": str(tmp_path / "out"),
        "passes": [{"quantize.mixed": options}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    report = moe_compress.run(tmp_path / "recipe.yaml").report
    with Checkpoint(tmp_path / "out") as written:
        inside = [n for n in written.tensors if ".experts." in n and "norm" not in n and "shared_experts" not in n]
        experts = sum(written.tensors[n].nbytes for n in inside)
        assert report["after"]["bytes"] == written.nbytes
        assert report["after"]["expert_bytes"] == experts
    summary = report["passes"][0]["summary"]
    assert summary["expert_bytes"] == experts <= summary["budget_bytes"]
    assert model_shape(MoEModel.open(tmp_path / "out")).expert_bytes == experts

"""Narrower experts: choices against brute force, what is left computes the same sums, files that load, refusals."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from checkpoints import recipe
from families import input_batch, tiny_model
from native_reader import Native
from pydantic import ValidationError
from reference import activations_ETI, build, experts_calls, joined

import moe_compress
from moe_compress.calib.collect import MemoryStore, Profile, collect
from moe_compress.calib.neurons import NeuronSums, NeuronWeights
from moe_compress.calib.statistics import Routing
from moe_compress.calib.text import TokenBatches
from moe_compress.errors import BudgetError, RecipeError
from moe_compress.export.targets import find_target
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.backward import GradientSweep
from moe_compress.model.losses import NextToken
from moe_compress.model.shape import LayerShape, ModelShape, model_shape
from moe_compress.pipeline import plan_run, run
from moe_compress.progress import Monitor, Progress
from moe_compress.prune.neuron_criteria import NEURON_CRITERIA
from moe_compress.prune.neurons import NeuronOptions, PruneNeurons, widths_within
from moe_compress.recipe import make_recipe

FAMILIES = ["qwen3_moe", "gpt_oss", "nemotron_h"]


def prune(target="native", **options):
    return PruneNeurons(NeuronOptions(**options), find_target(target))


def profile_of(scores):
    """A profile whose criterion `output` gives these scores: layer → [E, I]."""
    store = MemoryStore()
    shapes = {}
    for layer, values in scores.items():
        energy = torch.tensor(values, dtype=torch.float64)
        store.put(layer, NeuronWeights().key, {"down": torch.ones_like(energy), "whole": energy})
        sums = {"counts": torch.ones(len(energy)), "gated_squares": energy, "gated_maximum": energy}
        store.put(layer, NeuronSums().key, sums)
        store.put(layer, Routing().key, {"counts": torch.ones(len(energy))})
        shapes[layer] = LayerShape(len(energy), 1, None, 4, energy.shape[1], 3, 0, 2, 0).with_experts(len(energy))
    return Profile(ModelShape(shapes, 0), store, len(scores))


def kept(plan):
    """Layer → expert → neurons that stay."""
    return {i: [[j for j in range(64) if int(row, 16) >> j & 1] for row in d["kept"]] for i, d in plan.layers.items()}


SCORES = {0: [[9.0, 1, 5, 7], [2, 8, 6, 0.5]], 2: [[30.0, 40, 3, 4], [50, 60, 80, 70]]}


# Choices


def test_uniform_keeps_the_best_of_every_expert():
    plan = prune(keep=0.5, criterion="output", multiple=1).plan(profile_of(SCORES))
    assert kept(plan) == {0: [[0, 3], [1, 2]], 2: [[0, 1], [2, 3]]}
    assert plan.layers[0]["lost"] == [6, 2.5]
    assert prune(neurons=1, criterion="output", multiple=1).plan(profile_of(SCORES)).summary["neurons"] == 4


def test_free_keeps_the_best_of_all():
    free = {"keep": 0.5, "criterion": "output", "width": "free"}
    plan = prune(**free, minimum=0, scope="layer").plan(profile_of(SCORES))
    assert kept(plan) == {0: [[0, 3], [1, 2]], 2: [[1], [1, 2, 3]]}
    shares = {i: torch.tensor(s) / torch.tensor(s).sum() for i, s in SCORES.items()}
    plan = prune(**free, minimum=0.25).plan(profile_of(SCORES))
    best = max(
        (choice for choice in itertools.product(range(1, 5), repeat=4) if sum(choice) == 8),
        key=lambda choice: sum(
            float(shares[i][e].sort(descending=True).values[:n].sum())
            for (i, e), n in zip(((0, 0), (0, 1), (2, 0), (2, 1)), choice, strict=True)
        ),
    )
    assert [len(k) for i in (0, 2) for k in kept(plan)[i]] == list(best)


def test_layers_get_widths_of_their_own():
    """Brute force over both layers' widths on shares of scores."""
    plan = prune(keep=0.5, criterion="output", width="layer", multiple=1, minimum=0.25).plan(profile_of(SCORES))
    shares = {i: (torch.tensor(s) / torch.tensor(s).sum()).sort(descending=True).values for i, s in SCORES.items()}
    best = max(
        ((a, 4 - a) for a in (1, 2, 3)),
        key=lambda w: sum(float(shares[i][:, :n].sum()) for i, n in zip((0, 2), w, strict=True)),
    )
    assert {i: [len(k) for k in rows] for i, rows in kept(plan).items()} == {0: [best[0]] * 2, 2: [best[1]] * 2}


@pytest.mark.parametrize("step", [1, 2])
def test_widths_within_are_the_best(step):
    generator = torch.Generator().manual_seed(step)
    prices = {i: torch.rand(2, 6, generator=generator).sort(descending=True).values for i in (0, 1)}
    found = widths_within(prices, 12, {0: step, 1: step}, {0: 2, 1: 2}, {0: 1, 1: 1})
    rows = [prices[i][r] for i in (0, 1) for r in (0, 1)]
    best = max(
        (c for c in itertools.product(range(2, 7, step), repeat=4) if sum(c) == 12),
        key=lambda c: sum(float(r[:n].sum()) for r, n in zip(rows, c, strict=True)),
    )
    assert [int(n) for i in (0, 1) for n in found[i]] == list(best)


def test_random_is_a_control():
    plans = [prune(criterion="random", keep=0.5, multiple=1, seed=s).plan(profile_of(SCORES)) for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


# Refusals


def test_options_that_cannot_be():
    with pytest.raises((ValidationError, RecipeError), match="did you mean 'heapr'"):
        prune(keep=0.5, criterion="heaper")
    with pytest.raises(ValidationError, match="may be negative"):
        prune(keep=0.5, criterion="tenp", width="free")
    with pytest.raises(ValidationError, match="either `keep`"):
        prune()
    with pytest.raises(ValidationError, match="belongs to width: free"):
        prune(keep=0.5, scope="layer")
    shape = profile_of(SCORES).shape
    with pytest.raises(RecipeError, match="different widths, which the target 'vllm' can't load"):
        prune("vllm", keep=0.5, width="layer").forecast(shape)
    with pytest.raises(RecipeError, match="have 4 neurons, 5 can't be kept"):
        prune(neurons=5).forecast(shape)
    with pytest.raises(RecipeError, match="multiples of 2"):
        prune(neurons=3, multiple=2).forecast(shape)
    with pytest.raises(BudgetError, match="keep 3 neurons at the least, and 2 on average"):
        prune(keep=0.5, width="free", minimum=0.75).forecast(shape)
    assert prune(keep=0.5).forecast(profile_of({0: [[1.0] * 768]}).shape).layers[0].intermediate == 384
    assert prune(keep=0.7).forecast(profile_of({0: [[1.0] * 768]}).shape).layers[0].intermediate == 512  # of 64


def test_families_whose_config_cannot_say_it_are_refused(tmp_path):
    model = tiny_model("deepseek_v3")
    ids = input_batch(model, 2, 12)["input_ids"]
    step = [{"prune.neurons": {"keep": 0.5, "criterion": "magnitude", "refit": False}}]
    with pytest.raises(RecipeError, match=r"'moe_intermediate_size' also sets the size of .*shared_experts"):
        moe_compress.compress(copy.deepcopy(model), passes=step, calibration=ids, target="transformers")
    result = moe_compress.compress(model, passes=step, calibration=ids)
    result.save(tmp_path / "out")
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert quantization["format_version"] == 3
    assert {b["neurons"] for b in quantization["blocks"].values()} == {8}
    loaded = moe_compress.load(tmp_path / "out")
    batch = input_batch(model)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_width_keys_are_measured():
    found = {name: MoEModel.wrap(tiny_model(name)).width_paths for name in ("qwen3_moe", "mixtral", "gemma4")}
    assert found == {
        "qwen3_moe": [("moe_intermediate_size",)],
        "mixtral": [("intermediate_size",)],
        "gemma4": [("text_config", "moe_intermediate_size")],
    }
    with pytest.raises(moe_compress.errors.UnsupportedModelError, match=r"also sets the size of .*feed_forward"):
        MoEModel.wrap(tiny_model("jamba")).width_paths  # noqa: B018


# What is left


@pytest.mark.parametrize("width", ["uniform", "free"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_is_the_sum_of_the_neurons_kept(name, width):
    """Without a refit, experts put out what the kept neurons did, computed one by one in float64."""
    model = build(name)
    view = MoEModel.wrap(model)
    layer = view.moe_layers[-1]
    block = view.block(layer)
    call = joined(experts_calls(model, [input_batch(model, 2, 12, 1)])[layer])
    activation = activations_ETI(block.experts_module, call.hidden_TH)
    weights = block.experts.weights().map(lambda w: w.double().clone())
    neurons = activation.shape[2]
    step = prune(keep=0.5, criterion="random", width=width, refit=False, multiple=8 if width == "uniform" else 1)
    store = MemoryStore()
    shape = {i: LayerShape(8, 2, None, 32, neurons, 3, 0, 4, 0) for i in view.moe_layers}
    for i in shape:
        ones = torch.ones(8, neurons, dtype=torch.float64)
        store.put(i, NeuronWeights().key, {"down": ones, "whole": ones})
        store.put(i, Routing().key, {"counts": ones[:, 0]})
    decision = step.plan(Profile(ModelShape(shape, 0), store, len(shape))).layers[layer]
    report = step.apply(block, decision, None)
    expected = torch.zeros_like(call.output_TH, dtype=torch.float64)
    for t, e, g in call.choices():
        for j in range(neurons):
            if int(decision["kept"][e], 16) >> j & 1:
                expected[t] += g * activation[e, t, j] * weights.down[e, :, j]
        if weights.down_bias is not None:
            expected[t] += g * weights.down_bias[e]
    output = block.experts_module(call.hidden_TH, call.index_TK, call.weight_TK)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    widths = [bin(int(row, 16)).count("1") for row in decision["kept"]]
    assert [r["neurons"] for r in report["experts"]] == widths
    if width == "free":
        assert block.kind == "ragged"
        assert len(set(widths)) > 1
        for e in range(8):  # each as wide as it is, its weights the neurons kept, in order
            own = block.experts.expert(e)
            places = [j for j in range(neurons) if int(decision["kept"][e], 16) >> j & 1]
            assert torch.equal(own.up.double(), weights.up[e][places])
            assert torch.equal(own.down.double(), weights.down[e][:, places])
    else:
        assert set(widths) == {FusedExperts(block.experts_module).intermediate_size}
        assert widths[0] < neurons


@pytest.mark.parametrize("ridge", [1e-6, 0.25])
@pytest.mark.parametrize("width", ["uniform", "free"])
def test_refit_is_never_worse_on_the_calibration_tokens(width, ridge):
    """A projection: measured on the block as it is at the end, against the block without refit."""
    errors = {}
    for refit in (False, True):
        model = build("qwen3_moe")
        view = MoEModel.wrap(model)
        layer = view.moe_layers[0]  # what it reads doesn't change
        batch = input_batch(model, 3, 20, 1)
        call = joined(experts_calls(model, [batch])[layer])
        step = {"keep": 0.5, "criterion": "output", "width": width, "refit": refit, "ridge": ridge}
        result = moe_compress.compress(model, passes=[{"prune.neurons": step}], calibration=batch["input_ids"])
        with torch.no_grad():
            output = view.block(layer).experts_module(call.hidden_TH, call.index_TK, call.weight_TK)
        error = float((output - call.output_TH).double().square().sum() / call.output_TH.double().square().sum())
        errors[refit] = error
        if refit:
            told = result.report["layers"][0]["passes"][0]["refit"]
            assert told["before"] == pytest.approx(errors[False], rel=1e-3)
            assert told["after"] == pytest.approx(error, rel=1e-3)
    assert errors[True] < errors[False]


def test_refit_of_experts_before_a_norm_is_skipped_and_said():
    model = build("muse_spark")
    ids = input_batch(model, 2, 12)["input_ids"]
    step = {"keep": 0.5, "criterion": "output"}
    result = moe_compress.compress(model, passes=[{"prune.neurons": step}], calibration=ids)
    assert "norm" in result.report["layers"][0]["passes"][0]["refit"]["skipped"]


# From disk


def settings(width, **more):
    return {"prune.neurons": {"keep": 0.5, "width": width, "multiple": 8 if width != "free" else None, **more}}


@pytest.mark.parametrize("width", ["uniform", "layer", "free"])
@pytest.mark.parametrize("criterion", ["fisher", "refit_in_turn"])
def test_a_run_from_disk_and_what_it_writes(small, text, tmp_path, width, criterion):
    """The bytes that were forecast, and a folder that transformers loads and that computes what the pass computed."""
    values = recipe(small, tmp_path / "out", [settings(width, criterion=criterion)], text)
    _, forecast = plan_run(make_recipe(values))
    report = run(values, monitor=Monitor(show=False)).report
    stored = sum(layer["expert_bytes"] for layer in report["layers"])
    before = sum(layer["expert_bytes_before"] for layer in report["layers"])
    assert stored == before // 2 == forecast.after.expert_bytes
    config = json.loads((tmp_path / "out/config.json").read_text())
    uniform = len({e["prune.neurons"]["neurons"] for layer in report["layers"] for e in layer["experts"]}) == 1
    assert uniform == (width == "uniform") or width == "layer"  # layers may come out alike
    assert config["moe_intermediate_size"] == (16 if uniform else 32)
    if uniform:
        assert "quantization_config" not in config
    else:
        assert config["quantization_config"]["format_version"] == 3
    assert report["after"]["bytes"] == forecast.after.total_bytes
    assert report["verification"]["loader"] == "transformers from_pretrained"


def test_the_same_plan_from_disk_and_in_memory(small):
    ids = torch.randint(3, 4000, (4, 24), generator=torch.Generator().manual_seed(0))
    text = TokenBatches(ids, [None] * 4, "digest", {})
    on_disk = MoEModel.open(small)
    loaded = type(on_disk.module).from_pretrained(small, dtype=torch.float32)
    batches = text.forwards(4)
    plans = []
    for view in (on_disk, MoEModel.wrap(loaded)):
        step, store = prune(keep=0.5, criterion="fisher", width="free"), MemoryStore()
        with GradientSweep(view, batches) as sweep:
            collect(sweep, step.statistics(), store, Progress(), NextToken(batches))
        plans.append(step.plan(Profile(model_shape(view), store, len(view.layers))))
    assert [d["kept"] for d in plans[0].layers.values()] == [d["kept"] for d in plans[1].layers.values()]


@pytest.mark.parametrize("name", FAMILIES)
def test_ragged_files_are_what_the_document_says(name, tmp_path):
    model = tiny_model(name).to(torch.bfloat16)
    ids = input_batch(model, 2, 12)["input_ids"]
    step = {"keep": 0.5, "criterion": "output", "width": "free"}
    result = moe_compress.compress(model, passes=[{"prune.neurons": step}], calibration=ids)
    result.save(tmp_path / "out")
    file = Native(tmp_path / "out")
    for layer, block in file.quantization["blocks"].items():
        module = model.get_submodule(file.prefix(layer).removesuffix("."))
        assert block["kind"] == "ragged"
        for expert, own in enumerate(file.ragged(layer)):
            held = module.expert(expert)
            assert own.keys() == {n for n, _ in held.items()}
            for n, value in held.items():
                assert np.array_equal(own[n], value.float().numpy())
    prefixes = tuple(file.prefix(i) for i in file.quantization["blocks"])
    left = {n for n in file.tensors if n.startswith(prefixes)} - file.used
    assert not left


def test_quantizing_follows_narrow_experts_but_not_ragged_ones(small, text, tmp_path):
    quantize = {
        "quantize.mixed": {"bits": 5.0, "method": "rtn", "allocation": "uniform", "group_size": 16, "widths": [4]}
    }
    narrow = settings("uniform", criterion="output")
    finished = run(recipe(small, tmp_path / "one", [narrow, quantize], text), monitor=Monitor(show=False))
    config = json.loads((finished.output / "config.json").read_text())
    assert config["moe_intermediate_size"] == 16
    assert config["quantization_config"]["format_version"] == 1
    with pytest.raises(RecipeError, match=r"quantize.mixed can't follow prune.neurons: .* are ragged already"):
        plan_run(make_recipe(recipe(small, tmp_path / "two", [settings("free"), quantize], text)))


def test_every_criterion_says_where_it_is_from():
    assert all(c.name == name and c.source and c.score.__doc__ for name, c in NEURON_CRITERIA.items())

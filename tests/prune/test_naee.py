"""NAEE against brute force: every set removed from a copy of the model, which then runs as it is."""

import copy
import functools
import itertools

import pytest
import torch
from accelerate import cpu_offload
from families import input_batch
from places import DEMO
from pydantic import ValidationError
from reference import KINDS, build, experts_calls, joined, measure
from test_criteria import asked, layer_shape, prune

from moe_compress.calib.outputs import OutputGram
from moe_compress.counts import chosen
from moe_compress.errors import RecipeError, RunError
from moe_compress.model import MoEModel
from moe_compress.model.shape import ModelShape
from moe_compress.prune import naee
from moe_compress.prune.criteria import CRITERIA
from moe_compress.prune.gram_greedy import removal_order

STEP = {"criterion": "naee", "experts": 6, "protect_super_experts": False}


@functools.cache
def model_of(name):
    return build(name, DEMO / "moe-demo")


@functools.cache
def batches_of(name):
    return [input_batch(model_of(name), 2, 8, 1), input_batch(model_of(name), 1, 6, 2)]


@functools.cache
def profile_of(name):
    return measure(MoEModel.wrap(model_of(name)), batches_of(name), [*prune(**STEP).statistics(), OutputGram()])


def outputs_of(model, name, layer):
    """What the layer's experts put out, from the model's own forward."""
    return joined(experts_calls(model, batches_of(name))[layer]).output_TH.double()


def error_of(name, layer, stay):
    """Squared error of the layer's output when these stay, layers before it as they were."""
    model = copy.deepcopy(model_of(name))
    MoEModel.wrap(model).block(layer).keep(list(stay))
    return float((outputs_of(model, name, layer) - original_of(name, layer)).square().sum())


@functools.cache
def original_of(name, layer):
    return outputs_of(model_of(name), name, layer)


@functools.cache
def brute_force(name, layer):
    """Set of six that stays → its error, for every set that the routing can do."""
    groups = (MoEModel.wrap(model_of(name)).block(layer).groups or (1,))[0]
    return {
        stay: error_of(name, layer, stay)
        for stay in itertools.combinations(range(8), 6)
        if len({sum(e // (8 // groups) == g for e in stay) for g in range(groups)}) == 1
    }


@pytest.mark.parametrize("name", [*KINDS, "olmoe", "deepseek_v4", "afmoe"])
def test_errors_equal_brute_force(name):
    """Softmax before and after top-k, sigmoids with bias and groups, hash tables, a class for no expert, …"""
    view = MoEModel.wrap(model_of(name))
    for layer in {view.moe_layers[0], view.moe_layers[-1]}:
        found = profile_of(name).of(layer, naee.SetErrors.under(prune(**STEP).options))
        energy = float(original_of(name, layer).square().sum())
        assert float(found["energy"]) == pytest.approx(energy, rel=1e-5)
        for number in range(layer % 3, len(found["kept"]), 9):
            expected = error_of(name, layer, found["kept"][number].tolist())
            assert float(found["error"][number]) == pytest.approx(expected, rel=1e-4, abs=1e-5 * energy)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_choice_equals_brute_force(name):
    layer = MoEModel.wrap(model_of(name)).moe_layers[-1]
    decision, expected = prune(**STEP).plan(profile_of(name)).layers[layer], brute_force(name, layer)
    assert tuple(decision["keep"]) == min(expected, key=expected.get)
    energy = float(original_of(name, layer).square().sum())
    for expert, score in enumerate(decision["scores"]):
        lacking = [error for stay, error in expected.items() if expert not in stay]
        assert score == pytest.approx(min(lacking) / energy, rel=1e-4)


def test_the_block_is_untouched():
    before = copy.deepcopy(model_of("deepseek_v3").state_dict())
    profile_of("deepseek_v3")
    for name, tensor in model_of("deepseek_v3").state_dict().items():
        assert torch.equal(tensor, before[name])
    assert "forward" not in vars(MoEModel.wrap(model_of("deepseek_v3")).block(1).experts_module)


def test_no_worse_than_greedy_without_routing_anew():
    """What greedy elimination removes costs at least what the best set does, both with routing anew."""
    name = "qwen3_moe"
    layer = MoEModel.wrap(model_of(name)).moe_layers[-1]
    order = removal_order(profile_of(name).of(layer, OutputGram())["gram"], 1, [])
    errors = brute_force(name, layer)
    assert errors[tuple(sorted(order[2:]))] >= min(errors.values())


@pytest.mark.parametrize(
    ("groups", "protected"), [(None, ()), (None, (2,)), (None, (1, 5)), ((2, 1), ()), ((2, 1), (0,))]
)
def test_scores_choose_the_best_set(groups, protected):
    shape = layer_shape(8, 2, groups)
    sets = torch.tensor(list(naee.admissible(shape, 4)))
    for seed in range(10):
        error = torch.rand(len(sets), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if seed > 7:
            error = (error * 4).round()  # ties
        result = {"kept": sets, "error": error, "energy": torch.tensor(7.0, dtype=torch.float64)}
        scores = CRITERIA["naee"].score({"set_errors": result}, asked(8, 4, groups, protected))
        best = min((i for i in range(len(sets)) if set(protected) <= set(sets[i].tolist())), key=lambda i: error[i])
        assert chosen(scores, 4, shape, protected) == sets[best].tolist()


def test_admissible_sets():
    assert list(naee.admissible(layer_shape(5), 3)) == list(itertools.combinations(range(5), 3))
    grouped = list(naee.admissible(layer_shape(8, 2, (2, 1)), 4))
    assert grouped == [s for s in itertools.combinations(range(8), 4) if sum(e < 4 for e in s) == 2]


def test_too_many_sets_are_refused_before_anything_is_measured():
    few, many = ModelShape({3: layer_shape(16)}, 0), ModelShape({3: layer_shape(32)}, 0)
    assert prune(criterion="naee", keep=0.5).forecast(few).layers[3].num_experts == 8
    with pytest.raises(RecipeError, match=r"layer 3 has 601080390 sets of 16 of its 32 experts.*gram_greedy"):
        prune(criterion="naee", keep=0.5).forecast(many)
    with pytest.raises(ValidationError, match="take scope: uniform, or the criterion gram_greedy"):
        prune(criterion="naee", keep=0.5, scope="global")


def test_a_router_that_decides_otherwise_is_refused(monkeypatch):
    asked_again = naee.Rerouting.coefficients
    monkeypatch.setattr(naee.Rerouting, "coefficients", lambda self, *a: asked_again(self, *a).roll(1, 1))
    with pytest.raises(RunError, match="asked again about the same tokens, decides otherwise"):
        measure(MoEModel.wrap(model_of("qwen3_moe")), batches_of("qwen3_moe"), [naee.SetErrors(experts=6)])


def test_on_a_sample():
    """Of some tokens: the same as measuring these alone would give."""
    name, sample = "qwen3_moe", 7
    settings = naee.SetErrors(experts=6, sample=sample, chunk=2)
    profile = measure(MoEModel.wrap(model_of(name)), batches_of(name), [settings])
    taken = [t for t in range(22) if (t + 1) * sample // 22 > t * sample // 22]
    layer = next(iter(profile.shape.layers))
    original = original_of(name, layer)[taken]
    found = profile.of(layer, settings)
    assert float(found["energy"]) == pytest.approx(float(original.square().sum()), rel=1e-5)
    model = copy.deepcopy(model_of(name))
    MoEModel.wrap(model).block(layer).keep(found["kept"][5].tolist())
    error = float((outputs_of(model, name, layer)[taken] - original).square().sum())
    assert float(found["error"][5]) == pytest.approx(error, rel=1e-4)


def test_with_weights_kept_elsewhere():
    """Accelerate's hooks, which would bring back the whole router, are no part of what routes anew."""
    name = "deepseek_v3"
    offloaded = cpu_offload(copy.deepcopy(model_of(name)), torch.device("cpu"))
    settings = naee.SetErrors.under(prune(**STEP).options)
    found = measure(MoEModel.wrap(offloaded), batches_of(name), [settings])
    for layer in found.shape.layers:
        expected = profile_of(name).of(layer, settings)["error"]
        torch.testing.assert_close(found.of(layer, settings)["error"], expected)

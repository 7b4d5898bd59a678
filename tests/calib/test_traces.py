"""Traces, certainty and maxima against plain loops over what the model's own forward hands to its experts."""

import functools
import math

import pytest
import torch
from families import input_batch
from places import DEMO
from reference import activations_ETI, build, experts_calls, joined, measure

from moe_compress.calib.statistics import OutputNorms
from moe_compress.calib.traces import ActivationMaxima, RouterCertainty, RoutingTrace
from moe_compress.model import MoEModel

ALL = (RoutingTrace(), RouterCertainty(), ActivationMaxima(), OutputNorms())
every = pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "zaya"])


@functools.cache
def model_of(name):
    return build(name, DEMO / "moe-demo")


@functools.cache
def batches_of(name):
    return [input_batch(model_of(name), 2, 12, 1), input_batch(model_of(name), 1, 7, 2)]


@functools.cache
def measured(name):
    return measure(MoEModel.wrap(model_of(name)), batches_of(name), ALL)


@functools.cache
def calls(name):
    return {i: joined(own) for i, own in experts_calls(model_of(name), batches_of(name)).items()}


@every
def test_a_trace_is_every_choice(name):
    for layer, call in calls(name).items():
        trace = measured(name).of(layer, RoutingTrace())
        choices = [
            (token, int(trace["index"][token, slot]), float(trace["weight"][token, slot]))
            for token in range(len(trace["index"]))
            for slot in range(trace["index"].shape[1])
            if trace["index"][token, slot] >= 0
        ]
        assert [c[:2] for c in choices] == [c[:2] for c in call.choices()]
        assert [c[2] for c in choices] == pytest.approx([c[2] for c in call.choices()], rel=1e-3)
        assert trace["sequence"].tolist() == [0] * 12 + [1] * 12 + [2] * 7
        assert (trace["index"].dtype, trace["weight"].dtype) == (torch.int16, torch.float16)


@every
def test_the_first_choice_s_share(name):
    for layer, call in calls(name).items():
        weights = {}
        for token, _, weight in call.choices():
            weights.setdefault(token, []).append(weight)
        found = measured(name).of(layer, RouterCertainty())
        assert float(found["tokens"]) == len(weights)
        assert float(found["first"]) == pytest.approx(sum(max(w) / sum(w) for w in weights.values()), rel=1e-5)


def test_entropy_is_that_of_the_softmax():
    model = model_of("qwen3_moe")
    view = MoEModel.wrap(model)
    for layer, call in calls("qwen3_moe").items():
        router = view.block(layer).router.weight.double()
        expected = 0.0
        for hidden in call.hidden_TH.double():
            shares = torch.softmax(router @ hidden, dim=0).tolist()
            expected -= sum(p * math.log(p) for p in shares)
        found = measured("qwen3_moe").of(layer, RouterCertainty())
        assert float(found["entropy"]) == pytest.approx(expected, rel=1e-5)
        assert (float(found["seen"]), int(found["classes"])) == (len(call.hidden_TH), 8)


@every
def test_maxima_are_the_largest_over_rows(name):
    view = MoEModel.wrap(model_of(name))
    for layer, call in calls(name).items():
        neurons = activations_ETI(view.block(layer).experts_module, call.hidden_TH)
        inputs, activations = [0.0] * len(neurons), [0.0] * len(neurons)
        for token, expert, _ in call.choices():
            inputs[expert] = max(inputs[expert], float(call.hidden_TH[token].abs().max()))
            activations[expert] = max(activations[expert], float(neurons[expert, token].abs().max()))
        found = measured(name).of(layer, ActivationMaxima())
        assert found["input"].tolist() == pytest.approx(inputs, rel=1e-6)
        assert found["neuron"].tolist() == pytest.approx(activations, rel=1e-4, abs=1e-6)


def test_the_largest_hidden_state_is_the_layer_s():
    model, largest = model_of("qwen3_moe"), {}
    layers = MoEModel.wrap(model).layers

    def ran(layer, output):
        largest[layer] = max(largest.get(layer, 0.0), float(output.abs().max()))

    handles = [m.register_forward_hook(lambda _, __, out, i=i: ran(i, out)) for i, m in enumerate(layers)]
    with torch.no_grad():
        for batch in batches_of("qwen3_moe"):
            model(**batch)
    for handle in handles:
        handle.remove()
    for layer in calls("qwen3_moe"):
        assert float(measured("qwen3_moe").of(layer, ActivationMaxima())["behind"]) == pytest.approx(largest[layer])

"""Rotations against their definition, element by element, and packed experts that run with one."""

import copy
from dataclasses import replace

import pytest
import torch
from families import tiny_model
from native_reader import rotation_of
from packs import put
from test_layer_rows import read

from moe_compress.calib.inputs import BlockInputs
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.dispatch import Dispatch
from moe_compress.quant.experts import quantize_experts, solve_experts
from moe_compress.quant.packed import build_packed
from moe_compress.quant.rotation import Rotation, Rotations
from moe_compress.quant.solver import SolverOptions


@pytest.mark.parametrize("size", [1, 2, 7, 8, 12, 24, 96, 256, 768, 1024])
def test_is_the_documented_matrix(size):
    rotation = Rotation.random(size, seed=3)
    matrix = torch.from_numpy(rotation_of(**rotation.to_json())).float()
    generator = torch.Generator().manual_seed(size)
    value, moment = (torch.randn(n, size, generator=generator) for n in (5, 2 * size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotation(value), value @ matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotation.back(rotation(value)), value, rtol=1e-4, atol=1e-5)
    moment = moment.T @ moment
    torch.testing.assert_close(rotation.both_sides(moment), matrix.T @ moment @ matrix, rtol=1e-4, atol=1e-3)
    assert Rotation.from_json(rotation.to_json()) == rotation
    if size > 8:
        assert Rotation.random(size, seed=4) != rotation


def test_spreads_an_outlier():
    value = torch.zeros(3, 256)
    value[:, 17] = 16.0
    torch.testing.assert_close(Rotation.random(256, 0)(value).abs(), torch.ones(3, 256))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
@pytest.mark.parametrize("rotate", ["down", "both"])
def test_packed_experts_run_rotated(name, method, rotate):
    """They compute with the weights that they say they have, which are those they were made from; also when rebuilt."""
    view = MoEModel.wrap(tiny_model(name, 0))
    block = view.block(view.moe_layers[0])
    dense = copy.deepcopy(block)
    original = {n: w.clone() for n, w in FusedExperts(block.experts_module).weights().items()}
    widths = {n: [8] * block.num_experts for n in ("gate", "up", "down") if n in original}
    quantize_experts(block, widths, SolverOptions(method=method, rotate=rotate, group_size=4), read(block))
    module = block.experts_module
    values = dict(module.weights().items())
    for projection, matrix in original.items():
        torch.testing.assert_close(values[projection], matrix, rtol=0.02, atol=float(matrix.abs().max()) * 0.02)
    put(dense, values)
    hidden = torch.randn(9, module.hidden_size, generator=torch.Generator().manual_seed(0))
    index, weight = torch.randint(0, block.num_experts, (9, 2)), torch.rand(9, 2)
    expected = dense.experts_module(hidden, index, weight)
    output = module(hidden, index, weight)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    again = build_packed(block, module.describe())
    again.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(again(hidden, index, weight), output)
    # Without any one of the rotations it would be something else.
    turned = module.rotations
    assert (turned.inward is None) == (rotate == "down")
    for less in ({"down": None}, {"inward": None}):
        again.rotations = replace(turned, **less)
        if again.rotations != turned:
            assert (again(hidden, index, weight) - output).norm() > 0.1 * output.norm()


@pytest.mark.parametrize("compensate", [False, True])
def test_is_solved_for_rotated_inputs(compensate):
    """What GPTQ is given is in the rotated basis throughout: the same as rotating weights and inputs beforehand."""
    view = MoEModel.wrap(tiny_model("qwen3_moe", 0))
    block = view.block(view.moe_layers[0])
    inputs, names = read(block), ("gate", "up", "down")
    experts = FusedExperts(block.experts_module)
    widths = {n: [3] * block.num_experts for n in names}
    turn = Rotation.random(experts.hidden_size, 5)
    options = SolverOptions(compensate=compensate, group_size=4)
    found = list(solve_experts(experts, widths, options, inputs, Rotations(inward=turn)))
    for name in ("gate", "up"):
        matrix = getattr(experts.weights(), name)
        matrix.copy_(turn(matrix))
    turned = BlockInputs()
    turned._parts.append((turn(inputs.hidden_TH), inputs.index_TK, inputs.weight_TK))
    for one, other in zip(found, solve_experts(experts, widths, options, turned), strict=True):
        assert (one.projection, one.experts) == (other.projection, other.experts)
        value, expected = one.value(torch.float32), other.value(torch.float32)
        assert (value - expected).norm() < 0.02 * expected.norm()  # sums differ by rounding: a code may flip


def test_takes_outliers_of_inputs_apart():
    """A few channels that are much larger than the others cost less after rotating than before."""
    view = MoEModel.wrap(tiny_model("qwen3_moe", 0))
    block = view.block(view.moe_layers[0])
    experts = FusedExperts(block.experts_module)
    generator = torch.Generator().manual_seed(0)
    for name in ("gate", "up"):
        getattr(experts.weights(), name)[..., :2] *= 8
    hidden = torch.randn(500, experts.hidden_size, generator=generator)
    dispatch = Dispatch.of(torch.arange(500)[:, None] % experts.num_experts, torch.ones(500, 1), experts.num_experts)
    exact = experts.activations(hidden[dispatch.token_R], dispatch)
    lost = {}
    for rotate in ("none", "both"):
        again = copy.deepcopy(block)
        widths = {n: [3] * block.num_experts for n in ("gate", "up", "down")}
        quantize_experts(again, widths, SolverOptions(method="rtn", rotate=rotate, group_size=-1), None)
        lost[rotate] = (again.experts_module.activations(hidden[dispatch.token_R], dispatch) - exact).norm()
    assert lost["both"] < 0.8 * lost["none"]

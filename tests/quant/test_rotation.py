"""Rotations against their definition, element by element, and packed experts that run with one."""

import copy

import pytest
import torch
from families import tiny_model
from native_reader import rotation_of
from packs import put
from test_layer_rows import read

from moe_compress.model import FusedExperts, MoEModel
from moe_compress.quant.experts import quantize_experts
from moe_compress.quant.packed import build_packed
from moe_compress.quant.rotation import Rotation
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
def test_packed_experts_run_rotated(name, method):
    """They compute with the weights that they say they have, which are those they were made from; also when rebuilt."""
    view = MoEModel.wrap(tiny_model(name, 0))
    block = view.block(view.moe_layers[0])
    dense = copy.deepcopy(block)
    original = {n: w.clone() for n, w in FusedExperts(block.experts_module).weights().items()}
    widths = {n: [8] * block.num_experts for n in ("gate", "up", "down") if n in original}
    quantize_experts(block, widths, SolverOptions(method=method, rotate="down", group_size=4), read(block))
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
    # Without the rotation it would be something else.
    again.rotation = None
    assert (again(hidden, index, weight) - output).norm() > 0.1 * output.norm()

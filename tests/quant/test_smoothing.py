"""Factors moved between up and down: they change nothing by themselves, and are the best of those tried.

Promise: activations, moments, factors and errors are worked out again expert by expert in float64.
"""

import copy

import pytest
import torch
from checkpoints import recipe, small_checkpoint
from families import tiny_model
from pydantic import ValidationError
from test_layer_rows import read, rows_of

from moe_compress.model import FusedExperts, MoEModel
from moe_compress.pipeline import run
from moe_compress.quant.experts import quantize_experts
from moe_compress.quant.grid import dequantize
from moe_compress.quant.options import MixedOptions
from moe_compress.quant.rtn import round_to_nearest
from moe_compress.quant.smoothing import POWERS, obstacle, smooth_neurons
from moe_compress.quant.solver import SolverOptions

RTN = SolverOptions(method="rtn", smooth="neurons", group_size=4, shrinkage=0.0, hessian="plain")


def uneven_block(name, seed=0):
    """A block whose neurons differ in strength by orders of magnitude, as those of trained models do."""
    view = MoEModel.wrap(tiny_model(name, seed))
    block = view.block(view.moe_layers[0])
    up = FusedExperts(block.experts_module).weights().up
    generator = torch.Generator().manual_seed(seed)
    up.mul_(torch.randn(up.shape[:2], generator=generator).mul(1.5).exp().unsqueeze(2))
    return block


def copies(block):
    return {n: v.clone() for n, v in FusedExperts(block.experts_module).weights().items()}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_folding_changes_nothing(method, dtype):
    block = uneven_block("qwen3_moe")
    inputs = read(block)
    module = block.experts_module.to(dtype)
    chosen = inputs.hidden_TH.to(dtype), inputs.index_TK, inputs.weight_TK.to(dtype)
    expected = module(*chosen)
    before = copies(block)
    options, fine = RTN.model_copy(update={"method": method}), torch.finfo(dtype).eps
    powers = smooth_neurons(FusedExperts(module), [3] * block.num_experts, options, inputs, 1 << 20)
    after = copies(block)
    assert set(powers) <= set(POWERS)
    assert max(powers) > 0
    factor_EI = after["down"].double().norm(dim=1) / before["down"].double().norm(dim=1)
    close = {"rtol": 2 * fine, "atol": 0}
    torch.testing.assert_close(after["down"].double(), before["down"].double() * factor_EI.unsqueeze(1), **close)
    torch.testing.assert_close(after["up"].double() * factor_EI.unsqueeze(2), before["up"].double(), **close)
    assert torch.equal(after["gate"], before["gate"])
    torch.testing.assert_close(module(*chosen), expected, rtol=16 * fine, atol=4 * fine * float(expected.abs().max()))
    assert factor_EI.max() > 1.1
    assert factor_EI.min() < 0.9


@torch.no_grad()
def test_takes_the_best_of_all_powers():
    """Against every power tried by itself, on each expert's own tokens."""
    block = uneven_block("qwen3_moe")
    inputs, before = read(block), copies(block)
    width_E = [2 + e % 2 for e in range(block.num_experts)]
    found = smooth_neurons(FusedExperts(block.experts_module), width_E, RTN, inputs, 1 << 15)
    after = copies(block)
    for expert in range(1, block.num_experts):
        token, _ = rows_of(inputs, expert)
        read_RH = inputs.hidden_TH[token].double()
        gate, up, down = (before[n][expert].double() for n in ("gate", "up", "down"))
        activation_RI = torch.nn.functional.silu(read_RH @ gate.T) * (read_RH @ up.T)
        root_I = activation_RI.square().mean(0).sqrt()
        log_I = torch.where(root_I > 0, root_I, 1).log2()
        lost, factors = {}, {}
        for power in POWERS:
            factor_I = torch.exp2(power * (log_I - log_I.mean()))
            quantized = dequantize(round_to_nearest((down * factor_I).float(), RTN.grid(width_E[expert])))
            lost[power] = float(((quantized.double() / factor_I - down) @ activation_RI.T).square().sum())
            factors[power] = factor_I
        assert lost[found[expert]] <= min(lost.values()) * (1 + 1e-4)
        expected = (factors[found[expert]] * down).float()
        torch.testing.assert_close(after["down"][expert], expected, rtol=1e-4, atol=0)
    assert len(set(found[1:])) > 1


@torch.no_grad()
@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
def test_lowers_the_error_of_outputs(method):
    """On other tokens than those it was found on; gate and up lose what they did."""
    block = uneven_block("qwen3_moe")
    inputs = read(block, tokens=400)
    hidden = torch.randn(300, inputs.hidden_TH.shape[1], generator=torch.Generator().manual_seed(9))
    index = (torch.arange(600) % (block.num_experts - 2) + 2).view(300, 2)
    weight = torch.ones(300, 2)
    exact = block.experts_module(hidden, index, weight)
    lost, values = {}, {}
    for smooth in ("none", "neurons"):
        own = copy.deepcopy(block)
        widths = {n: [3 if n == "down" else 8] * block.num_experts for n in ("gate", "up", "down")}
        options = SolverOptions(method=method, smooth=smooth, group_size=8)
        report = quantize_experts(own, widths, options, inputs)
        assert all(("smoothing" in entry) == (smooth == "neurons") for entry in report)
        lost[smooth] = (own.experts_module(hidden, index, weight) - exact).norm()
        values[smooth] = dict(own.experts_module.weights().items())
    assert lost["neurons"] < 0.9 * lost["none"]
    if method == "rtn":
        assert torch.equal(values["none"]["gate"], values["neurons"]["gate"])
        exact_up = FusedExperts(block.experts_module).weights().up
        relative = []
        for value in values.values():
            ratio_EI = (exact_up * value["up"]).sum(2) / value["up"].square().sum(2)
            difference = value["up"] * ratio_EI.unsqueeze(2) - exact_up
            relative.append((difference.norm(dim=2) / exact_up.norm(dim=2)).mean())
        assert 0.95 * relative[0] < relative[1] < 1.05 * relative[0]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
@torch.no_grad()
def test_only_where_activations_are_proportional(name):
    """gpt-oss clamps what up gives and adds 1; Nemotron squares it: nothing is touched, and the report says why."""
    block = uneven_block(name)
    experts = FusedExperts(block.experts_module)
    refused = name in ("gpt_oss", "nemotron_h")
    assert bool(obstacle(experts)) == refused
    if not refused:
        return
    before = copies(block)
    said = smooth_neurons(experts, [3] * block.num_experts, RTN, read(block), 1 << 20)
    assert "aren't proportional to what up projections give" in said
    assert all(torch.equal(value, before[n]) for n, value in copies(block).items())
    widths = {n: [8] * block.num_experts for n, _ in experts.weights().matrices()}
    assert {entry["smoothing"] for entry in quantize_experts(block, widths, RTN, read(block))} == {said}


@pytest.mark.parametrize("target", ["native", "vllm"])
def test_every_target_gets_it_folded_into_the_weights(target, tmp_path, text):
    """A whole run: what the file's experts are is what the source's are with factors, and computes the same."""
    source = small_checkpoint(tmp_path / "small")
    step = {"bits": 9.0, "widths": [8], "method": "rtn", "allocation": "uniform", "group_size": 32, "smooth": "neurons"}
    step["protect_super_experts"] = False
    finished = run(recipe(source, tmp_path / "out", [{"quantize.mixed": step}], text, target=target))
    powers = [e["quantize.mixed"]["smoothing"] for layer in finished.report["layers"] for e in layer["experts"]]
    assert set(powers) <= set(POWERS)
    assert any(powers)
    before, after = MoEModel.open(source), MoEModel.open(tmp_path / "out")
    for index in before.moe_layers:
        with before.layer(index) as one, after.layer(index) as other:
            exact, found = ({n: v.detach().clone() for n, v in o.block.experts.weights().items()} for o in (one, other))
        factor_EI = found["down"].norm(dim=1) / exact["down"].norm(dim=1)
        assert [float((f - 1).abs().max()) > 0.015 for f in factor_EI] == [p > 0 for p in powers[: len(factor_EI)]]
        powers = powers[len(factor_EI) :]
        for name, scaled in (
            ("gate", exact["gate"]),
            ("up", exact["up"] / factor_EI.unsqueeze(2)),
            ("down", exact["down"] * factor_EI.unsqueeze(1)),
        ):
            assert (found[name] - scaled).norm() < 0.02 * scaled.norm()
    assert max(finished.report["after"]["kl"].values()) < 0.01


def test_not_with_rotated_activations():
    with pytest.raises(ValidationError, match=r"`smooth: neurons`.*`rotate: none`"):
        MixedOptions(bits=3.0, smooth="neurons", rotate="down")

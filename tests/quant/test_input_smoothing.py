"""Factors moved from the norm before a block to what reads it: found by the rule, chosen by the error, kept everywhere.

Promise: factors and errors are worked out again in plain float64 loops; that moving changes nothing is tested in
tests/model/test_reading.py.
"""

import json

import pytest
import torch
from families import tiny_model
from pydantic import ValidationError
from test_layer_rows import read, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import RecipeError
from moe_compress.export.targets import find_target
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.reading import move_factors
from moe_compress.model.shape import model_shape
from moe_compress.quant import input_smoothing
from moe_compress.quant.experts import quantize_experts
from moe_compress.quant.float8 import quantized_inputs
from moe_compress.quant.grid import dequantize
from moe_compress.quant.input_smoothing import (
    EXPONENTS,
    input_errors,
    left_out,
    magnitudes,
    merged,
    scheme_errors,
    smooth_inputs,
)
from moe_compress.quant.mixed import QuantizeMixed
from moe_compress.quant.options import MixedOptions
from moe_compress.quant.rtn import round_to_nearest
from moe_compress.quant.scheme import SchemeOptions
from moe_compress.quant.solver import SolverOptions

RTN = SolverOptions(method="rtn", smooth="input", group_size=8, shrinkage=0.0)
OUTLIERS = torch.ones(32, dtype=torch.float64).index_fill(0, torch.tensor([3, 17]), 30.0)


def block_of(name="qwen2_moe"):
    view = MoEModel.wrap(tiny_model(name))
    index = view.moe_layers[0]
    return view, view.block(index), view.reads[index]


def plant(block, reads, inputs):
    """Two channels of what the block reads 30 times as large, what reads them as much smaller: the same function."""
    move_factors(block, reads, 1 / OUTLIERS)
    inputs._parts = [((hidden * OUTLIERS).float(), *rest) for hidden, *rest in inputs._parts]


def smoothed(block, options, inputs, widths):
    return smooth_inputs(
        block, options, inputs, lambda f: input_errors(block, f, [widths], options, inputs, 1 << 15)[0]
    )["input_smoothing"]


def rounded(value, bits):
    return dequantize(round_to_nearest(value.float(), RTN.grid(bits))).double()


@torch.no_grad()
@pytest.mark.parametrize("merge", ["max", "mean"])
def test_factors_by_hand(merge):
    """Expert by expert, the router, both projections of the shared expert, not its gate; expert 0 reads nothing."""
    _, block, reads = block_of()
    inputs = read(block)
    inputs.hidden_TH[:, 7] = 0
    weights = FusedExperts(block.experts_module).weights()
    branches = []
    for expert in range(1, block.num_experts):
        matrices = torch.cat([weights.gate[expert], weights.up[expert]]).double()
        branches.append((inputs.hidden_TH[rows_of(inputs, expert)[0]].double(), matrices))
    shared = block.parent.shared_expert
    others = (block.router, shared.gate_proj, shared.up_proj)
    branches += [(inputs.hidden_TH.double(), linear.weight.double()) for linear in others]
    own = [c for c in range(32) if c != 7]
    logs = []
    for rows_RH, matrix_OH in branches:
        values = [
            0.6 * float(rows_RH[:, c].abs().max().log2()) - 0.4 * float(matrix_OH[:, c].abs().max().log2()) for c in own
        ]
        logs.append([v - sum(values) / len(values) for v in values])
    joined = [max(column) if merge == "max" else sum(column) / len(column) for column in zip(*logs, strict=True)]
    middle = sum(joined) / len(joined)
    found_H = merged(*magnitudes(block, reads, inputs), 0.6, merge)
    assert found_H[7] == 1
    torch.testing.assert_close(found_H[own], torch.tensor([2 ** (v - middle) for v in joined], dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("merge", ["max", "mean"])
def test_a_layer_that_reads_nothing_gets_no_factors(merge):
    """A norm of zeros, as in layers that are made to do nothing."""
    _, block, _ = block_of()
    inputs = read(block)
    inputs.hidden_TH.zero_()
    options = RTN.model_copy(update={"smooth_merge": merge})
    said = smoothed(block, options, inputs, {n: [3] * block.num_experts for n in ("gate", "up", "down")})
    assert said == {"exponent": None, "factors": [1.0, 1.0], "error_before": 0.0, "error_after": 0.0}


@torch.no_grad()
def test_errors_by_hand():
    """Every row of every expert, by its squared routing weight; widths differ by expert and projection."""
    _, block, _ = block_of()
    inputs, count = read(block), block.num_experts
    widths = {"gate": [2 + e % 2 for e in range(count)], "up": [2 + e % 3 for e in range(count)], "down": [8] * count}
    factor_PH = torch.stack([torch.ones(32), torch.rand(32, generator=torch.Generator().manual_seed(3)) + 0.5]).double()
    weights = FusedExperts(block.experts_module).weights()
    gate_R = torch.cat([rows_of(inputs, e)[1] for e in range(count)])
    expected = []
    for factor_H in factor_PH:
        error = 0.0
        for expert in range(count):
            token, weight_R = rows_of(inputs, expert)
            for name in ("gate", "up"):
                matrix = getattr(weights, name)[expert].double()
                change = rounded(matrix * factor_H, widths[name][expert]) / factor_H - matrix
                for t, w in zip(token, weight_R, strict=True):
                    error += float(w**2 * (change @ inputs.hidden_TH[t].double()).square().sum())
        expected.append(error / float((gate_R**2).mean()))
    found = input_errors(block, factor_PH, [widths], RTN, inputs, 1 << 15)[0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


@torch.no_grad()
def test_takes_the_best_of_what_is_tried():
    _, block, reads = block_of()
    inputs = read(block)
    plant(block, reads, inputs)
    widths = {n: [3] * block.num_experts for n in ("gate", "up", "down")}
    alone = {}
    for exponent in EXPONENTS:
        factor_H = merged(*magnitudes(block, reads, inputs), exponent, "mean")
        alone[exponent] = float(input_errors(block, factor_H[None], [widths], RTN, inputs, 1 << 20))
    said = smoothed(block, RTN, inputs, widths)
    assert said["exponent"] == min(alone, key=alone.get)
    assert said["error_after"] == pytest.approx(min(alone.values()), rel=1e-3)
    assert said["error_after"] < 0.5 * said["error_before"]
    again = inputs.hidden_TH / merged(*magnitudes(block, reads, inputs), 0.5, "mean").float()
    assert again.abs().max() <= inputs.hidden_TH.abs().max()


@torch.no_grad()
def test_does_nothing_where_nothing_is_gained_and_what_it_is_told():
    _, block, _ = block_of()
    inputs = read(block)
    before = {n: v.clone() for n, v in block.module.state_dict().items()}
    said = smooth_inputs(block, RTN, inputs, lambda f: torch.arange(len(f)))["input_smoothing"]
    assert said == {"exponent": None, "factors": [1.0, 1.0], "error_before": 0.0, "error_after": 0.0}
    assert all(torch.equal(v, before[n]) for n, v in block.module.state_dict().items())
    assert block.changed_beside == []
    fixed = RTN.model_copy(update={"smooth_exponent": 0.6})
    said = smooth_inputs(block, fixed, inputs, lambda f: torch.arange(len(f)))["input_smoothing"]
    assert (said["exponent"], said["error_before"], said["error_after"]) == (0.6, 0.0, 1.0)
    assert not torch.equal(block.router.weight, before["mlp.gate.weight"])


@torch.no_grad()
@pytest.mark.parametrize("merge", ["max", "mean"])
def test_outliers_cost_nothing_any_more(merge):
    """What experts put out on other tokens, at 4 bits: planted outliers lose much, smoothed about what there was."""
    lost = {}
    for how in ("none", "planted", "smoothed"):
        _, block, reads = block_of()
        inputs, other = read(block, tokens=300), read(block, tokens=200, seed=5)
        exact = block.experts_module(other.hidden_TH, other.index_TK, other.weight_TK)
        widths = {n: [8 if n == "down" else 4] * block.num_experts for n in ("gate", "up", "down")}
        options = RTN.model_copy(update={"smooth_merge": merge, "group_size": -1})
        hidden_TH = other.hidden_TH
        if how != "none":
            plant(block, reads, inputs)
            hidden_TH = (hidden_TH * OUTLIERS).float()
        if how == "smoothed":
            moved = block.module.post_attention_layernorm.weight.clone()
            smoothed(block, options, inputs, widths)
            hidden_TH = hidden_TH * block.module.post_attention_layernorm.weight / moved
        quantize_experts(block, widths, options, None)
        lost[how] = float((block.experts_module(hidden_TH, other.index_TK, other.weight_TK) - exact).norm())
    assert lost["planted"] > 2 * lost["none"]
    assert lost["smoothed"] < (1.2 if merge == "max" else 1.05) * lost["none"]


@torch.no_grad()
def test_activations_of_a_token_lose_their_outliers():
    """Products in 8 bits, inputs too, with a scale per token: by a loop over rows, and what smoothing takes off."""
    _, block, reads = block_of()
    inputs = read(block)
    plant(block, reads, inputs)
    factor_PH = torch.stack([torch.ones(32), merged(*magnitudes(block, reads, inputs), 0.5, "mean")]).double()

    def stored(value):
        return dequantize(round_to_nearest(value, SolverOptions(group_size=-1).grid(8)), torch.float32)

    def eight_bits(rows):
        return quantized_inputs(rows, -1, False)

    found = scheme_errors(block, factor_PH, inputs, stored, eight_bits, 1 << 15)
    weights = FusedExperts(block.experts_module).weights()
    gate_R = torch.cat([rows_of(inputs, e)[1] for e in range(block.num_experts)])
    expected = []
    for factor_H in factor_PH:
        error = 0.0
        for expert in range(block.num_experts):
            token, weight_R = rows_of(inputs, expert)
            for name in ("gate", "up"):
                matrix = getattr(weights, name)[expert].double()
                kept = stored((matrix * factor_H).float()).double()
                for t, w in zip(token, weight_R, strict=True):
                    row = inputs.hidden_TH[t].double() / factor_H
                    step = row.abs().max() / 127
                    change = kept @ ((row / step).round() * step) - matrix @ (row * factor_H)
                    error += float(w**2 * change.square().sum())
        expected.append(error / float((gate_R**2).mean()))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-2, atol=0)
    assert found[1] < found[0] / 20


# --- whole runs --------------------------------------------------------------------------------------------------


WIDE = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory, demo_model):
    """A tiny model with shared experts, outliers in what its blocks read, and the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    view = MoEModel.wrap(tiny_model("qwen2_moe", vocab_size=len(tokenizer), **WIDE))
    for index in view.moe_layers:
        move_factors(view.block(index), view.reads[index], 1 / OUTLIERS)
    view.module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tensors_of(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.get(name) for name in checkpoint.tensors}


PLAIN = {"bits": 6.5, "widths": [4], "allocation": "uniform", "group_size": 8, "protect_super_experts": False}
CHOSEN = {"allocation": "program", "widths": [3, 4], "dense_widths": [4, 6]}
EVERYTHING = ["experts", "attention", "shared_experts"]
HEAL = {"heal.router": {"epochs": 1}}
ROUTER, NORM = "mlp.gate.weight", "post_attention_layernorm.weight"
SHARED = "mlp.shared_expert.gate_proj"


@pytest.mark.parametrize(
    ("target", "passes"),
    [
        (
            "native",
            [{"quantize.mixed": {**PLAIN, **CHOSEN, "smooth": "both", "include": EVERYTHING}}],
        ),
        ("native", [{"quantize.mixed": {**PLAIN, "smooth": "input"}}, HEAL]),
        ("vllm", [{"quantize.mixed": {**PLAIN, "group_size": 32, "smooth": "input", "method": "rtn"}}]),
        ("vllm", [{"quantize.scheme": {"scheme": "w8a8", "smooth": "input"}}]),
    ],
)
def test_from_disk_as_in_memory_and_what_the_file_holds(target, passes, source, calibration, tmp_path):
    """Norms are divided by what routers and shared experts, dense or packed, are multiplied with; the rest stays."""
    values = {"model": str(source), "output": str(tmp_path / "disk"), "passes": passes, "calibration": calibration}
    report = moe_compress.run({**values, "target": target}).report
    assert report["verification"]["distance"] < 1e-3
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    result = moe_compress.compress(
        model,
        tokenizer=AutoTokenizer.from_pretrained(source),
        passes=passes,
        calibration=calibration,
        target=target,
        original=source,
    )
    result.save(tmp_path / "memory")
    disk, memory, before = (tensors_of(f) for f in (tmp_path / "disk", tmp_path / "memory", source))
    assert disk.keys() == memory.keys()
    assert all(torch.equal(disk[n], memory[n]) for n in disk)
    for layer in report["layers"]:
        said = layer["passes"][0]["input_smoothing"]
        assert said["error_after"] < said["error_before"]
        prefix = f"model.layers.{layer['layer']}."
        factor_H = before[prefix + NORM] / disk[prefix + NORM]
        assert factor_H.max() / factor_H.min() > 5
        assert [float(factor_H.min()), float(factor_H.max())] == pytest.approx(said["factors"], rel=1e-4)
        if HEAL not in passes:
            torch.testing.assert_close(disk[prefix + ROUTER], before[prefix + ROUTER] * factor_H)
        if f"{prefix}{SHARED}.weight" in disk:
            expected = before[f"{prefix}{SHARED}.weight"] * factor_H
            torch.testing.assert_close(disk[f"{prefix}{SHARED}.weight"], expected)
    if "include" in next(iter(passes[0].values())):
        assert f"model.layers.0.{SHARED}.weight" not in disk
        with MoEModel.open(tmp_path / "disk").layer(0) as layer:
            found = layer.module.get_submodule(SHARED).weight
        factor_H = before[f"model.layers.0.{NORM}"] / disk[f"model.layers.0.{NORM}"]
        expected = before[f"model.layers.0.{SHARED}.weight"] * factor_H
        assert (found - expected).norm() < 0.1 * expected.norm()
    blocks = json.loads((tmp_path / "disk" / "config.json").read_text())["quantization_config"].get("blocks", {})
    assert not any("beside" in block for block in blocks.values())
    touched = (NORM, ROUTER, "experts", "shared_expert", "self_attn")
    rest = [n for n in before if not any(part in n for part in touched)]
    assert all(torch.equal(disk[n], before[n]) for n in rest)


# --- what can't be -----------------------------------------------------------------------------------------------


def test_refused_by_name_before_any_work():
    options = MixedOptions(bits=7, smooth="input", group_size=8, allocation="uniform", widths=[4])
    step = QuantizeMixed(options, find_target("native"))
    step.forecast(model_shape(MoEModel.wrap(tiny_model("qwen3_moe"))))
    for name, reason in (("minimax", "also goes into mul"), ("flex_olmo", "no norm with a weight")):
        with pytest.raises(RecipeError, match=rf"`smooth` can't change .* layer 0: .*{reason}.*; set `smooth: none`"):
            step.forecast(model_shape(MoEModel.wrap(tiny_model(name))))


@torch.no_grad()
def test_a_layer_where_it_cannot_be_stays_and_is_noted():
    view, block, _ = block_of()
    shape = model_shape(view)
    object.__setattr__(shape, "reads", {**shape.reads, block.layer: "its norm is another's"})
    assert left_out(shape) == [f"what experts of layers [{block.layer}] read isn't smoothed: its norm is another's"]
    input_smoothing.check_reachable("quantize.mixed", shape)
    norm = block.module.post_attention_layernorm.weight.clone()
    block._reads = lambda: shape.reads[block.layer]
    said = smooth_inputs(block, RTN, read(block), lambda f: pytest.fail("nothing is to be tried"))
    assert said == {"input_smoothing": "its norm is another's"}
    assert torch.equal(norm, block.module.post_attention_layernorm.weight)
    layers = {i: layer.__class__(**{**vars(layer), "rules": ("learned",)}) for i, layer in shape.layers.items()}
    with pytest.raises(RecipeError, match="its rule learned reads what its experts read"):
        input_smoothing.check_reachable("quantize.mixed", shape.with_layers(layers))


def test_options_that_go_together():
    MixedOptions(bits=3.0, smooth="input", rotate="down", smooth_exponent=0.5)
    for wrong, message in (
        ({"smooth": "both", "rotate": "down"}, "`smooth: both`.*`rotate: none`"),
        ({"smooth": "input", "rotate": "both"}, "`smooth: input`.*`rotate: down`"),
        ({"smooth": "neurons", "smooth_exponent": 0.5}, "add `smooth: input`"),
    ):
        with pytest.raises(ValidationError, match=message):
            MixedOptions(bits=3.0, **wrong)
    with pytest.raises(ValidationError, match="add `smooth: input`"):
        SchemeOptions(scheme="w8a8", smooth_exponent=0.5)

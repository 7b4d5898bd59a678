"""Experts replaced by their mean output: against plain loops, the file, and what MoNE claims of the mean."""

import json

import numpy as np
import pytest
import torch
from checkpoints import recipe
from families import input_batch
from native_reader import Native
from pydantic import ValidationError
from reference import activations_ETI, build, experts_calls, joined, outputs_ETH
from test_criteria import prune

import moe_compress
from moe_compress import refit
from moe_compress.calib.inputs import BlockInputs
from moe_compress.errors import RecipeError, UnsupportedModelError
from moe_compress.model import MoEModel
from moe_compress.model.sweep import Sweep
from moe_compress.pipeline import plan_run, run
from moe_compress.progress import Monitor
from moe_compress.prune.novices import put_means
from moe_compress.recipe import make_recipe

STEP = {"criterion": "mone", "experts": 6, "replace": "mean", "protect_super_experts": False}


def batches_of(model):
    return [input_batch(model, 2, 12, 1), input_batch(model, 1, 9, 2)]


def replaced(model, removed, weight_of=None, ridge=None, protected=()):
    """The first MoE layer's block with these replaced, and what it read; and the experts before that, by reference."""
    view, batches = MoEModel.wrap(model), batches_of(model)
    layer = view.moe_layers[0]
    call = joined(experts_calls(model, batches)[layer])
    each = outputs_ETH(view.block(layer).experts_module, call.hidden_TH)
    inputs = BlockInputs()
    with Sweep(view, batches) as sweep:
        for at in sweep:
            if at.index == layer:
                at.run(inputs.observe)
    if weight_of is not None:
        inputs._counted, inputs._weighed = [weight_of(len(call.hidden_TH))], True
    with torch.no_grad():
        unseen, told = put_means(view.block(layer), removed, inputs, ridge, protected)
    assert (told is None) == (ridge is None)
    return view.block(layer), call, each, unseen


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_the_block_puts_out_means_where_experts_were(name, weighed):
    def weight_of(tokens):
        return (torch.arange(tokens) % 3).double() if weighed else torch.ones(tokens).double()

    removed = [1, 4, 6]
    block, call, each, unseen = replaced(build(name), removed, weight_of if weighed else None)
    weight = weight_of(len(call.hidden_TH))
    rows = [[] for _ in each]
    for token, expert, _ in call.choices():
        rows[expert].append(token)
    expected = torch.zeros_like(call.output_TH, dtype=torch.float64)
    for token, expert, gate in call.choices():
        output = each[expert, token]
        if expert in removed:
            total = sum(float(weight[t]) for t in rows[expert])
            output = sum(weight[t] * each[expert, t] for t in rows[expert]) / total if total else output * 0
        expected[token] += gate * output
    found = block.experts_module(call.hidden_TH, call.index_TK, call.weight_TK)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert unseen == [e for e in removed if sum(float(weight[t]) for t in rows[e]) == 0]
    assert block.kind == "ragged"
    assert [w > 0 for w in block.experts.widths] == [e not in removed for e in range(8)]


def test_no_other_vector_is_nearer_to_the_experts_outputs():
    """Over its tokens the mean is the constant with the least squared error: any step away from it adds n·‖step‖²."""
    block, call, each, _ = replaced(build("qwen3_moe"), [2])
    tokens = [t for t, e, _ in call.choices() if e == 2]
    mean = block.experts.weights().down_bias[2].double()
    step = torch.randn(len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    least, more = ((each[2, tokens] - v).square().sum() for v in (mean, mean + step))
    assert float(more - least) == pytest.approx(len(tokens) * float(step.square().sum()), rel=1e-4)


def test_a_constant_expert_can_go_without_a_trace():
    """Of experts that put out the same for every token MoNE's criterion takes the first to go; nothing changes."""
    model = build("gpt_oss")
    for layer in MoEModel.wrap(model).moe_layers:
        experts = MoEModel.wrap(model).block(layer).experts_module
        experts.down_proj.data[[3, 5]] = 0
    batch = batches_of(model)[0]
    before = model(**batch).logits
    result = moe_compress.compress(model, passes=[{"prune.experts": STEP}], calibration=batch["input_ids"])
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
    assert all(len(layer["passes"][0]["replaced"]) == 2 for layer in result.report["layers"])


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_the_others_are_solved_for_what_the_means_leave(name, weighed, monkeypatch):
    """Dense least squares, float64, unknowns of the experts that stay but for a protected one."""
    monkeypatch.setattr(refit, "_TOLERANCE", 1e-6)

    def weight_of(tokens):
        return (torch.arange(tokens) % 3).double() if weighed else torch.ones(tokens).double()

    removed, protected, ridge = [1, 4, 6], [2], 0.5
    original = build(name)
    before = MoEModel.wrap(original).block(MoEModel.wrap(original).moe_layers[0]).experts.weights().map(torch.clone)
    activation = activations_ETI(
        MoEModel.wrap(original).block(MoEModel.wrap(original).moe_layers[0]).experts_module,
        joined(experts_calls(original, batches_of(original))[MoEModel.wrap(original).moe_layers[0]]).hidden_TH,
    )
    block, call, each, _ = replaced(original, removed, weight_of if weighed else None, ridge, protected)
    root = weight_of(len(call.hidden_TH)).sqrt() if weighed else torch.ones(len(call.hidden_TH)).double()
    now = block.experts.weights()
    features = torch.zeros(len(call.hidden_TH), 8, activation.shape[2], dtype=torch.float64)
    left = torch.zeros_like(call.output_TH, dtype=torch.float64)
    for token, expert, gate in call.choices():
        if expert in removed:
            left[token] += gate * (each[expert, token] - now.down_bias[expert].double())
        else:
            features[token, expert] += gate * activation[expert, token]
    free = [e for e in range(8) if e not in (*removed, *protected)]
    whole, left = features * root[:, None, None], left * root[:, None]
    scale = ridge * 8 * activation.shape[2] / len(whole) * float(whole.flatten(1).square().sum(0).mean())
    own = whole[:, free].flatten(1)
    step = torch.linalg.solve(own.T @ own + scale * torch.eye(own.shape[1]).double(), own.T @ left)
    found = (now.down[:, :, : activation.shape[2]] - before.down)[free].double().transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, step, rtol=2e-3, atol=2e-5)
    steps = dict(zip(free, step.unflatten(0, (len(free), -1)), strict=True))
    for e in (*free, *protected):
        same = torch.equal(now.down[e, :, : activation.shape[2]], before.down[e])
        asked = e in free and bool(whole[:, e].any())
        # A step in the last bits of the weights may be none.
        if not asked or float(steps[e].abs().max()) > 1e-6 * float(before.down[e].abs().max()):
            assert same == (not asked)
    assert all(not now.down[e].any() for e in removed)


def test_refitting_beside_novices_is_never_worse_on_the_calibration_tokens():
    error = {}
    for ridge in (None, 0.25):
        block, call, *_ = replaced(build("qwen3_moe"), [1, 4, 6], ridge=ridge)
        found = block.experts_module(call.hidden_TH, call.index_TK, call.weight_TK)
        error[ridge] = float((found.double() - call.output_TH.double()).square().sum())
    assert error[0.25] < 0.9 * error[None]


def test_norms_after_experts_are_refused():
    with pytest.raises(UnsupportedModelError, match="a norm follows its experts"):
        replaced(build("muse_spark"), [1])


def test_options(small, text, tmp_path):
    with pytest.raises(ValidationError, match="`steps` belongs to replace: nothing"):
        prune(**STEP, steps=2)
    values = recipe(small, tmp_path / "out", [{"prune.experts": STEP}], text)
    assert make_recipe(make_recipe(values).plain()).plain() == make_recipe(values).plain()
    for target in ("vllm", "transformers"):
        values = recipe(small, tmp_path / "out", [{"prune.experts": STEP}], text) | {"target": target}
        with pytest.raises(RecipeError, match=r"replace: mean .* can't load; use replace: nothing, or target: native"):
            plan_run(make_recipe(values))
    for after in ({"quantize.mixed": {"bits": 4.0}}, {"prune.experts": {"keep": 0.5}}):
        with pytest.raises(RecipeError, match=r"can't follow prune.experts: .* are ragged already"):
            plan_run(make_recipe(recipe(small, tmp_path / "out", [{"prune.experts": STEP}, after], text)))


def test_a_run_from_disk(small, text, tmp_path):
    """The bytes that were forecast, a folder that transformers loads, and vectors that the reader finds in it."""
    values = recipe(small, tmp_path / "out", [{"prune.experts": STEP}], text)
    _, forecast = plan_run(make_recipe(values))
    report = run(values, monitor=Monitor(show=False)).report
    assert report["after"]["bytes"] == forecast.after.total_bytes
    assert report["after"]["bytes"] < report["before"]["bytes"]
    assert report["verification"]["loader"] == "transformers from_pretrained"
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["format_version"] == 3
    file = Native(tmp_path / "out")
    for layer in report["layers"]:
        experts = file.ragged(str(layer["layer"]))
        for e, own in enumerate(experts):
            replaced = e in layer["passes"][0]["replaced"]
            assert (own["down"].shape[1] == 0) == replaced
            assert replaced or not np.any(own["down_bias"])
            assert not replaced or e in layer["passes"][0]["replaced_by_zeros"] or np.any(own["down_bias"])
    prefixes = tuple(file.prefix(i) for i in file.quantization["blocks"])
    assert not {n for n in file.tensors if n.startswith(prefixes)} - file.used
    first = (tmp_path / "out/model.safetensors").read_bytes()
    run(values | {"output": str(tmp_path / "again")}, monitor=Monitor(show=False))
    assert (tmp_path / "again/model.safetensors").read_bytes() == first

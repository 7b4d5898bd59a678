"""Experts in servers' 8-bit schemes: at run time against float64 with activations quantized by hand, and the pass.

What is expected is computed from codes and scales alone: the table of e4m3 numbers, plain loops over blocks, the
family's own class in float64 for what lies between the products.
"""

import copy
import json

import pytest
import torch
from checkpoints import PRUNE, recipe, small_checkpoint
from families import discover, input_batch, tiny_model
from reference import activations_ETI

import moe_compress
from moe_compress.calib.inputs import BlockInputs
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import RecipeError
from moe_compress.export.schemes import SCALED
from moe_compress.export.targets import find_target
from moe_compress.export.verify import verify
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.shape import model_shape
from moe_compress.pipeline import plan_run
from moe_compress.quant import run_packed
from moe_compress.quant.scheme import QuantizeScheme, SchemeOptions
from moe_compress.recipe import make_recipe

# Gate and up concatenated; transposed, interleaved, biases; no gate; a norm after each expert.
LAYOUTS = sorted({"qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"} & set(discover()))
CASES = [("fp8", {}), ("w8a8", {}), ("w4a8", {"group_size": -1})]
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()]


def step(scheme, target="native", **options):
    return QuantizeScheme(SchemeOptions(scheme=scheme, **options), find_target(target))


def first_block(name, **overrides):
    view = MoEModel.wrap(tiny_model(name, **overrides))
    return view.block(view.moe_layers[0])


def scaled(block, scheme, inputs=None, **options):
    made = step(scheme, **options)
    return made.apply(block, {"scheme": made.scheme.to_json()}, inputs)


def decoded(module):
    """Projection → float64 [E, O, K] from codes and scales, block by block."""
    found = {}
    for name, projection in module.projections.items():
        codes, scale = projection.codes.double(), projection.scale.double()
        value = torch.empty_like(codes)
        rows, columns = codes.shape[1] // scale.shape[1], codes.shape[2] // scale.shape[2]
        for m in range(scale.shape[1]):
            for n in range(scale.shape[2]):
                part = slice(m * rows, (m + 1) * rows), slice(n * columns, (n + 1) * columns)
                value[:, *part] = codes[:, *part] * scale[:, m, n, None, None]
        found[name] = value
    return found


def quantized(rows, share, is_float):
    """Activations [..., K] as a server reads them, in float64: each run of `share` with a scale of its own."""
    result = rows.clone()
    for start in range(0, rows.shape[-1], share):
        part = rows[..., start : start + share]
        scale = part.abs().amax(-1, keepdim=True) / (448 if is_float else 127)
        ratio = part / scale
        nearest = E4M3[(ratio.unsqueeze(-1) - E4M3).abs().argmin(-1)] if is_float else ratio.round()
        result[..., start : start + share] = nearest * scale
    return result


def check(block, scheme, tokens=9, **options):
    dense = copy.deepcopy(block)
    scaled(block, scheme, **options)
    module, own = block.experts_module, dense.experts_module
    weights = decoded(module)
    with torch.no_grad():
        for name, stacked in dense.experts.weights().matrices():
            stacked.copy_(weights[name])
    is_float, share = scheme.startswith("fp8"), 128 if scheme == "fp8-block" else 10**9
    hidden = torch.randn(tokens, module.hidden_size, generator=torch.Generator().manual_seed(7))
    activation_ETI = quantized(activations_ETI(own, quantized(hidden.double(), share, is_float)), share, is_float)
    output_ETH = activation_ETI @ weights["down"].transpose(1, 2)
    biases = dict(dense.experts.weights().items())
    if "down_bias" in biases:
        output_ETH += biases["down_bias"].double()[:, None]
    if FusedExperts(own).has_norm:
        output_ETH = copy.deepcopy(own.post_expert_norm).double()(output_ETH)
    index = torch.rand(tokens, block.num_experts, generator=torch.Generator().manual_seed(8)).topk(3).indices
    weight = torch.rand(tokens, 3, generator=torch.Generator().manual_seed(9))
    expected = torch.stack(
        [sum(weight[t, k].double() * output_ETH[index[t, k], t] for k in range(3)) for t in range(tokens)]
    )
    output = module(hidden, index, weight)
    assert output.dtype == hidden.dtype
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return module, hidden, index, weight, output


@torch.no_grad()
@pytest.mark.parametrize(("scheme", "options"), CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_is_what_a_server_computes(name, scheme, options):
    check(first_block(name), scheme, **options)


@torch.no_grad()
def test_blocks_and_groups():
    check(first_block("qwen3_moe", hidden_size=256, moe_intermediate_size=128), "fp8-block")
    for group in (32, 64):
        check(first_block("qwen3_moe", hidden_size=128, moe_intermediate_size=64), "w4a8", group_size=group)


@torch.no_grad()
def test_activations_are_really_quantized():
    """With weights that scaling stores exactly, what is left is the activations' error: about a step, not nothing."""
    block = first_block("qwen3_moe")
    for _, stacked in block.experts.weights().matrices():
        stacked.copy_(torch.randint(-127, 128, stacked.shape).float() / 64)
        stacked[..., 0] = 127 / 64
    dense = copy.deepcopy(block.experts_module)
    scaled(block, "w8a8", search="none")
    for name, weight in FusedExperts(dense).weights().matrices():
        torch.testing.assert_close(getattr(block.experts.weights(), name), weight, rtol=0.02, atol=0)
    hidden = torch.randn(20, 32)
    index, weight = torch.zeros(20, 1, dtype=torch.long), torch.ones(20, 1)
    difference = block.experts_module(hidden, index, weight) - dense(hidden, index, weight)
    relative = float(difference.norm() / dense(hidden, index, weight).norm())
    assert 1e-4 < relative < 0.05


@torch.no_grad()
def test_a_token_alone_or_among_others_is_the_same(monkeypatch):
    """Scales are a token's own: nothing depends on the batch. And in chunks of one expert nothing changes."""
    module, hidden, index, weight, output = check(first_block("qwen3_moe"), "fp8", tokens=12)
    for token in range(12):
        alone = module(hidden[token : token + 1], index[token : token + 1], weight[token : token + 1])
        torch.testing.assert_close(alone[0], output[token])
    monkeypatch.setattr(run_packed, "weights_at_once", lambda: 1)
    torch.testing.assert_close(module(hidden, index, weight), output)
    assert module(hidden[:0], index[:0], weight[:0]).shape == (0, 32)


@torch.no_grad()
@pytest.mark.parametrize(("scheme", "options"), CASES)
def test_casting_and_copying_leave_what_is_stored_alone(scheme, options, tmp_path):
    module, hidden, index, weight, output = check(first_block("gpt_oss"), scheme, **options)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    for cast in (lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu")):
        cast(module)
        after = module.state_dict()
        assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
        assert all(torch.equal(after[n].float(), before[n].float()) for n in before)
    torch.save(module, tmp_path / "experts.pt")
    other = first_block("gpt_oss", seed=1)
    other.restructure({"kind": "scaled", "num_experts": 8, "layout": module.describe()})
    rebuilt = other.experts_module.to_empty(device="cpu")
    rebuilt.load_state_dict(module.state_dict())
    for one in (copy.deepcopy(module), torch.load(tmp_path / "experts.pt", weights_only=False), rebuilt):
        assert torch.equal(one(hidden, index, weight), output)
        assert one.describe() == json.loads(json.dumps(module.describe()))


@torch.no_grad()
def test_the_kernel_that_serves_w4a8_computes_the_same():
    """torch's 4-bit kernel, which vLLM runs on Arm: fed with our codes and scales as vLLM feeds it.

    It quantizes activations asymmetrically, from the smallest to the largest; so the two differ by activation steps,
    and both are that near to the product without quantized activations.
    """
    block = first_block("qwen3_moe", hidden_size=128, moe_intermediate_size=64)
    scaled(block, "w4a8", group_size=32)
    projection = block.experts_module.projections["up"]
    codes, scale = projection.codes[2], projection.scale[2]
    assert (scale < 0).any()  # signs are nothing special to it
    shifted = codes + 8
    nibbles = ((shifted[:, 1::2] << 4) | shifted[:, ::2]).to(torch.uint8)
    packed_weight = torch.ops.aten._dyn_quant_pack_4bit_weight(nibbles, scale.float(), None, 32, 128, 64)
    rows = torch.randn(10, 128, generator=torch.Generator().manual_seed(3))
    served = torch.ops.aten._dyn_quant_matmul_4bit(rows, packed_weight, 32, 128, 64)
    exact = rows @ projection.matrices([2], torch.float32)[0].T
    from moe_compress.quant.float8 import quantized_inputs

    ours = quantized_inputs(rows, -1, False) @ projection.matrices([2], torch.float32)[0].T
    assert (served - exact).norm() / exact.norm() < 0.02
    assert (ours - exact).norm() / exact.norm() < 0.02
    assert (served - ours).norm() / exact.norm() < 0.02


# --- weights ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_gptq_errs_less_on_what_the_experts_read(scheme):
    model = tiny_model("qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    text = input_batch(model, batch=8, length=32)["input_ids"]
    told = {}
    for method in ("rtn", "gptq"):
        own = copy.deepcopy(model)
        options = {"scheme": scheme, "method": method, **({"group_size": 32} if scheme == "w4a8" else {})}
        result = moe_compress.compress(own, passes=[{"quantize.scheme": options}], calibration=text)
        told[method] = [e["quantize.scheme"] for layer in result.report["layers"] for e in layer["experts"]]
    assert all(e == {"scheme": scheme} for e in told["rtn"])
    assert all(e["down_error"] <= e["down_rtn_error"] for e in told["gptq"])
    assert sum(e["gate_up_error"] for e in told["gptq"]) < 0.9 * sum(e["gate_up_rtn_error"] for e in told["gptq"])


@torch.no_grad()
def test_more_bits_err_less_and_integers_less_than_floats():
    """At 8 bits, per row, Gaussian weights: integers have finer steps than three bits of mantissa."""
    block = first_block("qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    before = block.experts.weights().map(torch.clone)
    left = {}
    for scheme in ("w8a8", "fp8", "w4a8"):
        own = copy.deepcopy(block)
        scaled(own, scheme, **({"group_size": 32} if scheme == "w4a8" else {}))
        after = dict(own.experts.weights().items())
        left[scheme] = sum(float((after[n] - w).square().sum()) for n, w in before.matrices())
    assert 0 < 3 * left["w8a8"] < left["fp8"] < left["w4a8"] / 3


def test_gptq_reads_what_reached_the_layer():
    assert step("w8a8", method="gptq").needs_inputs()
    assert not step("w8a8").needs_inputs()
    block = first_block("qwen3_moe")
    with pytest.raises((AttributeError, IndexError)):
        scaled(block, "w8a8", BlockInputs(), method="gptq")  # nothing was read: not silently round-to-nearest


# --- the pass --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """The small checkpoint with sides of 128, which every scheme tiles."""
    return small_checkpoint(tmp_path_factory.mktemp("square") / "model", hidden_size=128, moe_intermediate_size=128)


@pytest.mark.parametrize("scheme", SCALED)
@pytest.mark.parametrize("target", ["native", "vllm"])
def test_forecast_report_and_file_agree_to_the_byte(square, scheme, target, tmp_path):
    wanted = recipe(square, tmp_path / "out", [{"quantize.scheme": {"scheme": scheme}}], target=target)
    forecast = plan_run(make_recipe(wanted))[1].after
    report = moe_compress.run(make_recipe(wanted)).report
    with Checkpoint(tmp_path / "out") as written:
        experts = sum(info.nbytes for n, info in written.tensors.items() if ".experts." in n)
        assert written.nbytes == forecast.total_bytes == report["after"]["bytes"]
    assert experts == forecast.expert_bytes == report["after"]["expert_bytes"]
    assert report["passes"][0]["summary"]["expert_bytes"] == experts
    opened = MoEModel.open(tmp_path / "out")
    assert model_shape(opened).expert_bytes == experts
    assert {opened.block(i).kind for i in opened.moe_layers} == {"scaled"}
    assert verify(tmp_path / "out").distance < 1e-5
    assert "streamed" in verify(tmp_path / "out", memory="1 kB").loader


def test_biases_count_too(tmp_path):
    tiny_model("gpt_oss").bfloat16().save_pretrained(tmp_path / "source")
    report = moe_compress.run(recipe(tmp_path / "source", tmp_path / "out", [{"quantize.scheme": {"scheme": "fp8"}}]))
    with Checkpoint(tmp_path / "out") as written:
        assert written.nbytes == report.report["after"]["bytes"] == report.report["forecast_bytes"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_in_memory_and_from_disk(name, tmp_path):
    """The same logits, in memory, saved and loaded natively; and not those of before."""
    model = tiny_model(name)
    result = moe_compress.compress(model, passes=[{"quantize.scheme": {"scheme": "w4a8", "group_size": -1}}])
    batch = input_batch(model)
    with torch.no_grad():
        output = model(**batch).logits
        assert not torch.allclose(output, tiny_model(name)(**batch).logits, rtol=1e-3, atol=1e-3)
        result.save(tmp_path / "saved")
        loaded = moe_compress.load(tmp_path / "saved", dtype=torch.float32)
        torch.testing.assert_close(loaded(**batch).logits, output, rtol=1e-4, atol=1e-4)
        loaded.save_pretrained(tmp_path / "again")
        again = moe_compress.load(tmp_path / "again", dtype=torch.float32)
        assert torch.equal(again(**batch).logits, loaded(**batch).logits)


def test_pruned_first(square, text, tmp_path):
    passes = [PRUNE, {"quantize.scheme": {"scheme": "fp8-block"}}]
    report = moe_compress.run(recipe(square, tmp_path / "out", passes, text, target="sglang")).report
    assert MoEModel.open(tmp_path / "out").block(0).num_experts == 6
    assert report["after"]["perplexity"]["held-out"] > 1


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"scheme": "fp8"}, {"target": "transformers"}, "'transformers' has no kernel for fp8 experts (it loads none"),
        ({"scheme": "w8a8"}, {"target": "sglang"}, "'sglang' has no kernel for w8a8 experts (it loads fp8, fp8-block)"),
        (
            {"scheme": "fp8"},
            {"target": "gptq"},
            "no kernel for fp8 experts (it loads none such); native, vllm",
        ),
        (
            {"scheme": "fp8-block"},
            {},
            "blocks of 128×128 don't tile a matrix of 32×32; hidden size and",
        ),
        ({"scheme": "w4a8"}, {}, "blocks of 1×128 don't tile a matrix of 32×32; set `group_size: 32`"),
        ({"scheme": "w8a8", "group_size": 32}, {}, "w8a8 has no groups to choose: leave `group_size` out"),
        ({"scheme": "fp8", "method": "gptq"}, {}, "GPTQ rounds to integers, and fp8 is e4m3"),
        ({"scheme": "w8a8", "method": "gptq"}, {}, "quantize.scheme measures the model on text"),
        ({"scheme": "int4"}, {}, "scheme"),
        ({}, {}, "this key is needed (fp8: e4m3"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(small, tmp_path, options, more, message):
    with pytest.raises(RecipeError) as caught:
        plan_run(make_recipe(recipe(small, tmp_path / "out", [{"quantize.scheme": options}], **more)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_nothing_follows_it(small, tmp_path):
    passes = [{"quantize.scheme": {"scheme": "fp8"}}, {"prune.experts": {"experts": 6, "criterion": "random"}}]
    with pytest.raises(RecipeError, match=r"can't follow quantize\.scheme: the experts of layer 0 are scaled already"):
        plan_run(make_recipe(recipe(small, tmp_path / "out", passes)))

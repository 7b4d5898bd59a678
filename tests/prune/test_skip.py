"""Skipping experts: errors against the model, plans against brute force."""

import json

import pytest
import torch
from checkpoints import recipe, small_checkpoint
from families import discover, input_batch, tiny_model

import moe_compress
from moe_compress.calib.collect import MemoryStore, collect, collect_from_weights
from moe_compress.calib.skipping import CapacityUse, RandomTruncation, TruncationError, prefix_errors
from moe_compress.calib.text import TokenBatches
from moe_compress.errors import InputError, MoeCompressError, RecipeError
from moe_compress.model import MoEModel, hf
from moe_compress.model.dispatch import Dispatch
from moe_compress.model.rules import TopK
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Monitor, Progress
from moe_compress.prune.otp import train_prefixes
from moe_compress.prune.thresholds import allocate_k

# Normalised softmax, softmax that isn't, sigmoid with a scaling factor, softmax over the chosen, experts with biases.
NAMES = sorted({"qwen3_moe", "olmoe", "deepseek_v3", "mixtral", "gpt_oss"} & set(discover()))


# Errors


@pytest.mark.parametrize("renormalize", [True, False])
def test_prefix_errors_are_what_loops_find(renormalize):
    generator = torch.Generator().manual_seed(0)
    tokens, slots, experts, hidden = 9, 3, 5, 4
    index = torch.rand(tokens, experts, generator=generator).topk(slots).indices
    weight = torch.rand(tokens, slots, generator=generator, dtype=torch.float64) * 2.5
    weight[2, 1] = weight[4] = 0
    outputs = torch.randn(experts, tokens, hidden, generator=generator, dtype=torch.float64)
    dispatch = Dispatch.of(index, weight, experts)
    found, energy = prefix_errors(dispatch, outputs[dispatch.expert_R, dispatch.token_R], weight, renormalize)
    for t in range(tokens):
        order = weight[t].argsort(descending=True).tolist()
        whole = sum(weight[t, s] * outputs[index[t, s], t] for s in order)
        assert float(energy[t]) == pytest.approx(float(whole.square().sum()))
        for k in range(1, slots + 1):
            kept = order[:k]
            part = sum(weight[t, s] * outputs[index[t, s], t] for s in kept)
            total = float(weight[t, kept].sum())
            if renormalize and total:
                part = part * float(weight[t].sum()) / total
            assert float(found[t, k - 1]) == pytest.approx(float((part - whole).square().sum()), rel=1e-9, abs=1e-24)


def outputs(model, k=None, renormalize=True):
    """Layer → what its experts put out, on the original's hidden states: rules stand in one layer at a time."""
    found = {}
    for index in MoEModel.wrap(model).moe_layers:
        view = MoEModel.wrap(model)
        block = view.block(index)
        if k is not None:
            block.add_rule(TopK(k, renormalize))
        taps = []
        with Sweep(view, [input_batch(model)]) as sweep:
            for step in sweep:
                step.advance(taps.append if step.index == index else None)
        found[index] = taps[0].output_TH.double()
        if k is not None:
            del block.experts_module.routing
            block.experts_module._forward_pre_hooks.clear()
    return found


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_measured_errors_are_those_of_the_rule(name, renormalize):
    """In families of every kind of weights: what `truncation_error` says is what the rule does to the layer."""
    model = tiny_model(name)
    view = MoEModel.wrap(model)
    statistic, store = TruncationError(renormalize), MemoryStore()
    with Sweep(view, [input_batch(model)]) as sweep:
        collect(sweep, [statistic], store, Progress())
    whole = outputs(model)
    for k in range(1, view.block(view.moe_layers[0]).top_k + 1):
        for index, output in outputs(model, k, renormalize).items():
            error = float((output - whole[index]).square().sum())
            assert float(store.get(index, statistic.key)["error"][k - 1]) == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert all(float(store.get(i, statistic.key)["relative"][-1]) == 0 for i in view.moe_layers)


def test_random_inputs_need_no_text():
    """LExI's measure: the block itself on normal inputs, with the rule and without."""
    view = MoEModel.wrap(tiny_model("qwen3_moe"))
    statistic, store = RandomTruncation(tokens=64, seed=4), MemoryStore()
    collect_from_weights(view, [statistic], store, Progress())
    hidden = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(4))
    for index in view.moe_layers:
        block = view.block(index)
        with torch.no_grad():
            whole = block.parent(hidden)
            block.add_rule(TopK(1))
            less = block.parent(hidden)
        error = float((less - whole).double().square().sum())
        assert store.get(index, statistic.key)["error"].tolist() == pytest.approx([error, 0.0], rel=1e-4)


# Learned


def test_the_small_router_learns_what_tokens_need():
    """Half of the tokens need three experts, which one says shows in one feature: found, and better than any top-k."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 8, generator=generator)
    needs = features[:, 3] > 0
    error = torch.where(needs.unsqueeze(1), torch.tensor([9.0, 4.0, 0.0]), torch.tensor([0.02, 0.01, 0.0])).double()
    weight, bias = train_prefixes(features, error, 2.0)
    kept = (features @ weight.T + bias).argmax(-1)
    assert float(kept.double().mean()) + 1 == pytest.approx(2.0, abs=0.01)
    left = float(error.gather(1, kept.unsqueeze(1)).mean())
    assert left < 0.25 * float(error[:, 1].mean())  # two experts for everybody
    again = train_prefixes(features, error, 2.0)
    assert torch.equal(again[0], weight)
    assert torch.equal(again[1], bias)


@pytest.mark.parametrize("wanted", [1.0, 1.3, 2.7, 3.0])
def test_the_small_router_keeps_to_the_average(wanted):
    generator = torch.Generator().manual_seed(2)
    features, error = torch.randn(600, 5, generator=generator), torch.rand(600, 3, generator=generator).double()
    weight, bias = train_prefixes(features, error, wanted, epochs=3)
    assert float((features @ weight.T + bias).argmax(-1).double().mean()) + 1 == pytest.approx(wanted, abs=0.01)


# Passes


@pytest.fixture(scope="module")
def calibration():
    ids = torch.randint(3, 120, (8, 24), generator=torch.Generator().manual_seed(3))
    return TokenBatches(ids, [None] * 8, "drawn", {"tokens": ids.numel()})


def four(name="qwen3_moe"):
    return tiny_model(name, num_experts_per_tok=4)


PASSES = {
    "uniform": {"skip.top_k": {"experts_per_token": 2, "layers": "uniform"}},
    "error": {"skip.top_k": {"experts_per_token": 2.5}},
    "random": {"skip.top_k": {"experts_per_token": 2.5, "layers": "random"}},
    "ratio": {"skip.ratio": {"experts_per_token": 2.5}},
    "protected": {"skip.ratio": {"experts_per_token": 2.5, "protect": "norm", "protected": 0.1}},
    "attention": {"skip.ratio": {"experts_per_token": 2.5, "protect": "attention", "protected": 0.1}},
    "top_p": {"skip.top_p": {"experts_per_token": 2.5}},
    "learned": {"skip.learned": {"experts_per_token": 2.5, "epochs": 5}},
    "capacity": {"skip.capacity": {"factor": 0.8, "overflow": "reroute"}},
}


@pytest.mark.parametrize("name", PASSES)
def test_plans_say_what_will_run(name, calibration):
    """The first layer reads what it was calibrated on: there the plan's number is the one that a forward counts."""
    model = four()
    result = moe_compress.compress(model, passes=[PASSES[name]], calibration=calibration, monitor=Monitor(show=False))
    view = MoEModel.wrap(model)
    with Sweep(view, [{"input_ids": calibration.ids}]) as sweep:
        first = next(iter(sweep))
        routes = first.layer.block.experts_module.routing
        routes.reset()
        first.run()
        used = routes.executed / routes.tokens
    entry = result.report["layers"][0]["passes"][0]
    assert used == pytest.approx(entry["experts_per_token"], abs=1.01 / routes.tokens)
    assert entry["rules"] == [entry["rule"]["kind"]]
    summary = result.report["passes"][0]["summary"]
    assert summary["experts_per_token_before"] == 4
    if name not in ("capacity", "uniform"):
        assert summary["experts_per_token"] == pytest.approx(2.5, abs=0.02 if "error" != name != "random" else 0.5)
    if name in ("error", "random"):
        assert summary["experts_per_token"] <= 2.5


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("by", ["norm", "attention"])
def test_the_wanted_share_is_protected(by, share, calibration):
    """On the text that calibrates, in the first layer, which reads there what it was calibrated on."""
    model = four()
    step = {"skip.ratio": {"threshold": 2.0, "protect": by, "protected": share}}
    moe_compress.compress(model, passes=[step], calibration=calibration, monitor=Monitor(show=False))
    taps = []
    with Sweep(MoEModel.wrap(model), [{"input_ids": calibration.ids}]) as sweep:
        next(iter(sweep)).run(taps.append)
    kept = (taps[0].weight_TK != 0).sum(-1)
    assert int((kept == 4).sum()) == round(share * len(kept))
    assert int((kept == 1).sum()) == len(kept) - round(share * len(kept))


def test_more_experts_lose_less(calibration):
    """Of the exact program: its total error falls with the budget, and is never above that of uniform numbers."""
    model = four()
    view = MoEModel.wrap(model)
    store = MemoryStore()
    with Sweep(view, [{"input_ids": calibration.ids}]) as sweep:
        collect(sweep, [TruncationError()], store, Progress())
    cost = {i: store.get(i, TruncationError().key)["relative"].tolist() for i in view.moe_layers}
    totals = []
    for wanted in (1, 1.5, 2, 2.5, 3, 3.5, 4):
        found = allocate_k(cost, wanted)
        totals.append(sum(cost[i][k - 1] for i, k in found.items()))
        if wanted == int(wanted):
            assert totals[-1] <= sum(own[int(wanted) - 1] for own in cost.values())
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == 0


def test_capacity_is_measured_as_it_runs(calibration):
    """Batch by batch, beside a count of what the rule leaves of each."""
    view = MoEModel.wrap(four())
    statistic, store, taps = CapacityUse(0.7, "drop"), MemoryStore(), []
    batches = [{"input_ids": part} for part in calibration.ids.split(3)]
    with Sweep(view, batches) as sweep:
        collect(sweep, [statistic], store, Progress())
    with Sweep(view, batches) as sweep:
        for step in sweep:
            step.advance(taps.append)
    for index in view.moe_layers:
        own = [tap for tap in taps if tap.layer == index]
        limits = [-(-0.7 * 4 * len(tap.index_TK) // 8) for tap in own]
        loads = [torch.bincount(tap.index_TK.flatten(), minlength=8) for tap in own]
        left = sum(int(load.clamp_max(int(limit)).sum()) for load, limit in zip(loads, limits, strict=True))
        result = store.get(index, statistic.key)
        assert int(result["executed"]) == left < int(result["slots"])
        peak = [float(load.max() / load.double().mean()) for load in loads]
        assert float(result["busiest"][0]) == pytest.approx(sum(peak) / len(peak))
        assert float(result["busiest"][1]) < float(result["busiest"][0])


@pytest.mark.parametrize("name", ["error", "protected", "attention", "top_p", "learned"])
def test_a_folder_and_a_model_in_memory_get_the_same(name, tmp_path, text, small):
    """The same rules, the same counts, before and after in the report; the folder runs them when it is loaded."""
    values = recipe(small, tmp_path / "out", [_halved(PASSES[name])], text)
    report = moe_compress.run(values, monitor=Monitor(show=False)).report
    model = hf.model_class(MoEModel.open(small).module.config).from_pretrained(small, dtype=torch.float32).eval()
    from transformers import AutoTokenizer

    result = moe_compress.compress(
        model,
        tokenizer=AutoTokenizer.from_pretrained(small),
        passes=values["passes"],
        calibration=values["calibration"],
        evaluate=values["evaluate"],
        monitor=Monitor(show=False),
    )
    for a, b in zip(report["layers"], result.report["layers"], strict=True):
        one, other = (side["passes"][0]["rule"] for side in (a, b))
        assert one.keys() == other.keys()
        assert all(v == other[k] or v == pytest.approx(other[k], rel=1e-4) for k, v in one.items())
        assert a["passes"][0]["experts_per_token"] == pytest.approx(b["passes"][0]["experts_per_token"], abs=0.02)
    before, after = (report[side]["experts_per_token"] for side in ("before", "after"))
    assert before["mean"] == 2
    assert after["mean"] == pytest.approx(result.report["after"]["experts_per_token"]["mean"], abs=0.03)
    assert 1 <= after["mean"] < 2
    assert set(after["layers"]) == {"0", "1", "2"}
    assert report["forecast_bytes"] == report["after"]["bytes"]
    with torch.no_grad():  # in the dtype that the checkpoint is stored in, too
        logits = moe_compress.load(tmp_path / "out", dtype=torch.bfloat16)(torch.arange(3, 35)[None]).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()

    loaded = moe_compress.load(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(3, 4000, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = loaded(ids).logits
    assert moe_compress.experts_per_token(loaded) < 2
    with Sweep(MoEModel.open(tmp_path / "out"), [{"input_ids": ids}]) as sweep:
        for step in sweep:
            step.advance()
        torch.testing.assert_close(next(sweep.outputs())[1], logits, rtol=1e-4, atol=1e-4)


def _halved(step):
    ((name, options),) = step.items()
    return {name: {**options, "experts_per_token": 1.5}}


# Refusals


@pytest.mark.parametrize(
    ("passes", "target", "message"),
    [
        (
            [PASSES["ratio"]],
            "vllm",
            "skip.ratio: the target 'vllm' runs no rules that skip experts: set",
        ),
        (
            [PASSES["ratio"], {"prune.experts": {"keep": 0.5}}],
            "native",
            r"prune.experts can't follow .* \(ratio\) are",
        ),
        ([PASSES["top_p"], {"merge.average": {"keep": 0.5}}], "native", r"merge.average can't follow .* \(top_p\) are"),
        ([{"skip.top_k": {"experts_per_token": 2.5, "layers": "uniform"}}], "native", "takes a whole number"),
        ([{"skip.top_k": {"experts_per_token": 9}}], "native", "experts_per_token is 9, and layer 0 uses 4"),
        ([{"skip.top_k": {"experts_per_token": 2, "minimum": 3}}], "native", "minimum is 3, more than the 2"),
        ([{"skip.ratio": {"experts_per_token": 2, "threshold": "median"}}], "native", "leave one of them out"),
        ([{"skip.top_p": {"experts_per_token": 2, "share": 0.7}}], "native", "leave `experts_per_token` out"),
    ],
)
def test_what_can_not_be(passes, target, message, calibration):
    with pytest.raises(InputError, match=message):
        moe_compress.compress(
            four(), passes=passes, target=target, calibration=calibration, monitor=Monitor(show=False)
        )


@pytest.mark.parametrize("step", ["skip.top_k", "skip.ratio", "skip.top_p", "skip.learned"])
def test_a_default_that_skips_nothing_is_refused(step, calibration):
    with pytest.raises(RecipeError, match=r"all of the 2 experts that layer 0 uses: give `experts_per_token`"):
        moe_compress.compress(tiny_model("qwen3_moe"), passes=[step], calibration=calibration)


@pytest.mark.parametrize(("step", "given"), [("skip.ratio", {"threshold": "median"}), ("skip.top_p", {"share": 0.5})])
def test_what_else_decides_needs_no_average(step, given, calibration):
    result = moe_compress.compress(
        tiny_model("qwen3_moe"), passes=[{step: given}], calibration=calibration, monitor=Monitor(show=False)
    )
    assert 1 <= result.report["passes"][0]["summary"]["experts_per_token"] < 2


@pytest.mark.parametrize("bits", [None, 4.5], ids=["dense", "quantized"])
def test_a_smaller_top_k_is_a_number_for_servers(bits, tmp_path, text):
    """config.json says it; what is loaded from there computes what the rule computed (the run verifies logits)."""
    twin = {"experts_per_token": 4}  # gpt-oss's config.json says it twice
    source = small_checkpoint(tmp_path / "model", num_experts_per_tok=4, norm_topk_prob=True, **twin)
    passes = [{"skip.top_k": {"experts_per_token": 3, "layers": "uniform"}}]
    if bits is not None:
        passes.append({"quantize.mixed": {"bits": 5, "method": "rtn", "allocation": "uniform", "group_size": 32}})
        passes[1]["quantize.mixed"]["widths"] = [4]
    target = "transformers" if bits is None else "vllm"
    values = recipe(source, tmp_path / "out", passes, text, target=target)
    report = moe_compress.run(values, monitor=Monitor(show=False)).report
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_experts_per_tok"] == 3
    assert config.get("quantization_config", {}).get("quant_method") != "moe_compress"
    if bits is None:
        number = {"num_experts_per_tok": 3, "experts_per_token": 3}
        assert config == {**json.loads((source / "config.json").read_text()), **number}
    assert report["verification"]["distance"] <= report["verification"]["tolerance"]
    again = MoEModel.open(tmp_path / "out")
    assert [again.block(i).top_k for i in again.moe_layers] == [3, 3, 3]


def test_the_smaller_of_two_top_ks_is_the_number(tmp_path, text):
    source = small_checkpoint(tmp_path / "model", num_experts_per_tok=4, norm_topk_prob=True)
    passes = [{"skip.top_k": {"experts_per_token": count, "layers": "uniform"}} for count in (3, 2)]
    report = moe_compress.run(recipe(source, tmp_path / "out", passes, text, target="transformers")).report
    assert json.loads((tmp_path / "out/config.json").read_text())["num_experts_per_tok"] == 2
    assert report["verification"]["distance"] <= report["verification"]["tolerance"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("olmoe", {}, "this family doesn't normalise .* set `renormalize: false`"),
        ("mixtral", {"renormalize": False}, "this family normalises .* set `renormalize: true`"),
        ("deepseek_v3", {}, r"chooses experts by .*correction_bias as well \(layer 1\)"),
        ("mixtral", {"layers": "error"}, "one number of experts per token for all layers"),
    ],
)
def test_where_a_number_would_mean_something_else(name, options, message, calibration):
    passes = [{"skip.top_k": {"experts_per_token": 1, "layers": "uniform", **options}}]
    with pytest.raises(MoeCompressError, match=message):
        moe_compress.compress(tiny_model(name), passes=passes, target="transformers", calibration=calibration)


def test_a_source_with_rules_is_not_for_servers(tmp_path, text, small):
    """What a native folder skips isn't lost on the way to a format that can't say it."""
    moe_compress.run(recipe(small, tmp_path / "out", [_halved(PASSES["ratio"])], text), monitor=Monitor(show=False))
    rtn = {"quantize.mixed": {"bits": 5.0, "method": "rtn", "allocation": "uniform", "group_size": 32, "widths": [4]}}
    with pytest.raises(RecipeError, match=r"'vllm' runs no rules that skip experts, which layers \[0, 1, 2\]"):
        moe_compress.run(recipe(tmp_path / "out", tmp_path / "served", [rtn], text, target="vllm"))
    report = moe_compress.run(
        recipe(tmp_path / "out", tmp_path / "packed", [rtn], text), monitor=Monitor(show=False)
    ).report
    description = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert description["format_version"] == 3
    assert [b["kind"] for b in description["blocks"].values()] == ["packed"] * 3
    assert all(b["routing"][0]["kind"] == "ratio" for b in description["blocks"].values())
    assert report["passes"][0]["name"] == "quantize.mixed"

"""`router: remap`: all rows of the router stay, and lead to fewer experts. In memory, in folders, and behind passes."""

import copy
import json

import pytest
import torch
from checkpoints import recipe
from families import input_batch, tiny_model
from native_reader import Native
from reference import build, carry_out, experts_calls, joined, measure, outputs_ETH
from safetensors.torch import load_file
from transformers import AutoConfig

import moe_compress
from moe_compress.api import _settle
from moe_compress.calib.batches import TokenBatches
from moe_compress.calib.routing import RoutingLog, routing_drift
from moe_compress.errors import CheckpointError, RecipeError, UnsupportedModelError
from moe_compress.export.partial import load_experts
from moe_compress.export.targets import TARGETS, find_target
from moe_compress.export.verify import verify
from moe_compress.export.write import write_folder
from moe_compress.model import MoEModel, hf
from moe_compress.model.rules import executed
from moe_compress.model.sweep import Sweep
from moe_compress.passes import find_pass
from moe_compress.probe import streamed
from moe_compress.progress import Monitor, Progress

# Softmax; sigmoid, groups and a correction bias; biases on the logits; routing by token id; a class for no expert and
# top-1; a scale per expert in a router beside the experts; no gate; a correction bias on the block.
NAMES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "deepseek_v4", "zaya", "gemma4", "nemotron_h", "minimax_m2"]
RTN = {"quantize.mixed": {"bits": 5.0, "method": "rtn", "allocation": "uniform", "group_size": 32, "widths": [2, 4]}}


def merge(name="merge.average", target="native", **options):
    cls = find_pass(name)
    return cls(cls.Options(**{"router": "remap", **options}), find_target(target))


def batches_of(model):
    return [input_batch(model, 4, 24, 1), input_batch(model, 2, 40, 2)]


def copied(view, original=1, other=6):
    """Every layer's expert `other` computes what `original` does; what routes to them stays as different as it was."""
    for index in view.moe_layers:
        for tensor in view.block(index).experts_module.parameters():
            tensor.data[other] = tensor.data[original]


def beside(model, view):
    """All that is no expert's."""
    experts = tuple(f"{view.stack}.{i}.{view.block(i).path}." for i in view.moe_layers)
    return {n: t.clone() for n, t in model.state_dict().items() if not n.startswith(experts)}


def logits_of(model, batches):
    with torch.no_grad(), hf.implementation(model):
        return [model(**batch).logits for batch in batches]


def exact(model, batches):
    """Logits in float64, and experts per token where rules count them."""
    wide = copy.deepcopy(model).double()
    return logits_of(wide, batches), moe_compress.experts_per_token(wide)


def logged(view, batches):
    log = RoutingLog(sum(b["input_ids"].numel() for b in batches))
    with Sweep(view, batches) as sweep:
        for step in sweep:
            step.advance(log.observe)
    return log


@pytest.mark.parametrize("name", NAMES)
def test_merging_copies_changes_nothing(name):
    """Whatever the router makes of the two: its tensors, its choices and the logits are what they were."""
    model = tiny_model(name)
    view = MoEModel.wrap(model)
    copied(view)
    batches = batches_of(model)
    before, rest, drawn = exact(model, batches)[0], beside(model, view), logged(view, batches)
    both = experts_calls(model, batches)
    step = merge(preset="hc-smoe", experts=7, protect_super_experts=False)
    plan = step.plan(measure(view, batches, step.statistics()))
    reports = carry_out(view, step, plan, batches)
    for index, (report, _) in reports.items():
        block, slots = view.block(index), report["slots"]
        assert [1, 6] in report["groups"]  # also from two routing groups
        assert (block.num_experts, block.router_experts) == (7, 8)
        assert block.rules[0].experts == slots
    logits, used = exact(model, batches)
    tolerance = 1e-10 if name in ("qwen3_moe", "deepseek_v3", "zaya", "nemotron_h") else 1e-5  # others weigh in float32
    for found, expected in zip(logits, before, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    after = beside(model, view)
    assert all(torch.equal(after[n], t) for n, t in rest.items() if not n.endswith("tokens_per_expert"))
    drift = routing_drift(drawn, logged(view, batches), {i: r["slots"] for i, (r, _) in reports.items()})
    assert all(own["agreement"] == 1 for own in drift.values())
    assert all(own.get("kl", 0) < 1e-6 for own in drift.values())
    rows = {i: [row for call in calls for row in call.index_TK.tolist()] for i, calls in both.items()}
    if name in ("qwen3_moe", "gpt_oss", "deepseek_v3"):
        share = [sum(2 - ({1, 6} <= set(row)) for row in own) / len(own) for own in rows.values()]
        assert used == pytest.approx(sum(share) / len(share), abs=0.01)  # of float32, where a choice may tip


@pytest.mark.parametrize("name", ["merge.average", "merge.subspace", "merge.zip"])
def test_fewer_experts_than_a_token_uses(name):
    """One expert that all rows lead to: each token gets it, once, with all of its weight."""
    model = build("deepseek_v3")  # of two routing groups
    view = MoEModel.wrap(model)
    batches = batches_of(model)
    first = view.moe_layers[0]
    weights = joined(experts_calls(model, batches)[first]).weight_TK.sum(-1)
    step = merge(name, experts=1, refit="none", protect_super_experts=False, cluster="average")
    plan = step.plan(measure(view, batches, step.statistics()))
    carry_out(view, step, plan, batches, only=first)
    taps = []
    with Sweep(view, batches) as sweep:
        for at in sweep:
            at.advance(taps.append if at.index == first else None)
    hidden, output = (torch.cat([getattr(t, n) for t in taps]) for n in ("hidden_TH", "output_TH"))
    served = torch.cat([executed(t.index_TK, t.weight_TK, 1) for t in taps])
    assert served.sum(-1).tolist() == [1] * len(hidden)
    one = outputs_ETH(view.block(first).experts_module, hidden)[0]
    torch.testing.assert_close(output.double(), one * weights.double().unsqueeze(-1), rtol=1e-4, atol=1e-5)


def test_refitting_knows_the_routing():
    """The router's own, through the rule: what the report says is left is what the model does; and it is the least."""
    errors = {}
    for refit in ("none", "layer"):
        model = build("deepseek_v3")
        view = MoEModel.wrap(model)
        batches = [input_batch(model, 6, 40, 1)]
        first = view.moe_layers[0]
        before = joined(experts_calls(model, batches)[first]).output_TH
        step = merge(experts=4, refit=refit)
        plan = step.plan(measure(view, batches, step.statistics()))
        report, _ = carry_out(view, step, plan, batches, only=first)[first]
        taps = []
        with Sweep(view, batches) as sweep:
            for at in sweep:
                at.advance(taps.append if at.index == first else None)
        after = torch.cat([t.output_TH for t in taps])
        errors[refit] = float((after - before).double().square().sum() / before.double().square().sum())
    assert report["refit"]["routing"] == "unchanged"
    assert report["refit"]["before"] == pytest.approx(errors["none"], rel=1e-4)
    assert report["refit"]["after"] == pytest.approx(errors["layer"], rel=1e-3)
    assert errors["layer"] < 0.9 * errors["none"]


def loaded(folder):
    cls = hf.model_class(AutoConfig.from_pretrained(folder))
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


class Overlay:
    """Changed blocks of a model in memory."""

    def __init__(self, view):
        self.states = {i: view.block(i).state() for i in view.moe_layers}

    def get(self, layer):
        return self.states.get(layer)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_read_again(name, tmp_path):
    """Layer by layer, by from_pretrained, and once more from what that saves; the router's tensors bit for bit."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "source")
    model = loaded(tmp_path / "source")
    view = MoEModel.wrap(model)
    batches = batches_of(model)
    step = merge(experts=5)
    plan = step.plan(measure(view, batches, step.statistics()))
    carry_out(view, step, plan, batches)
    expected, rest = logits_of(model, batches), beside(model, view)
    source = MoEModel.open(tmp_path / "source")
    source.overlay = Overlay(view)
    assert (
        write_folder(source, tmp_path / "out", {"probe": streamed(source, list(range(3, 19)))}, Progress()) == "native"
    )
    verify(tmp_path / "out", Progress())

    again = loaded(tmp_path / "out")
    for found, wanted in zip(logits_of(again, batches), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(again.state_dict()[n], t) for n, t in rest.items())
    opened = MoEModel.open(tmp_path / "out")
    with Sweep(opened, [batches[0]]) as sweep:
        for at in sweep:
            at.advance()
        torch.testing.assert_close(next(sweep.outputs())[1], expected[0], rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "again")
    for found, wanted in zip(logits_of(loaded(tmp_path / "again"), batches), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    native = Native(tmp_path / "out")
    original = json.loads((tmp_path / "source/config.json").read_text())
    assert {k: native.config[k] for k in original} == {**original, "architectures": native.config["architectures"]}
    for index in view.moe_layers:
        block = native.quantization["blocks"][str(index)]
        assert (block["num_experts"], block["router_experts"]) == (5, 8)
        calls = logged_taps(again, index, batches[0])
        for (index_TK, weight_TK), tap in zip(*calls, strict=True):
            got = native.routed(str(index), index_TK.numpy(), weight_TK.numpy())
            for row, (experts, weights) in enumerate(zip(tap.index_TK, tap.weight_TK, strict=True)):
                ours = {int(e): float(w) for e, w in zip(experts, weights, strict=True) if float(w)}
                assert ours == pytest.approx(got[row], rel=1e-6)


def logged_taps(model, index, batch):
    """What the router hands on, and what the experts then get: one entry per forward."""
    view, chosen, taps = MoEModel.wrap(model), [], []
    experts = view.block(index).experts_module
    handle = experts.register_forward_pre_hook(lambda _m, a: chosen.append((a[1], a[2])), prepend=True)
    with Sweep(view, [batch]) as sweep:
        for at in sweep:
            at.advance(taps.append if at.index == index else None)
    handle.remove()
    return chosen[-1:], taps


def test_quantized_afterwards(tmp_path, text, small):
    """A recipe that merges and quantizes: the router as in the source, the report's bytes, and what may follow."""
    passes = [{"merge.average": {"experts": 5, "router": "remap"}}, RTN]
    report = moe_compress.run(recipe(small, tmp_path / "out", passes, text), monitor=Monitor(show=False)).report
    assert report["forecast_bytes"] == report["after"]["bytes"]
    assert report["passes"][0]["name"] == "merge.average"
    blocks = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["blocks"]
    assert {(b["kind"], b["num_experts"], b["router_experts"]) for b in blocks.values()} == {("packed", 5, 8)}
    verify(tmp_path / "out", Progress())
    with pytest.raises(UnsupportedModelError, match="layer 0 scores 8 experts, which a rule maps to 5"):
        load_experts(MoEModel.open(tmp_path / "out"), {i: [0, 1, 2, 3] for i in range(3)})
    folders = (small, tmp_path / "out")
    before, after = ({k: v for f in p.glob("*.safetensors") for k, v in load_file(f).items()} for p in folders)
    gates = [n for n in before if n.endswith("mlp.gate.weight")]
    assert gates
    assert all(torch.equal(before[n], after[n]) for n in gates)
    assert all(layer["passes"][0]["routing"]["kept_choices"] == 1 for layer in report["layers"])
    assert all(own["kl"] >= 0 for own in report["after"]["routing"].values())


def test_healing_the_router_reads_experts(text, small, tmp_path):
    """`objective: routing` compares distributions over the merged experts; of an unchanged router nothing is left."""
    merged = {"merge.average": {"experts": 5, "router": "remap"}}
    heal = {"heal.router": {"objective": "routing", "epochs": 1}}
    report = moe_compress.run(recipe(small, tmp_path / "out", [merged, heal], text), monitor=Monitor(show=False)).report
    first = report["layers"][0]["passes"][1]
    assert first["objective_before"] == pytest.approx(0, abs=1e-4)  # the first layer reads what it always did


def test_refused(small, text, tmp_path):
    ids = torch.randint(3, 120, (4, 24), generator=torch.Generator().manual_seed(3))
    calibration = TokenBatches(ids, [None] * 4, "drawn", {"tokens": ids.numel()})
    remap = {"merge.average": {"experts": 5, "router": "remap"}}
    for target in sorted(t.name for t in TARGETS.values() if t.quantized_format != "native"):
        with pytest.raises(RecipeError, match=f"target '{target}' .*set `target: native`"):
            moe_compress.compress(build("qwen3_moe"), passes=[remap], calibration=calibration, target=target)
    for after, message in (
        ({"merge.average": {"experts": 4}}, r"merge.average can't follow .*\(remap\) are made for 5 experts"),
        ({"prune.experts": {"experts": 4}}, r"prune.experts can't follow .*\(remap\) are made for 5 experts"),
        ({"skip.capacity": {"overflow": "reroute"}}, r"set `overflow: drop`"),
    ):
        with pytest.raises(RecipeError, match=message):
            moe_compress.compress(build("qwen3_moe"), passes=[remap, after], calibration=calibration)
    block = MoEModel.wrap(build("qwen3_moe")).block(0)
    block.remap([0, 3], [0, 0, 0, 1, 1, 1, 1, 0])
    for change in (block.remap, block.keep):
        with pytest.raises(UnsupportedModelError, match=r"layer 0 has routing rules \(remap\)"):
            change([0], [0, 0]) if change == block.remap else change([0])
    description = block.state()[1]
    other = MoEModel.wrap(build("qwen3_moe")).block(0)
    with pytest.raises(CheckpointError, match="layer 0 has 2 experts and a router that scores 8, and no rule"):
        other.restructure({**description, "routing": []})
    with pytest.raises(CheckpointError, match="names expert 2 of 2"):
        other.restructure({**description, "routing": [{"kind": "remap", "experts": [0, 1, 2]}]})
    with pytest.raises(CheckpointError, match="names expert"):
        other.restructure({**description, "num_experts": 1})


def test_a_model_in_memory_can_be_saved(tmp_path):
    """What `compress` leaves of a loaded model, saved by its own `save_pretrained` after settling."""
    model = build("qwen3_moe")
    ids = torch.randint(3, 120, (4, 24), generator=torch.Generator().manual_seed(3))
    calibration = TokenBatches(ids, [None] * 4, "drawn", {"tokens": ids.numel()})
    passes = [{"merge.average": {"experts": 1, "router": "remap", "cluster": "kmeans", "protect_super_experts": False}}]
    result = moe_compress.compress(model, passes=passes, calibration=calibration, monitor=Monitor(show=False))
    assert {(n["num_experts_before"], n["num_experts"]) for n in result.report["layers"]} == {(8, 1)}
    _settle(MoEModel.wrap(result.model))
    result.save(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "out")(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-4)

"""Refitting after pruning: against dense least squares on the pruned model's own routing; where it can't be done."""

import pytest
import torch
from families import input_batch
from reference import activations_ETI, build, carry_out, experts_calls, joined, measure

from moe_compress import refit
from moe_compress.export.targets import find_target
from moe_compress.model import MoEModel
from moe_compress.passes import find_pass


def pruned(name, batches=None, layer=0, weigh=None, **options):
    """(model, the changed layer, weights before, plan of it, report, inputs): one layer pruned to 6 of 8 experts."""
    model = build(name)
    view = MoEModel.wrap(model)
    batches = batches or [input_batch(model, 6, 40, 1)]
    cls = find_pass("prune.experts")
    step = cls(cls.Options(experts=6, protect_super_experts=False, **options), find_target("native"))
    plan = step.plan(measure(view, batches, step.statistics()))
    index = view.moe_layers[layer]
    before = view.block(index).experts.weights().map(torch.clone)
    report, inputs = carry_out(view, step, plan, batches, only=index)[index]
    return model, index, before, plan.layers[index], report, inputs


def problem(model, layer, batches, kept, was):
    """Features [T, E·I] of the pruned layer as it runs, what it was to put out and puts out with its former weights."""
    call = joined(experts_calls(model, batches)[layer])
    activation = activations_ETI(MoEModel.wrap(model).block(layer).experts_module, call.hidden_TH)
    features = torch.zeros(len(call.hidden_TH), len(kept), activation.shape[2], dtype=torch.float64)
    output = torch.zeros(len(call.hidden_TH), was.down.shape[1], dtype=torch.float64)
    for t, e, g in call.choices():
        features[t, e] += g * activation[e, t]
        output[t] += g * (was.down[kept[e]].double() @ activation[e, t])
        if was.down_bias is not None:
            output[t] += g * was.down_bias[kept[e]].double()
    return features.flatten(1), output


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_what_is_left_is_solved_for_what_the_layer_put_out(name, monkeypatch):
    monkeypatch.setattr(refit, "_TOLERANCE", 1e-6)
    layer = 0 if name != "deepseek_v3" else -1
    original = build(name)
    batches = [input_batch(original, 6, 40, 1)]
    model, index, was, decision, report, _ = pruned(name, batches, layer, ridge=0.5)
    kept = decision["keep"]
    target = joined(experts_calls(original, batches)[index]).output_TH.double()
    features, output = problem(model, index, batches, kept, was)
    left = target - output
    scale = 0.5 * features.shape[1] / len(features) * float(features.square().sum(0).mean())
    step = torch.linalg.solve(features.T @ features + scale * torch.eye(features.shape[1]).double(), features.T @ left)
    now = MoEModel.wrap(model).block(index).experts.weights()
    found = (now.down - was.down[kept]).double().transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, step, rtol=2e-3, atol=2e-5)
    before, after = (float(e.square().sum() / target.square().sum()) for e in (left, left - features @ step))
    assert after < before
    size = target.square().sum(1)
    even = size.median() / (size + size.median())
    evened = (float(even @ e.square().sum(1) / (even @ size)) for e in (left, left - features @ step))
    assert report["refit"] == {
        "before": pytest.approx(before, rel=1e-3),
        "after": pytest.approx(after, rel=1e-3),
        "evened_before": pytest.approx(next(evened), rel=1e-3),
        "evened_after": pytest.approx(next(evened), rel=1e-3),
        "tokens": "as they are",
        "routing": "asked",
    }
    for (part, a), (_, b) in zip(was.items(), now.items(), strict=True):
        assert part == "down" or torch.equal(a[kept], b)


@pytest.mark.parametrize(
    ("criterion", "ridge"), [("reap", 0.25), ("random", 1e-4), ("random", 30.0), ("gram_greedy", 1)]
)
def test_refitting_is_never_worse_on_the_calibration_tokens(criterion, ridge):
    """What the model itself then puts out, with and without: fewer tokens than unknowns."""
    original = build("qwen3_moe")
    batches = [input_batch(original, 2, 20, 1)]
    error = {}
    for refitted in (False, True):
        model, index, *_ = pruned("qwen3_moe", batches, criterion=criterion, ridge=ridge, refit=refitted)
        target = joined(experts_calls(original, batches)[index]).output_TH.double()
        error[refitted] = float((joined(experts_calls(model, batches)[index]).output_TH - target).square().sum())
    assert error[True] < error[False]


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("muse_spark", 0, "a norm"),
        ("nemotron_h", 0, "the router reads more"),
        ("zaya", -1, "the router reads more"),
        ("deepseek_v4", 0, "the router reads more"),
    ],
)
def test_where_it_cannot_be_done_the_report_says_so(name, layer, reason):
    """Pruned as without refitting."""
    model, index, was, decision, report, _ = pruned(name, layer=layer)
    assert reason in report["refit"]["skipped"] or report["refit"]["skipped"].startswith(f"experts end in {reason}")
    now = MoEModel.wrap(model).block(index).experts.weights()
    for (_, a), (_, b) in zip(was.items(), now.items(), strict=True):
        assert torch.equal(a[decision["keep"]], b)


@torch.no_grad()
def test_tokens_count_as_much_as_they_weigh():
    """Tokens of weight zero say nothing, one of weight two counts twice: as if it were there twice."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 3, (240,), generator=generator)
    found = []
    for weighed in (True, False):
        model = build("qwen3_moe")
        view = MoEModel.wrap(model)
        index = view.moe_layers[0]
        call = joined(experts_calls(model, [input_batch(model, 6, 40, 1)])[index])
        rows = torch.arange(240) if weighed else torch.arange(240).repeat_interleave(counts)

        class Given:
            hidden_TH, index_TK, weight_TK = call.hidden_TH[rows], call.index_TK[rows], call.weight_TK[rows]
            token_weight_T = counts.double() if weighed else None

        block = view.block(index)
        around = refit.LayerRefit(block, Given())
        block.keep(list(range(6)))
        # The ridge is per token: as many tokens here as there.
        ridge = 0.5 * (240 / int(counts.sum()) if weighed else 1)
        around.after(block, [0, 1, 2, 3, 4, 5, -1, -1], ridge)
        found.append(block.experts.weights().down.clone())
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=2e-4)


def test_protected_experts_stay_and_nothing_removed_changes_nothing():
    model = build("qwen3_moe")
    view = MoEModel.wrap(model)
    batches = [input_batch(model, 6, 40, 1)]
    cls = find_pass("prune.experts")
    first = view.moe_layers[0]
    for experts, protected in ((8, []), (6, [2])):
        step = cls(cls.Options(experts=experts, protect_super_experts=False), find_target("native"))
        plan = step.plan(measure(view, batches, step.statistics()))
        keep = sorted({*plan.layers[first]["keep"], *protected})[:experts]
        plan.layers[first] |= {"keep": keep, "remove": [e for e in range(8) if e not in keep], "protected": protected}
        was = view.block(first).experts.weights().map(torch.clone)
        report, _ = carry_out(view, step, plan, batches, only=first)[first]
        now = view.block(first).experts.weights()
        same = [torch.equal(was.down[e], now.down[s]) for s, e in enumerate(keep)]
        assert same == [not report["refit"] or e in protected for e in keep]
        assert (report["refit"] is None) == (experts == 8)

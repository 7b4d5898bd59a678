"""Refitting down projections: against dense least squares in float64, and its promises on the calibration tokens."""

import pytest
import torch
from accelerate import cpu_offload
from families import input_batch
from reference import activations_ETI, build, carry_out, experts_calls, joined, measure, outputs_ETH

from moe_compress import refit
from moe_compress.calib.inputs import BlockInputs
from moe_compress.export.targets import find_target
from moe_compress.merge import refit as merge_refit
from moe_compress.merge.refit import refit_down
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.passes import find_pass
from moe_compress.refit import NewRouting, layer_output, refit_layer


def prepared(name="qwen3_moe", batch=(6, 40), layer=0):
    """(model, view, an MoE block, what its experts read)."""
    model = build(name)
    view = MoEModel.wrap(model)
    index = view.moe_layers[layer]
    return model, view, view.block(index), joined(experts_calls(model, [input_batch(model, *batch, 1)])[index])


def read(call):
    return call.hidden_TH, call.index_TK, call.weight_TK


def ridge_lstsq(features, wanted, ridge, rows):
    """min ‖F·D − Y‖² + λ‖D‖² as ordinary least squares with √λ·1 below F, λ as the file's head says."""
    unknowns = features.shape[1]
    scale = ridge * unknowns / rows * float(features.square().sum(0).mean())
    below = torch.eye(unknowns, dtype=torch.float64) * scale**0.5
    padded = torch.cat([wanted, torch.zeros(unknowns, wanted.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(torch.cat([features, below]), padded, driver="gelsd").solution


def features_TEI(block, call):
    """Every token's weighted neurons, float64."""
    activation = activations_ETI(block.experts_module, call.hidden_TH)
    features = torch.zeros(len(call.hidden_TH), 8, activation.shape[2], dtype=torch.float64)
    for t, e, g in call.choices():
        features[t, e] += g * activation[e, t]
    return features


@pytest.mark.parametrize("chunk", [512 << 20, 1])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_refit_down_is_least_squares(name, chunk, monkeypatch):
    monkeypatch.setattr(merge_refit, "_CHUNK_BYTES", chunk)
    _, _, block, call = prepared(name)
    module = block.experts_module
    experts = FusedExperts(module)
    groups = [[0, 3], [1], [2, 4, 5], [6, 7]]
    merged = experts.weights().map(lambda w: torch.stack([w[g].mean(0) for g in groups]))
    start = merged.map(torch.clone)
    error = refit_down(experts, merged, groups, *read(call), ridge=0.5)
    wanted = outputs_ETH(module, call.hidden_TH)
    for slot in range(len(groups)):  # the merged experts in the module, to ask the family's own class
        for (_, target), (_, value) in zip(experts.weights().items(), start.items(), strict=True):
            target[slot] = value[slot]
    activation = activations_ETI(module, call.hidden_TH)
    output = outputs_ETH(module, call.hidden_TH)
    before, after, size = 0.0, 0.0, 0.0
    for slot, members in enumerate(groups):
        if len(members) == 1:
            assert torch.equal(merged.down[slot], start.down[slot])
            continue
        rows = [(t, e, g) for t, e, g in call.choices() if e in members]
        features = torch.stack([g * activation[slot, t] for t, _, g in rows])
        left = torch.stack([g * (wanted[e, t] - output[slot, t]) for t, e, g in rows])
        step = ridge_lstsq(features, left, 0.5, len(rows))
        torch.testing.assert_close((merged.down[slot] - start.down[slot]).double(), step.T, rtol=1e-3, atol=1e-5)
        before += float(left.square().sum())
        after += float((left - features @ step).square().sum())
        size += sum(float((g * wanted[e, t]).square().sum()) for t, e, g in rows)
        assert float((left - features @ step).square().sum()) < float(left.square().sum())
    assert error.before == pytest.approx(before / size, rel=1e-4)
    assert error.after == pytest.approx(after / size, rel=1e-3)
    for (n, now), (_, then) in zip(merged.items(), start.items(), strict=True):
        assert n == "down" or torch.equal(now, then)


@pytest.mark.parametrize("chunk", [512 << 20, 1])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("frozen", [[], [2, 5]])
def test_refit_layer_is_least_squares(name, chunk, frozen, monkeypatch):
    monkeypatch.setattr(refit, "_CHUNK_BYTES", chunk)
    monkeypatch.setattr(refit, "_KEPT_BYTES", chunk)
    monkeypatch.setattr(refit, "_TOLERANCE", 1e-6)
    _, _, block, call = prepared(name)
    experts = FusedExperts(block.experts_module)
    hidden, index, weight = read(call)
    torch.testing.assert_close(layer_output(experts, hidden, index, weight), call.output_TH, rtol=1e-4, atol=1e-5)
    target = call.output_TH + 0.3 * torch.randn(call.output_TH.shape, generator=torch.Generator().manual_seed(0))
    features = features_TEI(block, call)
    left = (target - call.output_TH).double()
    free = [e for e in range(8) if e not in frozen]
    flat = features.flatten(1)
    scale = 0.5 * flat.shape[1] / len(hidden) * float(flat.square().sum(0).mean())
    used = features[:, free].flatten(1)
    step = torch.linalg.solve(used.T @ used + scale * torch.eye(used.shape[1]).double(), used.T @ left)
    if not frozen:
        torch.testing.assert_close(step, ridge_lstsq(used, left, 0.5, len(hidden)), rtol=1e-6, atol=1e-8)
    start = experts.weights().map(torch.clone)
    error = refit_layer(experts, hidden, index, weight, target, 0.5, frozen)
    found = (experts.weights().down - start.down).double().transpose(1, 2)
    assert torch.equal(experts.weights().down[frozen], start.down[frozen])
    torch.testing.assert_close(found[free].flatten(0, 1), step, rtol=1e-3, atol=1e-5)
    size = float(target.double().square().sum())
    assert error.before == pytest.approx(float(left.square().sum()) / size, rel=1e-3)
    assert error.after == pytest.approx(float((left - used @ step).square().sum()) / size, rel=1e-3)
    assert error.after < error.before
    again = layer_output(experts, hidden, index, weight)
    assert float((target - again).double().square().sum()) / size == pytest.approx(error.after, rel=1e-3)


@pytest.mark.parametrize("counted", [False, True])
def test_a_few_large_outputs_do_not_spoil_the_others(counted, monkeypatch):
    """What a few tokens ask for a hundred times as loud isn't to be had: all are solved for with tokens evened."""
    monkeypatch.setattr(refit, "_TOLERANCE", 1e-6)
    _, _, block, call = prepared()
    experts = FusedExperts(block.experts_module)
    generator = torch.Generator().manual_seed(0)
    count = torch.randint(0, 3, (240,), generator=generator) if counted else torch.ones(240)
    root = count.double().sqrt().unsqueeze(-1)
    target = call.output_TH + 0.1 * torch.randn(call.output_TH.shape, generator=generator)
    target[::60] += 100 * torch.randn(target[::60].shape, generator=generator)
    features = features_TEI(block, call).flatten(1) * root
    left, size = (target - call.output_TH).double() * root, (target.double() * root).square().sum(1)
    even = size[size > 0].median() / (size + size[size > 0].median())
    evened_left = even.sqrt().unsqueeze(-1) * left

    def evened(step):
        return float(even @ (left - features @ step).square().sum(1) / (even @ size))

    loud = ridge_lstsq(features, left, 0.5, 240)
    step = ridge_lstsq(even.sqrt().unsqueeze(-1) * features, evened_left, 0.5, 240)
    assert evened(loud) > 3 * evened(0 * step)
    start = experts.weights().down.clone()
    error = refit_layer(experts, *read(call), target, 0.5, count_T=count)
    found = (experts.weights().down - start).double().transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, step, rtol=2e-3, atol=1e-4)
    assert error.tokens == "evened"
    assert error.evened_before == pytest.approx(evened(0 * step), rel=1e-3)
    assert error.evened_after == pytest.approx(evened(step), rel=1e-3)
    assert error.evened_after < error.evened_before
    assert error.after == pytest.approx(float((left - features @ step).square().sum() / size.sum()), rel=1e-3)


@pytest.mark.parametrize("ridge", [1e-6, 0.25, 100.0])
@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_refit_layer_is_never_worse(ridge, iterations, monkeypatch):
    """Whatever the ridge, stopped whenever: conjugate gradients only ever go down."""
    monkeypatch.setattr(refit, "_ITERATIONS", iterations)
    _, _, block, call = prepared(batch=(1, 30))  # fewer tokens than neurons
    target = call.output_TH + torch.randn(call.output_TH.shape, generator=torch.Generator().manual_seed(0))
    error = refit_layer(FusedExperts(block.experts_module), *read(call), target, ridge)
    assert error.tokens == "as they are"
    assert error.after < error.before
    assert error.evened_after <= error.evened_before


def test_refitting_what_is_right_or_unseen_changes_nothing():
    _, _, block, call = prepared()
    experts = FusedExperts(block.experts_module)
    hidden, index, weight = read(call)
    before = experts.weights().down.clone()
    error = refit_layer(experts, hidden, index, weight, layer_output(experts, hidden, index, weight), 0.25)
    assert torch.equal(experts.weights().down, before)
    assert error.before == error.after == 0
    error = refit_layer(experts, hidden, index, torch.zeros_like(weight), call.output_TH, 0.25)  # nobody was chosen
    assert torch.equal(experts.weights().down, before)
    assert error.before == error.after == 1
    unseen = torch.where(index == 3, (index + 1) % 8, index)
    refit_layer(experts, hidden, unseen, weight, 2 * call.output_TH, 0.25)
    assert torch.equal(experts.weights().down[3], before[3])
    assert experts.weights().down.isfinite().all()
    merged = experts.weights().map(lambda w: w[:2].clone())
    none = torch.full_like(index, 7)
    refit_down(experts, merged, [[0, 1], [2], [3], [4], [5], [6], [7]], hidden, none, weight, 0.25)
    assert torch.equal(merged.down, experts.weights().down[:2])


def test_a_norm_behind_the_experts_is_refused():
    _, _, block, call = prepared("muse_spark")
    with pytest.raises(ValueError, match="not linear in the down projections"):
        refit_layer(FusedExperts(block.experts_module), *read(call), call.output_TH, 0.25)


@pytest.mark.parametrize(
    ("name", "layer", "known"),
    [
        *((n, -1, True) for n in ("qwen3_moe", "gpt_oss", "deepseek_v3")),
        ("nemotron_h", 0, False),  # experts read a projection of what the router reads
        ("zaya", 0, True),
        ("zaya", -1, False),  # later routers also read the state of earlier ones
        ("deepseek_v4", 0, False),  # tokens are routed by their ids
    ],
)
def test_the_router_is_asked_where_it_answers_as_it_did(name, layer, known):
    """Asked: what the changed block really does. Not: every choice goes where its expert went."""
    model, _, block, call = prepared(name, layer=layer)
    hidden, index, weight = read(call)
    routing = NewRouting(block, hidden, index, weight)
    assert routing.known == known
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    slots = [0, 0, 1, 1, 2, 2, 3, 3]
    if known:
        mixing = torch.eye(8, dtype=torch.float64)[::2]
        block.regroup([g[0] for g in groups], mixing, slots)
        new_index, new_weight = routing.after(block, slots)
        after = joined(experts_calls(model, [input_batch(model, 6, 40, 1)])[block.layer])
        assert torch.equal(new_index, after.index_TK)
        torch.testing.assert_close(new_weight, after.weight_TK)
        return
    new_index, new_weight = routing.after(block, slots)
    for token, (was, now) in enumerate(zip(index.tolist(), new_index.tolist(), strict=True)):
        for k, (e, s) in enumerate(zip(was, now, strict=True)):
            assert s == e // 2 or (e >= 8 and float(new_weight[token, k]) == 0)


FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "zaya", "gemma4", "muse_spark", "deepseek_v4"]


@pytest.mark.parametrize("refitting", ["down", "layer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_pass_refits_every_family(name, refitting):
    """By its defaults, or group by group: the report's errors go down, other weights are those without refitting."""
    states, reports = {}, {}
    cls = find_pass("merge.average")
    for how in ("none", refitting):
        model = build(name)
        view = MoEModel.wrap(model)
        batches = [input_batch(model, 4, 40, 1)]
        step = cls(cls.Options(experts=6, refit=how), find_target("native"))
        first = view.moe_layers[0]
        plan = step.plan(measure(view, batches, step.statistics()))
        reports[how] = carry_out(view, step, plan, batches, only=first)[first][0]
        states[how] = view.block(first).experts.weights().map(torch.clone)
        with torch.no_grad():
            assert model(**input_batch(model)).logits.isfinite().all()
    assert reports["none"]["refit"] is None
    told = reports[refitting]["refit"]
    if name == "muse_spark" and refitting == "layer":
        assert "norm" in told["skipped"]
        assert torch.equal(states["none"].down, states["layer"].down)
        return
    assert told["after"] <= told["before"]
    if told["before"]:  # not where all that was absorbed had seen no token
        assert told["after"] < told["before"]
        assert not torch.equal(states["none"].down, states[refitting].down)
    for (part, a), (_, b) in zip(states["none"].items(), states[refitting].items(), strict=True):
        assert part == "down" or torch.equal(a, b)
    if refitting == "layer" and name in ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"):
        assert told["routing"] == ("former choices" if name == "nemotron_h" else "asked")


def test_the_layer_after_refitting_is_nearer_to_the_original():
    """What the report says is what the model does: relative error of the experts' output on the calibration tokens."""
    cls = find_pass("merge.average")
    model = build("qwen3_moe")
    view = MoEModel.wrap(model)
    batches = [input_batch(model, 6, 40, 1)]
    first = view.moe_layers[0]
    before = joined(experts_calls(model, batches)[first]).output_TH
    step = cls(cls.Options(experts=6), find_target("native"))
    plan = step.plan(measure(view, batches, step.statistics()))
    report, inputs = carry_out(view, step, plan, batches, only=first)[first]
    assert isinstance(inputs, BlockInputs)
    after = joined(experts_calls(model, batches)[first]).output_TH
    error = float((after - before).double().square().sum() / before.double().square().sum())
    assert report["refit"]["after"] == pytest.approx(error, rel=1e-2)


def test_an_offloaded_model_is_refitted_alike():
    """The router is asked while accelerate's hooks stand by: what is merged is the same as in a model at hand."""
    results = []
    for offloaded in (False, True):
        model = build("qwen3_moe")
        if offloaded:
            cpu_offload(model, torch.device("cpu"))
        view = MoEModel.wrap(model)
        batches = [input_batch(model, 4, 40, 1)]
        cls = find_pass("merge.average")
        step = cls(cls.Options(experts=6), find_target("native"))
        reports = carry_out(view, step, step.plan(measure(view, batches, step.statistics())), batches)
        weights = {}
        for layer in view.moe_layers:
            with view.reading(layer) as tensors:
                weights |= {n: t.clone() for n, t in tensors.items()}
        with torch.no_grad():
            results.append((reports, weights, model(**batches[0]).logits))
    (plain, weights, logits), (reports, found, after) = results
    assert all(report["refit"]["routing"] == "asked" for report, _ in reports.values())
    assert {i: r for i, (r, _) in plain.items()} == {i: r for i, (r, _) in reports.items()}
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor)
    torch.testing.assert_close(after, logits)

"""Zeros inside experts: exact patterns, criteria and SparseGPT against plain loops, from disk as in memory."""

import copy

import pytest
import torch
from checkpoints import RTN, recipe, small_checkpoint, texts
from families import input_batch
from pydantic import ValidationError
from reference import activations_ETI, build, carry_out, experts_calls, joined
from running import digest
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.calib.collect import MemoryStore, Profile
from moe_compress.errors import InputError, RecipeError
from moe_compress.export.targets import find_target
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.shape import LayerShape, ModelShape, model_shape
from moe_compress.passes import find_pass
from moe_compress.progress import Monitor
from moe_compress.prune.masks import WEIGHT_CRITERIA, Pattern, weight_criterion
from moe_compress.prune.sparsegpt import sparsegpt


def sparse(**options):
    found = find_pass("prune.weights")
    return found(found.Options(**options), find_target("native"))


def problem(experts=3, rows=10, columns=32, tokens=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight_EOK = torch.randn(experts, rows, columns, generator=generator)
    mix_EKK = torch.randn(experts, columns, columns, generator=generator) / columns**0.5 + 0.1 * torch.eye(columns)
    tokens_ETK = torch.randn(experts, tokens, columns, generator=generator) @ mix_EKK
    return weight_EOK, tokens_ETK.transpose(1, 2) @ tokens_ETK


def error(change_OK, hessian_KK):
    return float(torch.trace(change_OK.double() @ hessian_KK.double() @ change_OK.double().T))


PATTERNS = [Pattern(0.5), Pattern(0.3), Pattern.named("2:4"), Pattern.named("4:8"), Pattern.named("1:4")]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_the_lowest_of_each_row_or_run(pattern):
    score = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    score[0, 0] = 1.0  # all alike: still exactly as many
    mask = pattern.mask(score)
    for e in range(2):
        for o in range(5):
            run = pattern.run or 24
            for start in range(0, 24, run):
                own = range(start, start + run)
                count = round(pattern.sparsity * run)
                expected = sorted(own, key=lambda k: (float(score[e, o, k]), k))[:count]
                assert [k for k in own if mask[e, o, k]] == sorted(expected)


def textbook(weight_OK, hessian_KK, pattern, block, damping=0.01):
    """Algorithm 1 of the paper for one expert: float64, H⁻¹ by its Cholesky factor, one column at a time."""
    weight, columns = weight_OK.double().clone(), weight_OK.shape[1]
    hessian = hessian_KK.double() / hessian_KK.double().diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian + damping * torch.eye(columns)), upper=True)
    zero = torch.zeros(weight.shape, dtype=torch.bool)
    span = pattern.run or block
    for column in range(columns):
        if column % span == 0:
            stop = min(column + span, columns)
            total = round(pattern.sparsity * columns)
            count = (
                total * stop // columns - total * column // columns
                if pattern.run is None
                else round(pattern.sparsity * span)
            )
            cost = (weight[:, column:stop] / upper.diagonal()[column:stop]).square()
            zero[:, column:stop].scatter_(1, cost.argsort(dim=1)[:, :count], True)
        new = torch.where(zero[:, column], 0.0, weight[:, column])
        wrong = (weight[:, column] - new) / upper[column, column]
        weight[:, column:] -= torch.outer(wrong, upper[column, column:])
        weight[:, column] = new
    return weight


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [8, 24])
def test_sparsegpt_is_the_textbooks(pattern, block):
    weight_EOK, hessian_EKK = problem()
    result = sparsegpt(weight_EOK, hessian_EKK, pattern, block=block)
    same = []
    for e in range(3):
        expected = textbook(
            weight_EOK[e], hessian_EKK[e], pattern, max(1, block // (pattern.run or 1)) * (pattern.run or 1)
        )
        same.append(torch.isclose(result.weight_EOK[e].double(), expected, atol=1e-4).all(-1))
        assert error(result.weight_EOK[e] - weight_EOK[e], hessian_EKK[e]) == pytest.approx(
            float(result.error_E[e]), rel=1e-4
        )
    # Rows in which Wanda's mask was better are that, and a tie broken otherwise changes the rest of its row.
    assert torch.cat(same).double().mean() > 0.9 - float(result.masked_rows_E.sum()) / 30


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [200, 12, 0])
def test_sparsegpt_is_never_worse_than_wandas_mask(pattern, tokens):
    weight_EOK, hessian_EKK = problem(tokens=tokens, seed=tokens)
    result = sparsegpt(weight_EOK, hessian_EKK, pattern)
    zeros = (result.weight_EOK == 0).sum(-1)
    assert zeros.unique().tolist() == [round(pattern.sparsity * 32)]
    if pattern.run:
        assert (result.weight_EOK.unflatten(-1, (-1, pattern.run)) == 0).sum(-1).unique().tolist() == [
            round(pattern.sparsity * pattern.run)
        ]
    for e in range(3):
        damped = hessian_EKK[e].diagonal() + result.damping_E[e] * hessian_EKK[e].diagonal().mean()
        norms = damped.sqrt() if tokens else torch.ones(32)
        masked = weight_EOK[e].masked_fill(pattern.mask((weight_EOK[e].abs() * norms)[None])[0], 0)
        wanda = error(masked - weight_EOK[e], hessian_EKK[e])
        mine = error(result.weight_EOK[e] - weight_EOK[e], hessian_EKK[e])
        assert float(result.masked_error_E[e]) == pytest.approx(wanda, rel=1e-3, abs=1e-9)
        assert mine <= wanda * (1 + 1e-5)
        if tokens == 200:
            assert mine < 0.95 * wanda  # it is worth it
        if tokens == 0:  # nothing is known of the inputs: magnitude, and no weight changes
            assert torch.equal(result.weight_EOK[e], masked)


def test_sparsegpt_takes_first_what_no_token_reads():
    """Four channels are silent, three are weaker than the mean: zeros are for the silent ones, and cost nothing."""
    weight_EOK = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).sign()
    hessian_EKK = torch.tensor([8, 0.5, 0, 0.5, 0, 0.5, 0, 0]).diag()[None]
    result = sparsegpt(weight_EOK, hessian_EKK, Pattern(0.5))
    assert not result.weight_EOK[0, :, [2, 4, 6, 7]].any()
    assert (float(result.error_E), int(result.masked_rows_E)) == (0, 0)


def test_memory_limit_and_stacking_change_nothing():
    weight_EOK, hessian_EKK = problem(rows=12)
    whole = sparsegpt(weight_EOK, hessian_EKK, Pattern.named("2:4"))
    few = sparsegpt(weight_EOK, hessian_EKK, Pattern.named("2:4"), memory_limit=1)
    part = sparsegpt(weight_EOK[:, :5], hessian_EKK, Pattern.named("2:4"))
    torch.testing.assert_close(few.weight_EOK, whole.weight_EOK)
    torch.testing.assert_close(part.weight_EOK, whole.weight_EOK[:, :5])


FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"]


def batches_of(model):
    return [input_batch(model, 4, 16, 1), input_batch(model, 2, 9, 2)]


@pytest.mark.parametrize("criterion", ["wanda", "moe_pruner"])
@pytest.mark.parametrize("name", FAMILIES)
def test_wanda_and_moe_pruner_by_hand(name, criterion):
    """The first layer (whose inputs no change has touched), in float64, one expert and one row at a time."""
    model = build(name)
    original = copy.deepcopy(model)
    view, before = MoEModel.wrap(model), MoEModel.wrap(original)
    layer = view.moe_layers[0]
    step = sparse(criterion=criterion, sparsity=0.5)
    call = joined(experts_calls(original, batches_of(original))[layer])
    (report, _) = carry_out(view, step, step.plan(_profile(view)), batches_of(model), only=layer)[layer]
    old = FusedExperts(before.block(layer).experts_module).weights()
    new = FusedExperts(view.block(layer).experts_module).weights()
    sliced = copy.deepcopy(before.block(layer).experts_module)
    own = FusedExperts(sliced).weights()
    for what, value in own.matrices():
        if what != "down":
            value.copy_(getattr(new, what))
    activations = activations_ETI(sliced, call.hidden_TH)
    checked = 0
    for expert in range(len(old.up)):
        rows = [(t, g) for t, e, g in call.choices() if e == expert]
        assert report["experts"][expert]["tokens"] == len(rows)
        if not rows:
            continue
        for what, value in old.matrices():
            read = call.hidden_TH.double() if what != "down" else activations[expert]
            norm = sum(((g if criterion == "moe_pruner" else 1.0) * read[t]).square() for t, g in rows).sqrt()
            for row, (weights, result) in enumerate(zip(value[expert], getattr(new, what)[expert], strict=True)):
                score = weights.double().abs() * norm
                zero = result == 0
                assert int(zero.sum()) == round(0.5 * len(score)), (what, row)
                assert score[zero].max() <= score[~zero].min() * (1 + 1e-5)
                assert torch.equal(result[~zero], weights[~zero])
                checked += 1
    assert checked > 100


def _profile(view):
    return Profile(model_shape(view), MemoryStore(), len(view.layers))


def block_error(original, model, batches, layer):
    """‖ŷ − y‖² / ‖y‖² of one layer's experts on what the original reads there."""
    call = joined(experts_calls(original, batches)[layer])
    with torch.no_grad():
        outputs = [
            MoEModel.wrap(m).block(layer).experts_module(call.hidden_TH, call.index_TK, call.weight_TK).double()
            for m in (original, model)
        ]
    return float((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum())


@pytest.mark.parametrize("name", FAMILIES)
def test_criteria_in_their_order(name):
    """On the tokens that they saw, by the error of the first block's output: SparseGPT, then Wanda, then random."""
    errors = {}
    for criterion in ("random", "magnitude", "wanda", "moe_pruner", "sparsegpt"):
        original = build(name)
        model = copy.deepcopy(original)
        view = MoEModel.wrap(model)
        batches = [input_batch(model, 16, 32, 3)]
        step = sparse(criterion=criterion, pattern="2:4")
        layer = view.moe_layers[0]
        report = carry_out(view, step, step.plan(_profile(view)), batches, only=layer)[layer][0]
        assert report["zeros"] == 0.5
        for _, value in FusedExperts(view.block(layer).experts_module).weights().matrices():
            assert ((value.unflatten(-1, (-1, 4)) == 0).sum(-1) == 2).all()
        errors[criterion] = block_error(original, model, batches, layer)
    assert errors["sparsegpt"] < errors["wanda"] < errors["random"]
    assert errors["magnitude"] < errors["random"]


def test_projections_and_what_cannot_be():
    model = build("qwen3_moe")
    view = MoEModel.wrap(model)
    step = sparse(criterion="sparsegpt", sparsity=0.25, projections=["down"])
    report = carry_out(view, step, step.plan(_profile(view)), batches_of(model), only=0)[0][0]
    assert all(e["zeros"] == {"gate": 0, "up": 0, "down": 0.25} for e in report["experts"])
    for wrong, message in (
        ({}, "give either"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give either"),
        ({"pattern": "4:2"}, "pattern is N:M"),
        ({"pattern": "half"}, "pattern is N:M"),
        ({"sparsity": 0.5, "criterion": "wandah"}, "did you mean 'wanda'"),
    ):
        with pytest.raises((ValidationError, RecipeError), match=message):
            sparse(**wrong)
    shape = ModelShape({3: LayerShape(4, 2, None, 30, 32, 3, 0, 2, 0).with_experts(4)}, 0)
    with pytest.raises(RecipeError, match=r"runs of 4, and those of gate in layer 3 have 30"):
        sparse(pattern="2:4").forecast(shape)
    assert sparse(pattern="2:4", projections=["down"]).forecast(shape) == shape
    with pytest.raises(InputError, match="needs what the experts read"):
        sparse(criterion="wanda", sparsity=0.5).apply(view.block(0), {
            "criterion": "wanda", "zeros": 0.5, "run": None, "projections": ["up"]}, None)  # fmt: skip
    assert not sparse(criterion="magnitude", sparsity=0.5).needs_text()
    assert sparse(sparsity=0.5).needs_text()


def test_a_criterion_is_one_function():
    @weight_criterion("first", "a test: the first inputs go")
    def first(weight_EOK, _squares, _generator):
        """The number of the input."""
        return torch.arange(weight_EOK.shape[-1]).expand(weight_EOK.shape).float()

    try:
        model = build("gpt_oss")
        view = MoEModel.wrap(model)
        step = sparse(criterion="first", sparsity=0.25)
        with view.layer(0) as layer, view.editing(layer) as block:
            step.apply(block, step.plan(_profile(view)).layers[0], None)
            for _, value in FusedExperts(block.experts_module).weights().matrices():
                quarter = value.shape[-1] // 4
                assert (value[..., :quarter] == 0).all()
                assert (value[..., quarter:] != 0).all()
    finally:
        del WEIGHT_CRITERIA["first"]


@pytest.mark.parametrize("criterion", ["random", "sparsegpt"])
def test_from_disk_as_in_memory_the_same_bytes_and_size(criterion, tmp_path):
    model, text = small_checkpoint(tmp_path / "model"), texts(tmp_path / "text")
    step = {"prune.weights": {"criterion": criterion, "pattern": "2:4"}}
    results = []
    for output in ("one", "two"):
        values = recipe(model, tmp_path / output, [step], text)
        results.append(moe_compress.run(values, monitor=Monitor(show=False)))
    files = [{n: d for n, d in digest(r.output).items() if n.endswith(".safetensors")} for r in results]
    assert files[0] == files[1]
    report = results[0].report
    assert report["after"]["bytes"] == report["before"]["bytes"]
    assert "as large as before" in report["passes"][0]["notes"][0]
    assert all(layer["passes"][0]["zeros"] == 0.5 for layer in report["layers"])
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    moe_compress.compress(
        loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        passes=[step],
        calibration=values["calibration"],
        monitor=Monitor(show=False),
    )
    saved = AutoModelForCausalLM.from_pretrained(results[0].output, dtype=torch.float32)
    for name, value in saved.named_parameters():
        if ".experts." in name:
            assert float((value == 0).double().mean()) == 0.5
            other = loaded.get_parameter(name)
            # In memory weights stay float32, on disk they are rounded: later layers read other things.
            same = float(((value == 0) == (other == 0)).double().mean())
            assert same > (0.999 if ".layers.0." in name else 0.9)
            if criterion == "random":
                torch.testing.assert_close(other, value)


def test_quantizing_follows(tmp_path):
    model, text = small_checkpoint(tmp_path / "model"), texts(tmp_path / "text")
    values = recipe(model, tmp_path / "out", [{"prune.weights": {"criterion": "wanda", "sparsity": 0.5}}, RTN], text)
    report = moe_compress.run(values, monitor=Monitor(show=False)).report
    assert report["after"]["bytes"] < report["before"]["bytes"]
    assert [p["name"] for p in report["passes"]] == ["prune.weights", "quantize.mixed"]

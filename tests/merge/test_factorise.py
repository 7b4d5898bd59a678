"""Factorising a block: what it computes, what is reported as left, and its statistics, by the model's own calls."""

import itertools

import pytest
import torch
from families import input_batch, tiny_model
from reference import experts_calls, joined, measure

from moe_compress.calib.collect import MemoryStore, collect
from moe_compress.calib.inputs import BlockInputs
from moe_compress.export.targets import find_target
from moe_compress.merge.factorise import FactoriseOptions, MergeFactorise
from moe_compress.merge.spectra import FactorSpectrum, FisherSpectrum
from moe_compress.merge.splits import barycentre_order
from moe_compress.model import MoEModel, hf
from moe_compress.model.backward import GradientSweep
from moe_compress.model.losses import NextToken
from moe_compress.progress import Progress


def step(target="native", **options):
    return MergeFactorise(FactoriseOptions(**options), find_target(target))


def read_block(name):
    """A tiny model's first block with what it read, and that as the reference sees it."""
    model = tiny_model(name)
    batches = [input_batch(model, 4, 16, s) for s in range(3)]
    view = MoEModel.wrap(model)
    block, inputs = view.block(view.moe_layers[0]), BlockInputs()
    call = joined(experts_calls(model, batches)[view.moe_layers[0]])
    inputs._parts = [(call.hidden_TH, call.index_TK, call.weight_TK)]
    inputs._counted = [torch.ones(len(call.hidden_TH), dtype=torch.float64)]
    return model, view, batches, block, inputs


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"])
@pytest.mark.parametrize("method", ["svd", "d2-moe", "resmoe", "latent", "mc-smoe"])
def test_full_rank_is_the_model(name, method):
    """Whatever a method holds as it is, at full rank the rest makes the block what it was."""
    _, _, _, block, inputs = read_block(name)
    hidden, index, weight = inputs.hidden_TH[:20], inputs.index_TK[:20], inputs.weight_TK[:20]
    before = block.experts_module(hidden, index, weight)
    made = step(method=method, keep=0.5, **({"base": "mean"} if method == "d2-moe" else {}))
    full = {}
    for key, stacked in block.experts.weights().matrices():
        sides = stacked.shape[1:]
        full[key] = [(sides[0 if key == "down" else 1] if method == "latent" else min(sides))] * len(stacked)
    report = made.apply(block, {"ranks": full, "dtype": "float32"}, inputs)
    after = block.experts_module(hidden, index, weight)
    assert block.kind == "factored"
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    assert all(value < 1e-6 for row in report["experts"] for value in row["error"].values())


@torch.no_grad()
@pytest.mark.parametrize("method", ["svd", "d2-moe", "resmoe", "latent", "mc-smoe", "mobe"])
def test_what_is_reported_as_left_is_what_is_left(method):
    """The error of every matrix on the rows that it read, row by row (aligned experts: of its own permutation)."""
    _, _, _, block, inputs = read_block("qwen3_moe")
    more = {"base": "mean"} if method == "d2-moe" else {}
    made = step(method=method, keep=0.5, shrinkage=0, damping=1e-9, bases=3, fit_steps=5, **more)
    before = block.experts.weights().map(torch.clone)
    ranks = {n: [5] * 8 for n in ("gate", "up")} | {"down": [-1 if method == "mobe" else 5] * 8}
    report = made.apply(block, {"ranks": ranks, "dtype": "float32"}, inputs)
    after = block.experts.weights()
    chosen = (inputs.index_TK == 3) * inputs.weight_TK.double()
    rows = inputs.hidden_TH.double()[chosen.sum(1) > 0] * chosen.sum(1)[chosen.sum(1) > 0].unsqueeze(1)
    wanted = rows @ before.up[3].double().T
    if method == "resmoe":
        wanted = wanted[:, barycentre_order(before)[3]]
    left = (wanted - rows @ after.up[3].double().T).square().sum() / wanted.square().sum()
    assert report["experts"][3]["error"]["up"] == pytest.approx(float(left), rel=0.02)
    assert 0 < float(left) < 1


def test_base_by_fisher_information_is_that_of_plain_autograd():
    model, view, batches, _, _ = read_block("gpt_oss")
    made = step(method="d2-moe", keep=0.5)
    assert made.learns()
    assert made.goes_back()
    statistic, store = FisherSpectrum("d2-moe", "fisher"), MemoryStore()
    with GradientSweep(view, batches, None) as sweep:
        collect(sweep, [statistic], store, Progress(), NextToken(batches))
    layer = view.moe_layers[0]
    experts = view.block(layer).experts_module
    squares = 0.0
    for batch in batches:
        model.zero_grad()
        model.requires_grad_(True)
        with hf.implementation(model, "eager"):
            model(**batch, labels=batch["input_ids"]).loss.backward()
        squares = squares + experts.down_proj.grad.double().square()
    matrix = experts.down_proj.detach().double()
    total = squares.sum(0)
    expected = torch.where(total > 0, (matrix * squares).sum(0) / total.clamp_min(1e-300), matrix.mean(0)).T
    found = store.get(layer, statistic.key)["base_down"].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert not torch.allclose(found, matrix.mean(0).T, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_spectrum_is_the_error_at_the_output_relative_to_the_hidden_state():
    """`output` and spectra, from the model's own calls, by plain loops (without shrinking and nearly no damping)."""
    model, view, batches, block, inputs = read_block("qwen3_moe")
    statistic = FactorSpectrum(shrinkage=0, damping=1e-9)
    layer = view.moe_layers[0]
    found = measure(view, batches, [statistic]).of(layer, statistic)
    behind = []
    handle = block.module.register_forward_hook(
        lambda _m, _a, out: behind.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad(), hf.implementation(model, "eager"):
        for batch in batches:
            model(**batch)
    handle.remove()
    norm = torch.cat([b.flatten(0, 1) for b in behind]).double().square().sum(1)
    weights = []
    moment = torch.zeros(32, 32, dtype=torch.float64)
    every = []
    for token, slot in itertools.product(*map(range, inputs.index_TK.shape)):
        own = float(inputs.weight_TK[token, slot]) ** 2 / float(norm[token])
        every.append(own)
        if inputs.index_TK[token, slot] == 2:
            row = inputs.hidden_TH[token].double()
            moment += own * torch.outer(row, row)
            weights.append(own)
    moment /= sum(weights)
    up = block.experts.weights().up[2].double()
    values = torch.linalg.eigvalsh(up @ moment @ up.T).flip(0)
    torch.testing.assert_close(found["squares"][2, 1], values, rtol=1e-3, atol=1e-5 * float(values[0]))
    assert float(found["energy"][2, 1]) == pytest.approx(float(values.sum()), rel=1e-4)
    scale = sum(weights) + sum(every) / len(every)
    assert float(found["output"][2] / found["energy"][2, 2]) == pytest.approx(scale, rel=1e-5)

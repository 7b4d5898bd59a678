"""What solvers are given of the calibration text, and the target of down projections, against plain loops."""

import pytest
import torch
from families import tiny_model
from reference import activations_ETI

from moe_compress.calib.inputs import BlockInputs
from moe_compress.errors import DataError
from moe_compress.model import ExpertWeights, FusedExperts, MoEModel
from moe_compress.quant import experts as experts_module
from moe_compress.quant import layer_rows
from moe_compress.quant.compensation import compensated
from moe_compress.quant.experts import quantize_experts
from moe_compress.quant.gptq import gptq
from moe_compress.quant.grid import dequantize
from moe_compress.quant.layer_rows import LayerRows
from moe_compress.quant.solver import SolverOptions

POWERS = {"plain": 0, "gate": 1, "gate_squared": 2}


def read(block, tokens=90, seed=0) -> BlockInputs:
    """Inputs and a routing in which expert 0 is chosen by nobody, expert 1 by one token."""
    generator = torch.Generator().manual_seed(seed)
    count = block.num_experts
    score_TE = torch.rand(tokens, count, generator=generator)
    score_TE[:, :2] = -1
    score_TE[5, 1] = 2
    weight_TK, index_TK = score_TE.topk(2)
    inputs = BlockInputs()
    hidden = torch.randn(tokens, block.experts.hidden_size, generator=generator)
    inputs._parts.append((hidden, index_TK, weight_TK * torch.rand(weight_TK.shape, generator=generator)))
    return inputs


def first_block(name):
    view = MoEModel.wrap(tiny_model(name, 0))
    return view.block(view.moe_layers[0])


def rows_of(inputs, expert):
    """Tokens of an expert and their routing weights, float64."""
    token, slot = (inputs.index_TK == expert).nonzero(as_tuple=True)
    return token, inputs.weight_TK[token, slot].double()


def mean_of(values_RA, weight_R, power):
    """Weighted mean of v vᵀ and (Σ w)² / Σ w²."""
    weight_R = weight_R**power
    moment = sum((w * torch.outer(v, v) for w, v in zip(weight_R, values_RA.double(), strict=True)))
    return moment / weight_R.sum(), float(weight_R.sum() ** 2 / weight_R.square().sum())


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("weighing", POWERS)
def test_moments_of_weighed_rows(name, weighing, monkeypatch):
    block = first_block(name)
    inputs, experts = read(block), FusedExperts(block.experts_module)
    layer = LayerRows(experts, inputs, weighing)
    everyone = torch.cat([rows_of(inputs, e)[1] for e in range(block.num_experts)])
    sums = [torch.zeros(()), torch.zeros(())]
    for rows in layer.parts(1 << 14):
        weights = experts.weights().part(rows.experts)
        moments = [
            rows.moment(v) for v in (rows.input_RH, experts.activations_with(weights, rows.input_RH, rows.dispatch))
        ]
        for place, expert in enumerate(rows.experts):
            token, weight_R = rows_of(inputs, expert)
            assert int(rows.seen_C[place]) == len(token)
            if not len(token):
                assert float(rows.evidence_C[place]) == 0
                assert not moments[0][place].any()
                continue
            values = (inputs.hidden_TH[token], activations_ETI(block.experts_module, inputs.hidden_TH[token])[expert])
            for index, own in enumerate(values):
                mean, evidence = mean_of(own, weight_R, POWERS[weighing])
                assert float(rows.evidence_C[place]) == pytest.approx(evidence)
                torch.testing.assert_close(moments[index][place].double() / evidence, mean, rtol=1e-4, atol=1e-6)
                sums[index] = sums[index] + mean * (weight_R ** POWERS[weighing]).sum()
    total = (everyone ** POWERS[weighing]).sum()
    for found, own in zip(layer.means(), sums, strict=True):
        torch.testing.assert_close(found.double(), own / total, rtol=1e-4, atol=1e-6)
    # With more rows than the sample needs, the mean of activations is one of every so many rows.
    monkeypatch.setattr(layer_rows, "SAMPLE", 1)
    all_rows = [
        (e, int(t), float(w)) for e in range(block.num_experts) for t, w in zip(*rows_of(inputs, e), strict=True)
    ]
    chosen = all_rows[:: len(all_rows) // experts.intermediate_size]
    assert len(chosen) < len(all_rows)
    activations = activations_ETI(block.experts_module, inputs.hidden_TH)
    values = torch.stack([activations[e][t] for e, t, _ in chosen])
    mean, _ = mean_of(values, torch.tensor([w for *_, w in chosen], dtype=torch.float64), POWERS[weighing])
    torch.testing.assert_close(layer.means()[1].double(), mean, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("weighing", POWERS)
def test_tokens_that_count_nothing_are_not_there(weighing):
    """Token weights (calibration's `modality_weights`): 0 leaves a token out, and only ratios matter to means."""
    block = first_block("qwen3_moe")
    inputs, experts = read(block), FusedExperts(block.experts_module)
    hidden_TH, index_TK, weight_TK = inputs._parts[0]
    kept = torch.arange(len(hidden_TH)) % 3 > 0
    inputs._counted, inputs._weighed = [torch.where(kept, 0.25, 0.0)], True
    alone = BlockInputs()
    alone._parts.append((hidden_TH[kept], index_TK[kept], weight_TK[kept]))
    weighed, without = (list(LayerRows(experts, own, weighing).parts(1 << 30)) for own in (inputs, alone))
    for found, expected in zip(weighed, without, strict=True):
        torch.testing.assert_close(found.evidence_C, expected.evidence_C)
        torch.testing.assert_close(found.moment(found.input_RH), expected.moment(expected.input_RH))
    means = [LayerRows(experts, own, weighing).means()[0] for own in (inputs, alone)]
    torch.testing.assert_close(means[0], means[1])


@torch.no_grad()
def test_few_tokens_that_count_and_none(monkeypatch):
    """The mean is of a sample of the rows that count: of all rows, every so many may all be of tokens that don't."""
    block = first_block("qwen3_moe")
    inputs, experts = read(block), FusedExperts(block.experts_module)
    monkeypatch.setattr(layer_rows, "SAMPLE", 1)
    rows = LayerRows(experts, inputs, "plain")
    step = len(rows.weight_R) // experts.intermediate_size
    assert step > 1
    taken = rows.dispatch.token_R[::step].unique()
    counts_T = torch.ones(inputs.tokens, dtype=torch.float64)
    counts_T[taken] = 0
    assert counts_T.any()
    inputs._counted, inputs._weighed = [counts_T], True
    assert all(mean.isfinite().all() and mean.any() for mean in LayerRows(experts, inputs, "plain").means())
    inputs._counted = [torch.zeros_like(counts_T)]
    with pytest.raises(DataError, match="saw a token that counts: there is nothing to calibrate with"):
        LayerRows(experts, inputs, "plain").means()


@pytest.mark.parametrize("tokens", [3, 200])
def test_compensation_is_the_least_squares_solution(tokens):
    generator = torch.Generator().manual_seed(tokens)
    weight_EOK = torch.randn(2, 5, 12, generator=generator)
    exact_ETK = torch.randn(2, tokens, 12, generator=generator)
    coarse_ETK = exact_ETK + 0.3 * torch.randn(2, tokens, 12, generator=generator)
    hessian_EKK = coarse_ETK.transpose(1, 2) @ coarse_ETK
    found_EOK = compensated(weight_EOK, hessian_EKK, (exact_ETK - coarse_ETK).transpose(1, 2) @ coarse_ETK, 0.05)
    for expert in range(2):
        weight, exact, coarse = (x[expert].double() for x in (weight_EOK, exact_ETK, coarse_ETK))
        ridge = (0.05 * hessian_EKK[expert].double().diagonal().mean()).sqrt() * torch.eye(12, dtype=torch.float64)
        left, right = torch.cat([coarse, ridge]), torch.cat([exact @ weight.T, ridge @ weight.T])
        expected = torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(found_EOK[expert].double(), expected, rtol=1e-3, atol=1e-4)


def test_compensation_without_change_or_tokens_is_none():
    weight_EOK = torch.randn(2, 5, 12)
    hessian_EKK = torch.stack([torch.eye(12), torch.zeros(12, 12)])
    assert torch.equal(compensated(weight_EOK, hessian_EKK, torch.zeros(2, 12, 12), 0.01), weight_EOK)


def block_error(block, exact_TH, inputs):
    return float((block.experts_module(inputs.hidden_TH, inputs.index_TK, inputs.weight_TK) - exact_TH).square().sum())


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_what_the_solver_is_given(name, monkeypatch):
    """Hessians of what is really read, shrunk by evidence; down projections whose target heeds coarse gate and up."""
    block = first_block(name)
    inputs = read(block)
    experts = FusedExperts(block.experts_module)
    original = experts.weights().map(torch.clone)
    asked = []
    monkeypatch.setattr(experts_module, "gptq", lambda w, h, g, **o: asked.append((w, h, r := gptq(w, h, g, **o))) or r)
    options = SolverOptions(group_size=4, shrinkage=7.0)
    widths = {n: [2] * block.num_experts for n, _ in original.matrices()}
    quantize_experts(block, widths, options, inputs)
    (inward, inward_hessian, inward_result), (down, down_hessian, _) = asked
    coarse = dequantize(inward_result.quantized)
    halves = coarse.chunk(2, dim=1) if original.gate is not None else (None, coarse)
    values = dict(original.items()) | {n: h for n, h in zip(("gate", "up"), halves, strict=True) if h is not None}
    mean_read = mean_exact = 0
    own = {}
    for expert in range(block.num_experts):
        token, weight_R = rows_of(inputs, expert)
        hidden = inputs.hidden_TH[token]
        one = [
            ExpertWeights(**{k: v[expert : expert + 1] for k, v in w.items()}) for w in (dict(original.items()), values)
        ]
        dispatch = layer_rows.Dispatch.of(torch.zeros(len(token), 1, dtype=torch.long), torch.ones(len(token), 1), 1)
        exact, quantized = (experts.activations_with(w, hidden, dispatch).double() for w in one)
        own[expert] = (hidden.double(), exact, quantized, weight_R.square())
        mean_read = mean_read + (hidden.double().T * weight_R.square()) @ hidden.double()
        mean_exact = mean_exact + (exact.T * weight_R.square()) @ exact
    total = sum(float(w.sum()) for *_, w in own.values())
    mean_read, mean_exact = mean_read / total, mean_exact / total
    for expert, (hidden, exact, quantized, weight_R) in own.items():
        evidence = float(weight_R.sum() ** 2 / weight_R.square().sum()) if len(weight_R) else 0.0
        share = weight_R * evidence / weight_R.sum()
        expected = ((hidden.T * share) @ hidden + 7 * mean_read) / (evidence + 7)
        torch.testing.assert_close(inward_hessian[expert].double(), expected, rtol=1e-3, atol=1e-5)
        expected = ((quantized.T * share) @ quantized + 7 * mean_exact) / (evidence + 7)
        torch.testing.assert_close(down_hessian[expert].double(), expected, rtol=1e-3, atol=1e-5)
        cross = ((exact - quantized).T * share) @ quantized / (evidence + 7)
        ridge = 0.01 * expected.diagonal().mean() * torch.eye(len(expected), dtype=torch.float64)
        target = original.down[expert].double() @ (
            torch.eye(len(expected)) + cross @ torch.linalg.inv(expected + ridge)
        )
        torch.testing.assert_close(down[expert].double(), target, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(inward, torch.cat([m for n, m in original.matrices() if n != "down"], 1))


@torch.no_grad()
def test_each_step_helps_on_the_calibration_tokens():
    """Block output error falls with each: Hessians by routing weights, compensation, polishing."""
    plain = {"hessian": "plain", "compensate": False, "sweeps": 0}
    steps = [plain, plain | {"compensate": True}, {"sweeps": 0}, {"sweeps": 2}]
    errors = []
    for options in steps:
        block = first_block("qwen3_moe")
        inputs = read(block, 400)
        exact = block.experts_module(inputs.hidden_TH, inputs.index_TK, inputs.weight_TK)
        widths = {n: [2] * block.num_experts for n, _ in FusedExperts(block.experts_module).weights().matrices()}
        quantize_experts(block, widths, SolverOptions(group_size=8, shrinkage=0.0, **options), inputs)
        errors.append(block_error(block, exact, inputs))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]

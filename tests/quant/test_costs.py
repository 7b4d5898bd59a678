"""What a width costs: statistics against plain loops over the model's own forward, formulas against their papers.

Errors measured by running candidates are in test_cost.py.
"""

import functools

import numpy as np
import pytest
import torch
from families import input_batch
from reference import KINDS, activations_ETI, build, experts_calls, joined, measure, outputs_ETH
from test_cost import matrices, to_nearest, traced, turned

from moe_compress.calib.statistics import Routing
from moe_compress.errors import RecipeError
from moe_compress.model import MoEModel
from moe_compress.model.shape import LayerShape
from moe_compress.quant.cost import QuantizationError
from moe_compress.quant.costs import COSTS, Asked, find_cost
from moe_compress.quant.gain import SolverGain
from moe_compress.quant.gptq import column_costs, foreseen_share, gptq, shrink_hessians
from moe_compress.quant.gram import GramError
from moe_compress.quant.grid import Grid, dequantize
from moe_compress.quant.options import MixedOptions
from moe_compress.quant.rtn import round_to_nearest
from moe_compress.quant.scores import BlockTurn, WeightOutliers, WeightSpectrum, hill, spectrum

GROUP, BITS = 4, (1, 3)
# What the residual stream gets is what the experts put out: no several streams, latent space or norm between them.
PLAIN = ["qwen3_moe", "gpt_oss"]


@functools.cache
def model_of(name):
    return build(name)


def batches_of(name):
    return [input_batch(model_of(name), *shape) for shape in ((2, 9, 1), (1, 6, 2))]


@pytest.mark.parametrize(
    ("name", "rotate"), [*((k, "none") for k in KINDS if k not in ("muse_spark",)), ("qwen3_moe", "both")]
)
def test_gram_error_is_a_sum_over_rows(name, rotate):
    """tr(ΔW·H·ΔWᵀ) is Σ over the expert's rows of the squared change of the matrix' own output, weighted."""
    batches, statistic = batches_of(name), GramError(BITS, GROUP, rotate=rotate)
    view = MoEModel.wrap(model_of(name))
    layer = view.moe_layers[0]
    found = measure(view, batches, [statistic]).of(layer, statistic)
    module, call = view.block(layer).experts_module, joined(experts_calls(model_of(name), batches)[layer])
    hidden_TH = torch.cat([states for _, states in traced(model_of(name), layer, batches)])
    read = {"down": activations_ETI(module, call.hidden_TH)}
    output_ETH = outputs_ETH(module, call.hidden_TH)
    expected = {k: torch.zeros_like(v) for k, v in found.items()}
    for token, expert, weight in call.choices():
        scale = weight**2 / float(hidden_TH[token].square().sum())
        expected["output"][expert] += scale * float(output_ETH[expert, token].square().sum())
        for m, (matrix_name, matrix) in enumerate(matrices(module, expert)):
            x = read[matrix_name][expert, token] if matrix_name == "down" else call.hidden_TH[token].double()
            expected["energy"][expert, m] += scale * float((matrix.double() @ x).square().sum())
            rotation = turned(rotate, layer, matrix_name, matrix.shape[1])
            for b, bits in enumerate(BITS):
                change = (matrix.double() - to_nearest(matrix, bits, rotation)) @ x
                expected["error"][expert, m, b] += scale * float(change.square().sum())
    assert expected["output"].count_nonzero() > 1
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=2e-3, atol=1e-9)


def test_gram_is_the_measured_error_of_a_down_projection():
    """There nothing lies between the matrix' output and the block's: both statistics say the same."""
    view, batches = MoEModel.wrap(model_of("qwen3_moe")), batches_of("qwen3_moe")
    measured, traces = QuantizationError(BITS, GROUP, per_matrix=True), GramError(BITS, GROUP)
    profile = measure(view, batches, [measured, traces])
    layer = view.moe_layers[0]
    exact, estimated = profile.of(layer, measured)["relative"], profile.of(layer, traces)
    torch.testing.assert_close(estimated["error"][:, 2], exact[:, 2], rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(estimated["energy"][:, 2], estimated["output"], rtol=1e-3, atol=1e-12)
    cost = find_cost("gram").evaluate({"gram_error": estimated}, asked(layer, 1, [1, 3]))
    torch.testing.assert_close(cost[:, 2], exact[:, 2], rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("shape", [(48, 32), (32, 50), (16, 8), (7, 40)])
def test_spectrum_and_hill_against_numpy(shape):
    """Every block's singular values by numpy in float64; the exponent by its formula, one matrix after another."""
    weights = torch.randn(3, *shape, generator=torch.Generator().manual_seed(shape[0]))
    found = spectrum(weights, block=16, sample=1000)
    step = [min(16, side) for side in shape]
    for expert in range(3):
        matrix = weights[expert].double().numpy()
        values = []
        for row in range(0, shape[0] - step[0] + 1, step[0]):
            for column in range(0, shape[1] - step[1] + 1, step[1]):
                values += (np.linalg.svd(matrix[row : row + step[0], column : column + step[1]])[1] ** 2).tolist()
        values.sort()
        torch.testing.assert_close(
            found[expert].sort().values, torch.tensor(values, dtype=torch.float64), rtol=1e-4, atol=1e-5
        )
        k = min(max(10, int(0.1 * len(values))), len(values) - 1)
        logs = sum(np.log(values[-1 - i] / values[-1 - k]) for i in range(k))
        assert float(hill(found, 0.1)[expert]) == pytest.approx(1 + k / logs, rel=1e-3)
    assert spectrum(weights, 16, 1).shape[1] == min(step)  # one block


def test_hill_finds_the_exponent_of_a_power_law():
    """Density x^−alpha above 1: its survival function is x^(1 − alpha)."""
    uniform = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alpha in (2.0, 3.5):
        assert float(hill(uniform ** (1 / (1 - alpha)), 0.1)[0]) == pytest.approx(alpha, rel=0.02)


@pytest.mark.parametrize("name", KINDS)
def test_what_weights_say(name):
    """Variance and outliers of every matrix in the model's own layout; no tap is looked at."""
    view = MoEModel.wrap(model_of(name))
    layer = view.moe_layers[0]
    block = view.block(layer)
    spectra, outliers = (s.start(block, 0).result() for s in (WeightSpectrum(block=4), WeightOutliers()))
    for expert in range(block.num_experts):
        for m, (_, matrix) in enumerate(matrices(block.experts_module, expert)):
            values = matrix.double().numpy()
            assert float(spectra["variance"][expert, m]) == pytest.approx(values.var(), rel=1e-5)
            score = max(abs(column).max() / abs(column).mean() for column in values.T)
            assert float(outliers["score"][expert, m]) == pytest.approx(score, rel=1e-5)
    assert spectra["alpha"].shape == spectra["variance"].shape == (block.num_experts, m + 1)
    assert (spectra["alpha"] > 1).all()


@pytest.mark.parametrize("name", PLAIN)
def test_block_turn(name):
    """Cosine of what the decoder layer returned, with and without what its experts added."""
    view, batches = MoEModel.wrap(model_of(name)), batches_of(name)
    layer = view.moe_layers[0]
    found = measure(view, batches, [BlockTurn()]).of(layer, BlockTurn())
    cosines = []
    for routed, hidden in traced(model_of(name), layer, batches):
        for added, behind in zip(routed.numpy(), hidden.numpy(), strict=True):
            before = behind - added
            cosines.append(before @ behind / np.linalg.norm(before) / np.linalg.norm(behind))
    assert float(found["importance"]) == pytest.approx(1 - np.mean(cosines), rel=1e-4)


# ---- What GPTQ leaves ----


def test_foreseen_share_is_that_of_a_diagonal_loop():
    """R_jj² is what column j has of its own, given those that come later: a Schur complement for every column.

    Of expert 1 a channel is silent: it costs its damping, with feedback and without.
    """
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(2, 40, 6, generator=generator) @ torch.randn(2, 6, 6, generator=generator)
    rows[1, :, 2] = 0
    hessian, squares = rows.mT @ rows, torch.rand(2, 6, generator=generator)
    found = foreseen_share(squares, *column_costs(hessian, damping=0.01))
    for expert in range(2):
        h = hessian[expert].double() / hessian[expert].double().diagonal().mean()
        h = h + 0.01 * torch.eye(6)
        order = h.diagonal().argsort(descending=True).tolist()
        own = before = 0.0
        for position, j in enumerate(order):
            later = order[position + 1 :]
            given_later = h[j, j]
            if later:
                given_later = given_later - h[j, later] @ torch.linalg.solve(h[later][:, later], h[later, j])
            own += float(given_later * squares[expert, j])
            before += float(h[j, j] * squares[expert, j])
        assert float(found[expert]) == pytest.approx(own / before, rel=1e-4)
    assert foreseen_share(squares, *column_costs(torch.zeros(2, 6, 6))).tolist() == [1, 1]
    # Nothing to make up for where inputs are independent; nearly everything where they are one.
    assert foreseen_share(squares, *column_costs(torch.eye(6).expand(2, 6, 6))).tolist() == pytest.approx([1, 1])
    one = column_costs(torch.ones(2, 6, 6) + 1e-3 * torch.eye(6))
    assert (foreseen_share(torch.ones(2, 6), *one) < 0.25).all()


@pytest.mark.parametrize("rotate", ["none", "down", "both"])
def test_solver_gain_against_gptq(rotate):
    """Solved: the errors of both quantizers, matrix by matrix, on moments summed in plain loops; foreseen: near it."""
    view, batches = MoEModel.wrap(model_of("qwen3_moe")), batches_of("qwen3_moe")
    wanted = [SolverGain(BITS, GROUP, rotate=rotate, solve=solve) for solve in (True, False)]
    profile = measure(view, batches, wanted)
    layer = view.moe_layers[0]
    module, call = view.block(layer).experts_module, joined(experts_calls(model_of("qwen3_moe"), batches)[layer])
    activation = activations_ETI(module, call.hidden_TH)
    count = view.block(layer).num_experts
    sides = call.hidden_TH.shape[1], activation.shape[2]
    sums = [torch.zeros(count, side, side, dtype=torch.float64) for side in sides]
    rows = torch.zeros(count, dtype=torch.float64)
    for token, expert, _ in call.choices():
        for total, x in zip(sums, (call.hidden_TH[token].double(), activation[expert, token]), strict=True):
            total[expert] += torch.outer(x, x)
        rows[expert] += 1
    solved, foreseen = (profile.of(layer, statistic)["share"] for statistic in wanted)
    assert solved.shape == foreseen.shape == (count, 3, len(BITS))
    shrunk = [shrink_hessians(total, rows) for total in sums]
    expected = torch.ones_like(solved)
    for expert in rows.nonzero().flatten().tolist():
        for m, (name, matrix) in enumerate(matrices(module, expert)):
            rotation = turned(rotate, layer, name, matrix.shape[1])
            hessian = rotation.T @ shrunk[name == "down"][expert] @ rotation
            weight = (matrix.double() @ rotation).float()[None]
            for b, bits in enumerate(BITS):
                grid = Grid(bits, GROUP)
                errors = [
                    (weight[0].double() - dequantize(quantized)[0].double())
                    for quantized in (
                        gptq(weight, hessian[None].float(), grid).quantized,
                        round_to_nearest(weight, grid),
                    )
                ]
                after, before = (float(torch.trace(e @ hessian @ e.T)) for e in errors)
                expected[expert, m, b] = after / before
    # Moments differ in their last bits, and a code that was about to round one way rounds the other: in few matrices.
    off = (solved / expected - 1).abs()
    assert float(off.median()) < 1e-5
    assert float(off.mean()) < 5e-3
    assert float(off.max()) < 0.15
    assert ((foreseen > 0) & (foreseen <= 1 + 1e-9)).all()
    seen = rows > 0
    ranks = [share[seen].flatten().argsort().argsort().double() for share in (solved, foreseen)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.3


def test_gain_scales_costs_of_rounding_only():
    """And makes experts the sums of their matrices."""
    share = torch.tensor([[[0.5], [0.25], [1.0]]], dtype=torch.float64)
    error = torch.tensor([[[4.0], [8.0], [3.0]]], dtype=torch.float64)
    measured = {"solver_gain": {"share": share}, "quantization_error": {"squared": error, "error": error}}
    assert find_cost("squared").of(measured, asked())[0, :, 0].tolist() == [2, 2, 3]
    for options in ({"solver_gain": "none"}, {"method": "rtn"}):
        assert find_cost("squared").of(measured, asked(**options))[0, :, 0].tolist() == [4, 8, 3]
    assert find_cost("norm").of(measured, asked())[0, :, 0].tolist() == [4, 8, 3]
    for one in COSTS.values():
        keys = [s.name for s in one.statistics(asked().options, False)]
        assert ("solver_gain" in keys) == one.rounding == (one.name in ROUNDING)


ROUNDING = ("relative", "squared", "gram", "gradient", "fisher")


# ---- Formulas ----


def asked(index=1, experts=3, widths=(1, 2, 4), **options):
    layer = LayerShape(experts, 1, None, 64, 32, 3, 0, 2, 0)
    return Asked(MixedOptions(bits=3, widths=list(widths), **options), False, index, layer)


@pytest.mark.parametrize(("variant", "exponent"), [("paper", 2.5), ("code", 0.7)])
def test_pmq(variant, exponent):
    """Eq. 4; and with the exponent that the authors' code really takes."""
    counts, gate = torch.tensor([6.0, 3.0, 1.0]), torch.tensor([2.0, 1.0, 1.0])
    error = torch.tensor([[3.0, 2.0, 1.0], [5.0, 2.0, 0.5], [9.0, 8.0, 7.0]], dtype=torch.float64)
    measured = {"routing": {"counts": counts, "gate": gate}, "quantization_error": {"error": error}}
    options = {"alpha": 0.7, "beta": 1.3, "gamma": 2.5, "pmq_variant": variant}
    found = find_cost("pmq").evaluate(measured, asked(**options))
    for e in range(3):
        for b in range(3):
            factor = (float(counts[e]) / 10) ** 0.7 * (float(gate[e]) / 4) ** 1.3
            assert float(found[e, b]) == pytest.approx(factor * float(error[e, b]) ** exponent)


def test_scores_times_the_noise_of_a_width():
    """Each score's cost falls fourfold with a bit, and its size is the score."""
    spectra = {"alpha": torch.tensor([[2.0, 4.0]]), "variance": torch.tensor([[0.5, 0.25]])}
    found = find_cost("alphaq").evaluate({"weight_spectrum": spectra}, asked(alphaq_gamma=3.0, experts=1))
    assert found.shape == (1, 2, 3)
    assert found[0].tolist() == [[0.5 / 8 / 4**b for b in (1, 2, 4)], [0.25 / 64 / 4**b for b in (1, 2, 4)]]
    found = find_cost("outlier").evaluate({"weight_outliers": {"score": torch.tensor([[8.0, 16.0]])}}, asked())
    assert found[0].tolist() == [[8 / 4**b for b in (1, 2, 4)], [16 / 4**b for b in (1, 2, 4)]]
    found = find_cost("frequency").evaluate({"routing": {"counts": torch.tensor([6.0, 3.0, 1.0])}}, asked())
    assert found[:, 0].tolist() == pytest.approx([0.6 / 4, 0.3 / 4, 0.1 / 4])
    turn = {"block_turn": {"importance": torch.tensor(0.3)}}
    found = find_cost("block_importance").evaluate(turn, asked())
    assert found.shape == (3, 3)
    assert found.sum(0).tolist() == pytest.approx([0.3 / 4**b for b in (1, 2, 4)])


def test_random_is_random_by_seed_and_layer():
    """The control: the same seed gives the same, another seed or layer another."""
    random = find_cost("random").evaluate
    first, again, other, elsewhere = (
        random({}, asked(index, 3, seed=seed)) for index, seed in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, elsewhere)
    torch.testing.assert_close(first[:, 0], 4 * first[:, 1])


def test_gram_adds_relative_errors():
    """Per matrix: its relative error times what the expert adds; an expert that saw nothing costs nothing."""
    traces = {
        "error": torch.tensor([[[2.0], [1.0], [3.0]], [[0.0], [0.0], [0.0]]]).double(),
        "energy": torch.tensor([[4.0, 10.0, 6.0], [0.0, 0.0, 0.0]]).double(),
        "output": torch.tensor([8.0, 0.0]).double(),
    }
    found = find_cost("gram").evaluate({"gram_error": traces}, asked())
    torch.testing.assert_close(found[..., 0], torch.tensor([[4.0, 0.8, 4.0], [0.0, 0.0, 0.0]]).double())


def test_every_cost_says_where_it_is_from_and_what_it_reads():
    """And a name that isn't there gets the nearest."""
    for one in COSTS.values():
        assert one.source
        for statistic in one.statistics(asked().options, one.per_matrix):
            assert statistic.key
    assert Routing() in find_cost("pmq").statistics(asked().options, False)
    with pytest.raises(RecipeError, match=r"'relativ'.*'relative'"):
        find_cost("relativ")

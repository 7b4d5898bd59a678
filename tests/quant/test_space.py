"""Costs of matrices that will be smoothed: those of a model that is smoothed by hand and then costed plainly.

Promise: factors are worked out by the same functions that the pass applies them with (tested in test_smoothing.py and
test_input_smoothing.py); what they make of every cost is compared with explicit copies, and with float64 loops.
"""

import copy
import functools

import pytest
import torch
from families import input_batch
from reference import build
from test_cost import matrices, to_nearest, traced
from test_gradient_cost import measure

from moe_compress.calib.inputs import BlockInputs
from moe_compress.export.targets import find_target
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.reading import move_factors
from moe_compress.model.sweep import TOKEN_WEIGHT, Sweep
from moe_compress.quant import at_widths, smoothing
from moe_compress.quant.costs import find_cost
from moe_compress.quant.experts import CHUNK_BYTES
from moe_compress.quant.gptq import column_costs, foreseen_share
from moe_compress.quant.grid import dequantize
from moe_compress.quant.mixed import QuantizeMixed
from moe_compress.quant.options import MixedOptions
from moe_compress.quant.rotation import Rotation
from moe_compress.quant.rtn import round_to_nearest
from moe_compress.quant.smoothing import foreseen_costs, quantization_error, smooth_neurons
from moe_compress.quant.solver import SolverOptions
from moe_compress.quant.space import Space, spaces_of

GROUP, BITS = 4, [2, 4]


@functools.cache
def uneven_model():
    """Neurons and channels that differ in strength, as those of trained models do."""
    model = build("qwen3_moe")
    view = MoEModel.wrap(model)
    generator = torch.Generator().manual_seed(0)
    for index in view.moe_layers:
        block = view.block(index)
        up = FusedExperts(block.experts_module).weights().up
        up.mul_(torch.randn(up.shape[:2], generator=generator).mul(1.5).exp().unsqueeze(2))
        factor_H = torch.ones(block.experts.hidden_size)
        factor_H[[3, 17]] = 1 / 30
        move_factors(block, view.reads[index], factor_H)
    return model


def batches():
    return [input_batch(uneven_model(), *shape) for shape in ((2, 9, 1), (1, 6, 2))]


def options_of(smooth, rotate="none", **more):
    return MixedOptions(bits=4, widths=BITS, group_size=GROUP, smooth=smooth, rotate=rotate, **more)


def inputs_of(view, layer):
    inputs = BlockInputs()
    with Sweep(view, batches()) as sweep:
        for at in sweep:
            at.advance(inputs.observe if at.index == layer else None)
    return inputs


@torch.no_grad()
def smoothed_copy(options, width):
    """The model with the factors of its first layer moved as `apply` does, for all matrices at one width."""
    model = copy.deepcopy(uneven_model())
    view = MoEModel.wrap(model)
    layer = view.moe_layers[0]
    block, step = view.block(layer), QuantizeMixed(options, find_target("native"))
    width_E = [width] * block.num_experts
    if options.smooths_input:
        said = step.prepare(block, {"bits": dict.fromkeys(("gate", "up", "down"), width_E)}, inputs_of(view, layer))
        assert said["input_smoothing"]["exponent"] is not None
    if options.smooths_neurons:
        experts = FusedExperts(block.experts_module)
        powers = smooth_neurons(experts, width_E, options, inputs_of(view, layer), CHUNK_BYTES)
        assert max(powers) > 0
    return model


def test_what_gptq_is_foreseen_to_leave():
    """Without factors the share that costs are scaled by; with them that of explicit matrices, in a loop of columns."""
    generator = torch.Generator().manual_seed(5)
    weight_EOK = torch.randn(2, 6, 8, generator=generator)
    moment_EKK = (root := torch.randn(2, 8, 8, generator=generator)) @ root.mT + 3 * torch.eye(8)
    factor_EK = torch.rand(2, 8, generator=generator) + 0.5
    options = SolverOptions(group_size=4, damping=0.0, smooth="neurons")
    costs_EK = foreseen_costs(moment_EKK, options)
    assert foreseen_costs(moment_EKK, options.model_copy(update={"method": "rtn"})) is None

    def change(factor):
        value = (weight_EOK * factor.unsqueeze(1)).float()
        return dequantize(round_to_nearest(value, options.grid(3))).double() - value.double()

    ones = torch.ones_like(factor_EK)
    found = quantization_error(weight_EOK, moment_EKK, ones, 3, options, costs_EK)
    squares = change(ones).square().sum(1)
    alone = (squares * moment_EKK.diagonal(dim1=1, dim2=2)).sum(1)
    share = foreseen_share(squares, *column_costs(moment_EKK, 0.0))
    torch.testing.assert_close(found, alone * share, rtol=1e-4, atol=0)
    found = quantization_error(weight_EOK, moment_EKK, factor_EK, 3, options, costs_EK)
    for expert, error in enumerate(found.tolist()):
        hessian = moment_EKK[expert].double()
        order = hessian.diagonal().argsort(descending=True).tolist()
        scale = factor_EK[expert].double()
        hessian, expected = hessian / torch.outer(scale, scale), 0.0
        for position, j in enumerate(order):  # GPTQ's order without factors: with them it may be another
            later = order[position + 1 :]
            own = hessian[j, j]
            if later:
                own = own - hessian[j, later] @ torch.linalg.solve(hessian[later][:, later], hessian[later, j])
            expected += float(own * change(factor_EK)[expert, :, j].square().sum())
        assert error == pytest.approx(expected, rel=1e-4)


def test_a_space_by_hand():
    """A = D Q as a matrix, in float64."""
    generator = torch.Generator().manual_seed(4)
    weight_EOK, factor_EK = torch.randn(3, 5, 16, generator=generator), torch.rand(3, 16, generator=generator) + 0.5
    rows_ETK = torch.randn(3, 40, 16, generator=generator)
    rotation = Rotation.random(16, 7)
    turn_KK = rotation(torch.eye(16, dtype=torch.float64))
    for factors, turn in ((factor_EK, None), (factor_EK[:1], rotation), (None, rotation), (None, None)):
        space = Space(turn, factors)
        for part in (slice(0, 3), range(1, 3)):
            here, own = slice(part.start, part.stop), space.part(part)
            scale_EK = torch.ones(3, 16) if factors is None else factors.expand(3, 16)
            a_EKK = scale_EK[here].double().diag_embed() @ (torch.eye(16).double() if turn is None else turn_KK)
            weight, rows = weight_EOK[here].double(), rows_ETK[here].double()
            found = own.turned(weight_EOK[here])
            torch.testing.assert_close(found.double(), weight @ a_EKK, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(own.back(found).double(), weight, rtol=1e-5, atol=1e-5)
            read = rows @ torch.linalg.inv(a_EKK).mT  # A⁻¹ x
            if factors is None or len(factors) == 1:
                torch.testing.assert_close(own.read(rows_ETK[here]).double(), read, rtol=1e-5, atol=1e-5)
            moment = own.of_moment(rows_ETK[here].mT @ rows_ETK[here])
            torch.testing.assert_close(moment.double(), read.mT @ read, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("smooth", "rotate", "method"), [("neurons", "none", "gptq"), ("input", "down", "gptq"), ("both", "none", "rtn")]
)
def test_every_cost_is_that_of_a_smoothed_copy(smooth, rotate, method, monkeypatch):
    """With GPTQ's share of it, and at each width that of the factors which that width gets.

    Plans foresee which factors GPTQ will like best, so with GPTQ there is nothing to choose from here.
    """
    options = options_of(smooth, rotate, method=method)
    if method == "gptq":
        monkeypatch.setattr(smoothing, "POWERS", (0.25,))
        options = options.model_copy(update={"smooth_exponent": 0.5 if options.smooths_input else None})
    layer = MoEModel.wrap(uneven_model()).moe_layers[0]
    costs = [find_cost(name) for name in ("relative", "gram", "gradient")]
    unsmooth = options.model_copy(update={"smooth": "none"})
    plain = {b: unsmooth.model_copy(update={"widths": [b]}) for b in BITS}

    def measured(model, own):
        statistics = {s.key: s for c in costs for s in c.statistics(own, True)}.values()
        profile = measure(MoEModel.wrap(copy.deepcopy(model).requires_grad_(True)), batches(), list(statistics))
        return {s.name: profile.of(layer, s) for s in statistics}

    found, unsmoothed = measured(uneven_model(), options), measured(uneven_model(), unsmooth)
    assert ("solver_gain" in found) == (method == "gptq")
    changed = set()
    for column, width in enumerate(BITS):
        expected = measured(smoothed_copy(options, width), plain[width])
        for name, results in expected.items():
            for key, value in results.items():
                own, before = (r[name][key] for r in (found, unsmoothed))
                if value.dim() == 3:
                    own, before = own[..., column : column + 1], before[..., column : column + 1]
                if options.smooths_neurons and name in ("gram_error", "solver_gain") and value.dim() > 1:
                    # What up gives has another unit in each neuron, in which these count errors.
                    own, before, value = (v[:, [0, 2]] for v in (own, before, value))
                # Factors are rounded, so a code that was about to round one way rounds the other: in few matrices.
                off = (own / value - 1).abs()[value > 0]
                assert float(off.median()) < 1e-3, (name, key)
                assert float(off.mean()) < 5e-2, (name, key)
                if float((before / value - 1).abs()[value > 0].max()) > 0.1:
                    changed.add((name, width))
    assert changed >= {(s, b) for s in ("quantization_error", "gram_error", "gradient_error") for b in BITS}


@torch.no_grad()
@pytest.mark.parametrize(("smooth", "rotate"), [("both", "none"), ("input", "down")])
def test_relative_error_by_a_loop(smooth, rotate):
    """A smoothed copy, of which one matrix is rounded in float64; the layer runs, errors are summed."""
    options = options_of(smooth, rotate, method="rtn")
    cost, model = find_cost("relative"), uneven_model()
    layer = MoEModel.wrap(model).moe_layers[0]
    (statistic,) = cost.statistics(options, True)
    found = measure(MoEModel.wrap(copy.deepcopy(model)), batches(), [statistic]).of(layer, statistic)["relative"]
    exact, rotations = traced(model, layer, batches()), options.rotations(layer, 32, 16)
    off = {"gate": [], "up": [], "down": []}
    for column, width in enumerate(BITS):
        smooth_one = smoothed_copy(options, width)
        module = MoEModel.wrap(smooth_one).block(layer).experts_module
        for expert in range(3):
            for number, (name, matrix) in enumerate(matrices(module, expert)):
                unit, turn = torch.eye(matrix.shape[1], dtype=torch.float64), rotations.of(name)
                kept = matrix.clone()
                matrix.copy_(to_nearest(matrix, width, unit if turn is None else turn(unit)))
                expected = sum(
                    float(((before - after).square().sum(-1) / hidden.square().sum(-1)).sum())
                    for (before, hidden), (after, _) in zip(exact, traced(smooth_one, layer, batches()), strict=True)
                )
                matrix.copy_(kept)
                if expected:
                    off[name].append(abs(float(found[expert, number, column]) / expected - 1))
    assert min(map(len, off.values())) >= len(BITS)
    # Scales of up projections with other rows are rounded (to bfloat16) to something else.
    assert sum(off["up"]) / len(off["up"]) < 0.05
    assert max(off["gate"] + off["down"]) < 0.01


@torch.no_grad()
def test_found_once_in_each_layer_and_the_same_as_alone(monkeypatch):
    """Costs and GPTQ's share, in one sweep and each in its own: to the bit, so plans are the same."""
    options = options_of("both")
    statistics = find_cost("relative").statistics(options, True)
    found, inputs = [], []

    def counted(block, *arguments):
        found.append(block.layer)
        inputs.append(arguments[-1])
        return spaces_of(block, *arguments)

    monkeypatch.setattr(at_widths, "spaces_of", counted)
    model = uneven_model()
    alone = [measure(MoEModel.wrap(copy.deepcopy(model)), batches(), [statistic]) for statistic in statistics]
    layers = MoEModel.wrap(model).moe_layers
    assert sorted(found) == sorted([*layers] * 2)
    found.clear()
    together = measure(MoEModel.wrap(copy.deepcopy(model)), batches(), statistics)
    assert found == [*layers]
    assert {i.tokens for i in inputs} == {2 * 9 + 6}
    for layer in layers:
        for statistic, own in zip(statistics, alone, strict=True):
            expected = own.of(layer, statistic)
            assert all(torch.equal(v, expected[n]) for n, v in together.of(layer, statistic).items())
    asked = options.model_copy(update={"bits": 7.0, "protect_super_experts": False})
    step = QuantizeMixed(asked, find_target("native"))
    for profile in alone[1:]:
        alone[0].store.results |= profile.store.results
    assert step.plan(together).to_json() == step.plan(alone[0]).to_json()


@torch.no_grad()
def test_tokens_that_weigh_nothing_change_no_factors():
    """Not even where theirs are the largest inputs: everything is as without them."""
    first, second = batches()
    model = MoEModel.wrap(copy.deepcopy(uneven_model()))
    for smooth in ("input", "both"):
        options = options_of(smooth, smooth_exponent=0.5, smooth_merge="max")
        statistics = find_cost("relative").statistics(options, True)
        assert all(statistic.weighs_tokens for statistic in statistics)
        silent = {**first, TOKEN_WEIGHT: torch.zeros(first["input_ids"].shape)}
        found, expected = (measure(model, text, statistics) for text in ([silent, second], [second]))
        for statistic in statistics:
            for name, value in expected.of(model.moe_layers[0], statistic).items():
                torch.testing.assert_close(found.of(model.moe_layers[0], statistic)[name], value, rtol=1e-3, atol=1e-6)

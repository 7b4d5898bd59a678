"""Costs of matrices that will be smoothed, in many families, against float64: factors by the rule, copies by hand.

Promise: nothing of the package's smoothing is used for what is expected. Factors are worked out from what the model's
own forward hands to its experts, a float64 copy gets them in norm, readers and experts, and computes what the model
did; then one matrix of it is rounded, and the layer runs, or GPTQ's share is summed column by column. Models have a
silent channel, rows of zeros, and, where routers have biases, an expert that nobody chooses.
"""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from families import input_batch
from reference import activations_ETI, build, experts_calls, joined, measure
from test_cost import matrices, to_nearest, traced

from moe_compress.export.targets import find_target
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.reading import move_factors
from moe_compress.quant import smoothing
from moe_compress.quant.costs import find_cost
from moe_compress.quant.mixed import QuantizeMixed
from moe_compress.quant.options import MixedOptions
from moe_compress.quant.smoothing import obstacle

GROUP, BITS, LOUD, SILENT, STARVED = 4, [2, 4], (3, 17), 7, 5
POWER, EXPONENT = 0.25, 0.5


@functools.cache
def uneven(name):
    """Channels and neurons that differ in strength, some of them silent."""
    model = build(name)
    view = MoEModel.wrap(model)
    generator = torch.Generator().manual_seed(0)
    for index in view.moe_layers:
        block, reads = view.block(index), view.reads[index]
        weights = FusedExperts(block.experts_module).weights()
        weights.up.mul_(torch.randn(weights.up.shape[:2], generator=generator).mul(1.5).exp().unsqueeze(2))
        weights.up[1, 2], weights.down[1, 5] = 0, 0
        for parameter, buffer in (*block.router.named_parameters(), *block.router.named_buffers()):
            if "correction" in parameter:
                buffer.data[STARVED] = -10.0
        if isinstance(reads, str):
            continue
        block.module.get_parameter(f"{reads.norm}.weight")[SILENT] = -reads.offset
        factor_H = torch.ones(block.experts.hidden_size)
        factor_H[[*LOUD]] = 1 / 30
        move_factors(block, reads, factor_H)
    return model


def batches_of(name):
    return [input_batch(uneven(name), 3, 8)]


def channel_factors(name, layer, merge):
    """The rule, branch by branch; float64 [H]."""
    view = MoEModel.wrap(uneven(name))
    block, reads = view.block(layer), view.reads[layer]
    call = joined(experts_calls(uneven(name), batches_of(name))[layer])
    hidden_TH = call.hidden_TH.double()
    branches = []
    for expert in range(block.num_experts):
        rows = [t for t, e, _ in call.choices() if e == expert]
        inward = torch.cat([m for n, m in matrices(block.experts_module, expert) if n != "down"])
        branches.append((hidden_TH[rows], inward.double()))
    for reader, dim in reads.readers.items():
        matrix = block.module.get_parameter(reader).detach().movedim(dim, -1).flatten(0, -2)
        if len(matrix) >= block.num_experts:
            branches.append((hidden_TH, matrix.double()))
    logs = []
    for rows, matrix in branches:
        if len(rows):
            value = EXPONENT * rows.abs().amax(0).log2() - (1 - EXPONENT) * matrix.abs().amax(0).log2()
            value[SILENT] = torch.nan
            logs.append(value - value.nanmean())
    logs = torch.stack(logs)
    log_H = logs.amax(0) if merge == "max" else logs.mean(0)
    log_H = log_H - log_H.nanmean()
    return log_H.nan_to_num(0.0).exp2()


def neuron_factors(name, layer):
    """c = rms^α of every expert's neurons over their geometric mean; float64 [E, I]."""
    experts = MoEModel.wrap(uneven(name)).block(layer).experts_module
    call = joined(experts_calls(uneven(name), batches_of(name))[layer])
    activation_ETI = activations_ETI(experts, call.hidden_TH)
    factors = []
    for expert, own_TI in enumerate(activation_ETI):
        rows = [t for t, e, _ in call.choices() if e == expert]
        root_I = own_TI[rows].square().mean(0).sqrt() if rows else torch.ones(own_TI.shape[1])
        log_I = POWER * torch.where(root_I > 0, root_I, 1).log2()
        factors.append(torch.where(root_I > 0, log_I - log_I.mean(), 0).exp2())
    return torch.stack(factors)


def by_hand(name, layer, factor_H, factor_EI):
    """A float64 copy with factors in the layer: the same function."""
    model = copy.deepcopy(uneven(name)).double()
    view = MoEModel.wrap(model)
    block, reads = view.block(layer), view.reads[layer]
    if factor_H is not None:
        norm = block.module.get_submodule(reads.norm)
        norm.weight.copy_((norm.weight + reads.offset) / factor_H - reads.offset)
        if getattr(norm, "bias", None) is not None:
            norm.bias.div_(factor_H)
        for reader, dim in reads.readers.items():
            matrix = block.module.get_parameter(reader)
            matrix.copy_((matrix.movedim(dim, -1) * factor_H).movedim(-1, dim))
    for expert in range(block.num_experts):
        for projection, matrix in matrices(block.experts_module, expert):
            if projection != "down" and factor_H is not None:
                matrix.mul_(factor_H)
            if projection == "down" and factor_EI is not None:
                matrix.mul_(factor_EI[expert])
            if projection == "up" and factor_EI is not None:
                matrix.div_(factor_EI[expert].unsqueeze(1))
    return model


# Routers with biases and shared experts; an offset of 1 and a gate beside; experts' biases, a clamp, interleaved and
# transposed; attention that reads the same norm; no gate; experts in a space of their own, behind a norm of their own.
CASES = [
    ("deepseek_v3", "both", "none", "mean"),
    ("qwen3_next", "both", "none", "max"),
    ("gpt_oss", "input", "down", "max"),
    ("cohere2_moe", "both", "none", "mean"),
    ("nemotron_h", "both", "none", "mean"),
    ("muse_spark", "both", "none", "max"),
]


class Smoothed:
    """What is expected of the last layer of a model: factors, and a float64 copy that has them."""

    def __init__(self, name, smooth, merge):
        view = MoEModel.wrap(uneven(name))
        self.layer, block = view.moe_layers[-1], view.block(view.moe_layers[-1])
        self.factor_H = self.factor_EI = None
        if not isinstance(view.reads[self.layer], str):
            self.factor_H = channel_factors(name, self.layer, merge)
        if smooth == "both" and obstacle(FusedExperts(block.experts_module)) is None:
            self.factor_EI = neuron_factors(name, self.layer)
        self.model = by_hand(name, self.layer, self.factor_H, self.factor_EI)
        self.experts = MoEModel.wrap(self.model).block(self.layer).experts_module

    def rounded(self, expert, projection, matrix, width, turn):
        """A matrix of the copy rounded to nearest; rows of `up` before they are divided, for scales are rounded too."""
        unit = torch.eye(matrix.shape[1], dtype=torch.float64)
        factor_O1 = torch.ones(len(matrix), 1, dtype=torch.float64)
        if projection == "up" and self.factor_EI is not None:
            factor_O1 = self.factor_EI[expert].unsqueeze(1)
        return to_nearest(matrix * factor_O1, width, unit if turn is None else turn(unit)) / factor_O1


def prepared(name, smooth, rotate, merge, monkeypatch, **more):
    """Options, what is expected, and what the package measures for these."""
    monkeypatch.setattr(smoothing, "POWERS", (POWER,))
    values = {"smooth_exponent": EXPONENT, "smooth_merge": merge, "hessian": "plain", "shrinkage": 0.0, **more}
    options = MixedOptions(bits=4, widths=BITS, group_size=GROUP, smooth=smooth, rotate=rotate, **values)
    expected = Smoothed(name, smooth, merge)
    statistics = find_cost("relative").statistics(options, True)
    profile = measure(MoEModel.wrap(copy.deepcopy(uneven(name))), batches_of(name), statistics)
    sizes = MoEModel.wrap(uneven(name)).block(expected.layer).experts
    rotations = options.rotations(expected.layer, sizes.hidden_size, sizes.intermediate_size)
    return expected, rotations, {s.name: profile.of(expected.layer, s) for s in statistics}


@torch.no_grad()
@pytest.mark.parametrize(("name", "smooth", "rotate", "merge"), CASES)
def test_relative_error_of_a_float64_copy(name, smooth, rotate, merge, monkeypatch):
    smoothed, rotations, found = prepared(name, smooth, rotate, merge, monkeypatch, method="rtn")
    relative_EMB = found["quantization_error"]["relative"]
    layer, off = smoothed.layer, []
    exact = traced(smoothed.model, layer, batches_of(name))
    for (after, _), (before, _) in zip(exact, traced(uneven(name), layer, batches_of(name)), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    for expert in (0, 1, STARVED):
        for number, (projection, matrix) in enumerate(matrices(smoothed.experts, expert)):
            kept, column = matrix.clone(), (expert + number) % 2
            matrix.copy_(smoothed.rounded(expert, projection, kept, BITS[column], rotations.of(projection)))
            expected = sum(
                float(((before - after).square().sum(-1) / states.square().sum(-1)).sum())
                for (before, states), (after, _) in zip(
                    exact, traced(smoothed.model, layer, batches_of(name)), strict=True
                )
            )
            matrix.copy_(kept)
            value = float(relative_EMB[expert, number, column])
            assert bool(expected) == bool(value)
            off += [abs(value / expected - 1)] if expected else []
    assert len(off) >= 4
    assert max(off) < 1e-2  # a code on the verge of another is another in float64


@torch.no_grad()
@pytest.mark.parametrize(("name", "smooth", "rotate", "merge"), CASES[:3])
def test_what_gptq_leaves_of_a_float64_copy(name, smooth, rotate, merge, monkeypatch):
    """Column by column, in the order of the Hessian with factors and rotated, damped by its mean diagonal."""
    smoothed, rotations, found = prepared(name, smooth, rotate, merge, monkeypatch)
    share_EMB = found["solver_gain"]["share"]
    call = joined(experts_calls(smoothed.model, batches_of(name))[smoothed.layer])
    activation_ETI, off = activations_ETI(smoothed.experts, call.hidden_TH), []
    for expert in (0, 1, STARVED):
        rows = [t for t, e, _ in call.choices() if e == expert]
        for number, (projection, matrix) in enumerate(matrices(smoothed.experts, expert)):
            if not rows:
                assert (share_EMB[expert, number] == 1).all()
                continue
            turn = rotations.of(projection)
            read_RK = activation_ETI[expert, rows] if projection == "down" else call.hidden_TH[rows].double()
            read_RK = read_RK if turn is None else turn(read_RK)
            hessian = read_RK.T @ read_RK
            hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
            order = hessian.diagonal().argsort(descending=True)
            hessian = hessian[order][:, order]
            # What is left of a column's variance by those that come after it.
            left = torch.stack([1 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(len(hessian))])
            factor_O1 = 1 if projection != "up" or smoothed.factor_EI is None else smoothed.factor_EI[expert][:, None]
            for column, width in enumerate(BITS):
                change = (smoothed.rounded(expert, projection, matrix, width, turn) - matrix) * factor_O1
                squares = (change if turn is None else turn(change)).square().sum(0)[order]
                expected = float((squares * left).sum() / (squares * hessian.diagonal()).sum())
                off.append(abs(float(share_EMB[expert, number, column]) / expected - 1))
    assert len(off) >= 8
    assert max(off) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["cohere2_moe", "qwen3_next"])
def test_matrices_beside_that_read_the_same_norm(name):
    """Shared experts, attention beside the block: costed as they are in a copy with factors; others as they were."""
    values = {"smooth_exponent": EXPONENT, "method": "rtn", "include": ["experts", "attention", "shared_experts"]}
    options = MixedOptions(bits=8, widths=BITS, dense_widths=BITS, group_size=GROUP, smooth="both", **values)
    statistic = {s.name: s for s in QuantizeMixed(options, find_target("native")).statistics()}["matrix_error"]
    plain, view = replace(statistic, smoothing={}), MoEModel.wrap(copy.deepcopy(uneven(name)))
    layer = view.moe_layers[-1]
    profile = measure(view, batches_of(name), [statistic, plain])
    copied = MoEModel.wrap(by_hand(name, layer, channel_factors(name, layer, "mean"), None).float())
    expected_MB = measure(copied, batches_of(name), [plain]).of(layer, plain)["relative"]
    found_MB, before_MB = (profile.of(layer, s)["relative"] for s in (statistic, plain))
    paths = [m.path for m in view.matrices[layer] if m.among(frozenset(statistic.kinds))]
    readers = [f"{path}.weight" in view.reads[layer].readers for path in paths]
    assert 2 <= sum(readers) < len(readers)
    torch.testing.assert_close(found_MB, expected_MB, rtol=2e-2, atol=1e-6)
    reads_M = torch.tensor(readers)
    assert ((before_MB / expected_MB)[reads_M] > torch.tensor([1.5, 10.0])).all()
    torch.testing.assert_close(before_MB[~reads_M], expected_MB[~reads_M], rtol=2e-2, atol=1e-6)

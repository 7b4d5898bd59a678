"""Sorting rows by expert, grouped products and the way back, against loops in float64."""

import itertools

import pytest
import torch
from families import input_batch
from reference import KINDS, build, experts_calls, outputs_ETH

from moe_compress.model import FusedExperts, MoEModel, hf
from moe_compress.model.dispatch import Dispatch, grouped_gram, grouped_linear, grouped_squares
from moe_compress.model.experts import run_experts

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
OFFSETS = [[0, 3, 3, 9], [0, 0, 0, 0], [1, 1, 1, 1], [4, 8, 12, 16], [0, 0, 0, 5], [7, 7, 8, 8]]


def assert_near(found, expected, dtype):
    assert found.dtype == dtype
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def random_routing(tokens, slots, experts, seed=0, zeros=0.2, sentinels=0.2):
    """Distinct experts per token, some slots without an expert: weight 0 on expert 0, or an index beyond the last."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, experts, generator=generator).topk(slots).indices
    weight = torch.rand(tokens, slots, generator=generator) + 0.1
    none, beyond = torch.rand(2, tokens, slots, generator=generator)
    index[none < zeros] = 0
    weight[none < zeros] = 0
    index[beyond < sentinels] = experts + 3
    return index, weight


# Dispatch


@pytest.mark.parametrize(("tokens", "slots", "experts"), [(11, 3, 7), (1, 1, 1), (5, 2, 40), (64, 8, 16), (0, 2, 4)])
def test_rows_are_sorted_and_unserved_slots_left_out(tokens, slots, experts):
    index, weight = random_routing(tokens, slots, experts)
    expected = sorted(
        (int(index[t, k]), t, k)
        for t in range(tokens)
        for k in range(slots)
        if int(index[t, k]) < experts and float(weight[t, k]) != 0
    )
    found = Dispatch.of(index, weight, experts)
    assert (found.tokens, found.slots) == (tokens, slots)
    assert found.expert_R.tolist() == [e for e, _, _ in expected]
    assert found.token_R.tolist() == [t for _, t, _ in expected]
    assert found.row_R.tolist() == [t * slots + k for _, t, k in expected]
    assert found.weight_R.tolist() == [float(weight[t, k]) for _, t, k in expected]
    counts = [sum(e == expert for e, _, _ in expected) for expert in range(experts)]
    assert found.counts_E.tolist() == counts
    assert found.counts_E.dtype == torch.int64
    assert found.offsets_E.tolist() == list(itertools.accumulate(counts))
    assert found.offsets_E.dtype == torch.int32


def test_nobody_is_served():
    index, weight = torch.full((4, 2), 9), torch.ones(4, 2)
    found = Dispatch.of(index, weight, 3)
    assert found.row_R.numel() == 0
    assert found.offsets_E.tolist() == [0, 0, 0]
    assert torch.equal(found.combine(torch.zeros(0, 5)), torch.zeros(4, 5))


@every_dtype
def test_combine_sums_over_the_slots_of_a_token(dtype):
    index, weight = random_routing(13, 4, 6, seed=1)
    found = Dispatch.of(index, weight.to(dtype), 6)
    output = torch.randn(len(found.row_R), 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.zeros(13, 5, dtype=torch.float64)
    for row in range(len(output)):
        expected[found.token_R[row]] += output[row].double() * float(found.weight_R[row])
    assert_near(found.combine(output), expected, dtype)
    assert torch.equal(found.combine(output), found.combine(output))


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_combine_multiplies_with_the_weights_as_they_are(name):
    """Families with float32 routing multiply bfloat16 outputs with float32 weights, and only then round."""
    model = build(name).bfloat16()
    view = MoEModel.wrap(model)
    layer = view.moe_layers[0]
    module, call = view.block(layer).experts_module, experts_calls(model, [input_batch(model)])[layer][0]
    call.weight_TK = call.weight_TK.float()
    hidden, index, weight = call.hidden_TH, call.index_TK, call.weight_TK
    with torch.no_grad():
        output = run_experts(FusedExperts(module), hidden, index, weight)[0]
        with hf.implementation(model, "grouped_mm"):
            expected = module(hidden, index, weight)
    assert weight.dtype == torch.float32
    assert output.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(output, expected)


# Grouped products


def weights(dtype, inner, outer, transposed, experts=4):
    generator = torch.Generator().manual_seed(inner + outer)
    shape = (experts, inner, outer) if transposed else (experts, outer, inner)
    weight = torch.randn(*shape, generator=generator).to(dtype)
    return weight.transpose(1, 2) if transposed else weight


@every_dtype
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("inner", "outer"), [(16, 32), (32, 16), (18, 7), (1, 1), (16, 3)])
def test_grouped_linear(dtype, transposed, inner, outer):
    weight = weights(dtype, inner, outer, transposed)
    for offsets in OFFSETS:
        rows = torch.randn(offsets[-1], inner, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = torch.zeros(offsets[-1], outer, dtype=torch.float64)
        for row in range(offsets[-1]):
            expert = next(e for e, end in enumerate(offsets) if row < end)
            expected[row] = weight[expert].double() @ rows[row].double()
        assert_near(grouped_linear(rows, weight, torch.tensor(offsets, dtype=torch.int32)), expected, dtype)


@pytest.mark.parametrize("rows", [torch.randn(9, 6), torch.randn(9, 16)[:, ::2]], ids=["unaligned", "strided"])
def test_grouped_linear_of_odd_rows(rows):
    """Aligned (transposed) weights, rows that grouped_mm doesn't take: experts narrowed to six neurons, for example."""
    weight = torch.randn(4, rows.shape[1], 16).transpose(1, 2)
    offsets = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    found = grouped_linear(rows, weight, offsets)
    torch.testing.assert_close(found[:3], rows[:3] @ weight[1].T)
    torch.testing.assert_close(found[3:], rows[3:] @ weight[3].T)


@pytest.mark.parametrize("step", [2, 3])
def test_grouped_linear_of_strided_weights(step):
    """The gate's rows of an interleaved gate_up_proj, as a view."""
    weight = torch.randn(4, 8 * step, 16)[:, ::step]
    rows, offsets = torch.randn(9, 16), torch.tensor([2, 2, 5, 9], dtype=torch.int32)
    expected = torch.cat([rows[:2] @ weight[0].T, rows[2:5] @ weight[2].T, rows[5:] @ weight[3].T])
    torch.testing.assert_close(grouped_linear(rows, weight, offsets), expected)


def test_grouped_linear_of_weights_in_another_dtype():
    weight, rows = torch.randn(2, 4, 8, dtype=torch.bfloat16), torch.randn(5, 8)
    found = grouped_linear(rows, weight, torch.tensor([2, 5], dtype=torch.int32))
    torch.testing.assert_close(found, torch.cat([rows[:2] @ weight[0].float().T, rows[2:] @ weight[1].float().T]))


@every_dtype
@pytest.mark.parametrize(("left", "right"), [(16, 32), (18, 7), (1, 1), (8, 8), (3, 16), (16, 3)])
def test_grouped_gram(dtype, left, right):
    for offsets in OFFSETS:
        generator = torch.Generator().manual_seed(2)
        a = torch.randn(offsets[-1], left, generator=generator).to(dtype)
        b = torch.randn(offsets[-1], right, generator=generator).to(dtype)
        expected = torch.zeros(4, left, right, dtype=torch.float64)
        for row in range(offsets[-1]):
            expert = next(e for e, end in enumerate(offsets) if row < end)
            expected[expert] += torch.outer(a[row].double(), b[row].double())
        assert_near(grouped_gram(a, b, torch.tensor(offsets, dtype=torch.int32)), expected, dtype)


def test_grouped_gram_of_views():
    """Slices of columns, and rows that are every other one of a larger matrix."""
    whole = torch.randn(20, 40)
    offsets = torch.tensor([3, 3, 10], dtype=torch.int32)
    for a, b in ((whole[:10, :16], whole[:10, 16:32]), (whole[::2, :16], whole[::2]), (whole[:10, ::2], whole[:10])):
        found = grouped_gram(a, b, offsets)
        torch.testing.assert_close(found[0], a[:3].T @ b[:3])
        assert not found[1].any()
        torch.testing.assert_close(found[2], a[3:].T @ b[3:])


@every_dtype
@pytest.mark.parametrize("size", [1, 3, 16, 40, 200, 768])
def test_grouped_squares(dtype, size):
    """In blocks, the last of them narrower; also of columns that are a view, and exactly symmetric."""
    for offsets in OFFSETS:
        whole = torch.randn(offsets[-1], size + 5, generator=torch.Generator().manual_seed(2)).to(dtype)
        for rows in (whole[:, :size], whole[:, :size].contiguous()):
            expected = torch.zeros(4, size, size, dtype=torch.float64)
            for expert, (start, end) in enumerate(itertools.pairwise([0, *offsets])):
                expected[expert] = rows[start:end].double().T @ rows[start:end].double()
            found = grouped_squares(rows, torch.tensor(offsets, dtype=torch.int32))
            assert_near(found, expected, dtype)
            assert torch.equal(found, found.mT)


# The whole experts module


@pytest.mark.parametrize("name", KINDS)
def test_run_experts(name):
    """On the model's own routing, and on one with slots that nobody serves."""
    model = build(name)
    view = MoEModel.wrap(model)
    layer = view.moe_layers[0]
    module, call = view.block(layer).experts_module, experts_calls(model, [input_batch(model)])[layer][0]
    each = outputs_ETH(module, call.hidden_TH)
    odd = random_routing(len(call.hidden_TH), 3, 8, seed=5)
    for index, weight in ((call.index_TK, call.weight_TK), odd):
        with torch.no_grad():
            output, dispatch, activation, outputs = run_experts(FusedExperts(module), call.hidden_TH, index, weight)
        assert output.dtype == call.hidden_TH.dtype
        assert activation.shape == (len(dispatch.row_R), FusedExperts(module).intermediate_size)
        expected = torch.zeros_like(output, dtype=torch.float64)
        for token, slot in itertools.product(range(index.shape[0]), range(index.shape[1])):
            if index[token, slot] < 8 and weight[token, slot] != 0:
                expected[token] += float(weight[token, slot]) * each[index[token, slot], token]
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
        for row, (expert, token) in enumerate(zip(dispatch.expert_R, dispatch.token_R, strict=True)):
            torch.testing.assert_close(outputs[row].double(), each[expert, token], rtol=1e-4, atol=1e-4)


def test_part_of_a_dispatch_counts_from_zero():
    """A run of experts, with their rows, as a dispatch of its own."""
    index, weight = random_routing(30, 3, 8, seed=3)
    whole = Dispatch.of(index, weight, 8)
    for start, stop in itertools.combinations(range(9), 2):
        rows, part = whole.part(range(start, stop))
        wanted = (whole.expert_R >= start) & (whole.expert_R < stop)
        assert part.expert_R.tolist() == (whole.expert_R[wanted] - start).tolist()
        assert torch.equal(whole.row_R[rows], whole.row_R[wanted])
        assert torch.equal(part.row_R, whole.row_R[wanted])
        assert torch.equal(part.weight_R, whole.weight_R[wanted])
        assert torch.equal(part.counts_E, whole.counts_E[start:stop])
        assert torch.equal(part.token_R, whole.token_R[wanted])

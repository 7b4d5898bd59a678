"""Neuron alignment: assignments against all permutations, functions unchanged, planted permutations found again."""

import itertools

import pytest
import torch
from families import input_batch
from reference import activations_ETI, build, carry_out, experts_calls, joined, measure, outputs_ETH

from moe_compress.export.targets import find_target
from moe_compress.merge.align import (
    activation_similarity,
    align_experts,
    approximate_assignment,
    exact_assignment,
    permuted,
    weight_similarity,
)
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.experts import ExpertWeights
from moe_compress.passes import find_pass

# Gate and up concatenated; interleaved, transposed and with biases; no gate.
LAYOUTS = ["qwen3_moe", "gpt_oss", "nemotron_h"]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def total(similarity, order):
    return similarity.gather(2, order.unsqueeze(2)).sum((1, 2))


def is_permutation(order):
    return torch.equal(order.sort(dim=1).values, torch.arange(order.shape[1]).expand(order.shape))


def test_exact_assignment_is_the_best_of_all_permutations():
    similarity = rand(6, 5, 5)
    order = exact_assignment(similarity)
    for pair in range(6):
        best = max(
            itertools.permutations(range(5)), key=lambda p, s=similarity[pair]: sum(s[i, j] for i, j in enumerate(p))
        )
        assert order[pair].tolist() == list(best)
    assert exact_assignment(similarity[:0]).shape == (0, 5)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_approximate_assignment_can_not_be_improved_by_an_exchange(count):
    similarity = rand(5, count, count, seed=count)
    order = approximate_assignment(similarity)
    assert is_permutation(order)
    best, found = total(similarity, exact_assignment(similarity)), total(similarity, order)
    assert (found <= best + 1e-4).all()
    assert float(found.sum()) >= 0.9 * float(best.sum())
    for pair in range(5):
        s, p = similarity[pair], order[pair]
        for i, j in itertools.combinations(range(count), 2):
            assert s[i, p[j]] + s[j, p[i]] <= s[i, p[i]] + s[j, p[j]] + 1e-4


def test_assignments_of_what_ties():
    """Equal similarities, zeros, duplicates: still a permutation, and the best where that is easy to see."""
    for similarity in (torch.zeros(2, 6, 6), torch.ones(2, 6, 6), torch.eye(6).expand(2, -1, -1).flip(2)):
        for assign in (exact_assignment, approximate_assignment):
            order = assign(similarity)
            assert is_permutation(order)
            torch.testing.assert_close(total(similarity, order), total(similarity, exact_assignment(similarity)))


def random_experts(count, neurons=4, hidden=6, seed=0, bias=True, gate=True):
    sizes = {"up": (neurons, hidden), "down": (hidden, neurons)}
    sizes |= {"gate": (neurons, hidden)} if gate else {}
    sizes |= {"up_bias": (neurons,), "down_bias": (hidden,)} if bias else {}
    sizes |= {"gate_bias": (neurons,)} if bias and gate else {}
    return ExpertWeights(**{n: rand(count, *s, seed=seed + i) for i, (n, s) in enumerate(sizes.items())})


@pytest.mark.parametrize(("bias", "gate"), [(True, True), (False, True), (True, False)])
def test_alignment_by_weights_is_the_nearest_order_of_all(bias, gate):
    left, right = random_experts(2, bias=bias, gate=gate), random_experts(2, seed=20, bias=bias, gate=gate)

    def distance(pair, order):
        moved = permuted(right.map(lambda w: w[pair : pair + 1]), torch.tensor([order]))
        both = zip(left.items(), moved.items(), strict=True)
        return sum(float((a[pair] - b[0]).double().square().sum()) for (n, a), (_, b) in both if n != "down_bias")

    found = exact_assignment(weight_similarity(left, right))
    for pair in range(2):
        best = min(itertools.permutations(range(4)), key=lambda p, pair=pair: distance(pair, p))
        assert found[pair].tolist() == list(best)


def test_activation_similarity_is_the_correlation():
    left, right = rand(3, 50, 4), rand(3, 50, 4, seed=1) + 5
    left[0, :, 2] = 7.0  # a neuron that never changes
    found = activation_similarity(left, right)
    for pair, i, j in itertools.product(range(3), range(4), range(4)):
        expected = 0.0
        if (pair, i) != (0, 2):
            expected = float(torch.corrcoef(torch.stack([left[pair, :, i], right[pair, :, j]]).double())[0, 1])
        assert float(found[pair, i, j]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_every_expert_computes_what_it_did(name, by, monkeypatch):
    """Single experts, aligned or not: the same function; one chunk or a chunk per pair: the same order."""
    view = MoEModel.wrap(build(name))
    module = view.block(view.moe_layers[0]).experts_module
    experts = FusedExperts(module)
    hidden = rand(40, experts.hidden_size)
    before = outputs_ETH(module, hidden)
    original = experts.weights().map(torch.clone)
    pairs = [(0, 3), (0, 1), (5, 7)]
    align_experts(experts, pairs, hidden if by == "activations" else None)
    torch.testing.assert_close(outputs_ETH(module, hidden), before, rtol=1e-6, atol=1e-9)
    aligned = experts.weights().map(torch.clone)
    assert all(torch.equal(aligned.up[e], original.up[e]) for e in (0, 2, 4, 5, 6))
    assert not torch.equal(aligned.up[3], original.up[3])
    for (_, target), (_, value) in zip(experts.weights().items(), original.items(), strict=True):
        target.copy_(value)
    monkeypatch.setattr("moe_compress.merge.align._CHUNK_BYTES", 1)
    align_experts(experts, pairs, hidden if by == "activations" else None)
    assert torch.equal(experts.weights().up, aligned.up)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("approximate", [False, True])
def test_planted_permutations_are_found(name, by, approximate):
    view = MoEModel.wrap(build(name))
    experts = FusedExperts(view.block(view.moe_layers[0]).experts_module)
    original = experts.weights().map(torch.clone)
    order = torch.stack(
        [torch.randperm(original.up.shape[1], generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    )
    moved = permuted(original.map(lambda w: w[[2, 4]]), order)
    for (_, target), (_, value) in zip(experts.weights().items(), moved.items(), strict=True):
        target[[6, 1]] = value
    hidden = rand(64, experts.hidden_size) if by == "activations" else None
    align_experts(experts, [(2, 6), (4, 1)], hidden, approximate)
    for (_, new), (_, old) in zip(experts.weights().items(), original.items(), strict=True):
        assert torch.equal(new[[6, 1]], old[[2, 4]])


def plant_permuted_copy(view, original, copy):
    """Make one expert of the last layer a copy of another with its neurons in another order, router rows included."""
    layer = view.moe_layers[-1]
    for name, tensor in view.layers[layer].state_dict().items():
        if tensor.shape[:1] == (8,) and (".experts." in name or ".gate." in name or ".router." in name):
            tensor[copy] = tensor[original]
    weights = view.block(layer).experts.weights()
    order = torch.randperm(weights.up.shape[1], generator=torch.Generator().manual_seed(3)).unsqueeze(0)
    moved = permuted(weights.map(lambda w: w[[original]].clone()), order)
    for (_, target), (_, value) in zip(weights.items(), moved.items(), strict=True):
        target[copy] = value[0]


@pytest.mark.parametrize("align", ["weights", "activations", "none"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_merging_an_expert_and_its_permuted_copy_loses_nothing(name, align):
    """Top-1 with weight 1: the merged expert is the same function; without alignment it isn't."""
    model = build(name, num_experts_per_tok=1)
    view = MoEModel.wrap(model)
    plant_permuted_copy(view, 2, 6)
    batches = [input_batch(model, 4, 24, 1), input_batch(model, 2, 40, 2)]
    cls = find_pass("merge.average")
    step = cls(cls.Options(preset="sub-moe", experts=7, align=align), find_target("native"))
    last = view.moe_layers[-1]
    plan = step.plan(measure(view, batches, step.statistics()))
    assert [2, 6] in plan.layers[last]["groups"]
    with torch.no_grad():
        before = [model(**batch).logits for batch in batches]
        carry_out(view, step, plan, batches, only=last)
        after = [model(**batch).logits for batch in batches]
    same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(after, before, strict=True))
    assert same == (align != "none")


def test_activations_are_those_of_the_calibration_tokens():
    """Aligned through the pass: each member's neurons correlate with the dominant's as well as any order allows."""
    model = build("qwen3_moe")
    view = MoEModel.wrap(model)
    batches = [input_batch(model, 4, 24, 1)]
    first = view.moe_layers[0]
    hidden = joined(experts_calls(model, batches)[first]).hidden_TH
    activations = activations_ETI(view.block(first).experts_module, hidden)
    experts = FusedExperts(view.block(first).experts_module)
    before = experts.weights().map(torch.clone)
    align_experts(experts, [(1, 2)], hidden)
    matrix = torch.corrcoef(torch.cat([activations[1].T, activations[2].T]))[:16, 16:]
    order = exact_assignment(matrix.unsqueeze(0))
    assert torch.equal(experts.weights().up[2], before.up[2][order[0]])

"""Factored experts: each term, and their sum, against dense float64 experts multiplied out by plain loops; what they
hold, say of themselves, and count.
"""

import copy
import itertools

import pytest
import torch
from families import discover, tiny_model
from packs import put
from reference import outputs_ETH

from moe_compress.errors import CheckpointError
from moe_compress.merge import stack_products
from moe_compress.merge.factored import FactoredExperts, build_factored, factor_experts
from moe_compress.merge.stack_products import routed_times
from moe_compress.merge.terms import Base, Basis, Load, LowRank, Sparse
from moe_compress.model import MoEModel
from moe_compress.model.dispatch import Dispatch
from moe_compress.model.saved import build_experts
from moe_compress.quant.stack import Stack

# Gate and up concatenated; transposed, interleaved, biases; no gate, inputs of size 28; a norm after each expert.
LAYOUTS = sorted({"qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"} & set(discover()))
KINDS = ["one base", "bases", "low rank", "shared right", "shared left", "basis", "rows", "columns", "sum"]


def first_block(name):
    view = MoEModel.wrap(tiny_model(name))
    return view.block(view.moe_layers[0])


def draw(*shape, seed):
    """Values that bfloat16 holds exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).div(shape[-1] ** 0.5).bfloat16()


def make(kind, experts, rows, columns, seed=0):
    """Terms of that kind, and the dense matrices that they stand for, float64, expert by expert."""
    dense = torch.zeros(experts, rows, columns, dtype=torch.float64)
    if kind == "sum":
        parts = [make(k, experts, rows, columns, seed + i) for i, k in enumerate(("one base", "low rank", "rows"))]
        return [term for terms, _ in parts for term in terms], sum(value for _, value in parts)
    if kind == "one base":
        matrix = draw(1, rows, columns, seed=seed)
        return [Base.holding(matrix, [0] * experts)], dense + matrix.double()
    if kind == "bases":
        group = [(2, -1, 0, 1)[e % 4] for e in range(experts)]
        matrix = draw(3, rows, columns, seed=seed)
        for e, g in enumerate(group):
            if g >= 0:
                dense[e] = matrix[g].double()
        return [Base.holding(matrix, group)], dense
    if kind in ("low rank", "shared right", "shared left"):
        ranks = [(4, 0, 2, 4, 1)[e % 5] for e in range(experts)] if kind == "low rank" else [3] * experts
        left = draw(1 if kind == "shared left" else experts, rows, max(ranks), seed=seed)
        right = draw(1 if kind == "shared right" else experts, max(ranks), columns, seed=seed + 50)
        for e, i, j in itertools.product(range(experts), range(rows), range(columns)):
            one, other = left[e % len(left), i].double(), right[e % len(right), :, j].double()
            dense[e, i, j] = sum(one[q] * other[q] for q in range(ranks[e]))
        shared = kind.removeprefix("shared ") if kind.startswith("shared") else ""
        return [LowRank.holding(left, right, ranks, shared)], dense
    if kind == "basis":
        left, bases = draw(experts, rows, 3, seed=seed), draw(2, 3, columns, seed=seed + 1)
        mixture = draw(experts, 2, seed=seed + 2)
        for e in range(experts):
            mixed = sum(mixture[e, b].double() * bases[b].double() for b in range(2))
            dense[e] = left[e].double() @ (mixed * torch.sigmoid(mixed))
        return [Basis.holding(left, bases, mixture, "silu")], dense
    side = rows if kind == "rows" else columns
    index = torch.stack(
        [torch.randperm(side, generator=torch.Generator().manual_seed(e))[:3].sort()[0] for e in range(experts)]
    )
    matrix = draw(experts, rows, columns, seed=seed)
    for e, place in itertools.product(range(experts), range(3)):
        part = (index[e, place], slice(None)) if kind == "rows" else (slice(None), index[e, place])
        dense[e][part] = matrix[e][part].double()
    return [Sparse.holding(matrix, index, kind)], dense


def factored(block, kind):
    """Put terms in the place of a block's experts; a copy with the same weights, dense."""
    dense = copy.deepcopy(block)
    terms, values = {}, {}
    for number, (name, stacked) in enumerate(block.experts.weights().matrices()):
        terms[name], values[name] = make(kind, *stacked.shape, seed=10 * number)
    put(dense, values)
    factor_experts(block, terms)
    return block.experts_module, dense.experts_module, values


def routing(tokens, experts, unused):
    index = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens)).topk(3).indices
    weight = torch.rand(index.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    if unused:
        index = index % (experts // 2)
        index[:, 1:] = experts  # slots that no expert serves
    return index, weight


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_forward_is_that_of_the_product_of_the_factors(name, kind):
    """One token, some, experts without any; every layout, with biases and norm."""
    module, dense, values = factored(first_block(name), kind)
    for tokens, unused in ((1, False), (23, False), (9, True)):
        hidden = torch.randn(tokens, module.hidden_size, generator=torch.Generator().manual_seed(3))
        index, weight = routing(tokens, module.num_experts, unused)
        everyone = outputs_ETH(dense, hidden)
        expected = torch.zeros(tokens, everyone.shape[-1], dtype=torch.float64)
        for token, slot in itertools.product(*map(range, index.shape)):
            if index[token, slot] < module.num_experts:
                expected[token] += weight[token, slot].double() * everyone[index[token, slot], token]
        torch.testing.assert_close(
            module(hidden, index, weight).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max() + 1)
        )
    for key, stacked in module.weights().matrices():
        torch.testing.assert_close(stacked.double(), values[key], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(getattr(module.expert(2), key), stacked[2])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_give_what_they_give_among_many(kind, dtype, monkeypatch):
    """Few rows are counted by hand and matrices read where they lie: the same as by the way for many."""
    (terms, _), rows = make(kind, 12, 24, 16), []
    for few in (64, -1):
        monkeypatch.setattr("moe_compress.quant.run_packed.FEW_ROWS", few)
        monkeypatch.setattr("moe_compress.merge.stack_products.FEW_ROWS", few)
        for tokens in (1, 4, 11):
            index, weight = routing(tokens, 12, tokens == 4)
            dispatch = Dispatch.of(index, weight, 12)
            hidden = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(5)).to(dtype)
            for term, per_token in itertools.product(terms, (True, False)):
                rows.append(term(hidden[dispatch.token_R], dispatch, per_token))
    half = len(rows) // 2
    assert all(row.dtype == dtype for row in rows)
    for one, other in zip(rows[:half], rows[half:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_input(kind):
    """What heal.router needs: those of the dense module with the same weights."""
    module, dense, _ = factored(first_block("qwen3_moe"), kind)
    index, weight = routing(7, module.num_experts, False)
    found = []
    for experts in (module, dense):
        hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()
        experts(hidden, index, weight).square().sum().backward()
        found.append(hidden.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4 * float(found[1].abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_described_and_built_again(kind):
    """Names, shapes and dtypes of the module that the description gives; and nothing in memory beyond them."""
    block = first_block("gpt_oss")
    module, _, _ = factored(block, kind)
    again = build_factored(block, module.describe())
    assert isinstance(again, FactoredExperts)
    assert again.describe() == module.describe()
    assert {n: (t.shape, t.dtype) for n, t in again.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in module.state_dict().items()
    }
    assert all(t.is_meta for t in again.state_dict().values())
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in module.state_dict().values())
    before = {n: t.dtype for n, t in module.state_dict().items()}
    assert {n: t.dtype for n, t in module.to(torch.float64).state_dict().items()} == before


def test_a_kind_from_the_future():
    with pytest.raises(CheckpointError, match="needs a newer"):
        build_experts(first_block("qwen3_moe"), "tensor_train", {})


@torch.no_grad()
def test_a_token_goes_through_what_is_shared_once(monkeypatch):
    """Gate and up: a base or right factor of all experts is multiplied with tokens, not with their rows."""
    from moe_compress.quant.stack import Stack

    seen = []
    forward = Stack.forward

    def counted(self, slots, work, *rest):
        if isinstance(work, torch.Tensor):
            seen.append((len(work), self.out_features, self.in_features))
        return forward(self, slots, work, *rest)

    monkeypatch.setattr(Stack, "forward", counted)
    index, weight = torch.tensor([[0, 1, 2]] * 5), torch.ones(5, 3)
    for kind, expected in (("one base", 5 * 8 * 6), ("shared right", 5 * 3 * 6 + 15 * 8 * 3)):
        (term,), _ = make(kind, 4, 8, 6)
        dispatch = Dispatch.of(index, weight, 4)
        rows = torch.randn(5, 6)[dispatch.token_R]
        once, every = term(rows, dispatch, True), term(rows, dispatch, False)
        torch.testing.assert_close(once, every)
        seen.clear()
        term(rows, dispatch, True)
        assert sum(r * o * k for r, o, k in seen) == expected == term.operations(Load(15, 5, 3))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bases", "low rank", "shared left", "rows", "columns"])
def test_operations_are_those_that_are_done(kind, monkeypatch):
    """With every expert given the same number of rows."""
    from moe_compress.quant.stack import Stack

    done = []
    forward = Stack.forward

    def counted(self, slots, work, *rest):
        if isinstance(work, torch.Tensor):
            done.append(len(work) * self.out_features * self.in_features)
        return forward(self, slots, work, *rest)

    monkeypatch.setattr(Stack, "forward", counted)
    (term,), _ = make(kind, 20, 8, 6)
    dispatch = Dispatch.of(torch.arange(20).unsqueeze(1), torch.ones(20, 1), 20)
    term(torch.randn(20, 6), dispatch, False)
    assert sum(done) == term.operations(Load(20, 20, 20))


@torch.no_grad()
@pytest.mark.parametrize("few", [64, 0])
def test_experts_without_a_matrix_of_the_stack_get_zeros(few, monkeypatch):
    """Also where none of the experts that a token chose has one."""
    monkeypatch.setattr(stack_products, "FEW_ROWS", few)
    stack = Stack.holding(torch.randn(2, 6, 8))
    for index, held in (([[0, 2]], 0), ([[0, 2], [0, 2]], 0), ([[1, 2], [3, 0]], 2)):
        dispatch = Dispatch.of(torch.tensor(index), torch.ones(len(index), 2), 4)
        rows = torch.randn(len(dispatch.expert_R), 8)
        expected = torch.zeros(len(rows), 6)
        for row, expert in enumerate(dispatch.expert_R.tolist()):
            slot = [-1, 1, -1, 0][expert]
            if slot >= 0:
                expected[row] = stack.weight[slot] @ rows[row]
        assert held == int((expected != 0).any(1).sum())
        torch.testing.assert_close(routed_times(stack, [-1, 1, -1, 0], rows, dispatch), expected)

"""Packed linear layers, embeddings and tied heads: the same products as the dense weights that they stand for."""

import copy

import pytest
import torch
from packs import spread
from torch import nn

from moe_compress.quant import run_packed
from moe_compress.quant.grid import Grid, Quantized
from moe_compress.quant.packed_linear import PackedEmbedding, PackedHead, PackedLinear, build, packed
from moe_compress.quant.stack import Stack

ENCODINGS = [(b, g, s) for b in range(1, 9) for g, s in ((16, True), (-1, True), (8, False)) if b > 1 or s]


def random_matrix(rows, columns, bits, group, symmetric, seed=0):
    """A stack of one, and the float64 matrix that its codes, scales and zero points mean."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else columns // group
    codes = torch.randint(0, 1 << bits, (1, rows, columns), generator=generator).to(torch.uint8)
    scale = torch.randn(1, rows, groups, generator=generator).bfloat16()
    zero = None
    center = torch.tensor(0.5 if bits == 1 else float(1 << (bits - 1)), dtype=torch.float64)
    if not symmetric:
        zero = torch.randint(0, 1 << bits, (1, rows, groups), generator=generator).to(torch.uint8)
        center = spread(zero[0].double(), columns)
    dense = spread(scale[0].double(), columns) * (codes[0].double() - center)
    return Stack.holding(Quantized(codes, scale, zero, Grid(bits, group, symmetric))), dense


def close(found, expected):
    """As close as sums of float32 products are."""
    return torch.allclose(found.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("bits", "group", "symmetric"), ENCODINGS)
def test_a_linear_layer_is_the_dense_product(bits, group, symmetric, monkeypatch):
    monkeypatch.setattr(run_packed, "weights_at_once", lambda: 7 * 48)  # rows go seven at a time, the last ones fewer
    stack, dense = random_matrix(24, 48, bits, group, symmetric)
    bias = nn.Parameter(torch.randn(24))
    layer = PackedLinear(stack, bias, torch.float32)
    x = torch.randn(2, 5, 48)
    leaf = x.clone().requires_grad_()
    assert close(torch.autograd.grad(layer(leaf).sum(), leaf)[0].detach(), dense.sum(0).expand(2, 5, 48))
    expected = x.double() @ dense.T + bias.detach().double()
    with torch.no_grad():
        assert close(layer(x), expected)
    assert close(PackedLinear(stack, None, torch.float32)(x), x.double() @ dense.T)
    assert torch.equal(layer.weight.double(), dense.float().double())


@pytest.mark.parametrize(("bits", "group", "symmetric"), ENCODINGS)
def test_embeddings_are_the_rows_that_are_looked_up(bits, group, symmetric):
    stack, dense = random_matrix(30, 16, bits, group, symmetric)
    embeddings = PackedEmbedding(stack, 3, torch.float32)
    tokens = torch.tensor([[29, 0, 7, 7], [7, 3, 29, 1]])
    assert torch.equal(embeddings(tokens), dense.float()[tokens])


def test_only_rows_that_occur_are_unpacked(monkeypatch):
    unpacked = []
    forward = Stack.forward

    def watched(self, *arguments, **keywords):
        value = forward(self, *arguments, **keywords)
        unpacked.append(value.shape)
        return value

    monkeypatch.setattr(Stack, "forward", watched)
    stack, _ = random_matrix(1000, 16, 4, 16, True)
    PackedEmbedding(stack, None, torch.float32)(torch.tensor([[5, 5, 900, 17]]))
    assert unpacked == [(1, 3, 16)]


def test_a_head_uses_the_embeddings_weights_and_has_none(monkeypatch):
    monkeypatch.setattr(run_packed, "weights_at_once", lambda: 11 * 16)
    stack, dense = random_matrix(30, 16, 5, 16, True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = PackedEmbedding(stack, None, torch.float32)
            self.head = PackedHead(self.embeddings, None)

    model = Model()
    x = torch.randn(3, 16)
    assert close(model.head(x), x.double() @ dense.T)
    assert set(model.state_dict()) == {"embeddings.b5g16.codes", "embeddings.b5g16.scale"}
    twin = copy.deepcopy(model)
    assert twin.head.embeddings is twin.embeddings is not model.embeddings
    with torch.no_grad():
        twin.embeddings.stack.scale.mul_(2)
    assert torch.allclose(twin.head(x), 2 * model.head(x))


def test_a_cast_changes_what_comes_out_and_nothing_that_is_stored():
    stack, dense = random_matrix(30, 16, 4, 8, False)
    before = {n: t.clone() for n, t in stack.state_dict().items()}
    embeddings = PackedEmbedding(stack, None, torch.float32).to(torch.float16)
    assert embeddings(torch.tensor([4])).dtype == embeddings.weight.dtype == torch.float16
    assert torch.equal(embeddings(torch.tensor([4])), dense[[4]].half())
    linear = PackedLinear(stack, nn.Parameter(torch.zeros(30)), torch.float32).to(torch.bfloat16)
    assert linear.bias.dtype == torch.bfloat16
    assert linear(torch.zeros(1, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    after = stack.state_dict()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)


def test_built_again_from_its_description():
    linear, stack = nn.Linear(16, 24), random_matrix(24, 16, 3, 8, False)[0]
    there = packed(linear, stack, torch.float32)
    assert there.bias is linear.bias
    again = build(linear, there.describe(), torch.float32)
    assert again.stack.encoding == stack.encoding
    assert {n: (t.shape, t.dtype) for n, t in again.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in there.state_dict().items()
    }
    assert again.stack.codes.is_meta
    with pytest.raises(TypeError, match="Conv1d"):
        packed(nn.Conv1d(2, 2, 1), stack, torch.float32)

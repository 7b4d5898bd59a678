"""Factors of experts' matrices: each way against what it is to minimise, and ranks against brute force."""

import itertools

import numpy as np
import pytest
import torch
from grouped import randn

from moe_compress.merge import mobe
from moe_compress.merge.combine import joint_subspace
from moe_compress.merge.low_rank import (
    fisher_mean,
    left_of_rank,
    output_sum,
    own_left,
    root_of,
    shared_right,
    spectrum,
    whitened_factors,
)
from moe_compress.merge.ranks import DENSE, Sizes, give_out, remaining
from moe_compress.merge.splits import barycentre_order, find_method
from moe_compress.model import ExpertWeights
from moe_compress.model.shape import LayerShape


def moments(experts, size, seed=1):
    """Second moments of different, far from white inputs."""
    rows = randn(experts, 4 * size, size, seed=seed) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    turned = rows @ torch.linalg.qr(randn(experts, size, size, seed=seed + 1))[0]
    return turned.transpose(1, 2) @ turned


def error(difference, moment):
    """tr(ΔW H ΔWᵀ), one matrix at a time."""
    return torch.stack([torch.trace(d @ m @ d.T) for d, m in zip(difference, moment, strict=True)])


@pytest.mark.parametrize(("rows", "columns"), [(7, 12), (12, 7)])
def test_whitened_svd_leaves_the_discarded_spectrum_and_no_more(rows, columns):
    """Eckart and Young, in the metric of the inputs: the error is Σ σ², plain SVD and other subspaces err more."""
    weight, moment = randn(3, rows, columns), moments(3, columns)
    root = root_of(moment, damping=1e-12)
    left, right, squares = whitened_factors(weight, root)
    torch.testing.assert_close(spectrum(weight, root), squares)
    plain = torch.linalg.svd(weight, full_matrices=False)
    for rank in range(1, 7):
        own = error(weight - left[:, :, :rank] @ right[:, :rank], moment)
        torch.testing.assert_close(own, squares[:, rank:].sum(1), rtol=1e-6, atol=1e-6 * float(squares.sum()))
        cut = plain.U[:, :, :rank] * plain.S[:, None, :rank] @ plain.Vh[:, :rank]
        assert (error(weight - cut, moment) > own).all()
        for seed in range(5):
            # The best left factor for another right one, by least squares on the root.
            other = right[:, :rank] + 0.1 * randn(3, rank, columns, seed=seed)
            best = torch.linalg.lstsq((other @ root).transpose(1, 2), (weight @ root).transpose(1, 2)).solution
            assert (error(weight - best.transpose(1, 2) @ other, moment) >= own * (1 - 1e-9)).all()
    torch.testing.assert_close(left @ right, weight)


def test_a_root_of_nothing_and_of_little():
    moment = torch.stack([torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 0, 0, 3.0]))])
    root = root_of(moment, damping=0.01)
    torch.testing.assert_close(root[0], torch.eye(4).double())
    torch.testing.assert_close(root[1] @ root[1].T, moment[1].double() + 0.01 * torch.eye(4).double())


def test_latent_projection_is_the_joint_svd_where_all_read_the_like():
    weight, moment = randn(4, 6, 9), moments(1, 9).expand(4, -1, -1)
    root, share = root_of(moment, 1e-12), torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64)
    latent = shared_right(weight, root[0], share)
    taken, lower = own_left(weight, root, latent)
    stacked = torch.cat([s.sqrt() * w @ root[0] for s, w in zip(share, weight, strict=True)])
    sigma = torch.linalg.svdvals(stacked)
    for rank in range(1, 10):
        product = left_of_rank(taken, lower, rank) @ latent[:rank]
        left = (share * error(weight - product, moment)).sum()
        torch.testing.assert_close(left, sigma[rank:].square().sum(), rtol=1e-6, atol=1e-6 * float(sigma[0] ** 2))
    torch.testing.assert_close(product, weight, rtol=1e-6, atol=1e-6)


def test_own_left_factors_are_the_best_for_what_each_expert_reads():
    weight, moment = randn(4, 6, 9), moments(4, 9)
    root, latent = root_of(moment, 1e-12), randn(9, 9, seed=8)
    taken, lower = own_left(weight, root, latent)
    for rank in (1, 4, 9):
        best = torch.linalg.lstsq((latent[:rank] @ root).transpose(1, 2), (weight @ root).transpose(1, 2)).solution
        left = left_of_rank(taken, lower, rank)
        torch.testing.assert_close(left, best.transpose(1, 2), rtol=1e-6, atol=1e-6)
        own = error(weight - left @ latent[:rank], moment)
        whole = error(weight, moment)
        torch.testing.assert_close(own, whole - taken[:, :, :rank].square().sum((1, 2)), rtol=1e-6, atol=1e-6)


def test_shared_output_basis_is_the_best_for_the_weighted_sum_of_errors():
    weight, moment = randn(4, 6, 9), moments(4, 9)
    share = torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64)
    values = torch.linalg.eigvalsh(output_sum(weight, root_of(moment, 1e-12), share)).flip(0)
    basis = joint_subspace(output_sum(weight, root_of(moment, 1e-12), share), 6)
    for rank in range(1, 6):
        own = basis[:, :rank]
        left = (share * error(weight - own @ (own.T @ weight), moment)).sum()
        torch.testing.assert_close(left, values[rank:].sum(), rtol=1e-6, atol=1e-6 * float(values[0]))
        other = torch.linalg.qr(own + 0.1 * randn(6, rank, seed=rank))[0]
        assert (share * error(weight - other @ (other.T @ weight), moment)).sum() >= left * (1 - 1e-9)


def test_fisher_mean_weight_by_weight():
    weight, fisher = randn(3, 2, 4), randn(3, 2, 4, seed=2).square()
    fisher[:, 0, 1] = 0  # no gradient at all: the plain mean
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for i, j in itertools.product(range(2), range(4)):
        expected[i, j] = sum(fisher[e, i, j] * weight[e, i, j] for e in range(3)) / sum(
            fisher[e, i, j] for e in range(3)
        )
    expected[0, 1] = sum(weight[e, 0, 1] for e in range(3)) / 3
    torch.testing.assert_close(fisher_mean(weight, fisher), expected)


def test_barycentre_of_permuted_copies_is_the_expert_itself():
    one = ExpertWeights(up=randn(1, 8, 5), down=randn(1, 5, 8, seed=1), gate=randn(1, 8, 5, seed=2))
    orders = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(e)) for e in range(4)])
    copies = ExpertWeights(up=one.up[0][orders], gate=one.gate[0][orders], down=one.down[0].T[orders].transpose(1, 2))
    found = barycentre_order(copies)
    for e in range(4):
        torch.testing.assert_close(copies.up[e][found[e]], copies.up[0][found[0]])
        torch.testing.assert_close(copies.down[e][:, found[e]], copies.down[0][:, found[0]])


@pytest.mark.parametrize("activation", ["none", "silu", "tanh"])
def test_mobe_finds_planted_bases(activation):
    """Experts that are mixtures of two bases: Adam ends far below where it starts, and below what one basis reaches."""
    mixture = torch.softmax(3 * randn(8, 2, seed=3), 1)
    rows = mobe.mixed(randn(2, 4, 12), mixture, activation)
    weight = randn(8, 10, 4, seed=5) @ rows
    root = torch.eye(12, dtype=torch.float64)

    def left_over(bases, steps):
        base, share = mobe.fit_bases(weight, root, bases, 4, activation, steps)
        torch.testing.assert_close(share.sum(1), torch.ones(8))
        made = mobe.mixed(base, share, activation)
        left = mobe.own_left(weight, root.expand(8, -1, -1), made)
        return float((weight - left @ made.double()).square().sum() / weight.square().sum())

    fitted = left_over(2, 300)
    assert fitted < 0.3 * left_over(2, 0)
    assert fitted < 0.6 * left_over(1, 300)
    assert fitted == left_over(2, 300)


def test_mobe_left_factors_are_the_best_for_what_each_expert_reads():
    weight, root = randn(3, 6, 9), root_of(moments(3, 9))
    rows = randn(3, 4, 9, seed=4)
    best = torch.linalg.lstsq((rows @ root).transpose(1, 2), (weight @ root).transpose(1, 2)).solution.transpose(1, 2)
    torch.testing.assert_close(mobe.own_left(weight, root, rows), best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["svd", "latent"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_ranks_are_those_of_brute_force(method, keep):
    """Two experts of three matrices, every combination of ranks and dense."""
    layer = LayerShape(2, 1, None, hidden=8, intermediate=6, matrices=3, biases=0, weight_bytes=2, bytes=2 * 2 * 3 * 48)
    sizes = Sizes(find_method(method), layer, item=2, step=2, sparse=0.1)
    squares = randn(2, 3, 8, seed=int(10 * keep)).square().sort(dim=2, descending=True).values
    if method == "svd":
        squares[:, :, 6:] = 0
    measured = {"squares": squares, "rest": squares.sum(2), "energy": squares.sum(2) * 1.5, "output": randn(2).square()}
    found = sizes.chosen(give_out({0: sizes.choices(measured)}, int(keep * layer.bytes))[0][0])
    assert sizes.total(found) <= int(keep * layer.bytes)

    def cost(ranks):
        total = 0.0
        for (m, name), e in itertools.product(enumerate(("gate", "up", "down")), range(2)):
            rank = ranks[name][e]
            left = 0.0 if rank == DENSE else float(squares[e, m, rank:].sum())
            total += float(measured["output"][e]) * left / float(measured["energy"][e, m])
        return total

    best = np.inf
    options = [sizes.ranks(name) for name in ("gate", "up", "down")]
    per = 2 if method == "svd" else 1
    for choice in itertools.product(*(o for o in options for _ in range(per))):
        ranks = {n: list(choice[per * i : per * i + per]) * (2 // per) for i, n in enumerate(("gate", "up", "down"))}
        if sizes.total(ranks) <= int(keep * layer.bytes):
            best = min(best, cost(ranks))
    assert cost(found) == pytest.approx(best, rel=1e-4)  # what the program is asked for
    columns, known, note = give_out({0: sizes.choices(measured)}, int(keep * layer.bytes), exact=0)
    relaxed = cost(sizes.chosen(columns[0]))
    assert best <= relaxed * (1 + 1e-9)
    assert relaxed * (1 - known["gap"]) <= best * (1 + 1e-9)
    assert (known["solver"], note) == ("lagrange", "")
    assert float(remaining(measured)[0, 0, -1]) == 0


def test_no_rank_that_takes_as_much_as_dense():
    layer = LayerShape(8, 2, None, hidden=32, intermediate=16, matrices=3, biases=0, weight_bytes=2, bytes=0)
    for method in ("svd", "d2-moe", "latent"):
        sizes = Sizes(find_method(method), layer, item=2, step=4, sparse=0.1)
        for name in sizes.names:
            ranks = sizes.ranks(name)
            assert ranks[0] == 0
            assert ranks[-1] == DENSE
            bytes_ = [sizes.of(name, rank) for rank in ranks]
            assert bytes_ == sorted(set(bytes_))

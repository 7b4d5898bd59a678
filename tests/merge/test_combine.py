"""Several matrices into one: averages, and Sub-MoE's subspaces by the paper's procedure."""

import pytest
import torch
from grouped import generator, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compress.merge.combine import joint_subspace, output_gram, subspace_merge, weighted_average


def test_weighted_average():
    matrices, weight = randn(2, 3, 5, 4), torch.rand(2, 3, generator=generator(1)) + 0.1
    for g in range(2):
        expected = sum(float(weight[g, i]) * matrices[g, i] for i in range(3)) / float(weight[g].sum())
        torch.testing.assert_close(weighted_average(matrices, weight)[g], expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(weighted_average(matrices[g], weight[g]), weighted_average(matrices, weight)[g])
    half = matrices.bfloat16()
    assert weighted_average(half, weight).dtype == torch.float64
    torch.testing.assert_close(weighted_average(half, weight), weighted_average(half.double(), weight))


def moments(*shape, seed=0):
    """Full-rank second moments [..., K, K]."""
    samples = randn(*shape[:-1], 3 * shape[-1], shape[-1], seed=seed)
    scale = torch.linspace(0.1, 3, shape[-1], dtype=torch.float64)
    return torch.einsum("...tk,...tl->...kl", samples * scale, samples * scale)


def sub_moe(matrices_NOK, weight_N, rank, moments_NKK=None):
    """The paper's procedure as it stands: whiten, decompose side by side, cut, de-whiten, average the V, multiply."""
    count, _, width = matrices_NOK.shape
    factors = [torch.eye(width, dtype=torch.float64)] * count
    if moments_NKK is not None:
        factors = [torch.linalg.cholesky(m) for m in moments_NKK]
    wide = torch.cat([w @ s for w, s in zip(matrices_NOK, factors, strict=True)], dim=1)
    u, sigma, vt = torch.linalg.svd(wide, full_matrices=False)
    u, sigma, vt = u[:, :rank], sigma[:rank], vt[:rank]
    blocks = [v @ torch.linalg.inv(s) for v, s in zip(vt.split(width, dim=1), factors, strict=True)]
    average = sum(float(f) * v for f, v in zip(weight_N, blocks, strict=True)) / float(weight_N.sum())
    return u @ torch.diag(sigma) @ average


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 6, 16), (4, 7, 7)])
def test_subspace_merge_is_the_papers_procedure(shape, whiten):
    matrices, weight = randn(*shape), torch.rand(shape[0], generator=generator(1), dtype=torch.float64) + 0.1
    whitening = moments(shape[0], shape[2]) if whiten else None
    for rank in range(1, shape[1] + 1):
        found = subspace_merge(matrices, weight, rank, output_gram(matrices, whitening))
        torch.testing.assert_close(found, sub_moe(matrices, weight, rank, whitening), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("whiten", [False, True])
def test_subspace_merge_at_full_rank_is_averaging(whiten):
    matrices, weight = randn(2, 3, 6, 9), torch.rand(2, 3, generator=generator(1)) + 0.1
    whitening = moments(2, 3, 9) if whiten else None
    for rank in (6, 7):
        assert torch.equal(
            subspace_merge(matrices, weight, rank, output_gram(matrices, whitening)), weighted_average(matrices, weight)
        )
    basis = joint_subspace(output_gram(matrices, whitening), 6)
    projected = basis @ basis.transpose(-2, -1) @ weighted_average(matrices, weight)
    torch.testing.assert_close(projected, weighted_average(matrices, weight))


@pytest.mark.parametrize("whiten", [False, True])
def test_subspace_merge_is_a_projection(whiten):
    matrices, weight = randn(2, 3, 8, 9), torch.rand(2, 3, generator=generator(1)) + 0.1
    whitening = moments(2, 3, 9) if whiten else None
    for rank in (1, 3, 7):
        basis = joint_subspace(output_gram(matrices, whitening), rank)
        assert basis.shape == (2, 8, rank)
        torch.testing.assert_close(
            basis.transpose(-2, -1) @ basis, torch.eye(rank, dtype=torch.float64).expand(2, -1, -1)
        )
        merged = subspace_merge(matrices, weight, rank, output_gram(matrices, whitening))
        assert torch.linalg.matrix_rank(merged).tolist() == [rank, rank]
        torch.testing.assert_close(basis @ (basis.transpose(-2, -1) @ merged), merged)
        copies = merged.unsqueeze(1).repeat(1, 3, 1, 1)
        same = subspace_merge(copies, weight, rank, output_gram(copies, whitening))
        torch.testing.assert_close(same, merged)


@pytest.mark.parametrize("whiten", [False, True])
def test_error_of_the_subspace_is_that_of_the_singular_values(whiten):
    """Eckart–Young in the whitened norm: rank r leaves of the members the squares of the other singular values."""
    matrices, whitening = randn(3, 8, 5), moments(3, 5) if whiten else torch.eye(5, dtype=torch.float64).repeat(3, 1, 1)
    wide = torch.cat([w @ torch.linalg.cholesky(m) for w, m in zip(matrices, whitening, strict=True)], dim=1)
    sigma = torch.linalg.svdvals(wide)
    errors, distances = [], []
    average = weighted_average(matrices, torch.ones(3))
    for rank in range(1, 9):
        basis = joint_subspace(output_gram(matrices, whitening if whiten else None), rank)
        left = wide - basis @ (basis.T @ wide)
        errors.append(float(left.square().sum()))
        assert errors[-1] == pytest.approx(float(sigma[rank:].square().sum()), abs=1e-8)
        merged = subspace_merge(matrices, torch.ones(3), rank, output_gram(matrices, whitening if whiten else None))
        distances.append(float((merged - average).norm()))
    assert errors == sorted(errors, reverse=True)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0


def test_matrices_of_low_rank_lose_nothing():
    """Where the members' joint output space is smaller than the rank, the merge is their average."""
    matrices = randn(10, 4) @ randn(3, 4, 6, seed=1)
    for whitening in (None, moments(3, 6)):
        found = subspace_merge(matrices, torch.tensor([1.0, 2, 3]), 4, output_gram(matrices, whitening))
        torch.testing.assert_close(found, weighted_average(matrices, torch.tensor([1.0, 2, 3])))


def test_combining_on_another_device():
    """A stand-in for a GPU: tensors without data that know their device, and refuse to meet another's."""
    with FakeTensorMode():
        matrices = torch.empty(2, 3, 8, 6, device="lazy:0")
        weight, whitening = torch.empty(2, 3, dtype=torch.float64), torch.empty(2, 3, 6, 6)
        assert weighted_average(matrices, weight).device.type == "lazy"
        assert joint_subspace(output_gram(matrices, whitening), 4).device.type == "lazy"

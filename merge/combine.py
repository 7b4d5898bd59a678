"""Several experts' matrices into one: functions on tensors.

Letters: N members of a group, O/K output and input features of a matrix, G groups of equal size N done at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_compress.calib.inputs import chunks

_CACHED_BYTES = 8 << 20


def weighted_average(matrices_NOK: Tensor, weight_N: Tensor) -> Tensor:
    """Σ w_i W_i / Σ w_i over the members: [..., N, O, K], [..., N] → [..., O, K], summed in float64."""
    share_N11 = (weight_N / weight_N.sum(-1, keepdim=True)).to(matrices_NOK.device, torch.float64)[..., None, None]
    total = torch.zeros((), dtype=torch.float64, device=matrices_NOK.device)
    for matrix, share in zip(matrices_NOK.unbind(-3), share_N11.unbind(-3), strict=True):
        total = torch.addcmul(total, matrix.double(), share)
    return total


def members_of(stacked: Tensor, member_GN: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """What groups of equal size are made of, [E, …] and [G, N] → (which groups, their members [g, N, …]), a few groups
    at a time: as many as caches hold, for what is made of them goes through memory in float64 otherwise."""
    size = stacked[0].numel() * stacked.element_size() * member_GN.shape[1]
    for chunk in chunks([size] * len(member_GN), _CACHED_BYTES):
        part = slice(chunk.start, chunk.stop)
        yield part, stacked[member_GN[part].to(stacked.device)]


def fisher_average(matrices_NOK: Tensor, fisher_NOK: Tensor, weight_N: Tensor, prior: float = 1e-4) -> Tensor:
    """Every single weight averaged by its own Fisher information: [..., N, O, K] → [..., O, K], in float64.

    The minimum of Σ_i Σ F_i (W − W_i)², what moving to W costs the loss where F is its curvature at every member
    (Matena and Raffel, arXiv 2111.09832, equation 5; the shared base of D2-MoE, 2502.17298). Weights that no row has
    touched are averaged by `weight_N`, whose shares are added to F times `prior` of its mean over all members.

    Args:
        matrices_NOK: members, or their biases [..., N, O].
        fisher_NOK: F, not negative, of the same shape.
        weight_N: members' weights, not all zero.
    """
    matrices, fisher = matrices_NOK.double(), fisher_NOK.to(matrices_NOK.device, torch.float64)
    dims = tuple(range(weight_N.dim() - 1, matrices.dim()))
    share = (weight_N / weight_N.sum(-1, keepdim=True)).to(matrices).reshape(*weight_N.shape, *(1,) * (len(dims) - 1))
    mean = fisher.mean(dim=dims, keepdim=True)
    fisher = fisher + share * torch.where(mean > 0, prior * mean, 1)
    return (fisher * matrices).sum(dims[0]) / fisher.sum(dims[0])


def output_gram(matrices_NOK: Tensor, moment_NKK: Tensor | None = None) -> Tensor:
    """Σ_i W_i M_i W_iᵀ over the members, [..., O, O] float64: the second moment of what they put out.

    M_i is the second moment of member i's inputs, [..., N, K, K]; the identity without.
    """
    matrices = matrices_NOK.double()
    right = matrices if moment_NKK is None else matrices @ moment_NKK.to(matrices)
    return torch.einsum("...nok,...npk->...op", right, matrices)


def joint_subspace(gram_OO: Tensor, rank: int) -> Tensor:
    """An orthonormal basis [..., O, rank] of the directions in which the members put out most.

    With S_i S_iᵀ = M_i, the left singular vectors of [W_1 S_1 … W_N S_N] are the eigenvectors of `output_gram`: neither
    the wide matrix nor a Cholesky factor is ever formed. In the dtype of the Gram matrix.
    """
    symmetric = (gram_OO + gram_OO.transpose(-2, -1)) / 2
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors.flip(-1)[..., :rank]


def subspace_merge(matrices_NOK: Tensor, weight_N: Tensor, rank: int, gram_OO: Tensor | None = None) -> Tensor:
    """Sub-MoE's merge: [..., N, O, K] → [..., O, K] (arXiv 2506.23266, section 3.2, "union" decomposition).

    The paper decomposes the members put side by side, [W_1 S_1 … W_N S_N] = U Σ [V_1ᵀ … V_Nᵀ], averages the V_i by
    frequency and multiplies back. As U_r Σ_r V_iᵀ = U_r U_rᵀ W_i S_i, the result is U_r U_rᵀ · (Σ w_i W_i / Σ w_i): the
    weighted average, projected onto the members' joint output subspace. At full rank the projection is the identity,
    whatever the whitening: the merge is plain weighted averaging, and the SVD is not computed.

    Args:
        matrices_NOK: members.
        weight_N: their weights, not all zero.
        rank: dimension of the joint subspace that is kept, 1 … O.
        gram_OO: second moment of the members' outputs (`output_gram`, or measured); None: of the weights alone.
    """
    average = weighted_average(matrices_NOK, weight_N)
    if rank >= matrices_NOK.shape[-2]:
        return average
    basis = joint_subspace(output_gram(matrices_NOK) if gram_OO is None else gram_OO, rank).to(average)
    return basis @ (basis.transpose(-2, -1) @ average)

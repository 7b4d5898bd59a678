"""Several experts' matrices into one: functions on tensors.

Letters: N members of a group, O/K output and input features of a matrix, G groups of equal size N done at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_average(matrices_NOK: Tensor, weight_N: Tensor) -> Tensor:
    """Σ w_i W_i / Σ w_i over the members: [..., N, O, K], [..., N] → [..., O, K], summed in float64."""
    share = (weight_N / weight_N.sum(-1, keepdim=True)).double()
    return torch.einsum("...n,...nok->...ok", share, matrices_NOK.double())


def joint_subspace(matrices_NOK: Tensor, rank: int, whitening_NKK: Tensor | None = None) -> Tensor:
    """The leading `rank` left singular vectors of [W_1 S_1 … W_N S_N]: an orthonormal basis [..., O, rank], float64.

    They are eigenvectors of Σ_i W_i S_i S_iᵀ W_iᵀ, so the wide matrix is never formed; with S_i S_iᵀ the second moment of
    member i's inputs, `whitening_NKK` holds those moments (no Cholesky factor is needed). Without, S_i is the identity.
    """
    matrices = matrices_NOK.double()
    right = matrices if whitening_NKK is None else matrices @ whitening_NKK.double()
    gram_OO = torch.einsum("...nok,...npk->...op", right, matrices)
    gram_OO = (gram_OO + gram_OO.transpose(-2, -1)) / 2
    return torch.linalg.eigh(gram_OO).eigenvectors.flip(-1)[..., :rank]


def subspace_merge(
    matrices_NOK: Tensor, weight_N: Tensor, rank: int, whitening_NKK: Tensor | None = None
) -> Tensor:
    """Sub-MoE's merge: [..., N, O, K] → [..., O, K] (arXiv 2506.23266, section 3.2, "union" decomposition).

    The paper decomposes the members put side by side, [W_1 S_1 … W_N S_N] = U Σ [V_1ᵀ … V_Nᵀ], averages the V_i by
    frequency and multiplies back. As U_r Σ_r V_iᵀ = U_r U_rᵀ W_i S_i, the result is U_r U_rᵀ · (Σ w_i W_i / Σ w_i): the
    weighted average, projected onto the members' joint output subspace. At full rank the projection is the identity,
    whatever the whitening, and the merge is plain weighted averaging (methods.md C3): the SVD is then not computed.

    Args:
        matrices_NOK: members.
        weight_N: their weights, not all zero.
        rank: dimension of the joint subspace that is kept, 1 … O.
        whitening_NKK: second moments of each member's inputs, or None.
    """
    average = weighted_average(matrices_NOK, weight_N)
    if rank >= matrices_NOK.shape[-2]:
        return average
    basis = joint_subspace(matrices_NOK, rank, whitening_NKK)
    return basis @ (basis.transpose(-2, -1) @ average)

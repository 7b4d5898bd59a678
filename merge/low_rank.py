"""Matrices → factors: functions on tensors, all experts at once.

What is minimised is ‖(W_e − Ŵ_e) S_e‖², S_e S_eᵀ = H_e the second moment of what expert e's matrix reads: the error of
its own output on the calibration text. With H_e the identity it is the error of the weights.

Letters: E experts, O/K output and input features, r rank, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .combine import joint_subspace, output_gram, weighted_average


def root_of(moment_EKK: Tensor, damping: float = 0.01) -> Tensor:
    """S [E, K, K] lower triangular with S Sᵀ = H + damping · mean(diag H) · 1; an H of zeros counts as the identity.

    The damping keeps directions that the text says nothing about; no inverse of S is ever formed.
    """
    moment = moment_EKK.double()
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    whole = torch.where(scale > 0, moment + damping * scale * eye, eye)
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(whole)
    if bool(info.any()):  # float32 sums of few tokens: as little as it takes
        factor = torch.linalg.cholesky(whole + 1e-6 * torch.where(scale > 0, scale, 1) * eye)
    return factor


def whitened_factors(weight_EOK: Tensor, root_EKK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximations of every rank at once: U [E, O, D], V [E, D, K], σ² [E, D], D = min(O, K).

    SVD-LLM (arXiv 2403.07378, section 3.1): W S = U Σ Pᵀ, W ≈ U_r Σ_r P_rᵀ S⁻¹, and what rank r leaves is Σ_{j>r} σ_j²
    (Eckart and Young). As U_r Σ_r P_rᵀ S⁻¹ = U_r U_rᵀ W, the factors are U_r and U_rᵀ W: rank r takes the first r
    columns and rows, and S needn't be inverted.
    """
    weight = weight_EOK.to(torch.promote_types(weight_EOK.dtype, torch.float32))
    left, sigma, _ = torch.linalg.svd(weight @ root_EKK.to(weight), full_matrices=False)
    return left, left.transpose(-2, -1) @ weight, sigma.double().square()


def spectrum(weight_EOK: Tensor, root_EKK: Tensor) -> Tensor:
    """σ² of `whitened_factors` alone, [E, D] float64."""
    weight = weight_EOK.to(torch.promote_types(weight_EOK.dtype, torch.float32))
    squares: Tensor = torch.linalg.svdvals(weight @ root_EKK.to(weight)).double().square()
    return squares


def shared_right(weight_EOK: Tensor, root_KK: Tensor, share_E: Tensor) -> Tensor:
    """A latent projection V [K, K] for all experts, its rows ordered by what they matter.

    MoLAE (arXiv 2503.23100), joint SVD of all experts: of [W_1 S; …; W_E S], rows of expert e weighted by √share_e, the
    right singular vectors P give V = Pᵀ S⁻¹. Best where all experts read the like, with the
    second moment S Sᵀ; each expert's own inputs are taken into account by `own_left`.
    """
    root = root_KK.double()
    gram = torch.zeros_like(root)
    for weight, share in zip(weight_EOK, share_E.tolist(), strict=True):
        white = weight.double() @ root
        gram += share * (white.T @ white)
    basis = joint_subspace(gram, len(gram))
    latent: Tensor = torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)
    return latent


def own_left(weight_EOK: Tensor, root_EKK: Tensor, latent_DK: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert's best A_e for the first r rows of V, for every r: C [E, O, D] and L [E, D, D].

    V H_e Vᵀ = L Lᵀ, C = W_e H_e Vᵀ L⁻ᵀ. For rank r, A_e = C_r L_r⁻¹ (`left_of_rank`), with the leading parts of C and
    L: factors nest. Column j of C has the energy that direction j takes off the error: the error that rank r leaves is
    tr(W_e H_e W_eᵀ) − Σ_{j≤r} ‖C_j‖².
    """
    root = root_EKK.double()
    seen = latent_DK.double() @ root
    gram = seen @ seen.transpose(-2, -1)
    lower = torch.linalg.cholesky(gram)
    cross = (weight_EOK.double() @ root) @ seen.transpose(-2, -1)
    taken: Tensor = torch.linalg.solve_triangular(lower.transpose(-2, -1), cross, upper=True, left=False)
    return taken, lower


def left_of_rank(taken_EOD: Tensor, lower_EDD: Tensor, rank: int) -> Tensor:
    """A_e [E, O, rank] from `own_left`."""
    left: Tensor = torch.linalg.solve_triangular(
        lower_EDD[:, :rank, :rank], taken_EOD[:, :, :rank], upper=False, left=False
    )
    return left


def output_sum(weight_EOK: Tensor, root_EKK: Tensor, share_E: Tensor) -> Tensor:
    """Σ_e share_e · W_e H_e W_eᵀ, [O, O] float64.

    Its leading r eigenvectors (`combine.joint_subspace`) are the best U [O, r] of all experts, W_e ≈ U · Uᵀ W_e, for
    that sum of errors: the like of MoLAE's latent projection, for the matrix whose inputs are each expert's own
    neurons.
    """
    share = share_E.to(weight_EOK.device).sqrt().view(-1, 1, 1)
    return output_gram(share * (weight_EOK.double() @ root_EKK.double()))


def fisher_mean(weight_EOK: Tensor, fisher_EOK: Tensor) -> Tensor:
    """Σ_e F_e ∘ W_e / Σ_e F_e, weight by weight, [O, K] float64 (D2-MoE, arXiv 2502.17298, section 3.1).

    Where no gradient was seen, the plain mean.
    """
    weight, fisher = weight_EOK.double(), fisher_EOK.double()
    total = fisher.sum(0)
    mean = (weight * fisher).sum(0) / torch.where(total > 0, total, 1)
    return torch.where(total > 0, mean, weight.mean(0))


def base_of(weight_EOK: Tensor, weight_E: Tensor) -> Tensor:
    """The weighted mean of all experts, [O, K] float64; the plain one where all weights are zero."""
    return weighted_average(weight_EOK, weight_E if bool((weight_E > 0).any()) else torch.ones_like(weight_E))


def loudest(energy_EI: Tensor, count: int) -> Tensor:
    """The `count` rows or columns of each expert with the most energy, ascending: [E, count]."""
    return energy_EI.topk(count, dim=1).indices.sort(dim=1).values

"""What rounding loses, added back as matrices of low rank: the best ones for what the experts read, in closed form.

Contract: pure, batched over experts, float32 inside. With D = W − Ŵ of [O, K] and H the second moment of what the
matrix reads, the error tr((D − A B) H (D − A B)ᵀ) is least over all A B of rank r where

    A = U [O, r], the leading eigenvectors of D H Dᵀ,    B = Uᵀ D

With H = R Rᵀ that is the truncated singular value decomposition of D R (Eckart and Young; ASVD and LQER whiten alike),
A B R = U Uᵀ D R: no factor of H and no inverse is needed, and what is left is the sum of the other eigenvalues.

A shared pair is added to every expert. Over all X, Σ_e n_e tr((D_e − X) H_e (D_e − X)ᵀ) is a constant and
tr((X − X*) H̄ (X − X*)ᵀ) with H̄ = Σ n_e H_e and X* = (Σ n_e D_e H_e) H̄⁻¹, so the best shared pair is the above of X*
and H̄: exact as well, from two sums over the experts.

After Quant Experts (a shared low-rank adapter for what matters to all tokens, routed ones for what matters to some).

Letters: E experts, O/K output and input features, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.errors import RunError

DTYPE = torch.bfloat16  # of stored factors
DAMPING = 1e-4  # of a shared pair's H̄, times its mean diagonal


@dataclass(frozen=True)
class Pair:
    """Factors of matrices of low rank: `left` [..., O, r] times `right` [..., r, K]."""

    left: Tensor
    right: Tensor

    @property
    def product(self) -> Tensor:
        """[..., O, K], float32."""
        return self.left.float() @ self.right.float()

    def stored(self) -> Pair:
        """Rounded as files hold it."""
        return Pair(self.left.to(DTYPE), self.right.to(DTYPE))


def pair_bytes(out_features: int, in_features: int, rank: int) -> int:
    """Bytes of the stored factors of one matrix."""
    return rank * (out_features + in_features) * DTYPE.itemsize


def correction(error_EOK: Tensor, hessian_EKK: Tensor, rank: int) -> Pair:
    """The pairs of a rank that leave least of errors W − Ŵ [E, O, K] on what H [E, K, K] is of; float32.

    H is symmetric, positive semidefinite. A rank above what the matrices have gives zeros for the rest.
    Raises RunError where errors or moments aren't finite.
    """
    error_EOK = error_EOK.float()
    seen_EOO = _seen(error_EOK, hessian_EKK)
    found = min(rank, seen_EOO.shape[-1])
    left_EOr = torch.linalg.eigh(seen_EOO).eigenvectors[..., -found:].flip(-1)
    left_EOr = torch.nn.functional.pad(left_EOr, (0, rank - found))
    right_ErK = left_EOr.transpose(-2, -1) @ error_EOK
    # As large as each other, and the same sign on every machine.
    balance_Er = right_ErK.norm(dim=-1).sqrt()
    peak_Er = left_EOr.gather(-2, left_EOr.abs().argmax(-2, keepdim=True)).squeeze(-2)
    balance_Er = balance_Er * torch.where(peak_Er < 0, -1.0, 1.0)
    inverse_Er = torch.where(balance_Er == 0, 0.0, 1 / balance_Er)
    return Pair(left_EOr * balance_Er.unsqueeze(-2), right_ErK * inverse_Er.unsqueeze(-1))


def shares_left(error_EOK: Tensor, hessian_EKK: Tensor | None, ranks: list[int]) -> Tensor:
    """What share of tr(D H Dᵀ) the best pair of each rank leaves, [E, ranks] float64; 1 where there is no error.

    `hessian_EKK`: None stands for identity matrices.
    """
    error_EOK = error_EOK.float()
    outer, inner = error_EOK.shape[-2:]
    root_EKK = None if hessian_EKK is None or inner >= outer else _root(hessian_EKK)
    if root_EKK is not None:
        error_EOK, hessian_EKK = error_EOK @ root_EKK, None
    if hessian_EKK is None and inner < outer:  # the same eigenvalues from a smaller matrix
        values_E = torch.linalg.eigvalsh(error_EOK.transpose(-2, -1) @ error_EOK)
    else:
        values_E = torch.linalg.eigvalsh(_seen(error_EOK, hessian_EKK))
    values_E = values_E.double().clamp_min(0).flip(-1)
    total_E1 = values_E.sum(-1, keepdim=True)
    removed = torch.nn.functional.pad(values_E.cumsum(-1), (1, 0))
    kept = removed[:, [min(rank, removed.shape[-1] - 1) for rank in ranks]]
    return torch.where(total_E1 > 0, 1 - kept / torch.where(total_E1 > 0, total_E1, 1), 1.0).clamp_min_(0)


class SharedSums:
    """The two sums over experts from which a shared pair follows."""

    def __init__(self) -> None:
        self.seen_OK: Tensor | None = None
        self.moment_KK: Tensor | None = None

    def add(self, error_EOK: Tensor, hessian_EKK: Tensor, count_E: Tensor) -> None:
        """Errors that some experts have left, moments per token of what they read, and how many tokens each saw."""
        weighed_EKK = hessian_EKK.float() * count_E.to(hessian_EKK.device, torch.float32)[:, None, None]
        seen_OK = torch.bmm(error_EOK.float(), weighed_EKK).sum(0).double()
        moment_KK = weighed_EKK.sum(0).double()
        self.seen_OK = seen_OK if self.seen_OK is None else self.seen_OK + seen_OK
        self.moment_KK = moment_KK if self.moment_KK is None else self.moment_KK + moment_KK

    def pair(self, rank: int) -> Pair:
        """[O, rank] and [rank, K], float32: the best for all experts together."""
        assert self.seen_OK is not None
        assert self.moment_KK is not None
        moment_KK = self.moment_KK.clone()
        moment_KK.diagonal().add_(DAMPING * moment_KK.diagonal().mean() + torch.finfo(torch.float32).tiny)
        wanted_OK = torch.linalg.solve(moment_KK, self.seen_OK.T).T
        found = correction(wanted_OK[None], self.moment_KK[None], rank)
        return Pair(found.left[0], found.right[0])


def _seen(error_EOK: Tensor, hessian_EKK: Tensor | None) -> Tensor:
    """D H Dᵀ [E, O, O]; symmetric. D Dᵀ without H."""
    left_EOK = error_EOK if hessian_EKK is None else error_EOK @ hessian_EKK.float()
    seen_EOO = left_EOK @ error_EOK.transpose(-2, -1)
    if not bool(seen_EOO.isfinite().all()):
        raise RunError("errors of quantized experts, or what the experts read, aren't finite")
    return (seen_EOO + seen_EOO.transpose(-2, -1)) / 2


def _root(hessian_EKK: Tensor) -> Tensor | None:
    """R with R Rᵀ = H, or None where some H isn't positive definite in float32."""
    root_EKK, info_E = torch.linalg.cholesky_ex(hessian_EKK.float())
    return None if bool(info_E.any()) else root_EKK

"""The triangular form of error feedback: what every solver shares that goes column by column through a matrix.

Contract: pure functions on tensors, float32 inside, batched over experts. With H = R Rᵀ, R upper triangular, and
Δ = W − Ŵ,

    tr(Δ H Δᵀ) = ‖Δ R‖² = Σ_j R_jj² ‖t_j − ŵ_j‖²,    t_j = w_j + Σ_{i<j} Δ_i R_ij / R_jj

so whatever is put in the place of column j (its nearest level in gptq.py, a zero in prune/sparsegpt.py), its error is
against the target t_j, weighs R_jj², and the columns after it make up for it. No inverse of H is needed.

Shape letters: E experts, O output features, K input features, B and b columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_compress.errors import RunError

MAX_DAMPING = 10.0  # times the mean diagonal; a positive semidefinite matrix factorises far below that
DEAD = 1e-6  # diagonal of a channel that no token excited, times the mean


def normalised(hessian_EKK: Tensor, first_expert: int) -> tuple[Tensor, Tensor]:
    """A float32 copy with a mean diagonal of 1 (an all-zero one stays), and the mean diagonals, float64."""
    work_EKK = hessian_EKK if hessian_EKK.dtype == torch.float64 else hessian_EKK.float()
    unit_E = work_EKK.diagonal(dim1=1, dim2=2).mean(1, dtype=torch.float64)
    work_EKK = (work_EKK / torch.where(unit_E > 0, unit_E, 1.0).to(work_EKK.dtype)[:, None, None]).float()
    broken_E = ~work_EKK.isfinite().flatten(1).all(1)
    if broken_E.any():
        raise RunError(f"the Hessian of expert {first_expert + int(broken_E.int().argmax())} contains NaN or infinity")
    negative_E = (work_EKK.diagonal(dim1=1, dim2=2) < 0).any(1)
    if negative_E.any():
        raise RunError(f"the Hessian of expert {first_expert + int(negative_E.int().argmax())} has a negative diagonal")
    return work_EKK, unit_E


def feedback(hessian_EKK: Tensor, order_EK: Tensor, damping: float, first_expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of H + damping = R Rᵀ: R_ij / R_jj at [j, i], in processing order; R_jj², in the original order; the damping."""
    backwards_EK = order_EK.flip(1)
    expert_E11 = torch.arange(len(order_EK), device=order_EK.device)[:, None, None]
    permuted_EKK = hessian_EKK[expert_E11, backwards_EK[:, :, None], backwards_EK[:, None, :]]
    diagonal_EK = permuted_EKK.diagonal(dim1=1, dim2=2)
    # A channel that no token excited has a zero row and column, and is independent of the others whatever its diagonal
    # is: nothing, but for what factorising needs without a damping.
    diagonal_EK += damping + DEAD * (diagonal_EK == 0)
    damping_E = torch.full_like(diagonal_EK[:, 0], damping)
    factor_EKK, info_E = torch.linalg.cholesky_ex(permuted_EKK)
    while (failed := info_E.nonzero().flatten()).numel():
        used = float(damping_E[failed[0]])  # the same for all that failed
        more = max(used * 10, 1e-6)
        if more > MAX_DAMPING:
            raise RunError(
                f"the Hessian of expert {first_expert + int(failed[0])} isn't positive semidefinite: "
                f"it can't be factorised with {used:g} times its mean diagonal added"
            )
        diagonal_EK[failed] += more - used
        damping_E[failed] = more
        factor_EKK[failed], info_E[failed] = torch.linalg.cholesky_ex(permuted_EKK[failed])
    # The lower factor of a matrix read backwards is the upper factor of the matrix, read backwards.
    upper_EKK = factor_EKK.flip(1, 2)
    upper_diagonal_EK = upper_EKK.diagonal(dim1=1, dim2=2).clone()
    upper_EKK /= upper_diagonal_EK[:, None, :]
    conditional_EK = torch.empty_like(upper_diagonal_EK).scatter_(1, order_EK, upper_diagonal_EK.square())
    return upper_EKK.transpose(1, 2), conditional_EK, damping_E


def targets(delta_EKO: Tensor, feedback_EKK: Tensor, start: int, stop: int) -> Tensor:
    """The weights of columns [start, stop), making up for the errors of all columns before `start`."""
    if start == 0:
        return delta_EKO[:, :stop].clone()
    return torch.baddbmm(delta_EKO[:, start:stop], feedback_EKK[:, start:stop, :start], delta_EKO[:, :start])


def expected_targets(delta_EKO: Tensor, feedback_EKK: Tensor, start: int, stop: int) -> Tensor:
    """What the targets of columns [start, stop) would be if those were all rounded without an error of their own.

    A column rounded to its target t instead of its weight w leaves w − t to the columns after it: a triangular system.
    These are the weights as the textbook's updates have them when the group starts.
    """
    weight_EbO = delta_EKO[:, start:stop]
    change_EbO = targets(delta_EKO, feedback_EKK, start, stop) - weight_EbO
    within_Ebb = feedback_EKK[:, start:stop, start:stop]
    left_EbO: Tensor = torch.linalg.solve_triangular(within_Ebb, change_EbO, upper=False, unitriangular=True)
    return left_EbO.add_(weight_EbO)

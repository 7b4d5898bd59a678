"""Experts as mixtures of shared bases: W_e ≈ A_e · f(Σ_b α_eb B_b) (MoBE, arXiv 2508.05257, section 3).

Contract: `fit_bases` is a function on tensors; same arguments, same result. As in the paper the α of an expert are a
softmax, weights are brought to unit size first, and Adam descends on all of A, B and α at once. Two things differ: the
error is weighed by what the matrices read (the paper's is that of the weights), and A_e is solved in closed form at the
end, for the inputs of expert e.

Letters: E experts, O/K output and input features, n bases, r their rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .terms import ACTIVATIONS


def fit_bases(
    weight_EOK: Tensor,
    root_KK: Tensor,
    bases: int,
    rank: int,
    activation: str = "silu",
    steps: int = 400,
    rate: float = 0.07,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """B [n, r, K] and the mixture α [E, n], float32.

    Args:
        weight_EOK: matrices of all experts of a layer.
        root_KK: S, S Sᵀ the second moment of what the layer reads; the identity for the paper's own error.
        bases, rank: n and r.
        activation: f, a name in `terms.ACTIVATIONS`.
        steps, rate: of Adam; the rate falls to zero along a cosine.
        seed: of the noise that α starts with.
    """
    weight = weight_EOK.float() / weight_EOK.float().std().clamp_min(1e-30)
    root = root_KK.float() / root_KK.float().square().sum(0).mean().sqrt()
    count = len(weight)
    # Bases start as the row spaces of experts spread over the layer, each expert nearest to one of them.
    near = torch.arange(count) * bases // count
    first = torch.tensor([(b * count + bases - 1) // bases for b in range(bases)])
    left = torch.linalg.svd(weight[first] @ root, full_matrices=False)[0][:, :, :rank]
    base_nrK = left.transpose(1, 2) @ weight[first]
    base_nrK = base_nrK / base_nrK.std().clamp_min(1e-30)
    noise = torch.randn(count, bases, generator=torch.Generator().manual_seed(seed))
    logit_En = (2.0 * torch.nn.functional.one_hot(near, bases).float() + 0.01 * noise).to(weight.device)
    white = weight @ root

    def rows() -> Tensor:
        return mixed(base_nrK, logit_En.softmax(1), activation) @ root

    left_EOr = _solved(white, rows())
    parameters = [left_EOr, base_nrK, logit_En]
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_()
        _descend(parameters, lambda: (white - left_EOr @ rows()).square().mean(), steps, rate)
    return base_nrK.detach(), logit_En.detach().softmax(1)


def mixed(base_nrK: Tensor, mixture_En: Tensor, activation: str) -> Tensor:
    """f(Σ_b α_eb B_b), [E, r, K]."""
    return ACTIVATIONS[activation](torch.einsum("en,nrk->erk", mixture_En, base_nrK))


def own_left(weight_EOK: Tensor, root_EKK: Tensor, rows_ErK: Tensor) -> Tensor:
    """The best A [E, O, r] for what each expert reads: least ‖(W_e − A_e · rows_e) S_e‖², float64."""
    root = root_EKK.double()
    return _solved(weight_EOK.double() @ root, rows_ErK.double() @ root)


def _descend(parameters: list[Tensor], loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    adam = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
    for _ in range(steps):
        adam.zero_grad()
        loss().backward()
        adam.step()
        schedule.step()


def _solved(target_EOK: Tensor, rows_ErK: Tensor) -> Tensor:
    """The A [E, O, r] that makes A · rows nearest to the target; a millionth of a ridge where rows are nearly alike."""
    gram = rows_ErK @ rows_ErK.transpose(1, 2)
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(gram + ridge * eye, rows_ErK @ target_EOK.transpose(1, 2))
    return solved.transpose(1, 2).contiguous()

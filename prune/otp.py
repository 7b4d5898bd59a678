"""A small router per layer that learns how many of a token's experts to run (OTP in MC#, arXiv 2510.10962).

Letters: T tokens, K slots per token, F features of a token (hidden size and K weights).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def train_prefixes(
    features_TF: Tensor,
    error_TK: Tensor,
    wanted: float,
    *,
    epochs: int = 20,
    rate: float = 0.01,
    batch: int = 512,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Scores [K, F], [K] whose largest entry says how many experts a token runs, `wanted` on average.

    A choice is drawn by Gumbel-softmax, its temperature annealed from 2 to 0.2. What it costs is linear in the one-hot
    choice, because everything but the scores is frozen: the error that each number of experts leaves, known
    beforehand, and a price per expert. The price follows the average while training; at the end, the score of every
    number of experts is shifted in proportion to it until the average over these tokens is the wanted one.

    Args:
        features_TF: what the scores read, float32.
        error_TK: squared error of a token's output with k = 1 … K experts, not negative.
        wanted: experts per token, 1 to K.
        epochs, rate, batch, seed: of Adam.
    """
    tokens, slots = error_TK.shape
    generator = torch.Generator().manual_seed(seed)
    # One unit of error: what a token loses on average with one expert only.
    error_TK = (error_TK / error_TK[:, 0].mean().clamp_min(1e-300)).float()
    count_K = torch.arange(1, slots + 1, dtype=torch.float32)
    weight = torch.zeros(slots, features_TF.shape[1], requires_grad=True)
    bias = torch.zeros(slots, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=rate, foreach=False)
    steps, step, price = epochs * math.ceil(tokens / batch), 0, 0.0
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(tokens, generator=generator).split(batch):
                temperature = 2.0 * (0.2 / 2.0) ** (step / max(1, steps - 1))
                scores = torch.nn.functional.linear(features_TF[rows], weight, bias)
                uniform = torch.rand(scores.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
                choice = ((scores - (-uniform.log()).log()) / temperature).softmax(-1)
                used = (choice * count_K).sum(-1).mean()
                loss = (choice * error_TK[rows]).sum(-1).mean() + price * used
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                price = max(0.0, price + 0.05 * (float(used.detach()) - wanted) / slots)
                step += 1
    weight, bias = weight.detach(), bias.detach()
    return weight, bias + _shift(torch.nn.functional.linear(features_TF, weight, bias), wanted) * count_K


def _shift(scores_TK: Tensor, wanted: float) -> float:
    """What, times the number of experts, added to the scores makes the average of their choices the wanted one."""
    count_K = torch.arange(1, scores_TK.shape[1] + 1, dtype=scores_TK.dtype)

    def average(shift: float) -> float:
        return float((scores_TK + shift * count_K).argmax(-1).double().mean()) + 1

    reach = 2 * float(scores_TK.abs().max()) + 1  # beyond it everybody takes the most, or the least
    low, high = -reach, reach
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) <= wanted else (low, middle)
    return min((low, high), key=lambda shift: abs(average(shift) - wanted))

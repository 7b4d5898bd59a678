"""Factors of a layer's experts at given ranks, as terms, a chunk of experts at a time.

Letters: E experts, C experts of a chunk, O/K output and input features, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import mobe
from .low_rank import left_of_rank, own_left, whitened_factors
from .ranks import DENSE
from .reading import Reading
from .spectra import shared_directions
from .splits import Split
from .terms import Basis, LowRank, Term

if TYPE_CHECKING:
    from .factorise import FactoriseOptions

Ranks = dict[str, list[int]]


@dataclass
class Found:
    """Factors, and what they leave.

    Attributes:
        terms: projection → the term that holds them; absent where every expert stays dense.
        error: projection → tr(ΔW H ΔWᵀ) of every expert, [E] float64, 0 where it stays dense.
    """

    terms: dict[str, Term]
    error: dict[str, Tensor]


def own_factors(split: Split, ranks: Ranks, reading: Reading, dtype: torch.dtype) -> Found:
    """U_e V_e of every expert's rest, whitened, each at its own rank."""
    low = {name: [max(0, rank) for rank in own] for name, own in ranks.items()}
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in split.rest}
    for here, roots in reading:
        for name, matrix in split.rest.items():
            left, right, squares = whitened_factors(matrix[here], roots[name])
            most = max(low[name])
            gone = torch.tensor(low[name][here], device=squares.device).unsqueeze(1)
            beyond = torch.arange(squares.shape[1], device=squares.device) >= gone
            parts[name].append(
                (left[:, :, :most].to(dtype), right[:, :most].to(dtype), (squares * beyond).sum(1).cpu())
            )
    found = Found({}, {})
    for name, own in parts.items():
        left, right, error = (torch.cat(column) for column in zip(*own, strict=True))
        found.terms[name] = LowRank.holding(left, right, low[name])
        found.error[name] = error * torch.tensor([rank != DENSE for rank in ranks[name]])
    return found


def shared_factors(split: Split, ranks: Ranks, reading: Reading, share_EM: Tensor, dtype: torch.dtype) -> Found:
    """W_e ≈ A_e V of gate and up, U B_e of down; V and U are the layer's, A_e and B_e the best for what e reads."""
    directions = shared_directions(split, reading, share_EM)
    wanted = {name: own[0] for name, own in ranks.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name in split.rest}
    errors: dict[str, list[Tensor]] = {name: [] for name in split.rest}
    stored = {n: (d[:, : wanted[n]] if n == "down" else d[: wanted[n]]).to(dtype) for n, d in directions.items()}
    for here, roots in reading:
        for name, matrix in split.rest.items():
            own = matrix[here]
            if wanted[name] == DENSE:
                errors[name].append(torch.zeros(len(own), dtype=torch.float64))
                continue
            if name == "down":
                made = directions[name][:, : wanted[name]].T @ own.double()
                product = stored[name].double() @ made
            else:
                made = left_of_rank(*own_left(own, roots[name], directions[name]), wanted[name])
                product = made @ stored[name].double()
            parts[name].append(made.to(dtype))
            errors[name].append(((own.double() - product) @ roots[name]).square().sum((1, 2)).cpu())
    found = Found({}, {name: torch.cat(own) for name, own in errors.items()})
    for name, rank_E in ranks.items():
        if wanted[name] == DENSE:
            continue
        made, shared = torch.cat(parts[name]), stored[name][None]
        left, right, side = (shared, made, "left") if name == "down" else (made, shared, "right")
        found.terms[name] = LowRank.holding(left, right, rank_E, side)
    return found


def by_bases(
    split: Split, ranks: Ranks, reading: Reading, bases: int, options: FactoriseOptions, dtype: torch.dtype
) -> Found:
    """Mixtures of bases for gate and up."""
    experts = len(ranks["down"])
    found = Found({}, {name: torch.zeros(experts, dtype=torch.float64) for name in split.rest})
    fitted = {}
    for name in [n for n in split.rest if n != "down"]:
        base, mixture = mobe.fit_bases(
            split.rest[name],
            reading.mean_root,
            bases,
            ranks[name][0],
            options.activation,
            options.fit_steps,
            options.rate,
            options.seed,
        )
        fitted[name] = base.to(dtype), mixture.to(dtype)
    lefts: dict[str, list[Tensor]] = {name: [] for name in fitted}
    for here, roots in reading:
        for name, (base, mixture) in fitted.items():
            own = split.rest[name][here]
            rows = mobe.mixed(base.float(), mixture[here].float(), options.activation)
            left = mobe.own_left(own, roots[name], rows)
            lefts[name].append(left.to(dtype))
            left_over = (own.double() - left @ rows.double()) @ roots[name]
            found.error[name][here] = left_over.square().sum((1, 2)).cpu()
    for name, (base, mixture) in fitted.items():
        found.terms[name] = Basis.holding(torch.cat(lefts[name]), base, mixture, options.activation)
    return found

"""What a method of factorising holds as it is, and what it leaves for factors: functions registered by name.

Each takes dense experts of a layer and returns a `Split`: the summands that are fixed (a shared base, whole neurons)
and the rest, W_e less these. How the rest is factorised is the method's `form`. Adding one: a function under `@method`.

Letters: E experts, O/K output and input features, I neurons, c neurons kept whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moe_compress.model.experts import ExpertWeights
from moe_compress.registry import Registry

from .align import exact_assignment, permuted, weight_similarity
from .low_rank import base_of, fisher_mean, loudest
from .reading import Reading

Form = Literal["own", "shared", "bases"]
BaseRule = Literal["fisher", "frequency", "mean"]
_ROUNDS = 3


@dataclass
class Split:
    """A layer's experts, in summands.

    Attributes:
        rest: projection → [E, O, K], what factors are to stand for.
        base: projection → [O, K], in all experts.
        index: projection → [E, c], ascending: rows (of gate and up) or columns (of down) that are kept whole, zero in
            the rest.
    """

    rest: dict[str, Tensor]
    base: dict[str, Tensor] = field(default_factory=dict)
    index: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What a method gets besides the weights.

    Attributes:
        reading: what the experts read. counts_E: rows of each.
        base: how a base is made. fisher: projection → F [E, O, K], with base "fisher".
        sparse: share of neurons kept whole.
    """

    reading: Reading
    counts_E: Tensor
    base: BaseRule
    fisher: dict[str, Tensor]
    sparse: float


Divide = Callable[[ExpertWeights, Asked], Split]


@dataclass(frozen=True)
class Method:
    """A way to factorise.

    Attributes:
        name, source: how recipes call it, and where it is from.
        divide: see Split.
        form: of the rest's factors: "own": U_e V_e of every expert, each matrix at its own rank; "shared": V (gate, up)
            or U (down) in common; "bases": mixtures of bases for gate and up, down stays dense.
        base: how its base is made by default; None where it has none.
        whole: whether it keeps neurons whole.
        aligned: whether neurons are put in one order first.
    """

    name: str
    source: str
    divide: Divide
    form: Form
    base: BaseRule | None = None
    whole: bool = False
    aligned: bool = False


METHODS = Registry[Method]("method of factorising", "methods of factorising")
find_method = METHODS.find


def method(
    name: str,
    source: str,
    form: Form = "own",
    base: BaseRule | None = None,
    whole: bool = False,
    aligned: bool = False,
) -> Callable[[Divide], Divide]:
    """Register a method; see Method."""

    return METHODS.adding(lambda divide: Method(name, source, divide, form, base, whole, aligned))


def _everything(weights: ExpertWeights, _: Asked) -> Split:
    """Nothing is fixed."""
    return Split(dict(weights.matrices()))


method("svd", "SVD-LLM (arXiv 2403.07378), whitened; ranks by the program (as MoE-I², 2411.01016, by another cost)")(
    _everything
)
method("latent", "MoLAE (arXiv 2503.23100): one projection into a latent space for all experts of a layer", "shared")(
    _everything
)
method("mobe", "MoBE (arXiv 2508.05257): W_e = A_e · f(Σ α_eb B_b) for gate and up; down stays dense", "bases")(
    _everything
)


@method(
    "d2-moe", "D2-MoE (arXiv 2502.17298): a base, the experts' Fisher-weighted mean, and low-rank deltas", base="fisher"
)
def d2_moe(weights: ExpertWeights, asked: Asked) -> Split:
    """Base and deltas; neurons as they are numbered, as in the paper."""
    return _less_base(weights, asked)


@method(
    "resmoe",
    "ResMoE (arXiv 2503.06881): barycentre of experts whose neurons are aligned, and low-rank residuals",
    base="mean",
    aligned=True,
)
def resmoe(weights: ExpertWeights, asked: Asked) -> Split:
    """The same on aligned experts, whose mean is their Wasserstein barycentre."""
    return _less_base(weights, asked)


@method("mc-smoe", "MC-SMoE (arXiv 2310.01334), section 3.2: low-rank plus structured sparse; merge first", whole=True)
def mc_smoe(weights: ExpertWeights, asked: Asked) -> Split:
    """The neurons whose rows and columns put out most stay whole."""
    energies = {name: torch.zeros(m.shape[0], _neurons(name, m)) for name, m in weights.matrices()}
    for here, roots in asked.reading:
        for name, matrix in weights.matrices():
            own = matrix[here].double()
            if name == "down":  # column i, times what neuron i puts in
                energy = own.square().sum(1) * roots[name].square().sum(2)
            else:
                energy = (own @ roots[name]).square().sum(2)
            energies[name][here] = energy.float().cpu()
    split = Split({})
    for name, matrix in weights.matrices():
        index = loudest(energies[name], kept_neurons(_neurons(name, matrix), asked.sparse)).to(matrix.device)
        keep = torch.ones(matrix.shape[0], _neurons(name, matrix), device=matrix.device).scatter_(1, index, 0)
        split.rest[name] = matrix * (keep.unsqueeze(1) if name == "down" else keep.unsqueeze(2))
        split.index[name] = index
    return split


def kept_neurons(neurons: int, share: float) -> int:
    """How many neurons are kept whole."""
    return max(1, round(neurons * share))


def barycentre_order(weights: ExpertWeights) -> Tensor:
    """Neuron orders [E, I] that bring experts nearest to their mean: that mean is their Wasserstein barycentre.

    ResMoE (arXiv 2503.06881, section 4.1): experts are clouds of neurons, all of equal mass, so transport plans are
    permutations. As there, by turns: match every expert with the mean, and take the mean again; from the first expert,
    three rounds.
    """
    count, neurons = weights.up.shape[:2]
    order = torch.arange(neurons, device=weights.up.device).expand(count, -1)
    centre = weights.map(lambda w: w[:1])
    for _ in range(_ROUNDS):
        # One by one, as the assignment is solved in any case: [E, I, I] would be too much.
        own = (weights.map(lambda w, e=e: w[e : e + 1]) for e in range(count))  # type: ignore[misc]
        order = torch.cat([exact_assignment(weight_similarity(centre, one)) for one in own])
        centre = permuted(weights, order).map(lambda w: w.float().mean(0, keepdim=True))
    return order


def _less_base(weights: ExpertWeights, asked: Asked) -> Split:
    split = Split({})
    for name, matrix in weights.matrices():
        if asked.base == "fisher":
            base = fisher_mean(matrix, asked.fisher[name])
        else:
            base = base_of(matrix, asked.counts_E if asked.base == "frequency" else torch.ones(len(matrix)))
        split.base[name] = base.to(matrix.dtype)
        split.rest[name] = matrix - split.base[name]
    return split


def _neurons(name: str, matrix: Tensor) -> int:
    return matrix.shape[2 if name == "down" else 1]

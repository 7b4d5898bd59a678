"""Which weights become zeros: patterns, and the criteria by which the lowest of a row go.

Contract: pure functions on tensors, batched over experts. Weights are compared inside each output row only, so every
row of every expert gets the same number of zeros, exactly as many as the pattern asks for, ties included.

Letters: E experts, O output features, K input features, N of M weights that stay of each run of M inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_compress.quant.layer_rows import Weighing
from moe_compress.registry import Registry


@dataclass(frozen=True)
class Pattern:
    """How many weights of a row become zeros, and where they may be.

    Attributes:
        sparsity: share of a row's weights that become zeros.
        run: M, inputs of a run, each of which has the same number of zeros; None where zeros may be anywhere in a row.
    """

    sparsity: float
    run: int | None = None

    @classmethod
    def named(cls, name: str) -> Pattern:
        """N:M by name, such as "2:4". Raises ValueError for anything else."""
        kept, colon, of = name.partition(":")
        if not (colon and kept.isdigit() and of.isdigit() and 0 < int(kept) < int(of)):
            raise ValueError(f"pattern is N:M, of each M neighbours N stay, such as 2:4 or 4:8, not {name!r}")
        return cls(1 - int(kept) / int(of), int(of))

    def zeros(self, columns: int) -> int:
        """Zeros in a row, or in a run of it, of so many inputs."""
        return round(self.sparsity * columns)

    def mask(self, score_EOK: Tensor) -> Tensor:
        """Where the zeros go, [E, O, K] booleans: the lowest scores of each row, or of each run."""
        if self.run is None:
            return lowest(score_EOK, self.zeros(score_EOK.shape[-1]))
        runs = score_EOK.unflatten(-1, (-1, self.run))
        return lowest(runs, self.zeros(self.run)).flatten(-2)


def lowest(score: Tensor, count: int) -> Tensor:
    """The `count` lowest of the last dimension, as booleans; of equal ones the first."""
    order = score.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)


# Weights [E, O, K], mean squares of what each input brings [E, K] (None where nothing is read), a generator → scores.
Score = Callable[[Tensor, Tensor | None, torch.Generator], Tensor]


@dataclass(frozen=True)
class WeightCriterion:
    """A way to choose zeros.

    Attributes:
        name, source: how recipes call it, and where it is from.
        reads: what rows count for in what it reads; None where it looks at weights alone.
        score: see Score.
        solves: whether the weights that stay make up for those that go (sparsegpt.py).
    """

    name: str
    source: str
    reads: Weighing | None
    score: Score
    solves: bool = False


WEIGHT_CRITERIA = Registry[WeightCriterion]("criterion for weights", "criteria for weights")
find_weight_criterion = WEIGHT_CRITERIA.find


def weight_criterion(
    name: str, source: str, reads: Weighing | None = None, *, solves: bool = False
) -> Callable[[Score], Score]:
    """Register a score under a name; see WeightCriterion."""

    return WEIGHT_CRITERIA.adding(lambda score: WeightCriterion(name, source, reads, score, solves))


@weight_criterion("random", "control: what any criterion has to beat")
def random_score(weight_EOK: Tensor, _: Tensor | None, generator: torch.Generator) -> Tensor:
    """Uniform noise."""
    return torch.rand(weight_EOK.shape, generator=generator).to(weight_EOK.device)


@weight_criterion("magnitude", "|W|, without data; here inside each output row, not over the matrix")
def magnitude(weight_EOK: Tensor, _: Tensor | None, __: torch.Generator) -> Tensor:
    """Size of the weight."""
    return weight_EOK.float().abs()


def _wanda(weight_EOK: Tensor, squares_EK: Tensor | None, _: torch.Generator) -> Tensor:
    """|W_ij| times the norm of input j over the rows routed to the expert."""
    assert squares_EK is not None, "what the experts read has been measured"
    return weight_EOK.float().abs() * squares_EK.float().sqrt().unsqueeze(1)


weight_criterion("wanda", "Wanda (arXiv 2306.11695): |W_ij|·‖x_j‖₂ over the rows routed to the expert", "plain")(_wanda)
weight_criterion(
    "moe_pruner",
    "MoE-Pruner (arXiv 2410.12013): |W_ij|·‖g·x_j‖₂, inputs times their routing weight g",
    "gate_squared",
)(_wanda)
weight_criterion(
    "sparsegpt",
    "SparseGPT (arXiv 2301.00774): zeros that cost least by the Hessian, and the weights that stay make up for them",
    "gate_squared",
    solves=True,
)(_wanda)

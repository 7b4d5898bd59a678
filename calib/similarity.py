"""How alike a layer's experts are, other than by their outputs: by router logits, by weights, by the tokens they share.

Every result holds `similarity` [E, E] with ones on the diagonal: cosines, so that it is positive semidefinite and says
distances too.

Letters: E experts, T tokens, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEBlock, Tap

from .statistics import Accumulator, Result, Statistic


@dataclass(frozen=True)
class LogitSimilarity(Statistic):
    """Cosine between the experts' columns of router logits over all tokens (M-SMoE, arXiv 2310.01334, section 3.1).

    Result: `similarity` [E, E]. Of what the router returns as its logits, in some families probabilities. Raises
    UnsupportedModelError where it returns none.
    """

    name: ClassVar[str] = "logit_similarity"

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _LogitSums(block.num_experts)


class _LogitSums(Accumulator):
    def __init__(self, experts: int):
        self.gram = torch.zeros(experts, experts, dtype=torch.float64)

    def update(self, tap: Tap) -> None:
        if tap.logits_TE is None or tap.logits_TE.shape[1] < len(self.gram):
            raise UnsupportedModelError(f"the router of layer {tap.layer} returns no logits by which to group experts")
        if tap.classes is not None:
            raise UnsupportedModelError(f"layer {tap.layer}: its router scores other experts than there are (`remap`)")
        logits = tap.logits_TE[:, : len(self.gram)].double()  # behind the experts' may be classes of other things
        self.gram += (logits.T @ logits).cpu()

    def result(self) -> Result:
        return {"similarity": cosines(self.gram)}


@dataclass(frozen=True)
class WeightSimilarity(Statistic):
    """Cosine between the experts' projections, put end to end, neurons as they are numbered.

    Result: `similarity` [E, E]. Experts that compute the same with their neurons in another order don't count as alike.
    """

    name: ClassVar[str] = "weight_similarity"
    weighs_tokens: ClassVar[bool] = True  # no token is read

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _WeightGram(block.num_experts)


class _WeightGram(Accumulator):
    def __init__(self, experts: int):
        self.gram = torch.zeros(experts, experts, dtype=torch.float64)
        self.done = False

    def update(self, tap: Tap) -> None:
        if self.done:
            return
        for _, matrix in tap.experts.weights().matrices():
            flat = matrix.float().flatten(1)
            self.gram += (flat @ flat.T).double().cpu()
        self.done = True

    def result(self) -> Result:
        return {"similarity": cosines(self.gram)}


@dataclass(frozen=True)
class CoActivation(Statistic):
    """How often two experts are chosen for the same token, n_ij / √(n_i n_j).

    Result: `similarity` [E, E]; `counts` [E, E] the n_ij, on the diagonal the tokens of each expert.
    """

    name: ClassVar[str] = "co_activation"

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _CoActivationCounts(block.num_experts)


class _CoActivationCounts(Accumulator):
    def __init__(self, experts: int):
        self.counts = torch.zeros(experts, experts, dtype=torch.float64)

    def update(self, tap: Tap) -> None:
        experts = len(self.counts)
        # Zero weights and indices beyond the last expert are no choices (see Dispatch.of): a column that is left out.
        index = torch.where(tap.weight_TK == 0, experts, tap.index_TK).clamp_max(experts)
        chosen = torch.zeros(len(index), experts + 1, device=index.device).scatter_(1, index, 1)[:, :experts]
        self.counts += (chosen.T @ chosen).double().cpu()  # whole numbers below 2²⁴: exact

    def result(self) -> Result:
        return {"similarity": cosines(self.counts), "counts": self.counts}


def cosines(gram_EE: Tensor) -> Tensor:
    """A Gram matrix normalised to ones on the diagonal; a vector of zeros is like nothing but itself."""
    norm = gram_EE.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(norm > 0, 1 / norm, 0)
    return (gram_EE * inverse * inverse.unsqueeze(1)).fill_diagonal_(1)

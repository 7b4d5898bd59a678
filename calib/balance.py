"""Which sequences calibration takes so that every expert sees enough of them (EAQuant's calibration balance).

The promise: one sweep over the sequences that were asked for and a pool of candidates counts, per sequence, which
experts it visits; then candidates join one by one, each the one that gives the least-served experts most, until every
expert of every layer has its share, or no candidate helps, or the stated most is reached. Equal inputs give equal
choices. `Balanced.report` says how shares were, how they are, and who is still starved.

Letters: N sequences, P candidates, L layers with experts, E experts of a layer, M = Σ E over all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEBlock, Tap
from moe_compress.model.dispatch import Dispatch

from .statistics import Accumulator, Result, Statistic


class ExpertBalance(BaseModel):
    """How evenly experts are to be served by the calibration text."""

    model_config = ConfigDict(extra="forbid")

    ratio: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="What every expert is to get, in fair shares: tokens that the layer's experts see on average when "
        "the model reads the `sequences` that were asked for (tokens · top-k / experts). More than 1 is possible: "
        "sequences are added, none are taken away.",
    )
    most: int | None = Field(
        default=None, ge=1, description="Sequences at the most, those asked for included; default: twice as many."
    )
    pool: int | None = Field(
        default=None,
        ge=1,
        description="Further sequences to choose from; default: four times `sequences`. One sweep runs over all.",
    )


@dataclass(frozen=True)
class SequenceRouting(Statistic):
    """How often each sequence visits each expert.

    Result: `counts` [N, E] tokens of each sequence routed to each expert, int32. Raises UnsupportedModelError, while
    measuring, where experts see other tokens than those that the sequences hold.
    """

    name: ClassVar[str] = "sequence_routing"
    sequences: int

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _SequenceCounts(self.sequences, block.num_experts)


class _SequenceCounts(Accumulator):
    def __init__(self, sequences: int, experts: int):
        self.experts = experts
        self.counts = torch.zeros(sequences, experts, dtype=torch.int32)

    def update(self, tap: Tap) -> None:
        if tap.sequence_T is None:
            raise UnsupportedModelError(
                f"layer {tap.layer}: its experts don't see the sequences' tokens one by one, so `expert_balance` can't "
                "tell which sequence serves which expert"
            )
        dispatch = Dispatch.of(tap.index_TK, tap.weight_TK, self.experts)
        sequence_R = tap.sequence_T[dispatch.token_R.cpu()]
        place_R = sequence_R * self.experts + dispatch.expert_R.cpu()
        self.counts += torch.bincount(place_R, minlength=self.counts.numel()).view_as(self.counts).int()

    def result(self) -> Result:
        return {"counts": self.counts}


@dataclass(frozen=True)
class Balanced:
    """What was chosen. `added`: candidates in the order in which they joined, numbered from 0; `report`: plain data."""

    added: list[int]
    report: dict[str, Any]


def balance(layers: dict[int, Tensor], asked: int, ratio: float, most: int) -> Balanced:
    """Choose candidates that give starved experts what they lack.

    Args:
        layers: decoder layer → `counts` [N + P, E] of the sequences that were asked for, then of the candidates.
        asked: N.
        ratio: tokens that every expert is to see, in fair shares of the N sequences.
        most: sequences at the most, the N included.

    An expert lacks max(0, ratio · fair - tokens), fair the mean over its layer's experts of their tokens in the N
    sequences. A candidate's gain is what it fills of that, in fair shares, summed over all experts: filling a gap
    counts, tokens beyond it don't, so the greedy choice fills at least 1 - 1/e of what the best one of as many would.
    """
    counts_NM = torch.cat([counts.double() for counts in layers.values()], dim=1)
    base_NM, pool_PM = counts_NM[:asked], counts_NM[asked:]
    fair_M = torch.cat([c[:asked].double().sum(0).mean().expand(c.shape[1]) for c in layers.values()])
    unit_M = fair_M.clamp_min(1e-300).reciprocal()
    lacking_M = (ratio * fair_M - base_NM.sum(0)).clamp_min(0)
    free = torch.ones(len(pool_PM), dtype=torch.bool)
    added: list[int] = []
    while asked + len(added) < most and free.any() and lacking_M.any():
        # Rounded, so that equals are equal in whatever order they were summed.
        gain_P = (torch.minimum(pool_PM, lacking_M) * unit_M).sum(1).round(decimals=9).masked_fill(~free, -1)
        best = int(gain_P.argmax())  # the first of equals
        if gain_P[best] <= 0:
            break
        added.append(best)
        free[best] = False
        lacking_M = (lacking_M - pool_PM[best]).clamp_min(0)
    chosen = [*range(asked), *(asked + i for i in added)]
    served = {layer: counts[:asked].double().sum(0) for layer, counts in layers.items()}
    starved, start = {}, 0
    for layer, counts in layers.items():
        experts = lacking_M[start : start + counts.shape[1]].nonzero().flatten().tolist()
        start += counts.shape[1]
        if experts:
            starved[str(layer)] = experts
    report = {
        "ratio": ratio,
        "sequences": asked,
        "candidates": len(pool_PM),
        "added": len(added),
        "most": most,
        "before": shares([c[:asked] for c in layers.values()]),
        "after": shares([c[chosen] for c in layers.values()]),
        "starved_before": sum(int((total < ratio * total.mean()).sum()) for total in served.values()),
        "starved": starved,
    }
    return Balanced(added, report)


def shares(layers: Sequence[Tensor]) -> dict[str, float]:
    """Tokens of each expert beside the mean of its layer, [N, E] counts per layer: minimum, mean, and the mean over
    layers of their standard deviation."""
    totals = [counts.double().sum(0) for counts in layers]
    relative = [total / total.mean().clamp_min(1e-300) for total in totals]
    return {
        "min": round(float(min(r.min() for r in relative)), 6),
        "mean": round(float(torch.cat(relative).mean()), 6),
        "std": round(float(torch.stack([r.std(correction=0) for r in relative]).mean()), 6),
    }

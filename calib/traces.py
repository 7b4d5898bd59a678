"""What a layer's router decides token by token, how sure it is, and how large activations become: for looking at.

Letters: E experts, T tokens, K experts per token, R rows (token, expert), H hidden, I neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_compress.model import MoEBlock, Tap

from .routing import distribution
from .statistics import Accumulator, Result, Statistic


@dataclass(frozen=True)
class RoutingTrace(Statistic):
    """Every choice of the router, in the order of the text.

    Result: `index` [T, K] int16 the experts chosen, -1 in slots that no expert serves; `weight` [T, K] float16 what
    multiplies their outputs, 0 there; `sequence` [T] int32 the sequence that a token belongs to, -1 where experts
    don't see the sequences' tokens one by one. 4·K + 4 bytes per token and layer.
    """

    name: ClassVar[str] = "routing_trace"

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Trace(block.num_experts)


class _Trace(Accumulator):
    def __init__(self, experts: int):
        self.experts = experts
        self.index: list[Tensor] = []
        self.weight: list[Tensor] = []
        self.sequence: list[Tensor] = []

    def update(self, tap: Tap) -> None:
        # Zero weights and indices beyond the last expert are no choices (see Dispatch.of).
        served = (tap.weight_TK != 0) & (tap.index_TK < self.experts)
        self.index.append(torch.where(served, tap.index_TK, -1).to(torch.int16).cpu())
        self.weight.append(torch.where(served, tap.weight_TK, 0).to(torch.float16).cpu())
        unknown = torch.full((len(tap.index_TK),), -1)
        self.sequence.append((unknown if tap.sequence_T is None else tap.sequence_T).to(torch.int32).cpu())

    def result(self) -> Result:
        return {
            "index": torch.cat(self.index),
            "weight": torch.cat(self.weight),
            "sequence": torch.cat(self.sequence),
        }


@dataclass(frozen=True)
class RouterCertainty(Statistic):
    """How sure a router is.

    Result: `tokens` [] tokens that reach an expert; `first` [] Σ over them of the largest routing weight's share of the
    token's weights; `entropy` [] Σ over all tokens of the entropy, nats, of the router's distribution over its classes
    (the softmax of its logits, see `routing.distribution`), `seen` [] those tokens, `classes` [] how many classes:
    these three are absent where the router returns no logits.
    """

    name: ClassVar[str] = "router_certainty"

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _CertaintySums()


class _CertaintySums(Accumulator):
    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.classes = 0

    def update(self, tap: Tap) -> None:
        weight_TK = tap.weight_TK.double().abs()
        total_T = weight_TK.sum(dim=1)
        reached = total_T > 0
        first_T = weight_TK.amax(dim=1)[reached] / total_T[reached]
        added = [float(reached.sum()), float(first_T.sum()), 0.0, 0.0]
        if tap.logits_TE is not None:
            share_TC = distribution(tap.logits_TE).double()
            added[2:] = float(torch.special.entr(share_TC).sum()), float(len(share_TC))
            self.classes = share_TC.shape[1]
        self.sums += torch.tensor(added, dtype=torch.float64)

    def result(self) -> Result:
        tokens, first, entropy, seen = self.sums
        found = {"tokens": tokens, "first": first}
        if self.classes:
            found |= {"entropy": entropy, "seen": seen, "classes": torch.tensor(self.classes)}
        return found


@dataclass(frozen=True)
class ActivationMaxima(Statistic):
    """The largest magnitudes that appear in a layer.

    Result, float64: `input` [E] max |x| of what each expert reads; `neuron` [E] max |a| of what its down projection
    reads; 0 for an expert that saw no token. `behind` [] max |h| of the hidden states behind the decoder layer (massive
    activations); absent where the layer doesn't return one vector per token. Those of expert outputs are in
    `OutputNorms`.
    """

    name: ClassVar[str] = "activation_maxima"

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _Maxima(block.num_experts)


class _Maxima(Accumulator):
    def __init__(self, experts: int):
        self.maxima = torch.zeros(2, experts, dtype=torch.float64)
        self.behind: float | None = 0.0

    def update(self, tap: Tap) -> None:
        expert_R = tap.dispatch.expert_R.cpu()
        for maximum, rows in zip(self.maxima, (tap.input_RH, tap.activation_RI), strict=True):
            largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=-1).double()
            maximum.scatter_reduce_(0, expert_R, largest.cpu(), "amax")
        behind = tap.behind_TH
        if behind is None or self.behind is None:
            self.behind = None
        else:
            self.behind = max(self.behind, float(behind.abs().max()))

    def result(self) -> Result:
        found = {"input": self.maxima[0], "neuron": self.maxima[1]}
        return found if self.behind is None else found | {"behind": torch.tensor(self.behind, dtype=torch.float64)}

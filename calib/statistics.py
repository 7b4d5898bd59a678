"""What can be measured of a block while calibration text passes through it.

A `Statistic` is an accumulator over taps. A pass names the statistics that it needs, the union is collected in one
sweep, and results are plain tensors that can be stored and reused. Sums over tokens are kept in float64 where they
are small and in float32 where they are matrices. Adding one: subclass `Statistic`, say what it promises, done.

Letters: E experts, T tokens, K experts per token, R rows (token, expert), H hidden.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEBlock, MoEModel, Tap
from moe_compress.model.dispatch import Dispatch

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Statistic(ABC):
    """Settings of a statistic; `start` gives the accumulator for one block.

    Two statistics with equal `key` measure the same and are collected once.

    Attributes:
        name: of the kind.
        weighs_tokens: whether every token counts as much as `Tap.token_weight_T` says (docs/calibration.md), or
            whether tokens make no difference. Where false, a run that weighs tokens says so.
    """

    name: ClassVar[str]
    # Whether it is of the text at all; one that is of the weights alone is measured without any.
    reads_text: ClassVar[bool] = True
    # Whether it is measured on the way back of a GradientSweep: its accumulators then get GradientTaps.
    gradients: ClassVar[bool] = False
    # Whether its taps are to say what attention tokens receive.
    reads_attention: ClassVar[bool] = False
    weighs_tokens: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """Identity in the store: name and settings."""
        settings = asdict(self)
        return self.name if not settings else f"{self.name}({json.dumps(settings, sort_keys=True)})"

    @abstractmethod
    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """A fresh accumulator for a block that is about to see `tokens` tokens."""

    def parameters(self, block: MoEBlock) -> Sequence[str]:
        """With `gradients`: parameters, named relative to the layer, whose gradients taps are to hold."""
        return ()


class LayerStatistic(Statistic):
    """What is measured of a decoder layer as a whole, or of what lies outside the layers, not of a block's taps.

    A `step` or `sweep` is what compress/model/sweep.py calls so.
    """

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """It has no accumulator."""
        raise TypeError(f"{self.name} measures decoder layers, not blocks")

    @abstractmethod
    def layers(self, model: MoEModel) -> list[int]:
        """The layers that it measures, `beside.OUTER` among them if it measures what lies outside."""

    @abstractmethod
    def measure(self, model: MoEModel, step: Any) -> Result:
        """Measure a live layer with all batches waiting in front of it; none of them moves."""

    @abstractmethod
    def measure_outer(self, model: MoEModel, sweep: Any) -> Result:
        """Measure what lies outside the layers, all batches waiting behind the last."""


class Accumulator(ABC):
    """Sums over the taps of one block."""

    @abstractmethod
    def update(self, tap: Tap) -> None:
        """Take one batch into account."""

    @abstractmethod
    def result(self) -> Result:
        """What was measured, as tensors on the CPU."""


def counted_rows(tap: Tap, dispatch: Dispatch) -> Tensor:
    """What each row counts: its token's weight, float64, 1 where tokens aren't weighed."""
    return tap.counted_T[dispatch.token_R]


def _sum_rows(values_R: Tensor, dispatch: Dispatch, experts: int) -> Tensor:
    """Σ over each expert's rows, in float64."""
    total = torch.zeros(experts, dtype=torch.float64, device=values_R.device)
    return total.index_add_(0, dispatch.expert_R, values_R.double())


@dataclass(frozen=True)
class Routing(Statistic):
    """How often and how strongly each expert is chosen.

    Result: `tokens` [] tokens seen; `counts` [E] rows per expert n_e; `gate` [E] Σ g; `gate_squared` [E] Σ g²;
    with g the weight that the model multiplies with the expert's output (not re-computed from logits). Each token
    counts as much as it weighs.
    """

    name: ClassVar[str] = "routing"
    weighs_tokens: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _RoutingSums(block.num_experts)


class _RoutingSums(Accumulator):
    def __init__(self, experts: int):
        self.experts = experts
        self.tokens: float = 0
        self.sums = torch.zeros(3, experts, dtype=torch.float64)

    def update(self, tap: Tap) -> None:
        dispatch = Dispatch.of(tap.index_TK, tap.weight_TK, self.experts)
        gate, counted = dispatch.weight_R.double(), counted_rows(tap, dispatch)
        self.tokens += len(tap.hidden_TH) if tap.token_weight_T is None else float(tap.counted_T.sum())
        rows = [counted, counted * gate, counted * gate**2]
        self.sums += torch.stack([_sum_rows(r, dispatch, self.experts) for r in rows]).cpu()

    def result(self) -> Result:
        counts, gate, squared = self.sums
        return {"tokens": torch.tensor(self.tokens), "counts": counts, "gate": gate, "gate_squared": squared}


@dataclass(frozen=True)
class ChosenLogits(Statistic):
    """The router's logits where they led to a choice.

    Result: `sum` [E] Σ of the expert's logit over the tokens routed to it, as the family's own router returns it (some
    return probabilities). Raises UnsupportedModelError, while measuring, where the router returns none.
    """

    name: ClassVar[str] = "chosen_logits"
    weighs_tokens: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _LogitSums(block.num_experts)


class _LogitSums(Accumulator):
    def __init__(self, experts: int):
        self.experts = experts
        self.sums = torch.zeros(experts, dtype=torch.float64)

    def update(self, tap: Tap) -> None:
        if tap.logits_TE is None:
            raise UnsupportedModelError(f"layer {tap.layer}: its router returns no logits, which chosen_logits sums")
        if tap.classes is not None:
            raise UnsupportedModelError(f"layer {tap.layer}: its router scores other experts than there are (`remap`)")
        dispatch = Dispatch.of(tap.index_TK, tap.weight_TK, self.experts)
        chosen = tap.logits_TE[dispatch.token_R, dispatch.expert_R].double() * counted_rows(tap, dispatch)
        self.sums += _sum_rows(chosen, dispatch, self.experts).cpu()

    def result(self) -> Result:
        return {"sum": self.sums}


@dataclass(frozen=True)
class OutputNorms(Statistic):
    """Size of each expert's outputs f on the tokens routed to it.

    Result, each [E]: `norm` Σ‖f‖₂ (EAN); `gated_norm` Σ g‖f‖₂ (REAP, arXiv 2510.13999, once divided by the counts);
    `gated_norm_squared` Σ g²‖f‖₂²; `maximum` max |f| over tokens and channels (super experts, arXiv 2507.23279). Each
    token counts in the sums as much as it weighs, and in the maximum if it weighs anything.
    """

    name: ClassVar[str] = "output_norms"
    weighs_tokens: ClassVar[bool] = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _NormSums(block.num_experts)


class _NormSums(Accumulator):
    def __init__(self, experts: int):
        self.experts = experts
        self.sums = torch.zeros(3, experts, dtype=torch.float64)
        self.maximum = torch.zeros(experts, dtype=torch.float64)

    def update(self, tap: Tap) -> None:
        dispatch = tap.dispatch
        norm = torch.linalg.vector_norm(tap.output_RH, dim=-1, dtype=torch.float32).double()
        gated, counted = norm * dispatch.weight_R.double(), counted_rows(tap, dispatch)
        rows = [counted * r for r in (norm, gated, gated**2)]
        self.sums += torch.stack([_sum_rows(r, dispatch, self.experts) for r in rows]).cpu()
        largest = torch.linalg.vector_norm(tap.output_RH, ord=float("inf"), dim=-1).double() * (counted > 0)
        self.maximum.scatter_reduce_(0, dispatch.expert_R.cpu(), largest.cpu(), "amax")

    def result(self) -> Result:
        norm, gated, squared = self.sums
        return {"norm": norm, "gated_norm": gated, "gated_norm_squared": squared, "maximum": self.maximum}


@dataclass(frozen=True)
class OutputSimilarity(Statistic):
    """How alike the experts' outputs are on the same tokens, whether routed to them or not.

    Result: `similarity` [E, E] mean over tokens of cos(f_i(x), f_j(x)) (Sub-MoE, arXiv 2506.23266); `tokens` [] tokens
    used. Every expert runs on these tokens, E/K times the work of a forward, so only `sample` tokens per layer are
    taken, evenly from all batches, in chunks of `chunk` (memory: E·chunk·H·4 bytes).
    """

    name: ClassVar[str] = "output_similarity"
    sample: int = 1024
    chunk: int = 64

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _SimilaritySums(block.num_experts, self, tokens)


class _SimilaritySums(Accumulator):
    def __init__(self, experts: int, settings: OutputSimilarity, tokens: int):
        self.settings = settings
        self.expected = tokens
        self.similarity = torch.zeros(experts, experts, dtype=torch.float64)
        self.tokens = 0
        self.seen = 0

    def update(self, tap: Tap) -> None:
        count = tap.hidden_TH.shape[0]
        taken = evenly(self.seen, count, self.settings.sample, self.expected)
        self.seen += count
        for part in tap.hidden_TH[taken.to(tap.hidden_TH.device)].split(self.settings.chunk):
            unit = torch.nn.functional.normalize(all_outputs(tap, part).float(), dim=-1).transpose(0, 1)  # [t, E, H]
            self.similarity += torch.bmm(unit, unit.transpose(1, 2)).sum(dim=0).double().cpu()
            self.tokens += part.shape[0]

    def result(self) -> Result:
        return {"similarity": self.similarity / max(1, self.tokens), "tokens": torch.tensor(self.tokens)}


def evenly(seen: int, count: int, sample: int, tokens: int) -> Tensor:
    """Which of the next `count` tokens belong to a sample spread over all, whatever the batches: [count] booleans.

    Args:
        seen: tokens before these.
        count: tokens of this batch.
        sample: tokens that are taken in all.
        tokens: tokens of the whole sweep.
    """
    # Token t is taken where t·sample/tokens passes a whole number.
    share = torch.arange(seen, seen + count + 1) * min(sample, tokens)
    return torch.diff(share // tokens) > 0


def all_outputs(tap: Tap, hidden_TH: Tensor) -> Tensor:
    """Every expert on every given token: [E, T, H], in one grouped product per projection."""
    experts, tokens = tap.experts.num_experts, hidden_TH.shape[0]
    index = torch.arange(experts, device=hidden_TH.device).expand(tokens, experts)
    dispatch = Dispatch.of(index, torch.ones_like(index, dtype=hidden_TH.dtype), experts)
    activation = tap.experts.activations(hidden_TH[dispatch.token_R], dispatch)
    output = tap.experts.outputs(activation, dispatch)
    return output.view(experts, tokens, output.shape[-1])

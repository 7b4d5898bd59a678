"""What skipping experts at run time is calibrated on: weights by rank, and the error of leaving the smallest out.

Like calib/statistics.py: accumulators over taps. Letters: T tokens, K slots per token, S tokens of a sample, R rows
(token, expert), H hidden.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEBlock, Tap, hf, observe, offload
from moe_compress.model.dispatch import Dispatch
from moe_compress.model.rules import Capacity, Choice, executed, l1_norms, ranked

from .statistics import Accumulator, Result, Statistic, evenly


@dataclass(frozen=True)
class RankedWeights(Statistic):
    """The routing weights of a sample of tokens, evenly from all batches.

    Result: `weights` [S, K] float32, each token's from the largest down, 0 where no expert serves; `norms` [S] float32
    ‖x‖₁ of the experts' input. Memory: S·(K + 1)·4 bytes per layer.
    """

    name: ClassVar[str] = "ranked_weights"
    sample: int = 1 << 16

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _RankedSample(self.sample, tokens)


@dataclass(frozen=True)
class RankedImportance(RankedWeights):
    """What `RankedWeights` has, and `received` [S] float32: attention that tokens receive (model/attention.py).

    Raises UnsupportedModelError, while measuring, where the family doesn't let it be seen.
    """

    name: ClassVar[str] = "ranked_importance"
    reads_attention: ClassVar[bool] = True


class _RankedSample(Accumulator):
    def __init__(self, sample: int, tokens: int):
        self.sample, self.tokens, self.seen = sample, tokens, 0
        self.parts: dict[str, list[Tensor]] = {}

    def update(self, tap: Tap) -> None:
        count = len(tap.hidden_TH)
        taken = evenly(self.seen, count, self.sample, self.tokens).to(tap.hidden_TH.device)
        self.seen += count
        weight = tap.weight_TK * executed(tap.index_TK, tap.weight_TK, tap.experts.num_experts)
        self._keep("weights", ranked(weight[taken])[0].float())
        self._keep("norms", l1_norms(tap.hidden_TH[taken]))
        if tap.received_T is not None:
            self._keep("received", tap.received_T[taken].float())

    def _keep(self, name: str, part: Tensor) -> None:
        self.parts.setdefault(name, []).append(part.cpu())

    def result(self) -> Result:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}


def prefix_errors(dispatch: Dispatch, output_RH: Tensor, weight_TK: Tensor, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Squared error of a token's routed output with its k largest weights only, for every k.

    Args:
        dispatch, output_RH: of all slots.
        weight_TK: routing weights, 0 in slots that no expert serves.
        renormalize: as in `rules.dropped`.

    Returns:
        ‖y⁽ᵏ⁾ − y‖² [T, K], column k − 1 for k experts; ‖y‖² [T]. Both float64.
    """
    tokens, slots = weight_TK.shape
    row_TK = dispatch.row_R.new_full((tokens * slots,), -1)
    row_TK[dispatch.row_R] = torch.arange(len(dispatch.row_R), device=row_TK.device)
    value_TK, slot_TK = ranked(weight_TK)
    row_TK = row_TK.view(tokens, slots).gather(1, slot_TK)
    wide = output_RH if output_RH.dtype == torch.float64 else output_RH.float()
    padded_RH = torch.cat([wide, wide.new_zeros(1, wide.shape[1])])  # row −1: nobody
    value_TK = value_TK * (row_TK >= 0)
    whole = sum(padded_RH[row_TK[:, k]] * value_TK[:, k : k + 1] for k in range(slots))
    assert isinstance(whole, Tensor)
    total, running = value_TK.sum(-1), value_TK.cumsum(-1)
    partial, errors = torch.zeros_like(whole), []
    for k in range(slots):
        partial = partial + padded_RH[row_TK[:, k]] * value_TK[:, k : k + 1]
        scale = torch.where(running[:, k] != 0, total / running[:, k], 1.0) if renormalize else torch.ones_like(total)
        errors.append((partial * scale.unsqueeze(-1) - whole).square().sum(-1, dtype=torch.float64))
    errors[-1].zero_()  # all of them: the same sum
    return torch.stack(errors, dim=-1), whole.square().sum(-1, dtype=torch.float64)


@dataclass(frozen=True)
class TruncationError(Statistic):
    """What a layer's routed output loses with fewer experts per token.

    Result, each [K] float64, entry k − 1 for k experts: `error` Σ_t ‖y_t⁽ᵏ⁾ − y_t‖²; `relative` the same with every
    token's term divided by ‖h_t‖², h_t the hidden state behind the decoder layer, so that layers compare (not there
    where the layer returns nothing of one row per token). `energy` [] Σ_t ‖y_t‖². Each token counts what it weighs.
    """

    name: ClassVar[str] = "truncation_error"
    weighs_tokens: ClassVar[bool] = True
    renormalize: bool = True

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _TruncationSums(self.renormalize)


class _TruncationSums(Accumulator):
    def __init__(self, renormalize: bool):
        self.renormalize = renormalize
        self.sums: dict[str, Any] = {"error": 0.0, "relative": 0.0, "energy": 0.0}

    def update(self, tap: Tap) -> None:
        weight = tap.weight_TK * executed(tap.index_TK, tap.weight_TK, tap.experts.num_experts)
        errors, energy = prefix_errors(tap.dispatch, tap.output_RH, weight, self.renormalize)
        counted, inverse = tap.counted_T.cpu(), tap.inverse_residual_T
        self.sums["error"] = self.sums["error"] + counted @ errors.cpu()
        self.sums["energy"] = self.sums["energy"] + counted @ energy.cpu()
        if inverse is None:
            self.sums.pop("relative", None)
        elif "relative" in self.sums:
            self.sums["relative"] = self.sums["relative"] + (counted * inverse) @ errors.cpu()

    def result(self) -> Result:
        return {name: value for name, value in self.sums.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class RandomTruncation(Statistic):
    """`TruncationError` on standard normal inputs of the block, without any text (LExI, arXiv 2509.02753).

    Result: `error`, `energy` as there. Raises UnsupportedModelError, while measuring, where router and experts have no
    block of their own, or its router reads more than hidden states.
    """

    name: ClassVar[str] = "random_truncation"
    reads_text: ClassVar[bool] = False
    renormalize: bool = True
    tokens: int = 1024
    seed: int = 0

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _RandomTruncation(block, self)


class _RandomTruncation(Accumulator):
    def __init__(self, block: MoEBlock, settings: RandomTruncation):
        self.block, self.settings = block, settings

    def update(self, tap: Tap) -> None:
        """It sees no text."""

    def result(self) -> Result:
        block, settings = self.block, self.settings
        refusal = f"layer {block.layer}: its experts can't be asked about random inputs alone; measure on text"
        if block.parent is block.module:
            raise UnsupportedModelError(refusal)
        parameter = next(p for p in block.router.parameters() if p.dim() == 2)
        generator = torch.Generator().manual_seed(settings.seed)
        hidden = torch.randn(1, settings.tokens, parameter.shape[-1], generator=generator)
        sums = _TruncationSums(settings.renormalize)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(hf.implementation(block.module))  # type: ignore[arg-type]
            stack.enter_context(offload.runnable(block.module))
            stack.enter_context(observe(block, sums.update))
            try:
                block.parent(hidden.to(parameter.device, parameter.dtype))
            except (TypeError, RuntimeError) as error:
                raise UnsupportedModelError(f"{refusal} ({error})") from error
        return sums.result()


@dataclass(frozen=True)
class CapacityUse(Statistic):
    """What a limit per expert leaves, in the batches in which the text passes.

    Result: `tokens` [], `slots` [] that experts served before, `executed` [] that they serve under the limit, `moved`
    [] of these that another expert serves; `busiest` [2] mean over batches of the busiest expert's rows over the mean
    expert's, before and under the limit: what a step waits for where experts are spread over devices.
    """

    name: ClassVar[str] = "capacity_use"
    factor: float = 1.25
    overflow: str = "drop"
    tries: int = 4

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        return _CapacitySums(Capacity(self.factor, self.overflow, self.tries))


class _CapacitySums(Accumulator):
    def __init__(self, rule: Capacity):
        self.rule, self.batches = rule, 0
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.busiest = torch.zeros(2, dtype=torch.float64)

    def update(self, tap: Tap) -> None:
        if self.rule.reads_logits and tap.logits_TE is None:
            raise UnsupportedModelError(f"layer {tap.layer}: its router returns no logits: set `overflow: drop`")
        experts = tap.experts.num_experts
        before = executed(tap.index_TK, tap.weight_TK, experts)
        weight = tap.weight_TK * before
        index_TK, weight_TK = self.rule(Choice(tap.hidden_TH, tap.index_TK, weight, experts, tap.logits_TE))
        after = executed(index_TK, weight_TK, experts)
        moved = after & (index_TK != tap.index_TK)
        self.sums += torch.tensor([len(before), before.sum(), after.sum(), moved.sum()], dtype=torch.float64)
        loads = [
            torch.bincount(i[s], minlength=experts).double() for i, s in ((tap.index_TK, before), (index_TK, after))
        ]
        self.busiest += torch.tensor([float(load.max() / loads[0].mean().clamp_min(1e-30)) for load in loads])
        self.batches += 1

    def result(self) -> Result:
        tokens, slots, done, moved = self.sums
        busiest = self.busiest / max(1, self.batches)
        return {"tokens": tokens, "slots": slots, "executed": done, "moved": moved, "busiest": busiest}

"""The criterion `naee`: of all sets of experts that may stay, the one with which the block's output changes least.

Every set is tried with the model's own router over the experts that are left, so with the tokens' new choices and
weights. The number of sets grows as C(E, N): for few experts only.

Letters: S sets, T tokens, E experts, N experts that stay, H hidden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_compress.calib.statistics import Accumulator, Result, Statistic, all_outputs, evenly
from moe_compress.counts import ExpertCounts, Routed, kept_count
from moe_compress.errors import RecipeError, RunError
from moe_compress.model import MoEBlock, Tap
from moe_compress.model.rerouting import Rerouting, rows
from moe_compress.model.shape import LayerShape

from .criteria import Measured, Selection, criterion

# A set takes a few milliseconds on one core: all halves of 16 experts (12870) about a minute per layer. Of 24 there are
# 2.7 million.
MAX_SETS = 20_000
# Sets whose errors are computed at a time.
_SETS = 64
# The router, asked again: the same weights but for rounding, but for this share of the tokens.
_SAME, _TIES = 1e-3, 0.02


@dataclass(frozen=True)
class SetErrors(Statistic):
    """Error of the block's output for every set of experts that may stay, tokens routed anew among them.

    Result: `kept` [S, N] the sets, ascending; `error` [S] Σ_t ‖y_t − y_t(set)‖², y the output of the routed experts;
    `energy` [] Σ_t ‖y_t‖². Every expert runs on the sampled tokens; of their outputs only the inner products
    [T, E, E] are kept, in which the error of any new coefficients is a quadratic form.

    Attributes:
        keep, experts: how many stay, as in the pass's options.
        sample: tokens per layer, taken evenly from all batches.
        chunk: tokens that all experts run on at a time (memory: E·chunk·H·8 bytes).
    """

    name: ClassVar[str] = "set_errors"
    keep: float | None = None
    experts: int | None = None
    sample: int = 1024
    chunk: int = 64

    @classmethod
    def under(cls, options: ExpertCounts) -> SetErrors:
        """For the number of experts that a pass's options keep."""
        return cls(options.keep, options.experts)

    def start(self, block: MoEBlock, tokens: int) -> Accumulator:
        """See Statistic."""
        kept = kept_count("prune.experts", block.layer, block, ExpertCounts(keep=self.keep, experts=self.experts))
        if reason := too_many(block, kept):
            raise RecipeError(f"prune.experts: criterion 'naee': layer {block.layer} {reason}")
        return _SetErrors(self, block, tokens, kept)


class _SetErrors(Accumulator):
    """Keeps what the router reads and the experts' inner products; sets are tried at the end."""

    def __init__(self, settings: SetErrors, block: MoEBlock, tokens: int, kept: int):
        self.settings, self.block, self.tokens, self.kept = settings, block, tokens, kept
        self.seen = 0
        self.read: list[dict[str, Tensor]] = []
        self.coefficients: list[Tensor] = []
        self.grams: list[Tensor] = []

    def update(self, tap: Tap) -> None:
        count = len(tap.hidden_TH)
        taken = evenly(self.seen, count, self.settings.sample, self.tokens).to(tap.hidden_TH.device)
        self.seen += count
        if not taken.any():
            return
        self.read.append(rows(tap.router_arguments, count, taken))
        index, weight = tap.index_TK[taken], tap.weight_TK[taken].double()
        experts = self.block.num_experts
        served = weight * (index < experts)
        self.coefficients.append(
            weight.new_zeros(len(index), experts).scatter_add_(1, index.clamp_max(experts - 1), served)
        )
        for part in tap.hidden_TH[taken].split(self.settings.chunk):
            output_TEH = all_outputs(tap, part).double().transpose(0, 1)
            self.grams.append(torch.bmm(output_TEH, output_TEH.transpose(1, 2)))

    def result(self) -> Result:
        gram_TEE, before_TE = torch.cat(self.grams), torch.cat(self.coefficients)
        read = {name: torch.cat([part[name] for part in self.read]) for name in self.read[0]}
        rerouting = Rerouting(self.block)
        whole = list(range(self.block.num_experts))
        again_TE = rerouting.coefficients(whole, read)
        # A tie may fall the other way when tokens are joined to other batches; anything more is another routing.
        same_T = torch.isclose(again_TE, before_TE, rtol=_SAME, atol=_SAME).all(dim=1)
        if float(same_T.double().mean()) < 1 - _TIES:
            raise RunError(
                f"layer {self.block.layer}: its router, asked again about the same tokens, decides otherwise; "
                "the criterion naee can't be used on this family"
            )
        sets = list(admissible(self.block, self.kept))
        errors = []
        for first in range(0, len(sets), _SETS):
            changes = [rerouting.coefficients(list(kept), read) - before_TE for kept in sets[first : first + _SETS]]
            errors.append(_quadratic(gram_TEE, torch.stack(changes, dim=1)).cpu())
        return {
            "kept": torch.tensor(sets),
            "error": torch.cat(errors),
            "energy": _quadratic(gram_TEE, before_TE.unsqueeze(1))[0].cpu(),
        }


def _quadratic(gram_TEE: Tensor, change_TSE: Tensor) -> Tensor:
    """Σ_t of each set's change in coefficients, squared in the metric of the outputs: [S]."""
    return (torch.bmm(change_TSE, gram_TEE) * change_TSE).sum(dim=(0, 2))


def admissible(layer: Routed, kept: int) -> Iterator[tuple[int, ...]]:
    """Every set of `kept` experts, the same number of each routing group, ascending."""
    groups = layer.groups[0] if layer.groups else 1
    size = layer.num_experts // groups
    own = [itertools.combinations(range(g * size, (g + 1) * size), kept // groups) for g in range(groups)]
    for parts in itertools.product(*own):
        yield tuple(itertools.chain.from_iterable(parts))


def too_many(layer: Routed, kept: int) -> str | None:
    """Why not every set can be tried, or None."""
    groups = layer.groups[0] if layer.groups else 1
    count = math.comb(layer.num_experts // groups, kept // groups) ** groups
    if count <= MAX_SETS:
        return None
    return (
        f"has {count} sets of {kept} of its {layer.num_experts} experts, and at most {MAX_SETS} are tried; the "
        "criterion gram_greedy looks for a good one among any number"
    )


def _problem(layer: LayerShape, kept: int) -> str | None:
    return too_many(layer, kept)


@criterion(
    "naee",
    "NAEE (arXiv 2402.14800), layer-wise reconstruction: of all sets of experts the one with the least ‖Y − Y(set)‖_F, "
    "tokens routed anew by the model's own router; for few experts",
    SetErrors.under,
    ranks=False,
    problem=_problem,
)
def naee(measured: Measured, asked: Selection) -> Tensor:
    """The least error, relative to the output's energy, of any set without the expert that keeps the protected.

    The experts that the best set lacks share the lowest score, the best set's error; all others score more.
    """
    result: dict[str, Any] = measured["set_errors"]
    stays_SE = torch.zeros(len(result["kept"]), asked.layer.num_experts, dtype=torch.bool)
    stays_SE.scatter_(1, result["kept"], True)
    allowed = stays_SE[:, list(asked.protected)].all(dim=1)
    stays_SE, error = stays_SE[allowed], result["error"][allowed]
    if not len(error):  # more are protected than stay: the pass says so
        return torch.zeros(asked.layer.num_experts, dtype=torch.float64)
    best = int(error.argmin())
    error = error / result["energy"].clamp_min(1e-300)
    score = error.unsqueeze(1).masked_fill(stays_SE, float("inf")).amin(dim=0)
    # An expert that every set keeps has no such error: above all others. The best set's own rank above what it lacks.
    score = torch.where(score.isfinite(), score, error.max() + 1)
    lowest = torch.nextafter(error[best], torch.tensor(-math.inf, dtype=error.dtype))
    return torch.where(stays_SE[best], score, lowest)

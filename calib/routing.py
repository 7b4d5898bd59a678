"""How routing changes: of one block on the very inputs that it was calibrated with, and of a whole model on its own.

Letters: T tokens, K experts per token, E experts of the original, C classes that a router scores (experts, and in a few
families a class for no expert, or shared experts, behind them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_compress.model import Tap
from moe_compress.model.rules import executed

from .inputs import BlockInputs
from .statistics import evenly


class RoutingChange:
    """Compares the routing of a changed block with what it was, on the same inputs in the same order.

    Args:
        before: what the block read and how it routed before the change.
        slots: for each expert before, its slot after the change, -1 if it is gone; None if experts kept their numbers.
    """

    def __init__(self, before: BlockInputs, slots: Sequence[int] | None):
        self._index_TK, self._weight_TK = before.index_TK, before.weight_TK
        self._slots = None if slots is None else torch.tensor(list(slots))
        self._experts = len(slots) if slots is not None else 1 << 62
        self._seen = 0
        self._kept_choices = 0
        self._choices = 0
        self._kept_weight = 0.0
        self._weight = 0.0

    def observe(self, tap: Tap) -> None:
        """Take one batch after the change into account."""
        rows = slice(self._seen, self._seen + tap.hidden_TH.shape[0])
        self._seen = rows.stop
        # Zero weights and indices beyond the last expert are slots that nobody serves: no choices (see Dispatch.of).
        before, weight = self._index_TK[rows], self._weight_TK[rows].double()
        served = (weight != 0) & (before < self._experts)
        if self._slots is not None:
            before = self._slots.to(before.device)[before.clamp_max(self._experts - 1)]
        after = tap.index_TK.masked_fill(tap.weight_TK == 0, -2)
        hit_TK = (before.unsqueeze(-1) == after.unsqueeze(1)).any(-1) & (before >= 0) & served
        self._choices += int(served.sum())
        self._kept_choices += int(hit_TK.sum())
        self._weight += float(weight[served].sum())
        self._kept_weight += float(weight[hit_TK].sum())

    def result(self) -> dict[str, Any]:
        """`kept_choices`: share of the former choices that are still made (in their new slots); `kept_weight`: of the
        routing weight that they had."""
        return {
            "kept_choices": self._kept_choices / max(1, self._choices),
            "kept_weight": self._kept_weight / self._weight if self._weight else 0.0,
        }


def distribution(logits_TC: Tensor) -> Tensor:
    """What a router's output says of its classes, as probabilities [T, C] in float32 at least.

    The softmax of its logits, whatever the family makes of them to choose; a few routers return probabilities already.
    """
    values = logits_TC if logits_TC.dtype == torch.float64 else logits_TC.float()
    sums = values.detach().sum(-1)
    if bool((values.detach() >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
        return values / values.sum(-1, keepdim=True)
    return values.softmax(-1)


def carried(before_TC: Tensor, slots: Sequence[int], classes: int) -> Tensor:
    """A distribution over former experts as one over their slots: [T, C] → [T, classes].

    Experts that were merged add up; the share of those that are gone falls to the others in proportion. Classes behind
    the experts keep their order.
    """
    experts, kept = len(slots), max(slots) + 1
    behind = range(kept, kept + before_TC.shape[1] - experts)
    target = torch.tensor([*slots, *behind], device=before_TC.device)
    stays = target >= 0
    after = before_TC.new_zeros(len(before_TC), classes).index_add_(1, target[stays], before_TC[:, stays])
    return after / after.sum(-1, keepdim=True).clamp_min(torch.finfo(after.dtype).tiny)


def chances(tap: Tap) -> Tensor:
    """`distribution` of what a tap's router said, over experts: of classes that mean one expert, the sum; [T, C]."""
    assert tap.logits_TE is not None, "this router returns no logits"
    found = distribution(tap.logits_TE)
    if tap.classes is None:
        return found
    return carried(found, tap.classes, found.shape[1] - len(tap.classes) + max(tap.classes) + 1)


def router_divergence(before_TC: Tensor, after_TC: Tensor) -> Tensor:
    """KL(before ‖ after) of each token, nats, [T]. Arguments are probabilities."""
    log = (after_TC.clamp_min(torch.finfo(after_TC.dtype).tiny)).log()
    terms = torch.where(before_TC > 0, before_TC * (before_TC.clamp_min(1e-38).log() - log), 0.0)
    return terms.sum(-1)


class RoutingLog:
    """What a model's routers say of a sample of its tokens, layer by layer, and how many experts all tokens use.

    Give `observe` to every step of a sweep.

    Args:
        tokens: of the sweep.
        sample: tokens that are kept, evenly from all batches; memory: sample · C · 4 bytes per layer.
    """

    def __init__(self, tokens: int, sample: int = 4096):
        self._tokens, self._sample = tokens, sample
        self._seen: dict[int, int] = {}
        self.layers: dict[int, list[Tap]] = {}
        self.experts: dict[int, int] = {}  # as many as there were then: a model in memory changes
        self._executed: dict[int, int] = {}

    def experts_per_token(self) -> dict[str, Any]:
        """Experts that served a token, mean over all tokens seen: `layers` (number → value) and their `mean`."""
        layers = {i: self._executed[i] / seen for i, seen in self._seen.items() if seen}
        return {
            "mean": sum(layers.values()) / max(1, len(layers)),
            "layers": {str(layer): value for layer, value in sorted(layers.items())},
        }

    def observe(self, tap: Tap) -> None:
        """Keep a sample of one batch."""
        seen, count = self._seen.get(tap.layer, 0), len(tap.hidden_TH)
        self._seen[tap.layer], self.experts[tap.layer] = seen + count, tap.experts.num_experts
        used = int(executed(tap.index_TK, tap.weight_TK, tap.experts.num_experts).sum())
        self._executed[tap.layer] = self._executed.get(tap.layer, 0) + used
        taken = evenly(seen, count, self._sample, self._tokens).to(tap.hidden_TH.device)
        logits = None if tap.logits_TE is None else tap.logits_TE[taken].cpu()
        index, weight, nothing = tap.index_TK[taken].cpu(), tap.weight_TK[taken].cpu(), tap.hidden_TH[taken, :0].cpu()
        self.layers.setdefault(tap.layer, []).append(
            Tap(tap.layer, tap.experts, nothing, index, weight, nothing, logits, classes=tap.classes)
        )


def routing_drift(
    before: RoutingLog, after: RoutingLog, slots: Mapping[int, Sequence[int]] | None = None
) -> dict[int, dict[str, float]]:
    """How far each layer's routing has moved from the original's, both models reading the same text on their own.

    Args:
        before, after: logs of sweeps over the same batches.
        slots: layer → slot of each original expert, −1 if it is gone; None if experts kept their numbers.

    Returns:
        Layer → `kl`: mean KL(original router's distribution, carried to the slots ‖ this router's), nats (absent where
        the router returns no logits); `agreement`: share of the original's choices that are still made. Layers whose
        numbers of experts differ, while nothing says which went where, are left out.
    """
    found = {}
    for layer, taps in before.layers.items():
        later, experts = after.layers[layer], before.experts[layer]
        own = None if slots is None else slots[layer]
        if own is None and after.experts[layer] != experts:
            continue
        inputs = BlockInputs()
        for tap in taps:
            inputs.observe(tap)
        change = RoutingChange(inputs, own)
        total, tokens = 0.0, 0
        for tap, other in zip(taps, later, strict=True):
            change.observe(other)
            if tap.logits_TE is not None and other.logits_TE is not None:
                q = chances(other)
                p = carried(chances(tap), own or list(range(experts)), q.shape[1]).to(q.dtype)
                total += float(router_divergence(p, q).sum(dtype=torch.float64))
                tokens += len(q)
        found[layer] = {"agreement": change.result()["kept_choices"]}
        if tokens:
            found[layer]["kl"] = max(0.0, total / tokens)
    return found

"""What may stand between a router and its experts: rules that turn a token's choice into another.

Rules know no family: they see the experts' input and what the router chose, index and weight of each slot as the model
itself uses them. Slots that no expert serves have weight 0 (`Dispatch.of`). routes.py puts rules in their place.

Letters: T tokens of a forward, K slots per token, E experts, H hidden size of the experts, C classes of the router.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from moe_compress.errors import CheckpointError


class Choice(NamedTuple):
    """What a rule reads.

    Attributes:
        hidden_TH: input of the experts.
        index_TK, weight_TK: experts and weights; 0 in slots that nobody serves.
        experts: how many experts there are.
        logits_TC: what the router returned as its logits; only for rules that say `reads_logits`.
        received_T: attention that each token received in this layer (attention.py); only for `reads_attention`.
    """

    hidden_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    experts: int
    logits_TC: Tensor | None = None
    received_T: Tensor | None = None


class RouteRule(nn.Module):
    """One rule. Its constructor's arguments are its description (JSON values), under the same names.

    Attributes:
        kind: its name in descriptions.
        reads_logits: whether it needs the router's logits.
        reads_attention: whether it needs the attention that tokens receive.
        by_expert: whether it names experts of the router's numbering, also beyond those that are there.
    """

    kind: ClassVar[str]
    reads_logits = False
    reads_attention = False
    by_expert = False

    def describe(self) -> dict[str, Any]:
        """JSON from which `make_rule` makes it again, parameters apart."""
        names = [n for n in inspect.signature(type(self).__init__).parameters if n != "self"]
        return {"kind": self.kind, **{name: getattr(self, name) for name in names}}

    def forward(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """Index and weight [T, K] after the rule, in the dtypes that came."""
        raise TypeError(f"{type(self).__name__} has no rule")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:  # parameters keep their dtype, whatever the model runs in
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)
        return self


def ranked(weight_TK: Tensor) -> tuple[Tensor, Tensor]:
    """A token's weights from the largest down, float32 (float64 stays), and the slot that each is from; [T, K] both."""
    values = weight_TK if weight_TK.dtype == torch.float64 else weight_TK.float()
    found = values.sort(dim=-1, descending=True, stable=True)
    return found.values, found.indices


def executed(index_TK: Tensor, weight_TK: Tensor, experts: int) -> Tensor:
    """Slots that an expert serves: [T, K] booleans."""
    return (weight_TK != 0) & (index_TK < experts)


def dropped(weight_TK: Tensor, keep_TK: Tensor, renormalize: bool) -> Tensor:
    """Weights with 0 where `keep_TK` is false.

    Renormalized, a token's weights sum up to what they did before. So a family's scaling factor stays in them, and a
    router whose weights never summed up to 1 keeps the sum that this token had.
    """
    kept = weight_TK * keep_TK
    if not renormalize:
        return kept
    wide = torch.float64 if weight_TK.dtype == torch.float64 else torch.float32
    before, after = (w.sum(-1, keepdim=True, dtype=wide) for w in (weight_TK, kept))
    return (kept.to(wide) * torch.where(after != 0, before / after, 1.0)).to(weight_TK.dtype)


def prefix_slots(slot_TK: Tensor, kept_T: Tensor) -> Tensor:
    """Slots of each token's `kept_T` largest weights, [T, K] booleans; `slot_TK` as `ranked` gives it."""
    inside = torch.arange(slot_TK.shape[1], device=slot_TK.device) < kept_T.unsqueeze(-1)
    return torch.zeros_like(inside).scatter(1, slot_TK, inside)


class TopK(RouteRule):
    """The `keep` largest weights of each token."""

    kind = "top_k"

    def __init__(self, keep: int, renormalize: bool = True):
        super().__init__()
        self.keep, self.renormalize = keep, renormalize

    def forward(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """See RouteRule."""
        _, slot = ranked(choice.weight_TK)
        kept = slot.new_full((len(slot),), self.keep)
        return choice.index_TK, dropped(choice.weight_TK, prefix_slots(slot, kept), self.renormalize)


class Ratio(RouteRule):
    """Weights of at least `threshold` times the token's largest (NAEE, arXiv 2402.14800; for any K).

    Tokens whose importance is at least `protect` keep all (ODP, arXiv 2410.06270): the L1 norm of their input; with
    `protect_by: attention` times the attention that they receive, so that in a forward of one token none is protected.
    """

    kind = "ratio"

    def __init__(
        self, threshold: float, protect: float | None = None, renormalize: bool = True, protect_by: str = "norm"
    ):
        super().__init__()
        if protect_by not in ("norm", "attention"):
            raise ValueError(f"`protect_by` is {protect_by!r}, neither 'norm' nor 'attention'")
        self.threshold, self.protect, self.renormalize = threshold, protect, renormalize
        self.protect_by = protect_by
        self.reads_attention = protect is not None and protect_by == "attention"

    def forward(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """See RouteRule."""
        weight, slot = ranked(choice.weight_TK)
        keep = ratios(weight) >= self.threshold
        keep[:, 0] = True
        if self.protect is not None:
            received_T = choice.received_T if self.reads_attention else None
            keep |= (importances(l1_norms(choice.hidden_TH), received_T) >= self.protect).unsqueeze(-1)
        kept_TK = torch.zeros_like(keep).scatter(1, slot, keep)
        return choice.index_TK, dropped(choice.weight_TK, kept_TK, self.renormalize)


def importances(norm_T: Tensor, received_T: Tensor | None) -> Tensor:
    """ODP's importance of tokens (Eq. 6), float32: ‖x‖₁ times the attention that they receive, where it is given."""
    return norm_T.float() if received_T is None else norm_T.float() * received_T.to(norm_T.device).float()


def ratios(ranked_TK: Tensor) -> Tensor:
    """Each weight over the token's largest; 0 where that is 0."""
    largest = ranked_TK[:, :1]
    return torch.where(largest > 0, ranked_TK / largest, 0.0)


def l1_norms(hidden_TH: Tensor) -> Tensor:
    """‖x‖₁ of each token, float32."""
    return hidden_TH.abs().sum(-1, dtype=torch.float32)


class TopP(RouteRule):
    """The fewest largest weights whose share of the token's sum reaches `share` (Dynamic_MoE, arXiv 2403.07652).

    The share is of what the router chose, not of all experts: with many experts even the whole choice has little of the
    latter.
    """

    kind = "top_p"

    def __init__(self, share: float, renormalize: bool = True):
        super().__init__()
        self.share, self.renormalize = share, renormalize

    def forward(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """See RouteRule."""
        weight, slot = ranked(choice.weight_TK)
        keep = shares_before(weight) < self.share
        keep[:, 0] = True
        kept_TK = torch.zeros_like(keep).scatter(1, slot, keep)
        return choice.index_TK, dropped(choice.weight_TK, kept_TK, self.renormalize)


def shares_before(ranked_TK: Tensor) -> Tensor:
    """Share of a token's sum that lies in front of each weight, 0 for the largest; 1 behind it where the sum is 0."""
    total = ranked_TK.sum(-1, keepdim=True)
    before = ranked_TK.cumsum(-1) - ranked_TK
    share = torch.where(total > 0, before / total, 1.0)
    share[:, 0] = 0.0
    return share


class Learned(RouteRule):
    """As many of the largest weights as a small router says (OTP in MC#, arXiv 2510.10962).

    Parameters, float32: `weight` [K, H + K], `bias` [K]. Row c scores keeping the c + 1 largest; it reads the experts'
    input divided by its root mean square, and the token's weights from the largest down as shares of their sum.
    """

    kind = "learned"

    def __init__(self, hidden: int, slots: int, renormalize: bool = True):
        super().__init__()
        self.hidden, self.slots, self.renormalize = hidden, slots, renormalize
        # Said, because transformers builds a model under the default dtype that it is loaded in.
        like: Any = {"device": "meta", "dtype": torch.float32}
        self.weight = nn.Parameter(torch.empty(slots, hidden + slots, **like), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(slots, **like), requires_grad=False)

    def forward(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """See RouteRule."""
        weight, slot = ranked(choice.weight_TK)
        scores = nn.functional.linear(learned_features(choice.hidden_TH, weight), self.weight, self.bias)
        return choice.index_TK, dropped(choice.weight_TK, prefix_slots(slot, scores.argmax(-1) + 1), self.renormalize)


def learned_features(hidden_TH: Tensor, ranked_TK: Tensor) -> Tensor:
    """What the small router reads: [T, H + K] float32."""
    hidden = hidden_TH.float()
    unit = hidden * hidden.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
    weight = ranked_TK.float()
    total = weight.sum(-1, keepdim=True)
    return torch.cat([unit, torch.where(total > 0, weight / total, 0.0)], dim=-1)


class Capacity(RouteRule):
    """At most ⌈factor · K · T / E⌉ tokens of a forward per expert (Capacity-Aware Inference, arXiv 2503.05066).

    An expert with more keeps those that give it the largest weights. What is over is dropped, or with `overflow:
    reroute` asks the experts that the token doesn't use, at most `tries` of them, from the one that the router scores
    highest down, for room (largest weights first), and takes its weight there; else it is dropped. A forward of
    one token is left alone.
    """

    kind = "capacity"

    def __init__(self, factor: float, overflow: str = "drop", tries: int = 4, renormalize: bool = False):
        super().__init__()
        self.factor, self.overflow, self.tries, self.renormalize = factor, overflow, tries, renormalize
        self.reads_logits = overflow == "reroute"

    def forward(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """See RouteRule."""
        index, weight, experts = choice.index_TK, choice.weight_TK, choice.experts
        tokens, slots = index.shape
        if tokens <= 1:
            return index, weight
        limit = capacity(self.factor, tokens, slots, experts)
        served = executed(index, weight, experts)
        within = _first_of_each(index.reshape(-1), weight.reshape(-1), served.reshape(-1), experts, limit)
        keep = within.view_as(served)
        if self.reads_logits:
            index, keep = self._rerouted(choice, served, keep, limit)
        return index, dropped(weight, keep, self.renormalize)

    def _rerouted(self, choice: Choice, served: Tensor, keep: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        logits, experts = choice.logits_TC, choice.experts
        assert logits is not None, "the router's logits were not handed on"
        index, keep = choice.index_TK.clone(), keep.clone()
        order_TE = logits[:, :experts].sort(dim=-1, descending=True, stable=True).indices
        # What a token uses, the dropped ones included: it isn't sent back where there was no room.
        used_TE = torch.zeros_like(order_TE, dtype=torch.bool)
        used_TE.scatter_(1, index.clamp_max(experts - 1), served)
        load_E = torch.bincount(index[keep], minlength=experts)[:experts]
        homeless = served & ~keep
        for slot in range(index.shape[1]):
            waiting_T = homeless[:, slot].clone()
            for _ in range(self.tries):
                free = ~used_TE.gather(1, order_TE)
                wanted_T = order_TE.gather(1, free.int().argmax(-1, keepdim=True)).squeeze(1)
                asking_T = waiting_T & free.any(-1)
                room_E = (limit - load_E).clamp_min(0)
                got_T = _first_of_each(wanted_T, choice.weight_TK[:, slot], asking_T, experts, room_E)
                used_TE[asking_T.nonzero().flatten(), wanted_T[asking_T]] = True
                index[:, slot] = torch.where(got_T, wanted_T.to(index.dtype), index[:, slot])
                keep[:, slot] |= got_T
                load_E = load_E + torch.bincount(wanted_T[got_T], minlength=experts)
                waiting_T &= ~got_T
        return index, keep


def capacity(factor: float, tokens: int, slots: int, experts: int) -> int:
    """Tokens that one expert serves at most in a forward: ⌈factor · K · T / E⌉."""
    return int(-(-(factor * slots * tokens) // experts))


def _first_of_each(expert_N: Tensor, weight_N: Tensor, wanted_N: Tensor, experts: int, limit: int | Tensor) -> Tensor:
    """Of the wanted rows of each expert, those with its `limit` (one, or one each) largest weights: [N] booleans."""
    expert = torch.where(wanted_N, expert_N.long(), experts)
    order = weight_N.argsort(descending=True, stable=True)
    order = order[expert[order].argsort(stable=True)]
    counts = torch.bincount(expert, minlength=experts + 1)
    place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[expert[order]]
    limits = torch.as_tensor(limit, device=order.device).expand(experts)
    inside = place < torch.cat([limits, limits.new_zeros(1)])[expert[order]]
    return torch.zeros_like(wanted_N).scatter(0, order, inside)


class Remap(RouteRule):
    """The router's class c means expert `experts[c]`, −1 for none; weights that a token gives to one expert add up.

    For routers that go on choosing among experts that were merged. Classes behind the list are served by nobody.
    """

    kind = "remap"
    by_expert = True

    def __init__(self, experts: Sequence[int]):
        super().__init__()
        self.experts = [int(e) for e in experts]
        self._table: Tensor | None = None

    def forward(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """See RouteRule."""
        if self._table is None or self._table.device != choice.index_TK.device:
            self._table = torch.tensor([*self.experts, -1], device=choice.index_TK.device)
        expert_TK = self._table[choice.index_TK.long().clamp_max(len(self.experts))]
        weight = choice.weight_TK.masked_fill((expert_TK < 0) | (choice.weight_TK == 0), 0)
        same_TKK = (expert_TK.unsqueeze(1) == expert_TK.unsqueeze(2)) & (weight != 0).unsqueeze(1)
        summed = (same_TKK * weight.unsqueeze(1)).sum(-1)
        first_TK = same_TKK.int().argmax(-1) == torch.arange(expert_TK.shape[1], device=expert_TK.device)
        summed = summed.masked_fill(~first_TK | (weight == 0), 0)
        return expert_TK.clamp_min(0).to(choice.index_TK.dtype), summed


RULES: dict[str, type[RouteRule]] = {rule.kind: rule for rule in (TopK, Ratio, TopP, Learned, Capacity, Remap)}


def make_rule(description: Mapping[str, Any]) -> RouteRule:
    """The rule that `describe` described, its parameters on the meta device.

    Raises CheckpointError for a kind that nothing here knows, or settings that it doesn't have.
    """
    values = dict(description)
    kind = values.pop("kind", None)
    if kind not in RULES:
        raise CheckpointError(f"routing rules of kind {kind!r} aren't known: the checkpoint needs a newer moe-compress")
    try:
        return RULES[kind](**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"a routing rule of kind {kind!r} has other settings: {error}") from error

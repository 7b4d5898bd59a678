"""Teaching the experts of one layer, as they are now, to put out together what the original's put out.

Contract: `distil` changes the experts' matrices in place, as they will be stored, and only if that lowers the error on
tokens that are held out; it says what the error was and is. The loss is the squared error of the experts' output,
relative to the square of what is wanted; routing stays. AdamW in float32, its step relative to each matrix's own size,
going down linearly to nothing.

Memory beside the live layer: 24 bytes per weight of the experts that are trained together. These are all, or where that
is more than `memory_limit` as many as fit: then one part after another, the others as they are by then.

Letters: T tokens, K experts per token, E experts, C experts of a part, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from moe_compress.calib.inputs import chunks
from moe_compress.model import ExpertWeights, FusedExperts
from moe_compress.model.dispatch import Dispatch

_BYTES = 24  # per trained weight: itself, gradient, two averages, the best so far, as it would be stored
_TOKENS_AT_ONCE = 4096  # where nothing is trained


class Teaching(Protocol):
    """What `distil` asks of a pass's options (see experts.py)."""

    @property
    def epochs(self) -> int:
        """Times that the tokens are gone through."""

    @property
    def rate(self) -> float:
        """AdamW's step, relative."""

    @property
    def weight_decay(self) -> float:
        """AdamW's."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step."""

    @property
    def seed(self) -> int:
        """Order of the tokens."""


@dataclass(frozen=True)
class Wanted:
    """What the experts read and are to put out.

    Attributes:
        hidden_TH, index_TK, weight_TK: their inputs and routing.
        target_TH: what they should put out together.
        counted_T: what each token counts.
    """

    hidden_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    target_TH: Tensor
    counted_T: Tensor

    def chosen(self, token_N: Tensor) -> Wanted:
        """Some of the tokens."""
        return Wanted(*(value[token_N] for value in vars(self).values()))

    def of(self, part: range) -> Wanted:
        """The same for a part of the experts, numbered from 0: what others serve has weight 0."""
        inside = (self.index_TK >= part.start) & (self.index_TK < part.stop)
        index_TK = torch.where(inside, self.index_TK - part.start, 0)
        return replace(self, index_TK=index_TK, weight_TK=torch.where(inside, self.weight_TK, 0))

    def output(self, experts: FusedExperts, weights: ExpertWeights) -> Tensor:
        """What experts with these weights put out together, [T, H]."""
        dispatch = Dispatch.of(self.index_TK, self.weight_TK, weights.up.shape[0])
        input_RH = self.hidden_TH[dispatch.token_R].to(weights.up.dtype)
        return dispatch.combine(experts.with_weights(weights, input_RH, dispatch)[1])

    def squared_error(self, experts: FusedExperts, weights: ExpertWeights) -> float:
        """Σ_t counted_t · ‖output_t − target_t‖², some tokens at a time."""
        total = 0.0
        for token_N in torch.arange(len(self.hidden_TH), device=self.hidden_TH.device).split(_TOKENS_AT_ONCE):
            some = self.chosen(token_N)
            wrong_TH = some.output(experts, weights).float() - some.target_TH.float()
            total += float((wrong_TH.square().sum(-1, dtype=torch.float64) * some.counted_T).sum())
        return total

    def size(self) -> float:
        """Σ_t counted_t · ‖target_t‖²."""
        return float((self.target_TH.float().square().sum(-1, dtype=torch.float64) * self.counted_T).sum())


@dataclass(frozen=True)
class Distilled:
    """What became of a layer: errors relative to what was wanted, before and after.

    Attributes:
        held: on tokens that are held out. taught: on those that it learned from.
        kept: whether anything was learned that holds on the former.
        moved_E: ‖W − W₀‖ / ‖W₀‖ of each expert, all its matrices together.
    """

    held: tuple[float, float]
    taught: tuple[float, float]
    kept: bool
    moved_E: list[float]


def distil(
    experts: FusedExperts,
    wanted: Wanted,
    held_T: Tensor,
    zeros: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    options: Teaching,
    projections: Sequence[str],
    memory_limit: int = 4 << 30,
) -> Distilled:
    """Train the named projections of a layer's experts, in place.

    Args:
        experts: dense ones.
        wanted: all tokens.
        held_T: booleans: those that judge.
        zeros: projection → where its weights stay zero, [E, O, K] booleans; for those where they do.
        dtypes: projection → dtype in which it will be stored.
        options: see Teaching.
        projections: which.
        memory_limit: see the file's head.
    """
    weights = experts.weights()
    places = [held_T.nonzero().flatten(), (~held_T).nonzero().flatten()]
    held, taught = (wanted.chosen(p) for p in places)
    # Once for all: what counts is float32, whatever the layer computes in.
    sizes = [max(w.size(), 1e-30) for w in (held, taught)]
    first = [w.squared_error(experts, weights) / s for w, s in zip((held, taught), sizes, strict=True)]
    per_expert = _BYTES * sum(getattr(weights, name)[0].numel() for name in projections)
    moved_E = [0.0] * experts.num_experts
    kept = False
    if first[0] > 0 and sizes[1] > 1e-30:
        for part in chunks([per_expert] * experts.num_experts, memory_limit):
            found = _part(experts, part, taught, held, zeros, dtypes, options, projections)
            if found is not None:
                kept, moved_E[part.start : part.stop] = True, found
    last = [w.squared_error(experts, weights) / s for w, s in zip((held, taught), sizes, strict=True)]
    return Distilled((first[0], last[0]), (first[1], last[1]), kept, moved_E)


def _part(
    experts: FusedExperts,
    part: range,
    taught: Wanted,
    held: Wanted,
    zeros: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    options: Teaching,
    projections: Sequence[str],
) -> list[float] | None:
    """Train some experts, all others as they are; how far each moved, or None where held-out tokens don't gain."""
    live = experts.weights().part(part)
    taught, held = (_left_to(experts, part, w) for w in (taught, held))
    reached = (taught.weight_TK != 0).any(-1)
    taught = taught.chosen(reached.nonzero().flatten())
    if not len(taught.hidden_TH):
        return None
    fixed = live.map(lambda value: value.float().contiguous())
    masters = {n: getattr(fixed, n).clone().requires_grad_() for n in projections}
    stays = {n: ~zeros[n][part.start : part.stop] for n in projections if n in zeros}
    groups = [{"params": [m], "size": float(m.detach().square().mean().sqrt())} for m in masters.values()]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=options.weight_decay, foreach=False)
    unit = taught.size() / max(float(taught.counted_T.sum()), 1e-30)
    order = torch.Generator().manual_seed(options.seed)
    count = len(taught.hidden_TH)
    steps = options.epochs * -(-count // options.tokens_per_step)
    done = 0
    best = held.squared_error(experts, fixed)
    found: dict[str, Tensor] | None = None
    for _ in range(options.epochs):
        for token_N in torch.randperm(count, generator=order).split(options.tokens_per_step):
            for group in optimizer.param_groups:
                group["lr"] = options.rate * group["size"] * (1 - done / steps)
            _learn(experts, replace(fixed, **masters), taught.chosen(token_N.to(reached.device)), unit, masters, stays)
            optimizer.step()
            done += 1
        stored = {n: m.detach().to(dtypes[n]) for n, m in masters.items()}
        now = held.squared_error(experts, replace(fixed, **{n: v.float() for n, v in stored.items()}))
        if now < best:
            best, found = now, stored
    if found is None:
        return None
    size_C = sum(value.double().square().sum(dim=(1, 2)) for _, value in live.matrices())
    change_C = sum((value.double() - getattr(fixed, n)).square().sum(dim=(1, 2)) for n, value in found.items())
    for name, value in found.items():
        getattr(live, name).copy_(value)
    return torch.as_tensor(change_C / size_C).sqrt().tolist()


def _learn(
    experts: FusedExperts,
    weights: ExpertWeights,
    some: Wanted,
    unit: float,
    masters: Mapping[str, Tensor],
    stays: Mapping[str, Tensor],
) -> None:
    """Gradients of the relative error on some tokens; weights that stay zero get none."""
    with torch.enable_grad():
        wrong_T = (some.output(experts, weights) - some.target_TH.float()).square().sum(-1)
        counted_T = some.counted_T.float()
        loss = (wrong_T * counted_T).sum() / (counted_T.sum().clamp_min(1e-30) * unit)
        found = torch.autograd.grad(loss, list(masters.values()))
    for (name, master), gradient in zip(masters.items(), found, strict=True):
        master.grad = gradient.mul_(stays[name]) if name in stays else gradient


def _left_to(experts: FusedExperts, part: range, wanted: Wanted) -> Wanted:
    """What a part of the experts is to put out, given what the others do."""
    if len(part) == experts.num_experts:
        return wanted
    weights, targets = experts.weights(), []
    for token_N in torch.arange(len(wanted.hidden_TH), device=wanted.hidden_TH.device).split(_TOKENS_AT_ONCE):
        some = wanted.chosen(token_N)
        others = some.output(experts, weights) - some.of(part).output(experts, weights.part(part))
        targets.append(some.target_TH.float() - others.float())
    return replace(wanted.of(part), target_TH=torch.cat(targets))

"""Calibration text that the model writes itself, so that its experts are served evenly (EBSS of MoEQuant, 2505.03804).

A beam search writes each sequence. Every beam proposes `width` tokens drawn from the model's own distribution, all
proposals run, and the `width` candidates of least cost stay. The cost is that of the whole text so far, multiplied by
its n tokens: λ·Σ -log p of the sequence + n·σ/τ, with σ the standard deviation of the experts' loads beside their
layer's mean, averaged over layers, and the loads those of everything written, the other sequences' best beams
included. With λ = 1 that is the paper's perplexity · exp(σ/τ), in a form in which what a token adds doesn't fade as the
text grows: λ times its -log p, and 1/τ times the mean standardised load of the experts that it visits.

The promise: the same model, tokenizer, settings and seed write the same text; what is finished is kept, in groups of
`parallel` sequences that are written side by side. A model in memory reuses its keys and values; one on disk is swept
once per token.

Letters: B sequences of a group, W beams, w proposals of each, C candidates, R rows of a forward, t tokens so far,
V vocabulary, M = Σ E over all layers with experts E.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEModel, Tap, hf
from moe_compress.model.sweep import Sweep
from moe_compress.model.tap import observe
from moe_compress.progress import Monitor, Progress

from .collect import StatisticStore

_ROWS = 32  # sequences of one forward where the model is swept


class SelfSampling(BaseModel):
    """How the model writes."""

    model_config = ConfigDict(extra="forbid")

    width: int = Field(default=4, ge=1, description="Beams of a sequence, and proposals of each beam.")
    tau: float | None = Field(
        default=1.2,
        gt=0,
        allow_inf_nan=False,
        description="How much even loads count beside likelihood: the less, the more. null: not at all.",
    )
    likelihood: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="How much likelihood counts among proposals; these are drawn by the model's distribution already.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Of the distribution that proposals are drawn from; 0: the most likely ones, without chance.",
    )
    parallel: int = Field(
        default=8,
        ge=1,
        description="Sequences written side by side: more are faster, and take width² rows of keys and values each. "
        "Part of what decides about the text.",
    )


class Writer(Protocol):
    """A model that goes on with rows of text."""

    def step(self, ids_R: Tensor, parent_R: Tensor | None) -> tuple[Tensor, Tensor]:
        """Append a token to each row. `parent_R`: which row of the last step each goes on with; None at the beginning.

        Returns logits behind it [R, V] float32, and how often it visits each expert [R, M] float32, on the CPU.
        """


@dataclass(frozen=True)
class Written:
    """A group of sequences: `ids` [B, S], `counts` [B, M] visits of experts, `nats` [B] Σ -log p of each."""

    ids: Tensor
    counts: Tensor
    nats: Tensor


def search(
    writer: Writer,
    begin_BS: Tensor,
    generators: Sequence[torch.Generator],
    length: int,
    forbidden: Sequence[int],
    settings: SelfSampling,
    loads: Loads,
    step: Callable[[], None] = lambda: None,
) -> Written:
    """Write a group of sequences of `length` tokens that begin as given.

    Args:
        writer: the model.
        begin_BS: first tokens, at least one.
        generators: of each sequence's proposals.
        forbidden: tokens that aren't written; so are those beyond the largest known, `loads.vocabulary`.
        settings: width, tau, temperature.
        loads: of what was written before.
        step: called after every token.
    """
    sequences, width = len(begin_BS), settings.width
    counts_CM = torch.zeros(sequences, loads.experts)
    row_R: Tensor | None = None
    for column in begin_BS.T:
        logits, counts = writer.step(column, row_R)
        counts_CM, row_R = counts_CM + counts, torch.arange(sequences)
    ids_BWS, nats_BW = begin_BS.unsqueeze(1), torch.zeros(sequences, 1, dtype=torch.float64)
    counts_BWM, kept = counts_CM.view(sequences, 1, -1), torch.arange(sequences)
    while ids_BWS.shape[2] < length:
        beams = ids_BWS.shape[1]
        logits[:, list(forbidden)] = -torch.inf
        logits[:, loads.vocabulary :] = -torch.inf
        logp_BWV = logits.float().log_softmax(-1).view(sequences, beams, -1)
        proposed_BWP = torch.stack(
            [_proposals(part, g, settings) for part, g in zip(logp_BWV, generators, strict=True)]
        )
        nats_BC = (nats_BW.unsqueeze(-1) - logp_BWV.gather(-1, proposed_BWP).double()).flatten(1)
        ids_BCS = torch.cat([ids_BWS.repeat_interleave(width, 1), proposed_BWP.flatten(1).unsqueeze(-1)], dim=2)
        logits, counts = writer.step(proposed_BWP.flatten(), kept.repeat_interleave(width))
        counts_BCM = counts_BWM.repeat_interleave(width, 1) + counts.view(sequences, beams * width, -1)
        best_BC = _best(nats_BC, counts_BCM, counts_BWM[:, 0], loads, ids_BCS.shape[2], settings)
        picked = lambda part, best=best_BC: torch.stack([p[b] for p, b in zip(part, best, strict=True)])  # noqa: E731
        nats_BW, ids_BWS, counts_BWM = picked(nats_BC), picked(ids_BCS), picked(counts_BCM)
        kept = (best_BC + torch.arange(sequences).unsqueeze(1) * (beams * width)).flatten()
        logits = logits[kept]
        step()
    return Written(ids_BWS[:, 0].clone(), counts_BWM[:, 0].clone(), nats_BW[:, 0].clone())


def _proposals(logp_WV: Tensor, generator: torch.Generator, settings: SelfSampling) -> Tensor:
    """`width` different tokens of each beam, [W, w]: drawn one after another without putting back (Gumbel top-k)."""
    if settings.temperature == 0:
        return logp_WV.topk(settings.width).indices
    noise = torch.rand(logp_WV.shape, generator=generator).clamp_(1e-20, 1 - 1e-7)
    return (logp_WV / settings.temperature - (-noise.log()).log()).topk(settings.width).indices


def _best(
    nats_BC: Tensor, counts_BCM: Tensor, best_BM: Tensor, loads: Loads, tokens: int, settings: SelfSampling
) -> Tensor:
    """The candidates of least cost of each sequence, best first, [B, w]; each knows what those before it chose."""
    written = loads.tokens + len(nats_BC) * tokens
    current = list(best_BM)
    chosen = []
    for number, (nats_C, counts_CM) in enumerate(zip(nats_BC, counts_BCM, strict=True)):
        others = loads.counts_M + torch.stack(current).sum(0) - current[number]
        cost_C = settings.likelihood * nats_C
        if settings.tau is not None:
            cost_C = cost_C + written / settings.tau * loads.spread(others + counts_CM)
        order = cost_C.argsort(stable=True)[: settings.width]
        current[number] = counts_CM[order[0]]
        chosen.append(order)
    return torch.stack(chosen)


class Loads:
    """How often each expert was visited by what was written.

    Args:
        sizes: experts of each layer.
        vocabulary: tokens that the tokenizer knows.
    """

    def __init__(self, sizes: Sequence[int], vocabulary: int):
        self.sizes, self.vocabulary = list(sizes), vocabulary
        self.experts = sum(sizes)
        self.tokens = 0
        self.counts_M = torch.zeros(self.experts)
        self._size_L = torch.tensor(self.sizes, dtype=torch.float64)
        self._layer_M = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))

    def add(self, written: Written) -> None:
        """Count a finished group."""
        self.tokens += written.ids.numel()
        self.counts_M = self.counts_M + written.counts.sum(0)

    def spread(self, counts_CM: Tensor) -> Tensor:
        """Standard deviation of the experts' visits beside their layer's mean, averaged over layers: [C] float64."""
        exact = counts_CM.double()
        empty = exact.new_zeros(len(exact), len(self.sizes))
        mean_CL = empty.index_add(1, self._layer_M, exact) / self._size_L
        relative = exact / mean_CL[:, self._layer_M].clamp_min(1e-300) - 1
        return (empty.index_add(1, self._layer_M, relative**2) / self._size_L).sqrt().mean(1)

    def report(self) -> dict[str, float]:
        """Smallest load beside its layer's mean, and how they spread."""
        parts = self.counts_M.double().split(self.sizes)
        least = min(float(part.min() / part.mean().clamp_min(1e-300)) for part in parts)
        return {"min": round(least, 6), "std": round(float(self.spread(self.counts_M.unsqueeze(0))), 6)}


def self_sample(
    model: MoEModel,
    settings: SelfSampling,
    count: int,
    length: int,
    seed: str,
    tokenizer: Any,
    prefix: Sequence[int],
    store: StatisticStore,
    hold: Callable[[int], Path | None],
    monitor: Monitor,
) -> tuple[Tensor, dict[str, Any]]:
    """`count` sequences that a model writes: int64 [count, length], and an account of them.

    Args:
        model: in memory, or on disk (then every token is a sweep).
        settings: how it writes.
        count, length: of the sequences.
        seed: of everything drawn.
        tokenizer: special tokens and those that it doesn't know are never written.
        prefix: what each sequence begins with; without one it begins with a token drawn evenly from all.
        store: finished groups.
        hold: tokens of a sweep → folder for its hidden states.
        monitor: stages.
    """
    forbidden = sorted(set(tokenizer.all_special_ids))
    identity = {**settings.model_dump(mode="json"), "count": count, "length": length, "seed": seed}
    identity |= {"prefix": list(prefix), "forbidden": forbidden, "vocabulary": len(tokenizer)}
    key = f"self_sampling({json.dumps(identity, sort_keys=True)})"
    groups = [range(i, min(i + settings.parallel, count)) for i in range(0, count, settings.parallel)]
    loads = Loads([model.block(i).num_experts for i in model.moe_layers], len(tokenizer))
    finished: list[Written] = []
    with monitor.stage("calibration: self-sampling", len(groups) * (length - max(1, len(prefix)))) as progress:
        for number, group in enumerate(groups):
            kept = store.get(number, key)
            if kept is None:
                generators = [_generator(f"{seed}/{i}") for i in group]
                begin = torch.tensor([list(prefix) or [_first(g, len(tokenizer), forbidden)] for g in generators])
                with writing(model, hold) as writer:
                    pace = _Pace(monitor, progress, model, (len(groups) - number) * length)
                    with torch.no_grad():
                        found = search(writer, begin, generators, length, forbidden, settings, loads, pace.step)
                kept = {"ids": found.ids, "counts": found.counts, "nats": found.nats}
                store.put(number, key, kept)
            finished.append(Written(**kept))
            loads.add(finished[-1])
    predicted = count * (length - max(1, len(prefix)))
    nats = sum(float(written.nats.sum()) for written in finished) / max(1, predicted)
    return torch.cat([w.ids for w in finished]), {"nats_per_token": round(nats, 4), "shares": loads.report()}


class _Pace:
    """Says how long it will take, where that is long: a model on disk is read once per token."""

    def __init__(self, monitor: Monitor, progress: Progress, model: MoEModel, sweeps: int):
        self.monitor, self.progress, self.sweeps = monitor, progress, sweeps
        self.waiting = model.weights is not None
        self.begun = time.perf_counter()

    def step(self) -> None:
        """After every token; after the first the estimate."""
        self.progress.step()
        if self.waiting:
            hours = (time.perf_counter() - self.begun) * self.sweeps / 3600
            self.monitor.note(
                f"self-sampling: the model is larger than `compute.memory`, so each of {self.sweeps} tokens is a sweep "
                f"from disk: about {hours:.1f} hours at the first one's pace"
            )
            self.waiting = False


def _generator(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1)


def _first(generator: torch.Generator, vocabulary: int, forbidden: Sequence[int]) -> int:
    known = sorted(set(range(vocabulary)) - set(forbidden))
    return known[int(torch.randint(len(known), (1,), generator=generator))]


@contextmanager
def writing(model: MoEModel, hold: Callable[[int], Path | None]) -> Iterator[Writer]:
    """A model as a writer: with its keys and values kept where it is in memory and they can be reordered."""
    if model.weights is not None or not _reorders(model):
        yield _Swept(model, hold)
        return
    with ExitStack() as stack:
        stack.enter_context(hf.implementation(model.module))
        stack.callback(model.module.train, model.module.training)
        model.module.eval()
        writer = _Cached(model)
        for layer in model.moe_layers:
            stack.enter_context(observe(model.block(layer), writer.observe))
        yield writer


@torch.no_grad()
def _reorders(model: MoEModel) -> bool:
    """Whether the model goes on from keys and values that can be put in another order: tried on two tokens."""
    ids = torch.tensor([[1], [2]], device=model.device)
    with hf.implementation(model.module):
        output = model.module(input_ids=ids, use_cache=True)
        cache: Any = getattr(output, "past_key_values", None)
        if not hasattr(cache, "reorder_cache"):
            return False
        whole = model.module(input_ids=torch.cat([ids.flip(0), ids], dim=1), use_cache=False).logits[:, -1]
        cache.reorder_cache(torch.tensor([1, 0], device=model.device))
        parts = model.module(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    spread = float(whole.float().std())
    return float((whole - parts).float().abs().max()) <= 0.02 * max(spread, 1e-6)


class _Cached:
    """A model in memory, which keeps keys and values of every row."""

    def __init__(self, model: MoEModel):
        self._model = model
        self._cache: Any = None
        self._counts: dict[int, Tensor] = {}

    def observe(self, tap: Tap) -> None:
        """Visits of this step's tokens to one layer's experts."""
        self._counts[tap.layer] = visits(tap, self._model.block(tap.layer).num_experts)

    def step(self, ids_R: Tensor, parent_R: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Writer."""
        device = self._model.device
        if parent_R is not None:
            self._cache.reorder_cache(parent_R.to(device))
        ids = ids_R.unsqueeze(1).to(device)
        output = self._model.module(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        counts = torch.cat([self._counts[layer] for layer in self._model.moe_layers], dim=1)
        return output.logits[:, -1].float().cpu(), counts


class _Swept:
    """A model of which one layer is in memory: every step runs all text so far."""

    def __init__(self, model: MoEModel, hold: Callable[[int], Path | None]):
        self._model, self._hold = model, hold
        self._text_RS = torch.zeros(0, 0, dtype=torch.int64)

    def step(self, ids_R: Tensor, parent_R: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Writer."""
        before = torch.zeros(len(ids_R), 0, dtype=torch.int64) if parent_R is None else self._text_RS[parent_R]
        text = self._text_RS = torch.cat([before, ids_R.unsqueeze(1)], dim=1)
        found: dict[int, list[Tensor]] = {layer: [] for layer in self._model.moe_layers}

        def seen(tap: Tap) -> None:
            if tap.sequence_T is None:
                raise UnsupportedModelError(
                    f"layer {tap.layer}: its experts don't see the text's tokens one by one, so `self_sampling` can't "
                    "tell whom a token visits"
                )
            every = visits(tap, self._model.block(tap.layer).num_experts)
            found[tap.layer].append(every.view(-1, text.shape[1], every.shape[1])[:, -1])

        batches = [{"input_ids": part} for part in text.split(_ROWS)]
        with Sweep(self._model, batches, self._hold(text.numel())) as sweep:
            for at in sweep:
                at.advance(seen)
            logits = torch.cat([output[:, -1].float().cpu() for _, output in sweep.outputs()])
        return logits, torch.cat([torch.cat(found[layer]) for layer in self._model.moe_layers], dim=1)


def visits(tap: Tap, experts: int) -> Tensor:
    """How often each token visits each expert, [T, E] float32, on the CPU; see Dispatch.of for what is no visit."""
    index = torch.where(tap.weight_TK == 0, experts, tap.index_TK).clamp_max(experts).cpu()
    ones = torch.ones_like(index, dtype=torch.float32)
    return torch.zeros(len(index), experts + 1).scatter_add_(1, index, ones)[:, :experts]

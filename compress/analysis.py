"""What a model's routing looks like on calibration text: who is busy, who goes together, what a cache would gain.

Promise: nothing is changed; a folder is streamed with one decoder layer in memory. What is found is plain data, and of
each layer's routing trace nothing is kept unless it is asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress import feasibility
from moe_compress.calib.collect import MemoryStore, collect
from moe_compress.calib.locality import by_sequence, sch, segment_counts, srp
from moe_compress.calib.similarity import CoActivation
from moe_compress.calib.statistics import OutputNorms, Result, Routing, Statistic
from moe_compress.calib.text import Calibration, TokenBatches, load_batches
from moe_compress.calib.tokenizer import find_tokenizer
from moe_compress.calib.traces import ActivationMaxima, RouterCertainty, RoutingTrace
from moe_compress.checkpoint.atomic import write_tensors
from moe_compress.errors import InputError
from moe_compress.model import MoEModel
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Monitor
from moe_compress.prune.super_experts import super_experts
from moe_compress.recipe import make_part
from moe_compress.resources import device_and_dtype, holding

# Tokens of a segment, for SRP and for how far a cache looks ahead; caches in experts per expert of a token.
SEGMENT = 16
RATIOS = (1, 2, 4)
# Sequences on which caches are simulated: each of their tokens is a step of its own.
SIMULATED = 16
# Pairs of experts that are named.
PAIRS = 5

_MEASURED: tuple[Statistic, ...] = (
    Routing(),
    OutputNorms(),
    RouterCertainty(),
    ActivationMaxima(),
    CoActivation(),
    RoutingTrace(),
)


@dataclass
class Analysis:
    """What `analyse` found.

    Attributes:
        summary: of the whole model, JSON values (docs/analysis.md).
        layers: decoder layer → JSON values.
        load: decoder layer → [E] tokens of each expert, each counted as its modality weighs.
        together: decoder layer → [E, E] n_ij / √(n_i·n_j), n_ij tokens that chose both.
        maxima: decoder layer → [E] max |f_e|.
        traces: decoder layer → `index`, `weight`, `sequence` (see RoutingTrace), where they were asked for.
    """

    summary: dict[str, Any]
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
    load: dict[int, Tensor] = field(default_factory=dict)
    together: dict[int, Tensor] = field(default_factory=dict)
    maxima: dict[int, Tensor] = field(default_factory=dict)
    traces: dict[int, Result] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything but matrices and traces."""
        return {**self.summary, "layers": [{"layer": i, **values} for i, values in self.layers.items()]}

    def save_traces(self, file: str | Path) -> None:
        """Write `layers.LAYER.index` (int16, -1: none), `.weight` (float16) and `.sequence` (int32) as safetensors."""
        if not self.traces:
            raise InputError("no routing traces were kept: analyse with traces=True")
        tensors = {f"layers.{i}.{n}": t for i, trace in self.traces.items() for n, t in trace.items()}
        write_tensors(Path(file), tensors, {"format": "pt", "text": str(self.summary["text"])})

    def plot(self, folder: str | Path) -> list[Path]:
        """Write PNG files (needs matplotlib). Returns their paths."""
        from moe_compress.report.plots import plot_analysis

        return plot_analysis(self, Path(folder))


class _Digested(MemoryStore):
    """A store that keeps what `Analysis` needs of a trace, and the trace itself only where it is asked for."""

    def __init__(self, model: MoEModel, segment: int, traces: bool):
        super().__init__()
        self.model, self.segment, self.keep = model, segment, traces
        self.counts: dict[int, Tensor] = {}
        self.hits: dict[int, dict[str, dict[int, tuple[int, int]]]] = {}
        self.traces: dict[int, Result] = {}

    def put(self, layer: int, key: str, result: Result) -> None:
        """See StatisticStore."""
        if key != RoutingTrace().key:
            super().put(layer, key, result)
            return
        block = self.model.block(layer)
        experts, top_k = block.num_experts, block.top_k
        sequences = by_sequence(result["index"], result["sequence"])
        self.counts[layer] = segment_counts(sequences, experts, self.segment)
        few = sequences[:SIMULATED]
        self.hits[layer] = {
            name: {r: sch(few, experts, r * top_k, horizon) for r in RATIOS if r * top_k < experts}
            for name, horizon in (("sch", self.segment), ("lru", 0))
        }
        if self.keep:
            self.traces[layer] = result


def analyse(
    model: str | Path | PreTrainedModel | MoEModel,
    calibration: Calibration | TokenBatches | Mapping[str, Any] | str | Path | Sequence[Any],
    *,
    tokenizer: Any = None,
    segment: int = SEGMENT,
    traces: bool = False,
    monitor: Monitor | None = None,
) -> Analysis:
    """Look at a model's routing while it reads text.

    Args:
        model: a checkpoint folder (then one layer is in memory at a time), or a loaded model.
        calibration: as in a recipe: a mapping, a path or several; or batches that are read already.
        tokenizer: the model's; a folder's own by default.
        segment: tokens of a segment, for SRP and SCH.
        traces: keep every routing decision: 4·top-k + 4 bytes per token and layer.
        monitor: shows stages.

    Raises:
        InputError and its kinds: something is wrong with model or text.
    """
    monitor = monitor or Monitor()
    if segment < 1:
        raise InputError(f"a segment has at least 1 token, not {segment}")
    with monitor.stage("check"):
        view = opened(model)
        text, batch_size = read_text(view, calibration, tokenizer)
    store = _Digested(view, segment, traces)
    with tempfile.TemporaryDirectory() as folder:
        hold = holding(view, text.tokens, Path(folder)) if view.weights is not None else None
        batches = text.forwards(batch_size)
        with monitor.stage("analyse", len(view.layers)) as progress, Sweep(view, batches, hold) as sweep:
            collect(sweep, _MEASURED, store, progress)
    return _analysis(view, store, text)


def opened(model: str | Path | PreTrainedModel | MoEModel) -> MoEModel:
    """A view of a folder, a loaded model, or what is one already."""
    if isinstance(model, MoEModel):
        return model
    if isinstance(model, PreTrainedModel):
        return MoEModel.wrap(model)
    device, dtype = device_and_dtype("auto", "auto")
    return MoEModel.open(model, device=device, dtype=dtype)


def read_text(view: MoEModel, calibration: Any, tokenizer: Any = None) -> tuple[TokenBatches, int]:
    """Calibration text and sequences of one forward, for a view that only reads. Raises DataError, InputError."""
    if isinstance(calibration, TokenBatches):
        return calibration, 8
    sources = isinstance(calibration, str | Path | list | tuple)
    settings = make_part(Calibration, {"sources": calibration} if sources else calibration, "calibration")
    if tokenizer is None and view.weights is not None:
        tokenizer = find_tokenizer(view.source.folder)
    if tokenizer is None:
        raise InputError("calibration text needs the model's tokenizer, and there is none: pass `tokenizer=`")
    feasibility.check_length(view, settings.length, "calibration.length")
    vocabulary = view.module.config.get_text_config().vocab_size
    return load_batches(settings, tokenizer, Path.cwd(), vocab_size=vocabulary), settings.batch_size


def gini(values: Tensor) -> float:
    """Gini coefficient of values that aren't negative: 0 all equal, towards 1 one has all."""
    ordered = values.double().sort().values
    count, total = len(ordered), float(ordered.sum())
    if not total:
        return 0.0
    rank = torch.arange(1, count + 1, dtype=torch.float64)
    return float((2 * rank - count - 1) @ ordered) / (count * total)


def _analysis(view: MoEModel, store: _Digested, text: TokenBatches) -> Analysis:
    layers = {i: {s.name: store.results[i, s.key] for s in _MEASURED[:-1]} for i in view.moe_layers}
    maxima = {i: found["output_norms"]["maximum"] for i, found in layers.items()}
    supers = super_experts(maxima, len(view.layers))
    found = Analysis({}, maxima=maxima, traces=store.traces)
    for index, measured in layers.items():
        load = measured["routing"]["counts"]
        found.load[index], found.together[index] = load, measured["co_activation"]["similarity"]
        found.layers[index] = {
            **_balance(load, measured["routing"]),
            **_certainty(measured["router_certainty"]),
            **_maxima(measured["activation_maxima"], maxima[index]),
            "super_experts": supers.get(index, []),
            "pairs": _pairs(measured["co_activation"]),
            **_consistency(store.counts[index]),
            **{n: {str(r): _rate(*hit) for r, hit in by.items()} for n, by in store.hits[index].items()},
        }
    everything = torch.stack(list(store.counts.values())).sum(dim=0)
    caches = {
        name: {
            str(r): _rate(*(sum(by[name][r][n] for by in store.hits.values() if r in by[name]) for n in (0, 1)))
            for r in RATIOS
            if any(r in by[name] for by in store.hits.values())
        }
        for name in ("sch", "lru")
    }
    found.summary = {
        "tokens": text.tokens,
        "sequences": len(text),
        "text": text.digest,
        "segment": store.segment,
        "cache_sequences": min(SIMULATED, len(text)),
        **_consistency(everything),
        **caches,
        "super_experts": sum(map(len, supers.values())),
        "unseen": sum(values["unseen"] for values in found.layers.values()),
    }
    return found


def _balance(load_E: Tensor, routing: Result) -> dict[str, Any]:
    mean, total = float(load_E.mean()), float(load_E.sum())
    share = load_E / max(total, 1e-300)
    return {
        "experts": len(load_E),
        "tokens": float(routing["tokens"]),
        "load_cv": float(load_E.std(correction=0)) / mean if mean else 0.0,
        "load_gini": gini(load_E),
        "load_entropy": float(torch.special.entr(share).sum()) / float(torch.tensor(max(2, len(load_E))).log()),
        "busiest": int(load_E.argmax()),
        "busiest_share": float(share.max()),
        "unseen": int((load_E == 0).sum()),
        "unseen_experts": (load_E == 0).nonzero().flatten().tolist(),
    }


def _certainty(sums: Result) -> dict[str, Any]:
    found: dict[str, Any] = {"top1_share": _rate(float(sums["first"]), float(sums["tokens"])), "router_entropy": None}
    if "entropy" in sums:
        classes = float(torch.log(sums["classes"].double()))
        found["router_entropy"] = _rate(float(sums["entropy"]), float(sums["seen"]))
        found["router_entropy_share"] = _rate(found["router_entropy"], classes)
    return found


def _maxima(maxima: Result, output_E: Tensor) -> dict[str, Any]:
    return {
        "max_input": float(maxima["input"].max()),
        "max_neuron": float(maxima["neuron"].max()),
        "max_output": float(output_E.max()),
        "max_output_expert": int(output_E.argmax()),
        "median_output": float(output_E.median()),
        "max_hidden": float(maxima["behind"]) if "behind" in maxima else None,
    }


def _pairs(together: Result) -> list[dict[str, Any]]:
    """The pairs that are chosen together most often for how often each is chosen, strongest first."""
    similarity, counts = together["similarity"], together["counts"]
    first, second = torch.triu_indices(len(similarity), len(similarity), 1)
    strength = similarity[first, second]
    order = strength.argsort(descending=True, stable=True)[:PAIRS]
    return [
        {"experts": [int(i), int(j)], "strength": float(similarity[i, j]), "tokens": int(counts[i, j])}
        for i, j in zip(first[order], second[order], strict=True)
        if similarity[i, j] > 0
    ]


def _consistency(counts: Tensor) -> dict[str, Any]:
    """SRP, or None where no sequence is as long as a segment, or experts don't see sequences token by token."""
    return srp(counts) if counts.any() else {"srp": None, "threshold": None, "predicted": None}


def _rate(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


__all__ = ["Analysis", "analyse"]

"""Which experts matter for which domain of text, in one file, and loading a checkpoint with those of one task.

After PreMoe (arXiv 2505.17639): a pattern per domain says how much each expert of each layer matters there. A task is a
domain's name, or a prompt. A prompt's nearest domain is that whose task-conditioned expected selection scores (TCESS,
the criterion `tcess`) in the first layer with experts are at the least L2 distance from the prompt's own. Ours: they
are compared as vectors of length 1, and what experts are kept by may be another criterion than `tcess` (PreMoe's).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress import feasibility
from moe_compress.analysis import opened, read_text
from moe_compress.calib.batches import TokenBatches
from moe_compress.calib.by_domain import ByDomain, batches_by_domain
from moe_compress.calib.collect import MemoryStore, collect
from moe_compress.calib.statistics import OutputNorms, Result
from moe_compress.calib.text import Calibration
from moe_compress.calib.tokenizer import find_tokenizer
from moe_compress.checkpoint.atomic import write_tensors
from moe_compress.counts import ExpertCounts, chosen, kept_count
from moe_compress.errors import CheckpointError, DataError, InputError, RecipeError
from moe_compress.export.partial import check_partial, load_experts
from moe_compress.model import MoEModel, Tap
from moe_compress.model.shape import LayerShape, model_shape
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Monitor
from moe_compress.prune import experts as _experts  # noqa: F401  (all criteria are registered with it)
from moe_compress.prune.criteria import Criterion, Selection, find_criterion
from moe_compress.prune.super_experts import super_experts
from moe_compress.resources import holding

# Where patterns lie beside a checkpoint's weights; no loader takes it for one of them.
FILE = "domains.safetensors"
_VERSION = 1
# What a prompt's pattern is made of.
_FEATURE = "tcess"


@dataclass(frozen=True)
class Patterns:
    """How much each expert matters for each domain.

    Attributes:
        domains: their names.
        scores: decoder layer → [D, E], by `criterion`, D in the order of `domains`.
        features: [D, E] TCESS in the first layer with experts, by which a prompt's domain is found.
        criterion: what scored.
        keep: share of the experts that a task's model keeps unless another is asked for.
        super_experts: decoder layer → experts that stay whatever their score (arXiv 2507.23279).
        tokens: domain → tokens that it was measured on.
        identity: of the checkpoint, see `identity_of`.
    """

    domains: tuple[str, ...]
    scores: dict[int, Tensor]
    features: Tensor
    criterion: str
    keep: float
    super_experts: dict[int, list[int]]
    tokens: dict[str, int]
    identity: str

    def save(self, file: str | Path) -> None:
        """Write one safetensors file: `scores.LAYER` and `features` [D, E] float64, the rest in its header."""
        known = {"domains": self.domains, "criterion": self.criterion, "keep": self.keep, "tokens": self.tokens}
        known |= {"super_experts": self.super_experts, "identity": self.identity, "version": _VERSION}
        tensors = {f"scores.{index}": scores for index, scores in self.scores.items()} | {"features": self.features}
        write_tensors(Path(file), tensors, {"format": "pt", "moe_compress_domains": json.dumps(known, sort_keys=True)})

    @classmethod
    def open(cls, file: str | Path) -> Patterns:
        """Read what `save` wrote. Raises InputError, CheckpointError."""
        if not Path(file).is_file():
            raise InputError(f"no patterns of domains at {file}: make them with `moe-compress domains MODEL …`")
        try:
            with safe_open(file, framework="pt") as found:
                known = json.loads((found.metadata() or {}).get("moe_compress_domains", "null"))
                tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file} can't be read as patterns of domains: {error}") from error
        if not isinstance(known, dict) or known.get("version") != _VERSION:
            raise CheckpointError(f"{file} holds no patterns of domains that this moe-compress reads: make them anew")
        features = tensors.pop("features")
        scores = {int(name.removeprefix("scores.")): tensor for name, tensor in tensors.items()}
        return cls(
            domains=tuple(known["domains"]),
            scores=dict(sorted(scores.items())),
            features=features,
            criterion=known["criterion"],
            keep=known["keep"],
            super_experts={int(i): experts for i, experts in known["super_experts"].items()},
            tokens=known["tokens"],
            identity=known["identity"],
        )

    def chosen(self, domain: str, layers: Mapping[int, LayerShape], keep: float | None = None) -> dict[int, list[int]]:
        """Decoder layer → experts that stay for a domain, ascending. Raises RecipeError where routing needs more."""
        counts = _share(self.keep if keep is None else keep)
        number = self.domains.index(domain)
        return {
            index: chosen(
                scores[number],
                kept_count("load", index, layers[index], counts),
                layers[index],
                self.super_experts.get(index, []),
            )
            for index, scores in self.scores.items()
        }

    def distances(self, pattern_E: Tensor) -> dict[str, float]:
        """Domain → how far a prompt's pattern (see `pattern_of`) is from the domain's, nearest first."""
        own = torch.nn.functional.normalize(pattern_E.double(), dim=0)
        of_DE = torch.nn.functional.normalize(self.features.double(), dim=1)
        far = torch.linalg.vector_norm(of_DE - own, dim=1).tolist()
        return dict(sorted(zip(self.domains, far, strict=True), key=lambda item: item[1]))


def find_patterns(
    model: str | Path | MoEModel,
    calibration: Calibration | TokenBatches | Mapping[str, Any] | str | Path | Sequence[Any],
    *,
    criterion: str = "easy_ep",
    keep: float = 0.5,
    monitor: Monitor | None = None,
) -> Patterns:
    """Score every expert for every domain of tagged text, in one sweep with one layer in memory.

    Args:
        model: a checkpoint folder.
        calibration: as in a recipe, its text tagged by `domain` or `domain_field`.
        criterion: a criterion of prune.experts; one that takes no gradients, and ranks.
        keep: share of the experts that `load_task` keeps.
        monitor: shows stages.

    Raises InputError and its kinds: something is wrong with model, text or criterion; nothing was written.
    """
    monitor = monitor or Monitor()
    with monitor.stage("check"):
        view = opened(model)
        check_partial(view)
        wanted = _usable(criterion)
        layers = model_shape(view).layers
        counts = {i: kept_count("domains", i, layers[i], _share(keep)) for i in layers}
        text, batch_size = read_text(view, calibration)
        domains = tuple(sorted({tag for tag in text.domain if tag is not None}))
        if not domains:
            raise DataError(
                "no text says its domain: give the sources a `domain_field` (--domain-field), or a `domain`"
            )
    if untagged := text.domain.count(None):
        monitor.note(f"{untagged} of {len(text)} sequences have no domain and are left out")
    batches, ends = batches_by_domain(text, domains, batch_size)
    feature = find_criterion(_FEATURE)
    inner = list(
        {s.key: s for s in [*wanted.measures(_share(keep)), *feature.measures(_share(keep)), OutputNorms()]}.values()
    )
    store = MemoryStore()
    with tempfile.TemporaryDirectory() as folder:
        hold = holding(view, text.tokens, Path(folder))
        with monitor.stage("domains", len(view.layers)) as progress, Sweep(view, batches, hold) as sweep:
            collect(sweep, [ByDomain(s, ends) for s in inner], store, progress)

    def of(index: int, number: int) -> dict[str, Result]:
        return {s.name: ByDomain.part(store.results[index, ByDomain(s, ends).key], number) for s in inner}

    parts = {i: [of(i, number) for number in range(len(domains))] for i in view.moe_layers}
    maxima = {i: torch.stack([m["output_norms"]["maximum"] for m in own]).amax(dim=0) for i, own in parts.items()}
    asked = {i: Selection(layers[i], counts[i], [], torch.Generator().manual_seed(0)) for i in parts}
    return Patterns(
        domains=domains,
        scores={i: torch.stack([wanted.score(m, asked[i]).double() for m in own]) for i, own in parts.items()},
        features=torch.stack([feature.score(m, asked[view.moe_layers[0]]) for m in parts[view.moe_layers[0]]]),
        criterion=criterion,
        keep=keep,
        super_experts=super_experts(maxima, len(view.layers)),
        tokens={d: text.chosen([i for i, tag in enumerate(text.domain) if tag == d]).tokens for d in domains},
        identity=identity_of(view),
    )


def load_task(
    folder: str | Path, task: str, *, keep: float | None = None, patterns: str | Path | None = None, **options: Any
) -> PreTrainedModel:
    """Load a checkpoint with a task's experts only; see `moe_compress.load`."""
    view = MoEModel.open(folder)
    found = Patterns.open(patterns if patterns is not None else view.source.folder / FILE)
    check_partial(view)
    if found.identity != identity_of(view):
        raise CheckpointError(
            f"the patterns of domains are of another checkpoint than {folder}: make them with `moe-compress domains`"
        )
    layers = model_shape(view).layers
    if task in found.domains:
        domain, why = task, f"task {task!r}"
    else:
        far = found.distances(pattern_of(view, task))
        domain = next(iter(far))
        why = f"no domain is called {task!r}, so it is a prompt; nearest: " + ", ".join(
            f"{name} ({distance:.3f})" for name, distance in list(far.items())[:3]
        )
    stay = found.chosen(domain, layers, keep)
    kept, total = sum(map(len, stay.values())), sum(layer.num_experts for layer in layers.values())
    Monitor().note(f"{why}: loading {kept} of {total} experts, those for {domain}")
    return load_experts(view, stay, **options)


def pattern_of(view: MoEModel, prompt: str) -> Tensor:
    """TCESS of each expert of the first layer with experts on a prompt, [E]. Raises InputError, DataError.

    The model runs up to that layer, one layer in memory.
    """
    tokenizer = find_tokenizer(view.source.folder)
    if tokenizer is None:
        raise InputError(f"a prompt needs a tokenizer, and {view.source.folder} has none that transformers can load")
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    if not ids.numel():
        raise DataError("the prompt is empty: give text, or the name of a domain")
    feasibility.check_length(view, ids.shape[1], "the prompt's length")
    wanted, first = find_criterion(_FEATURE), view.moe_layers[0]
    shape = model_shape(view).layers[first]
    with Sweep(view, [{"input_ids": ids}]) as sweep:
        for step in sweep:
            if step.index < first:
                step.advance()
                continue
            assert step.layer.block is not None
            found = {s.name: s.start(step.layer.block, step.tokens) for s in wanted.measures(_share(1.0))}
            taps: list[Tap] = []
            step.run(taps.append)
            with step.readable():
                for accumulator in found.values():
                    for tap in taps:
                        accumulator.update(tap)
                measured = {name: accumulator.result() for name, accumulator in found.items()}
            break
    return wanted.score(measured, Selection(shape, shape.num_experts, [], torch.Generator().manual_seed(0)))


def identity_of(view: MoEModel) -> str:
    """Says which checkpoint a folder holds, without reading experts: config.json, all names and shapes, all routers."""
    assert view.weights is not None
    source, found = view.source, hashlib.sha256()
    found.update(json.dumps(source.config, sort_keys=True).encode())
    for name, info in sorted(source.tensors.items()):
        found.update(f"{name} {info.dtype} {list(info.shape)}".encode())
    for index in view.moe_layers:
        router = view.block(index).router_path + "."
        for name, runtime in sorted(view.weights.layer_names(index).items()):
            if runtime.startswith(router):
                found.update(source.get(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _usable(name: str) -> Criterion:
    found = find_criterion(name)
    statistics = found.measures(_share(1.0))
    if not found.ranks or any(s.gradients or not s.reads_text for s in statistics):
        raise RecipeError(
            f"criterion {name!r} can't score domains: it must rank experts by what a forward pass over text measures, "
            "as tcess, easy_ep or reap do"
        )
    return found


def _share(keep: float) -> ExpertCounts:
    if not 0 < keep <= 1:
        raise RecipeError(f"keep is a share of the experts, more than 0 and at most 1, not {keep:g}")
    return ExpertCounts(keep=keep)

"""The pass `merge.factorise`: experts in factored form, by a method, within a budget of real bytes.

Plan: what every direction of the method's factors holds is measured (spectra.py), and one program over all layers gives
out ranks (ranks.py). Apply: factors of what the experts really read, one layer in memory; what runs is factored.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moe_compress.calib.collect import MemoryStore, Profile, collect
from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.statistics import Result, Statistic
from moe_compress.errors import BudgetError, RecipeError
from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.backward import GradientSweep
from moe_compress.model.losses import NextToken
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.passes import Lesson, Pass, PassOptions, Plan, register
from moe_compress.units import Size, parse_bytes, show_budget, show_bytes

from .align import permuted
from .factored import factor_experts
from .factors import Found, by_bases, own_factors, shared_factors
from .ranks import DENSE, Sizes, bases_rank, give_out, sizes_of_bases
from .reading import Reading
from .spectra import FactorSpectrum, FisherSpectrum, energies, shares
from .splits import METHODS, Asked, BaseRule, Method, Split, barycentre_order, find_method
from .terms import Base, Load, Sparse, Term


class FactoriseOptions(PassOptions):
    """Options of `merge.factorise`: `keep` or `size`, and the method's."""

    method: str = Field(default="svd", description="How experts are factorised")
    keep: float | None = Field(default=None, gt=0, le=1, description="Share of the experts' bytes, e.g. 0.75")
    size: Size | None = Field(default=None, description="Instead of `keep`: bytes of the whole model, e.g. 12 GB")
    base: BaseRule | None = Field(
        default=None,
        description="d2-moe, resmoe: the shared base is the experts' mean, weighted by the weights' Fisher information "
        "(takes gradients), by how often experts are chosen, or not (default: fisher for d2-moe, mean for resmoe)",
    )
    step: int = Field(default=8, ge=1, description="Ranks are multiples of this")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None,
        description="Of the stored factors (default: float32 where the model's weights are, else bfloat16)",
    )
    damping: float = Field(default=0.01, gt=0, description="Added to what is read, as a share of its mean energy")
    shrinkage: float | None = Field(
        default=None,
        ge=0,
        description="Tokens that a layer's mean counts for beside an expert's own (default: size / 4)",
    )
    sparse: float = Field(default=0.1, gt=0, lt=1, description="mc-smoe: share of an expert's neurons kept whole")
    bases: int | None = Field(
        default=None, ge=1, description="mobe: bases of a layer (default: a quarter of the experts)"
    )
    activation: Literal["silu", "tanh", "none"] = Field(default="silu", description="mobe: on the mixture of bases")
    fit_steps: int = Field(default=400, ge=0, description="mobe: steps of Adam")
    rate: float = Field(default=0.07, gt=0, description="mobe: its first rate")
    seed: int = Field(default=0, description="mobe: of the noise that mixtures start with")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.keep is None) == (self.size is None):
            raise ValueError("give either `keep` (a share of the experts' bytes, e.g. 0.75) or `size` (of the model)")
        if self.base is not None and self.method in METHODS and METHODS[self.method].base is None:
            raise ValueError(f"method {self.method} has no `base`")
        return self


@register
class MergeFactorise(Pass):
    """Put factors in the place of the experts' matrices."""

    name = "merge.factorise"
    summary = "experts as low-rank factors, shared bases and residuals, within a budget of real bytes (native only)"
    paper = (
        "SVD-LLM (arXiv 2403.07378), D2-MoE (2502.17298), ResMoE (2503.06881), MoLAE (2503.23100), MoBE (2508.05257)"
    )
    Options = FactoriseOptions
    leaves = frozenset({"factored"})
    options: FactoriseOptions

    @classmethod
    def choices(cls) -> dict[str, dict[str, str]]:
        """The registered methods."""
        return {"method": {m.name: m.source for m in METHODS.values()}}

    @property
    def _method(self) -> Method:
        return find_method(self.options.method)

    @property
    def _base(self) -> BaseRule:
        return self.options.base or self._method.base or "mean"

    @property
    def _by_fisher(self) -> bool:
        return self._method.base is not None and self._base == "fisher"

    @property
    def _statistic(self) -> FactorSpectrum:
        kind = FisherSpectrum if self._by_fisher else FactorSpectrum
        options = self.options
        return kind(options.method, self._base, options.sparse, options.damping, options.shrinkage)

    def statistics(self) -> Sequence[Statistic]:
        """The spectra. With a base by Fisher information they are learned, as the base is needed again when applied."""
        return [] if self._method.form == "bases" or self._by_fisher else [self._statistic]

    def needs_inputs(self) -> bool:
        """Factors are those of what the experts really read."""
        return True

    def learns(self) -> bool:
        """The base by Fisher information, and the spectra around it."""
        return self._by_fisher

    def needs_original(self) -> bool:
        """What it learns is of the model alone."""
        return False

    def goes_back(self) -> bool:
        """For the Fisher information."""
        return self._by_fisher

    def learn(self, lesson: Lesson) -> dict[int, Result]:
        """What FisherSpectrum measures."""
        store, batches = MemoryStore(), lesson.text.forwards(lesson.batch_size)
        with GradientSweep(lesson.model, batches, lesson.hold_all) as sweep:
            collect(sweep, [self._statistic], store, lesson.progress, NextToken(batches))
        return {layer: result for (layer, _), result in store.results.items()}

    def forecast(self, shape: ModelShape) -> ModelShape:
        """Sizes at the budget. Raises RecipeError for another target, BudgetError for a budget that can't be met."""
        method = self._method
        if self.target.quantized_format != "native":
            raise RecipeError(
                f"{self.name}: the target {self.target.name!r} loads no factored experts: take target: native"
            )
        if method.form == "bases":
            layers = {}
            for index, layer in shape.layers.items():
                rank = bases_rank(self.name, self._sizes(layer), self._bases(layer), self._share(shape))
                size = sizes_of_bases(self._sizes(layer), self._bases(layer), rank)
                layers[index] = replace(layer, bytes=size, kind="factored")
            return shape.with_layers(layers)
        budget = self._budget(shape)
        least = {i: self._sizes(layer).total(self._all_at(layer, 0)) for i, layer in shape.layers.items()}
        most = {i: self._sizes(layer).total(self._all_at(layer, -1)) for i, layer in shape.layers.items()}
        if sum(least.values()) > budget:
            raise BudgetError(
                f"{self.name}: {show_budget(budget, self.options.size)} for all experts, and what {method.name} keeps "
                f"whatever the ranks takes {show_bytes(sum(least.values()))}: allow more, or take another method"
            )
        share = min(1.0, (budget - sum(least.values())) / max(1, sum(most.values()) - sum(least.values())))
        sizes = {i: int(least[i] + share * (most[i] - least[i])) for i in shape.layers}
        return shape.with_layers(
            {i: replace(layer, bytes=sizes[i], kind="factored") for i, layer in shape.layers.items()}
        )

    def plan(self, profile: Profile) -> Plan:
        """A rank for every matrix."""
        shape = profile.shape
        sizes = {i: self._sizes(layer) for i, layer in shape.layers.items()}
        notes = []
        summary: dict[str, Any] = {"method": self._method.name, "budget_bytes": self._budget(shape)}
        if self._method.form == "bases":
            ranks = {}
            for i, layer in shape.layers.items():
                rank = bases_rank(self.name, sizes[i], self._bases(layer), self._share(shape))
                ranks[i] = {n: [DENSE if n == "down" else rank] * layer.num_experts for n in sizes[i].names}
            used = {i: sizes_of_bases(sizes[i], self._bases(la), ranks[i]["up"][0]) for i, la in shape.layers.items()}
            notes.append("ranks are the same everywhere: how well bases fit isn't known before they are")
        else:
            measured = {i: self.learned[i] if self._by_fisher else profile.of(i, self._statistic) for i in sizes}
            fixed = sum(s.fixed for s in sizes.values())
            try:
                columns, found, note = give_out(
                    {i: s.choices(measured[i]) for i, s in sizes.items()}, self._budget(shape) - fixed
                )
            except BudgetError as error:
                raise BudgetError(f"{self.name}: {error}") from error
            ranks = {i: s.chosen(columns[i]) for i, s in sizes.items()}
            used = {i: s.total(ranks[i]) for i, s in sizes.items()}
            summary |= found
            notes += [note] if note else []
        summary["expert_bytes"] = sum(used.values())
        summary["layers"] = [
            {"layer": i, "bytes": used[i], **_told(own), "dense_bytes": shape.layers[i].bytes}
            for i, own in ranks.items()
        ]
        gone = {i: sum(not any(own[n][e] for n in own) for e in range(len(own["up"]))) for i, own in ranks.items()}
        notes += [f"layer {i}: {count} experts have rank 0 throughout" for i, count in gone.items() if count]
        layers = {i: {"ranks": own, "dtype": self._dtype(shape.layers[i])} for i, own in ranks.items()}
        return Plan(self.name, layers, summary, notes)

    @torch.no_grad()
    def apply(self, block: MoEBlock, decision: dict[str, Any], inputs: BlockInputs | None) -> dict[str, Any]:
        """Factorise and replace the block's experts."""
        assert inputs is not None
        method, options, ranks = self._method, self.options, decision["ranks"]
        dtype: torch.dtype = getattr(torch, decision["dtype"])
        experts = FusedExperts(block.experts_module)
        weights = experts.weights().map(lambda w: w.float())
        if method.aligned:
            weights = permuted(weights, barycentre_order(weights))
            for (_, target), (_, value) in zip(experts.weights().items(), weights.items(), strict=True):
                target.copy_(value)
        reading = Reading(experts, inputs, options.damping, options.shrinkage)
        counts_E = reading.rows.dispatch.counts_E
        asked = Asked(reading, counts_E, self._base, {}, options.sparse)
        split = self._learned_split(block.layer, weights) if self._by_fisher else method.divide(weights, asked)
        _settle(split, weights, dtype)
        measured = energies(weights, reading)
        if method.form == "own":
            found = own_factors(split, ranks, reading, dtype)
        elif method.form == "shared":
            found = shared_factors(split, ranks, reading, shares(measured), dtype)
        else:
            found = by_bases(split, ranks, reading, self._bases_of(block.num_experts), options, dtype)
        terms = {name: _terms(name, weights, split, ranks[name], found, dtype) for name, _ in weights.matrices()}
        module = factor_experts(block, terms)
        error = {
            n: (e / measured["energy"][:, m].clamp_min(1e-300)).tolist() for m, (n, e) in enumerate(found.error.items())
        }
        seen = counts_E.tolist()
        load = Load(sum(seen), inputs.tokens, sum(1 for c in seen if c))
        dense = load.rows * weights.parameters // block.num_experts
        return {
            "experts": [
                {
                    "tokens": seen[e],
                    "rank": {n: own[e] for n, own in ranks.items()},
                    "error": {n: own[e] for n, own in error.items()},
                }
                for e in range(block.num_experts)
            ],
            "operations_per_token": module.operations(load) / max(1, load.tokens),
            "dense_operations_per_token": dense / max(1, load.tokens),
        }

    # --- inside ------------------------------------------------------------------------------------------------

    def _sizes(self, layer: LayerShape) -> Sizes:
        item = getattr(torch, self._dtype(layer)).itemsize
        return Sizes(self._method, layer, item, self.options.step, self.options.sparse)

    def _dtype(self, layer: LayerShape) -> str:
        return self.options.dtype or ("float32" if layer.weight_bytes == 4 else "bfloat16")

    def _all_at(self, layer: LayerShape, place: int) -> dict[str, list[int]]:
        """Every expert at the first, or the last, of what it may get."""
        sizes = self._sizes(layer)
        return {name: [sizes.ranks(name)[place]] * layer.num_experts for name in sizes.names}

    def _bases(self, layer: LayerShape) -> int:
        return self._bases_of(layer.num_experts)

    def _bases_of(self, experts: int) -> int:
        bases = self.options.bases or max(1, experts // 4)
        if bases > experts:
            raise RecipeError(f"{self.name}: {bases} bases are more than the {experts} experts that they are mixed for")
        return bases

    def _budget(self, shape: ModelShape) -> int:
        if self.options.keep is not None:
            return int(self.options.keep * shape.expert_bytes)
        assert self.options.size is not None
        return parse_bytes(self.options.size) - shape.other_bytes

    def _share(self, shape: ModelShape) -> float:
        return self._budget(shape) / shape.expert_bytes

    def _learned_split(self, layer: int, weights: Any) -> Split:
        split = Split({})
        for name, matrix in weights.matrices():
            split.base[name] = self.learned[layer][f"base_{name}"].to(matrix)
            split.rest[name] = matrix - split.base[name]
        return split


def _settle(split: Split, weights: Any, dtype: torch.dtype) -> None:
    """Round bases to what is stored: the rest then holds what rounding lost."""
    for name, base in split.base.items():
        split.base[name] = base.to(dtype)
        split.rest[name] = getattr(weights, name) - split.base[name].float()


def _terms(name: str, weights: Any, split: Split, ranks: list[int], found: Found, dtype: torch.dtype) -> list[Term]:
    """The terms of a projection: what is dense, shared or own; factors; neurons kept whole."""
    matrix: Tensor = getattr(weights, name)
    dense = [e for e, rank in enumerate(ranks) if rank == DENSE]
    shared = [split.base[name][None]] if name in split.base else []
    terms: list[Term] = []
    if dense or shared:
        place = {e: len(shared) + i for i, e in enumerate(dense)}
        group = [place.get(e, 0 if shared else -1) for e in range(len(ranks))]
        own = matrix[torch.tensor(dense, device=matrix.device)] if dense else matrix[:0]
        terms.append(Base.holding(torch.cat([*shared, own.to(dtype)]), group))
    if len(dense) < len(ranks):
        terms.append(found.terms[name])
    if name in split.index:
        terms.append(Sparse.holding(matrix.to(dtype), split.index[name], "columns" if name == "down" else "rows"))
    return terms


def _told(ranks: dict[str, list[int]]) -> dict[str, Any]:
    """Mean rank of each projection, and how many matrices stay dense."""
    told: dict[str, Any] = {}
    for name, own in ranks.items():
        low = [rank for rank in own if rank != DENSE]
        told[f"{name}_rank"] = sum(low) / len(low) if low else None
        told[f"{name}_dense"] = len(own) - len(low)
    return told

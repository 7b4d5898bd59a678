"""Experts whose projections are sums of factors: the module that runs them, and that the `native` format stores.

Each projection (gate, up, down) of all experts of a layer is a sum of terms (terms.py): a shared dense base, low-rank
products, mixed bases, some whole rows or columns. While running, no dense matrix is made: rows go through the factors.
`weights()` multiplies them out, for looking at.

docs/format.md specifies the tensors byte by byte.

Letters: E experts, O/K output and input features of a projection, R rows by expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_compress.model import FusedExperts, MoEBlock
from moe_compress.model.dispatch import Dispatch
from moe_compress.quant.packed import PackedExperts, PackedProjection, fused_module

from .terms import Load, Term, build_term


class FactoredProjection(PackedProjection):
    """One projection of all experts of a layer: a sum of terms, at least one, at most one of a kind."""

    def __init__(self, terms: Sequence[Term], reads_tokens: bool):
        """`reads_tokens`: whether rows of one token are all the same, as those of gate and up are."""
        nn.Module.__init__(self)
        first = terms[0]
        self.out_features, self.in_features = first.out_features, first.in_features
        self.assignment = ["factored"] * first.experts
        self.reads_tokens = reads_tokens
        self.kinds = [term.kind for term in terms]
        for term in terms:
            self.add_module(term.kind, term)

    @property
    def terms(self) -> list[Term]:
        """Its terms."""
        return [self.get_submodule(kind) for kind in self.kinds]  # type: ignore[misc]

    def matrices(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The matrices of some experts, multiplied out in float32 or better: [len(experts), O, K]."""
        wide = torch.promote_types(dtype, torch.float32)
        parts = [term.matrices(experts, wide) for term in self.terms]
        return sum(parts[1:], start=parts[0]).to(dtype)

    def linear(self, input_RK: Tensor, dispatch: Dispatch) -> Tensor:
        """Each expert's rows through its own factors → [R, O]."""
        total: Tensor | None = None
        for term in self.terms:
            part = term(input_RK, dispatch, self.reads_tokens)
            total = part if total is None else total + part
        assert total is not None
        return total


class FactoredExperts(PackedExperts):
    """Experts in factored form; otherwise like `PackedExperts`."""

    kind = "factored"

    def describe(self) -> dict[str, Any]:
        """JSON from which `build_factored` rebuilds the module."""
        projections: dict[str, Any] = self.projections
        return {
            "projections": {
                name: {
                    "out_features": p.out_features,
                    "in_features": p.in_features,
                    "terms": [term.describe() for term in p.terms],
                }
                for name, p in projections.items()
            },
            "num_experts": self.num_experts,
            "biases": {n: str(p.dtype).removeprefix("torch.") for n, p in self._parameters.items() if p is not None},
        }

    def operations(self, load: Load) -> int:
        """Multiply-adds of the projections for a load; dense experts take `load.rows` · (weights of one expert)."""
        projections: dict[str, Any] = self.projections
        return sum(term.operations(load) for p in projections.values() for term in p.terms)


def build_factored(block: MoEBlock, layout: Mapping[str, Any]) -> FactoredExperts:
    """The module that `describe` described, for a block's experts, tensors on the meta device."""
    count = int(layout["num_experts"])
    projections = {}
    biases = {}
    for name, entry in layout["projections"].items():
        size = entry["out_features"], entry["in_features"]
        terms = [build_term(values, count, *size) for values in entry["terms"]]
        projections[name] = FactoredProjection(terms, name != "down")
        if f"{name}_bias" in layout["biases"]:
            dtype = getattr(torch, layout["biases"][f"{name}_bias"])
            biases[f"{name}_bias"] = torch.empty(count, size[0], dtype=dtype, device="meta")
    return FactoredExperts(fused_module(block), dict(projections), biases)


def factor_experts(block: MoEBlock, terms: Mapping[str, Sequence[Term]]) -> FactoredExperts:
    """Replace a block's fused experts by terms per projection ("gate", "up", "down"). Returns the module in place."""
    original = fused_module(block)
    biases = {n: v.clone() for n, v in FusedExperts(original).weights().items() if n.endswith("_bias")}
    projections = {name: FactoredProjection(own, name != "down") for name, own in terms.items()}
    module = FactoredExperts(original, dict(projections), biases)
    block.replace_experts(module)
    return module

"""Matrices beside the routed experts as units of `quantize.mixed`: which, and how they are packed.

A unit is one matrix, or those that servers join (q, k and v; gate and up) where the target wants it. What a width
costs: matrix_error.py.

Letters: O/K output and input features, M matrices, U units, B widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_compress.budget.integer import Ints
from moe_compress.calib.collect import Profile
from moe_compress.errors import RecipeError
from moe_compress.export.targets import Target
from moe_compress.model.beside import OUTER, Matrix
from moe_compress.model.shape import ModelShape
from moe_compress.passes import Changed

from .allocate import Choices
from .gptq import gptq
from .grid import Quantized, dequantize
from .hqq import half_quadratic
from .matrix_error import MatrixError, included, rows_at_once
from .options import MixedOptions
from .packed_linear import packed
from .rtn import output_error, round_to_nearest
from .solver import SolverOptions
from .stack import Stack


@dataclass(frozen=True)
class Beside:
    """What `quantize.mixed` does beside the experts, by its options and for a target."""

    options: MixedOptions
    target: Target

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of matrices that are included."""
        return frozenset(self.options.include) - {"experts"}

    @property
    def statistic(self) -> MatrixError | None:
        """What costs are read from; None where nothing is included or nobody asks what a width costs."""
        if not self.kinds or self.options.allocation == "uniform":
            return None
        options = self.options
        return MatrixError(
            kinds=tuple(sorted(self.kinds)),
            bits=tuple(options.dense_widths),
            group_size=options.group_size,
            symmetric=options.symmetric,
            smoothing={**options.smoothing, "smooth": "input"} if options.smooths_input else {},
        )

    def matrices(self, shape: ModelShape) -> dict[int, list[Matrix]]:
        """What is included: decoder layer, or OUTER → matrices."""
        found = {i: included(own, self.kinds, self.options.group_size) for i, own in shape.matrices.items()}
        return {i: own for i, own in found.items() if own}

    def check(self, step: str, shape: ModelShape) -> None:
        """Raise RecipeError for what the target can't load, and where nothing is found."""
        if not self.kinds:
            return
        options = self.options
        if foreign := sorted(self.kinds - set(self.target.packs)):
            raise RecipeError(
                f"{step}: the target {self.target.name!r} loads no packed {' and no '.join(foreign)}: take "
                "them out of `include`"
            )
        self.target.check_grid(step, options.dense_widths, options.group_size, options.symmetric, "dense_widths")
        if not self.matrices(shape):
            raise RecipeError(
                f"{step}: nothing in this model is {' or '.join(sorted(self.kinds))} and can be packed in groups of "
                f"{options.group_size}: leave `include` out, or change `group_size`"
            )

    def weights(self, shape: ModelShape) -> int:
        """How many weights are included."""
        return sum(m.weights for own in self.matrices(shape).values() for m in own)

    def dense_bytes(self, shape: ModelShape) -> int:
        """Bytes of what is included, as the source holds it."""
        return sum(m.bytes for own in self.matrices(shape).values() for m in own)

    def packed_bytes(self, matrix: Matrix, bits: float) -> int:
        """Bytes of a matrix at a width."""
        return self.options.matrix_bytes(self.target, bits, matrix.rows, matrix.columns)

    def total(self, shape: ModelShape, bits: float) -> int:
        """Bytes of everything included, at one width."""
        return sum(self.packed_bytes(m, bits) for own in self.matrices(shape).values() for m in own)

    def forecast(self, shape: ModelShape, share: float) -> ModelShape:
        """Sizes with everything included at that share of what the largest width takes."""
        width = max(self.options.dense_widths)
        return shape.with_matrices(
            {
                i: [
                    replace(m, bytes=int(self.packed_bytes(m, width) * share), bits=width) if m in own else m
                    for m in all_
                ]
                for i, own in self.matrices(shape).items()
                for all_ in [shape.matrices[i]]
            }
        )

    def choices(self, profile: Profile) -> dict[int, Choices]:
        """Units of the program: decoder layer, or OUTER → what they may get."""
        assert self.statistic is not None
        widths = self.options.dense_widths
        found = {}
        for index, own in self.matrices(profile.shape).items():
            cost_MB = profile.of(index, self.statistic)["relative"].numpy()
            size_MB = np.array([[self.packed_bytes(m, b) for b in widths] for m in own], dtype=np.int64)
            unit_M = self._units(own)
            count = int(unit_M.max()) + 1
            cost_UB, size_UB = np.zeros((count, len(widths))), np.zeros((count, len(widths)), np.int64)
            np.add.at(cost_UB, unit_M, cost_MB)
            np.add.at(size_UB, unit_M, size_MB)
            found[index] = Choices(unit_M[:, None], cost_UB, size_UB, np.ones(cost_UB.shape, np.bool_))
        return found

    def decided(self, profile: Profile, column_U: Mapping[int, Ints] | None) -> dict[int, dict[str, dict[str, Any]]]:
        """`Plan.beside`; without a choice for every unit, everything gets the largest width."""
        widths = self.options.dense_widths
        plan: dict[int, dict[str, dict[str, Any]]] = {}
        for index, own in self.matrices(profile.shape).items():
            columns = np.full(len(own), len(widths) - 1) if column_U is None else column_U[index][self._units(own)]
            parts: dict[str, dict[str, Any]] = {"first": {}, "then": {}}
            for number, (matrix, column) in enumerate(zip(own, columns.tolist(), strict=True)):
                entry: dict[str, Any] = {"kind": matrix.kind, "bits": widths[column]}
                if self.statistic is not None and column_U is not None:
                    costs = profile.of(index, self.statistic)["relative"][number].tolist()
                    entry["costs"] = {str(b): cost for b, cost in zip(widths, costs, strict=True)}
                # What a block reads depends on its layer's attention.
                parts["first" if matrix.kind == "attention" or index == OUTER else "then"][matrix.path] = entry
            plan[index] = parts
        return plan

    def summary(self, shape: ModelShape, plan: Mapping[int, dict[str, dict[str, Any]]]) -> dict[str, Any]:
        """What `plan` makes of it, at a glance: bytes, and kind → width → how many matrices."""
        if not plan:
            return {}
        size = 0
        counts: dict[str, dict[str, int]] = {}
        for index, own in self.matrices(shape).items():
            decided = plan[index]["first"] | plan[index]["then"]
            for matrix in own:
                bits = decided[matrix.path]["bits"]
                size += self.packed_bytes(matrix, bits)
                kind = counts.setdefault(matrix.kind, dict.fromkeys(map(str, self.options.dense_widths), 0))
                kind[str(bits)] += 1
        return {"beside_bytes": size, "beside_per_width": counts}

    def notes(self, shape: ModelShape) -> list[str]:
        """What was asked for and stays as it is, and why."""
        group = self.options.group_size
        every = [m for own in shape.matrices.values() for m in own]
        lacking = [kind for kind in sorted(self.kinds) if not any(m.among(frozenset({kind})) for m in every)]
        notes = [f"this model has no {kind} that could be packed" for kind in lacking]
        whole = frozenset(m.path for own in self.matrices(shape).values() for m in own)
        uneven = {m.path for m in every if m.among(self.kinds)} - whole
        if uneven:
            notes.append(f"left as they are, because rows aren't whole groups of {group}: {', '.join(sorted(uneven))}")
        if self.kinds:
            reasons: dict[str, set[str]] = {}
            for path, reason in shape.kept.items():
                reasons.setdefault(reason, set()).add(".".join("*" if p.isdigit() else p for p in path.split(".")))
            notes += [f"left as they are: {', '.join(sorted(paths))}: {reason}" for reason, paths in reasons.items()]
        return notes

    def _units(self, matrices: list[Matrix]) -> Ints:
        """The number of the unit that each matrix belongs to."""
        names = [m.together if self.target.bits_per == "layer" else m.path for m in matrices]
        units: Ints = np.unique(names, return_inverse=True)[1].astype(np.int64)
        return units


def quantize_matrices(
    weights: Mapping[str, Tensor],
    decision: Mapping[str, Any],
    options: SolverOptions,
    moments: Mapping[str, Tensor] | None,
) -> dict[str, Changed]:
    """See `Pass.apply_beside`: GPTQ on what is read, matrices that read the same and have one width as one.

    Without moments, and outside the layers, by the method that needs no data: HQQ if it is asked for, round-to-nearest
    otherwise. Every report says which it was.
    """
    solver, quantize = ("hqq", half_quadratic) if options.method == "hqq" else ("rtn", round_to_nearest)
    together: dict[tuple[Any, float], list[str]] = {}
    for path in weights:
        reads = id(moments[path]) if moments is not None and path in moments else path
        together.setdefault((reads, decision[path]["bits"]), []).append(path)
    found: dict[str, Changed] = {}
    for (_, bits), paths in together.items():
        grid = options.grid(bits)
        if moments is None or paths[0] not in moments:
            for path in paths:
                weight = weights[path]
                quantized = quantize(weight, grid, search=options.search)
                report = {"solver": solver, "weight_error": _weight_error(quantized, weight)}
                found[path] = _changed(quantized, decision[path], report)
            continue
        hessian_KK = moments[paths[0]]
        stacked = torch.cat([weights[path].float() for path in paths])
        solved = gptq(
            stacked[None],
            hessian_KK[None],
            grid,
            damping=options.damping,
            sweeps=options.sweeps,
            search=options.search,
        )
        start = 0
        for path in paths:
            own = slice(start, start := start + len(weights[path]))
            quantized = _part(solved.quantized, own)
            report = {
                "solver": "gptq",
                "output_error": _output_error(quantized, stacked[own], hessian_KK),
                "damping": float(solved.damping_E[0]),
            }
            found[path] = _changed(quantized, decision[path], report)
    return {path: found[path] for path in weights}


def _changed(quantized: Quantized, decision: Mapping[str, Any], report: dict[str, Any]) -> Changed:
    alone = Quantized(
        quantized.codes[None],
        quantized.scale[None],
        None if quantized.zero is None else quantized.zero[None],
        quantized.grid,
    )
    stack = Stack.holding(alone)
    report = {**{k: v for k, v in decision.items() if k != "bits"}, **report}
    return Changed(quantized.grid.bits, lambda module, dtype: packed(module, stack, dtype), report)


def _part(quantized: Quantized, rows: slice) -> Quantized:
    zero = None if quantized.zero is None else quantized.zero[0, rows]
    return Quantized(quantized.codes[0, rows], quantized.scale[0, rows], zero, quantized.grid)


def _output_error(quantized: Quantized, weight_OK: Tensor, hessian_KK: Tensor) -> float:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ): squared error of the outputs on the text, relative to them."""
    change = (dequantize(quantized, torch.float32) - weight_OK)[None]
    whole = float(output_error(weight_OK[None], hessian_KK[None]).sum())
    return float(output_error(change, hessian_KK[None]).sum()) / whole if whole else 0.0


def _weight_error(quantized: Quantized, weight_OK: Tensor) -> float:
    """‖ΔW‖² / ‖W‖², some rows at a time."""
    change = whole = 0.0
    for start in range(0, len(weight_OK), step := rows_at_once(weight_OK)):
        rows = slice(start, start + step)
        zero = None if quantized.zero is None else quantized.zero[rows]
        part = Quantized(quantized.codes[rows], quantized.scale[rows], zero, quantized.grid)
        own = weight_OK[rows].double()
        change += float((dequantize(part, torch.float32) - own).square().sum())
        whole += float(own.square().sum())
    return change / whole if whole else 0.0

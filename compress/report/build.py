"""What a run records: sizes, scores before and after, what was done to every expert and why, what it took.

The keys are specified in docs/report.md and stay: other tools read them.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from moe_compress.engine import Outcome
from moe_compress.model.beside import OUTER
from moe_compress.model.shape import ModelShape

SCHEMA = 1
_PACKAGES = ("moe-compress", "torch", "transformers", "accelerate", "safetensors", "pulp", "lm-eval", "numpy", "scipy")


def sizes(shape: ModelShape) -> dict[str, Any]:
    """`bytes`, `expert_bytes` and `bits_per_weight` of a model."""
    return {
        "bytes": shape.total_bytes,
        "expert_bytes": shape.expert_bytes,
        "bits_per_weight": shape.bits_per_weight,
    }


def versions() -> dict[str, str]:
    """Versions of everything that decides about numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def layer_entries(before: ModelShape, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Per layer, and per expert that the source had: what each pass did to it.

    An expert is followed through renumbering: `slots` of a pass's report says where each went, −1 that it is gone.
    """
    entries = []
    for index, layer in before.layers.items():
        experts: list[dict[str, Any]] = [{"expert": e} for e in range(layer.num_experts)]
        slot = list(range(layer.num_experts))
        steps = []
        for outcome in outcomes:
            report = outcome.reports[index]
            told = report.get("experts")
            for entry, position in zip(experts, slot, strict=True):
                if position >= 0 and told is not None:
                    entry[outcome.name] = told[position]
            moved = report.get("slots")
            if moved is not None:
                slot = [moved[p] if p >= 0 else -1 for p in slot]
            own = {k: v for k, v in report.items() if k not in ("experts", "slots", "beside")}
            steps.append({"pass": outcome.name, **own})
        for entry, position in zip(experts, slot, strict=True):
            entry["slot"] = position if position >= 0 else None
        after = outcomes[-1].shape.layers[index] if outcomes else layer
        entries.append(
            {
                "layer": index,
                "num_experts_before": layer.num_experts,
                "num_experts": after.num_experts,
                "expert_bytes_before": layer.bytes,
                "expert_bytes": after.bytes,
                "passes": steps,
                "experts": experts,
            }
        )
    return entries


def beside_entries(before: ModelShape, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every matrix beside the experts that a pass packed: where it is, what it takes, what was done to it and why."""
    sizes_before = {(i, m.path): m.bytes for i, own in before.matrices.items() for m in own}
    return [
        {
            "layer": index if index != OUTER else None,
            "matrix": path,
            "pass": outcome.name,
            "bytes_before": sizes_before[index, path],
            **values,
        }
        for outcome in outcomes
        for index, report in sorted(outcome.reports.items())
        for path, values in (report.get("beside") or {}).items()
    ]


def build(
    *,
    recipe: dict[str, Any],
    before: ModelShape,
    outcomes: Sequence[Outcome],
    calibration: dict[str, Any] | None,
    scores_before: dict[str, Any],
    scores_after: dict[str, Any],
    stages: list[dict[str, Any]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """The whole report as JSON values.

    Args:
        recipe: as it ran.
        before: sizes of the source.
        outcomes: of the passes.
        calibration: account of the text.
        scores_before, scores_after: `perplexity`, `tasks`, `generation`, `experts_per_token`, and for the result `kl`,
            `agreement` and `routing`.
        stages: seconds and memory.
        facts: further keys (`format`, `verification`, …).
    """
    after = outcomes[-1].shape if outcomes else before
    unscored: dict[str, Any] = {"perplexity": {}, "tasks": {}, "generation": {}, "experts_per_token": {}}
    compared: dict[str, Any] = {"kl": {}, "agreement": {}, "routing": {}}
    return {
        "schema": SCHEMA,
        "recipe": recipe,
        "seed": recipe.get("seed", 0),
        "versions": versions(),
        **facts,
        "before": {**sizes(before), **unscored, **scores_before},
        "after": {**sizes(after), **unscored, **compared, **scores_after},
        "passes": [
            {"name": o.name, "options": o.options, "summary": o.plan.summary, "notes": o.plan.notes, **sizes(o.shape)}
            for o in outcomes
        ],
        "calibration": calibration,
        "stages": stages,
        "layers": layer_entries(before, outcomes),
        "beside": beside_entries(before, outcomes),
    }

"""What `inspect --calibrate` and `domains` print."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from moe_compress.analysis import analyse, opened
from moe_compress.domains import FILE, Patterns, find_patterns
from moe_compress.errors import InputError
from moe_compress.feasibility import usual_length
from moe_compress.model import MoEModel, read_config
from moe_compress.model.shape import model_shape

from .show import console

_LENGTH = 512


def analysed(
    model: str,
    text: Sequence[str],
    sequences: int,
    length: int | None,
    segment: int,
    plots: str | None,
    traces: str | None,
) -> dict[str, Any]:
    """What `analyse` finds, as JSON values; plots and traces are written where they are asked for."""
    if traces and not os.access(Path(traces).absolute().parent, os.W_OK):
        raise InputError(f"--traces {traces} can't be written: no such folder, or no right to write there")
    if plots:
        import moe_compress.report.plots as drawing

        drawing.check()
    calibration = {
        "sources": list(text),
        "sequences": sequences,
        "length": length or usual_length(read_config(model), _LENGTH),
    }
    calibration["allow_fewer"] = True
    found = analyse(model, calibration, segment=segment, traces=traces is not None)
    values = found.to_json()
    if traces:
        found.save_traces(traces)
        values["traces"] = traces
    if plots:
        values["plots"] = [str(path) for path in found.plot(plots)]
    return values


def show_analysis(found: dict[str, Any]) -> None:
    """The same for people."""
    console.print(f"\non {found['tokens']} tokens in {found['sequences']} sequences:")
    table = Table("layer", "load cv", "gini", "busiest", "unseen", "top-1", "entropy", "SRP", box=None, pad_edge=False)
    for layer in found["layers"]:
        entropy = layer["router_entropy"]
        table.add_row(
            str(layer["layer"]),
            f"{layer['load_cv']:.2f}",
            f"{layer['load_gini']:.2f}",
            f"{layer['busiest']}: {layer['busiest_share']:.1%}",
            str(layer["unseen"]),
            f"{layer['top1_share']:.0%}",
            "–" if entropy is None else f"{entropy:.2f}",
            _share(layer["srp"]),
        )
    console.print(table)
    console.print()
    table = Table(
        "layer", "max |x|", "max |a|", "max |f|", "median", "max |h|", "super", "pairs", box=None, pad_edge=False
    )
    for layer in found["layers"]:
        hidden = layer["max_hidden"]
        pairs = [f"{pair['experts'][0]}+{pair['experts'][1]} ({pair['strength']:.2f})" for pair in layer["pairs"][:2]]
        table.add_row(
            str(layer["layer"]),
            f"{layer['max_input']:.4g}",
            f"{layer['max_neuron']:.4g}",
            f"{layer['max_output']:.4g} ({layer['max_output_expert']})",
            f"{layer['median_output']:.4g}",
            "–" if hidden is None else f"{hidden:.4g}",
            ", ".join(map(str, layer["super_experts"])) or "–",
            ", ".join(pairs) or "–",
        )
    console.print(table)
    console.print(
        f"\none set of experts per {found['segment']} tokens predicts routing with F1 {_share(found['srp'])} (SRP)"
    )
    for ratio, rate in found["sch"].items():
        console.print(
            f"a cache of {ratio} · top-k experts per layer has {rate:.1%} of what tokens ask for (SCH; least recently "
            f"used: {found['lru'][ratio]:.1%})"
        )
    for path in [*found.get("plots", []), *([found["traces"]] if "traces" in found else [])]:
        console.print(path, markup=False)


def find_domains(
    model: str,
    calibrate: Sequence[str],
    domain_field: str,
    criterion: str,
    keep: float,
    sequences: int,
    length: int | None,
    output: str | None,
) -> tuple[Patterns, MoEModel, Path]:
    """Patterns of domains, the model, and the file that they are in."""
    view = opened(model)
    file = Path(output) if output else view.source.folder / FILE
    if not os.access(file.absolute().parent, os.W_OK):
        raise InputError(f"{file} can't be written: no such folder, or no right to write there; choose an --output")
    calibration = {
        "sources": [{"path": path, "domain_field": domain_field} for path in calibrate],
        "sequences": sequences,
        "length": length or usual_length(view.module.config, _LENGTH),
        "balance": True,
        "allow_fewer": True,
    }
    found = find_patterns(view, calibration, criterion=criterion, keep=keep)
    found.save(file)
    return found, view, file


def show_domains(found: Patterns, view: MoEModel, file: Path) -> None:
    """Which experts domains share, and where it is written."""
    shape = model_shape(view)
    kept = {d: {(i, e) for i, own in found.chosen(d, shape.layers).items() for e in own} for d in found.domains}
    table = Table("domain", "tokens", *found.domains, box=None, pad_edge=False)
    for domain in found.domains:
        shared = [f"{len(kept[domain] & kept[other]) / len(kept[domain]):.0%}" for other in found.domains]
        table.add_row(domain, str(found.tokens[domain]), *shared)
    console.print(f"experts kept for a domain ({found.keep:.0%}, by {found.criterion}), and how many it shares:")
    console.print(table)
    for index, experts in found.super_experts.items():
        console.print(f"layer {index}: super experts {experts} stay for every domain")
    console.print(f"domains: {file}", markup=False)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

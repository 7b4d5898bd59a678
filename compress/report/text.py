"""The same report for people: a table on the terminal, and report.md beside the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_compress.checkpoint.atomic import write_json, write_text
from moe_compress.units import show_bytes

Rows = list[tuple[str, str, str]]

# What `generation` holds → how it is called and written.
_WRITTEN = {
    "repetition": "greedy text: repeated n-grams",
    "looping": "greedy text: continuations that loop",
    "tokens": "greedy text: tokens",
    "as_original": "greedy text: tokens as the original's",
}
_SHOWN = {"repetition": "{:.1%}", "looping": "{:.1%}", "tokens": "{:.1f}", "as_original": "{:.1f}"}


def headline(report: dict[str, Any]) -> Rows:
    """(what, before, after) of sizes and every score."""
    before, after = report["before"], report["after"]
    rows: Rows = [
        ("checkpoint", show_bytes(before["bytes"]), show_bytes(after["bytes"])),
        ("experts", show_bytes(before["expert_bytes"]), show_bytes(after["expert_bytes"])),
        ("bits per expert weight", f"{before['bits_per_weight']:.3g}", f"{after['bits_per_weight']:.3g}"),
    ]
    source = report.get("source", {})
    if source.get("quantization"):
        rows.insert(1, (f"source as stored ({source['quantization']})", show_bytes(source["bytes"]), ""))
    if beside := report.get("beside"):
        old_bytes, new_bytes = (show_bytes(sum(m[key] for m in beside)) for key in ("bytes_before", "bytes"))
        rows.append(("packed beside the experts", old_bytes, new_bytes))
    used = [side.get("experts_per_token", {}).get("mean") for side in (before, after)]
    if used[1] is not None:
        rows.append(("experts per token", "" if used[0] is None else f"{used[0]:.3f}", f"{used[1]:.3f}"))
    for name, value in after["perplexity"].items():
        old = before["perplexity"].get(name)
        rows.append((f"perplexity {name}", "" if old is None else f"{old:.4g}", f"{value:.4g}"))
    for name in after["kl"]:
        rows.append((f"KL to original {name}", "", f"{after['kl'][name]:.4f}"))
    for name in after["agreement"]:
        rows.append((f"same top token {name}", "", f"{after['agreement'][name]:.1%}"))
    for name, value in after.get("generation", {}).items():
        old = before.get("generation", {}).get(name)
        show = _SHOWN[name]
        rows.append((_WRITTEN[name], "" if old is None else show.format(old), show.format(value)))
    for task, metrics in after["tasks"].items():
        for metric, value in metrics.items():
            old = before["tasks"].get(task, {}).get(metric)
            rows.append((f"{task} {metric}", "" if old is None else f"{old:.3f}", f"{value:.3f}"))
    return rows


def write_reports(folder: Path, report: dict[str, Any]) -> None:
    """report.md and report.json of a result, in its folder."""
    write_text(folder / "report.md", markdown(report))
    write_json(folder / "report.json", report)  # last: where it is, nothing is left to do


def markdown(report: dict[str, Any]) -> str:
    """report.md."""
    lines = [f"# {report['recipe'].get('model', 'model')} → {report['recipe'].get('output', 'in memory')}", ""]
    lines += _table(("", "before", "after"), headline(report))
    lines += ["", "## What was done", ""]
    for number, step in enumerate(report["passes"]):
        size = f"{show_bytes(step['expert_bytes'])} of experts, {step['bits_per_weight']:.3g} bits per weight"
        lines.append(f"- **{step['name']}** → {size}")
        tables = {k: v for k, v in step["summary"].items() if isinstance(v, list) and v and isinstance(v[0], dict)}
        lines += [f"  - {key}: {_plain(value)}" for key, value in step["summary"].items() if key not in tables]
        lines += [f"  - {note}" for note in (*step["notes"], *_refitted(report["layers"], number))]
        for rows in tables.values():
            lines += ["", *_table(list(rows[0]), [[_plain(value) for value in row.values()] for row in rows]), ""]
    lines += ["", "## Layers", ""]
    lines += _table(
        ("layer", "experts before", "experts", "bytes before", "bytes", "former choices still made"),
        [
            (
                str(layer["layer"]),
                str(layer["num_experts_before"]),
                str(layer["num_experts"]),
                show_bytes(layer["expert_bytes_before"]),
                show_bytes(layer["expert_bytes"]),
                _kept_choices(layer),
            )
            for layer in report["layers"]
        ],
    )
    if beside := report.get("beside"):
        lines += ["", "## Beside the experts", ""]
        lines += _table(("layer", "matrices and their bits", "bytes before", "bytes"), _by_place(beside))
    if report.get("calibration"):
        lines += ["", "## Calibration", ""]
        lines += _calibration(report["calibration"])
    if report.get("verification"):
        checked = report["verification"]
        lines += ["", "## Verification", ""]
        lines.append(
            f"- {checked['tensors']} tensors ({show_bytes(checked['bytes'])}) read back and equal; "
            f"{checked['loader']}; logits within {checked['distance']:.2g} of their spread "
            f"(allowed {checked['tolerance']:g})"
        )
    lines += ["", "## What it took", ""]
    lines += _table(
        ("stage", "seconds", "peak memory"),
        [(s["name"], f"{s['seconds']:.1f}", show_bytes(s["peak_memory_bytes"])) for s in report["stages"]],
    )
    lines += ["", "Versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()), ""]
    return "\n".join(lines)


def _calibration(told: dict[str, Any]) -> list[str]:
    """A line for each key that says something, and one for each source."""

    def said(values: dict[str, Any]) -> list[str]:
        return [
            f"{key.replace('_', ' ')}: {_plain(value)}"
            for key, value in values.items()
            if key != "sources" and value is not None and value not in ("", [], {})
        ]

    return [f"- {line}" for line in (*said(told), *(", ".join(said(source)) for source in told.get("sources", [])))]


def _by_place(beside: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """One row per layer."""
    places: dict[str, list[dict[str, Any]]] = {}
    for matrix in beside:
        places.setdefault("outside" if matrix["layer"] is None else str(matrix["layer"]), []).append(matrix)
    return [
        (
            place,
            ", ".join(f"{m['matrix']} {m['bits']}" for m in own),
            show_bytes(sum(m["bytes_before"] for m in own)),
            show_bytes(sum(m["bytes"] for m in own)),
        )
        for place, own in places.items()
    ]


def _refitted(layers: Sequence[dict[str, Any]], number: int) -> list[str]:
    """What solving down projections again did in pass `number`; where that, or folding router rows, wasn't done."""
    own = {entry["layer"]: entry["passes"][number] for entry in layers}
    told = {index: report.get("refit") for index, report in own.items()}
    done = [refit for refit in told.values() if refit and "skipped" not in refit]
    lines = [f"layer {i}: not refitted: {refit['skipped']}" for i, refit in told.items() if refit and refit not in done]
    routers = {i: report["router"] for i, report in own.items() if isinstance(report.get("router"), dict)}
    lines += [f"layer {i}: router: {router['skipped']}" for i, router in routers.items()]
    if done:
        before, after = (sum(refit[key] for refit in done) / len(done) for key in ("before", "after"))
        evened = [i for i, refit in told.items() if refit and refit.get("tokens") == "evened"]
        line = (
            f"down projections of {len(done)} layers solved again: squared error of what they put out, relative, "
            f"{before:.3g} → {after:.3g} on the calibration text"
        )
        if evened:
            line += f"; in layers {evened} tokens with large outputs counted less, as they would have spoilt the others"
        lines.insert(0, line)
    return lines


def _kept_choices(layer: dict[str, Any]) -> str:
    shares = [step["routing"]["kept_choices"] for step in layer["passes"] if "routing" in step]
    return ", ".join(f"{share:.1%}" for share in shares)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)

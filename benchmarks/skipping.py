"""Experts per token against what is lost, for every way to skip them, on the demo checkpoint: a table and a plot.

    python benchmarks/skipping.py [--tokens 2000] [--plot docs/images/skipping.svg] [--only NAME]

Each point is a fresh copy of the model with one pass, calibrated to an average; what counts is the average on the six
held-out texts, as counted there, and the mean over them of the nats per token above the original's. The plot needs
matplotlib.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from demo_model import calibration_text, compressed, load_demo, mean_kl, mean_lost, six_texts


def methods(top_k: int) -> dict[str, list[dict[str, Any]]]:
    """Name → one pass per point of its curve."""
    steps = [1 + i / 4 for i in range(1, 4 * (top_k - 1))]
    whole = range(1, top_k)
    curves: dict[str, tuple[str, dict[str, Any], Any]] = {
        "uniform top-k": ("skip.top_k", {"layers": "uniform"}, whole),
        "uniform top-k, not renormalised": ("skip.top_k", {"layers": "uniform", "renormalize": False}, whole),
        "per layer, error on text": ("skip.top_k", {"layers": "error"}, steps),
        "per layer, random inputs (LExI)": ("skip.top_k", {"layers": "random"}, steps),
        "ratio (NAEE)": ("skip.ratio", {}, steps),
        "ratio, not renormalised": ("skip.ratio", {"renormalize": False}, steps),
        "ratio, 2% protected by norm": ("skip.ratio", {"protect": "norm"}, steps),
        "ratio, 2% protected by attention": ("skip.ratio", {"protect": "attention"}, steps),
        "ratio, 10% protected by norm": ("skip.ratio", {"protect": "norm", "protected": 0.1}, steps[:2]),
        "ratio, 10% protected by attention": ("skip.ratio", {"protect": "attention", "protected": 0.1}, steps[:2]),
        "top-p": ("skip.top_p", {}, steps),
        "learned (OTP)": ("skip.learned", {}, steps),
    }
    found = {
        name: [{step: {**options, "experts_per_token": average}} for average in averages]
        for name, (step, options, averages) in curves.items()
    }
    for overflow in ("drop", "reroute"):
        found[f"capacity, {overflow}"] = [
            {"skip.capacity": {"factor": factor, "overflow": overflow}} for factor in (0.75, 1.0, 1.5)
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of each text")
    parser.add_argument("--plot", type=Path, help="file of the plot")
    parser.add_argument("--only", help="methods whose name contains this")
    arguments = parser.parse_args()
    tokenizer, original = load_demo()
    calibration = calibration_text(tokenizer, 64)
    curves: dict[str, list[tuple[float, float]]] = {}
    print(f"{'':34}{'asked':>8}{'predicted':>11}{'counted':>9}{'nats above':>12}{'kl':>9}{'seconds':>9}")
    for name, passes in methods(original.config.num_experts_per_tok).items():
        if arguments.only and arguments.only not in name:
            continue
        for step in passes:
            start = time.perf_counter()
            report = compressed(original, tokenizer, [step], calibration, six_texts(arguments.tokens)).report
            loss = mean_lost(report)
            used = report["after"]["experts_per_token"]["mean"]
            (options,) = step.values()
            asked = options.get("experts_per_token") or options["factor"]
            print(
                f"{name:34}{asked:8.2f}{report['passes'][0]['summary']['experts_per_token']:11.3f}{used:9.3f}"
                f"{loss:+12.4f}{mean_kl(report):9.4f}{time.perf_counter() - start:9.1f}",
                flush=True,
            )
            curves.setdefault(name, []).append((used, loss))
    if arguments.plot is not None:
        draw(curves, original.config.num_experts_per_tok, arguments.plot)


def draw(curves: dict[str, list[tuple[float, float]]], top_k: int, file: Path) -> None:
    """All curves in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "moe-compress"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*sorted(points), strict=True), "osv^Dx+*P<>"[number % 11] + "-", label=name, lw=1, ms=4)
    axes.set_xlabel(f"experts per token really executed, of {top_k}")
    axes.set_ylabel("nats per token above the original")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    print(f"plot: {file}")


if __name__ == "__main__":
    main()

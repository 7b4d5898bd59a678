"""Quantizers and allocators on the demo checkpoint: the same bytes in each column, several calibration seeds.

    python benchmarks/quantization_table.py solvers|allocators|all [--seeds 3] [--tokens 20000] [--tasks 100]
                                            [--only TEXT …] [--columns C …] [--cells FILE] [--print]

Every cell is a fresh copy of the demo model, compressed by what `moe_compress.compress` offers, scored on the six
held-out texts (and, with --tasks N, on the first N items of the six tasks). Cells are kept in a file as they are done,
so a run that was interrupted goes on, and `--print` prints what is there. Numbers are mean ± standard deviation over
the seeds of the mean over the six texts of the nats per token lost against the original.
"""

from __future__ import annotations

import argparse
from typing import Any

from cells import Wanted, add_arguments, table

GROUP = 64

# Bits a weight really takes at group 64: codes, and a 16-bit scale per group. Ternary rows are whole words of 20 codes.
COLUMNS: dict[str, float] = {"8": 8.25, "4": 4.25, "3": 3.25, "2": 2.25, "1.58": 1.92, "1": 1.25}
WIDTHS: dict[str, float] = {"8": 8, "4": 4, "3": 3, "2": 2, "1.58": 1.58, "1": 1}
# GPTQ as its paper has it, but for the scales, which are fitted (see gptq.py).
PLAIN: dict[str, Any] = {"hessian": "plain", "compensate": False, "sweeps": 0}
SOLVERS: dict[str, dict[str, Any]] = {
    f"{name}{rotated}": {**options, "rotate": rotate}
    for name, options in (
        ("RTN", {"method": "rtn"}),
        ("HQQ", {"method": "hqq"}),
        ("GPTQ", PLAIN),
        ("GPTQ, gate-weighted (MoEQuant)", {**PLAIN, "hessian": "gate"}),
        ("GPTQ, g², compensated, polished (default)", {}),
    )
    for rotated, rotate in (("", "none"), (", rotated", "down"), (", rotated both", "both"))
    if rotate != "both" or not options
}
SOLVERS |= {
    "RTN, smoothed": {"method": "rtn", "smooth": "neurons"},
    "HQQ, smoothed": {"method": "hqq", "smooth": "neurons"},
    "GPTQ, g², compensated, polished (default), smoothed": {"smooth": "neurons"},
    "RTN, input smoothed": {"method": "rtn", "smooth": "input"},
    "RTN, input smoothed, largest": {"method": "rtn", "smooth": "input", "smooth_merge": "max"},
    "GPTQ, g², compensated, polished (default), input smoothed": {"smooth": "input"},
    "GPTQ, g², compensated, polished (default), both smoothed": {"smooth": "both"},
    "RTN, routers healed": {"method": "rtn"},
    "GPTQ, g², compensated, polished (default), routers healed": {},
}
ALLOCATORS: dict[str, dict[str, Any]] = {
    "uniform": {"allocation": "uniform"},
    "random": {"cost": "random"},
    "frequency": {"cost": "frequency"},
    "block importance": {"cost": "block_importance"},
    "PMQ, per layer": {"cost": "pmq", "scope": "layer"},
    "PMQ": {"cost": "pmq"},
    "PMQ as its code": {"cost": "pmq", "pmq_variant": "code"},
    "EdgeMoE": {"preset": "edgemoe", "widths": [1, 2, 3, 4, 8]},
    "outlier": {"cost": "outlier"},
    "AlphaQ, gamma 1": {"cost": "alphaq"},
    "AlphaQ, gamma 10": {"cost": "alphaq", "alphaq_gamma": 10},
    "MxMoE": {"preset": "mxmoe", "widths": [1, 2, 3, 4, 8]},
    "squared, experts, no gain": {"cost": "squared", "unit": "expert", "solver_gain": "none"},
    "relative, experts, no gain, per layer": {"unit": "expert", "solver_gain": "none", "scope": "layer"},
    "relative, experts, no gain": {"unit": "expert", "solver_gain": "none"},
    "relative, experts": {"unit": "expert"},
    "relative, projections": {"unit": "projection"},
    "relative, layers": {"unit": "layer"},
    "relative, no gain": {"solver_gain": "none"},
    "relative, per layer": {"scope": "layer"},
    "relative (default)": {},
    "relative (default), rotated": {"rotate": "down"},
    "relative (default), smoothed": {"smooth": "neurons"},
    "relative, low rank": {"low_rank": {"ranks": [0, 2, 4, 8]}},
    "relative, low rank, one width": {"widths": [2], "low_rank": {"ranks": [0, 1, 2, 4, 8, 16]}},
    "relative, low rank, one width, two rounds": {
        "widths": [2],
        "low_rank": {"ranks": [0, 1, 2, 4, 8, 16], "rounds": 2},
    },
    "relative, low rank, one width, shared 2": {
        "widths": [2],
        "low_rank": {"ranks": [0, 1, 2, 4, 8, 16], "shared": 2},
    },
    "relative, gate and up free": {"tie_gate_up": False},
    "relative, widths 1 to 6 and 8": {"widths": [1, 2, 3, 4, 5, 6, 8]},
    "relative, greedy": {"allocation": "greedy"},
    "gram": {"cost": "gram"},
    "GEMQ": {"preset": "gemq", "widths": [1, 2, 3, 4, 8]},
    "gradient": {"cost": "gradient"},
    "fisher": {"cost": "fisher"},
    "relative, gain solved": {"solver_gain": "solved"},
    "gram, gain solved": {"cost": "gram", "solver_gain": "solved"},
}
AVERAGES = (2.25, 2.5, 3.0, 3.5)


def wanted(which: str) -> Wanted:
    """Cells of one of the tables, or of both."""
    found = {}
    if which in ("solvers", "all"):
        for row, options in SOLVERS.items():
            for column, bits in WIDTHS.items():
                found[row, column] = {
                    "bits": COLUMNS[column] + 0.01,
                    "widths": [bits],
                    "allocation": "uniform",
                    "protect_super_experts": False,
                    "group_size": GROUP,
                    **options,
                }
    if which in ("allocators", "all"):
        for row, options in ALLOCATORS.items():
            for average in AVERAGES:
                found[row, f"{average} bits"] = {"bits": average, "group_size": GROUP, **options}
    return {
        cell: [{"quantize.mixed": options}, *([{"heal.router": {}}] if "healed" in cell[0] else [])]
        for cell, options in found.items()
    }


def settled(seed: int, passes: list[dict[str, Any]]) -> bool:
    """Whether nothing of a cell depends on the text, so that one seed says all."""
    options = passes[0]["quantize.mixed"]
    reads = options.get("method", "gptq") == "gptq" or options.get("smooth", "none") != "none"
    return bool(seed) and not reads and len(passes) == 1 and options["allocation"] == "uniform"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["solvers", "allocators", "all"])
    add_arguments(parser, "quantization")
    arguments = parser.parse_args()
    table(arguments, wanted(arguments.table), settled)


if __name__ == "__main__":
    main()

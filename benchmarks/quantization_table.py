"""Quantizers and allocators on the demo checkpoint: the same bytes in each column, several calibration seeds.

    python benchmarks/quantization_table.py solvers|allocators|all [--seeds 3] [--tokens 20000] [--tasks 100]
                                            [--only TEXT …] [--columns C …] [--cells out/quantization.jsonl] [--print]

Every cell is a fresh copy of the demo model, compressed by what `moe_compress.compress` offers, scored on the six
held-out texts (and, with --tasks N, on the first N items of the six tasks). Cells are kept in a file as they are done,
so a run that was interrupted goes on, and `--print` prints what is there. Numbers are mean ± standard deviation over
the seeds of the mean over the six texts of the nats per token lost against the original.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.calib.text import Calibration, TextSource, TokenBatches, load_batches
from moe_compress.evaluate.tasks import score_tasks
from moe_compress.progress import Monitor

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "moe-demo"
GROUP = 64

# Bits a weight really takes at group 64: codes, and a 16-bit scale per group. Ternary rows are whole words of 20 codes.
COLUMNS: dict[str, float] = {"8": 8.25, "4": 4.25, "3": 3.25, "2": 2.25, "1.58": 1.92, "1": 1.25}
WIDTHS: dict[str, float] = {"8": 8, "4": 4, "3": 3, "2": 2, "1.58": 1.58, "1": 1}
# GPTQ as its paper has it, but for the scales, which are fitted (see gptq.py).
PLAIN: dict[str, Any] = {"hessian": "plain", "compensate": False, "sweeps": 0}
SOLVERS: dict[str, dict[str, Any]] = {
    f"{name}{', rotated' if rotate else ''}": {**options, "rotate": "down" if rotate else "none"}
    for name, options in (
        ("RTN", {"method": "rtn"}),
        ("HQQ", {"method": "hqq"}),
        ("GPTQ", PLAIN),
        ("GPTQ, gate-weighted (MoEQuant)", {**PLAIN, "hessian": "gate"}),
        ("GPTQ, g², compensated, polished (default)", {}),
    )
    for rotate in (False, True)
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


def cells(table: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(row, column) → options of quantize.mixed."""
    found = {}
    if table in ("solvers", "all"):
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
    if table in ("allocators", "all"):
        for row, options in ALLOCATORS.items():
            for average in AVERAGES:
                found[row, f"{average} bits"] = {"bits": average, "group_size": GROUP, **options}
    return found


def calibration(seed: int, tokenizer: Any) -> TokenBatches:
    settings = Calibration(
        sources=[TextSource(path=str(ROOT / "demo/calibration.jsonl"), domain_field="domain")],
        length=256,
        sequences=128,
        balance=True,
        seed=seed,
    )
    return load_batches(settings, tokenizer, ROOT)


def measure(
    original: Any, tokenizer: Any, data: Any, options: dict[str, Any], tokens: int, tasks: int
) -> dict[str, Any]:
    start = time.perf_counter()
    result = moe_compress.compress(
        copy.deepcopy(original),
        tokenizer=tokenizer,
        passes=[{"quantize.mixed": options}],
        calibration=data,
        evaluate={"text": [str(ROOT / "demo/text/*.jsonl")], "length": 256, "max_tokens": tokens},
        monitor=Monitor(show=False),
    )
    before, after = result.report["before"], result.report["after"]
    lost = {name: math.log(value / before["perplexity"][name]) for name, value in after["perplexity"].items()}
    found = {
        "lost": lost,
        "kl": statistics.mean(after["kl"].values()),
        "bits": after["bits_per_weight"],
        "seconds": time.perf_counter() - start,
    }
    if tasks:
        with Monitor(show=False).stage("tasks") as progress:
            scores = score_tasks(
                result.model,
                tokenizer,
                ["demo"],
                task_path=ROOT / "demo/tasks",
                batch_size=16,
                limit=tasks,
                max_length=None,
                progress=progress,
            )
        found["acc"] = scores["demo"]["acc"]
    return found


def show(done: dict[str, dict[str, Any]], wanted: dict[tuple[str, str], Any]) -> None:
    columns = list(dict.fromkeys(column for _, column in wanted))
    for group in ([c for c in columns if "bits" not in c], [c for c in columns if "bits" in c]):
        rows = list(dict.fromkeys(row for row, column in wanted if column in group))
        if not group or not rows:
            continue
        print(f"\n{'nats above the original (tasks: accuracy)':42}" + "".join(f"{c:>24}" for c in group))
        for row in rows:
            line = f"{row:42}"
            for column in group:
                own = [v for v in done.values() if (v["row"], v["column"]) == (row, column)]
                if not own:
                    line += f"{'':>24}"
                    continue
                lost = [statistics.mean(v["lost"].values()) for v in own]
                spread = f"±{statistics.stdev(lost):.4f}" if len(lost) > 1 else ""
                accuracy = [v["acc"] for v in own if "acc" in v]
                shown = f" {statistics.mean(accuracy):.3f}" if accuracy else ""
                line += f"{statistics.mean(lost):>+10.4f}{spread:<8}{shown:>6}"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["solvers", "allocators", "all"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--tasks", type=int, default=0, help="items of each task; 0 leaves tasks out")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--columns", nargs="*", help="of these columns: 8, 4, 3, 2, 1.58, 1, '2.5 bits', …")
    parser.add_argument("--cells", type=Path, default=ROOT / "out" / "quantization.jsonl")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    arguments = parser.parse_args()
    wanted = {
        (row, column): options
        for (row, column), options in cells(arguments.table).items()
        if any(part in row for part in arguments.only) and column in (arguments.columns or [column])
    }
    done: dict[str, dict[str, Any]] = {}
    if arguments.cells.is_file():
        done = {(v := json.loads(line))["key"]: v for line in arguments.cells.read_text().splitlines()}
    if not arguments.print:
        arguments.cells.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        for seed in range(arguments.seeds):
            data = calibration(seed, tokenizer)
            for (row, column), options in wanted.items():
                if seed and options.get("method", "gptq") != "gptq" and options["allocation"] == "uniform":
                    continue  # nothing of it depends on the text
                key = json.dumps([row, column, seed, arguments.tokens, arguments.tasks, options])
                if key in done:
                    continue
                try:
                    found = measure(original, tokenizer, data, options, arguments.tokens, arguments.tasks)
                except moe_compress.MoeCompressError as error:
                    print(f"{row}, {column}: {error}", flush=True)
                    continue
                done[key] = {"key": key, "row": row, "column": column, "seed": seed, **found}
                with arguments.cells.open("a") as file:
                    file.write(json.dumps(done[key]) + "\n")
                print(
                    f"{row}, {column}, seed {seed}: {statistics.mean(found['lost'].values()):+.4f} "
                    f"at {found['bits']:.3f} bits, {found['seconds']:.0f} s",
                    flush=True,
                )
    show(done, wanted)


if __name__ == "__main__":
    main()

"""Peak memory and throughput on a synthetic checkpoint with Qwen3-30B-A3B's shapes.

    python benchmarks/synthetic_checkpoint.py SYNTHETIC-4 --layers 4
    python benchmarks/synthetic_checkpoint.py SYNTHETIC-8 --layers 8
    python benchmarks/memory.py SYNTHETIC-4 SYNTHETIC-8 [--only refitted]

Memory is anonymous resident memory (page cache and mapped files don't count), sampled every 20 ms. Whole models are not
loaded (`compute.memory`), so everything is streamed, verification too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = Path(sys.executable).parent / "moe-compress"

RUNS = {
    "inspect": None,
    "RTN 4 bits": "passes: [{quantize.mixed: {bits: 4.25, widths: [4], method: rtn, allocation: uniform, "
    "protect_super_experts: false}}]\n",
    "RTN 4 bits, no search": "passes: [{quantize.mixed: {bits: 4.25, widths: [4], method: rtn, allocation: uniform, "
    "protect_super_experts: false, search: none}}]\n",
    **{
        f"REAP 25%{', refitted' if refit else ''}": f"passes: [{{prune.experts: {{keep: 0.75, refit: {refit}}}}}]\n"
        f"target: transformers\ncalibration: {{sources: {ROOT}/demo/calibration.jsonl, sequences: 16, length: 256, "
        "batch_size: 4}\n"
        for refit in (False, True)
    },
}


def measured(command: list[str]) -> tuple[float, float]:
    """(peak anonymous memory in GB, seconds)."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        except OSError:
            pass
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.stderr.read() if process.stderr else "failed")
    return peak / 1e6, time.perf_counter() - start


def copied(folder: Path, target: Path) -> float:
    """Seconds that plain copying of the weights takes, flushed to disk."""
    start = time.perf_counter()
    target.mkdir()
    for file in folder.glob("*.safetensors"):
        shutil.copyfile(file, target / file.name)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    arguments = parser.parse_args()
    print(f"{'checkpoint':24}{'run':24}{'GB read':>9}{'peak GB':>9}{'seconds':>9}{'GB/s':>8}")
    for folder in arguments.checkpoints:
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            seconds = copied(folder, Path(scratch) / "copy")
            print(f"{folder.name:24}{'plain copy':24}{size:9.2f}{'':9}{seconds:9.1f}{size / seconds:8.2f}", flush=True)
            for name, recipe in RUNS.items():
                if arguments.only not in name:
                    continue
                if recipe is None:
                    command = [str(COMMAND), "inspect", str(folder)]
                else:
                    file = Path(scratch) / "recipe.yaml"
                    output = Path(scratch) / "out"
                    limit = "compute: {memory: 2 GB}\n"
                    file.write_text(f"model: {folder}\noutput: {output}\n{limit}{recipe}")
                    command = [str(COMMAND), "run", str(file), "--overwrite"]
                peak, seconds = measured(command)
                print(f"{folder.name:24}{name:24}{size:9.2f}{peak:9.2f}{seconds:9.1f}{size / seconds:8.2f}", flush=True)


if __name__ == "__main__":
    main()

"""What running packed experts costs on a CPU, and what a loaded `native` model takes.

    python benchmarks/native_runtime.py layer [--threads 1] [--cpu-time]
    python benchmarks/native_runtime.py model CHECKPOINT [--bits 2.5] [--threads 1] [--cpu-time]

`layer`: one layer with Qwen3-30B-A3B's shapes and random weights (128 experts of 768 neurons, hidden 2048, top-8),
beside dense experts in bfloat16 and float32, with where the time goes and two lower limits: bytes of the visited
weights over the measured memory bandwidth, operations over the measured rate of a large product. Best of several calls.

`model`: quantizes a checkpoint (the demo's, or one of synthetic_checkpoint.py) round-to-nearest to a uniform mixture,
loads original and result, each in a process of its own, and generates greedily (the best of three times). Memory is
anonymous resident memory, sampled every 5 ms; `mapped` are resident pages of files beyond those before loading, weights
that are used where they lie among them (the system may drop and read them again).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_compress
from moe_compress.quant import packed, run_packed
from moe_compress.quant.grid import Grid
from moe_compress.quant.packing import packed_words
from moe_compress.quant.stack import Encoding, Stack

HIDDEN, NEURONS, EXPERTS, CHOSEN = 2048, 768, 128, 8
GROUP = 64
MIXTURES = {"2 bits": [2], "3 bits": [3], "4 bits": [4], "2 and 3 bits mixed": [2, 3]}
clock = time.perf_counter
PART = {"_in_columns": "unpack", "dense": "unpack", "product": "product"}
AS_THEY_ARE = {name: getattr(run_packed, name) for name in PART}


def experts_like(widths: list[int]) -> packed.PackedExperts:
    """A layer of packed experts; expert e has the width e modulo how many there are."""
    projections = {}
    for name, (out, inner) in {"gate": (NEURONS, HIDDEN), "up": (NEURONS, HIDDEN), "down": (HIDDEN, NEURONS)}.items():
        assignment, stacks = [""] * EXPERTS, {}
        for position, bits in enumerate(widths):
            own = range(position, EXPERTS, len(widths))
            words = packed_words(inner, bits)
            grid = Grid(bits, GROUP)
            stack = Stack(Encoding(bits, GROUP), len(own), out, inner, device="cpu")
            stack.codes.data = torch.randint(-(1 << 31), 1 << 31, (len(own), out, words), dtype=torch.int32)
            stack.scale.data = torch.randn(len(own), out, grid.groups(inner)).mul_(0.02).to(torch.bfloat16)
            stacks[stack.encoding.name] = stack
            for expert in own:
                assignment[expert] = stack.encoding.name
        projections[name] = packed.PackedProjection(stacks, assignment, out, inner)
    return packed.PackedExperts(dense_experts(torch.bfloat16, "meta"), projections, {})


def dense_experts(dtype: torch.dtype, device: str = "cpu", implementation: str = "grouped_mm") -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=NEURONS, num_experts=EXPERTS)
    config._experts_implementation_internal = implementation
    with torch.device(device):
        module = Qwen3MoeExperts(config).to(dtype)
    if device == "cpu":
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape[1:]).mul_(0.02).to(dtype).expand(parameter.shape).contiguous()
    return module.requires_grad_(False)


def seconds(function: Callable[[], Any], least: float = 3.0) -> float:
    """The best of repeated calls: what a machine that others use, too, can do."""
    function()
    taken: list[float] = []
    while sum(taken) < least or len(taken) < 5:
        start = clock()
        function()
        taken.append(clock() - start)
    return min(taken)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Adds up the time in parts of the torch path while it runs; what calls what is taken out of the caller."""
    spent: dict[str, float] = defaultdict(float)
    stack: list[float] = []

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            stack.append(0.0)
            start = clock()
            result = AS_THEY_ARE[name](*values)
            taken = clock() - start
            spent[PART[name]] += taken - stack.pop()
            if stack:
                stack[-1] += taken
            return result

        return call

    for name in PART:
        setattr(run_packed, name, wrapped(name))
    try:
        yield spent
    finally:
        for name, function in AS_THEY_ARE.items():
            setattr(run_packed, name, function)


def parts_of(module: Any, values: tuple[Any, ...]) -> Iterator[tuple[float, dict[str, float]]]:
    """(seconds, seconds in parts) of one call after the other."""
    while True:
        with timed() as spent:
            start = clock()
            module(*values)
            taken = clock() - start
        yield taken, spent


def layer() -> None:
    generator = torch.Generator().manual_seed(0)
    large = torch.empty(1 << 27)
    large.fill_(1.0)
    bandwidth = large.numel() * 4 / seconds(large.sum)
    square = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / seconds(lambda: square @ square)
    print(f"memory: {bandwidth / 1e9:.1f} GB/s read; float32 product: {rate / 1e9:.0f} GFLOP/s")
    print(f"{'experts':22}{'tokens':>7}{'ms':>8}{'unpack':>8}{'product':>8}{'rest':>8}", end="")
    print(f"{'MB read':>9}{'limit ms: bytes':>17}{'operations':>12}")
    inputs = []
    for tokens in (1, 32, 512):
        index = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOSEN).indices
        inputs.append((torch.randn(tokens, HIDDEN, generator=generator), index, torch.full(index.shape, 1 / CHOSEN)))

    def row(name: str, module: Any, bytes_of_expert: float, dtype: torch.dtype) -> None:
        for hidden, index, weight in inputs:
            values = hidden.to(dtype), index, weight.to(dtype)
            read = bytes_of_expert * len(index.unique())
            operations = 2 * 3 * HIDDEN * NEURONS * index.numel()
            parts: list[float] = []
            if isinstance(module, packed.PackedExperts):
                taken, spent = min(itertools.islice(parts_of(module, values), 8), key=lambda found: found[0])
                parts = [spent["unpack"], spent["product"]]
                parts.append(taken - sum(parts))
            else:
                taken = seconds(lambda values=values: module(*values))  # type: ignore[misc]
            print(f"{name:22}{len(hidden):7}{1e3 * taken:8.1f}", end="")
            print(("".join(f"{1e3 * part:8.1f}" for part in parts)).ljust(24), end="")
            print(f"{read / 1e6:9.1f}{1e3 * read / bandwidth:17.1f}{1e3 * operations / rate:12.1f}", flush=True)

    for name, widths in MIXTURES.items():
        module = experts_like(widths)
        stored = sum(p.numel() * p.element_size() for p in module.parameters())
        row(name, module, stored / EXPERTS, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        for implementation in ("grouped_mm", "eager"):
            size = 3 * HIDDEN * NEURONS * dtype.itemsize
            row(f"{str(dtype)[6:]} {implementation}", dense_experts(dtype, implementation=implementation), size, dtype)


def resident(kind: str) -> int:
    """Bytes of this process in memory: RssAnon, which no file backs, or RssFile."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(kind)) * 1024


def measure(folder: str, dtype: str) -> None:
    """Load a folder and generate; prints JSON. In a process of its own."""
    before = peak = resident("RssAnon")
    mapped = resident("RssFile")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded = time.perf_counter() - start
    held, highest = resident("RssAnon"), peak
    result: dict[str, Any] = {"held": held - before, "peak": highest - before, "seconds": loaded}
    for batch in (1, 32):
        ids = torch.randint(3, 4000, (batch, 16), generator=torch.Generator().manual_seed(batch))
        taken: dict[int, float] = {}
        for new in (1, 9, 1, 9, 1, 9):
            start = clock()
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            taken[new] = min(taken.get(new, math.inf), clock() - start)
        result[f"first {batch}"] = taken[1]
        result[f"tokens/s {batch}"] = 8 * batch / (taken[9] - taken[1])
    result["running"] = peak - before
    result["mapped"] = resident("RssFile") - mapped
    done.set()
    watcher.join()
    print(json.dumps(result))


def model(checkpoint: Path, bits: float, threads: int) -> None:
    print(f"{'':28}{'file GB':>9}{'held GB':>9}{'peak, loading':>15}{'running':>9}{'mapped':>8}{'load s':>8}", end="")
    print(f"{'tokens/s, batch 1':>19}{'batch 32':>10}", flush=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.resolve().parent) as scratch:
        packed_folder = Path(scratch) / "native"
        low = int(bits)
        options = {"bits": bits, "widths": [low, low + 1], "method": "rtn", "allocation": "uniform"}
        recipe = {
            "model": str(checkpoint),
            "output": str(packed_folder),
            "passes": [{"quantize.mixed": options | {"protect_super_experts": False, "search": "none"}}],
            "compute": {"memory": "2 GB"},
        }
        file = Path(scratch) / "recipe.yaml"
        file.write_text(json.dumps(recipe))
        moe_compress.run(file)
        for name, folder, dtype in (
            (f"native, {bits} bits", packed_folder, "bfloat16"),
            ("original, bfloat16", checkpoint, "bfloat16"),
            ("original, float32", checkpoint, "float32"),
            (f"native, {bits} bits, float32", packed_folder, "float32"),
        ):
            command = [sys.executable, __file__, "measure", str(folder), "--dtype", dtype, "--threads", str(threads)]
            command += ["--cpu-time"] * (clock is time.process_time)
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            print(f"{name:28}{size / 1e9:9.3f}{found['held'] / 1e9:9.3f}{found['peak'] / 1e9:15.3f}", end="")
            print(f"{found['running'] / 1e9:9.3f}{found['mapped'] / 1e9:8.3f}{found['seconds']:8.1f}", end="")
            print(f"{found['tokens/s 1']:19.2f}{found['tokens/s 32']:10.2f}", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layer", "model", "measure"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--bits", type=float, default=2.75, help="average, scales included")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, where others keep the machine busy")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        global clock
        clock = time.process_time
    torch.set_num_threads(arguments.threads)
    if arguments.what == "layer":
        layer()
    elif arguments.what == "measure":
        measure(arguments.folder, arguments.dtype)
    else:
        model(arguments.folder, arguments.bits, arguments.threads)


if __name__ == "__main__":
    main()

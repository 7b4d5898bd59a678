"""Beside llm-compressor: quality of GPTQ on the demo checkpoint, time for a layer of a real model's shape.

    python -m venv PEER && PEER/bin/pip install llmcompressor==0.14.0.1        # an environment of its own
    python benchmarks/llm_compressor.py demo  --peer PEER/bin/python [--bits 4 3 2]
    python benchmarks/llm_compressor.py layer --peer PEER/bin/python [--sequences 32 --length 256]
    python benchmarks/llm_compressor.py scaling --peer PEER/bin/python [--measure 16] [--calibration 4096 16384]

`demo`: both quantize the demo checkpoint's experts by GPTQ, symmetric, groups of 64, with the same calibration tokens;
both results are scored here on the same held-out text. `layer`: both take one layer with Qwen3-30B-A3B's
shapes (128 experts, 2048 × 768) through calibration and solving at 4 bits; loading and saving aren't counted. Ours is
timed twice: with its defaults, and with plain GPTQ. `scaling`: how that grows with calibration tokens, in seconds of
the processor on one thread. Ours is measured on a layer of `--measure` experts of those shapes, top 8, with so many
tokens that each expert gets its share at top-8 of 128; theirs, where every expert reads all tokens, on one expert.
Times are scaled to 128 experts: ours whole, of theirs solving, and of calibration only what grows with the tokens. So
what either takes to begin with is counted against ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from demo_model import MODEL, calibration_text, load_demo, six_texts
from gptq_layer import bytes_moved, measured_rates, operations, watching
from quantization_table import PLAIN
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import moe_compress
from moe_compress.checkpoint.reader import sidecar_files
from moe_compress.evaluate.score import score_folders
from moe_compress.model import MoEModel
from moe_compress.progress import Monitor
from moe_compress.quant import experts as solving
from moe_compress.quant.solver import SolverOptions
from moe_compress.recipe import Evaluation
from moe_compress.resources import device_and_dtype

PEER = Path(__file__).with_name("llm_compressor_peer.py")


def peer(python: str, model: Path, ids: torch.Tensor, output: Path | str, bits: int) -> dict[str, Any]:
    """Run llm-compressor in its own environment; what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({"ids": ids}, Path(folder) / "ids.safetensors")
        command = [python, str(PEER), str(model), f"{folder}/ids.safetensors", str(output), str(bits)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ran.returncode:
        raise SystemExit(f"llm-compressor failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def demo(arguments: argparse.Namespace) -> None:
    tokenizer, original = load_demo()
    data = calibration_text(tokenizer)
    text = Evaluation(**six_texts(arguments.tokens))
    device, dtype = device_and_dtype("auto", "auto")
    print(f"{'bits':>5}{'':24}{'bits stored':>12}{'nats above':>12}{'kl':>9}{'seconds':>9}")
    for bits in arguments.bits:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "peer"
            told = peer(arguments.peer, MODEL, data.ids, output, bits)
            for name, file in sidecar_files(MODEL).items():
                if name.startswith("tokenizer"):
                    (output / name).write_bytes(file.read_bytes())
            like = MoEModel.open(MODEL, dtype=dtype, device=device)
            scores = score_folders(output, MODEL, text, like, None, Monitor(show=False))
            line(bits, "llm-compressor", f"{bits}.25*", *scores, told["seconds"])
        for name, options in (("moe-compress", {}), ("moe-compress, plain GPTQ", PLAIN)):
            start = time.perf_counter()
            result = moe_compress.compress(
                copy.deepcopy(original),
                tokenizer=tokenizer,
                passes=[{"quantize.mixed": uniform(bits) | options}],
                calibration=data,
                monitor=Monitor(show=False),
            )
            seconds = time.perf_counter() - start
            with tempfile.TemporaryDirectory() as folder:
                result.save(Path(folder) / "ours")
                scores = score_folders(Path(folder) / "ours", MODEL, text, like, None, Monitor(show=False))
            line(bits, name, f"{result.report['after']['bits_per_weight']:.2f}", *scores, seconds)
    print("* with scales of 16 bits; it stores them in the model's dtype as loaded")


def uniform(bits: int) -> dict[str, Any]:
    return {
        "bits": bits + 0.26,
        "widths": [bits],
        "allocation": "uniform",
        "protect_super_experts": False,
        "group_size": 64,
    }


def line(bits: int, name: str, stored: str, before: dict[str, Any], after: dict[str, Any], seconds: float) -> None:
    lost = [math.log(value / before["perplexity"][text]) for text, value in after["perplexity"].items()]
    kl = statistics.mean(after["kl"].values())
    print(f"{bits:>5} {name:23}{stored:>12}{statistics.mean(lost):>+12.4f}{kl:>9.4f}{seconds:>9.0f}", flush=True)


def layer(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        model = Path(folder) / "layer"
        synthetic = Path(__file__).with_name("synthetic_checkpoint.py")
        command = [sys.executable, str(synthetic), str(model), "--layers", "1", "--vocabulary", "4096"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        torch.manual_seed(0)
        ids = torch.randint(0, 4096, (arguments.sequences, arguments.length))
        tokens = ids.numel()
        rate = matmul_rate()
        routed = 8 * tokens
        # Forward of the routed rows (three products), then the two second moments of what they read (symmetric: half).
        operations = 2 * routed * 3 * 2048 * 768 * 2 + routed * (2048**2 + 768**2)
        print(f"{tokens} tokens, top-8 of 128; matrix products run at {rate / 1e9:.0f} GFLOP/s here")
        print(f"lower limit of calibration: {operations / rate:.1f} s of {operations / 1e12:.2f} TFLOP")
        for name, options in (("moe-compress", {}), ("moe-compress, plain GPTQ", PLAIN)):
            start = time.perf_counter()
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            began = time.perf_counter()
            moe_compress.compress(
                loaded, passes=[{"quantize.mixed": uniform(4) | options}], calibration=ids, monitor=Monitor(show=False)
            )
            print(f"{name:28}{time.perf_counter() - began:9.1f} s (loading {began - start:.1f} s)", flush=True)
            del loaded
        if arguments.peer:
            told = peer(arguments.peer, model, ids, "-", 4)
            print(f"{'llm-compressor':28}{told['seconds']:9.1f} s, peak {told['peak_gb']:.1f} GB", flush=True)


def scaling(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # theirs
    rate, bandwidth = measured_rates()
    times = 128 / arguments.measure
    few, many = arguments.calibration[0], arguments.calibration[-1]
    ids = torch.randint(0, 256, (many // 256, 256), generator=torch.Generator().manual_seed(0))
    variants: dict[str, dict[str, Any]] = {"default": {}, "plain": PLAIN}
    theirs, ours = {}, {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        routed, single = Path(folder) / "routed", Path(folder) / "single"
        small_layer(routed, arguments.measure, 8)
        small_layer(single, 1, 1)
        our_seconds(routed, ids[:1], {})  # what is imported on the way isn't counted
        for tokens in arguments.calibration:
            for name, options in variants.items():
                own = ids[: int(tokens / times) // 256]
                ours[name, tokens] = [times * value for value in our_seconds(routed, own, options)]
                print(f"{tokens} tokens, ours, {name}: {ours[name, tokens]}", flush=True)
            if arguments.peer:
                told = peer(arguments.peer, single, ids[: tokens // 256], "-", 4)
                theirs[tokens] = [told["cpu"] - told["cpu_solving"], told["cpu_solving"]]
                print(f"{tokens} tokens, theirs, one expert: {theirs[tokens]}", flush=True)
    print(f"\nseconds of the processor, 128 experts, ours measured on {arguments.measure}; calibration + solving")
    print(f"matrix products at {rate / 1e9:.0f} GFLOP/s, bandwidth {bandwidth / 1e9:.0f} GB/s")
    heads = (*(["llm-compressor"] if theirs else []), *variants, "limit, default", "limit, plain")
    print(f"{'tokens':>9}" + "".join(f"{head:>22}" for head in heads))
    lines = [(tokens, "") for tokens in arguments.calibration]
    for tokens, note in [*lines, *([(arguments.extrapolate, " extrapolated")] if few < many else [])]:
        row = []
        each = {name: {t: ours[name, t] for t in arguments.calibration} for name in variants}
        if theirs:
            # Only what grows with the tokens is scaled.
            slope = (theirs[many][0] - theirs[few][0]) / (many - few) if few < many else theirs[few][0] / few
            fixed = theirs[few][0] - slope * few
            calibration, solve = straight(theirs, tokens)
            row.append((fixed + 128 * (calibration - fixed), 128 * solve))
        row += [straight(own, tokens) for own in each.values()]
        for options in variants.values():
            sweeps = options.get("sweeps", SolverOptions().sweeps)
            needed = operations(tokens * 8, 128, 2048, 768, sweeps, "compensate" not in options)
            passing = 6 * tokens * 8 * 2048 * 768  # the forward
            row.append(((needed["moments"] + passing) / rate, (needed["factors"] + needed["solve"]) / rate))
        totals = [sum(pair) for pair in row]
        shown = "".join(f"{f'{a:.0f} + {b:.0f} = {a + b:.0f}':>22}" for a, b in row)
        beside = ", ".join(f"{totals[0] / own:.1f}" for own in totals[1:3]) if theirs else ""
        print(f"{tokens:>9}{shown}  theirs / ours {beside}{note}")
        print(f"{'':>9}limit by bytes {bytes_moved(tokens * 8, 128, 2048, 768) / bandwidth:.1f}")


def straight(own: dict[int, list[float]], tokens: int) -> tuple[float, float]:
    """Calibration, on the line through the measured ones; solving, their mean."""
    if tokens in own:
        return own[tokens][0], own[tokens][1]
    few, many = min(own), max(own)
    slope = (own[many][0] - own[few][0]) / (many - few)
    return own[few][0] + slope * (tokens - few), statistics.mean(pair[1] for pair in own.values())


def small_layer(folder: Path, experts: int, chosen: int) -> None:
    """One decoder layer with few experts of Qwen3-30B-A3B's shape, and next to nothing beside them."""
    config = AutoConfig.from_pretrained(MODEL)
    for name, value in {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "num_hidden_layers": 1,
        "vocab_size": 256,
    }.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name, file in sidecar_files(MODEL).items():
        if name.startswith("tokenizer"):
            (folder / name).write_bytes(file.read_bytes())


def our_seconds(model: Path, ids: torch.Tensor, options: dict[str, Any]) -> list[float]:
    """Of the processor: calibration, and solving."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    spent: dict[str, float] = {}
    with watching(spent, [(solving, name, getattr(solving, name)) for name in ("gptq", "compensated")]):
        start = time.process_time()
        moe_compress.compress(
            loaded, passes=[{"quantize.mixed": uniform(4) | options}], calibration=ids, monitor=Monitor(show=False)
        )
        total = time.process_time() - start
    return [total - sum(spent.values()), sum(spent.values())]


def matmul_rate() -> float:
    """Operations per second of a large float32 product, the best of a few."""
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["demo", "layer", "scaling"])
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--tokens", type=int, default=20_000, help="of each held-out text")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--measure", type=int, default=16, help="scaling: experts that are really done")
    parser.add_argument("--calibration", type=int, nargs="+", default=[4096, 16384], help="scaling: tokens, ascending")
    parser.add_argument("--extrapolate", type=int, default=262_144, help="scaling: tokens, on a straight line")
    parser.add_argument("--scratch", help="where the synthetic layer goes (1.3 GB)")
    arguments = parser.parse_args()
    {"demo": demo, "layer": layer, "scaling": scaling}[arguments.what](arguments)


if __name__ == "__main__":
    main()

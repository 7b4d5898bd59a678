"""What GGUF types cost the demo model: nats per token above the original, mean over its six kinds of text.

    python benchmarks/gguf_types.py [--tokens 5000] [--sequences 64] [ROW ...]

Everything but the experts stays BF16. A row is one type for all projections, or a budget in bits for the program.
`plain` is without importances, `covering` also without looking for scales.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import moe_compress

ROOT = Path(__file__).resolve().parent.parent
BF16 = dict.fromkeys(("embeddings", "output", "attention", "shared_experts", "feed_forward"), "BF16")
# The demo's down projections have rows of 128: what comes in blocks of 256 is joined by a type that doesn't.
ALL = ["Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "IQ4_NL", "Q5_0", "Q5_1"]
ROWS: dict[str, dict[str, Any]] = {
    "Q8_0": {"bits": 32, "types": ["Q8_0"]},
    "Q5_0": {"bits": 32, "types": ["Q5_0"]},
    "IQ4_NL": {"bits": 32, "types": ["IQ4_NL"]},
    "Q4_0": {"bits": 32, "types": ["Q4_0"]},
    "Q4_0 plain": {"bits": 32, "types": ["Q4_0"], "importance": False},
    "Q4_0 covering": {"bits": 32, "types": ["Q4_0"], "importance": False, "search": False},
    **{f"program {bits}": {"bits": bits, "types": ALL} for bits in (3.25, 3.5, 4.0, 4.5, 5.5, 6.5)},
    "program 3.5 plain": {"bits": 3.5, "types": ALL, "importance": False},
}


def nats(report: dict[str, Any]) -> float:
    """Mean over the kinds of text of the loss in nats per token."""
    before, after = report["before"]["perplexity"], report["after"]["perplexity"]
    return sum(math.log(after[kind] / before[kind]) for kind in before) / len(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--sequences", type=int, default=64)
    arguments = parser.parse_args()
    print(f"{'experts in':20} {'bits':>6} {'nats':>8} {'KL':>8}  types")
    with tempfile.TemporaryDirectory() as folder:
        for row in arguments.rows:
            recipe = {
                "model": str(ROOT / "demo" / "moe-demo"),
                "output": f"{folder}/out",  # one for all: what was measured is measured once
                "target": "llama.cpp",
                "passes": [{"quantize.gguf": {**ROWS[row], "dense": BF16}}],
                "calibration": {
                    "sources": [{"path": str(ROOT / "demo" / "calibration.jsonl"), "domain_field": "domain"}],
                    "balance": True,
                    "sequences": arguments.sequences,
                    "length": 256,
                },
                "evaluate": {
                    "text": [str(ROOT / "demo" / "text" / "*.jsonl")],
                    "length": 256,
                    "max_tokens": arguments.tokens,
                },
                "keep_workspace": True,
            }
            report = moe_compress.run(recipe, overwrite=True, fresh=True).report
            kl = report["after"]["kl"]
            used = {k: v for k, v in report["passes"][0]["summary"]["projections_per_type"].items() if v}
            bits = report["after"]["bits_per_weight"]
            mean = sum(kl.values()) / len(kl)
            print(f"{row:20} {bits:6.3f} {nats(report):8.4f} {mean:8.4f}  {json.dumps(used)}", flush=True)


if __name__ == "__main__":
    main()

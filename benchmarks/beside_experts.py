"""What packing attention and embeddings too is worth: the demo checkpoint at equal total sizes.

    python benchmarks/beside_experts.py [--tokens 5000] [--sizes 6.05 5.25 4.5]

Every row is a whole run from disk (bfloat16 source, GPTQ, group 64). `nats above` is the mean over the six texts of the
nats per token above the original's; MB are all tensors of the file.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import moe_compress
from moe_compress.errors import MoeCompressError
from moe_compress.progress import Monitor

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = ["experts", "attention", "shared_experts", "dense_mlp", "embeddings", "head"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5_000, help="tokens of each text")
    parser.add_argument("--sizes", type=float, nargs="*", default=[6.05, 5.25, 4.5], help="MB of the whole file")
    arguments = parser.parse_args()
    print(f"{'':44}{'MB':>7}{'experts':>9}{'nats above':>12}{'kl':>9}   beside the experts, matrices per width")
    for size in arguments.sizes:
        for name, options in (
            ("experts alone", {}),
            ("everything, 4, 6 or 8 bits beside", {"include": EVERYTHING}),
            ("everything, 4 bits beside", {"include": EVERYTHING, "dense_widths": [4]}),
            ("everything, 8 bits beside", {"include": EVERYTHING, "dense_widths": [8]}),
            ("and attention, 4, 6 or 8 bits", {"include": ["experts", "attention"]}),
        ):
            _row(f"{size:g} MB: {name}", {"size": f"{size} MB", **options}, arguments.tokens)


def _row(name: str, options: dict[str, Any], tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "model": str(ROOT / "demo/moe-demo"),
            "output": f"{folder}/out",
            "calibration": {
                "sources": [{"path": str(ROOT / "demo/calibration.jsonl"), "domain_field": "domain"}],
                "balance": True,
                "sequences": 128,
                "length": 256,
            },
            "passes": [{"quantize.mixed": options}],
            "evaluate": {"text": [str(ROOT / "demo/text/*.jsonl")], "length": 256, "max_tokens": tokens},
        }
        try:
            report = moe_compress.run(recipe, monitor=Monitor(show=False)).report
        except MoeCompressError as error:
            print(f"{name:44}{error}", flush=True)
            return
    before, after = report["before"]["perplexity"], report["after"]["perplexity"]
    loss = statistics.mean(math.log(after[text] / before[text]) for text in after)
    kl = statistics.mean(report["after"]["kl"].values())
    beside = report["passes"][0]["summary"].get("beside_per_width", "")
    size, bits = report["after"]["bytes"] / 1e6, report["after"]["bits_per_weight"]
    print(f"{name:44}{size:7.2f}{bits:9.2f}{loss:+12.4f}{kl:9.4f}   {beside}", flush=True)


if __name__ == "__main__":
    main()

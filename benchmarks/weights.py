"""Zeros inside the demo checkpoint's experts, and where its experts are pruned: mean nats per token lost.

    python benchmarks/weights.py [weights] [where] [--tokens 2000] [--sequences 128] [--only TEXT]

`weights`: criterion × pattern, as they are and healed (`heal.experts`). `where`: REAP at a quarter and a half fewer
experts, the same number in every layer, globally, and by layer sensitivity, unchecked and checked. Means over the six
texts against the original; one calibration seed.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from typing import Any

import torch
from demo_methods import MODEL, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.calib.text import Calibration, TextSource, load_batches
from moe_compress.progress import Monitor

HEAL = {"heal.experts": {}}
GROUPS: dict[str, dict[str, list[Any]]] = {
    "weights": {
        f"{criterion}, {name}{', healed' if healed else ''}": [
            {"prune.weights": {"criterion": criterion, **pattern}},
            *([HEAL] if healed else []),
        ]
        for name, pattern in (("50 %", {"sparsity": 0.5}), ("2:4", {"pattern": "2:4"}))
        for criterion in ("random", "magnitude", "wanda", "moe_pruner", "sparsegpt")
        for healed in (False, True)
    },
    "where": {
        f"{name}, {keep:.0%} kept": [{"prune.experts": {"keep": keep, **options}}]
        for keep in (0.75, 0.5)
        for name, options in (
            ("uniform", {}),
            ("global", {"scope": "global"}),
            ("sensitivity (Fisher)", {"scope": "sensitivity", "check": False}),
            ("sensitivity (measured)", {"scope": "sensitivity", "sensitivity": "measured", "check": False}),
            ("sensitivity, checked", {"scope": "sensitivity"}),
        )
    },
    "healed": {
        f"{name}, 50% kept": [{"prune.experts": {"keep": 0.5}}, *after]
        for name, after in (
            ("pruned", []),
            ("experts healed", [HEAL]),
            ("routers healed", [{"heal.router": {}}]),
            ("both", [{"heal.router": {}}, HEAL]),
        )
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=", ".join(GROUPS))
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of each text")
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences of 256")
    parser.add_argument("--only", help="rows whose name contains this")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    source = TextSource(path=str(ROOT / "demo/calibration.jsonl"), domain_field="domain")
    settings = Calibration(sources=[source], length=256, sequences=arguments.sequences, balance=True)
    calibration = load_batches(settings, tokenizer, ROOT)
    evaluate = {"text": [str(ROOT / "demo/text/*.jsonl")], "length": 256, "max_tokens": arguments.tokens}
    for group in arguments.groups or GROUPS:
        print(f"\n{group}\n{'':44}{'MB':>7}{'nats above':>12}{'kl':>9}{'seconds':>9}")
        for name, passes in GROUPS[group].items():
            if arguments.only and arguments.only not in name:
                continue
            start = time.perf_counter()
            result = moe_compress.compress(
                copy.deepcopy(original),
                tokenizer=tokenizer,
                passes=passes,
                calibration=calibration,
                evaluate=evaluate,
                original=MODEL,
                monitor=Monitor(show=False),
            )
            after = result.report["after"]
            before = statistics.mean(map(math.log, result.report["before"]["perplexity"].values()))
            lost = statistics.mean(map(math.log, after["perplexity"].values())) - before
            kl = statistics.mean(after["kl"].values())
            seconds = time.perf_counter() - start
            print(f"{name:44}{after['bytes'] / 1e6:7.2f}{lost:+12.4f}{kl:9.4f}{seconds:9.1f}", flush=True)
            for note in result.report["passes"][0]["notes"] if group == "where" else []:
                print(f"    {note}")


if __name__ == "__main__":
    main()

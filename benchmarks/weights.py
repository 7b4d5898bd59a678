"""Zeros inside the demo checkpoint's experts, and where its experts are pruned: mean nats per token lost.

    python benchmarks/weights.py [weights] [where] [--tokens 2000] [--sequences 128] [--only TEXT]

`weights`: criterion × pattern, as they are and healed (`heal.experts`). `where`: REAP at a quarter and a half fewer
experts, the same number in every layer, globally, and by layer sensitivity, unchecked and checked. Means over the six
texts against the original; one calibration seed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from demo_model import calibration_text, compressed, load_demo, mean_kl, mean_lost, six_texts

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
        f"{name}, {keep:.0%} kept": [{"prune.experts": {"keep": keep, "refit": False, **options}}]
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
        f"{name}, 50% kept": [{"prune.experts": {"keep": 0.5, "refit": False}}, *after]
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
    tokenizer, original = load_demo()
    calibration = calibration_text(tokenizer, arguments.sequences)
    evaluate = six_texts(arguments.tokens)
    for group in arguments.groups or GROUPS:
        print(f"\n{group}\n{'':44}{'MB':>7}{'nats above':>12}{'kl':>9}{'seconds':>9}")
        for name, passes in GROUPS[group].items():
            if arguments.only and arguments.only not in name:
                continue
            start = time.perf_counter()
            report = compressed(original, tokenizer, passes, calibration, evaluate).report
            size, seconds = report["after"]["bytes"] / 1e6, time.perf_counter() - start
            print(f"{name:44}{size:7.2f}{mean_lost(report):+12.4f}{mean_kl(report):9.4f}{seconds:9.1f}", flush=True)
            for note in report["passes"][0]["notes"] if group == "where" else []:
                print(f"    {note}")


if __name__ == "__main__":
    main()

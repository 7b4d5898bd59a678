"""What each pass alone does to the demo checkpoint: perplexity on the six texts, KL divergence, bytes.

    python benchmarks/demo_methods.py [GROUP …] [--tokens 20000] [--seeds 1]

Groups: rounds, task, novices (default: all). Prints one table per group; every row is a fresh copy of the model,
compressed by the same function that `moe_compress.compress` offers. Perplexities are means over the texts of the nats
per token, so rows compare as they stand; `kl` is the mean KL divergence from the original. Criteria of pruning are
beside each other in pruning.py, merging in merging.py, quantizing in quantization_table.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from demo_model import calibration_text, compressed, load_demo, mean_kl, mean_lost, six_texts
from pruning import HEALED

ROWS = ("weighted", "dominant", "remap")

GROUPS: dict[str, dict[str, list[Any]]] = {
    "rounds": {
        f"{criterion}{', refitted' if refit else ''}, steps: {steps} {keep:.0%}": [
            {"prune.experts": {"keep": keep, "refit": refit, "criterion": criterion, "steps": steps}}
        ]
        for keep in (0.75, 0.5)
        for criterion in ("reap", "frequency", "gram_greedy")
        for refit in (False, True)
        for steps in (1, 2, 4)
    },
    "task": {
        f"{name} {keep:.0%}": [{method: {"keep": keep, **options}}, *(HEALED if "healed" in name else ())]
        for keep in (0.75, 0.5)
        for name, method, options in (
            ("gate_mass", "prune.experts", {"criterion": "gate_mass", "refit": False}),
            *((f"tsep, below: {b}", "prune.experts", {"preset": "tsep", "below": b}) for b in (0.25, 0.5, 0.75)),
            ("tsep, refitted", "prune.experts", {"preset": "tsep", "refit": True}),
            ("tsep, healed", "prune.experts", {"preset": "tsep"}),
            *((f"uncurl, router: {r}", "merge.average", {"preset": "uncurl", "router": r}) for r in ROWS),
            ("uncurl, healed", "merge.average", {"preset": "uncurl"}),
        )
    },
    "novices": {
        f"{name} {keep:.0%}": [{"prune.experts": {"keep": keep, **options}}]
        for keep in (0.75, 0.5)
        for name, options in (
            *(
                (f"{c}{', novices' if n else ''}", {"criterion": c, "replace": n or "nothing", "refit": False})
                for c in ("mone", "reap")
                for n in ("", "mean")
            ),
            *((f"{c}, refitted", {"criterion": c}) for c in ("mone", "reap")),
            *((f"{c}, novices, refitted", {"criterion": c, "replace": "mean"}) for c in ("mone", "reap")),
        )
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=", ".join(GROUPS))
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of each text")
    parser.add_argument("--seeds", type=int, default=1, help="calibration seeds; more give a standard deviation")
    parser.add_argument("--only", help="rows whose name contains this")
    arguments = parser.parse_args()
    tokenizer, original = load_demo()
    evaluate = six_texts(arguments.tokens)
    calibrations = [calibration_text(tokenizer, 128, seed) for seed in range(arguments.seeds)]
    for group in arguments.groups or GROUPS:
        print(f"\n{group}\n{'':48}{'MB':>7}{'nats above':>12}{'± sd':>8}{'kl':>9}{'agree':>8}{'seconds':>9}")
        for name, passes in GROUPS[group].items():
            if arguments.only and arguments.only not in name:
                continue
            rows = []
            for calibration in calibrations:
                start = time.perf_counter()
                report = compressed(original, tokenizer, passes, calibration, evaluate).report
                rows.append((report, time.perf_counter() - start))
            after, loss = [r["after"] for r, _ in rows], [mean_lost(r) for r, _ in rows]
            spread = statistics.stdev(loss) if len(loss) > 1 else 0.0
            kl = statistics.mean(mean_kl(r) for r, _ in rows)
            agree = statistics.mean(statistics.mean(a["agreement"].values()) for a in after)
            print(
                f"{name:48}{after[0]['bytes'] / 1e6:7.2f}{statistics.mean(loss):+12.4f}{spread:8.4f}{kl:9.4f}"
                f"{agree:8.1%}{statistics.mean(s for _, s in rows):9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

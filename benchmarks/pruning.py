"""Pruning on the demo checkpoint: every criterion, and neurons inside experts at the same bytes.

    python benchmarks/pruning.py [--seeds 3] [--tokens 5000] [--tasks 100] [--only TEXT …] [--columns C …]
                                 [--cells FILE] [--print]
    python benchmarks/pruning.py --plugin mine.py --add "mine: {prune.quiet: {floor: 0}}" --only mine

Mean ± standard deviation over calibration seeds of the mean over six texts of the nats per token lost against the
original, then the KL divergence, and with --tasks the accuracy (mean of six tasks). Cells are kept as they are done.
A quarter fewer experts and three quarters of the neurons of each are the same bytes, but for the router's rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from cells import Wanted, add_arguments, table

SHARES = (0.75, 0.5)
CRITERIA = (
    *("random", "frequency", "gate_mass", "ean", "weighted_ean", "reap", "reap_l2", "man", "msan", "easy_ep", "tcess"),
    *("mone", "max_activation", "stun", "attribution", "attribution_abs", "attribution_squared", "diep", "naee"),
    "gram_greedy",
)
NEURONS = ("random", "magnitude", "output", "camera", "tenp", "heapr", "fisher", "refit", "refit_in_turn")
HEALED: tuple[dict[str, Any], ...] = ({"heal.router": {}}, {"heal.experts": {}})
WIDTHS = ("output", "heapr", "fisher", "refit_in_turn")
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{c: ("prune.experts", {"criterion": c, "refit": False}) for c in CRITERIA},
    **{f"{c}, refitted": ("prune.experts", {"criterion": c}) for c in CRITERIA},
    "diep, global": ("prune.experts", {"criterion": "diep", "scope": "global", "refit": False}),
    "reap, global": ("prune.experts", {"scope": "global", "refit": False}),
    "gram_greedy, global": ("prune.experts", {"criterion": "gram_greedy", "scope": "global", "refit": False}),
    "reap, global, refitted": ("prune.experts", {"scope": "global"}),
    "gram_greedy, global, refitted": ("prune.experts", {"criterion": "gram_greedy", "scope": "global"}),
    "reap, by sensitivity": ("prune.experts", {"scope": "sensitivity", "refit": False}),
    "reap, by sensitivity, refitted": ("prune.experts", {"scope": "sensitivity"}),
    "reap, healed": ("prune.experts", {"refit": False}),
    "reap, refitted, healed": ("prune.experts", {}),
    "reap, novices": ("prune.experts", {"replace": "mean", "refit": False}),
    "mone, novices": ("prune.experts", {"criterion": "mone", "replace": "mean", "refit": False}),
    **{f"neurons: {c}": ("prune.neurons", {"criterion": c, "refit": False}) for c in NEURONS},
    **{f"neurons: {c}, refitted": ("prune.neurons", {"criterion": c}) for c in NEURONS},
    **{
        f"neurons: {c}, {width} widths, refitted": ("prune.neurons", {"criterion": c, "width": width})
        for c in WIDTHS
        for width in ("layer", "free")
    },
    **{
        f"neurons: {c}, free widths per layer, refitted": (
            "prune.neurons",
            {"criterion": c, "width": "free", "scope": "layer"},
        )
        for c in WIDTHS
    },
    "neurons recombined: dern as published": ("prune.dern", {"refit": False, "start": "gate"}),
    "neurons recombined: dern, refitted": ("prune.dern", {}),
}


def cells(rows: Mapping[str, tuple[str, dict[str, Any]]]) -> Wanted:
    """Each row's pass with a quarter and a half less, repaired by training afterwards where its name says "healed"."""
    return {
        (row, f"{1 - keep:.0%} fewer"): [{name: {"keep": keep, **options}}, *(HEALED if "healed" in row else ())]
        for keep in SHARES
        for row, (name, options) in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "pruning")
    parser.add_argument("--add", nargs="*", default=[], help="rows of your own, 'NAME: {PASS: {OPTION: VALUE}}'")
    arguments = parser.parse_args()
    table(arguments, cells(ROWS | own_rows(arguments.add)))


def own_rows(given: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Rows as `--add` says them; what is kept is added."""
    named = [item for text in given for item in yaml.safe_load(text).items()]
    return {row: (name, options or {}) for row, step in named for name, options in step.items()}


if __name__ == "__main__":
    main()

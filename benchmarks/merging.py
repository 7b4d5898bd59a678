"""Grouping × merging, pruning and factorising on the demo checkpoint at the same bytes; what one large layer takes.

    python benchmarks/merging.py table [--seeds 3] [--tokens 20000] [--tasks 100] [--prompts 20] [--only TEXT …]
                                       [--cells FILE] [--print]
    python benchmarks/merging.py layer [--experts 128] [--hidden 2048] [--neurons 768] [--rows 8192] [--loop]
    python benchmarks/merging.py align [--neurons 768]

`table`: mean ± standard deviation over calibration seeds of the mean over six texts of the nats per token lost against
the original, then the KL divergence (with --tasks, accuracy; with --prompts, repeated 4-grams of greedy text). Cells
are kept as they are done. `layer`: seconds for a layer of 128 experts of 2048 × 768, batched, beside a plain loop over
experts (`--loop`). `align`: how many neurons of a permuted copy are found again under noise, exact and approximate.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import pruning
import torch
from cells import Wanted, add_arguments, table
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_compress.merge.align import (
    activation_similarity,
    activations_on,
    align_experts,
    approximate_assignment,
    exact_assignment,
    permuted,
    weight_similarity,
)
from moe_compress.merge.bounded import bounded_linkage
from moe_compress.merge.cluster import grabbed, hierarchical
from moe_compress.merge.combine import members_of, weighted_average
from moe_compress.merge.kmeans import kmeans, kmeans_layers
from moe_compress.merge.refit import refit_down
from moe_compress.model import FusedExperts

# Of pruning.py's rows, those to be beaten.
PRUNING = (
    *("random", "frequency", "ean", "easy_ep", "easy_ep, refitted", "reap", "reap, refitted"),
    *("gram_greedy", "gram_greedy, refitted", "gram_greedy, global, refitted"),
)
GROUPINGS: dict[str, dict[str, Any]] = {
    "REAM's groups": {},
    "outputs, average linkage": {"cluster": "average"},
    "outputs, ward": {"cluster": "ward"},
    "outputs, k-means": {"cluster": "kmeans"},
    "router logits, most used": {"grouping": "router", "cluster": "dominant"},
    "weights, most used": {"grouping": "weights", "cluster": "dominant"},
    "co-activation, average linkage": {"grouping": "coactivation", "cluster": "average"},
}
MERGING: dict[str, tuple[str, dict[str, Any]]] = {
    "averaged": ("merge.average", {"align": "none", "refit": "none"}),
    "aligned": ("merge.average", {"refit": "none"}),
    "aligned, refitted (default)": ("merge.average", {}),
}
FACTORISING: dict[str, dict[str, Any]] = {
    "svd": {},
    "latent": {},
    "d2-moe": {"base": "frequency"},
    "d2-moe, Fisher base": {"method": "d2-moe", "base": "fisher"},
    "resmoe": {},
    "mobe": {},
    "mc-smoe": {},
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Fisher-weighted, aligned": ("merge.average", {"weight": "fisher", "refit": "none"}),
    "Fisher-weighted, aligned, refitted": ("merge.average", {"weight": "fisher"}),
    "frequency-weighted, aligned": ("merge.average", {"weight": "frequency", "refit": "none"}),
    "gate-weighted, aligned": ("merge.average", {"weight": "gate", "refit": "none"}),
    "aligned by weights": ("merge.average", {"align": "weights", "refit": "none"}),
    "refitted, not aligned": ("merge.average", {"align": "none"}),
    "groups absorbed by REAP's best, aligned, refitted": ("merge.average", {"cluster": "absorb"}),
    "aligned, refitted, mean row": ("merge.average", {"router": "mean"}),
    "zipped": ("merge.zip", {"refit": "none"}),
    "zipped, refitted": ("merge.zip", {}),
    "aligned, refitted as MergeMoE": ("merge.average", {"refit": "mean"}),
    "aligned, refitted group by group": ("merge.average", {"refit": "down"}),
    "aligned, refitted, weighted row": ("merge.average", {"router": "weighted"}),
    "aligned, refitted, rows left in place": ("merge.average", {"router": "remap"}),
    "aligned, refitted, numbers by cost": ("merge.average", {"scope": "global"}),
    "aligned, refitted, healed": ("merge.average", {}),
    "as HC-SMoE": ("merge.average", {"preset": "hc-smoe"}),
    **{
        f"as Sub-MoE, rank {rank:.0%}{'' if whiten else ', not whitened'}": (
            "merge.subspace",
            {"preset": "sub-moe", "rank": rank, "whiten": whiten},
        )
        for rank in (1.0, 0.75, 0.5, 0.25)
        for whiten in (True, False)
    },
    "as M-SMoE": ("merge.average", {"preset": "m-smoe"}),
    "as MergeMoE": ("merge.average", {"preset": "mergemoe"}),
    "as UNCURL": ("merge.average", {"preset": "uncurl"}),
    "as REAM": ("merge.average", {"preset": "ream"}),
    "as ZipIt": ("merge.zip", {"preset": "zipit"}),
    "narrower: neurons by what they put out": ("prune.neurons", {"refit": False}),
    "narrower, refitted (default)": ("prune.neurons", {}),
    "DERN": ("prune.dern", {"refit": False, "start": "gate"}),
    "DERN, refitted (default)": ("prune.dern", {}),
    **{f"factorised: {method}": ("merge.factorise", {"method": method, **own}) for method, own in FACTORISING.items()},
}


def wanted() -> Wanted:
    """Cells of the table."""
    rows = {f"prune: {name}": pruning.ROWS[name] for name in PRUNING}
    rows |= {f"{g} | {m}": (name, {**o, **own}) for m, (name, own) in MERGING.items() for g, o in GROUPINGS.items()}
    rows |= OTHERS
    return pruning.cells(rows)


def timed(label: str, function: Callable[[], Any]) -> Any:
    start, cpu = time.perf_counter(), time.process_time()
    result = function()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{label:56}{wall:10.2f} s{cpu:10.2f} s of CPU", flush=True)
    return result


@torch.no_grad()
def layer(experts: int, hidden: int, neurons: int, rows: int, loop: bool) -> None:
    """One layer of random experts, a quarter fewer: groups of two."""
    generator = torch.Generator().manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=neurons, num_experts=experts, num_experts_per_tok=8, hidden_act="silu"
    )
    module = Qwen3MoeExperts(config)
    for parameter in module.parameters():
        parameter.data.normal_(std=hidden**-0.5, generator=generator).requires_grad_(False)
    view = FusedExperts(module)
    tokens = torch.randn(rows // 8, hidden, generator=generator)
    index = torch.stack([torch.randperm(experts, generator=generator)[:8] for _ in tokens])
    weight = torch.full(index.shape, 0.125)
    unit = torch.nn.functional.normalize(torch.randn(48, experts, 64, generator=generator), dim=2)
    alike, count = unit @ unit.mT, experts * 3 // 4
    like = alike[0]
    print(f"{experts} experts of {hidden} x {neurons}, {rows} rows; {torch.get_num_threads()} threads\n")
    timed("k-means, 8 starts", lambda: kmeans(like, count, generator))
    timed("k-means, 8 starts, groups of at most 2", lambda: kmeans(like, count, generator, most=2))
    timed("k-means, 8 starts, of 48 layers at once", lambda: kmeans_layers(alike, count, generator))
    timed("average linkage", lambda: hierarchical(like, count, "average"))
    timed("average linkage, groups of at most 2", lambda: bounded_linkage(like, count, "average", 2))
    kept = list(range(count))
    timed("REAM's groups", lambda: grabbed(like, kept, 17))
    pairs = [(e, count + e) for e in range(experts - count)]
    sample = tokens[:1024]
    weights = view.weights()
    original = weights.map(torch.clone)
    for how, read, approximate in (
        ("activations, exact", sample, False),
        ("activations, approximate", sample, True),
        ("weights, exact", None, False),
    ):
        for (_, target), (_, value) in zip(weights.items(), original.items(), strict=True):
            target.copy_(value)
        run = functools.partial(align_experts, view, pairs, read, approximate)
        timed(f"align {len(pairs)} pairs, {how}", run)
    del original
    groups = [[a, b] for a, b in pairs] + [[e] for e in range(len(pairs), count)]
    both = torch.tensor(pairs)
    share = torch.ones(len(pairs), 2)

    def averaged(stacked: torch.Tensor) -> torch.Tensor:
        return torch.cat([weighted_average(own, share[part]).float() for part, own in members_of(stacked, both)])

    average = timed("average", lambda: {name: averaged(stacked) for name, stacked in weights.matrices()})
    first = [g[0] for g in groups]
    merged = weights.map(lambda w: w[torch.tensor(first)])
    for name, value in average.items():
        getattr(merged, name)[: len(pairs)] = value
    timed("refit group by group", lambda: refit_down(view, merged, groups, tokens, index, weight, 0.25))
    if not loop:
        return
    print("\nk-means of 48 layers, one after the other, then start by start")
    timed("8 starts at once", lambda: [kmeans(one, count, generator) for one in alike])
    timed("one", lambda: [kmeans(one, count, generator, restarts=1) for one in alike for _ in range(8)])
    print("\nthe same as above, expert by expert")
    timed("align by activations, exact", lambda: [by_hand(view, a, b, sample) for a, b in pairs])
    timed(
        "average",
        lambda: [[((w[a].double() + w[b].double()) / 2).float() for _, w in weights.matrices()] for a, b in pairs],
    )


def by_hand(view: FusedExperts, one: int, other: int, sample: torch.Tensor) -> Any:
    """The order of one expert's neurons, everything made for this pair alone."""
    own = [view.weights().map(lambda w, e=e: w[e : e + 1]) for e in (one, other)]  # type: ignore[misc]
    return exact_assignment(activation_similarity(*(activations_on(view, w, sample) for w in own)))


@torch.no_grad()
def align(neurons: int, hidden: int = 512, tokens: int = 1024) -> None:
    """An expert and a permuted copy with noise on its weights: neurons whose place is found, of all."""
    noises = (0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 3.0)
    generator = torch.Generator().manual_seed(0)
    qwen = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=neurons, num_experts=1, num_experts_per_tok=1)
    view = FusedExperts(Qwen3MoeExperts(qwen))
    for parameter in view.module.parameters():
        parameter.data.normal_(std=hidden**-0.5, generator=generator)
    own = view.weights()
    sample = torch.randn(tokens, hidden, generator=generator)
    print(f"{'noise on weights, relative':28}" + "".join(f"{n:>9}" for n in noises))
    rows: dict[str, list[str]] = {}
    for noise in noises:
        order = torch.randperm(neurons, generator=generator)[None]
        spoilt = own.map(lambda w, n=noise: w + n * w.std() * torch.randn(w.shape, generator=generator))  # type: ignore[misc]
        copy = permuted(spoilt, order)
        right = order.argsort(dim=1)
        for name, similarity in (
            ("weights", weight_similarity(own, copy)),
            (
                "activations",
                activation_similarity(activations_on(view, own, sample), activations_on(view, copy, sample)),
            ),
        ):
            best = exact_assignment(similarity)
            near = approximate_assignment(similarity)
            sums = [float(similarity.gather(2, o.unsqueeze(-1)).sum()) for o in (best, near)]
            rows.setdefault(f"{name}, exact", []).append(f"{(best == right).float().mean():9.1%}")
            rows.setdefault(f"{name}, approximate", []).append(f"{(near == right).float().mean():9.1%}")
            rows.setdefault(f"{name}, gap to the best sum", []).append(f"{1 - sums[1] / sums[0]:9.2%}")
    for name, values in rows.items():
        print(f"{name:28}" + "".join(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["table", "layer", "align"])
    add_arguments(parser, "merging")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--neurons", type=int, default=768)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--loop", action="store_true", help="also expert by expert")
    arguments = parser.parse_args()
    if arguments.what == "layer":
        layer(arguments.experts, arguments.hidden, arguments.neurons, arguments.rows, arguments.loop)
    elif arguments.what == "align":
        align(arguments.neurons)
    else:
        table(arguments, wanted())


if __name__ == "__main__":
    main()

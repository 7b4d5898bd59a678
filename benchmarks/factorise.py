"""Factorising the experts of the demo checkpoint: nats lost at equal bytes, and what a factored layer takes to run.

    python benchmarks/factorise.py [quality] [time] [--tokens 2000] [--keep 0.75 0.5] [--only NAME]

`quality`: mean over the six texts of the nats per token lost, for every method at the bytes of 25 % and 50 % fewer
experts, beside pruning by REAP and merge.average with that many fewer. `time`: one layer of 16 experts of 512 × 256,
two per token, float32: milliseconds of CPU, bytes and multiply-adds of gate, up and down as U_e V_e beside dense
experts, by rank and tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from demo_model import calibration_text, compressed, load_demo, mean_lost, six_texts
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_compress.merge.factored import FactoredExperts, FactoredProjection
from moe_compress.merge.terms import Load, LowRank
from moe_compress.model import FusedExperts
from moe_compress.model.experts import run_experts

FACTORISED = {
    "svd": {"method": "svd"},
    "d2-moe, base by frequency": {"method": "d2-moe", "base": "frequency"},
    "resmoe": {"method": "resmoe"},
    "latent": {"method": "latent"},
    "mc-smoe, without merging": {"method": "mc-smoe"},
    "mobe": {"method": "mobe"},
    "d2-moe, base by Fisher": {"method": "d2-moe"},
}


def methods(keep: float) -> dict[str, list[dict[str, dict[str, float | str]]]]:
    """Rows of the table → passes that leave that share of the experts' bytes."""
    half = (1 + keep) / 2  # half of the bytes by merging, the rest by factorising
    return {
        **{name: [{"merge.factorise": {"keep": keep, **options}}] for name, options in FACTORISED.items()},
        "prune.experts (REAP)": [{"prune.experts": {"keep": keep, "refit": False}}],
        "merge.average": [{"merge.average": {"keep": keep}}],
        "merge.average, then mc-smoe": [
            {"merge.average": {"keep": half, "preset": "m-smoe"}},
            {"merge.factorise": {"keep": keep / half, "method": "mc-smoe"}},
        ],
        "merge.average, then svd": [{"merge.average": {"keep": half}}, {"merge.factorise": {"keep": keep / half}}],
    }


EXPERTS, HIDDEN, NEURONS, CHOSEN = 16, 512, 256, 2


def quality(tokens: int, sequences: int, keeps: list[float], only: str) -> None:
    tokenizer, original = load_demo()
    evaluate = six_texts(tokens)
    text = calibration_text(tokenizer, sequences)
    print(f"{'':30}{'keep':>6}{'experts, share':>16}{'nats lost':>11}{'multiply-adds':>15}{'seconds':>9}", flush=True)
    for keep in keeps:
        for name, passes in methods(keep).items():
            if only not in name:
                continue
            start = time.perf_counter()
            report = compressed(original, tokenizer, passes, text, evaluate).report
            before, after = report["before"], report["after"]
            done = [layer["passes"][-1] for layer in report["layers"]]
            shares = [
                d["operations_per_token"] / d["dense_operations_per_token"] for d in done if "operations_per_token" in d
            ]
            work = f"{statistics.mean(shares):.0%}" if shares else "100%"
            print(
                f"{name:30}{keep:6.0%}{after['expert_bytes'] / before['expert_bytes']:16.3f}{mean_lost(report):+11.4f}"
                f"{work:>15}{time.perf_counter() - start:9.0f}",
                flush=True,
            )


def layer(rank: int | None) -> FusedExperts | FactoredExperts:
    """Random experts, dense or in factors of a rank."""
    config = Qwen3MoeConfig(
        num_experts=EXPERTS, num_local_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=NEURONS
    )
    module = Qwen3MoeExperts(config)
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02).requires_grad_(False)
    if rank is None:
        return FusedExperts(module)
    projections = {}
    for name, matrix in FusedExperts(module).weights().matrices():
        left, right = torch.randn(EXPERTS, matrix.shape[1], rank), torch.randn(EXPERTS, rank, matrix.shape[2])
        projections[name] = FactoredProjection([LowRank.holding(left, right, [rank] * EXPERTS)], name != "down")
    return FactoredExperts(module, dict(projections), {})


@torch.no_grad()
def timing() -> None:
    even = HIDDEN * NEURONS // (HIDDEN + NEURONS)
    print(
        f"\n{'rank':>10}{'bytes':>12}{'multiply-adds':>15}" + "".join(f"{f'{t} tokens, ms':>16}" for t in (1, 32, 512))
    )
    for rank in (None, 16, 32, 64, 128, even):
        experts = layer(rank)
        size = 4 * sum(m.numel() for _, m in experts.weights().matrices())
        work = 3 * HIDDEN * NEURONS * CHOSEN
        if isinstance(experts, FactoredExperts):
            size = sum(t.numel() * t.element_size() for t in experts.state_dict().values())
            work = experts.operations(Load(CHOSEN, 1, CHOSEN))
        row = f"{'dense' if rank is None else rank:>10}{size:12,}{work:15,}"
        for tokens in (1, 32, 512):
            generator = torch.Generator().manual_seed(tokens)
            hidden = torch.randn(tokens, HIDDEN, generator=generator)
            index = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOSEN).indices
            weight = torch.full((tokens, CHOSEN), 1 / CHOSEN)
            taken = []
            for _ in range(30):
                start = time.process_time()
                run_experts(experts, hidden, index, weight)
                taken.append(time.process_time() - start)
            row += f"{1e3 * statistics.median(taken):16.2f}"
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="quality, time (default: both)")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of each text")
    parser.add_argument("--sequences", type=int, default=128, help="of 256 tokens, of calibration text")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--only", default="", help="methods whose name contains this")
    arguments = parser.parse_args()
    if not arguments.what or "time" in arguments.what:
        timing()
    if not arguments.what or "quality" in arguments.what:
        quality(arguments.tokens, arguments.sequences, arguments.keep, arguments.only)


if __name__ == "__main__":
    main()

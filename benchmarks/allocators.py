"""Which allocation loses least at equal bytes, on the demo checkpoint: every cost, unit and rule, quickly.

    python benchmarks/allocators.py [--seeds 1] [--tokens 1024] [--bits 2.25 2.5 3 3.5] [--only TEXT]

Calibration statistics are measured once for all plans, and every matrix is solved by GPTQ once for every width, on what
the original model reads. A plan is then put together from these and scored: KL divergence from the original and nats
per token lost, means over the six texts, over calibration seeds. `benchmarks/quantization_table.py allocators` does the
whole job for each cell, and takes minutes where this takes seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from demo_model import ROOT, block_inputs, calibration_text, load_demo
from quantization_table import ALLOCATORS, AVERAGES, GROUP
from torch import Tensor

from moe_compress.calib.collect import MemoryStore, Profile, collect, missing
from moe_compress.errors import MoeCompressError
from moe_compress.export.targets import find_target
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.backward import GradientSweep
from moe_compress.model.losses import NextToken
from moe_compress.model.shape import model_shape
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Progress
from moe_compress.quant.gptq import gptq, shrink_hessians
from moe_compress.quant.grid import dequantize
from moe_compress.quant.mixed import QuantizeMixed

Library = dict[tuple[int, str, float], Tensor]  # layer, projection, width → dense weights [E, O, K]


def step(**options: Any) -> QuantizeMixed:
    return QuantizeMixed(QuantizeMixed.Options(group_size=GROUP, **options), find_target("native"))


def solved(view: MoEModel, batches: Any, widths: list[float]) -> Library:
    """Every matrix at every width, by GPTQ on what the original reads."""
    library: Library = {}
    grid = step(bits=3).options.grid
    for index, inputs in block_inputs(view, batches).items():
        experts = FusedExperts(view.block(index).experts_module)
        weights = experts.weights()
        (own,) = inputs.moments(experts, 1 << 40)
        for names, moment in ((("gate", "up"), own.input_CHH), (("down",), own.activation_CII)):
            hessian = shrink_hessians(moment, own.rows_C)
            stacked = torch.cat([getattr(weights, n) for n in names], dim=1)
            for width in widths:
                found = dequantize(gptq(stacked, hessian, grid(width)).quantized)
                for name, part in zip(names, found.chunk(len(names), dim=1), strict=True):
                    library[index, name, width] = part.clone()
    return library


class Scores:
    """The original's predictions on the held-out texts, and how far a changed model is from them."""

    def __init__(self, model: Any, tokenizer: Any, tokens: int):
        self.model, self.texts = model, []
        for path in sorted(Path(ROOT / "demo/text").glob("*.jsonl")):
            text = "\n\n".join(json.loads(line)["text"] for line in path.open())
            ids = tokenizer(text[: 40 * tokens])["input_ids"][: tokens // 256 * 256]
            self.texts.append(torch.tensor(ids).view(-1, 256))
        self.original = [self._log_p(ids) for ids in self.texts]

    @torch.no_grad()
    def _log_p(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits.log_softmax(-1)

    def now(self) -> tuple[float, float]:
        """KL divergence from the original, and nats per token above it."""
        divergences, losses = [], []
        for ids, before in zip(self.texts, self.original, strict=True):
            after, target = self._log_p(ids), ids[:, 1:, None]
            divergences.append(float((before.exp() * (before - after)).sum(-1).mean()))
            losses.append(float((before[:, :-1].gather(-1, target) - after[:, :-1].gather(-1, target)).mean()))
        return statistics.mean(divergences), statistics.mean(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024, help="of each text")
    parser.add_argument("--bits", type=float, nargs="+", default=AVERAGES)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    if arguments.tokens < 256:
        parser.error(f"--tokens {arguments.tokens}: texts are scored in sequences of 256")
    tokenizer, model = load_demo()
    view = MoEModel.wrap(model)
    shape = model_shape(view)
    originals = {i: view.block(i).experts.weights().map(torch.clone) for i in view.moe_layers}
    scores = Scores(model, tokenizer, arguments.tokens)
    # Of the matrices that are solved once, all are plain: rows with rotations or factors are the other script's.
    plain = {n: o for n, o in ALLOCATORS.items() if not {"low_rank", "rotate"} & o.keys()}
    rows = {name: options for name, options in plain.items() if arguments.only in name}
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for seed in range(arguments.seeds):
        batches = [{"input_ids": ids} for ids, _ in calibration_text(tokenizer, seed=seed).batches(16)]
        library = solved(view, batches, [1, 2, 3, 4, 5, 6, 8])
        store = MemoryStore()
        for name, options in rows.items():
            for bits in arguments.bits:
                one = step(bits=bits, **options)
                try:
                    one.forecast(shape)
                    if lacking := missing(view, one.statistics(), store):
                        back = any(statistic.gradients for statistic in lacking)
                        with GradientSweep(view, batches, None) if back else Sweep(view, batches, None) as sweep:
                            collect(sweep, lacking, store, Progress(), NextToken(batches))
                    plan = one.plan(Profile(shape, store, len(view.layers)))
                except MoeCompressError as error:
                    print(f"{name}, {bits} bits: {error}", flush=True)
                    continue
                for index, decision in plan.layers.items():
                    for projection, matrix in view.block(index).experts.weights().matrices():
                        for expert, width in enumerate(decision["bits"][projection]):
                            matrix[expert] = library[index, projection, width][expert]
                found.setdefault((name, bits), []).append(scores.now())
                kl, lost = found[name, bits][-1]
                real = 8 * plan.summary["expert_bytes"] / sum(layer.weights for layer in shape.layers.values())
                print(f"{name}, seed {seed}: {real:.3f} bits, kl {kl:.4f}, nats {lost:+.4f}", flush=True)
                for index, weights in originals.items():
                    for projection, matrix in view.block(index).experts.weights().matrices():
                        matrix.copy_(getattr(weights, projection))
    print(f"\n{'kl (nats lost)':44}" + "".join(f"{bits:>22} bits" for bits in arguments.bits))
    for name in rows:
        line = f"{name:44}"
        for bits in arguments.bits:
            own = found.get((name, bits), [])
            kl, lost = (statistics.mean(values) for values in zip(*own, strict=True)) if own else (float("nan"),) * 2
            spread = f"±{statistics.stdev(k for k, _ in own):.4f}" if len(own) > 1 else ""
            line += f"{f'{kl:.4f}{spread} ({lost:+.4f})':>27}"
        print(line)


if __name__ == "__main__":
    main()

"""Pruning neurons on the demo checkpoint: are the scores right, what does solving again give, what is lost.

    python benchmarks/neurons.py [rank] [refit] [table] [dern] [--sequences 32] [--tokens 2000] [--seed 0]

rank: single neurons, drawn at random, are removed one at a time and the loss on the calibration text is measured; rank
correlation of each criterion with that. refit: error of a layer's block at 75 and 50 % width, with and without its down
projections solved again, on the calibration text and on held-out text; mean over layers, inputs as in the original.
table: nats per token lost, mean over the six held-out texts, by criterion and width, with and without refit; also
widths per layer and per expert. dern: the same for dropped experts whose neurons are recombined. Statistics are
measured once.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from typing import Any

import numpy as np
import torch
from demo_model import block_inputs, calibration_text, load_demo, six_texts
from scipy.stats import spearmanr

from moe_compress.engine import Calibrated, Work, run_passes
from moe_compress.evaluate.text import Evaluation, load_text, score_batches
from moe_compress.export.targets import find_target
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.shape import model_shape
from moe_compress.passes import find_pass
from moe_compress.progress import Monitor
from moe_compress.prune.neuron_criteria import NEURON_CRITERIA
from moe_compress.prune.neurons import best
from moe_compress.refit import layer_output, refit_layer
from moe_compress.storage import MemoryStorage

WIDTHS = (0.75, 0.5)


class Bench:
    """The model, its text, and what is measured once."""

    def __init__(self, arguments: argparse.Namespace):
        tokenizer, model = load_demo()
        self.model = model.eval()
        self.text = calibration_text(tokenizer, arguments.sequences, arguments.seed)
        wanted = Evaluation(**six_texts(arguments.tokens))
        self.windows = load_text(tokenizer, wanted, self.model.config.vocab_size)
        self.stores: dict[Any, Any] = {}
        self.base = self.nats(self.model)

    def nats(self, model: Any) -> float:
        """Mean over the texts of nats per token."""
        with torch.no_grad():
            outputs = [model(input_ids=w.ids).logits for w in self.windows]
        found = score_batches(self.windows, iter(enumerate(outputs))).summary("after")["perplexity"]
        return statistics.mean(math.log(v) for v in found.values())

    def passed(self, name: str, **options: Any) -> Any:
        """A copy of the model after one pass; statistics come from the store."""
        model = copy.deepcopy(self.model)
        view = MoEModel.wrap(model)
        cls = find_pass(name)
        step = cls(cls.Options(**options), find_target("native"))
        storage = MemoryStorage(stores=self.stores)
        work = Work(view, Calibrated(self.text, 8), storage, Monitor(show=False))
        run_passes(work, [step], model_shape(view), "original")
        return model

    def scores(self, criterion: str) -> dict[int, torch.Tensor]:
        """Layer → [E, I]."""
        found = NEURON_CRITERIA[criterion]
        self.passed("prune.neurons", keep=0.5, criterion=criterion, refit=False)  # measures what isn't there
        (store,) = self.stores.values()
        layers = sorted({layer for layer, _ in store.results})
        generator = torch.Generator().manual_seed(0)
        return {i: found.score({s.name: store.get(i, s.key) for s in found.statistics}, generator) for i in layers}


def rank(bench: Bench, count: int = 160) -> None:
    """Rank correlation of scores with the measured loss change of single neurons."""
    ids = bench.text.ids
    view = MoEModel.wrap(bench.model)

    def loss() -> float:
        total = 0.0
        with torch.no_grad():
            for part in ids.split(8):
                logits = bench.model(input_ids=part).logits[:, :-1].double()
                total += float(
                    torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
                )
        return total / ids[:, 1:].numel()

    scores = {name: bench.scores(name) for name in NEURON_CRITERIA}
    generator = torch.Generator().manual_seed(1)
    layers = view.moe_layers
    shape = next(iter(scores["output"].values())).shape
    picked = [
        (layers[n % len(layers)], *(int(torch.randint(size, (), generator=generator)) for size in shape))
        for n in range(count)
    ]
    before, changes = loss(), []
    for layer, expert, neuron in picked:
        column = view.block(layer).experts.weights().down[expert, :, neuron]
        kept = column.clone()
        column.zero_()
        changes.append(loss() - before)
        column.copy_(kept)
    measured = np.array(changes)
    print(
        f"\nrank: {count} neurons removed one at a time, {ids.numel()} tokens; mean change {measured.mean():+.2e} nats"
    )
    print(f"{'':16}{'all layers':>12}{'in a layer':>12}{'with |change|':>15}")
    for name, found in scores.items():
        own = np.array([float(found[i][e, j]) for i, e, j in picked])
        inside = [
            spearmanr(own[here], measured[here]).statistic
            for here in (np.array([i == layer for i, _, _ in picked]) for layer in layers)
        ]
        absolute = spearmanr(own, abs(measured)).statistic
        print(f"{name:16}{spearmanr(own, measured).statistic:12.2f}{statistics.mean(inside):12.2f}{absolute:15.2f}")


def refit(bench: Bench) -> None:
    """Block errors relative to the block's output."""
    held_out = [{"input_ids": w.ids} for w in bench.windows]
    view = MoEModel.wrap(bench.model)

    texts = {"calibration": block_inputs(view, bench.text.forwards(8)), "held out": block_inputs(view, held_out)}
    criteria = ("random", "output", "fisher", "refit_in_turn")
    print("\nrefit: error of the block, relative to its output's square, mean over layers")
    print(f"{'':24}" + "".join(f"{f'{t}{r}':>24}" for t in texts for r in ("", ", refit")))
    for width in WIDTHS:
        for name in criteria:
            rows: dict[str, list[float]] = {}
            for layer, scores in bench.scores(name).items():
                block = copy.deepcopy(view.block(layer))
                whole = FusedExperts(copy.deepcopy(block.experts_module))
                counts = torch.full((len(scores),), round(width * scores.shape[1]))
                block.narrow(best(scores, counts).nonzero()[:, 1].view(len(scores), -1))
                inputs = texts["calibration"][layer]
                calibration = (inputs.hidden_TH, inputs.index_TK, inputs.weight_TK)
                for label in ("", ", refit"):
                    narrow = FusedExperts(block.experts_module)
                    if label:
                        refit_layer(narrow, *calibration, layer_output(whole, *calibration), 0.25)
                    for text, found in texts.items():
                        own = (found[layer].hidden_TH, found[layer].index_TK, found[layer].weight_TK)
                        exact = layer_output(whole, *own).double()
                        error = (layer_output(narrow, *own).double() - exact).square().sum() / exact.square().sum()
                        rows.setdefault(text + label, []).append(float(error))
            values = [statistics.mean(rows[f"{t}{r}"]) for t in texts for r in ("", ", refit")]
            print(f"{name + f' {width:.0%}':24}" + "".join(f"{v:24.4f}" for v in values), flush=True)


def table(bench: Bench, only: str = "") -> None:
    """Nats lost by criterion and width."""
    print(f"\ntable: nats per token above the original's {bench.base:.4f}")
    print(f"{'':24}" + "".join(f"{f'{w:.0%}{r}':>14}" for w in WIDTHS for r in ("", ", refit")))
    rows: dict[str, dict[str, Any]] = {name: {"criterion": name} for name in NEURON_CRITERIA}
    for name in ("output", "heapr", "fisher", "refit_in_turn"):
        rows |= {f"{name}, {width}": {"criterion": name, "width": width} for width in ("layer", "free")}
        rows[f"{name}, free in a layer"] = {"criterion": name, "width": "free", "scope": "layer"}
    for label, options in rows.items():
        if only and label not in only.split(";"):
            continue
        print(f"{label:24}", end="", flush=True)
        for width in WIDTHS:
            for again in (False, True):
                model = bench.passed("prune.neurons", keep=width, refit=again, **options)
                print(f"{bench.nats(model) - bench.base:+14.4f}", end="", flush=True)
        print()


def dern(bench: Bench) -> None:
    """Nats lost by dropping experts, with and without recombination."""
    print(f"\ndern: nats per token above the original's {bench.base:.4f}; experts kept")
    print(f"{'':36}" + "".join(f"{w:>14.0%}" for w in WIDTHS))
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "gate mass, nothing moves": ("prune.experts", {"criterion": "gate_mass", "refit": False}),
        "REAP, nothing moves": ("prune.experts", {"criterion": "reap", "refit": False}),
        **{f"DERN, cosine {c}": ("prune.dern", {"threshold": c, "refit": False}) for c in (0.2, 0.4, 0.6)},
        "DERN, cosine 0.4, gates compared too": ("prune.dern", {"threshold": 0.4, "refit": False, "gate": True}),
        "DERN, cosine 0.4, starts by gate": ("prune.dern", {"threshold": 0.4, "refit": False, "start": "gate"}),
        **{f"DERN, cosine {c}, refit": ("prune.dern", {"threshold": c}) for c in (0.4, 0.6, 1.0)},
    }
    for label, (name, options) in rows.items():
        print(f"{label:36}", end="", flush=True)
        for keep in WIDTHS:
            print(f"{bench.nats(bench.passed(name, keep=keep, **options)) - bench.base:+14.4f}", end="", flush=True)
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Any] = {"rank": rank, "refit": refit, "table": table, "dern": dern}
    parser.add_argument("parts", nargs="*", help=", ".join(parts))
    parser.add_argument("--sequences", type=int, default=32, help="of 256 calibration tokens")
    parser.add_argument("--tokens", type=int, default=2000, help="of each held-out text")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration text")
    parser.add_argument("--only", default="", help="rows of the table, by name, separated by ;")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    for name in arguments.parts or parts:
        parts[name](bench, arguments.only) if name == "table" else parts[name](bench)


if __name__ == "__main__":
    main()

"""Tables of cells on the demo checkpoint: each a fresh copy, compressed and scored, kept in a file as it is done.

A run that was interrupted goes on where it was; two tables that share a cell measure it once. Cells behind the numbers
of the docs are in benchmarks/measured/, each with the commit that it was measured at: `--print` shows them, and a new
method is compared with them without measuring them again. Those to be measured anew are to be deleted there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from demo_model import ROOT, calibration_text, compressed, load_demo, six_texts
from torch import Tensor

from moe_compress.calib.text import TokenBatches
from moe_compress.errors import MoeCompressError
from moe_compress.evaluate.generation import choose_prompts, continued
from moe_compress.evaluate.tasks import score_tasks
from moe_compress.evaluate.text import load_text, score_batches
from moe_compress.passes import load_plugin
from moe_compress.progress import Monitor
from moe_compress.recipe import Evaluation, Generation

MEASURED = ROOT / "benchmarks" / "measured"

# (row, column) → passes of a recipe.
Wanted = Mapping[tuple[str, str], list[dict[str, Any]]]


class Yardstick:
    """The original on the six texts, run once: what every cell is compared with.

    Args:
        original, tokenizer: the demo model's.
        tokens: of each text.
        tasks: items of each task, or 0.
        prompts: beginnings to continue, or 0.
    """

    def __init__(self, original: Any, tokenizer: Any, tokens: int, tasks: int = 0, prompts: int = 0):
        self.original, self.tokenizer, self.tasks = original, tokenizer, tasks
        self.windows = load_text(tokenizer, Evaluation(**six_texts(tokens)))
        self.logits = list(self.logits_of(original))
        self.writing = Generation(prompts=prompts) if prompts else None
        self.repeated = self.repetition(original)

    @torch.no_grad()
    def logits_of(self, model: Any) -> Iterator[tuple[int, Tensor]]:
        """Logits [B, S, V] of each batch of windows."""
        for number, window in enumerate(self.windows):
            yield number, model(input_ids=window.ids, use_cache=False).logits

    def repetition(self, model: Any) -> float | None:
        """Share of repeated 4-grams in what the model writes."""
        if self.writing is None:
            return None
        written = continued(model, choose_prompts(self.windows, self.writing), self.writing)
        return written.summary(self.writing.ngram)["repetition"]

    def accuracy(self, model: Any) -> float:
        """Mean of the six tasks."""
        with Monitor(show=False).stage("tasks") as progress:
            scores = score_tasks(
                model,
                self.tokenizer,
                ["demo"],
                task_path=ROOT / "demo/tasks",
                batch_size=16,
                limit=self.tasks,
                max_length=None,
                progress=progress,
            )
        return scores["demo"]["acc"]

    def measure(self, passes: list[dict[str, Any]], text: TokenBatches) -> dict[str, Any]:
        """One cell: `lost` (nats per token, per text), `kl`, `bits`, `bytes`, `seconds` of the passes; with tasks also
        `acc`, with prompts also `repetition`, before and after."""
        start = time.perf_counter()
        result = compressed(self.original, self.tokenizer, passes, text)
        seconds = time.perf_counter() - start
        scores = score_batches(self.windows, self.logits_of(result.model), iter(self.logits))
        size = result.report["after"]
        found: dict[str, Any] = {
            "lost": {n: math.log(s.perplexity / scores.before[n].perplexity) for n, s in scores.after.items()},
            "kl": statistics.mean(scores.drift()["kl"].values()),
            "bits": size["bits_per_weight"],
            "bytes": size["bytes"],
            "seconds": seconds,
        }
        if self.writing is not None:
            found["repetition"] = [self.repeated, self.repetition(result.model)]
        if self.tasks:
            found["acc"] = self.accuracy(result.model)
        return found


def revision() -> str:
    """The commit that is checked out, marked where files differ from it, those of measured cells apart."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/measured")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def drawn(passes: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The passes as they are run with a seed: a random control draws anew with each."""
    return [
        {name: {**options, "seed": seed} if options.get("criterion") == "random" else options}
        for each in passes
        for name, options in each.items()
    ]


def fill(
    file: Path,
    wanted: Wanted,
    seeds: int,
    *,
    tokens: int,
    tasks: int = 0,
    prompts: int = 0,
    skip: Callable[[int, list[dict[str, Any]]], bool],
    measuring: bool = True,
) -> list[dict[str, Any]]:
    """Measure the cells that the file lacks, seed by seed. Returns what is there of those wanted.

    Args:
        file: one JSON object a line.
        wanted: cells.
        seeds: calibration seeds 0 … seeds − 1.
        tokens, tasks, prompts: see `Yardstick`.
        skip: whether a cell needn't be measured with a seed.
        measuring: otherwise nothing is.
    """
    done = {v["key"]: v for v in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}
    keys: dict[str, tuple[str, str, int]] = {}
    for seed in range(seeds):
        for (row, column), passes in wanted.items():
            if not skip(seed, passes):
                key = json.dumps([row, column, seed, tokens, tasks, prompts, drawn(passes, seed)])
                keys[key] = (row, column, seed)
    lacking = [key for key in keys if key not in done]
    if measuring and lacking:
        file.parent.mkdir(parents=True, exist_ok=True)
        tokenizer, original = load_demo()
        yardstick = Yardstick(original, tokenizer, tokens, tasks, prompts)
        commit = revision()
        data: dict[int, TokenBatches] = {}
        for key in lacking:
            row, column, seed = keys[key]
            if seed not in data:
                data = {seed: calibration_text(tokenizer, seed=seed)}
            try:
                found = yardstick.measure(drawn(wanted[row, column], seed), data[seed])
            except MoeCompressError as error:
                print(f"{row}, {column}: {error}", flush=True)
                continue
            done[key] = {"key": key, "row": row, "column": column, "seed": seed, "commit": commit, **found}
            with file.open("a") as lines:
                lines.write(json.dumps(done[key]) + "\n")
            mean = statistics.mean(found["lost"].values())
            print(f"{row}, {column}, seed {seed}: {mean:+.4f}, {found['seconds']:.0f} s", flush=True)
    return [done[key] for key in keys if key in done]


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """What every table can be asked for; its cells are kept under `name`."""
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of each text")
    parser.add_argument("--tasks", type=int, default=0, help="items of each task; 0 leaves tasks out")
    parser.add_argument("--prompts", type=int, default=0, help="prompts to continue; 0 leaves that out")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--without", nargs="*", default=[], help="leave out rows whose name contains one of these")
    parser.add_argument("--columns", nargs="*", help="columns by name; all without")
    parser.add_argument("--cells", type=Path, default=MEASURED / f"{name}.jsonl")
    parser.add_argument("--plugin", type=Path, nargs="*", default=[], help="files that register what rows use")
    parser.add_argument("--print", action="store_true", help="measure nothing, print what is there")
    parser.add_argument("--markdown", action="store_true", help="print the table as the docs have it")


def table(
    arguments: argparse.Namespace,
    cells: Wanted,
    skip: Callable[[int, list[dict[str, Any]]], bool] = lambda _seed, _passes: False,
) -> None:
    """Measure those of the cells that are asked for, and print them, columns of bits apart from the others."""
    for file in arguments.plugin:
        load_plugin(file)
    columns = arguments.columns
    wanted = {
        (row, column): passes
        for (row, column), passes in cells.items()
        if any(part in row for part in arguments.only)
        and not any(part in row for part in arguments.without)
        and column in (columns or [column])
    }
    done = fill(
        arguments.cells,
        wanted,
        arguments.seeds,
        tokens=arguments.tokens,
        tasks=arguments.tasks,
        prompts=arguments.prompts,
        skip=skip,
        measuring=not arguments.print,
    )
    names = list(dict.fromkeys(column for _, column in wanted))
    title = "nats above the original (KL); tasks: accuracy; prompts: repeated 4-grams"
    for group in ([c for c in names if "bits" not in c], [c for c in names if "bits" in c]):
        show(done, group, title, arguments.markdown)


def show(cells: Sequence[dict[str, Any]], columns: Sequence[str], title: str, markdown: bool) -> None:
    """Mean ± standard deviation over seeds of the mean over texts of the nats lost, KL, accuracy, repetition."""
    rows = list(dict.fromkeys(c["row"] for c in cells if c["column"] in columns))
    if not rows:
        return
    lines = [[title, *columns]]
    lines += [
        [row, *(said([c for c in cells if (c["row"], c["column"]) == (row, column)]) for column in columns)]
        for row in rows
    ]
    if markdown:
        lines.insert(1, ["---"] * len(lines[0]))
        print("\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for name, *values in lines:
        print(name.ljust(widths[0]) + "".join(f"   {v:<{w}}" for v, w in zip(values, widths[1:], strict=True)).rstrip())


def said(own: Sequence[dict[str, Any]]) -> str:
    """A row's cells of one column, of all seeds."""
    if not own:
        return ""
    told = spread([statistics.mean(c["lost"].values()) for c in own], 4)
    told += f" ({statistics.mean(c['kl'] for c in own):.4f})"
    if all("acc" in c for c in own):
        told += f" {spread([c['acc'] for c in own], 3)}"
    if all("repetition" in c for c in own):
        told += f" {statistics.mean(c['repetition'][1] for c in own):.1%}"
    return told


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation, the latter where there is more than one."""
    told = f"{statistics.mean(values):.{digits}f}"
    return f"{told} ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else told

"""Tables of cells on the demo checkpoint: each a fresh copy, compressed and scored, kept in a file as it is done.

A run that was interrupted goes on where it was; two tables that share a cell measure it once.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from demo_model import ROOT, calibration_text, compressed, load_demo, lost, mean_kl, six_texts

import moe_compress
from moe_compress.calib.text import TokenBatches
from moe_compress.evaluate.tasks import score_tasks
from moe_compress.progress import Monitor

# (row, column) → passes of a recipe.
Wanted = Mapping[tuple[str, str], list[dict[str, Any]]]


def measure(
    original: Any,
    tokenizer: Any,
    data: TokenBatches,
    passes: list[dict[str, Any]],
    tokens: int,
    tasks: int = 0,
    prompts: int = 0,
) -> dict[str, Any]:
    """One cell: what `lost` (nats per token, per text), `kl`, `bits`, `bytes`, `seconds`; with `tasks` also `acc`, with
    `prompts` also `repetition`, before and after."""
    start = time.perf_counter()
    written = {"generation": {"prompts": prompts}} if prompts else {}
    result = compressed(original, tokenizer, passes, data, six_texts(tokens) | written)
    before, after = result.report["before"], result.report["after"]
    found = {
        "lost": lost(result.report),
        "kl": mean_kl(result.report),
        "bits": after["bits_per_weight"],
        "bytes": after["bytes"],
        "seconds": time.perf_counter() - start,
    }
    if prompts:
        found["repetition"] = [each["generation"]["repetition"] for each in (before, after)]
    if tasks:
        with Monitor(show=False).stage("tasks") as progress:
            scores = score_tasks(
                result.model,
                tokenizer,
                ["demo"],
                task_path=ROOT / "demo/tasks",
                batch_size=16,
                limit=tasks,
                max_length=None,
                progress=progress,
            )
        found["acc"] = scores["demo"]["acc"]
    return found


def fill(
    file: Path,
    wanted: Wanted,
    seeds: int,
    *,
    tokens: int,
    tasks: int = 0,
    prompts: int = 0,
    skip: Callable[[int, list[dict[str, Any]]], bool] = lambda _seed, _passes: False,
    measuring: bool = True,
) -> list[dict[str, Any]]:
    """Measure the cells that the file lacks, seed by seed. Returns what is there of those wanted.

    Args:
        file: one JSON object a line.
        wanted: cells.
        seeds: calibration seeds 0 … seeds − 1.
        tokens, tasks, prompts: see `measure`.
        skip: whether a cell needn't be measured with a seed.
        measuring: otherwise nothing is.
    """
    done = {v["key"]: v for v in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}
    keys: dict[str, tuple[str, str, int]] = {}
    for seed in range(seeds):
        for (row, column), passes in wanted.items():
            if not skip(seed, passes):
                keys[json.dumps([row, column, seed, tokens, tasks, prompts, passes])] = (row, column, seed)
    lacking = [key for key in keys if key not in done]
    if measuring and lacking:
        file.parent.mkdir(parents=True, exist_ok=True)
        tokenizer, original = load_demo()
        data: dict[int, TokenBatches] = {}
        for key in lacking:
            row, column, seed = keys[key]
            if seed not in data:
                data = {seed: calibration_text(tokenizer, seed=seed)}
            try:
                found = measure(original, tokenizer, data[seed], wanted[row, column], tokens, tasks, prompts)
            except moe_compress.MoeCompressError as error:
                print(f"{row}, {column}: {error}", flush=True)
                continue
            done[key] = {"key": key, "row": row, "column": column, "seed": seed, **found}
            with file.open("a") as lines:
                lines.write(json.dumps(done[key]) + "\n")
            mean = statistics.mean(found["lost"].values())
            print(f"{row}, {column}, seed {seed}: {mean:+.4f}, {found['seconds']:.0f} s", flush=True)
    return [done[key] for key in keys if key in done]


def show(cells: Sequence[dict[str, Any]], columns: Sequence[str], title: str) -> None:
    """Mean ± standard deviation over seeds of the mean over texts of the nats lost, KL, accuracy, repetition."""
    rows = list(dict.fromkeys(c["row"] for c in cells if c["column"] in columns))
    if not rows:
        return
    print(f"\n{title:56}" + "".join(f"{c:>30}" for c in columns))
    for row in rows:
        line = f"{row:56}"
        for column in columns:
            own = [c for c in cells if (c["row"], c["column"]) == (row, column)]
            if not own:
                line += f"{'':>30}"
                continue
            means = [statistics.mean(c["lost"].values()) for c in own]
            spread = f"±{statistics.stdev(means):.4f}" if len(means) > 1 else ""
            kl = f"{statistics.mean(c['kl'] for c in own):.4f}"
            shown = f" {statistics.mean(c['acc'] for c in own):.3f}" if all("acc" in c for c in own) else ""
            if all("repetition" in c for c in own):
                shown += f" {statistics.mean(c['repetition'][1] for c in own):.1%}"
            line += f"{statistics.mean(means):>+10.4f}{spread:<8}{kl:>6}{shown:>6}"
        print(line)

"""The data and the scoring of the demo's lm-eval tasks: found from this file, wherever the repository lies."""

import json
from pathlib import Path

import datasets

FOLDER = Path(__file__).resolve().parent.parent / "items"


def load(items, **_):
    """Items of one file of demo/items, in its order, as the split "items". `_` is the task's metadata."""
    with (FOLDER / f"{items}.jsonl").open(encoding="utf-8") as lines:
        return {"items": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def score(doc, results):
    """acc and acc_norm (per byte) of one item from (log-likelihood, is greedy) of each choice; the first wins a tie."""
    likelihood = [value for value, _ in results]
    per_byte = [value / len(choice.encode()) for value, choice in zip(likelihood, doc["choices"], strict=True)]
    right = doc["label"]
    return {
        "acc": float(likelihood.index(max(likelihood)) == right),
        "acc_norm": float(per_byte.index(max(per_byte)) == right),
    }

"""Scoring tasks in tests: with every option at hand, of the demo's items, or of tasks made on the spot."""

import json
import textwrap

from moe_compress.evaluate.tasks import score_tasks
from moe_compress.progress import Progress


class Counting(Progress):
    def __init__(self):
        self.layers, self.steps = [], 0

    def layer(self, index):
        self.layers.append(index)

    def step(self, text=""):
        self.steps += 1


def score(model, tokenizer, names, path, **options):
    options = {"batch_size": 8, "limit": None, "max_length": None, "progress": Progress(), **options}
    return score_tasks(model, tokenizer, names, task_path=path, **options)


def items_of(demo, kind, count):
    lines = (demo / "items" / f"{kind}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:count]]


def task_file(folder, name, rows, text, **files):
    """A task of one's own: YAML and its data, both in `folder`."""
    (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / f"{name}_data.py").write_text(
        f"import datasets, json, pathlib\n"
        f"rows = json.loads((pathlib.Path(__file__).parent / '{name}.json').read_text())\n"
        f"def load(**_):\n    return {{'test': datasets.Dataset.from_list(rows)}}\n"
    )
    head = f"task: {name}\ncustom_dataset: !function {name}_data.load\ntest_split: test\n"
    (folder / f"{name}.yaml").write_text(head + textwrap.dedent(text))

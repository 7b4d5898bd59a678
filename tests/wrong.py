"""What a user can get wrong: where, and that it ends in one line that says what, where and what to do."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import PRUNE, recipe, write_recipe
from running import Commands, digest

SHARD = "model-00002-of-00002.safetensors"


@dataclass
class Place:
    """A folder of a user's own: a model, text, a recipe for them. Cases change it and say what to run."""

    folder: Path
    original: Path

    @property
    def model(self) -> Path:
        """A copy of the model, to be damaged."""
        path = self.folder / "model"
        if not path.exists():
            shutil.copytree(self.original, path)
        return path

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def text(self) -> Path:
        return self.folder / "text"

    def run(self, passes: list[Any] | None = None, *more: Any, model: Path | None = None, **changes: Any) -> list[Any]:
        values = recipe(model or self.original, self.output, passes or [PRUNE], self.text)
        for key, value in changes.items():
            nested = isinstance(value, dict) and isinstance(values.get(key), dict)
            values[key] = {**values[key], **value} if nested else value
        return ["run", write_recipe(self.folder / "recipe.yaml", values), *more]

    def written(self, yaml_text: str) -> list[Any]:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml_text)
        return ["run", path]

    def damaged(self, change: Callable[[Path], Any]) -> list[Any]:
        change(self.model)
        return self.run(model=self.model)


# What to run, exit code, parts of the line.
Case = tuple[Callable[[Place], list[Any]], int, list[str]]


def assert_one_line(case: Case, place: Place, commands: Commands) -> None:
    """Nothing is touched; where work had begun, only the workspace is new."""
    prepare, code, parts = case
    arguments = prepare(place)
    before, source = digest(place.folder), digest(place.original)
    ran = commands(*arguments)
    assert ran.line  # one line that begins with the program's name, no traceback
    assert ran.code == code, ran.err
    assert ran.out == ""
    for part in parts:
        assert part in ran.line
    assert digest(place.original) == source
    after = digest(place.folder)
    if code == 2:
        assert after == before  # nothing was begun
    else:  # failed while running: only the workspace is new, from which it would go on
        assert {name: d for name, d in after.items() if not name.startswith("out.work")} == before

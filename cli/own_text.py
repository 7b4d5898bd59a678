"""Recipes with text of the user's own; and what is said where a ready recipe still has the demo's.

Ready recipes run as they stand on the demo checkpoint, so they name its texts, in sequences as short as it reads. On
another model that text would calibrate without a word, and quality would suffer without a word.
"""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_compress.errors import InputError
from moe_compress.feasibility import usual_length
from moe_compress.model import read_config
from moe_compress.recipe import Recipe, read_recipe
from moe_compress.recipes import DEMO, find_recipe, is_ready

_LENGTH = 2048


def with_text(name: str, settings: Mapping[str, str], calibrate: Sequence[str], text: Sequence[str]) -> Recipe:
    """A recipe, ready or of the user's, that calibrates and scores on these files where any are given.

    In a ready recipe they also stand for sequences of 2048 tokens, or as many as the model reads, unless the settings
    say how long. Raises InputError where nothing would read them, and RecipeError.
    """
    path = find_recipe(name)
    files = {"calibration.sources": calibrate, "evaluate.text": text}
    changes = {**settings, **{key: json.dumps(list(own)) for key, own in files.items() if own}}
    recipe = read_recipe(path, changes)
    if calibrate and not any(step.needs_text() for step in recipe.steps()):
        raise InputError(f"--calibrate: no pass of {name} reads text, leave it out")
    lengths = {f"{key.split('.')[0]}.length" for key, own in files.items() if own} - settings.keys()
    if not is_ready(path) or not lengths:
        return recipe
    length = usual_length(read_config(recipe.model), _LENGTH)
    return read_recipe(path, {**changes, **dict.fromkeys(lengths, str(length))})


def of_the_demo(recipe: Recipe, name: str) -> str | None:
    """A line where a model that isn't the demo calibrates, or is scored, on the demo's text.

    Raises InputError where a ready recipe's text isn't here.
    """
    here = (DEMO / "moe-demo").is_dir()
    if not here and not is_ready(find_recipe(name)):
        return None  # another folder of that name
    calibration = recipe.calibration.sources if recipe.calibration is not None else []
    reads = {
        ("calibrates", "--calibrate TEXT"): [source.path for source in calibration if source.path],
        ("scores", "--text TEXT"): recipe.evaluate.text,
    }
    reads = {use: own for use, paths in reads.items() if (own := [p for p in paths if DEMO in Path(p).parents])}
    if not reads:
        return None
    does, instead = (" and ".join(words) for words in zip(*reads, strict=True))
    for path in itertools.chain(*reads.values()):
        if not glob.glob(path):
            raise InputError(f"{name} {does} on the demo's text, and {path} isn't here: give yours by {instead}")
    if Path(recipe.model).resolve().parent == DEMO.resolve():
        return None
    return f"{name} {does} on the demo's text, which says little of another model: give yours by {instead}"

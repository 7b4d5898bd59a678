"""Ready recipes: each runs as it stands on the demo checkpoint, from the project's folder.

On a model of one's own: `moe-compress run NAME --model … --output … --calibrate TEXT --text TEXT`.
"""

from __future__ import annotations

from pathlib import Path

from moe_compress.errors import RecipeError, nearest

_FOLDER = Path(__file__).parent
DEMO = Path("demo")  # where what they name lies, seen from there


def ready_recipes() -> dict[str, str]:
    """Name → first line of its comment: when to use it."""
    found = {}
    for path in sorted(_FOLDER.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        found[path.stem] = first.removeprefix("#").strip()
    return found


def is_ready(path: Path) -> bool:
    """Whether a recipe file is one of the ready ones."""
    return path.resolve().parent == _FOLDER.resolve()


def find_recipe(name: str) -> Path:
    """A recipe file by path, or a ready recipe by name. Raises RecipeError with the nearest name."""
    path = Path(name)
    if path.is_file():
        return path
    ready = _FOLDER / f"{name}.yaml"
    if ready.is_file():
        return ready
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise RecipeError(f"no such recipe: {name}")
    raise RecipeError(f"no ready recipe is called {name!r}{nearest(name, ready_recipes())}")

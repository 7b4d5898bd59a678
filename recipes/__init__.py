"""Ready recipes: each runs as it stands on the demo checkpoint, and on yours with `--set model=… --set output=…`."""

from __future__ import annotations

from pathlib import Path

from moe_compress.errors import RecipeError, nearest

_FOLDER = Path(__file__).parent


def ready_recipes() -> dict[str, str]:
    """Name → first line of its comment: when to use it."""
    found = {}
    for path in sorted(_FOLDER.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        found[path.stem] = first.removeprefix("#").strip()
    return found


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

"""moe-compress: makes Mixture-of-Experts language models small enough to run.

    import moe_compress

    moe_compress.run("recipe.yaml")                                   # a checkpoint folder, layer by layer
    result = moe_compress.compress(model, tokenizer=tokenizer, passes=[…], calibration=…)   # a loaded model
    model = moe_compress.load("out/compressed")                       # what either wrote
    found = moe_compress.analyse(model, "text.jsonl", tokenizer=tokenizer)    # what its routing does

After `import moe_compress`, transformers' own `from_pretrained` loads such folders too. Importing is cheap: what is
heavy is imported when it is used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_compress.analysis import analyse
    from moe_compress.api import CompressedModel, compress
    from moe_compress.domains import find_patterns
    from moe_compress.export.loader import load
    from moe_compress.export.verify import verify
    from moe_compress.model import MoEModel, experts_per_token
    from moe_compress.pipeline import run
    from moe_compress.recipe import read_recipe

_PUBLIC = {
    "CompressedModel": "moe_compress.api",
    "MoEModel": "moe_compress.model",
    "analyse": "moe_compress.analysis",
    "compress": "moe_compress.api",
    "experts_per_token": "moe_compress.model",
    "find_patterns": "moe_compress.domains",
    "load": "moe_compress.export.loader",
    "read_recipe": "moe_compress.recipe",
    "run": "moe_compress.pipeline",
    "verify": "moe_compress.export.verify",
}

__all__ = [
    "CompressedModel",
    "MoEModel",
    "analyse",
    "compress",
    "experts_per_token",
    "find_patterns",
    "load",
    "read_recipe",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moe_compress' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


_QUANTIZERS = "transformers.quantizers.auto"


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Registers the native format as soon as transformers' table of quantizers exists; imports nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    importlib.import_module("moe_compress.export.registration").register()


if _QUANTIZERS in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())

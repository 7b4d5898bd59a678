"""Benchmarks aren't run here, but every one can still be imported: what it takes from the package is there."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
# What is run by the Python of another environment, and what needs Triton to be imported.
ELSEWHERE = {"llm_compressor_peer"}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ELSEWHERE)


@pytest.mark.parametrize("name", NAMES)
def test_imports_what_there_is(name, monkeypatch):
    if name == "native_gpu":
        pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    module = importlib.import_module(name)
    assert Path(module.__file__) == FOLDER / f"{name}.py"
    assert (hasattr(module, "main")) == (name not in {"cells", "demo_model"})
    for loaded in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[loaded], "__file__", None)):
            del sys.modules[loaded]

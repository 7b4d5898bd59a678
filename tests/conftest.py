"""Shared by all tests: nothing is downloaded, one thread (two contend on small tensors), quiet libraries."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error"
)

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from places import DEMO

from moe_compress.heap import reuse_freed

reuse_freed()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return DEMO / "moe-demo"


@pytest.fixture(scope="session")
def tokenizer(demo_model) -> Any:
    """The demo checkpoint's. Nobody changes it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="session")
def calibration() -> dict[str, Any]:
    """Settings for a little of the demo's text, for tiny models that have its vocabulary."""
    return {"sources": str(DEMO / "calibration.jsonl"), "sequences": 6, "length": 32, "batch_size": 3}


@pytest.fixture(scope="session")
def commands():
    """Runs `moe-compress ARGUMENTS` in a process of its own (tests/running.py)."""
    from running import Commands

    with Commands() as run:
        yield run


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A small checkpoint that runs take a second on (tests/checkpoints.py). Nobody changes it."""
    from checkpoints import small_checkpoint

    return small_checkpoint(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Calibration and held-out text for it."""
    from checkpoints import texts

    return texts(tmp_path_factory.mktemp("small") / "text")

"""The demo model as it is scored: loaded, and layer by layer from its folder."""

import pytest
import torch

from moe_compress.evaluate import tasks
from moe_compress.export.loader import load
from moe_compress.model import MoEModel


@pytest.fixture(scope="module")
def loaded(demo_model):
    return load(demo_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def streamed(demo_model):
    return MoEModel.open(demo_model)


@pytest.fixture(params=["loaded", "streamed"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def no_lm_eval_tasks(monkeypatch):
    """lm-eval knows nothing but what task_path holds: reading its own ten thousand files takes ten seconds."""
    monkeypatch.setattr(tasks, "_lm_eval_tasks", lambda: {"hellaswag": None})

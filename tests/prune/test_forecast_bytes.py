"""What `--dry-run` predicts where experts disappear is what the written file takes, router rows included."""

import pytest
from checkpoints import recipe
from families import input_batch, tiny_model

import moe_compress
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.export.targets import find_target
from moe_compress.feasibility import forecast
from moe_compress.model import MoEModel
from moe_compress.model.shape import model_shape
from moe_compress.pipeline import plan_run
from moe_compress.progress import Monitor
from moe_compress.recipe import make_passes, make_recipe

PROTECT = {"protect_super_experts": False}
RANDOM = {"prune.experts": {"experts": 4, "criterion": "random", "refit": False, **PROTECT}}
REMOVING = {
    "random": [RANDOM],
    "rounds": [{"prune.experts": {"experts": 4, "steps": 2, **PROTECT}}],
    "global": [{"prune.experts": {"keep": 0.75, "scope": "global", **PROTECT}}],
    "novices": [{"prune.experts": {"experts": 4, "replace": "mean", **PROTECT}}],
    "dern": [{"prune.dern": {"experts": 4, **PROTECT}}],
    "merge": [{"merge.average": {"experts": 4, **PROTECT}}],
    "merge, router as it is": [{"merge.average": {"experts": 4, "router": "remap", **PROTECT}}],
    "and quantized": [RANDOM, {"quantize.scheme": {"scheme": "w8a8"}}],
}


def written(folder):
    with Checkpoint(folder) as checkpoint:
        return checkpoint.nbytes


# Correction biases, biases of routers, scales per expert, classes that are no experts, norms, tables of tokens.
FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4", "zaya", "inkling", "muse_spark", "deepseek_v4", "phimoe"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_router(name, tmp_path):
    model = tiny_model(name)
    shape = model_shape(MoEModel.wrap(model))
    predicted = forecast(shape, make_passes([RANDOM], find_target("native")), find_target("native"))[-1]
    ids = input_batch(model)["input_ids"]
    result = moe_compress.compress(model, passes=[RANDOM], calibration=ids, monitor=Monitor(show=False))
    assert result.report["after"]["bytes"] == predicted.total_bytes < shape.total_bytes
    assert result.report["after"]["expert_bytes"] == predicted.expert_bytes
    result.save(tmp_path / "out")
    assert written(tmp_path / "out") == predicted.total_bytes


@pytest.mark.parametrize("case", REMOVING)
def test_a_dry_run(case, small, text, tmp_path):
    values = recipe(small, tmp_path / "out", REMOVING[case], text, evaluate={})
    _, predicted = plan_run(make_recipe(values))
    report = moe_compress.run(values, monitor=Monitor(show=False)).report
    assert predicted.after.total_bytes == report["after"]["bytes"] == written(tmp_path / "out")

"""A run that packs everything, killed at each of its commits: the same command gives the same bytes."""

import shutil

import pytest
from checkpoints import recipe, small_checkpoint, write_recipe
from test_killed import STAGE, result

INCLUDE = ["experts", "attention", "dense_mlp", "embeddings", "head"]
PASSES = [
    {"prune.experts": {"experts": 6, "criterion": "reap"}},
    {"quantize.mixed": {"bits": 5, "group_size": 16, "include": INCLUDE, "dense_widths": [4, 8]}},
]
STAGES = {
    "measured": ("checkpoint.workspace", "PassStore.save_plan", 2),
    "outside the layers": ("checkpoint.workspace", "PassStore.commit", 3),
    "dense layer": ("checkpoint.workspace", "PassStore.commit", 4),
    "layer with experts": ("checkpoint.workspace", "PassStore.commit", 5),
    "last layer": ("checkpoint.workspace", "PassStore.commit", 6),
    "export": ("checkpoint.writer", "CheckpointWriter._close_shard", 1),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text, commands):
    """(recipe's file, its output, what it gives)."""
    folder = tmp_path_factory.mktemp("beside")
    model = small_checkpoint(folder / "model", mlp_only_layers=[0])
    file = write_recipe(folder / "recipe.yaml", recipe(model, folder / "out", PASSES, text, evaluate={}))
    ran = commands("run", file)
    assert (ran.code, ran.err) == (0, "")
    return file, folder / "out", result(folder / "out")


@pytest.mark.parametrize(
    "stage",
    [pytest.param(s, marks=[pytest.mark.slow] * (s in ("measured", "last layer", "export"))) for s in STAGES],
)
def test_killed_and_gone_on_with(stage, undisturbed, commands):
    file, output, expected = undisturbed
    shutil.rmtree(output)
    module, name, at = STAGES[stage]
    killed = commands("run", file, plant=STAGE + f"kill_at({module!r}, {name!r}, {at})")
    assert killed.code == -9
    assert not output.exists()
    work = output.with_name("out.work") / "pass-01-quantize.mixed"
    if name == "PassStore.commit":
        done = {p.name for p in work.glob("*.safetensors")}
        order = ["outer.safetensors", *(f"layer-{i:04d}.safetensors" for i in range(3))]
        assert done == set(order[: at - 3])
    again = commands("run", file)
    assert again.code == 0, again.err
    assert "continuing the run in" in again.err
    assert result(output) == expected
    assert not output.with_name("out.work").exists()

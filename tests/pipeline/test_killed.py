"""A run that is killed, anywhere, goes on with the same command and gives the same bytes."""

import shutil
from pathlib import Path

import pytest
from checkpoints import GPTQ, PRUNE, recipe, small_checkpoint, write_recipe
from running import KILL, Commands, digest

# Kills the process before the `at`-th call of a function of the package.
STAGE = """
import importlib, os
def kill_at(module, name, at=1):
    owner = importlib.import_module("moe_compress." + module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, made = getattr(owner, name), []
    def call(*arguments, **keywords):
        made.append(1)
        if len(made) == at:
            os.kill(os.getpid(), 9)
        return real(*arguments, **keywords)
    setattr(owner, name, call)
"""
STAGES = {
    "calibration text": ("pipeline", "read_draft", 1),
    "workspace": ("checkpoint.workspace", "write_json", 1),
    "sweep, first layer": ("checkpoint.workspace", "DiskStatistics.put", 1),
    "sweep, second layer": ("checkpoint.workspace", "DiskStatistics.put", 4),
    "plan": ("checkpoint.workspace", "PassStore.save_plan", 1),
    "first layer": ("checkpoint.workspace", "PassStore.commit", 1),
    "second layer": ("checkpoint.workspace", "PassStore.commit", 2),
    "second pass, plan": ("checkpoint.workspace", "PassStore.save_plan", 2),
    "second pass, second layer": ("checkpoint.workspace", "PassStore.commit", 4),
    "second pass, old layer": ("checkpoint.workspace", "PassStore.drop", 2),
    "probe": ("probe", "streamed", 1),
    "export": ("checkpoint.writer", "CheckpointWriter._close_shard", 1),
    "publishing": ("checkpoint.writer", "CheckpointWriter._publish", 1),
    "verification": ("export.verify", "ask", 1),
    "scoring": ("evaluate.score", "score_text", 1),
    "report": ("report.text", "write_text", 1),
    "end of the report": ("report.text", "write_json", 1),
    "clearing up": ("checkpoint.workspace", "clear", 1),
}


class Undisturbed:
    """A recipe, what it gives when nothing happens, and the same again after a kill."""

    def __init__(self, folder: Path, text: Path, commands: Commands):
        self.folder, self.commands = folder, commands
        model = small_checkpoint(folder / "model", num_hidden_layers=2)
        self.output = folder / "out"
        self.recipe = write_recipe(folder / "recipe.yaml", recipe(model, self.output, [PRUNE, GPTQ], text))
        self.log = folder / "log"
        self.outside = {p.name for p in folder.iterdir()} | {"log"}
        ran = self.run(plant=KILL + f"_kill_before(0, {str(self.log)!r})")
        assert (ran.code, ran.err) == (0, "")
        self.calls = len(self.log.read_text().splitlines())
        self.result = result(self.output)
        assert self.beside() == {"out"}

    def run(self, *options: str, plant: str = ""):
        return self.commands("run", self.recipe, *options, plant=plant)

    def beside(self) -> set[str]:
        """What the runs left."""
        return {p.name for p in self.folder.iterdir()} - self.outside

    def clean(self) -> None:
        for name in self.beside():
            shutil.rmtree(self.folder / name)

    def assert_undisturbed(self, plant: str, *options: str) -> None:
        killed = self.run(*options, plant=plant)
        assert killed.code == -9
        if self.output.exists():
            assert result(self.output) == self.result  # nothing under the output's name but the whole of it
        again = self.run(*options)
        assert again.code == 0, again.err
        assert again.err.count("\n") == ("continuing the run in" in again.err)
        assert result(self.output) == self.result
        assert {"report.json", "report.md"} <= {p.name for p in self.output.iterdir()}
        assert self.beside() == {"out"}


def result(output: Path) -> dict[str, str]:
    """Digests of a result; reports hold times."""
    return {name: d for name, d in digest(output).items() if not name.startswith("report.")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text, commands):
    return Undisturbed(tmp_path_factory.mktemp("killed"), text, commands)


@pytest.fixture
def job(undisturbed):
    undisturbed.clean()
    return undisturbed


# Alike enough to others for every day.
SELDOM = ("calibration text", "workspace", "sweep, first layer", "first layer", "second pass, plan", "probe", "export")


@pytest.mark.parametrize("stage", [pytest.param(s, marks=[pytest.mark.slow] * (s in SELDOM)) for s in STAGES])
def test_killed_at_a_stage(stage, job):
    module, name, at = STAGES[stage]
    job.assert_undisturbed(STAGE + f"kill_at({module!r}, {name!r}, {at})")


def kill_before(at: int) -> str:
    return KILL + f"_kill_before({at})"


@pytest.mark.parametrize("share", [0.3, 0.8, 0.97])
def test_killed_before_a_file_operation(share, job):
    job.assert_undisturbed(kill_before(max(1, round(share * job.calls))))


@pytest.mark.slow
def test_killed_before_any_file_operation(job):
    for at in range(1, job.calls + 1):
        job.clean()
        job.assert_undisturbed(kill_before(at))


@pytest.mark.parametrize("moment", ["partial", "replaced"])
def test_killed_while_an_old_output_is_replaced(moment, job):
    """The old folder is there, or the new one, or (for an instant) neither: never a mixture."""
    job.output.mkdir()
    (job.output / "old.txt").write_text("old")
    plant = f"""
import os
real = os.replace
def replace(source, target):
    if str(source).endswith(".work-partial" if {moment == "replaced"} else "/out"):
        os.kill(os.getpid(), 9)
    return real(source, target)
os.replace = replace
"""
    killed = job.run("--overwrite", plant=plant)
    assert killed.code == -9
    if moment == "partial":
        assert digest(job.output).keys() == {"old.txt"}
    else:
        assert not job.output.exists()
        assert (job.folder / "out.work-replaced" / "old.txt").read_text() == "old"
    again = job.run("--overwrite")
    assert again.code == 0, again.err
    assert result(job.output) == job.result
    assert job.beside() == {"out"}

"""Whose unfinished work a workspace is: its own run's, one at a time, until --fresh."""

import ctypes
import errno
import json
import os

import pytest
import torch
import yaml
from checkpoints import GPTQ, PRUNE, recipe, write_recipe
from running import digest

from moe_compress.checkpoint.workspace import Workspace
from moe_compress.errors import RunError
from moe_compress.model import MoEModel
from moe_compress.model.sweep import Sweep

# Kills a run when all statistics are there, and one layer of the first pass.
KILLED = """
import os
from moe_compress.checkpoint.workspace import PassStore
commit = PassStore.commit
def call(self, layer, *arguments):
    if layer == 1:
        os.kill(os.getpid(), {signal})
    return commit(self, layer, *arguments)
PassStore.commit = call
"""
NO_MEASURING = "import os, moe_compress.engine as e\ne.collect = lambda *a: os.kill(os.getpid(), 9)"


@pytest.fixture
def job(small, text, tmp_path):
    (tmp_path / "home").mkdir()
    values = recipe(small, tmp_path / "home" / "out", [PRUNE, GPTQ], text, evaluate={})
    return write_recipe(tmp_path / "recipe.yaml", values)


def changed(path, **changes):
    return write_recipe(path, {**yaml.safe_load(path.read_text()), **changes})


def report(job):
    return json.loads((job.parent / "home" / "out" / "report.json").read_text())


def test_matching_work_is_gone_on_with(job, commands):
    assert commands("run", job, plant=KILLED.format(signal=9)).code == -9
    again = commands("run", job)
    assert again.code == 0
    assert again.err == f"continuing the run in {job.parent / 'home' / 'out.work'}\n"
    assert "prune.experts: measure" not in [s["name"] for s in report(job)["stages"]]


def test_other_work_is_refused_and_said(job, commands):
    commands("run", job, plant=KILLED.format(signal=9))
    changed(job, passes=[{"prune.experts": {"experts": 5, "criterion": "reap"}}, GPTQ], seed=7)
    before = digest(job.parent)
    refused = commands("run", job)
    assert refused.code == 2
    for part in ("out.work", "passes[0].prune.experts.experts: was 6, is 5", "seed: was 0, is 7", "--fresh"):
        assert part in refused.line
    assert digest(job.parent) == before

    # What was measured on the same text is kept: nothing is measured before the first plan.
    killed = commands("run", job, "--fresh", plant=KILLED.format(signal=9) + NO_MEASURING)
    assert killed.code == -9
    assert (job.parent / "home" / "out.work" / "pass-00-prune.experts" / "plan.json").is_file()
    fresh = commands("run", job, "--fresh")
    assert fresh.code == 0, fresh.err
    assert fresh.err == f"starting over with what was measured before in {job.parent / 'home' / 'out.work'}\n"
    assert report(job)["layers"][0]["num_experts"] == 5


def test_what_was_measured_otherwise_is_measured_again(job, commands):
    """--fresh keeps statistics, and says so; not those that another dtype has given."""
    said = " ".join(commands("run", "--help").out.split())
    assert "What it measured on the same model and text is kept" in said
    commands("run", job, plant=KILLED.format(signal=9))
    changed(job, compute={"dtype": "bfloat16"})
    refused = commands("run", job)
    assert "compute.dtype: was auto, is bfloat16" in refused.line.replace('"', "")
    assert commands("run", job, "--fresh", plant=NO_MEASURING).code == -9


def test_other_text_is_other_work(job, commands):
    commands("run", job, plant=KILLED.format(signal=9))
    values = yaml.safe_load(job.read_text())
    changed(job, calibration={**values["calibration"], "seed": 1})
    refused = commands("run", job)
    assert refused.code == 2
    assert "calibration.seed: was 0, is 1" in refused.line
    assert "data: " in refused.line


def test_an_edited_plugin_is_other_work(job, commands):
    plugin = job.parent / "mine.py"
    score = (
        "from moe_compress.prune.criteria import criterion, frequency\n"
        "from moe_compress.calib.statistics import Routing\n"
        "@criterion('mine', 'mine', Routing())\n"
        "def mine(measured, asked):\n"
        "    return {sign}frequency(measured, asked)\n"
    )
    plugin.write_text(score.format(sign=""))
    changed(job, plugins=[str(plugin)], passes=[{"prune.experts": {"experts": 6, "criterion": "mine"}}])
    commands("run", job, plant=KILLED.format(signal=9))
    plugin.write_text(score.format(sign="-"))
    refused = commands("run", job)
    assert refused.code == 2
    assert "belongs to another run (plugins.mine.py[0]: was " in refused.line
    killed = commands("run", job, "--fresh", plant=NO_MEASURING)
    assert killed.code == -9  # what the edited file measures may be something else under the same name
    assert commands("run", job).code == 0


@pytest.mark.parametrize("edited", ["one", "two"])
def test_plugins_of_one_name_are_told_apart(edited, job, commands):
    """An edit of either is other work; the folders that they lie in are not."""
    score = (
        "from moe_compress.prune.criteria import criterion, frequency\n"
        "from moe_compress.calib.statistics import Routing\n"
        "@criterion('{name}', 'mine', Routing())\n"
        "def mine(measured, asked):\n"
        "    return frequency(measured, asked)\n"
    )
    plugins = {folder: job.parent / folder / "mine.py" for folder in ("one", "two")}
    for folder, plugin in plugins.items():
        plugin.parent.mkdir()
        plugin.write_text(score.format(name=folder))
    passes = [{"prune.experts": {"experts": 6, "criterion": "two"}}]
    changed(job, plugins=[str(p) for p in plugins.values()], passes=passes)
    commands("run", job, plant=KILLED.format(signal=9))
    plugins[edited].write_text(score.format(name=edited) + "# edited\n")
    refused = commands("run", job)
    assert refused.code == 2
    assert f"plugins.mine.py[{list(plugins).index(edited)}]: was " in refused.line
    plugins[edited].write_text(score.format(name=edited))
    plugins["two"].parent.rename(job.parent / "elsewhere")
    changed(job, plugins=[str(plugins["one"]), str(job.parent / "elsewhere" / "mine.py")])
    assert commands("run", job).err.startswith("continuing")


def test_what_does_not_change_bytes_may_change(job, commands):
    commands("run", job, plant=KILLED.format(signal=9))
    changed(job, compute={"hidden_states": "disk", "memory": "8 GB"}, keep_workspace=True)
    again = commands("run", job)
    assert again.code == 0
    assert "continuing" in again.err
    assert (job.parent / "home" / "out.work" / "workspace.json").is_file()


def test_nothing_is_lost_by_claiming_a_workspace_without_work(job, commands):
    assert commands("run", job, plant=NO_MEASURING).code == -9
    changed(job, seed=7)
    assert commands("run", job).code == 0


def test_left_overs_of_a_removal_belong_to_nobody(job, commands):
    """A workspace that was half removed holds layers of a run that nothing names: they are not taken for one's own."""
    commands("run", job, plant=KILLED.format(signal=9))
    (job.parent / "home" / "out.work" / "workspace.json").unlink()
    changed(job, passes=[{"prune.experts": {"experts": 5, "criterion": "reap"}}])
    assert commands("run", job).code == 0
    assert {layer["num_experts"] for layer in report(job)["layers"]} == {5}


def test_two_runs_at_once(job, commands):
    commands("run", job, plant=KILLED.format(signal=9))
    folder = job.parent / "home" / "out.work"
    with Workspace(folder, json.loads((folder / "workspace.json").read_text())):  # held by this process
        before = digest(job.parent)
        second = commands("run", job)
        assert second.code == 2
        assert "another run is working in" in second.line
        assert str(folder) in second.line
        assert digest(job.parent) == before
    assert commands("run", job).code == 0


WORKER = """
import os, threading, torch
forward = torch.nn.Embedding.forward
def call(self, ids):
    assert threading.current_thread() is not threading.main_thread()
    os.kill(os.getpid(), 2)
    return forward(self, ids)
torch.nn.Embedding.forward = call
"""


@pytest.mark.parametrize("plant", [KILLED.format(signal=2), WORKER], ids=["commit", "forward"])
def test_interrupting(plant, job, commands):
    stopped = commands("run", job, plant=plant)
    assert stopped.code == 130
    assert stopped.line == "moe-compress: interrupted: the same command goes on from here"
    assert not (job.parent / "home" / "out").exists()
    assert commands("run", job).code == 0


FULL = """
import errno, os
fsync, made = os.fsync, []
def full(descriptor):
    made.append(1)
    if len(made) == {at}:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return fsync(descriptor)
os.fsync = full
"""
# No file may grow beyond this: real writes fail, those of safetensors included.
SHORT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (FULL.format(at=3), "the disk is full"),
        pytest.param(FULL.format(at=40), "the disk is full", marks=pytest.mark.slow),
        (FULL.format(at=60), "the disk is full"),
        pytest.param(SHORT.format(size=20_000), "could not be written", marks=pytest.mark.slow),
        (SHORT.format(size=100_000), "could not be written"),
    ],
)
def test_a_full_disk(plant, said, job, commands, small):
    source = digest(small)
    failed = commands("run", job, plant=plant)
    assert failed.code == 1
    assert said in failed.line
    assert str(job.parent / "home") in failed.line
    assert not (job.parent / "home" / "out").exists()
    assert digest(small) == source
    again = commands("run", job)
    assert again.code == 0
    assert report(job)["verification"]["tensors"] > 0
    assert [p.name for p in (job.parent / "home").iterdir()] == ["out"]


def test_a_disk_too_full_for_hidden_states(small, tmp_path, monkeypatch):
    sweep = Sweep(MoEModel.open(small), [], tmp_path)
    large = torch.arange(1 << 19, dtype=torch.float32)
    assert torch.equal(sweep.held(large, "one"), large)
    assert (tmp_path / "one-0.bin").stat().st_size == 4 << 19

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"the disk is full: .* hidden states"):
        sweep.held(large, "two")


# Gives up what lets root write anywhere.
POWERLESS = """
import ctypes
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, none) == 0
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "capset"), reason="needs Linux")
def test_a_folder_that_may_not_be_written_to(job, commands):
    home = job.parent / "home"
    home.chmod(0o555)
    try:
        refused = commands("run", job, plant=POWERLESS)
    finally:
        home.chmod(0o755)
    assert refused.code == 2
    assert str(home) in refused.line
    assert "may not be written to" in refused.line
    assert list(home.iterdir()) == []


DAMAGED = """
import moe_compress.pipeline as p
verify = p.verify
def damaged(folder, *arguments):
    path = folder / "config.json"
    path.write_text(path.read_text() + " ")
    return verify(folder, *arguments)
p.verify = damaged
"""


def test_a_result_that_does_not_verify_is_written_again(job, commands):
    failed = commands("run", job, plant=DAMAGED)
    assert failed.code == 1
    assert "config.json was changed" in failed.line
    assert not (job.parent / "home" / "out" / "report.json").exists()
    assert commands("run", job).code == 1  # still damaged, still said
    again = commands("run", job, "--overwrite")
    assert again.code == 0, again.err
    assert report(job)["verification"]["tensors"] > 0

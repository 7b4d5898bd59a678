"""Ready recipes on a model and text of the user's own: what they read then, and what is said where they don't."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import PRUNE, recipe, write_recipe
from places import ROOT

from moe_compress.cli.own_text import with_text
from moe_compress.recipe import read_recipe

READY = ROOT / "recipes"
GROUPS = ("--set", "passes.0.group_size=32", "--set", "passes.0.bits=4.5")  # the tiny model is 32 wide


def test_files_stand_for_the_demo_s(small):
    checked = with_text("reap-25", {"model": str(small)}, ["a.jsonl", "b*.txt"], ["c.txt"])
    before = read_recipe(READY / "reap-25.yaml")
    assert [source.path for source in checked.calibration.sources] == ["a.jsonl", "b*.txt"]
    assert checked.evaluate.text == ["c.txt"]
    assert {source.domain_field for source in checked.calibration.sources} == {None}
    positions = json.loads((small / "config.json").read_text())["max_position_embeddings"]
    assert before.calibration.length != min(2048, positions)
    assert checked.calibration.length == checked.evaluate.length == min(2048, positions)
    assert checked.calibration.sequences == before.calibration.sequences
    assert checked.passes == before.passes


def test_lengths_that_are_said_stay(small):
    settings = {"model": str(small), "calibration.length": "64"}
    checked = with_text("reap-25", settings, ["a.jsonl"], [])
    assert (checked.calibration.length, checked.evaluate.length) == (64, 256)
    assert checked.evaluate.text == read_recipe(READY / "reap-25.yaml").evaluate.text


def test_a_recipe_of_one_s_own_keeps_its_lengths(small, text, tmp_path):
    path = write_recipe(tmp_path / "mine.yaml", recipe(small, tmp_path / "out", [PRUNE], text))
    before, checked = read_recipe(path), with_text(str(path), {}, ["a.txt"], ["b.txt"])
    assert [source.path for source in checked.calibration.sources] == ["a.txt"]
    assert checked.evaluate.text == ["b.txt"]
    assert checked.calibration.length == before.calibration.length
    assert checked.evaluate.length == before.evaluate.length


@pytest.mark.parametrize("name", ["reap-25", READY / "reap-25.yaml"])
def test_another_model_on_the_demo_s_text_is_said(name, commands, small, tmp_path):
    said = commands("run", name, "--model", small, "--output", tmp_path / "out", "--dry-run", "--set", "evaluate={}")
    assert said.code == 2  # the tiny model reads 128 tokens, the recipe's sequences have 256
    lengths = ("--set", "calibration.length=64", "--set", "evaluate.length=64")
    said = commands("run", name, "--model", small, "--output", tmp_path / "out", "--dry-run", *lengths)
    assert said.code == 0
    assert f"{name} calibrates and scores on the demo's text" in said.line
    assert said.line.endswith("give yours by --calibrate TEXT and --text TEXT")


def test_own_text_is_calibrated_and_scored_on(commands, small, text, tmp_path):
    """The README's command, on a model that isn't the demo, from a folder of the user's."""
    shutil.copytree(text, tmp_path / "text")
    own = ["--model", small, "--output", "out", "--calibrate", "text/cal*.jsonl", "--text", "text/held-out.txt"]
    said = commands("run", "reap-25", *own, "--set", "calibration.sequences=4", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["after"]["perplexity"]) == ["held-out"]
    assert report["tokens_seen"] == 4 * 128


def test_the_demo_s_text_is_elsewhere(commands, small, tmp_path):
    own = ["--model", small, "--output", tmp_path / "out", "--dry-run"]
    said = commands("run", "reap-25", *own, cwd=tmp_path)
    assert said.code == 2
    assert "demo/calibration.jsonl isn't here: give yours by --calibrate TEXT and --text TEXT" in said.line
    said = commands("run", "rtn-4bit", *own, cwd=tmp_path)
    assert said.code == 2
    assert "demo/text/*.jsonl isn't here: give yours by --text TEXT" in said.line


def test_a_dry_run_reads_the_text(commands, small, text, tmp_path):
    own = ["--model", small, "--output", tmp_path / "out", "--text", text / "held-out.txt", "--dry-run"]
    said = commands(
        "run", "reap-25", *own, "--calibrate", text / "calibration.jsonl", "--set", "calibration.sequences=4"
    )
    assert (said.code, said.err) == (0, "")
    assert "calibrated on 4 sequences of 128 tokens" in said.out.splitlines()
    said = commands(
        "run", "reap-25", *own, "--calibrate", text / "calibration.jsonl", "--set", "calibration.sequences=999"
    )
    assert said.code == 2
    assert "sequences of 128 tokens, not 999" in said.line
    said = commands("run", "reap-25", *own, "--calibrate", tmp_path / "none.txt")
    assert said.code == 2
    assert "none.txt: no such file" in said.line


def test_folders_are_names_not_yaml(commands, small, text, tmp_path):
    shutil.copytree(small, tmp_path / "2026-01-31")
    own = ["--model", "2026-01-31", "--output", "7", "--text", text / "held-out.txt", "--dry-run"]
    said = commands("run", "rtn-4bit", *own, *GROUPS, cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert "2026-01-31 → 7 for native" in said.out


def test_tasks_by_name(commands, small, text, tmp_path):
    own = ["--model", small, "--output", tmp_path / "out", "--text", text / "held-out.txt", "--dry-run"]
    said = commands("run", "rtn-4bit", *own, *GROUPS, "--tasks", "arc_easy,arc_esay")
    assert said.code == 2
    assert "unknown task 'arc_esay'; did you mean 'arc_easy'" in said.line


def test_a_glob_that_the_shell_read(commands, small, text, tmp_path):
    files = sorted(text.iterdir())
    said = commands("run", "reap-25", "--model", small, "--output", tmp_path / "out", "--calibrate", *files)
    assert said.code == 2
    assert "quote a glob" in said.line


def test_text_that_nothing_reads(commands, small, tmp_path):
    said = commands("run", "rtn-4bit", "--model", small, "--output", tmp_path / "out", "--calibrate", "a.jsonl")
    assert said.code == 2
    assert "--calibrate: no pass of rtn-4bit reads text" in said.line


def test_another_folder_called_demo(commands, small, text, tmp_path):
    """Only the project's own is meant."""
    shutil.copytree(text, tmp_path / "demo")
    values = recipe(small, tmp_path / "out", [PRUNE], Path("demo"), evaluate={})
    path = write_recipe(tmp_path / "mine.yaml", values)
    said = commands("run", path, "--dry-run", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")

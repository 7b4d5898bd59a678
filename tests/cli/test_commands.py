"""What commands print, where they print it, and what they needn't load for it."""

import json
import os
import subprocess
import sys

import pytest
from checkpoints import PRUNE, recipe, write_recipe
from places import ROOT
from running import digest

COMMANDS = ["run", "inspect", "domains", "evaluate", "verify", "passes", "families", "recipes"]


def test_help_is_light():
    """No command's help, the version, or the list of recipes imports torch or transformers."""
    code = f"""
import contextlib, io, sys
from moe_compress.cli import main
for arguments in (["--help"], ["--version"], ["recipes"], *([name, "--help"] for name in {COMMANDS!r})):
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main(arguments)
    except SystemExit as end:
        assert end.code == 0, arguments
    assert out.getvalue().strip(), arguments
    heavy = {{"torch", "transformers", "pydantic", "numpy"}} & sys.modules.keys()
    assert not heavy, (arguments, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_spin_little_unless_told_to(given, found):
    """Set before torch is there, which reads it when it loads."""
    code = "import sys, os, moe_compress.cli; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [found, "False"]


def test_every_command_is_tested_and_explained(commands):
    said = commands("--help")
    assert (said.code, said.err) == (0, "")
    listed = said.out.split("Commands:")[1].split()
    assert all(name in listed for name in COMMANDS)
    for name in COMMANDS:
        said = commands(name, "--help")
        assert (said.code, said.err) == (0, "")
        assert "--debug" in said.out


def test_inspect(commands, small):
    before = digest(small)
    said = commands("inspect", small)
    assert (said.code, said.err) == (0, "")
    assert "Qwen3MoeForCausalLM (qwen3_moe): 3 decoder layers, 3 with experts" in said.out
    row = next(line.split() for line in said.out.splitlines() if line.startswith("0–2"))
    assert row[1:4] == ["8", "2", "–"]  # experts, top-k, groups
    found = json.loads(commands("inspect", small, "--json").out)
    stored = sum(p.stat().st_size for p in small.glob("*.safetensors"))
    assert found["expert_bytes"] == 3 * 8 * 3 * 32 * 32 * 2
    assert found["expert_bytes"] < found["bytes"] < stored  # files have headers too
    assert [layer["experts"] for layer in found["layers"]] == [8, 8, 8]
    assert digest(small) == before


def test_passes(commands):
    said = commands("passes")
    assert (said.code, said.err) == (0, "")
    for name in ("prune.experts", "merge.average", "merge.subspace", "quantize.mixed", "native", "transformers"):
        assert f"\n{name} " in f"\n{said.out}"
    said = commands("passes", "prune.experts")
    assert (said.code, said.err) == (0, "")
    first = [line.split()[0] for line in said.out.splitlines() if line and not line.startswith(" ")]
    assert {"keep", "experts", "criterion", "scope", "minimum", "protect_super_experts", "seed"} <= set(first)
    assert "arXiv 2510.13999" in said.out


def test_families(commands):
    said = commands("families")
    assert (said.code, said.err) == (0, "")
    rows = {line.split()[0]: line for line in said.out.splitlines() if line.strip()}
    assert rows["qwen3_moe"].split() == ["qwen3_moe", "supported"]
    assert "refused: " in rows["dbrx"]
    assert "families are supported" in said.out


def ready() -> list[str]:
    return sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", ready())
def test_ready_recipes_are_listed_printed_and_sound(name, commands, demo_model, tmp_path):
    listed = next(line for line in commands("recipes").out.splitlines() if line.split()[0] == name)
    assert len(listed.split()) > 5  # and when to use it
    printed = commands("recipes", name)
    assert printed.out == (ROOT / "recipes" / f"{name}.yaml").read_text()
    source = digest(demo_model)
    output = tmp_path / "out"
    said = commands("run", name, "--dry-run", "--set", f"model={demo_model}", "--output", output)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(" ")
    assert "nothing was changed" in said.out
    assert not list(tmp_path.iterdir())
    assert digest(demo_model) == source


def test_a_path_is_not_broken(commands, small, text, tmp_path):
    """Output that goes elsewhere can be searched: long paths stay on one line."""
    output = tmp_path / ("long " * 20).strip() / ("name " * 20).strip()
    path = write_recipe(tmp_path / "recipe.yaml", recipe(small, output, [PRUNE], text, evaluate={}))
    said = commands("run", path)
    assert (said.code, said.err) == (0, "")
    assert f"checkpoint: {output}" in said.out.splitlines()
    assert commands("verify", output).out.startswith(f"{output}: ")


def test_debug_shows_the_traceback(commands, tmp_path):
    said = commands("inspect", tmp_path / "none", "--debug")
    assert said.code == 1
    assert "Traceback" in said.err
    assert "InputError: no such folder" in said.err


def test_the_unexpected_is_one_line_too(commands, small):
    said = commands("inspect", small, plant="import moe_compress.cli.show as s\ndel s.model_shape")
    assert said.code == 1
    assert "unexpected NameError" in said.line
    assert "--debug" in said.line
    said = commands(
        "inspect", small, plant="import moe_compress.cli.show as s\ndef f(*a): raise MemoryError\ns.model_shape = f"
    )
    assert said.code == 1
    assert "out of memory" in said.line


def test_a_reader_that_goes_away():
    """`moe-compress … | head` ends without a word."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from moe_compress.cli import main; main(['recipes'])"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")

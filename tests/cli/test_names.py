"""Checkpoints by the names that they have on the Hub, where its local cache holds them; nothing is downloaded."""

import json
import shutil

import pytest
import torch
from checkpoints import PRUNE, recipe, write_recipe

import moe_compress
from moe_compress.checkpoint.names import local_folder
from moe_compress.errors import InputError
from moe_compress.model import MoEModel
from moe_compress.recipe import make_recipe

NAME, REVISION = "somebody/Tiny-MoE-2x.1", "0" * 40


@pytest.fixture
def cache(tmp_path, small, monkeypatch):
    """A cache as the Hub's library lays it out: snapshots are links to blobs."""
    folder = tmp_path / "cache"
    kept = folder / f"models--{NAME.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(REVISION)
    snapshot = kept / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    shutil.copytree(small, kept / "blobs")
    for file in (kept / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def planted(cache) -> str:
    return f"import huggingface_hub.constants as c\nc.HF_HUB_CACHE = {str(cache)!r}"


def test_a_name_is_its_newest_snapshot(cache, small, tmp_path, monkeypatch):
    folder = local_folder(NAME)
    assert folder.endswith(f"snapshots/{REVISION}")
    assert MoEModel.open(NAME).source.fingerprint() == MoEModel.open(small).source.fingerprint()
    values = recipe(NAME, tmp_path / "out", [PRUNE])
    assert make_recipe(values).model == folder
    ids = torch.arange(8)[None]
    assert torch.equal(moe_compress.load(NAME)(ids).logits, moe_compress.load(small)(ids).logits)
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert local_folder(NAME) == NAME  # a folder that is there comes first


def test_a_run_of_a_cached_model(commands, cache, small, text, tmp_path):
    """Links are followed: the result holds files."""
    outputs = []
    for number, model in enumerate((NAME, small)):
        output = tmp_path / f"out{number}"
        path = write_recipe(tmp_path / "recipe.yaml", recipe(model, output, [PRUNE], text))
        said = commands("run", path, plant=planted(cache))
        assert (said.code, said.err) == (0, "")
        assert not any(file.is_symlink() for file in output.iterdir())
        outputs.append(output)
    first, second = ((output / "model.safetensors").read_bytes() for output in outputs)
    assert first == second
    used = json.loads((outputs[0] / "report.json").read_text())["recipe"]["model"]
    assert used == local_folder(NAME)  # which revision it was
    assert list((cache / f"models--{NAME.replace('/', '--')}").rglob("*.work")) == []
    said = commands("evaluate", outputs[0], "--against", NAME, "--text", text / "held-out.txt", plant=planted(cache))
    assert said.code == 0, said.err


@pytest.mark.parametrize("command", ["inspect", "run"])
def test_a_name_that_the_cache_lacks(command, commands, cache, text, tmp_path):
    arguments = {"inspect": ["another/model"]}
    path = write_recipe(tmp_path / "recipe.yaml", recipe("another/model", tmp_path / "out", [PRUNE], text))
    said = commands(command, *arguments.get(command, [path]), plant=planted(cache))
    assert said.code == 2
    assert "no such folder: another/model; if that is a model on the Hub" in said.line
    assert said.line.endswith("hf download another/model")
    with pytest.raises(InputError, match=r"no such folder: another/model$"):
        MoEModel.open("./another/model")  # a path, not a name

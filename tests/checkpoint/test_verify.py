"""Whatever happens to a written checkpoint, `verify` finds it and names it."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from checkpoints import RTN, recipe, write_recipe
from transformers import AutoTokenizer

SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory, small, commands) -> Path:
    folder = tmp_path_factory.mktemp("written")
    path = write_recipe(folder / "recipe.yaml", recipe(small, folder / "out", [no_calibration(RTN)]))
    assert commands("run", path).code == 0
    return folder / "out"


def no_calibration(step: dict) -> dict:
    return {name: {**options, "protect_super_experts": False} for name, options in step.items()}


def header(folder: Path) -> tuple[dict, int]:
    raw = (folder / SHARD).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), 8 + length


def flip(folder: Path, name: str) -> None:
    entries, data = header(folder)
    raw = bytearray((folder / SHARD).read_bytes())
    raw[data + entries[name]["data_offsets"][0]] ^= 1  # the lowest bit of the first number
    (folder / SHARD).write_bytes(raw)


def edit(folder: Path, file: str, **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(folder: Path, name: str) -> None:
    """The shard without one tensor, everything else in order."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / SHARD)
    del tensors[name]
    save_file(tensors, folder / SHARD)


def with_index(folder: Path, drop: str) -> None:
    """Two shards; the index forgets a tensor."""
    entries, _ = header(folder)
    (folder / SHARD).rename(folder / "model-00001-of-00001.safetensors")
    names = [n for n in entries if n not in ("__metadata__", drop)]
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def manifest(folder: Path) -> dict:
    return json.loads((folder / "moe_compress.json").read_text())


NORM = "model.layers.1.post_attention_layernorm.weight"
CODES = "model.layers.2.mlp.experts.up_proj.b4g32.codes"
SCALE = "model.layers.0.mlp.experts.down_proj.b4g32.scale"
DAMAGE = {
    "bit in a norm": (lambda f: flip(f, NORM), [SHARD, NORM]),
    "bit in codes": (lambda f: flip(f, CODES), [SHARD, CODES]),
    "bit in a scale": (lambda f: flip(f, SCALE), [SHARD, SCALE]),
    "no shard": (lambda f: (f / SHARD).unlink(), [SHARD]),
    "truncated shard": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-7]), [SHARD, "truncated"]),
    "longer shard": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"x"), [SHARD, "damaged"]),
    "no header": (lambda f: (f / SHARD).write_bytes(b""), [SHARD]),
    "lacking tensor": (lambda f: without(f, NORM), [NORM]),
    "index lacks a tensor": (lambda f: with_index(f, NORM), [NORM, "index.json"]),
    "config": (lambda f: edit(f, "config.json", rms_norm_eps=1e-5), ["config.json"]),
    "config without effect": (lambda f: edit(f, "config.json", max_position_embeddings=64), ["config.json"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "tokenizer": (lambda f: edit(f, "tokenizer_config.json", eos_token="a"), ["tokenizer_config.json"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "manifest": (lambda f: edit(f, "moe_compress.json", recipe={}), ["moe_compress.json"]),
    "digest in the manifest": (
        lambda f: edit(f, "moe_compress.json", tensors={**manifest(f)["tensors"], NORM: manifest(f)["tensors"][CODES]}),
        ["moe_compress.json"],
    ),
    "half a manifest": (
        lambda f: (f / "moe_compress.json").write_text((f / "moe_compress.json").read_text()[:500]),
        ["moe_compress.json"],
    ),
    "empty manifest": (lambda f: (f / "moe_compress.json").write_text("{}"), ["moe_compress.json"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(damage, written, tmp_path, commands):
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    change, parts = DAMAGE[damage]
    change(folder)
    ran = commands("verify", folder)
    assert (ran.code, ran.out) == (1, "")
    assert str(folder) in ran.line
    for part in parts:
        assert part in ran.line


def test_what_is_whole_is_said_to_be(written, tmp_path, commands):
    folder = tmp_path / "moved"
    shutil.copytree(written, folder)
    (folder / "README.md").write_text("a model card")  # the owner's to write
    ran = commands("verify", folder)
    assert (ran.code, ran.err) == (0, "")
    assert f"{len(manifest(folder)['tensors'])} tensors" in ran.out
    assert "transformers from_pretrained" in ran.out


def test_chat_templates_in_a_folder_of_their_own_come_along(small, tmp_path, commands):
    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(small, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    assert (source / "additional_chat_templates" / "tool_use.jinja").is_file()
    path = write_recipe(tmp_path / "recipe.yaml", recipe(source, output, [no_calibration(RTN)]))
    assert commands("run", path).code == 0
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template
    (output / "additional_chat_templates" / "tool_use.jinja").write_text("{{ other }}")
    said = commands("verify", output)
    assert said.code == 1
    assert "tool_use.jinja was changed since it was written" in said.line


def test_a_computation_that_changed_is_found(written, tmp_path, commands):
    """Every byte is as written, and what is computed from it is not: the probe tells."""
    plant = """
import torch
real = torch.nn.functional.silu
torch.nn.functional.silu = lambda x, *a, **k: real(x) * 1.5
from transformers.activations import ACT2FN, SiLUActivation
SiLUActivation.forward = lambda self, x: real(x) * 1.5
"""
    ran = commands("verify", written, plant=plant)
    assert ran.code == 1
    assert "logits differ" in ran.line

"""Checkpoints that aren't what they claim to be, damaged ones, and those of other kinds: one line each."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from wrong import SHARD, Case, Place, assert_one_line

INDEX = "model.safetensors.index.json"


def edit(file: str, change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        change(values)
        (folder / file).write_text(json.dumps(values))

    return apply


def tensors(change: Callable[[dict], Any], shard: str = SHARD) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        stored = load_file(folder / shard)
        change(stored)
        save_file(stored, folder / shard, metadata={"format": "pt"})

    return apply


def header(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Change a shard's header, its data stays."""

    def apply(folder: Path) -> None:
        raw = (folder / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        values = json.loads(raw[8 : 8 + length])
        text = change(values)
        new = (text if isinstance(text, str) else json.dumps(values)).encode()
        (folder / SHARD).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])

    return apply


def truncate(folder: Path) -> None:
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(raw[:-1000])


def long_header(folder: Path) -> None:
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(struct.pack("<Q", 1 << 62) + raw[8:])


def twice(values: dict) -> str:
    name = next(n for n in values if n != "__metadata__")
    return json.dumps(values)[:-1] + f", {json.dumps(name)}: {json.dumps(values[name])}}}"


def overlapping(values: dict) -> None:
    """The second tensor lies on the first; sizes are right, and so is the end of the file."""
    names = sorted((n for n in values if n != "__metadata__"), key=lambda n: values[n]["data_offsets"])
    start, stop = values[names[1]]["data_offsets"]
    values[names[1]]["data_offsets"] = [start - 2, stop - 2]


def one(stored: dict, part: str) -> str:
    return next(n for n in sorted(stored) if part in n)


def replace(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    def apply(stored: dict) -> None:
        name = one(stored, part)
        stored[name] = change(stored[name])

    return apply


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


def reading(place: Place, **values: Any) -> list[Any]:
    folder = place.folder / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    shutil.copy(place.original / SHARD, folder / "model.safetensors")
    return place.run(model=folder)


CASES: dict[str, Case] = {
    "no model": (lambda p: p.run(model=p.folder / "none"), 2, ["no such folder", "none"]),
    "no config": (lambda p: p.damaged(lambda f: (f / "config.json").unlink()), 2, ["model", "no config.json"]),
    "config isn't JSON": (
        lambda p: p.damaged(lambda f: (f / "config.json").write_text("{,}")),
        2,
        ["config.json", "JSON"],
    ),
    "config without type": (
        lambda p: p.damaged(edit("config.json", lambda c: c.pop("model_type"))),
        2,
        ["config.json", "model_type"],
    ),
    "dense model": (
        lambda p: reading(p, model_type="llama", architectures=["LlamaForCausalLM"], num_hidden_layers=1),
        2,
        ["LlamaForCausalLM", "no layers with experts"],
    ),
    "refused family": (lambda p: reading(p, model_type="dbrx"), 2, ["'dbrx'", "not supported", "outside"]),
    "unknown family": (lambda p: reading(p, model_type="qwen99"), 2, ["config.json", "qwen99"]),
    "truncated shard": (lambda p: p.damaged(truncate), 2, [SHARD, "truncated", "again"]),
    "no shard": (lambda p: p.damaged(lambda f: (f / SHARD).unlink()), 2, [INDEX, SHARD]),
    "index without tensor": (
        lambda p: p.damaged(edit(INDEX, lambda i: i["weight_map"].update({"ghost": SHARD}))),
        2,
        [INDEX, "'ghost'", SHARD],
    ),
    "index out of the folder": (
        lambda p: p.damaged(edit(INDEX, lambda i: i["weight_map"].update({"ghost": "../" + SHARD}))),
        2,
        [INDEX, "'ghost'", "../"],
    ),
    "lacking tensor": (
        lambda p: p.damaged(
            lambda f: (
                tensors(lambda s: s.pop(one(s, "q_norm")))(f),
                edit(INDEX, lambda i: i["weight_map"].pop(one(i["weight_map"], "q_norm")))(f),
            )
        ),
        2,
        ["q_norm", "model"],
    ),
    "wrong shape": (
        lambda p: p.damaged(tensors(replace("1.mlp.gate.weight", lambda t: t[:5].clone()))),
        2,
        ["layers.1.mlp.gate.weight", "[5, 32]", "[8, 32]"],
    ),
    "wrong shape of an expert": (
        lambda p: p.damaged(
            tensors(replace("0.mlp.experts.1.down_proj", lambda t: t[:5].clone()), SHARD.replace("2", "1", 1))
        ),
        2,
        ["layers.0.mlp.experts", "down_proj"],
    ),
    "unexpected dtype": (
        lambda p: p.damaged(tensors(replace("1.mlp.gate.weight", lambda t: t.to(torch.uint16)))),
        2,
        [SHARD, "gate.weight", "U16", "not supported"],
    ),
    "whole numbers": (
        lambda p: p.damaged(tensors(replace("1.mlp.gate.weight", lambda t: t.to(torch.int8)))),
        2,
        [SHARD, "gate.weight", "int8"],
    ),
    "NaN in an expert": (
        lambda p: p.damaged(tensors(replace("1.mlp.experts.3.down_proj", nan))),
        1,
        ["layers.1.mlp.experts.3.down_proj", SHARD],
    ),
    "NaN in a norm": (
        lambda p: p.damaged(tensors(replace("q_norm", lambda t: t * float("nan")))),
        1,
        ["q_norm", SHARD],
    ),
    "huge header": (lambda p: p.damaged(long_header), 2, [SHARD, "truncated or not a safetensors file"]),
    "overlapping tensors": (lambda p: p.damaged(header(overlapping)), 2, [SHARD, "doesn't begin where", "damaged"]),
    "name twice": (lambda p: p.damaged(header(twice)), 2, [SHARD, "twice"]),
    "header isn't JSON": (lambda p: p.damaged(header(lambda h: "{")), 2, [SHARD, "not JSON"]),
    "header without offsets": (
        lambda p: p.damaged(header(lambda h: h[one(h, "gate")].pop("data_offsets"))),
        2,
        [SHARD, "gate", "data_offsets"],
    ),
    "header lies of a shape": (
        lambda p: p.damaged(header(lambda h: h[one(h, "gate.weight")].update(shape=[1 << 40, 32]))),
        2,
        [SHARD, "gate.weight", "bytes"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_model(case, place, commands):
    assert_one_line(CASES[case], place, commands)

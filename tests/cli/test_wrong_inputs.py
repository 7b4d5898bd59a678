"""Everything that a user can get wrong ends in one line that says what, where and what to do; nothing is touched."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import GPTQ, MERGE, PRUNE, RTN, recipe, small_checkpoint, write_recipe
from running import digest
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"


@dataclass
class Place:
    """A folder of a user's own: a model, text, a recipe for them. Cases change it and say what to run."""

    folder: Path
    original: Path

    @property
    def model(self) -> Path:
        """A copy of the model, to be damaged."""
        path = self.folder / "model"
        if not path.exists():
            shutil.copytree(self.original, path)
        return path

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def text(self) -> Path:
        return self.folder / "text"

    def run(self, passes: list[Any] | None = None, *more: Any, model: Path | None = None, **changes: Any) -> list[Any]:
        values = recipe(model or self.original, self.output, passes or [PRUNE], self.text)
        for key, value in changes.items():
            nested = isinstance(value, dict) and isinstance(values.get(key), dict)
            values[key] = {**values[key], **value} if nested else value
        return ["run", write_recipe(self.folder / "recipe.yaml", values), *more]

    def written(self, yaml_text: str) -> list[Any]:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml_text)
        return ["run", path]

    def damaged(self, change: Callable[[Path], Any]) -> list[Any]:
        change(self.model)
        return self.run(model=self.model)


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


def full(place: Place) -> list[Any]:
    place.output.mkdir()
    (place.output / "mine.txt").write_text("mine")
    return place.run()


def linked(place: Place) -> list[Any]:
    link = place.folder / "link"
    link.symlink_to(place.model)
    return place.run(None, "--overwrite", model=place.model, output=str(link))


def below(place: Place, output: str, *more: str) -> list[Any]:
    return place.run(None, "--overwrite", *more, model=place.model, output=str(place.folder / output))


def written_text(place: Place, name: str, content: str | bytes, **calibration: Any) -> list[Any]:
    path = place.folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return place.run(calibration={"sources": [str(path)], **calibration})


def line(text: str) -> str:
    return json.dumps({"text": text * 40}) + "\n"


def uncalibrated(place: Place) -> list[Any]:
    _, path = place.run()
    values = yaml.safe_load(path.read_text())
    del values["calibration"]
    return ["run", write_recipe(path, values)]


def reading(place: Place, **values: Any) -> list[Any]:
    folder = place.folder / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    shutil.copy(place.original / SHARD, folder / "model.safetensors")
    return place.run(model=folder)


def another(place: Place) -> Path:
    return small_checkpoint(place.folder / "other", vocab_size=4100, num_hidden_layers=1)


# Name → (what to run, exit code, parts of the line).
CASES: dict[str, tuple[Callable[[Place], list[Any]], int, list[str]]] = {
    # the recipe
    "key": (lambda p: p.run(sed=1), 2, ["recipe.yaml", "sed", "'seed'"]),
    "key of calibration": (lambda p: p.run(calibration={"lenght": 3}), 2, ["calibration.lenght", "'length'"]),
    "key of a source": (
        lambda p: p.run(calibration={"sources": [{"path": "x", "feild": "text"}]}),
        2,
        ["calibration.sources[0].feild", "'field'"],
    ),
    "key of evaluate": (lambda p: p.run(evaluate={"taks": []}), 2, ["evaluate.taks", "'tasks'"]),
    "key of compute": (lambda p: p.run(compute={"devcie": "cpu"}), 2, ["compute.devcie", "'device'"]),
    "option": (
        lambda p: p.run([{"prune.experts": {"experts": 6, "criterium": "reap"}}]),
        2,
        ["passes[0].prune.experts.criterium", "'criterion'"],
    ),
    "value of an option": (
        lambda p: p.run([{"prune.experts": {"experts": 6, "criterion": "raep"}}]),
        2,
        ["passes[0].prune.experts", "'reap'"],
    ),
    "pass": (lambda p: p.run(["prune.expert"]), 2, ["recipe.yaml:4", "passes[0]", "'prune.experts'"]),
    "target": (lambda p: p.run(target="natve"), 2, ["target", "'native'"]),
    "type": (lambda p: p.run(calibration={"sequences": "many"}), 2, ["calibration.sequences", "integer", "'many'"]),
    "needed key": (lambda p: p.written("model: a\npasses: [prune.experts]\n"), 2, ["output", "needed"]),
    "no options": (lambda p: p.run(["prune.experts"]), 2, ["passes[0]", "`keep`", "`experts`"]),
    "yaml": (lambda p: p.written("model: a\noutput: b\npasses: [a\nb: ]\n"), 2, ["recipe.yaml:4", "not YAML"]),
    "no mapping": (lambda p: p.written("- model\n"), 2, ["recipe.yaml", "mapping"]),
    "no text": (lambda p: ["run", p.original / SHARD], 2, [SHARD, "can't be read as a recipe"]),
    "no recipe": (lambda p: ["run", p.folder / "none.yaml"], 2, ["no such recipe", "none.yaml"]),
    "no ready recipe": (lambda p: ["run", "reap-52"], 2, ["'reap-52'", "'reap-25'"]),
    "set nothing": (lambda p: p.run(None, "--set", "calibration"), 2, ["--set", "'calibration'", "KEY=VALUE"]),
    "set a pass": (lambda p: p.run(None, "--set", "passes.7.keep=0.5"), 2, ["passes.7.keep", "0: prune.experts"]),
    "set a wrong key": (lambda p: p.run(None, "--set", "calibration.lenght=3"), 2, ["calibration.lenght", "'length'"]),
    "option of run": (lambda p: p.run(None, "--ouput", "x"), 2, ["--ouput", "--output"]),
    "command": (lambda p: ["rnu"], 2, ["'rnu'", "run"]),
    "plugin": (lambda p: p.run(plugins=[str(p.folder / "none.py")]), 2, ["plugin", "none.py", "doesn't exist"]),
    "device": (lambda p: p.run(compute={"device": "gpu"}), 2, ["'gpu'", "cuda"]),
    "no device for data": (lambda p: p.run(compute={"device": "meta"}), 2, ["'meta'", "cuda"]),
    "memory": (lambda p: p.run(compute={"memory": "lots"}), 2, ["compute.memory", "'lots'", "12 GB"]),
    # the model
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
    # the combination
    "top-k": (lambda p: p.run([{"prune.experts": {"experts": 1}}]), 2, ["layer 0", "2 experts", "1 would be left"]),
    "more than there are": (lambda p: p.run([{"prune.experts": {"experts": 9}}]), 2, ["8 experts", "9"]),
    "bits": (
        lambda p: p.run([{"quantize.mixed": {"bits": 1.0, "group_size": 32}}]),
        2,
        ["quantize.mixed", "budget", "kB"],
    ),
    "size": (
        lambda p: p.run([{"quantize.mixed": {"size": "290 kB", "group_size": 32}}]),
        2,
        ["quantize.mixed", "budget", "kB"],
    ),
    "not a size": (lambda p: p.run([{"quantize.mixed": {"size": "small", "group_size": 32}}]), 2, ["'small'", "12 GB"]),
    "target loads no quantized": (
        lambda p: p.run([RTN], target="transformers"),
        2,
        ["quantize.mixed", "'transformers'", "no quantized experts"],
    ),
    "target loads other widths": (
        lambda p: p.run([{"quantize.mixed": {"bits": 1.5, "widths": [1], "group_size": 32}}], target="vllm"),
        2,
        ["quantize.mixed", "'vllm'", "not 1"],
    ),
    "group size": (
        lambda p: p.run([{"quantize.mixed": {"bits": 4.0, "group_size": 24}}]),
        2,
        ["group_size 24", "32 of layer 0", "16 does"],
    ),
    "widths that no kernel takes": (
        lambda p: p.run([{"prune.neurons": {"neurons": 20, "multiple": 4}}]),
        2,
        ["layer 0", "20 neurons", "multiples of 8", "`multiple`"],
    ),
    "quantized twice": (lambda p: p.run([RTN, GPTQ]), 2, ["passes[1]", "can't follow quantize.mixed"]),
    "quantized, then pruned": (lambda p: p.run([RTN, PRUNE]), 2, ["passes[1]: prune.experts can't follow"]),
    "merged below top-k": (lambda p: p.run([MERGE, {"prune.experts": {"experts": 1}}]), 2, ["1 would be left"]),
    "global for uniform": (
        lambda p: p.run([{"prune.experts": {"keep": 0.5, "scope": "global"}}], target="transformers"),
        2,
        ["global", "uniform", "native"],
    ),
    "too long": (lambda p: p.run(calibration={"length": 129}), 2, ["calibration.length", "129", "128"]),
    "windows too long": (lambda p: p.run(evaluate={"length": 129}), 2, ["evaluate.length", "129", "128"]),
    # the text
    "no calibration": (uncalibrated, 2, ["prune.experts", "calibration"]),
    "no text file": (
        lambda p: p.run(calibration={"sources": [str(p.text / "calibratoin.jsonl")]}),
        2,
        ["calibratoin.jsonl", "'calibration.jsonl'"],
    ),
    "empty text": (lambda p: written_text(p, "empty.jsonl", ""), 2, ["empty.jsonl", "0 usable documents"]),
    "field": (
        lambda p: written_text(p, "a.jsonl", line("a b") + '{"txt": "b"}\n', shuffle=False),
        2,
        ["a.jsonl:2", "'text'", "'txt'"],
    ),
    "JSON": (lambda p: written_text(p, "a.jsonl", line("a") + line("b") + "{oops\n"), 2, ["a.jsonl:3", "broken JSON"]),
    "binary": (lambda p: written_text(p, "a.txt", b"text\n\xff\xfe\x00\x80" * 9), 2, ["a.txt:2", "not UTF-8", "0xff"]),
    "too little": (
        lambda p: written_text(p, "a.jsonl", json.dumps({"text": "few words"})),
        2,
        ["0 sequences of 32 tokens", "add text"],
    ),
    "no evaluation text": (lambda p: p.run(evaluate={"text": [str(p.folder / "no*.txt")]}), 2, ["no*.txt"]),
    "evaluation without field": (
        lambda p: p.run(evaluate={"text": [str(p.text / "calibration.jsonl")], "field": "body"}),
        2,
        ["calibration.jsonl:1", "'body'"],
    ),
    "task": (
        lambda p: p.run(evaluate={"tasks": ["arithmetik"], "task_path": "demo/tasks"}),
        2,
        ["'arithmetik'", "'demo_arithmetic'"],
    ),
    "no tokenizer": (
        lambda p: p.damaged(lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")]),
        2,
        ["model", "tokenizer"],
    ),
    # the place
    "output isn't empty": (full, 2, ["out", "not empty", "--overwrite"]),
    "output is a file": (lambda p: p.run(output=str(p.text / "held-out.txt")), 2, ["held-out.txt", "is a file"]),
    "output below a file": (
        lambda p: p.run(output=str(p.text / "held-out.txt" / "out")),
        2,
        ["held-out.txt", "is a file"],
    ),
    "output is the model": (lambda p: below(p, "model"), 2, ["output", "is the model's own folder"]),
    "output is the working directory": (
        lambda p: p.run(output="."),
        2,
        ["output .", "the working directory", "inside"],
    ),
    "output is the root": (lambda p: p.run(output="/"), 2, ["output /", "inside"]),
    "output is a link to the model": (linked, 2, ["link", "is the model's own folder"]),
    "output in the model": (lambda p: below(p, "model/out"), 2, ["lies in the model's own folder"]),
    "output around the model": (lambda p: below(p, "model/.."), 2, ["holds the model's own folder"]),
    "workspace is the model": (
        lambda p: p.run(model=p.model.rename(p.folder / "out.work"), evaluate={"text": []}),
        2,
        ["out.work", "the model is there"],
    ),
    # other commands
    "verify no folder": (lambda p: ["verify", p.folder / "none"], 2, ["none", "moe_compress.json"]),
    "verify a source": (lambda p: ["verify", p.original], 2, ["moe_compress.json", "written by moe-compress"]),
    "inspect nothing": (lambda p: ["inspect", p.folder / "none"], 2, ["no such folder"]),
    "explain no pass": (lambda p: ["passes", "prune.exprts"], 2, ["'prune.exprts'", "'prune.experts'"]),
    "print no recipe": (lambda p: ["recipes", "deom"], 2, ["'deom'", "'demo'"]),
    "evaluate nothing": (lambda p: ["evaluate", p.folder / "none", "--text", "a"], 2, ["no such folder"]),
    "evaluate too short": (
        lambda p: ["evaluate", p.original, "--text", p.text / "held-out.txt", "--length", 1],
        2,
        ["--length", "2"],
    ),
    "evaluate nowhere": (
        lambda p: ["evaluate", p.original, "--text", p.text / "held-out.txt", "--json", p.folder / "no" / "a.json"],
        2,
        ["--json", "a.json"],
    ),
    "evaluate against another": (
        lambda p: ["evaluate", p.original, "--text", p.text / "held-out.txt", "--length", 32, "--against", another(p)],
        2,
        ["vocabulary", "4096"],
    ),
}


@pytest.fixture
def place(tmp_path, small, text):
    shutil.copytree(text, tmp_path / "text")
    return Place(tmp_path, small)


# lm-eval reads all its task files to say what else there is.
SELDOM = ("task",)


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SELDOM)) for c in CASES])
def test_wrong_input(case, place, commands):
    prepare, code, parts = CASES[case]
    arguments = prepare(place)
    before, source = digest(place.folder), digest(place.original)
    ran = commands(*arguments)
    assert ran.line  # one line that begins with the program's name, no traceback
    assert ran.code == code, ran.err
    assert ran.out == ""
    for part in parts:
        assert part in ran.line
    assert digest(place.original) == source
    after = digest(place.folder)
    if code == 2:
        assert after == before  # nothing was begun
    else:  # failed while running: only the workspace is new, from which it would go on
        assert {name: d for name, d in after.items() if not name.startswith("out.work")} == before

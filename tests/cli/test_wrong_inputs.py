"""Everything that a user can get wrong ends in one line that says what, where and what to do; nothing is touched."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import GPTQ, MERGE, PRUNE, RTN, small_checkpoint, write_recipe
from wrong import SHARD, Case, Place, assert_one_line


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


def another(place: Place) -> Path:
    return small_checkpoint(place.folder / "other", vocab_size=4100, num_hidden_layers=1)


# Damaged checkpoints are in test_damaged_models.py.
CASES: dict[str, Case] = {
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


# lm-eval reads all its task files to say what else there is.
SELDOM = ("task",)


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SELDOM)) for c in CASES])
def test_wrong_input(case, place, commands):
    assert_one_line(CASES[case], place, commands)

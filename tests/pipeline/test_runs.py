"""Whole runs through the command line: what they write is what they say, loads, and counts itself rightly."""

import json
import math
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from checkpoints import EXPERTS, GPTQ, LAYERS, MERGE, PRUNE, RTN, recipe, write_recipe
from places import ROOT
from running import digest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.progress import _clock

HIDDEN = NEURONS = 32
SEVEN = {"merge.average": {"experts": 7}}
EMBEDDINGS = {"quantize.mixed": RTN["quantize.mixed"] | {"bits": 9, "include": ["experts", "attention", "embeddings"]}}
# Name → (passes, target, experts left, whether they are packed).
RECIPES = {
    "prune": ([PRUNE], "transformers", 6, False),
    "merge": ([MERGE], "transformers", 6, False),
    "rtn": ([RTN], "native", 8, True),
    "gptq": ([GPTQ], "native", 8, True),
    "embeddings": ([EMBEDDINGS], "native", 8, True),
    "all": ([SEVEN, PRUNE, GPTQ], "native", 6, True),
}


def tensors(folder: Path) -> dict[str, tuple[str, list[int], int]]:
    """Name → dtype, shape, bytes, from the files' headers: nothing of the package takes part."""
    found = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                found[name] = (entry["dtype"], entry["shape"], stop - start)
    return found


def sizes(folder: Path, experts: int) -> dict[str, float]:
    """`bytes`, `expert_bytes`, `bits_per_weight` of a checkpoint with so many experts in each layer."""
    found = tensors(folder)
    held = sum(size for name, (_, _, size) in found.items() if ".mlp.experts." in name)
    weights = LAYERS * experts * 3 * HIDDEN * NEURONS
    return {
        "bytes": sum(size for *_, size in found.values()),
        "expert_bytes": held,
        "bits_per_weight": 8 * held / weights,
    }


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: list[int], length: int = 32) -> float:
    """Of a loaded model, window by window."""
    nll, count = 0.0, 0
    for start in range(0, len(tokens), length):
        window = torch.tensor([tokens[start : start + length]])
        predicted = window.shape[1] - 1
        nll, count = nll + float(model(window, labels=window).loss) * predicted, count + predicted
    return math.exp(nll / count)


def documented(heading: str) -> set[str]:
    """Keys of a table in docs/report.md."""
    text = (ROOT / "docs" / "report.md").read_text().split(heading, 1)[1]
    rows = text.split("| key |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1].split("(")[0])}


@pytest.fixture(scope="module")
def ran(tmp_path_factory, small, text, commands):
    """Name → output folder of a finished run; each runs once."""
    folder = tmp_path_factory.mktemp("runs")
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            passes, target, *_ = RECIPES[name]
            output = folder / name
            path = write_recipe(folder / f"{name}.yaml", recipe(small, output, passes, text, target=target))
            source = digest(small)
            said = commands("run", path)
            assert (said.code, said.err) == (0, "")
            assert f"checkpoint: {output}\n" in said.out
            assert digest(small) == source
            assert not (folder / f"{name}.work").exists()
            done[name] = output
        return done[name]

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_the_report_is_true(name, ran, small, text):
    passes, _, experts, packed = RECIPES[name]
    output = ran(name)
    report = json.loads((output / "report.json").read_text())
    assert documented("# report.json") <= report.keys()
    assert report["schema"] == 1
    assert documented("`before` and `after`:") == report["after"].keys()
    assert report["after"].keys() - report["before"].keys() == {"kl", "agreement", "routing"}

    before, after = sizes(small, EXPERTS), sizes(output, experts)
    assert {k: report["before"][k] for k in before} == pytest.approx(before)
    assert {k: report["after"][k] for k in after} == pytest.approx(after)
    assert report["verification"]["bytes"] == after["bytes"]
    assert report["verification"]["tensors"] == len(tensors(output))
    assert report["verification"]["distance"] <= report["verification"]["tolerance"]
    assert report["tokens_seen"] == 4 * 32

    assert [step["name"] for step in report["passes"]] == [next(iter(p)) for p in passes]
    assert {k: report["passes"][-1][k] for k in after} == pytest.approx(after)
    if packed:
        assert after["bits_per_weight"] <= report["passes"][-1]["options"]["bits"]
    said = (ROOT / "docs" / "report.md").read_text()
    told = [step["summary"] for step in report["passes"]]
    told += [part for layer in report["layers"] for part in layer["passes"]]
    told += [e[name] for layer in report["layers"] for e in layer["experts"] for name in e.keys() - {"expert", "slot"}]
    keys = {key.removeprefix("gate_up_").removeprefix("down_") for part in told for key in part}
    assert [key for key in keys if f"`{key}`" not in said and f"`…_{key}`" not in said] == []
    for layer in report["layers"]:
        assert documented("An element of `layers`:") <= layer.keys()
        assert (layer["num_experts_before"], layer["num_experts"]) == (EXPERTS, experts)
        assert [e["expert"] for e in layer["experts"]] == list(range(EXPERTS))
        slots = {e["slot"] for e in layer["experts"]} - {None}
        assert slots == set(range(experts))
        own = [size for n, (*_, size) in tensors(output).items() if f"layers.{layer['layer']}.mlp.experts." in n]
        assert layer["expert_bytes"] == sum(own)
    names = [stage["name"] for stage in report["stages"]]
    assert names[-2:] == ["verify", "score: text"]
    assert all(s["seconds"] >= 0 and s["peak_memory_bytes"] > 0 for s in report["stages"])
    told = (output / "report.md").read_text()
    assert "| perplexity held-out |" in told
    assert [line for line in told.splitlines() if line.startswith("- ") and line.endswith(": ")] == []
    assert (f"- source: {text / 'calibration.jsonl'}, " in told) == bool(report["calibration"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_result_loads(name, ran, small, text):
    *_, experts, packed = RECIPES[name]
    output = ran(name)
    config = json.loads((output / "config.json").read_text())
    assert config["num_local_experts"] == experts
    assert ("quantization_config" in config) == packed
    assert moe_compress  # what is packed needs the import, and nothing else
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    manifest = json.loads((output / "moe_compress.json").read_text())
    ids = torch.tensor([manifest["probe"]["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0]
    expected = torch.tensor(manifest["probe"]["logits"])
    assert torch.allclose(logits.gather(1, torch.tensor(manifest["probe"]["index"])), expected, atol=2e-3)

    # The reported perplexities, from the loaded models in float32.
    tokens = AutoTokenizer.from_pretrained(output)((text / "held-out.txt").read_text())["input_ids"][:128]
    source = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    report = json.loads((output / "report.json").read_text())
    for which, scored in (("before", source), ("after", model)):
        assert report[which]["perplexity"]["held-out"] == pytest.approx(perplexity(scored, tokens), rel=1e-5)


def test_a_log_tells_how_far_it_is(small, text, commands, tmp_path):
    """Nothing is said of stages that are over within a minute; of longer ones, a line a minute."""
    path = write_recipe(tmp_path / "recipe.yaml", recipe(small, tmp_path / "out", [PRUNE], text, evaluate={}))
    said = commands("run", path, plant="import moe_compress.progress as p\np._LINE_SECONDS = 0")
    assert said.code == 0
    lines = [line.split(": ") for line in said.err.splitlines() if "apply" in line]
    assert [line[:2] for line in lines] == [["prune.experts", "apply"]] * 3
    for number, (*_, far) in enumerate(lines, 1):
        assert re.fullmatch(rf"{number} of 3 in \d:\d\d:\d\d, about \d:\d\d:\d\d left", far)
    assert lines[-1][-1].endswith("about 0:00:00 left")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (90061, "25:01:01")]
)
def test_times_as_clocks_show_them(seconds, said):
    assert _clock(seconds) == said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_computing_in_16_bits_is_verified_in_them(dtype, small, text, commands, tmp_path):
    values = recipe(small, tmp_path / "out", [PRUNE, GPTQ], text, compute={"dtype": dtype}, evaluate={})
    ran = commands("run", write_recipe(tmp_path / "recipe.yaml", values))
    assert (ran.code, ran.err) == (0, "")
    verification = json.loads((tmp_path / "out" / "report.json").read_text())["verification"]
    assert verification["distance"] <= 1e-3  # the same computation, so nearer than 16 bits must be
    again = commands("verify", tmp_path / "out")
    assert again.code == 0, again.err


def test_evaluate_says_what_the_report_says(ran, small, text, commands, tmp_path):
    output = ran("all")
    file = tmp_path / "scores.json"
    wanted = ["--text", text / "held-out.txt", "--length", 32, "--max-tokens", 128, "--json", file]
    said = commands("evaluate", output, "--against", small, *wanted)
    assert (said.code, said.err) == (0, "")
    scores = json.loads(file.read_text())
    after = json.loads((output / "report.json").read_text())["after"]
    assert scores.keys() == after.keys()
    for key, value in after.items():
        if key == "routing":  # which experts are gone, only the run knows: routers aren't compared here
            assert scores[key] == {}
            assert value.keys() == {"0", "1", "2"}
        else:
            assert scores[key] == pytest.approx(value)
    assert "perplexity held-out" in said.out


def test_a_draft_layer_that_no_longer_fits_is_told(small, text, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(small, source)
    (last,) = [f for f in source.glob("*.safetensors") if f"model.layers.{LAYERS - 1}.mlp.gate.weight" in load_file(f)]
    held = load_file(last)
    drafted = {f"model.layers.{LAYERS}.mlp.experts.{e}.up_proj.weight": torch.ones(4, 4) for e in range(EXPERTS)}
    save_file(held | drafted, last, {"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(drafted, last.name)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    passes = [PRUNE, RTN]
    report = moe_compress.run(recipe(source, tmp_path / "out", passes, text, evaluate={})).report
    told = [[n for n in step["notes"] if "speculative decoding" in n] for step in report["passes"]]
    assert [len(notes) for notes in told] == [1, 0]
    assert told[0][0].startswith(f"{EXPERTS} tensors that aren't the model's own (model.layers.{LAYERS}.")
    assert drafted.keys() <= tensors(tmp_path / "out").keys()


def test_a_dry_run_writes_nothing(small, text, commands, tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", recipe(small, tmp_path / "out", [PRUNE, RTN], text))
    before = digest(tmp_path)
    said = commands("run", path, "--dry-run", "--set", "passes.prune.experts.experts=4", "--output", tmp_path / "other")
    assert (said.code, said.err) == (0, "")
    assert digest(tmp_path) == before
    rows = {line.split()[0]: line.split() for line in said.out.splitlines() if line.strip()}
    assert rows["source"][-1] == "8"
    assert rows["prune.experts"][-1] == rows["quantize.mixed"][-1] == "4"  # experts per layer
    assert f"{tmp_path / 'other'} for native; nothing was changed" in said.out


def test_settings_output_and_overwriting(small, text, commands, tmp_path):
    path = write_recipe(tmp_path / "recipe.yaml", recipe(small, tmp_path / "unused", [PRUNE], text, evaluate={}))
    output = tmp_path / "deep" / "out"
    assert commands("run", path, "--output", output, "--set", "passes.0.experts=5", "--set", "seed=3").code == 0
    assert not (tmp_path / "unused").exists()
    first = json.loads((output / "report.json").read_text())
    assert (first["seed"], first["recipe"]["seed"], first["layers"][0]["num_experts"]) == (3, 3, 5)

    before = digest(output)
    again = commands("run", path, "--output", output, "--set", "passes.0.experts=5", "--set", "seed=3")
    assert again.code == 2  # the same, finished: nothing is done twice unasked
    assert "not empty" in again.line
    assert digest(output) == before

    (output / "stray.txt").write_text("stray")
    replaced = commands("run", path, "--output", output, "--set", "passes.0.experts=4", "--overwrite")
    assert (replaced.code, replaced.err) == (0, "")
    assert not (output / "stray.txt").exists()
    assert json.loads((output / "config.json").read_text())["num_local_experts"] == 4
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_a_result_is_the_source_of_another(ran, commands, text, tmp_path):
    """What a run says of its own result doesn't come along into what is made from it."""
    source = ran("prune")
    stale = json.loads((source / "report.json").read_text())
    step = {"quantize.mixed": {**RTN["quantize.mixed"], "protect_super_experts": False}}
    path = write_recipe(tmp_path / "recipe.yaml", recipe(source, tmp_path / "out", [step]))
    plant = "import os, moe_compress.pipeline as p\np.verify = lambda *a, **k: os.kill(os.getpid(), 9)"
    assert commands("run", path, plant=plant).code == -9
    assert not (tmp_path / "out" / "report.json").exists()
    assert commands("run", path).code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["before"]["bytes"] == stale["after"]["bytes"]
    assert report["passes"][0]["name"] == "quantize.mixed"


def test_an_output_that_is_a_link(small, text, commands, tmp_path):
    """What is replaced is the folder that the link leads to."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    path = write_recipe(tmp_path / "recipe.yaml", recipe(small, tmp_path / "out", [PRUNE], text, evaluate={}))
    assert commands("run", path).code == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "real" / "config.json").is_file()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real"]

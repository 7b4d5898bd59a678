"""`analyse` and `inspect --calibrate`: the same from disk and in memory, numbers as counted by hand, files."""

import json
import math
from collections import Counter

import pytest
import torch
from checkpoints import LAYERS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.analysis import gini
from moe_compress.errors import InputError


@pytest.fixture(scope="module")
def settings(text):
    return {"sources": [str(text / "calibration.jsonl")], "sequences": 6, "length": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def found(small, settings):
    return moe_compress.analyse(small, settings, segment=4, traces=True)


def test_from_disk_and_in_memory(small, settings, found):
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(small)
    again = moe_compress.analyse(model, settings, tokenizer=tokenizer, segment=4)
    assert again.to_json() == found.to_json()
    assert again.traces == {}
    with pytest.raises(InputError, match="traces=True"):
        again.save_traces("never")


def test_numbers_follow_from_the_trace(found):
    assert sorted(found.layers) == list(range(LAYERS))
    for layer, values in found.layers.items():
        chosen = [row.tolist() for row in found.traces[layer]["index"]]
        loads = Counter(e for row in chosen for e in row)
        load = [loads[e] for e in range(8)]
        mean = sum(load) / 8
        assert found.load[layer].tolist() == load
        assert values["load_cv"] == pytest.approx(math.sqrt(sum((n - mean) ** 2 for n in load) / 8) / mean)
        differences = sum(abs(a - b) for a in load for b in load)
        assert values["load_gini"] == pytest.approx(differences / (2 * 8 * sum(load)))
        assert (values["busiest"], values["busiest_share"]) == (load.index(max(load)), max(load) / sum(load))
        assert values["unseen_experts"] == [e for e in range(8) if not load[e]]
        pairs = Counter(tuple(sorted(row)) for row in chosen)
        strength = {p: n / math.sqrt(load[p[0]] * load[p[1]]) for p, n in pairs.items()}
        strongest = values["pairs"][0]
        assert strongest["strength"] == pytest.approx(max(strength.values()))
        assert strongest["tokens"] == pairs[tuple(strongest["experts"])]
        assert found.maxima[layer].max() == values["max_output"]
    assert found.summary["tokens"] == 6 * 32


def test_gini_of_one_who_has_all():
    assert gini(torch.tensor([0.0, 0, 0, 5])) == pytest.approx(3 / 4)
    assert gini(torch.ones(4)) == pytest.approx(0)
    assert gini(torch.zeros(4)) == 0


def test_segments_longer_than_sequences_are_not_known(small, settings):
    found = moe_compress.analyse(small, settings, segment=33)
    assert found.summary["srp"] is None
    assert all(values["srp"] is None for values in found.layers.values())
    assert found.summary["sch"]["1"] > 0


def test_the_command(commands, small, text, tmp_path):
    options = ["--calibrate", text / "calibration.jsonl", "--sequences", 6, "--length", 32, "--segment", 4]
    said = commands("inspect", small, *options, "--traces", tmp_path / "traces.safetensors")
    assert (said.code, said.err) == (0, "")
    assert "on 192 tokens in 6 sequences" in said.out
    rows = [line.split() for line in said.out.partition("on 192 tokens")[2].splitlines() if line.strip()]
    assert [row[0] for row in rows if len(row) > 7 and row[0].isdigit()] == ["0", "1", "2"] * 2
    routing = json.loads(commands("inspect", small, *options, "--json").out)["routing"]
    expected = moe_compress.analyse(
        small, {"sources": [str(text / "calibration.jsonl")], "sequences": 6, "length": 32}, segment=4, traces=True
    )
    assert routing == json.loads(json.dumps(expected.to_json()))
    traces = load_file(tmp_path / "traces.safetensors")
    assert set(traces) == {f"layers.{i}.{n}" for i in range(LAYERS) for n in ("index", "weight", "sequence")}
    assert torch.equal(traces["layers.1.index"], expected.traces[1]["index"])


def test_plots(commands, small, text, tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--calibrate", text / "calibration.jsonl", "--sequences", 2, "--length", 32, "--plots", tmp_path / "p"]
    said = commands("inspect", small, *options)
    assert (said.code, said.err) == (0, "")
    names = {"load.png", "maxima.png", "routing.png", *(f"co_activation-{i}.png" for i in range(LAYERS))}
    assert {path.name for path in (tmp_path / "p").iterdir()} == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (tmp_path / "p").iterdir())
    assert all(str(tmp_path / "p" / name) in said.out for name in names)


def test_what_is_wrong_is_one_line(commands, small, text, tmp_path):
    assert "add --calibrate TEXT" in commands("inspect", small, "--plots", tmp_path).line
    said = commands("inspect", small, "--calibrate", tmp_path / "nothing.jsonl")
    assert (said.code, "nothing.jsonl" in said.line) == (2, True)
    said = commands("inspect", small, "--calibrate", text / "calibration.jsonl", "--length", 4096)
    assert (said.code, "128 tokens" in said.err) == (2, True)
    said = commands("inspect", small, "--calibrate", text / "calibration.jsonl", "--traces", tmp_path / "no" / "t")
    assert (said.code, "--traces" in said.err) == (2, True)
    plant = "import sys; sys.modules['matplotlib.figure'] = None"
    options = ["--calibrate", text / "calibration.jsonl", "--plots", tmp_path / "p"]
    said = commands("inspect", small, *options, plant=plant)
    assert (said.code, "moe-compress[report]" in said.err) == (2, True)

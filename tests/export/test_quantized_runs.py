"""Whole runs with low-rank factors, HQQ or rotated experts, read again from disk.

Promise: what transformers and `moe_compress.load` compute is what the file says, decoded by tests/native_reader.py.
"""

import json

import pytest
import torch
from checkpoints import recipe, small_checkpoint
from native_reader import Native
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import MoeCompressError, RecipeError
from moe_compress.export.verify import verify
from moe_compress.model import MoEModel
from moe_compress.pipeline import plan_run, run
from moe_compress.recipe import make_recipe

BASE = {"bits": 4.6, "group_size": 16, "widths": [2], "protect_super_experts": False}
LOW_RANK = {**BASE, "low_rank": {"ranks": [1, 2], "shared": 1}}
CASES = {
    "low rank": LOW_RANK,
    "routed ones alone, in turn, rotated": {**BASE, "low_rank": {"ranks": [2], "rounds": 2}, "rotate": "down"},
    "shared one alone": {**BASE, "low_rank": {"ranks": [0], "shared": 2}},
    "hqq": {**BASE, "bits": 5, "widths": [2, 4], "method": "hqq", "symmetric": False},
    "rotated": {**BASE, "widths": [2, 3, 4], "rotate": "down"},
    "both rotated": {**BASE, "widths": [2, 3, 4], "rotate": "both"},
    "low rank, both rotated": {**LOW_RANK, "rotate": "both"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, source, text):
    made = {}

    def make(case):
        if case not in made:
            output = tmp_path_factory.mktemp("run") / "out"
            made[case] = run(recipe(source, output, [{"quantize.mixed": CASES[case]}], text))
        return made[case]

    return make


@torch.no_grad()
def logits(model):
    return model(torch.randint(3, 4000, (2, 20), generator=torch.Generator().manual_seed(0))).logits


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_computes_what_the_file_says(case, runs, source):
    folder = runs(case).output
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    view, file = MoEModel.wrap(dense), Native(folder)
    for layer in file.packed_layers():
        stacked = view.block(int(layer)).experts.weights()
        for part, array in file.weights(layer).items():
            value, exact = torch.from_numpy(array), getattr(stacked, part)
            assert 0 < (value - exact).norm() < 0.6 * exact.norm()
            exact.data.copy_(value)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(moe_compress.load(folder, dtype=torch.float32)), logits(loaded))
    assert verify(folder).distance <= verify(folder).tolerance
    layouts = [b["layout"] for b in file.quantization["blocks"].values()]
    assert all(("rotation" in layout) == ("rotat" in case) for layout in layouts)
    assert all(("input_rotation" in layout) == ("both" in case) for layout in layouts)
    assert file.quantization["format_version"] == (3 if "low_rank" in CASES[case] or "both" in case else 1)
    if case == "hqq":
        assert any(name.endswith(".zero") for name in file.used)
    # Nothing is stored but what the document names.
    prefixes = tuple(file.prefix(layer) for layer in file.packed_layers())
    assert {n for n in file.tensors if n.startswith(prefixes)} == file.used


@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_are_those_on_disk(case, runs):
    finished = runs(case)
    summary = finished.report["passes"][0]["summary"]
    file = Native(finished.output)
    for layer in file.packed_layers():
        file.weights(layer)
    written = sum(len(file.tensors[name][2]) for name in file.used)
    assert written == summary["expert_bytes"] <= summary["budget_bytes"]
    with Checkpoint(finished.output) as output:
        assert finished.report["after"]["bytes"] == output.nbytes


def test_ranks_are_in_the_file_as_planned(runs):
    finished = runs("low rank")
    file, summary = Native(finished.output), finished.report["passes"][0]["summary"]
    entries = [p["low_rank"] for b in file.quantization["blocks"].values() for p in b["layout"]["projections"].values()]
    ranks = [rank for entry in entries for rank in entry["ranks"]]
    assert {str(r): ranks.count(r) for r in (0, 1, 2)} == summary["matrices_per_rank"]
    assert len(set(ranks)) > 1
    assert {entry["shared_rank"] for entry in entries} == {1}


def test_the_model_in_memory_is_the_one_on_disk(source, text, tmp_path):
    values = recipe(source, "unused", [], text)
    result = moe_compress.compress(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(source),
        passes=[{"quantize.mixed": LOW_RANK}],
        calibration=values["calibration"],
    )
    result.save(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert Native(tmp_path / "saved").quantization["format_version"] == 3
    assert torch.equal(logits(result.model.eval()), logits(loaded.eval()))


def test_other_targets_and_older_readers_refuse(runs, source, text, tmp_path, monkeypatch):
    values = recipe(
        source,
        tmp_path / "out",
        [{"quantize.mixed": {**LOW_RANK, "widths": [4], "group_size": 32}}],
        text,
        target="vllm",
    )
    with pytest.raises(RecipeError, match="'vllm' can't add low-rank factors") as found:
        plan_run(make_recipe(values))
    assert "\n" not in str(found.value)
    folder = runs("low rank").output
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    monkeypatch.setattr("moe_compress.model.saved.FORMAT_VERSION", config["format_version"] - 1)
    with pytest.raises(MoeCompressError, match="reads up to 2"):
        MoEModel.open(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "rtn"}, "method: gptq"),
        ({"allocation": "uniform"}, "allocation: program"),
        ({"cost": "frequency"}, "cost: relative"),
        ({"solver_gain": "none"}, "solver_gain: foreseen"),
        ({"low_rank": {"rank": 4}}, "rank"),
    ],
)
def test_options_that_do_not_go_together(options, said, source, text, tmp_path):
    step = {"quantize.mixed": {**LOW_RANK, **options}}
    with pytest.raises(RecipeError, match=said):
        make_recipe(recipe(source, tmp_path / "out", [step], text))

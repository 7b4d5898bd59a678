"""Pruning for a domain: statistics of that domain's text alone; tags that aren't there are found before any work."""

import copy
from dataclasses import replace

import pytest
import torch
from checkpoints import recipe, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.calib.text import Calibration, load_batches
from moe_compress.engine import Calibrated
from moe_compress.errors import RecipeError

TAGS = ["python", "spanish", "novels"]


@pytest.fixture(scope="module")
def model(small):
    return AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)


@pytest.fixture(scope="module")
def batches(small, demo):
    settings = Calibration(
        sources=[{"path": str(demo / "calibration.jsonl"), "domain_field": "domain"}],
        sequences=12,
        length=32,
        balance=True,
        domains=TAGS,
    )
    return load_batches(settings, AutoTokenizer.from_pretrained(small), demo)


def plan_of(model, batches, **options):
    """Layer → scores of its experts; and the notes."""
    passes = [{"prune.experts": {"experts": 5, **options}}]
    result = moe_compress.compress(copy.deepcopy(model), passes=passes, calibration=batches)
    (step,) = result.report["passes"]
    return scores_of(result), step["notes"]


def scores_of(result):
    """Layer → what the last pass said of its experts."""
    return {x["layer"]: [e["prune.experts"]["score"] for e in x["experts"]] for x in result.report["layers"]}


@pytest.mark.parametrize("domains", [["python"], ["spanish", "novels"]])
def test_scores_are_those_of_that_text(model, batches, domains):
    alone = batches.chosen([i for i, tag in enumerate(batches.domain) if tag in domains])
    scores, notes = plan_of(model, batches, domains=domains)
    expected, without = plan_of(model, alone)
    assert scores == expected
    assert scores != plan_of(model, batches)[0]
    assert notes == [*without, f"measured on {len(alone)} of 12 calibration sequences: {', '.join(domains)}"]


def test_two_passes_measure_on_their_own_text(model, batches):
    """The second pass mustn't find the first one's statistics."""
    passes = [{"prune.experts": {"keep": 1.0, "domains": [tag]}} for tag in TAGS[:2]]
    result = moe_compress.compress(copy.deepcopy(model), passes=passes, calibration=batches)
    assert scores_of(result) == plan_of(model, batches, domains=["spanish"])[0]


def test_weights_of_modalities_stay(batches):
    weighed = batches.weighed({"text": 0.5})
    part = Calibrated(weighed).of(["python"]).text
    assert part.modality_weights == {"text": 0.5}
    assert part.digest != Calibrated(batches).of(["python"]).text.digest
    assert Calibrated(weighed).of(None).text is weighed


def test_a_tag_that_no_text_has(model, batches):
    untagged = replace(batches, domain=[None] * len(batches))
    for text in (batches, untagged):
        with pytest.raises(RecipeError, match="no calibration text has the domain 'pyton'"):
            plan_of(model, text, domains=["pyton"])


PRUNE = {"prune.experts": {"experts": 6, "domains": ["pythn"]}}


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ({"sources": ["FILE"]}, "give the calibration's sources a `domain_field`"),
        ({"sources": [{"path": "FILE", "domain": "python"}]}, "the domain 'pythn'; did you mean 'python'?"),
        ({"sources": [{"path": "FILE", "domain_field": "domain"}], "domains": ["novels"]}, "'pythn'; known: novels"),
    ],
)
def test_a_dry_run_knows(commands, small, tmp_path, demo, calibration, said):
    (source,) = calibration["sources"]
    path = str(demo / "calibration.jsonl")
    calibration["sources"] = [path if source == "FILE" else {**source, "path": path}]
    values = recipe(small, tmp_path / "out", [PRUNE], calibration={**calibration, "length": 32, "sequences": 4})
    ran = commands("run", write_recipe(tmp_path / "recipe.yaml", values), "--dry-run")
    assert (ran.code, said in ran.line) == (2, True)


def test_a_run_knows_before_it_measures(commands, small, tmp_path, demo):
    source = {"path": str(demo / "calibration.jsonl"), "domain_field": "domain"}
    values = recipe(
        small,
        tmp_path / "out",
        [PRUNE],
        calibration={"sources": [source], "length": 32, "sequences": 24, "balance": True},
    )
    ran = commands("run", write_recipe(tmp_path / "recipe.yaml", values))
    assert (ran.code, "no calibration text has the domain 'pythn'; did you mean 'python'?" in ran.line) == (2, True)
    assert not list(tmp_path.glob("out*"))

"""Pruning in rounds: the way that numbers go, the same bytes as the passes one by one, guards, kills, refusals."""

import copy
import itertools
import json

import pytest
import torch
from checkpoints import GPTQ, recipe, write_recipe
from families import input_batch, tiny_model
from pydantic import ValidationError
from reference import experts_calls, joined
from running import digest
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_compress
from moe_compress.errors import RecipeError
from moe_compress.export.targets import find_target
from moe_compress.model import MoEModel
from moe_compress.model.shape import LayerShape, ModelShape
from moe_compress.pipeline import plan_run, run
from moe_compress.progress import Monitor
from moe_compress.prune.choice import evened
from moe_compress.prune.experts import PruneExperts, PruneOptions
from moe_compress.recipe import make_passes, make_recipe
from moe_compress.rounds import in_rounds, reached

QUIET = Monitor(show=False)


def rounds(steps, target="native", **options):
    return in_rounds(PruneExperts(PruneOptions(**{"keep": 0.5, **options}, steps=steps), find_target(target)))


def shape_of(*experts, groups=None):
    layers = {i: LayerShape(n, 2, groups, 8, 4, 3, 0, 2, 0).with_experts(n) for i, n in enumerate(experts)}
    return ModelShape(layers, 0)


@pytest.mark.parametrize("unit", [1, 4])
def test_every_round_leaves_about_the_same_share(unit):
    for start in range(unit, 60 * unit, 5 * unit):
        for goal in range(unit, start + 1, 3 * unit):
            for steps in (1, 2, 3, 7):
                found = [start, *(reached(step, start, goal, unit) for step in rounds(steps))]
                assert found[-1] == goal
                assert all(n % unit == 0 for n in found)
                steps_down = [(a - b) // unit for a, b in itertools.pairwise(found)]
                most = (start - goal) // unit
                assert min(steps_down) >= (1 if most >= steps else 0)
                exact = [start * (goal / start) ** (r / steps) for r in range(steps + 1)]
                if min(a - b for a, b in itertools.pairwise(exact)) >= unit:
                    assert max(abs(n - e) for n, e in zip(found, exact, strict=True)) <= unit / 2


def test_numbers_that_layers_no_longer_have_go_to_those_that_keep_fewest():
    assert evened(shape_of(8, 8, 8), {0: 6, 1: 6, 2: 6}) == {0: 6, 1: 6, 2: 6}
    assert evened(shape_of(8, 3, 7), {0: 5, 1: 5, 2: 5}) == {0: 6, 1: 3, 2: 6}
    assert evened(shape_of(8, 4, 6, groups=(2, 1)), {0: 6, 1: 6, 2: 6}) == {0: 8, 1: 4, 2: 6}


@pytest.mark.parametrize(
    ("name", "options", "by_hand"),
    [
        ("prune.experts", {"criterion": "reap"}, [{"experts": 6}, {"experts": 4}]),
        ("prune.experts", {"criterion": "naee", "refit": False}, [{"experts": 6}, {"experts": 4}]),
        ("prune.experts", {"criterion": "attribution_squared"}, [{"experts": 6}, {"experts": 4}]),
        ("prune.neurons", {"criterion": "refit_in_turn"}, [{"neurons": 24}, {"neurons": 16}]),
    ],
)
def test_rounds_are_the_passes_one_by_one(name, options, by_hand, small, text, tmp_path):
    """The same bytes, from disk; and what a model in memory gives."""
    values = recipe(small, tmp_path / "rounds", [{name: {"keep": 0.5, "steps": 2, **options}}], text)
    hand = [{name: {**own, **options}} for own in by_hand]
    if name == "prune.experts":  # any pass may follow, at the number that it has in the recipe
        values["passes"] += [GPTQ]
        hand += [GPTQ]
    report = run(values, monitor=QUIET).report
    run(recipe(small, tmp_path / "by-hand", hand, text), monitor=QUIET)
    files = [
        {n: d for n, d in digest(tmp_path / output).items() if n.endswith(".safetensors")}
        for output in ("rounds", "by-hand")
    ]
    assert files[0] == files[1]
    assert [p["name"] for p in report["passes"]][:2] == [name, name]
    assert [(p["summary"]["round"], p["summary"]["rounds"]) for p in report["passes"][:2]] == [(1, 2), (2, 2)]
    assert len(report["recipe"]["passes"]) == len(values["passes"])


@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"scope": "sensitivity", "held_out": 0.25}])
def test_from_disk_as_in_memory(options, small, text, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)  # stored as what it computes in
    loaded.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(small).save_pretrained(tmp_path / "model")
    steps = [{"prune.experts": {"keep": 0.625, "steps": 3, **options}}]
    values = recipe(tmp_path / "model", tmp_path / "out", steps, text)
    theirs = run(values, monitor=QUIET).report
    result = moe_compress.compress(
        loaded,
        tokenizer=AutoTokenizer.from_pretrained(small),
        passes=steps,
        calibration=values["calibration"],
        monitor=QUIET,
    )
    assert result.report["recipe"]["passes"] == theirs["recipe"]["passes"]
    for own, other in zip(result.report["layers"], theirs["layers"], strict=True):
        assert [p["removed"] for p in own["passes"]] == [p["removed"] for p in other["passes"]]
    from_memory = result.model.state_dict()
    from_disk = moe_compress.load(tmp_path / "out", dtype=torch.float32).state_dict()
    assert from_memory.keys() == from_disk.keys()
    for key, tensor in from_disk.items():
        torch.testing.assert_close(from_memory[key], tensor, rtol=1e-4, atol=1e-5)


def test_the_report_says_in_which_round_an_expert_went(small, text, tmp_path):
    report = run(recipe(small, tmp_path / "out", [{"prune.experts": {"keep": 0.5, "steps": 3}}], text), monitor=QUIET)
    for layer in report.report["layers"]:
        gone = [e["prune.experts"]["round"] for e in layer["experts"] if e["slot"] is None]
        assert sorted(gone) == [1, 1, 2, 3]
        assert all(e["prune.experts"]["removed"] == (e["slot"] is None) for e in layer["experts"])
        assert [len(p["removed"]) for p in layer["passes"]] == [2, 1, 1]


def planted(scale=0.02):
    """A model whose middle layer's experts hardly do anything."""
    model = tiny_model("qwen3_moe")
    view = MoEModel.wrap(model)
    with torch.no_grad():
        for layer, factor in zip(view.moe_layers, (2.0, scale, 2.0), strict=True):
            view.block(layer).experts_module.down_proj *= factor
    return model


def counts_after(model, **options):
    ids = input_batch(model, 12, 12, 7)["input_ids"]
    report = moe_compress.compress(
        copy.deepcopy(model), passes=[{"prune.experts": options}], calibration=ids, monitor=QUIET
    ).report
    removed = [[len(p["removed"]) for p in layer["passes"]] for layer in report["layers"]]
    return [layer["num_experts"] for layer in report["layers"]], removed, report


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("scope", ["global", "sensitivity"])
def test_guards_hold_in_every_round(scope, check):
    """The share that a layer may lose is one of what it had at first, and so is the sum that is kept."""
    options = {"keep": 0.75, "scope": scope, "criterion": "weighted_ean", "steps": 2, "minimum": 2, "check": check}
    found, removed, report = counts_after(planted(), **options, most_removed=0.5)
    assert sum(found) == 18
    assert min(found) >= 4
    assert [sum(per) for per in zip(*removed, strict=True)] == [3, 3]
    assert [p["summary"]["kept"] for p in report["passes"]] == [21, 18]
    assert all((f"held_out_kl_{scope}" in p["summary"]) == check for p in report["passes"])
    # Scores compare as shares of a layer's sum: only what they cost says that all of the middle layer may go.
    if scope == "sensitivity" and not check:
        assert found[1] == 4
        assert counts_after(planted(), **options)[0] == [8, 2, 8]


def test_routing_groups_lose_as_many_in_every_round():
    model = tiny_model("deepseek_v3")
    found, removed, report = counts_after(model, keep=0.5, steps=2, minimum=None)
    assert set(found) == {4}
    assert {tuple(own) for own in removed} == {(2, 2)}
    for layer in report["layers"]:
        for number in (1, 2):
            gone = [
                e["expert"] for e in layer["experts"] if e["prune.experts"]["round"] == number and e["slot"] is None
            ]
            assert sorted(e // 4 for e in gone) == [0, 1]


@pytest.mark.parametrize("at", [("save_plan", 2), ("commit", 5), ("drop", 2)])
def test_a_run_killed_in_a_later_round_goes_on(at, small, text, tmp_path, commands):
    steps = [{"prune.experts": {"keep": 0.5, "steps": 2}}]
    whole = run(recipe(small, tmp_path / "whole", steps, text), monitor=QUIET).output
    job = write_recipe(tmp_path / "recipe.yaml", recipe(small, tmp_path / "out", steps, text))
    kill = f"""
import os
from moe_compress.checkpoint.workspace import PassStore
real, made = PassStore.{at[0]}, []
def call(*arguments):
    made.append(1)
    if len(made) == {at[1]}:
        os.kill(os.getpid(), 9)
    return real(*arguments)
PassStore.{at[0]} = call
"""
    assert commands("run", job, plant=kill).code == -9
    again = commands("run", job)
    assert again.code == 0, again.err
    for file in whole.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "prune.experts: measure" not in [s["name"] for s in report["stages"]]  # of both rounds it was there


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_windows_drop_what_is_below_an_even_share(name):
    """TSEP by a plain loop: routing weight summed by hand on the model as it then is, rows removed by hand."""
    model, below = tiny_model(name), 0.6
    ids = input_batch(model, 6, 20, 3)["input_ids"]
    by_hand = copy.deepcopy(model)
    view = MoEModel.wrap(by_hand)
    left = {i: list(range(view.block(i).num_experts)) for i in view.moe_layers}
    groups = {i: (view.block(i).groups or (1,))[0] for i in left}
    went = []
    for number in range(3):
        calls = {i: joined(own) for i, own in experts_calls(by_hand, [{"input_ids": ids}]).items()}
        went.append({})
        for layer, call in calls.items():
            count, size = len(left[layer]), len(left[layer]) // groups[layer]
            mass = [0.0] * count
            for _, expert, gate in call.choices():
                mass[expert] += gate
            order = [sorted(range(f, f + size), key=lambda e: -mass[e]) for f in range(0, count, size)]
            if number < 2:
                stays = max(sum(mass[e] >= below * sum(mass) / count for e in own) for own in order)
                stays = max(stays, 4 // groups[layer])
            else:
                stays = 4 // groups[layer]
            keep = sorted(e for own in order for e in own[:stays])
            went[-1][layer] = [e for e in range(count) if e not in keep]
            left[layer] = [left[layer][e] for e in keep]
            view.block(layer).keep(keep)
    assert any(went[0].values())
    assert any(went[2].values())
    passes = [{"prune.experts": {"preset": "tsep", "experts": 4, "steps": 3, "below": below}}]
    report = moe_compress.compress(model, passes=passes, calibration=ids, monitor=QUIET).report
    for layer in report["layers"]:
        assert [p["removed"] for p in layer["passes"]] == [own[layer["layer"]] for own in went]
        assert [e["expert"] for e in layer["experts"] if e["slot"] is not None] == left[layer["layer"]]
    for (key, mine), theirs in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key


def test_a_window_in_which_nothing_goes_says_so():
    options = {"preset": "tsep", "experts": 6, "steps": 2, "below": 1e-6}
    found, removed, report = counts_after(tiny_model("qwen3_moe"), **options)
    assert found == [6, 6, 6]
    assert removed == [[0, 2]] * 3
    assert any(note.startswith("round 1: nothing goes") for note in report["passes"][0]["notes"])


def test_what_cannot_be(small, text, tmp_path):
    with pytest.raises(ValidationError):
        rounds(0)
    with pytest.raises(ValidationError, match="nothing can follow replace: mean"):
        rounds(2, replace="mean")
    with pytest.raises(ValidationError, match="`below` says what goes before the last round"):
        rounds(1, below=0.5)
    with pytest.raises(ValidationError, match="`below` belongs to scope: uniform"):
        rounds(2, below=0.5, scope="global")
    with pytest.raises(ValidationError, match="criterion 'naee' chooses sets"):
        rounds(2, below=0.5, criterion="naee")
    with pytest.raises(RecipeError, match="nothing can follow free"):
        make_passes([{"prune.neurons": {"keep": 0.5, "width": "free", "steps": 2}}], find_target("native"))

    def planned(*passes):
        plan_run(make_recipe(recipe(small, tmp_path / "out", list(passes), text)))

    planned({"prune.experts": {"keep": 0.5, "steps": 4}})
    with pytest.raises(RecipeError, match=r"prune.experts: `steps` is 5, and no layer loses more than 4 experts"):
        planned({"prune.experts": {"keep": 0.5, "steps": 5}})
    with pytest.raises(RecipeError, match=r"prune.neurons: `steps` is 3, and no layer loses more than 2 times"):
        planned({"prune.neurons": {"keep": 0.5, "steps": 3}})
    novices = {"prune.experts": {"keep": 0.75, "replace": "mean"}}
    with pytest.raises(RecipeError, match=r"^passes\[2\]: quantize.mixed can't follow prune.experts"):
        planned({"prune.experts": {"keep": 0.75, "steps": 2}}, novices, GPTQ)

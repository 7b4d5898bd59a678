"""Recipes: what is read, what `--set` changes, and where an error says it is."""

from pathlib import Path

import pytest
import yaml

from moe_compress.errors import InputError, RecipeError
from moe_compress.pipeline import run
from moe_compress.recipe import Compute, Evaluation, make_recipe, read_recipe

TEXT = """\
# a comment
model: in
output: out

calibration:
  sources: [a.jsonl, {path: b.txt, domain: b}]
  length: 64

passes:
  - merge.average: {keep: 0.75}
  - prune.experts:
      experts: 6
      criterion: reap
  - quantize.mixed: {bits: 3}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_what_is_left_out_has_its_default(file):
    recipe = read_recipe(file)
    assert (recipe.target, recipe.seed, recipe.keep_workspace) == ("native", 0, False)
    assert (recipe.evaluate, recipe.compute) == (Evaluation(), Compute())
    assert [source.path for source in recipe.calibration.sources] == ["a.jsonl", "b.txt"]
    assert [step.name for step in recipe.steps()] == ["merge.average", "prune.experts", "quantize.mixed"]
    assert recipe.steps()[1].options.experts == 6


def test_what_is_recorded_reads_back_as_the_same(file):
    recipe = read_recipe(file)
    plain = recipe.plain()
    assert plain["passes"][1]["prune.experts"]["protect_super_experts"] is True
    assert make_recipe(yaml.safe_load(yaml.safe_dump(plain))).plain() == plain


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("seed", "5", lambda r: r.seed == 5),
        ("seed", "7", lambda r: [getattr(s.options, "seed", 7) for s in r.steps()] == [7, 7, 7]),
        ("output", "~/there", lambda r: r.output == str(Path.home() / "there")),
        ("calibration.sources.0", "~/a.txt", lambda r: r.calibration.sources[0].path == str(Path.home() / "a.txt")),
        ("passes.2", "quantize.mixed: {size: 4000}", lambda r: r.steps()[2].options.size == "4000"),
        ("passes.1.prune.experts.experts", "4", lambda r: r.steps()[1].options.experts == 4),
        ("output", "there/é", lambda r: r.output == "there/é"),
        ("calibration.length", "32", lambda r: r.calibration.length == 32),
        ("calibration.sources.1.path", "c.txt", lambda r: r.calibration.sources[1].path == "c.txt"),
        ("evaluate.text", "[x.txt, y.txt]", lambda r: r.evaluate.text == ["x.txt", "y.txt"]),
        ("passes.0.keep", "0.5", lambda r: r.steps()[0].options.keep == 0.5),
        ("passes.prune.experts.experts", "4", lambda r: r.steps()[1].options.experts == 4),
        ("passes.2.bits", "2.5", lambda r: r.steps()[2].options.bits == 2.5),
        ("passes.2.widths", "[2, 4]", lambda r: r.steps()[2].options.widths == [2, 4]),
        ("passes.1", "prune.experts: {keep: 0.5}", lambda r: r.steps()[1].options.keep == 0.5),
        ("passes", "[prune.experts: {keep: 0.5}]", lambda r: len(r.steps()) == 1),
    ],
)
def test_a_key_is_set(key, value, found, file):
    assert not found(read_recipe(file))
    assert found(read_recipe(file, {key: value}))


def test_a_seed_of_its_own_stays(file):
    recipe = read_recipe(file, {"seed": "7", "passes.1.seed": "3"})
    assert [step.options.seed for step in recipe.steps()] == [7, 3, 7]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("passes.3.keep", "1", "there are 0: merge.average, 1: prune.experts, 2: quantize.mixed"),
        ("passes.prune.expert.keep", "1", "no such pass"),
        ("calibration.sources.7.path", "c", "nothing to set at"),
        ("model.name", "c", "nothing to set at"),
        ("seed", "[1", "not YAML"),
        ("seed", "-1", "recipe.yaml: seed: Input should be greater"),
        ("calibration.lenght", "3", "did you mean 'length'"),
        ("passes.1.criterion", "raep", "did you mean 'reap'"),
    ],
)
def test_a_key_that_cannot_be_set(key, value, said, file):
    with pytest.raises(RecipeError, match=said):
        read_recipe(file, {key: value})


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("length: 64", "lenght: 64", ":7: calibration.lenght: unknown key 'lenght'; did you mean 'length'?"),
        ("length: 64", "length: 1", ":7: calibration.length: "),
        ("domain: b}", "domian: b}", ":6: calibration.sources[1].domian: "),
        ("criterion: reap", "criterion: raep", ":11: passes[1].prune.experts: no criterion is called 'raep'"),
        ("experts: 6", "experts: 0", ":12: passes[1].prune.experts.experts: "),
        ("prune.experts", "prune.exprts", ":11: passes[1]: no pass is called 'prune.exprts'"),
        ("merge.average: {keep: 0.75}", "{merge.average: {}, b: {}}", ":10: passes[0]: a pass is a name, or one name"),
        ("{bits: 3}", "[3]", ":14: passes[2].quantize.mixed: options are a mapping"),
        ("model: in\n", "", "recipe.yaml: model: this key is needed (Checkpoint folder"),
        ("model: in", "model: [in", "not YAML"),
        ("model: in", "model: in\nmodel: there", ":3: the key 'model' is there twice"),
        ("experts: 6", "experts: 6\n      experts: 7", ":13: the key 'experts' is there twice"),
        ("model: in", "model: &in [*in]", ":2: model: Input should be a valid string"),
        ("model: in", "model: in\n1: in", ":3: [1]: Keys should be strings"),
        ("experts: 6", "6: 6", ":12: passes[1].prune.experts[6]: Keys should be strings"),
        ("{bits: 3}", "{size: lots}", ":14: passes[2].quantize.mixed.size: 'lots' is not a size"),
        ("{bits: 3}", "{bits: 3, group_size: 0}", ":14: passes[2].quantize.mixed: group_size must be positive, or -1"),
        ("output: out", "output: out\ncompute: {memory: much}", ":4: compute.memory: 'much' is not a size"),
    ],
)
def test_an_error_says_where_it_is(old, new, where, file):
    assert TEXT.count(old) == 1
    file.write_text(TEXT.replace(old, new))
    with pytest.raises(RecipeError) as raised:
        read_recipe(file)
    assert str(raised.value).startswith(str(file))
    assert where in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_ready_recipe_by_name(tmp_path):
    with pytest.raises(RecipeError, match="no ready recipe is called 'reap25'; did you mean 'reap-25'"):
        run("reap25")
    with pytest.raises(InputError, match=f"no such folder: {tmp_path / 'none'}"):
        run("reap-25", {"model": str(tmp_path / "none"), "output": str(tmp_path / "out")})


def test_overrides_are_for_files():
    with pytest.raises(InputError, match="overrides"):
        run(yaml.safe_load(TEXT), {"passes.0.prune.experts.keep": "0.5"})

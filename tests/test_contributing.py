"""The example in CONTRIBUTING.md is a plugin that works as it stands."""

import json
import re

import pytest
from places import DEMO, ROOT
from running import python

from moe_compress import passes
from moe_compress.errors import RunError
from moe_compress.pipeline import run
from moe_compress.progress import Monitor
from moe_compress.prune.criteria import CRITERIA
from moe_compress.quant.costs import COSTS
from moe_compress.recipe import make_recipe


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("plugin") / "quiet.py"
    path.write_text(code[1])
    return path


@pytest.fixture(autouse=True)
def _forgotten():
    """What a test's plugins register is gone with it: other tests look at all that is registered."""
    registries = (passes._REGISTRY, CRITERIA, COSTS)
    passes.all_passes()
    before = [(dict(registry), dict(registry._homes)) for registry in registries]
    yield
    for registry, (entries, homes) in zip(registries, before, strict=True):
        for kept, known in ((registry, entries), (registry._homes, homes)):
            kept.clear()
            kept.update(known)


def test_the_example_runs(plugin, tmp_path):
    recipe = make_recipe(
        {
            "model": str(DEMO / "moe-demo"),
            "output": str(tmp_path / "out"),
            "target": "transformers",
            "plugins": [str(plugin)],
            "calibration": {"sources": str(DEMO / "calibration.jsonl"), "sequences": 4, "length": 64},
            "passes": [{"prune.quiet": {"keep": 0.75}}],
        }
    )
    finished = run(recipe, monitor=Monitor(show=False))
    assert [layer["num_experts"] for layer in finished.report["layers"]] == [12] * 4
    assert json.loads((finished.output / "config.json").read_text())["num_experts"] == 12


LOADING = """
import sys
from pathlib import Path
from moe_compress.errors import RecipeError
from moe_compress.passes import load_plugin

try:
    load_plugin(Path(sys.argv[1]))
except RecipeError as error:
    print(error)
"""
TAKEN = {
    "passes": """
from moe_compress.passes import Pass, register


@register
class PruneExperts(Pass):
    name = "prune.experts"
""",
    "criteria": """
from moe_compress.calib.statistics import Routing
from moe_compress.prune.criteria import criterion


@criterion("naee", "not NAEE", Routing())
def score(measured, asked):
    return measured["routing"]["counts"]
""",
    "costs": """
from moe_compress.quant.costs import cost


@cost("gram", "not the Gram proxy")
def price(measured, asked):
    return measured
""",
}


@pytest.mark.parametrize("what", TAKEN)
def test_a_plugin_takes_nobodys_name(what, tmp_path):
    """In an interpreter of its own: there nothing is registered yet when the file is read."""
    path = tmp_path / "taken.py"
    path.write_text(TAKEN[what])
    said = python("-c", LOADING, path)
    assert f"taken.py can't be imported: ValueError: two {what} are called" in said


BROKEN = {
    "no slots": (
        """
    def plan(self, profile):
        return Plan(self.name, {i: {} for i in profile.shape.layers})

    def apply(self, block, decision, inputs):
        block.keep(list(range(12)))
        return {}
""",
        "prune.broken: layer 0 has 12 of 16 experts left, and `apply` returned no `slots`",
    ),
    "too few slots": (
        """
    def plan(self, profile):
        return Plan(self.name, {i: {} for i in profile.shape.layers})

    def apply(self, block, decision, inputs):
        return {"slots": [0, 1]}
""",
        "prune.broken: layer 0 has 16 of 16 experts left, and `apply` returned other `slots`",
    ),
    "no plain data": (
        """
    def plan(self, profile):
        return Plan(self.name, {i: {"these": {1, 2}} for i in profile.shape.layers})

    def apply(self, block, decision, inputs):
        return {}
""",
        "prune.broken: `plan` isn't plain data: Object of type set is not JSON serializable",
    ),
    "no report": (
        """
    def plan(self, profile):
        return Plan(self.name, {i: {} for i in profile.shape.layers})

    def apply(self, block, decision, inputs):
        pass
""",
        "prune.broken: `apply` returned NoneType, not a report",
    ),
    "no plain report": (
        """
    def plan(self, profile):
        return Plan(self.name, {i: {} for i in profile.shape.layers})

    def apply(self, block, decision, inputs):
        return {"these": {1, 2}}
""",
        "json could not be written: Object of type set is not JSON serializable",
    ),
    "no plan": (
        """
    def plan(self, profile):
        return Plan(self.name, {0: {}, 2: {}})

    def apply(self, block, decision, inputs):
        return {}
""",
        "prune.broken: `plan` decides nothing for layers [1, 3]",
    ),
}
PASS = """
from moe_compress.passes import Pass, Plan, register


@register
class Broken(Pass):
    name = "prune.broken"
    summary = "a pass without options"

    def forecast(self, shape):
        return shape
"""


@pytest.mark.parametrize("what", BROKEN)
def test_what_a_pass_leaves_out_is_said(what, tmp_path):
    methods, message = BROKEN[what]
    path = tmp_path / "broken.py"
    path.write_text(PASS + methods)
    recipe = {"model": str(DEMO / "moe-demo"), "output": str(tmp_path / "out"), "plugins": [str(path)]}
    with pytest.raises(RunError, match=re.escape(message)):
        run(make_recipe({**recipe, "passes": ["prune.broken"]}), monitor=Monitor(show=False))


def test_a_criterion_scores_every_expert(tmp_path):
    path = tmp_path / "short.py"
    path.write_text(TAKEN["criteria"].replace("naee", "short").replace('["counts"]', '["counts"][:5]'))
    recipe = make_recipe(
        {
            "model": str(DEMO / "moe-demo"),
            "output": str(tmp_path / "out"),
            "plugins": [str(path)],
            "calibration": {"sources": str(DEMO / "calibration.jsonl"), "sequences": 2, "length": 32},
            "passes": [{"prune.experts": {"keep": 0.75, "criterion": "short"}}],
        }
    )
    with pytest.raises(RunError, match=re.escape("short gives a tensor [5] for the 16 experts of layer 0")):
        run(recipe, monitor=Monitor(show=False))


def test_decisions_are_what_a_resumed_run_reads(tmp_path):
    """Keys that aren't text become text in a file of JSON: a run that isn't killed gets them so too."""
    path = tmp_path / "numbered.py"
    numbered = """
    def plan(self, profile):
        return Plan(self.name, {i: {"width of": {0: (4, 8)}} for i in profile.shape.layers})

    def apply(self, block, decision, inputs):
        return {"read": decision}
"""
    path.write_text(PASS.replace("prune.broken", "prune.numbered") + numbered)
    recipe = {"model": str(DEMO / "moe-demo"), "output": str(tmp_path / "out"), "plugins": [str(path)]}
    finished = run(make_recipe({**recipe, "passes": ["prune.numbered"]}), monitor=Monitor(show=False))
    for layer in finished.report["layers"]:
        assert layer["passes"][0]["read"] == {"width of": {"0": [4, 8]}}

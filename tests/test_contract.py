"""The contract of passes: the documented table is what they say, and what they say is what they do."""

from pathlib import Path

import pytest
from checkpoints import MERGE, PRUNE
from families import tiny_model

from moe_compress import contract, feasibility
from moe_compress.errors import RecipeError
from moe_compress.export.targets import find_target
from moe_compress.model import MoEModel
from moe_compress.model.shape import model_shape
from moe_compress.passes import all_passes
from moe_compress.recipe import make_passes

ROOT = Path(__file__).resolve().parent.parent
OWN = "moe_compress."  # other tests register passes of their own
RTN = {"quantize.mixed": {"bits": 6.0, "method": "rtn", "allocation": "uniform", "group_size": 16, "widths": [2, 4]}}
# Options under which a pass can be forecast on a tiny model.
ENTRIES = {
    "prune.experts": (PRUNE, "native"),
    "merge.average": (MERGE, "native"),
    "merge.zip": ({"merge.zip": {"experts": 6}}, "native"),
    "merge.subspace": ({"merge.subspace": {"experts": 6}}, "native"),
    "quantize.mixed": (RTN, "native"),
    "quantize.scheme": ({"quantize.scheme": {"scheme": "w8a8"}}, "vllm"),
    "heal.router": ("heal.router", "native"),
}


@pytest.fixture
def own_passes(monkeypatch):
    """The package's passes alone."""
    passes = {name: cls for name, cls in all_passes().items() if cls.__module__.startswith(OWN)}
    monkeypatch.setattr(contract, "all_passes", lambda: passes)
    return passes


def test_the_documented_table_is_what_the_passes_say(own_passes):
    said = (ROOT / "docs" / "passes.md").read_text()
    assert said == contract.table(), "run `python -m moe_compress.contract > docs/passes.md`"
    for name in own_passes:
        assert f"| `{name}` |" in said


@pytest.mark.parametrize("name", ENTRIES)
def test_passes_leave_the_kind_that_they_say(name):
    shape = model_shape(MoEModel.wrap(tiny_model("qwen3_moe")))
    entry, target = ENTRIES[name]
    (step,) = make_passes([entry], find_target(target))
    before = {layer.kind for layer in shape.layers.values()}
    after = {layer.kind for layer in step.forecast(shape).layers.values()}
    assert before == {"fused"}
    assert after <= set(contract.left_by(type(step), "fused"))


def test_a_pass_that_cannot_follow_is_told_what_could(own_passes):
    shape = model_shape(MoEModel.wrap(tiny_model("qwen3_moe")))
    target = find_target("native")
    steps = make_passes([RTN, PRUNE], target)
    with pytest.raises(RecipeError) as caught:
        feasibility.forecast(shape, steps, target)
    said = str(caught.value)
    assert "passes[1]: prune.experts can't follow quantize.mixed" in said
    could = said.split("what could follow: ")[1].removesuffix(" (docs/passes.md)").split(", ")
    assert could == [name for name, cls in own_passes.items() if "packed" in cls.accepts]
    assert "heal.router" in could
    for name in set(could) & set(ENTRIES):  # the hint is true
        feasibility.forecast(shape, make_passes([RTN, ENTRIES[name][0]], target), target)

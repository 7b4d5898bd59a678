"""Every way to decide, gradients included: from disk, one layer in memory, the plan is that of the model in memory.

Not here: what runs the whole model to decide (tests of sensitivity and of learned rules), and merge.factorise, whose
budget is a share of bytes, which are others in memory.
"""

import pytest
import torch

from moe_compress.calib.collect import MemoryStore, Profile, collect
from moe_compress.calib.text import TokenBatches
from moe_compress.export.targets import find_target
from moe_compress.model import MoEModel
from moe_compress.model.backward import GradientSweep
from moe_compress.model.losses import NextToken
from moe_compress.model.shape import model_shape
from moe_compress.model.sweep import Sweep
from moe_compress.passes import find_pass
from moe_compress.progress import Progress
from moe_compress.prune.criteria import CRITERIA
from moe_compress.prune.neuron_criteria import NEURON_CRITERIA
from moe_compress.quant.costs import COSTS

HALF = {"keep": 0.5}
CASES = [
    *(("prune.experts", {**HALF, "criterion": name}) for name in CRITERIA),
    *(("prune.experts", {**HALF, "criterion": name, "scope": "global"}) for name in ("reap", "gram_greedy")),
    *(("prune.neurons", {**HALF, "criterion": name, "width": "free", "scope": "layer"}) for name in NEURON_CRITERIA),
    ("prune.dern", HALF),
    *(("merge.average", {**HALF, "grouping": name}) for name in ("output", "router", "weights", "coactivation")),
    ("merge.average", {**HALF, "weight": "fisher"}),
    ("merge.average", {**HALF, "scope": "global"}),
    ("merge.zip", HALF),
    *(("quantize.mixed", {"bits": 3.0, "group_size": 16, "cost": name}) for name in COSTS),
    *((f"skip.{rule}", {"experts_per_token": 1.5}) for rule in ("top_k", "ratio", "top_p")),
]


@pytest.fixture(scope="module")
def views(small):
    """The same model on disk, and loaded."""
    on_disk = MoEModel.open(small)
    return on_disk, MoEModel.wrap(type(on_disk.module).from_pretrained(small, dtype=torch.float32))


def planned(view, name, options):
    """A pass's plan, from one sweep."""
    ids = torch.randint(3, 4000, (6, 24), generator=torch.Generator().manual_seed(0))
    batches = TokenBatches(ids, [None] * len(ids), "digest", {}).forwards(3)
    cls = find_pass(name)
    step, store = cls(cls.Options(**options), find_target("native")), MemoryStore()
    with (GradientSweep if step.goes_back() else Sweep)(view, batches) as sweep:
        collect(sweep, step.statistics(), store, Progress(), NextToken(batches))
    return step.plan(Profile(model_shape(view), store, len(view.layers)))


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES])
def test_same_plan(name, options, views):
    on_disk, in_memory = (planned(view, name, options) for view in views)
    assert on_disk.layers.keys() == set(views[0].moe_layers)
    assert on_disk == in_memory

"""How much of a routing is left after a change: by hand, against loops, and on a model."""

import pytest
import torch
from families import input_batch
from reference import build, experts_calls

from moe_compress.calib.inputs import BlockInputs
from moe_compress.calib.routing import RoutingChange
from moe_compress.merge.experts import merged_slots
from moe_compress.model import MoEModel, Tap
from moe_compress.model.sweep import Sweep


def tap(index, weight=None):
    index = torch.as_tensor(index)
    weight = torch.ones(index.shape) if weight is None else torch.as_tensor(weight)
    hidden = torch.zeros(len(index), 4)
    return Tap(0, None, hidden, index, weight, hidden)


def change(before, slots, after, sizes=None):
    """Result of one tap before and one after, or of several after with these numbers of tokens."""
    inputs = BlockInputs()
    inputs.observe(before)
    found = RoutingChange(inputs, slots)
    start = 0
    for size in sizes or [len(after.index_TK)]:
        found.observe(tap(after.index_TK[start : start + size], after.weight_TK[start : start + size]))
        start += size
    result = found.result()
    return result["kept_choices"], result["kept_weight"]


def test_nothing_changed():
    before = tap([[0, 1], [2, 3]], [[0.9, 0.1], [0.6, 0.4]])
    assert change(before, None, before) == pytest.approx((1, 1))
    assert change(before, [0, 1, 2, 3], before) == pytest.approx((1, 1))
    assert change(before, None, tap([[1, 0], [3, 2]])) == pytest.approx((1, 1))  # the order of slots says nothing


def test_removed_experts_by_hand():
    before = tap([[0, 1], [2, 3]], [[0.75, 0.25], [0.5, 0.5]])
    # Expert 1 is gone: 0, 2, 3 are 0, 1, 2 now. The first token goes to 0 and 3, the second to 2 and 3.
    after = tap([[0, 2], [1, 2]])
    assert change(before, [0, -1, 1, 2], after) == pytest.approx((3 / 4, 1.75 / 2))
    # The second token is also led elsewhere.
    assert change(before, [0, -1, 1, 2], tap([[0, 2], [0, 2]])) == pytest.approx((2 / 4, 1.25 / 2))


def test_merged_experts_by_hand():
    """Both former choices of a token in one slot: both are still made where that slot is chosen."""
    slots = merged_slots([[0, 2], [1], [3, 4]], 5)
    assert slots == [0, 1, 0, 2, 2]
    before = tap([[0, 2], [1, 3]], [[0.5, 0.5], [0.25, 0.75]])
    assert change(before, slots, tap([[0, 1], [0, 2]])) == pytest.approx((3 / 4, 1.75 / 2))


def test_merged_slots_of_experts_that_are_in_no_group():
    assert merged_slots([[1, 3], [0]], 4) == [1, 0, -1, 0]


@pytest.mark.parametrize("sizes", [[40], [13, 27], [1] * 40])
def test_random_changes_against_loops(sizes):
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(40, 8, generator=generator).topk(3).indices
    weight = torch.rand(40, 3, generator=generator)
    slots = [3, -1, 0, 1, 1, -1, 2, 0]
    after = torch.rand(40, 4, generator=generator).topk(2).indices  # a smaller top-k than before
    choices = kept = 0
    mass = kept_mass = 0.0
    for t in range(40):
        for k in range(3):
            choices += 1
            mass += float(weight[t, k])
            if slots[int(index[t, k])] in after[t].tolist():
                kept += 1
                kept_mass += float(weight[t, k])
    found = change(tap(index, weight), slots, tap(after, torch.ones(40, 2)), sizes)
    assert found == pytest.approx((kept / choices, kept_mass / mass))


def test_slots_without_an_expert_are_no_choices():
    """Zaya hands "no expert" on as expert 0 with weight 0: with expert 0 removed, such a token has lost nothing."""
    before = tap([[0], [0], [1]], [[0.0], [0.5], [0.5]])
    after = tap([[0], [0], [0]], [[0.0], [0.5], [0.5]])
    assert change(before, [-1, 0], after) == pytest.approx((1 / 2, 1 / 2))


def test_a_choice_that_became_none_is_lost():
    before = tap([[0], [1]], [[0.5], [0.5]])
    after = tap([[0], [1]], [[0.0], [0.5]])
    assert change(before, None, after) == pytest.approx((1 / 2, 1 / 2))


def test_sentinels():
    """Dispatch leaves out indices beyond the last expert; so must this."""
    before = tap([[0, 7], [1, 0]])
    assert change(before, [0, -1], tap([[0, 7], [0, 7]]))[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_on_a_model(name):
    """What an identity and a removal report, against the hooks' own record of both."""
    model, changed = build(name), build(name)
    batches = [input_batch(model), input_batch(model, 1, 5, 2)]
    view = MoEModel.wrap(changed)
    first = view.moe_layers[0]
    keep = [0, 1, 3, 4, 5, 7]
    slots = [keep.index(e) if e in keep else -1 for e in range(8)]
    with Sweep(view, batches) as sweep:
        for step in sweep:
            if step.index != first:
                continue
            inputs = BlockInputs()
            step.run(inputs.observe)
            same = RoutingChange(inputs, None)
            step.run(same.observe)
            assert same.result() == pytest.approx({"kept_choices": 1, "kept_weight": 1})
            step.layer.block.keep(keep)
            removed = RoutingChange(inputs, slots)
            step.advance(removed.observe)
    kept = choices = mass = kept_mass = 0
    calls = zip(experts_calls(model, batches)[first], experts_calls(changed, batches)[first], strict=True)
    for before, after in calls:
        now = [set() for _ in range(len(before.hidden_TH))]
        for token, expert, _ in after.choices():
            now[token].add(keep[expert])
        for token, expert, weight in before.choices():
            choices, mass = choices + 1, mass + weight
            if expert in now[token]:
                kept, kept_mass = kept + 1, kept_mass + weight
    assert 0 < kept < choices
    assert removed.result() == pytest.approx({"kept_choices": kept / choices, "kept_weight": kept_mass / mass})

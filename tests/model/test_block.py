"""Removing and regrouping experts: which tensors change and how, what is refused, and how the router routes then."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from families import input_batch, tiny_model
from reference import KINDS, experts_calls
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEModel
from moe_compress.model.families import infeasible, remap_hash_table
from moe_compress.model.shape import model_shape
from moe_compress.model.tensors import set_tensor

KEEP = [0, 2, 3, 5, 6, 7]  # two routing groups of four would keep three each
FAMILIES = [*KINDS, "deepseek_v4", "inkling"]
# What counts experts beside the experts themselves, by the end of its name: dimension 0 throughout.
BESIDE = {
    "qwen3_moe": {"gate.weight"},
    "deepseek_v3": {"gate.weight", "gate.e_score_correction_bias"},
    "gpt_oss": {"router.weight", "router.bias"},
    "nemotron_h": {"gate.weight", "gate.e_score_correction_bias"},
    "zaya": {"gate.router_mlp.out_proj.weight", "gate.balancing_biases"},
    "gemma4": {"router.proj.weight", "router.per_expert_scale"},
    "muse_spark": {"gate.weight", "gate.e_score_correction_bias"},
    "deepseek_v4": {"gate.weight", "gate.e_score_correction_bias"},
    "inkling": {"gate.weight", "gate.e_score_correction_bias"},
}
EXTRA = {"zaya": 1, "inkling": 2}  # classes of the router that are no experts
every_family = pytest.mark.parametrize("name", FAMILIES)
every_family_regrouped = pytest.mark.parametrize("name", FAMILIES)


def layer_of(name, position=-1, **overrides):
    """(decoder layer as a module, block) of a fresh tiny model's MoE layer."""
    view = MoEModel.wrap(tiny_model(name, **overrides))
    index = view.moe_layers[position]
    return view.layers[index], view.block(index)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def counted(name, tensors):
    """Names of tensors that count experts, all along dimension 0."""
    experts = {n for n in tensors if ".experts." in f".{n}" and "shared" not in n and "post_expert_norm" not in n}
    return experts | {n for n in tensors if n.endswith(tuple(BESIDE[name]))}


def hidden(block, tokens=20, seed=0):
    size = next(p.shape[-1] for n, p in block.router.named_parameters() if p.dim() == 2)
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))


# Keeping


@every_family
def test_keep(name):
    module, block = layer_of(name)
    before = snapshot(module)
    top_k, groups = block.top_k, block.groups
    block.keep(KEEP)
    after = snapshot(module)
    assert list(after) == list(before)
    changed = {n for n in before if before[n].shape != after[n].shape}
    assert changed == counted(name, before)
    for n in before:
        rows = [*KEEP, *range(8, before[n].shape[0])] if n in changed else slice(None)
        assert torch.equal(after[n], before[n][rows]), n
    assert block.num_experts == 6
    assert len(block.experts.weights().down) == 6
    assert (block.top_k, block.groups) == (top_k, groups)


@every_family
def test_keep_runs_and_routes_to_kept_experts(name):
    model = tiny_model(name)
    view = MoEModel.wrap(model)
    for layer in view.moe_layers:
        view.block(layer).keep(KEEP)
    for call in (c for calls in experts_calls(model, [input_batch(model)]).values() for c in calls):
        assert int(call.index_TK.max()) < 6
        assert all(len(set(row)) == len(row) for row in call.index_TK.tolist())
    with torch.no_grad():
        assert model(**input_batch(model)).logits.isfinite().all()


def test_keep_all_changes_nothing():
    module, block = layer_of("deepseek_v3")
    before = snapshot(module)
    block.keep(list(range(8)))
    assert all(torch.equal(tensor, before[n]) for n, tensor in module.state_dict().items())


def test_keeping_in_one_layer_leaves_the_others():
    """Zaya's routers read the count from the config while they run: each must get its own."""
    for name in ("zaya", "qwen3_moe"):
        model = tiny_model(name)
        view = MoEModel.wrap(model)
        first, *others = view.moe_layers
        view.block(first).keep(KEEP)
        assert [view.block(i).num_experts for i in others] == [8] * len(others)
        calls = experts_calls(model, [input_batch(model, 4)])
        assert int(calls[first][0].index_TK.max()) < 6
        assert max(int(calls[i][0].index_TK.max()) for i in others) >= 6


@pytest.mark.parametrize("wrong", [[], [1, 0], [0, 0, 1], [-1, 2], [0, 8], [3, 5, 4]])
def test_keep_wants_ascending_distinct_indices(wrong):
    module, block = layer_of("qwen3_moe")
    before = snapshot(module)
    with pytest.raises(ValueError, match="must be ascending, distinct and below 8"):
        block.keep(wrong)
    assert all(torch.equal(tensor, before[n]) for n, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("name", "overrides", "indices", "reason"),
    [
        ("qwen3_moe", {}, [4], "layer 2 routes each token to 2 experts, and 1 would be left"),
        ("gpt_oss", {"num_experts_per_tok": 4}, [0, 1, 2], "routes each token to 4 experts, and 3 would be left"),
        ("deepseek_v3", {}, [0, 1, 4, 5, 6], "2 groups of equal size, and 5 experts don't divide into them"),
        ("deepseek_v3", {}, [0, 4], "scores each of its 2 routing groups by two experts, and 2 would leave fewer"),
        ("deepseek_v3", {"num_experts_per_tok": 3}, [0, 1, 4, 5], "picks 3 experts from 1 of its 2 routing groups"),
        ("deepseek_v3", {}, [0, 1, 2, 4], r"groups, which must stay equal: \[3, 1\] would be left"),
        ("deepseek_v3", {}, [0, 1, 2, 3], r"groups, which must stay equal: \[4, 0\] would be left"),
    ],
)
def test_keep_refuses_what_routing_can_not_do(name, overrides, indices, reason):
    module, block = layer_of(name, **overrides)
    before = snapshot(module)
    with pytest.raises(UnsupportedModelError, match=reason):
        block.keep(indices)
    assert block.num_experts == 8
    assert all(torch.equal(tensor, before[n]) for n, tensor in module.state_dict().items())


def test_infeasible_is_exact():
    """Refused is what group-limited top-k, written down plainly, can't do; everything else runs."""

    def route(top_k, groups, used, count):
        scores = torch.arange(float(count)).view(groups, -1)  # fails where the experts don't divide
        best = scores.topk(2, dim=-1)[0].sum(-1).topk(used)[1]  # fails where a group has fewer than two
        chosen = scores[best].flatten().topk(top_k)[1]  # fails where the groups used hold too few
        return chosen

    for top_k in (1, 2, 3, 6):
        for groups, used in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 3)):
            for count in range(1, 17):
                try:
                    route(top_k, groups, used, count)
                    possible = True
                except RuntimeError:
                    possible = groups == 1 and count == 1 == top_k  # without groups nothing is scored by two
                limited = (groups, used) if groups > 1 else None
                assert (infeasible(top_k, limited, count) is None) == possible, (top_k, groups, used, count)


# Routing afterwards


def masked(block, logits_TE, removed):
    """Softmax over the kept experts' logits alone, the best of them renormalised."""
    logits = logits_TE.double().clone()
    logits[:, removed] = float("-inf")
    weight, index = logits.softmax(-1).topk(block.top_k)
    return index, weight / weight.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "gemma4", "mixtral", "olmoe"])
def test_route_after_keep_is_masking(name):
    """Exact where weights are renormalised over the chosen: removed experts take no part, whatever their logits."""
    overrides = {"norm_topk_prob": True} if name == "olmoe" else {}
    _, block = layer_of(name, **overrides)
    inputs = hidden(block, 60)
    with torch.no_grad():
        before = block.route(inputs)
        logits = before.logits_TE.log() if name == "gemma4" else before.logits_TE  # its router returns probabilities
        index, weight = masked(block, logits, [1, 4])
        if name == "gemma4":
            weight = weight * block.router.per_expert_scale.double()[index]
        block.keep(KEEP)
        after = block.route(inputs)
    assert torch.equal(torch.tensor(KEEP)[after.index_TK], index)
    torch.testing.assert_close(after.weight_TK.double(), weight, rtol=1e-5, atol=1e-6)
    # Tokens that chose only kept experts are routed as before.
    same = ~torch.isin(before.index_TK, torch.tensor([1, 4])).any(dim=1)
    assert 0 < int(same.sum()) < len(inputs)
    assert torch.equal(torch.tensor(KEEP)[after.index_TK][same], before.index_TK[same])
    torch.testing.assert_close(after.weight_TK[same], before.weight_TK[same])


@pytest.mark.parametrize("name", ["deepseek_v3", "nemotron_h", "muse_spark"])
def test_route_after_keep_is_masking_of_sigmoids(name):
    """Selection by group, score and bias among the kept; weights are the scores without bias, renormalised."""
    _, block = layer_of(name)
    inputs = hidden(block, 60)
    with torch.no_grad():
        router = block.router
        logits = block.route(inputs).logits_TE
        score, bias = logits.double().sigmoid(), router.e_score_correction_bias.double()
        choice = score + bias
        choice[:, [1, 4]] = -1e9
        if block.groups:
            number, used = block.groups
            by_group = choice.view(len(inputs), number, -1)
            best = by_group.topk(2, dim=-1)[0].sum(-1).topk(used)[1]
            allowed = torch.zeros(len(inputs), number).scatter_(1, best, 1).bool()
            choice = by_group.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        index = choice.topk(block.top_k)[1]
        weight = score.gather(1, index)
        weight = weight / weight.sum(-1, keepdim=True) * router.routed_scaling_factor
        block.keep(KEEP)
        after = block.route(inputs)
    order = torch.tensor(KEEP)[after.index_TK].sort(dim=1)
    expected = index.sort(dim=1)
    assert torch.equal(order.values, expected.values)
    torch.testing.assert_close(
        after.weight_TK.double().gather(1, order.indices), weight.gather(1, expected.indices), rtol=1e-5, atol=1e-6
    )


# Hash routing of DeepSeek-V4


@pytest.mark.parametrize("kept", [[0, 1, 2], [2, 5, 6, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8], list(range(10)), [1, 4, 9]])
def test_remapped_hash_table(kept):
    table = torch.rand(500, 10, generator=torch.Generator().manual_seed(0)).topk(3).indices
    given = table.clone()
    found = remap_hash_table(table, torch.tensor(kept), 10)
    assert torch.equal(table, given)
    assert found.dtype == table.dtype
    for before, after in zip(table.tolist(), found.tolist(), strict=True):
        assert len(set(after)) == 3
        assert all(0 <= slot < len(kept) for slot in after)
        for old, new in zip(before, after, strict=True):
            assert old not in kept or kept[new] == old
    load = torch.bincount(found.flatten(), minlength=len(kept))
    assert int(load.max()) < 1.3 * int(load.min())


def test_keep_remaps_the_hash_table():
    module, block = layer_of("deepseek_v4", 0)
    before = module.state_dict()["mlp.gate.tid2eid"].clone()
    block.keep(KEEP)
    after = module.state_dict()["mlp.gate.tid2eid"]
    assert after.shape == before.shape
    kept = torch.isin(before, torch.tensor(KEEP))
    assert torch.equal(torch.tensor(KEEP)[after[kept]], before[kept])
    assert all(len(set(row)) == len(row) and max(row) < 6 for row in after.tolist())
    table = remap_hash_table(before, torch.tensor(KEEP), 8)
    assert torch.equal(table, after)


# Regrouping


GROUPS = [[0, 3], [1], [2], [4, 5], [6], [7]]
REPRESENTATIVES = [0, 1, 2, 4, 6, 7]


def mixing():
    rows = torch.zeros(6, 8, dtype=torch.float64)
    for slot, members in enumerate(GROUPS):
        share = torch.rand(len(members), generator=torch.Generator().manual_seed(slot), dtype=torch.float64)
        rows[slot, members] = share / share.sum()
    return rows


@every_family_regrouped
def test_regroup(name):
    """Router rows, correction biases and per-expert scales are mixed, other router classes and all else untouched."""
    module, block = layer_of(name)
    before = snapshot(module)
    block.regroup(REPRESENTATIVES, mixing())
    after = snapshot(module)
    for n in before:
        if n not in counted(name, before):
            assert torch.equal(after[n], before[n]), n
        elif n.endswith(tuple(BESIDE[name])):
            assert len(after[n]) == len(before[n]) - 2
            assert after[n].dtype == before[n].dtype
            for slot, row in enumerate(mixing()):
                expected = sum(float(share) * before[n][e].double() for e, share in enumerate(row))
                torch.testing.assert_close(after[n][slot].double(), expected, rtol=1e-6, atol=1e-7)
            assert torch.equal(after[n][6:], before[n][8:])
            full = "weight" in n or "proj" in n or "balancing" in n
            assert len(after[n][6:]) == (EXTRA.get(name, 0) if full else 0)
        else:
            assert torch.equal(after[n], before[n][REPRESENTATIVES]), n
    assert block.num_experts == 6


def test_regroup_into_the_same_experts_changes_nothing():
    module, block = layer_of("gemma4")
    before = snapshot(module)
    block.regroup(list(range(8)), torch.eye(8))
    assert all(torch.equal(tensor, before[n]) for n, tensor in module.state_dict().items())


def test_regroup_on_another_device():
    """A stand-in for a GPU: tensors without data that know their device, and refuse to meet another's."""
    module, block = layer_of("qwen3_moe")
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    with FakeTensorMode():
        for name, shape in shapes.items():
            set_tensor(module, name, torch.empty(shape, device="lazy:0"))
        block.regroup(REPRESENTATIVES, torch.zeros(6, 8, dtype=torch.float64))
    assert block.router.weight.shape[0] == 6
    assert {t.device.type for t in module.state_dict().values()} == {"lazy"}


# As plain data


@every_family_regrouped
def test_state_round_trip(name):
    """Reduced blocks, put into a model at its original size: the same logits, nothing left on the meta device."""
    changed, fresh = tiny_model(name), tiny_model(name, seed=1)
    fresh.load_state_dict(changed.state_dict())
    one, two = MoEModel.wrap(changed), MoEModel.wrap(fresh)
    with torch.no_grad():
        for layer in one.moe_layers:
            one.block(layer).regroup(REPRESENTATIVES if layer % 2 else KEEP, mixing())
            tensors, description = one.block(layer).state()
            tensors = {n: t.clone() for n, t in tensors.items()}
            for n in two.block(layer).own_names():  # nothing of it may come from the model that it is put into
                two.layers[layer].state_dict()[n].zero_()
            two.block(layer).restructure(json.loads(json.dumps(description)))
            assert two.block(layer).num_experts == 6
            assert set(two.block(layer).own_names()) == set(tensors)
            two.block(layer).assign(tensors)
            assert two.block(layer).kind == "fused"
        assert not any(t.is_meta for t in fresh.state_dict().values())
        batch = input_batch(changed)
        assert torch.equal(fresh(**batch).logits, changed(**batch).logits)


def test_state_holds_router_and_experts_alone():
    module, block = layer_of("deepseek_v3")
    tensors, description = block.state()
    assert set(tensors) == {
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
    }
    assert description == {"kind": "fused", "num_experts": 8, "experts": "mlp.experts"}
    assert all(torch.equal(tensor, module.state_dict()[n]) for n, tensor in tensors.items())


def test_changes_through_views_reach_the_module():
    """Weights are views: gate, up and down of every layout, and biases."""
    for name in ("qwen3_moe", "gpt_oss", "nemotron_h"):
        module, block = layer_of(name)
        before = snapshot(module)
        for tensor in block.experts.weights().map(lambda w: w).items():
            tensor[1][2] += 1.0
        after = module.state_dict()
        for n in before:
            grown = after[n] - before[n]
            if ".experts." in n and "shared" not in n:
                torch.testing.assert_close(grown[2], torch.ones_like(grown[2]))
                grown[2] = 0
            assert not grown.any()


# Sizes


def test_size_in_memory_is_the_size_on_disk(demo_model):
    disk = MoEModel.open(demo_model)
    loaded = type(disk.module).from_pretrained(demo_model, dtype=torch.bfloat16)
    assert model_shape(MoEModel.wrap(loaded)).layers == model_shape(disk).layers
    stored = model_shape(disk)
    in_memory = replace(model_shape(MoEModel.wrap(loaded)), others=stored.others, config=stored.config)
    assert in_memory == stored


def test_view_does_not_change_the_model():
    model = tiny_model("zaya")
    before, config = snapshot(model), copy.deepcopy(model.config.to_dict())
    view = MoEModel.wrap(model)
    for layer in view.moe_layers:
        view.block(layer).state()
        view.block(layer).experts.weights()
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert model.config.to_dict() == config

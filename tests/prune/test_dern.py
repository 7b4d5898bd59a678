"""DERN: moves and clusters against plain loops in float64, and what must hold exactly."""

import copy

import pytest
import torch
from families import input_batch
from reference import build

import moe_compress
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.prune.dern import clusters, move, recombine

FAMILIES = ["qwen3_moe", "gpt_oss", "nemotron_h"]
KEEP = [0, 2, 3, 6, 7]


def weights_of(name):
    model = build(name)
    view = MoEModel.wrap(model)
    return FusedExperts(view.block(view.moe_layers[0]).experts_module).weights().map(torch.clone)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_move_to_the_expert_with_the_nearest(name, gate):
    weights = weights_of(name)
    threshold = 0.25  # of random ones; a part is above

    def vector(e, j):
        parts = [weights.up[e, j], weights.down[e, :, j]]
        return torch.cat([*parts, *([weights.gate[e, j]] if gate and weights.gate is not None else [])]).double()

    moved = move(weights, KEEP, threshold, gate)
    found = {
        (int(e), int(j)): KEEP[int(s)] for e, j, s in zip(moved.expert_N, moved.neuron_N, moved.slot_N, strict=True)
    }
    expected = {}
    neurons = weights.up.shape[1]
    for e in range(8):
        for j in range(neurons):
            if e in KEEP:
                continue
            best = max(
                (float(torch.cosine_similarity(vector(e, j), vector(k, i), dim=0)), k)
                for k in KEEP
                for i in range(neurons)
            )
            if best[0] > threshold:
                expected[e, j] = best[1]
    assert found == expected
    assert 0 < len(expected) < 3 * neurons


def test_clusters_are_spherical_k_means():
    """Lloyd's turns one by one, in plain loops, for groups of unequal size."""
    generator = torch.Generator().manual_seed(0)
    sizes, centres = [9, 4, 14], 4
    group = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    vectors = torch.randn(27, 6, generator=generator, dtype=torch.float64)
    weight = torch.rand(27, generator=generator, dtype=torch.float64) + 0.1
    first = vectors[:, :2].abs().amax(1)
    found = clusters(vectors, weight, first, group, 3, centres)
    for g in range(3):
        rows = (group == g).nonzero().flatten().tolist()
        start = sorted(rows, key=lambda r: -float(first[r]))[:centres]
        centre = [vectors[r] / vectors[r].norm() for r in start]
        length = [float(vectors[r].norm()) for r in start]
        before = None
        for _ in range(20):
            near = {r: max(range(centres), key=lambda c: float(vectors[r] @ centre[c])) for r in rows}
            if near == before:
                break
            before = near
            for c in range(centres):
                own = [r for r in rows if near[r] == c]
                if own:
                    total = sum(weight[r] * vectors[r] / vectors[r].norm() for r in own)
                    centre[c] = total / total.norm()
                    length[c] = float(sum(weight[r] * vectors[r].norm() for r in own) / sum(weight[r] for r in own))
        for c in range(centres):
            torch.testing.assert_close(found[g, c], centre[c] * length[c], rtol=1e-6, atol=1e-9)
    assert torch.allclose(found[1].norm(dim=1).sort().values, vectors[group == 1].norm(dim=1).sort().values)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_changes_nothing(name):
    """A dropped expert that is a kept one with its neurons in another order: all of it moves there, to no effect."""
    weights = weights_of(name)
    order = torch.randperm(weights.up.shape[1], generator=torch.Generator().manual_seed(0))
    for n, value in weights.items():
        if n != "down_bias":
            value[1] = value[2][:, order] if n == "down" else value[2][order]
    moved = move(weights, KEEP, 0.999, gate=True)
    assert moved.expert_N.unique().tolist() == [1]
    assert moved.slot_N.unique().tolist() == [1]
    assert len(moved.neuron_N) == len(order)
    result = recombine(weights, KEEP, moved, torch.rand(8))

    def neurons(values, e):
        columns = [v[e].T if n == "down" else v[e].view(len(order), -1) for n, v in values if n != "down_bias"]
        whole = torch.cat(columns, dim=1)
        return whole[whole[:, 0].argsort()]

    for slot, e in enumerate(KEEP):
        torch.testing.assert_close(neurons(result.items(), slot), neurons(weights.items(), e), rtol=1e-5, atol=1e-6)


def compressed(model, step, ids):
    result = moe_compress.compress(copy.deepcopy(model), passes=[step], calibration=ids)
    return result, result.model


def test_nothing_moves_above_a_cosine_of_1():
    """Then it is pruning by gate mass."""
    model = build("qwen3_moe")
    ids = input_batch(model, 3, 16)["input_ids"]
    dern = {"prune.dern": {"experts": 5, "threshold": 1.0, "refit": False}}
    pruned = {"prune.experts": {"experts": 5, "criterion": "gate_mass", "refit": False}}
    one, two = (compressed(model, step, ids)[1].state_dict() for step in (dern, pruned))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name", [*FAMILIES, "deepseek_v3", "zaya", "muse_spark"])
def test_the_pass_keeps_its_promises(name):
    """Widths stay, every neuron moved arrives, refitting only ever helps on the calibration tokens."""
    model = build(name)
    ids = input_batch(model, 3, 16)["input_ids"]
    step = {"experts": 6, "threshold": 0.2}
    result, changed = compressed(model, {"prune.dern": step}, ids)
    again = compressed(model, {"prune.dern": step}, ids)[1].state_dict()
    assert all(torch.equal(t, again[n]) for n, t in changed.state_dict().items())
    views = [MoEModel.wrap(m) for m in (model, changed)]
    for layer in result.report["layers"]:
        entries = [e["prune.dern"] for e in layer["experts"]]
        assert sum(e.get("neurons_moved", 0) for e in entries) == sum(e.get("neurons_received", 0) for e in entries)
        assert sum(e.get("neurons_moved", 0) for e in entries) > 0
        one, two = (v.block(layer["layer"]).experts for v in views)
        assert (two.num_experts, two.intermediate_size) == (6, one.intermediate_size)
        refit = layer["passes"][0]["refit"]
        assert "skipped" in refit if name == "muse_spark" else refit["after"] <= refit["before"]

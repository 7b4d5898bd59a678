"""Statistics of single neurons: against plain loops in float64, the model's own autograd, and what they claim."""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from families import input_batch
from places import DEMO
from reference import activations_ETI, build, experts_calls, joined, measure

from moe_compress.calib.collect import MemoryStore, Profile, collect
from moe_compress.calib.neurons import (
    NeuronGradients,
    NeuronProjections,
    NeuronRemoval,
    NeuronSums,
    NeuronWeights,
    removal_costs,
)
from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEModel, hf
from moe_compress.model.backward import GradientSweep
from moe_compress.model.losses import NextToken
from moe_compress.model.shape import model_shape
from moe_compress.progress import Progress

# With a gate, with biases and transposed, without a gate.
NAMES = ["qwen3_moe", "gpt_oss", "nemotron_h"]


@functools.cache
def model_of(name):
    return build(name, DEMO / "moe-demo")


def batches_of(name):
    return [input_batch(model_of(name), *shape) for shape in ((2, 12, 1), (1, 9, 2))]


def backward(view, batches, statistics):
    store = MemoryStore()
    with GradientSweep(view, batches) as sweep:
        collect(sweep, statistics, store, Progress(), NextToken(batches))
    return Profile(model_shape(view), store, len(view.layers))


def down_of(module):
    """[E, H, I], float64."""
    down = module.down_proj.detach().double()
    return down.transpose(1, 2) if module.is_transposed else down


@functools.cache
def reference(name):
    """(down [E, H, I], rows (expert, gate, activations [I])) of the last layer with experts."""
    view = MoEModel.wrap(model_of(name))
    layer = view.moe_layers[-1]
    module = view.block(layer).experts_module
    call = joined(experts_calls(model_of(name), batches_of(name))[layer])
    activation = activations_ETI(module, call.hidden_TH)
    return down_of(module), [(e, g, activation[e, t]) for t, e, g in call.choices()]


@pytest.mark.parametrize("name", NAMES)
def test_sums_and_projections(name):
    down, rows = reference(name)
    experts, neurons = len(down), down.shape[2]
    view = MoEModel.wrap(model_of(name))
    found = measure(view, batches_of(name), [NeuronSums(), NeuronProjections()])
    squares, maximum, projected = (torch.zeros(experts, neurons, dtype=torch.float64) for _ in range(3))
    for e, g, a in rows:
        squares[e] += (g * a) ** 2
        maximum[e] = torch.maximum(maximum[e], (g * a) ** 2)
        f = down[e] @ a
        for j in range(neurons):
            projected[e, j] += a[j] * (down[e, :, j] @ f) / f.norm()
    sums = found.of(view.moe_layers[-1], NeuronSums())
    torch.testing.assert_close(sums["gated_squares"], squares, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(sums["gated_maximum"], maximum, rtol=1e-4, atol=1e-9)
    assert sums["counts"].tolist() == [sum(r[0] == e for r in rows) for e in range(experts)]
    along = found.of(view.moe_layers[-1], NeuronProjections())["projected"]
    torch.testing.assert_close(along, projected, rtol=1e-3, atol=1e-5)
    # All neurons together go the whole way: Σ_j ⟨a_j w_j, f⟩/‖f‖ = ‖f‖.
    for e in range(experts):
        norms = sum(float((down[e] @ a).norm()) for own, _, a in rows if own == e)
        assert float(along[e].sum()) == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_weights(name):
    view = MoEModel.wrap(model_of(name))
    block = view.block(view.moe_layers[0])
    found = NeuronWeights().start(block, 0).result()
    weights = block.experts.weights()
    for e, j in itertools.product(range(3), range(4)):
        down = float(weights.down[e, :, j].double().square().sum())
        rows = [float(w[e, j].double().square().sum()) for w in (weights.up, weights.gate) if w is not None]
        assert float(found["down"][e, j]) == pytest.approx(down, rel=1e-6)
        assert float(found["whole"][e, j]) == pytest.approx(down + sum(rows), rel=1e-6)


def gradients_at(model, module, layer, batches):
    """Per batch what went into an experts module and, by the model's own backward of the loss summed over the text (as
    a mean times all tokens), the gradient at what it put out."""
    calls = []

    def ran(_module, arguments, output):
        output.retain_grad()
        calls.append((*(a.detach() for a in arguments), output))

    handle = module.register_forward_hook(ran)
    tokens = sum(b["input_ids"].numel() for b in batches)
    count = sum(b["input_ids"][:, 1:].numel() for b in batches)
    with hf.implementation(model, "eager"), torch.enable_grad():
        for batch in batches:
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum") / count * tokens
            loss.backward()
    handle.remove()
    parts = [torch.cat([c[i].flatten(0, -2) for c in calls]) for i in range(3)]
    return (*parts, torch.cat([c[3].grad.flatten(0, -2) for c in calls]).double())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_heaprs(name):
    """wᵀ G w with G made, row by row; the joint Fisher and the slope with nothing made."""
    model = copy.deepcopy(model_of(name)).requires_grad_(True)
    view = MoEModel.wrap(model)
    layer, batches = view.moe_layers[0], batches_of(name)
    found = backward(view, batches, [NeuronGradients()]).of(layer, NeuronGradients())
    module = view.block(layer).experts_module
    hidden, index, weight, gradient = gradients_at(model, module, layer, batches)
    activation, down = activations_ETI(module, hidden), down_of(module)
    assert float(found["tokens"]) == len(hidden)
    for e in range(len(down)):
        rows = [(t, float(weight[t, k])) for t in range(len(index)) for k in range(index.shape[1]) if index[t, k] == e]
        assert float(found["counts"][e]) == len(rows)
        if not rows:
            continue
        fisher = sum(torch.outer(g * gradient[t], g * gradient[t]) for t, g in rows) / len(rows)
        along = torch.stack([g * gradient[t] @ down[e] for t, g in rows])
        a = torch.stack([activation[e, t] for t, _ in rows])
        expected = {
            "squares": a.square().sum(0),
            "projected": len(rows) * torch.einsum("hi,hk,ki->i", down[e], fisher, down[e]),
            "joint": (a * along).square().sum(0),
            "slope": (a * along).sum(0),
        }
        for key, value in expected.items():
            torch.testing.assert_close(found[key][e], value, rtol=5e-3, atol=1e-6 * float(value.abs().max()) + 1e-12)


def test_slope_is_what_less_of_a_neuron_does():
    """On the whole model in float64: the loss moves by −slope per share of a neuron that goes."""
    model = build("qwen3_moe").double()
    view = MoEModel.wrap(model)
    layer, batches = view.moe_layers[-1], batches_of("qwen3_moe")
    found = backward(view, batches, [NeuronGradients()]).of(layer, NeuronGradients())
    down = view.block(layer).experts.weights().down
    tokens = float(found["tokens"])

    def loss():
        count, total = 0, 0.0
        with torch.no_grad(), hf.implementation(model, "eager"):
            for batch in batches:
                logits = model(**batch).logits[:, :-1].flatten(0, 1)
                total += float(F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum"))
                count += len(logits)
        return total / count * tokens

    def at(share):
        down[busy, :, j] = share * kept
        return loss()

    busy = int(found["counts"].argmax())
    for j in (0, 5, 11):
        kept = down[busy, :, j].clone()
        change = (at(0.98) - at(1.02)) / 0.04
        assert change == pytest.approx(-float(found["slope"][busy, j]), rel=1e-2, abs=1e-6)
        down[busy, :, j] = kept


def test_a_norm_behind_the_experts_is_refused():
    view = MoEModel.wrap(model_of("muse_spark"))
    with pytest.raises(UnsupportedModelError, match="norm follows its experts"):
        NeuronGradients().start(view.block(view.moe_layers[0]), 3)


# What is left when the others take over


def least_error(features_RI, down_HI, keep, scale):
    """min over W of ‖F Wᵀ − F_keep W'ᵀ‖² + λ‖·‖² as a dense least-squares problem: rows of √λ below the features."""
    padded = torch.cat([features_RI, scale**0.5 * torch.eye(features_RI.shape[1], dtype=torch.float64)])
    wanted = padded @ down_HI.T
    solved = torch.linalg.lstsq(padded[:, keep], wanted, driver="gelsd").solution
    return float((wanted - padded[:, keep] @ solved).square().sum())


def test_removal_is_least_squares():
    """One neuron, and sets of them in the order found: each cost against a dense solution without them."""
    generator = torch.Generator().manual_seed(0)
    experts, rows, neurons, hidden = 2, 30, 7, 5
    features = torch.randn(experts, rows, neurons, generator=generator, dtype=torch.float64)
    features[:, :, 3] = features[:, :, 1] + 0.1 * features[:, :, 3]  # one that another can nearly stand in for
    down = torch.randn(experts, hidden, neurons, generator=generator, dtype=torch.float64)
    scale = 0.3
    moment = features.transpose(1, 2) @ features + scale * torch.eye(neurons, dtype=torch.float64)
    alone, in_turn = removal_costs(moment, down.transpose(1, 2) @ down)
    for e in range(experts):
        for j in range(neurons):
            keep = [i for i in range(neurons) if i != j]
            assert float(alone[e, j]) == pytest.approx(least_error(features[e], down[e], keep, scale), rel=1e-8)
        order = in_turn[e].argsort().tolist()
        assert order[0] == int(alone[e].argmin())
        gone, total = [], 0.0
        for j in order[:-1]:
            costs = {
                i: least_error(features[e], down[e], [k for k in range(neurons) if k not in (*gone, i)], scale)
                for i in range(neurons)
                if i not in gone
            }
            assert min(costs, key=costs.get) == j
            assert float(in_turn[e, j]) >= costs[j] - total - 1e-9
            gone, total = [*gone, j], costs[j]
        # Costs that rise add up to the whole; where one would fall it is held at the one before.
        assert float(in_turn[e, order[:-1]].sum()) >= total - 1e-9


def test_removal_statistic_weighs_rows_by_their_gates():
    down, rows = reference("qwen3_moe")
    view = MoEModel.wrap(model_of("qwen3_moe"))
    found = measure(view, batches_of("qwen3_moe"), [NeuronRemoval(ridge=0.5)])
    alone = found.of(view.moe_layers[-1], NeuronRemoval(ridge=0.5))["alone"]
    for e in range(len(down)):
        own = [g * a for expert, g, a in rows if expert == e]
        if not own:
            assert not alone[e].any()
            continue
        features = torch.stack(own)
        scale = 0.5 * features.shape[1] / len(own) * float(features.square().sum(0).mean())
        for j in (0, 7):
            keep = [i for i in range(features.shape[1]) if i != j]
            assert float(alone[e, j]) == pytest.approx(least_error(features, down[e], keep, scale), rel=1e-3)

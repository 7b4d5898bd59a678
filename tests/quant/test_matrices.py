"""What a width costs a matrix beside the experts, what GPTQ is given, and how the program spends on both."""

import numpy as np
import pytest
import torch
from families import input_batch, tiny_model
from torch.nn import functional

from moe_compress.calib.collect import MemoryStore, collect
from moe_compress.calib.linear_inputs import LinearMoments
from moe_compress.model import MoEModel
from moe_compress.model.beside import OUTER
from moe_compress.model.sweep import TOKEN_WEIGHT, Sweep
from moe_compress.progress import Progress
from moe_compress.quant.allocate import Choices, program
from moe_compress.quant.beside import quantize_matrices
from moe_compress.quant.grid import Grid, dequantize
from moe_compress.quant.matrix_error import MatrixError, included
from moe_compress.quant.rtn import round_to_nearest
from moe_compress.quant.solver import SolverOptions

KINDS = ("attention", "dense_mlp", "embeddings", "head", "shared_experts")
WIDTHS = (2, 8)


def rounded(weight, bits, group=4):
    return dequantize(round_to_nearest(weight.detach(), Grid(bits, group)), torch.float32)


@pytest.fixture(scope="module", params=["deepseek_v3", "cohere2_moe"])
def measured(request):
    """(model, batches, what was measured): untied and tied."""
    view = MoEModel.wrap(tiny_model(request.param))
    batches = [{"input_ids": input_batch(view.module, seed=s)["input_ids"]} for s in (1, 2)]
    statistic = MatrixError(KINDS, WIDTHS, group_size=4)
    store = MemoryStore()
    with Sweep(view, batches) as sweep:
        collect(sweep, [statistic], store, Progress())
    return view, batches, {i: store.get(i, statistic.key)["relative"] for i in statistic.layers(view)}


@torch.no_grad()
def behind(view, batches, index):
    """Hidden states behind a layer, [T, H], by the model's own forward."""
    seen = []
    layer = view.layers[index]
    handle = layer.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    logits = [view.module(**batch).logits for batch in batches]
    handle.remove()
    return torch.cat([h.flatten(0, 1) for h in seen]).double(), torch.cat([z.flatten(0, 1) for z in logits]).double()


def test_the_cost_in_a_layer_is_the_change_of_its_hidden_state(measured):
    view, batches, found = measured
    checked = 0
    for index in (0, len(view.layers) - 1):
        exact, _ = behind(view, batches, index)
        for number, matrix in enumerate(view.matrices[index]):
            module = view.layers[index].get_submodule(matrix.path)
            weight = module.weight.detach().clone()
            for column, bits in enumerate(WIDTHS):
                module.weight.data = rounded(weight, bits)
                changed, _ = behind(view, batches, index)
                module.weight.data = weight
                expected = ((changed - exact).square().sum(1) / exact.square().sum(1)).sum()
                assert float(found[index][number, column]) == pytest.approx(float(expected), rel=1e-3)
                checked += 1
    assert checked >= 14


def test_the_cost_of_embeddings_and_head(measured):
    view, batches, found = measured
    tokens = torch.cat([b["input_ids"].flatten() for b in batches])
    table = view.module.get_input_embeddings().weight.detach()
    head = view.module.get_output_embeddings().weight.detach()
    # The first batch alone is run to the head, and stands for all.
    seen = []
    handle = view.module.get_output_embeddings().register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        view.module(**batches[0])
    handle.remove()
    read = seen[0].flatten(0, 1).double()
    share = len(tokens) / len(read)
    for column, bits in enumerate(WIDTHS):
        change = (rounded(table, bits) - table)[tokens].double()
        embedded = (change.square().sum(1) / table[tokens].double().square().sum(1)).nan_to_num(posinf=0).sum()
        z, moved = (functional.linear(read, w.double()) for w in (head, rounded(head, bits) - head))
        z, moved = (v - v.mean(1, keepdim=True) for v in (z, moved))
        logits = (moved.square().sum(1) / z.square().sum(1)).sum() * share
        own = found[OUTER][:, column].tolist()
        expected = [embedded, logits] if len(own) == 2 else [embedded + logits]
        assert own == pytest.approx([float(e) for e in expected], rel=1e-3)


def test_moments_are_of_what_each_layer_reads_and_shared_where_it_is_the_same():
    view = MoEModel.wrap(tiny_model("deepseek_v3"))
    batches = [{"input_ids": input_batch(view.module, seed=s)["input_ids"]} for s in (1, 2)]
    paths = [m.path for m in view.matrices[1]]
    layer = view.layers[1]
    inputs = {p: [] for p in paths}
    handles = [
        layer.get_submodule(p).register_forward_pre_hook(lambda m, a, own=inputs[p]: own.append(a[0])) for p in paths
    ]
    with torch.no_grad(), LinearMoments(layer, paths) as moments:
        for batch in batches:
            view.module(**batch)
    for handle in handles:
        handle.remove()
    assert set(moments) == set(paths)
    for path in paths:
        rows = torch.cat([x.flatten(0, -2) for x in inputs[path]]).double()
        assert torch.allclose(moments[path].double(), rows.T @ rows, rtol=1e-4, atol=1e-5)
    together = {frozenset(p for p in paths if moments[p] is moments[q]) for q in paths}
    shared = {frozenset(f"self_attn.{p}" for p in ("q_a_proj", "kv_a_proj_with_mqa"))}
    shared |= {frozenset(f"mlp.shared_experts.{p}_proj" for p in ("gate", "up"))}
    assert {t for t in together if len(t) > 1} == shared
    assert len(layer.self_attn.q_a_proj._forward_pre_hooks) == 0


@pytest.mark.parametrize("name", ["deepseek_v3", "hy_v4", "qwen3_next"])
def test_moments_count_tokens_as_much_as_they_weigh(name):
    """Against a plain loop in float64; several rows of one token count alike."""
    view = MoEModel.wrap(tiny_model(name))
    batches = [{"input_ids": input_batch(view.module, seed=s)["input_ids"][:, : 9 + s]} for s in (1, 2)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(b["input_ids"].shape, generator=generator) for b in batches]
    weights[1][:, :4] = 0
    index = view.moe_layers[0]
    paths = [m.path for m in view.matrices[index]]
    layer = view.layers[index]
    inputs = {p: [] for p in paths}

    def keep(path):
        return lambda _module, arguments: inputs[path].append(arguments[0].double())

    handles = [layer.get_submodule(p).register_forward_pre_hook(keep(p)) for p in paths]
    weighed = [{**b, TOKEN_WEIGHT: w} for b, w in zip(batches, weights, strict=True)]
    with Sweep(view, weighed) as sweep:
        for step in sweep:
            if step.index == index:
                with LinearMoments(layer, paths, step.token_weights) as moments:
                    step.run()
                for handle in handles:
                    handle.remove()
    assert set(moments) == set(paths)
    for path in paths:
        expected = torch.zeros(2 * (layer.get_submodule(path).in_features,), dtype=torch.float64)
        for x, w in zip(inputs[path], weights, strict=True):
            rows = x.reshape(w.numel(), -1, x.shape[-1])
            for token, weight in enumerate(w.flatten().tolist()):
                for row in rows[token]:
                    expected += weight * torch.outer(row, row)
        assert torch.allclose(moments[path].double(), expected, rtol=1e-4, atol=1e-5), path
    assert moments.unweighed == set()


class EveryOtherToken(torch.nn.Module):
    def forward(self, hidden):
        return hidden[:, ::2]


@torch.no_grad()
def test_inputs_that_are_no_rows_of_tokens_count_one_and_are_told():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), EveryOtherToken(), torch.nn.Linear(4, 4))
    hidden, weight = torch.randn(2, 6, 4), torch.rand(12)
    with LinearMoments(layer, ["0", "2"], [weight]) as moments:
        layer(hidden)
    assert moments.unweighed == {"2"}
    rows, others = hidden.flatten(0, 1).double(), layer[:2](hidden).flatten(0, 1).double()
    torch.testing.assert_close(moments["0"].double(), (rows.T * weight) @ rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments["2"].double(), others.T @ others, rtol=1e-5, atol=1e-5)


def test_matrices_that_read_the_same_are_solved_as_one_and_alone_alike():
    """Rows are independent: together or apart, GPTQ finds the same codes, and less error than rounding."""
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(o, 32, generator=generator) for n, o in (("q", 16), ("k", 8), ("v", 8))}
    mixing = torch.randn(32, 32, generator=generator)
    rows = torch.randn(400, 32, generator=generator) @ mixing
    moment = rows.T @ rows
    options = SolverOptions(group_size=16)
    decision = {n: {"bits": b, "kind": "attention"} for n, b in (("q", 3), ("k", 3), ("v", 4))}
    found = quantize_matrices(weights, decision, options, dict.fromkeys(weights, moment))
    assert list(found) == ["q", "k", "v"]
    for name, weight in weights.items():
        alone = quantize_matrices({name: weight}, decision, options, {name: moment})[name]
        linear = torch.nn.Linear(32, len(weight), bias=False)
        value, again = (c.module(linear, torch.float32).weight for c in (found[name], alone))
        assert torch.equal(value, again)
        assert found[name].bits == decision[name]["bits"]
        error = ((value - weight) @ rows.T).double().square().sum() / (weight @ rows.T).double().square().sum()
        assert found[name].report["output_error"] == pytest.approx(float(error), rel=1e-3)
        assert found[name].report["kind"] == "attention"
        near = rounded(weight, decision[name]["bits"], 16)
        assert error < ((near - weight) @ rows.T).double().square().sum() / (weight @ rows.T).double().square().sum()


def test_sweeps_are_those_asked_for():
    """Every sweep takes something off the error on the text, as it does with experts."""
    generator = torch.Generator().manual_seed(1)
    weight, mixing = torch.randn(24, 32, generator=generator), torch.randn(32, 32, generator=generator)
    rows = torch.randn(400, 32, generator=generator) @ mixing
    moment, decision = rows.T @ rows, {"q": {"bits": 2}}
    options = [SolverOptions(group_size=16, sweeps=sweeps) for sweeps in (0, 1, 4)]
    found = [quantize_matrices({"q": weight}, decision, own, {"q": moment})["q"].report for own in options]
    errors = [report["output_error"] for report in found]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 3


def test_without_moments_it_is_rounded():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    found = quantize_matrices({"a": weight}, {"a": {"bits": 4}}, SolverOptions(group_size=16), None)["a"]
    value = found.module(torch.nn.Embedding(8, 32), torch.float32).weight
    assert torch.equal(value, rounded(weight, 4, 16))
    assert found.report["solver"] == "rtn"
    expected = (value - weight).double().square().sum() / weight.double().square().sum()
    assert found.report["weight_error"] == pytest.approx(float(expected), rel=1e-5)


def test_the_program_spends_on_experts_and_the_rest_alike():
    """Units with two and three widths in one program: the optimum that trying everything finds."""
    generator = np.random.default_rng(0)

    def units(count, widths):
        cost = np.sort(generator.random((count, widths)), axis=1)[:, ::-1].copy()
        size = np.sort(generator.integers(1, 50, (count, widths)), axis=1)
        return Choices(np.arange(count)[:, None], cost, size.astype(np.int64), np.ones((count, widths), np.bool_))

    choices = {0: units(3, 2), -2: units(2, 3)}
    for budget in (100, 120, 150, 200):
        best = np.inf
        for own in np.ndindex(2, 2, 2):
            for others in np.ndindex(3, 3):
                picked = ((choices[0], own), (choices[-2], others))
                size = sum(int(c.size_UB[np.arange(len(p)), list(p)].sum()) for c, p in picked)
                cost = sum(float(c.cost_UB[np.arange(len(p)), list(p)].sum()) for c, p in picked)
                best = min(best, cost) if size <= budget else best
        found = program(choices, budget)
        assert found.summary["cost"] == pytest.approx(best)
        assert set(found.column_U) == {0, -2}
        assert found.column_U[0].max() <= 1


def test_rows_that_are_no_whole_groups_are_left():
    view = MoEModel.wrap(tiny_model("deepseek_v3"))
    own = included(view.matrices[0], frozenset({"attention"}), 8)
    assert [m.path for m in view.matrices[0] if m.kind == "attention" and m not in own] == [
        "self_attn.q_b_proj",  # its inputs are 12
        "self_attn.kv_b_proj",
    ]
    assert included(view.matrices[0], frozenset({"attention"}), -1) == [
        m for m in view.matrices[0] if m.kind == "attention"
    ]

"""Factorising: each method against what it is to minimise, ranks against brute force, from recipe to file and back."""

import itertools
import json

import numpy as np
import pytest
import torch
from checkpoints import recipe, small_checkpoint, texts
from families import input_batch, tiny_model
from native_reader import STORED, Native, as_float
from reference import experts_calls, joined, measure
from transformers import AutoModelForCausalLM

import moe_compress
from moe_compress.calib.collect import MemoryStore, collect
from moe_compress.calib.inputs import BlockInputs
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import BudgetError, RecipeError
from moe_compress.export.targets import find_target
from moe_compress.export.verify import verify
from moe_compress.merge import mobe
from moe_compress.merge.combine import joint_subspace
from moe_compress.merge.factorise import FactoriseOptions, MergeFactorise
from moe_compress.merge.low_rank import (
    fisher_mean,
    left_of_rank,
    output_sum,
    own_left,
    root_of,
    shared_right,
    spectrum,
    whitened_factors,
)
from moe_compress.merge.ranks import DENSE, Sizes, give_out, remaining
from moe_compress.merge.spectra import FactorSpectrum, FisherSpectrum
from moe_compress.merge.splits import METHODS, barycentre_order, find_method
from moe_compress.model import ExpertWeights, MoEModel, hf
from moe_compress.model.backward import GradientSweep
from moe_compress.model.losses import NextToken
from moe_compress.model.shape import LayerShape
from moe_compress.pipeline import plan_run
from moe_compress.progress import Progress
from moe_compress.recipe import make_recipe

DATA_FREE_BASE = {"base": "frequency"}
CASES = [
    ("svd", {}),
    ("d2-moe", {}),
    ("d2-moe", DATA_FREE_BASE),
    ("resmoe", {}),
    ("latent", {}),
    ("mc-smoe", {"sparse": 0.1}),
    ("mobe", {"fit_steps": 20, "bases": 2}),
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(experts, size, seed=1):
    """Second moments of different, far from white inputs."""
    rows = randn(experts, 4 * size, size, seed=seed) * torch.logspace(0, -1.5, size, dtype=torch.float64)
    turned = rows @ torch.linalg.qr(randn(experts, size, size, seed=seed + 1))[0]
    return turned.transpose(1, 2) @ turned


def error(difference, moment):
    """tr(ΔW H ΔWᵀ), one matrix at a time."""
    return torch.stack([torch.trace(d @ m @ d.T) for d, m in zip(difference, moment, strict=True)])


# --- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(7, 12), (12, 7)])
def test_whitened_svd_leaves_the_discarded_spectrum_and_no_more(rows, columns):
    """Eckart and Young, in the metric of the inputs: the error is Σ σ², plain SVD and other subspaces err more."""
    weight, moment = randn(3, rows, columns), moments(3, columns)
    root = root_of(moment, damping=1e-12)
    left, right, squares = whitened_factors(weight, root)
    torch.testing.assert_close(spectrum(weight, root), squares)
    plain = torch.linalg.svd(weight, full_matrices=False)
    for rank in range(1, 7):
        own = error(weight - left[:, :, :rank] @ right[:, :rank], moment)
        torch.testing.assert_close(own, squares[:, rank:].sum(1), rtol=1e-6, atol=1e-6 * float(squares.sum()))
        cut = plain.U[:, :, :rank] * plain.S[:, None, :rank] @ plain.Vh[:, :rank]
        assert (error(weight - cut, moment) > own).all()
        for seed in range(5):
            # The best left factor for another right one, by least squares on the root.
            other = right[:, :rank] + 0.1 * randn(3, rank, columns, seed=seed)
            best = torch.linalg.lstsq((other @ root).transpose(1, 2), (weight @ root).transpose(1, 2)).solution
            assert (error(weight - best.transpose(1, 2) @ other, moment) >= own * (1 - 1e-9)).all()
    torch.testing.assert_close(left @ right, weight)


def test_a_root_of_nothing_and_of_little():
    moment = torch.stack([torch.zeros(4, 4), torch.diag(torch.tensor([1.0, 0, 0, 3.0]))])
    root = root_of(moment, damping=0.01)
    torch.testing.assert_close(root[0], torch.eye(4).double())
    torch.testing.assert_close(root[1] @ root[1].T, moment[1].double() + 0.01 * torch.eye(4).double())


def test_latent_projection_is_the_joint_svd_where_all_read_the_like():
    weight, moment = randn(4, 6, 9), moments(1, 9).expand(4, -1, -1)
    root, share = root_of(moment, 1e-12), torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64)
    latent = shared_right(weight, root[0], share)
    taken, lower = own_left(weight, root, latent)
    stacked = torch.cat([s.sqrt() * w @ root[0] for s, w in zip(share, weight, strict=True)])
    sigma = torch.linalg.svdvals(stacked)
    for rank in range(1, 10):
        product = left_of_rank(taken, lower, rank) @ latent[:rank]
        left = (share * error(weight - product, moment)).sum()
        torch.testing.assert_close(left, sigma[rank:].square().sum(), rtol=1e-6, atol=1e-6 * float(sigma[0] ** 2))
    torch.testing.assert_close(product, weight, rtol=1e-6, atol=1e-6)


def test_own_left_factors_are_the_best_for_what_each_expert_reads():
    weight, moment = randn(4, 6, 9), moments(4, 9)
    root, latent = root_of(moment, 1e-12), randn(9, 9, seed=8)
    taken, lower = own_left(weight, root, latent)
    for rank in (1, 4, 9):
        best = torch.linalg.lstsq((latent[:rank] @ root).transpose(1, 2), (weight @ root).transpose(1, 2)).solution
        left = left_of_rank(taken, lower, rank)
        torch.testing.assert_close(left, best.transpose(1, 2), rtol=1e-6, atol=1e-6)
        own = error(weight - left @ latent[:rank], moment)
        whole = error(weight, moment)
        torch.testing.assert_close(own, whole - taken[:, :, :rank].square().sum((1, 2)), rtol=1e-6, atol=1e-6)


def test_shared_output_basis_is_the_best_for_the_weighted_sum_of_errors():
    weight, moment = randn(4, 6, 9), moments(4, 9)
    share = torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64)
    values = torch.linalg.eigvalsh(output_sum(weight, root_of(moment, 1e-12), share)).flip(0)
    basis = joint_subspace(output_sum(weight, root_of(moment, 1e-12), share), 6)
    for rank in range(1, 6):
        own = basis[:, :rank]
        left = (share * error(weight - own @ (own.T @ weight), moment)).sum()
        torch.testing.assert_close(left, values[rank:].sum(), rtol=1e-6, atol=1e-6 * float(values[0]))
        other = torch.linalg.qr(own + 0.1 * randn(6, rank, seed=rank))[0]
        assert (share * error(weight - other @ (other.T @ weight), moment)).sum() >= left * (1 - 1e-9)


def test_fisher_mean_weight_by_weight():
    weight, fisher = randn(3, 2, 4), randn(3, 2, 4, seed=2).square()
    fisher[:, 0, 1] = 0  # no gradient at all: the plain mean
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for i, j in itertools.product(range(2), range(4)):
        expected[i, j] = sum(fisher[e, i, j] * weight[e, i, j] for e in range(3)) / sum(
            fisher[e, i, j] for e in range(3)
        )
    expected[0, 1] = sum(weight[e, 0, 1] for e in range(3)) / 3
    torch.testing.assert_close(fisher_mean(weight, fisher), expected)


def test_barycentre_of_permuted_copies_is_the_expert_itself():
    one = ExpertWeights(up=randn(1, 8, 5), down=randn(1, 5, 8, seed=1), gate=randn(1, 8, 5, seed=2))
    orders = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(e)) for e in range(4)])
    copies = ExpertWeights(up=one.up[0][orders], gate=one.gate[0][orders], down=one.down[0].T[orders].transpose(1, 2))
    found = barycentre_order(copies)
    for e in range(4):
        torch.testing.assert_close(copies.up[e][found[e]], copies.up[0][found[0]])
        torch.testing.assert_close(copies.down[e][:, found[e]], copies.down[0][:, found[0]])


@pytest.mark.parametrize("activation", ["none", "silu", "tanh"])
def test_mobe_finds_planted_bases(activation):
    """Experts that are mixtures of two bases: Adam ends far below where it starts, and below what one basis reaches."""
    mixture = torch.softmax(3 * randn(8, 2, seed=3), 1)
    rows = mobe.mixed(randn(2, 4, 12), mixture, activation)
    weight = randn(8, 10, 4, seed=5) @ rows
    root = torch.eye(12, dtype=torch.float64)

    def left_over(bases, steps):
        base, share = mobe.fit_bases(weight, root, bases, 4, activation, steps)
        torch.testing.assert_close(share.sum(1), torch.ones(8))
        made = mobe.mixed(base, share, activation)
        left = mobe.own_left(weight, root.expand(8, -1, -1), made)
        return float((weight - left @ made.double()).square().sum() / weight.square().sum())

    fitted = left_over(2, 300)
    assert fitted < 0.3 * left_over(2, 0)
    assert fitted < 0.6 * left_over(1, 300)
    assert fitted == left_over(2, 300)


def test_mobe_left_factors_are_the_best_for_what_each_expert_reads():
    weight, root = randn(3, 6, 9), root_of(moments(3, 9))
    rows = randn(3, 4, 9, seed=4)
    best = torch.linalg.lstsq((rows @ root).transpose(1, 2), (weight @ root).transpose(1, 2)).solution.transpose(1, 2)
    torch.testing.assert_close(mobe.own_left(weight, root, rows), best, rtol=1e-4, atol=1e-4)


# --- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "latent"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_ranks_are_those_of_brute_force(method, keep):
    """Two experts of three matrices, every combination of ranks and dense."""
    layer = LayerShape(2, 1, None, hidden=8, intermediate=6, matrices=3, biases=0, weight_bytes=2, bytes=2 * 2 * 3 * 48)
    sizes = Sizes(find_method(method), layer, item=2, step=2, sparse=0.1)
    squares = randn(2, 3, 8, seed=int(10 * keep)).square().sort(dim=2, descending=True).values
    if method == "svd":
        squares[:, :, 6:] = 0
    measured = {"squares": squares, "rest": squares.sum(2), "energy": squares.sum(2) * 1.5, "output": randn(2).square()}
    found = sizes.chosen(give_out({0: sizes.choices(measured)}, int(keep * layer.bytes))[0][0])
    assert sizes.total(found) <= int(keep * layer.bytes)

    def cost(ranks):
        total = 0.0
        for (m, name), e in itertools.product(enumerate(("gate", "up", "down")), range(2)):
            rank = ranks[name][e]
            left = 0.0 if rank == DENSE else float(squares[e, m, rank:].sum())
            total += float(measured["output"][e]) * left / float(measured["energy"][e, m])
        return total

    best = np.inf
    options = [sizes.ranks(name) for name in ("gate", "up", "down")]
    per = 2 if method == "svd" else 1
    for choice in itertools.product(*(o for o in options for _ in range(per))):
        ranks = {n: list(choice[per * i : per * i + per]) * (2 // per) for i, n in enumerate(("gate", "up", "down"))}
        if sizes.total(ranks) <= int(keep * layer.bytes):
            best = min(best, cost(ranks))
    assert cost(found) == pytest.approx(best, rel=1e-4)  # what the program is asked for
    columns, known, note = give_out({0: sizes.choices(measured)}, int(keep * layer.bytes), exact=0)
    relaxed = cost(sizes.chosen(columns[0]))
    assert best <= relaxed * (1 + 1e-9)
    assert relaxed * (1 - known["gap"]) <= best * (1 + 1e-9)
    assert (known["solver"], note) == ("lagrange", "")
    assert float(remaining(measured)[0, 0, -1]) == 0


def test_no_rank_that_takes_as_much_as_dense():
    layer = LayerShape(8, 2, None, hidden=32, intermediate=16, matrices=3, biases=0, weight_bytes=2, bytes=0)
    for method in ("svd", "d2-moe", "latent"):
        sizes = Sizes(find_method(method), layer, item=2, step=4, sparse=0.1)
        for name in sizes.names:
            ranks = sizes.ranks(name)
            assert ranks[0] == 0
            assert ranks[-1] == DENSE
            bytes_ = [sizes.of(name, rank) for rank in ranks]
            assert bytes_ == sorted(set(bytes_))


# --- blocks ----------------------------------------------------------------------------------------------------------


def step(target="native", **options):
    return MergeFactorise(FactoriseOptions(**options), find_target(target))


def read_block(name):
    """A tiny model's first block with what it read, and that as the reference sees it."""
    model = tiny_model(name)
    batches = [input_batch(model, 4, 16, s) for s in range(3)]
    view = MoEModel.wrap(model)
    block, inputs = view.block(view.moe_layers[0]), BlockInputs()
    call = joined(experts_calls(model, batches)[view.moe_layers[0]])
    inputs._parts = [(call.hidden_TH, call.index_TK, call.weight_TK)]
    inputs._counted = [torch.ones(len(call.hidden_TH), dtype=torch.float64)]
    return model, view, batches, block, inputs


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"])
@pytest.mark.parametrize("method", ["svd", "d2-moe", "resmoe", "latent", "mc-smoe"])
def test_full_rank_is_the_model(name, method):
    """Whatever a method holds as it is, at full rank the rest makes the block what it was."""
    _, _, _, block, inputs = read_block(name)
    hidden, index, weight = inputs.hidden_TH[:20], inputs.index_TK[:20], inputs.weight_TK[:20]
    before = block.experts_module(hidden, index, weight)
    made = step(method=method, keep=0.5, **({"base": "mean"} if method == "d2-moe" else {}))
    full = {}
    for key, stacked in block.experts.weights().matrices():
        sides = stacked.shape[1:]
        full[key] = [(sides[0 if key == "down" else 1] if method == "latent" else min(sides))] * len(stacked)
    report = made.apply(block, {"ranks": full, "dtype": "float32"}, inputs)
    after = block.experts_module(hidden, index, weight)
    assert block.kind == "factored"
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    assert all(value < 1e-6 for row in report["experts"] for value in row["error"].values())


@torch.no_grad()
@pytest.mark.parametrize("method", ["svd", "d2-moe", "resmoe", "latent", "mc-smoe", "mobe"])
def test_what_is_reported_as_left_is_what_is_left(method):
    """The error of every matrix on the rows that it read, row by row (aligned experts: of its own permutation)."""
    _, _, _, block, inputs = read_block("qwen3_moe")
    more = {"base": "mean"} if method == "d2-moe" else {}
    made = step(method=method, keep=0.5, shrinkage=0, damping=1e-9, bases=3, fit_steps=5, **more)
    before = block.experts.weights().map(torch.clone)
    ranks = {n: [5] * 8 for n in ("gate", "up")} | {"down": [-1 if method == "mobe" else 5] * 8}
    report = made.apply(block, {"ranks": ranks, "dtype": "float32"}, inputs)
    after = block.experts.weights()
    chosen = (inputs.index_TK == 3) * inputs.weight_TK.double()
    rows = inputs.hidden_TH.double()[chosen.sum(1) > 0] * chosen.sum(1)[chosen.sum(1) > 0].unsqueeze(1)
    wanted = rows @ before.up[3].double().T
    if method == "resmoe":
        wanted = wanted[:, barycentre_order(before)[3]]
    left = (wanted - rows @ after.up[3].double().T).square().sum() / wanted.square().sum()
    assert report["experts"][3]["error"]["up"] == pytest.approx(float(left), rel=0.02)
    assert 0 < float(left) < 1


def test_base_by_fisher_information_is_that_of_plain_autograd():
    model, view, batches, _, _ = read_block("gpt_oss")
    made = step(method="d2-moe", keep=0.5)
    assert made.learns()
    assert made.goes_back()
    statistic, store = FisherSpectrum("d2-moe", "fisher"), MemoryStore()
    with GradientSweep(view, batches, None) as sweep:
        collect(sweep, [statistic], store, Progress(), NextToken(batches))
    layer = view.moe_layers[0]
    experts = view.block(layer).experts_module
    squares = 0.0
    for batch in batches:
        model.zero_grad()
        model.requires_grad_(True)
        with hf.implementation(model, "eager"):
            model(**batch, labels=batch["input_ids"]).loss.backward()
        squares = squares + experts.down_proj.grad.double().square()
    matrix = experts.down_proj.detach().double()
    total = squares.sum(0)
    expected = torch.where(total > 0, (matrix * squares).sum(0) / total.clamp_min(1e-300), matrix.mean(0)).T
    found = store.get(layer, statistic.key)["base_down"].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert not torch.allclose(found, matrix.mean(0).T, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_spectrum_is_the_error_at_the_output_relative_to_the_hidden_state():
    """`output` and spectra, from the model's own calls, by plain loops (without shrinking and nearly no damping)."""
    model, view, batches, block, inputs = read_block("qwen3_moe")
    statistic = FactorSpectrum(shrinkage=0, damping=1e-9)
    layer = view.moe_layers[0]
    found = measure(view, batches, [statistic]).of(layer, statistic)
    behind = []
    handle = block.module.register_forward_hook(
        lambda _m, _a, out: behind.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad(), hf.implementation(model, "eager"):
        for batch in batches:
            model(**batch)
    handle.remove()
    norm = torch.cat([b.flatten(0, 1) for b in behind]).double().square().sum(1)
    weights = []
    moment = torch.zeros(32, 32, dtype=torch.float64)
    every = []
    for token, slot in itertools.product(*map(range, inputs.index_TK.shape)):
        own = float(inputs.weight_TK[token, slot]) ** 2 / float(norm[token])
        every.append(own)
        if inputs.index_TK[token, slot] == 2:
            row = inputs.hidden_TH[token].double()
            moment += own * torch.outer(row, row)
            weights.append(own)
    moment /= sum(weights)
    up = block.experts.weights().up[2].double()
    values = torch.linalg.eigvalsh(up @ moment @ up.T).flip(0)
    torch.testing.assert_close(found["squares"][2, 1], values, rtol=1e-3, atol=1e-5 * float(values[0]))
    assert float(found["energy"][2, 1]) == pytest.approx(float(values.sum()), rel=1e-4)
    scale = sum(weights) + sum(every) / len(every)
    assert float(found["output"][2] / found["energy"][2, 2]) == pytest.approx(scale, rel=1e-5)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("factorise")
    return small_checkpoint(root / "model"), texts(root / "text")


def dense_terms(file, prefix, entry, experts):
    """A projection's matrices from its tensors by docs/format.md, in loops: float32 [E, O, K]."""
    rows, columns = entry["out_features"], entry["in_features"]

    def stack(path, encoding, *shape):
        bits, size = encoding["bits"], encoding.get("group_size")
        name = "dense"
        if bits:
            name = f"b{bits}{'row' if size == -1 else f'g{size}'}{'' if encoding['symmetric'] else 'z'}"
        return file._stack(f"{prefix}{path}.", encoding, name, shape)

    total = np.zeros((experts, rows, columns), np.float32)
    for term in entry["terms"]:
        kind = term["kind"]
        if kind == "base":
            matrices = stack("base.matrix", term["matrix"], max(term["group"]) + 1, rows, columns)
            for e, group in enumerate(term["group"]):
                if group >= 0:
                    total[e] += matrices[group]
        elif kind == "low_rank":
            assert {int(r) for r in term["factors"]} == {*term["ranks"]} - {0}
            for key, (one, other) in term["factors"].items():
                rank, shared = int(key), term["shared"]
                members = [e for e in range(experts) if term["ranks"][e] == rank]
                left = stack(f"low_rank.r{rank}.left", one, 1 if shared == "left" else len(members), rows, rank)
                right = stack(f"low_rank.r{rank}.right", other, 1 if shared == "right" else len(members), rank, columns)
                for slot, e in enumerate(members):
                    total[e] += left[0 if shared == "left" else slot] @ right[0 if shared == "right" else slot]
        elif kind == "basis":
            one, other = term["factors"]
            left = stack("basis.left", one, experts, rows, term["rank"])
            bases = stack("basis.bases", other, term["bases"], term["rank"], columns)
            stored = file._take(f"{prefix}basis.mixture")
            assert stored[:2] == (STORED[term["mixture"]], [experts, term["bases"]])
            mixture = as_float(*stored)
            assert term["activation"] == "silu"
            for e in range(experts):
                mixed = sum(mixture[e, b] * bases[b] for b in range(term["bases"]))
                total[e] += left[e] @ (mixed / (1 + np.exp(-mixed)))
        else:
            count, by_row = term["count"], term["axis"] == "rows"
            shape = (count, columns) if by_row else (rows, count)
            kept = stack("sparse.kept", term["kept"], experts, *shape)
            dtype, stored, raw = file._take(f"{prefix}sparse.index")
            assert dtype == "I32"
            index = np.frombuffer(raw, "<i4").reshape(stored)
            assert (np.diff(index) > 0).all()
            for e, place in itertools.product(range(experts), range(count)):
                if by_row:
                    total[e, index[e, place]] += kept[e, place]
                else:
                    total[e, :, index[e, place]] += kept[e, :, place]
    return total


def check_by_the_document(folder, model, ids, kept):
    """What the file says, put into the source's dense experts, computes what the loaded model computes."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = loaded(ids).logits
        assert torch.equal(moe_compress.load(folder, dtype=torch.float32)(ids).logits, logits)
    file = Native(folder)
    assert file.quantization["format_version"] == 3
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    view = MoEModel.wrap(dense)
    modules = dict(loaded.named_modules())
    assert len(file.quantization["blocks"]) == len(view.moe_layers)
    for layer, block in file.quantization["blocks"].items():
        assert block["kind"] == "factored"
        prefix = file.prefix(layer)
        held = modules[prefix.removesuffix(".")].weights()
        weights = view.block(int(layer)).experts.weights()
        for name, entry in block["layout"]["projections"].items():
            matrices = dense_terms(file, f"{prefix}{name}_proj.", entry, block["num_experts"])
            used = torch.from_numpy(matrices)
            torch.testing.assert_close(getattr(held, name), used, rtol=1e-5, atol=1e-5)
            getattr(weights, name).copy_(used)
        assert {n for n in file.tensors if n.startswith(prefix)} <= file.used
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, logits, rtol=1e-3, atol=1e-3)
    in_memory = sum(t.numel() * t.element_size() for n, t in loaded.state_dict().items() if ".experts." in n)
    assert in_memory == kept


@pytest.mark.parametrize(("method", "options"), CASES)
def test_from_recipe_to_file_and_back(source, tmp_path, method, options):
    """Bytes planned = reported = written; loaders agree; so does the file, read by the document alone."""
    model, text = source
    keep = 0.7
    wanted = {"method": method, "keep": keep, "step": 4, **options}
    wanted = recipe(model, tmp_path / "out", [{"merge.factorise": wanted}], text)
    forecast = plan_run(make_recipe(wanted))[1].after
    report = moe_compress.run(make_recipe(wanted)).report
    before = report["before"]["expert_bytes"]
    with Checkpoint(tmp_path / "out") as written:
        experts = sum(info.nbytes for n, info in written.tensors.items() if ".experts." in n)
        assert written.nbytes == report["after"]["bytes"]
    assert experts == report["after"]["expert_bytes"] == report["passes"][0]["summary"]["expert_bytes"]
    assert 0.6 * before < experts <= forecast.expert_bytes <= keep * before + 3
    assert verify(tmp_path / "out").distance < 1e-5
    check_by_the_document(tmp_path / "out", model, torch.arange(3, 40)[None], experts)


def test_same_recipe_same_bytes(source, tmp_path):
    digests = []
    for run in ("one", "two"):
        steps = [{"merge.factorise": {"keep": 0.6, "method": "mobe", "bases": 2, "fit_steps": 5}}]
        moe_compress.run(recipe(source[0], tmp_path / run, steps, source[1]))
        digests.append(json.loads((tmp_path / run / "moe_compress.json").read_text())["tensors"])
    assert digests[0] == digests[1]


def test_all_bytes_give_the_model_back(source, tmp_path):
    steps = [{"merge.factorise": {"keep": 1.0}}]
    report = moe_compress.run(recipe(source[0], tmp_path / "out", steps, source[1])).report
    assert report["after"]["bytes"] == report["before"]["bytes"]
    assert report["after"]["kl"]["held-out"] < 1e-9


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd", {"bits": 4, "group_size": 8}),
        ("d2-moe", {"bits": 8, "symmetric": False}),
        ("mobe", {"method": "hqq"}),
        ("mc-smoe", {"bits": 3, "group_size": -1}),
    ],
)
def test_factors_quantized(source, tmp_path, method, options):
    """Read by the document alone, bytes as reported; the narrower, the fewer bytes, and 8 bits lose next to nothing."""
    model, text = source
    made = {"keep": 0.7, "method": method, "step": 8, "bases": 2, "fit_steps": 10}
    if method == "d2-moe":
        made["base"] = "mean"
    steps = [{"merge.factorise": made}, {"quantize.factors": options}]
    report = moe_compress.run(recipe(model, tmp_path / "out", steps, text)).report
    with Checkpoint(tmp_path / "out") as written:
        experts = sum(info.nbytes for n, info in written.tensors.items() if ".experts." in n)
    assert experts == report["after"]["expert_bytes"]
    bits = options.get("bits", 8)
    assert experts < (bits / 16 + 0.2) * report["passes"][0]["expert_bytes"]
    assert verify(tmp_path / "out").distance < 1e-5
    check_by_the_document(tmp_path / "out", model, torch.arange(3, 40)[None], experts)
    errors = [f["error"] for layer in report["layers"] for f in layer["passes"][1]["factors"].values()]
    assert max(errors) < {8: 1e-3, 4: 0.02, 3: 0.08}[bits]
    assert min(errors) > 0


def test_routers_heal_after_it(source, tmp_path):
    """The factored module hands on gradients and is one of the kinds that heal.router accepts."""
    steps = [{"merge.factorise": {"keep": 0.5, "step": 8}}, {"heal.router": {"epochs": 1}}]
    report = moe_compress.run(recipe(source[0], tmp_path / "out", steps, source[1])).report
    summary = report["passes"][1]["summary"]
    assert summary["held_out_kl_after"] != summary["held_out_kl_before"]
    assert report["after"]["expert_bytes"] == report["passes"][0]["expert_bytes"]


def test_saved_again(source, tmp_path):
    steps = [{"merge.factorise": {"keep": 0.6, "step": 4}}]
    moe_compress.run(recipe(source[0], tmp_path / "out", steps, source[1]))
    loaded = moe_compress.load(tmp_path / "out", dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, loaded(ids).logits)
    described = [
        json.loads((tmp_path / f / "config.json").read_text())["quantization_config"] for f in ("out", "again")
    ]
    assert described[0]["blocks"] == described[1]["blocks"]


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"keep": 0.5}, {"target": "vllm"}, "the target 'vllm' loads no factored experts: take target: native"),
        ({"keep": 0.5}, {"target": "transformers"}, "loads no factored experts"),
        ({"keep": 0.5, "size": "1 MB"}, {}, "give either `keep`"),
        ({}, {}, "give either `keep`"),
        ({"keep": 0.5, "method": "d2moe"}, {}, "no method of factorising is called 'd2moe'; did you mean 'd2-moe'?"),
        ({"keep": 0.5, "base": "fisher"}, {}, "method svd has no `base`"),
        ({"keep": 0.05, "method": "resmoe"}, {}, "whatever the ranks takes"),
        ({"keep": 0.3, "method": "mobe"}, {}, "mobe leaves down projections dense and takes"),
        ({"keep": 0.9, "method": "mobe", "bases": 9}, {}, "9 bases are more than the 8 experts"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(source, tmp_path, options, more, message):
    with pytest.raises((RecipeError, BudgetError)) as caught:
        plan_run(make_recipe(recipe(source[0], tmp_path / "out", [{"merge.factorise": options}], source[1], **more)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_nothing_but_factors_is_quantized_as_factors(source, tmp_path):
    with pytest.raises(RecipeError, match=r"quantize\.factors can't change this model: .* are fused already"):
        plan_run(make_recipe(recipe(source[0], tmp_path / "out", [{"quantize.factors": {}}])))


@pytest.mark.parametrize("after", [{"quantize.mixed": {"bits": 4}}, {"prune.experts": {"experts": 6}}])
def test_what_follows_is_refused(source, tmp_path, after):
    steps = [{"merge.factorise": {"keep": 0.6}}, after]
    with pytest.raises(
        RecipeError, match=r"can't follow merge\.factorise: the experts of layer 0 are factored already"
    ):
        plan_run(make_recipe(recipe(source[0], tmp_path / "out", steps, source[1])))


def test_every_method_has_a_source():
    assert {m for m, _ in CASES} == METHODS.keys()
    assert MergeFactorise.choices()["method"].keys() == METHODS.keys()


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "muse_spark"])
@pytest.mark.parametrize("method", ["svd", "resmoe"])
def test_in_memory_and_from_disk(name, method, tmp_path):
    """Biases, no gate, a norm behind the experts: equal logits in memory and loaded, and the bytes planned."""
    model = tiny_model(name)
    ids = input_batch(model, 8, 16)["input_ids"]
    steps = [{"merge.factorise": {"keep": 0.75, "method": method, "step": 2}}]
    result = moe_compress.compress(model, passes=steps, calibration=ids)
    planned = result.report["passes"][0]["summary"]
    assert planned["expert_bytes"] <= planned["budget_bytes"]
    batch = input_batch(model)
    with torch.no_grad():
        output = model(**batch).logits
        assert not torch.allclose(output, tiny_model(name)(**batch).logits, rtol=1e-3, atol=1e-3)
        result.save(tmp_path / "saved")
        loaded = moe_compress.load(tmp_path / "saved", dtype=torch.float32)
        torch.testing.assert_close(loaded(**batch).logits, output, rtol=1e-4, atol=1e-4)
    held = sum(t.nbytes for n, t in loaded.state_dict().items() if ".experts." in n and "post_expert_norm" not in n)
    assert held == planned["expert_bytes"]

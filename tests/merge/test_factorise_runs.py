"""Factorising from recipe to file and back: bytes planned and written, the file by its document, what is refused."""

import itertools
import json

import numpy as np
import pytest
import torch
from checkpoints import recipe, small_checkpoint, texts
from families import input_batch, tiny_model
from native_reader import STORED, Native, as_float
from transformers import AutoModelForCausalLM

import moe_compress
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import BudgetError, RecipeError
from moe_compress.export.verify import verify
from moe_compress.merge.factorise import MergeFactorise
from moe_compress.merge.splits import METHODS
from moe_compress.model import MoEModel
from moe_compress.pipeline import plan_run
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
    steps = [{"merge.factorise": {"keep": 0.5, "step": 8}}, {"heal.router": {"epochs": 4}}]
    report = moe_compress.run(recipe(source[0], tmp_path / "out", steps, source[1])).report
    summary = report["passes"][1]["summary"]
    assert summary["held_out_kl_after"] < summary["held_out_kl_before"]
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


def test_fisher_takes_no_original():
    """Its base is of the model's own gradients: a model in memory needs nothing beside it."""
    ids = input_batch(tiny_model("qwen3_moe"), 8, 16)["input_ids"]
    results = []
    for given in ({}, {"original": tiny_model("qwen3_moe")}):
        steps = [{"merge.factorise": {"keep": 0.75, "method": "d2-moe", "step": 2}}]
        results.append(moe_compress.compress(tiny_model("qwen3_moe"), passes=steps, calibration=ids, **given))
    states = [r.model.state_dict() for r in results]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert results[0].report["passes"][0]["options"]["base"] is None  # the default, Fisher information

"""Whole runs that pack everything: what is written, what loads it, what it is made of, and who refuses it."""

import json
import re
import shutil

import pytest
import torch
from checkpoints import recipe, small_checkpoint
from families import tiny_model
from native_reader import Native
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

import moe_compress
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import BudgetError, CheckpointError, RecipeError
from moe_compress.export.verify import verify
from moe_compress.model import MoEModel, hf
from moe_compress.model.shape import model_shape
from moe_compress.pipeline import plan_run, run
from moe_compress.recipe import make_recipe
from moe_compress.report.build import sizes

EVERYTHING = ["experts", "attention", "shared_experts", "dense_mlp", "embeddings", "head"]
# Name → group size, bits. Small groups' scales take much.
GROUPS = {"small": (16, 5), "deepseek_v3": (4, 9), "gpt_oss": (8, 7)}
PLAIN = {"protect_super_experts": False}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, demo_model):
    """Name → checkpoint: tied with a dense layer; shared experts, low ranks, a dense layer; biases."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp("source") / name
            if name == "small":
                small_checkpoint(folder, mlp_only_layers=[0])
            else:
                tokenizer = AutoTokenizer.from_pretrained(demo_model)
                tiny_model(name, vocab_size=len(tokenizer)).bfloat16().save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        return made[name]

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sources, text):
    """Name, options → (source, finished run)."""
    made = {}

    def make(name, target="native", **options):
        key = json.dumps([name, target, options])
        if key not in made:
            group, bits = GROUPS[name]
            settings = {"bits": bits, "group_size": group, "include": EVERYTHING, **PLAIN, **options}
            output = tmp_path_factory.mktemp("run") / "out"
            values = recipe(sources(name), output, [{"quantize.mixed": settings}], text, target=target, evaluate={})
            made[key] = sources(name), run(values)
        return made[key]

    return make


def from_pretrained(folder, **options):
    cls = hf.model_class(AutoConfig.from_pretrained(folder))
    return cls.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model):
    return model(torch.randint(3, 4000, (2, 20), generator=torch.Generator().manual_seed(0))).logits


def matrices_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["matrices"]


@pytest.mark.parametrize("name", GROUPS)
def test_loaded_by_transformers_it_computes_what_the_file_says(name, runs):
    """Every packed weight, decoded by tests/native_reader.py alone, in the source's dense model: the same logits."""
    source, finished = runs(name)
    dense = from_pretrained(source)
    file = Native(finished.output)
    matrices = matrices_of(finished.output)
    view = MoEModel.wrap(dense)
    with torch.no_grad():
        for path in matrices:
            weight = dense.get_submodule(path).weight
            file.columns[path] = weight.shape[1]
            value = torch.from_numpy(file.matrix(path))
            assert 0 < (value - weight).norm() < 0.3 * weight.norm()
            weight.copy_(value)
        for layer in file.packed_layers():
            stacked = view.block(int(layer)).experts.weights()
            for part, array in file.weights(layer).items():
                getattr(stacked, part).copy_(torch.from_numpy(array))
    loaded = from_pretrained(finished.output)
    assert torch.allclose(logits(loaded), logits(dense), rtol=1e-4, atol=1e-4)
    # Nothing that is packed is there a second time, and nothing else is packed.
    packed = {n for n in file.tensors if n in file.used}
    assert not any(f"{path}.weight" in file.tensors for path in matrices)
    assert {n for n, t in file.tensors.items() if t[0] == "I32"} <= packed
    assert "lm_head.weight" not in file.tensors
    if name == "small":
        assert matrices["model.embed_tokens"]["head"] == "lm_head"
        assert loaded.lm_head.embeddings is loaded.model.embed_tokens


@pytest.mark.parametrize("name", GROUPS)
def test_what_is_on_disk_is_what_was_planned_and_reported(name, runs):
    source, finished = runs(name)
    report = finished.report
    summary = report["passes"][0]["summary"]
    beside = report["beside"]
    with Checkpoint(finished.output) as output, Checkpoint(source) as before:
        assert report["after"]["bytes"] == output.nbytes
        packed = {n: t.nbytes for n, t in output.tensors.items() if n.startswith(tuple(matrices_of(finished.output)))}
        packed = {n: size for n, size in packed.items() if not n.endswith(".bias")}
        assert summary["beside_bytes"] == sum(packed.values()) == sum(m["bytes"] for m in beside)
        assert summary["expert_bytes"] == report["after"]["expert_bytes"]
        assert summary["expert_bytes"] + summary["beside_bytes"] <= summary["budget_bytes"]
        rest = before.nbytes - report["before"]["expert_bytes"] - sum(m["bytes_before"] for m in beside)
        assert output.nbytes == summary["expert_bytes"] + summary["beside_bytes"] + rest
    weights = 8 * summary["budget_bytes"] / GROUPS[name][1]
    model = MoEModel.open(source)
    experts = sum(model.block(i).experts.weights().parameters for i in model.moe_layers)
    dense = sum(m.weights for own in model.matrices.values() for m in own)
    if name != "gpt_oss":  # whose experts have biases, which are no weights
        assert abs(weights - experts - dense) < 2
    kinds = {m["kind"] for m in beside}
    assert kinds == {"small": {"attention", "dense_mlp", "embeddings"}}.get(
        name, {m.kind for own in model.matrices.values() for m in own}
    )
    for matrix in beside:
        assert matrix["bits"] in (4, 6, 8)
        assert set(matrix["costs"]) == {"4", "6", "8"}
        if name == "small":  # elsewhere, of 128 tokens a few change their experts
            assert matrix["costs"]["4"] > matrix["costs"]["6"] > matrix["costs"]["8"] > 0
        assert matrix["solver"] == ("rtn" if matrix["layer"] is None else "gptq")
        assert 0 < matrix["weight_error" if matrix["layer"] is None else "output_error"] < 0.05
    assert "Beside the experts" in (finished.output / "report.md").read_text()


def test_the_forecast_is_the_budget(sources, text, tmp_path):
    values = recipe(sources("small"), tmp_path / "out", [], text)
    settings = {"bits": 5, "group_size": 16, "include": EVERYTHING}
    forecast = plan_run(make_recipe({**values, "passes": [{"quantize.mixed": settings}]}))[1]
    model = MoEModel.open(sources("small"))
    beside = sum(m.bytes for own in model.matrices.values() for m in own)
    experts = forecast.before.expert_bytes
    budget = 5 / 16 * (experts + beside)  # the source has 16 bits
    rest = forecast.before.total_bytes - experts - beside
    assert abs(forecast.after.total_bytes - rest - budget) < 0.001 * budget
    whole = plan_run(
        make_recipe({**values, "passes": [{"quantize.mixed": {**settings, "bits": None, "size": "200 KB"}}]})
    )
    assert 195_000 < whole[1].after.total_bytes <= 200_000
    with pytest.raises(BudgetError, match="experts and attention and shared_experts"):
        plan_run(make_recipe({**values, "passes": [{"quantize.mixed": {**settings, "bits": 3}}]}))


def test_without_data_everything_is_rounded(runs):
    _, finished = runs("small", method="rtn", allocation="uniform", dense_widths=[4], widths=[4])
    assert {m["bits"] for m in finished.report["beside"]} == {4}
    assert {m["solver"] for m in finished.report["beside"]} == {"rtn"}
    assert finished.report["tokens_seen"] == 0


def test_gptq_loses_less_at_the_outputs_than_rounding(runs):
    """On the text that it was calibrated with, summed over layers that read the same in both runs: the first."""
    source, finished = runs("small", allocation="uniform", dense_widths=[4], widths=[4])
    _, rounded = runs("small", method="rtn", allocation="uniform", dense_widths=[4], widths=[4])
    model = from_pretrained(source)
    ids = load_ids(finished)
    exact, gptq, rtn = (
        first_attention(m, ids) for m in (model, *map(from_pretrained, (finished.output, rounded.output)))
    )
    assert (gptq - exact).norm() < 0.95 * (rtn - exact).norm()


def load_ids(finished):
    return torch.tensor(json.loads((finished.output / "moe_compress.json").read_text())["probe"]["input_ids"])[None]


@torch.no_grad()
def first_attention(model, ids):
    """Queries, keys and values of the first layer, embedded exactly as in the model."""
    seen = []
    layer = model.model.layers[0]
    handles = [getattr(layer.self_attn, f"{p}_proj").register_forward_hook(lambda *a: seen.append(a[2])) for p in "qkv"]
    model(ids)
    for handle in handles:
        handle.remove()
    return torch.cat(seen, dim=-1)


def test_in_memory_it_is_the_same(sources, text, runs, tmp_path):
    source, finished = runs("small")
    tokenizer = AutoTokenizer.from_pretrained(source)
    settings = {"bits": 5, "group_size": 16, "include": EVERYTHING, **PLAIN}
    calibration = {"sources": str(text / "calibration.jsonl"), "sequences": 4, "length": 32, "batch_size": 2}
    result = moe_compress.compress(
        from_pretrained(source),
        tokenizer=tokenizer,
        passes=[{"quantize.mixed": settings}],
        calibration=calibration,
        evaluate={"text": [str(text / "held-out.txt")], "length": 32, "max_tokens": 128},
    )
    expected = logits(from_pretrained(finished.output))
    assert torch.allclose(logits(result.model), expected, rtol=1e-4, atol=1e-4)
    # The original is scored with its own head, which was packed meanwhile.
    loss = from_pretrained(source)
    twice = moe_compress.compress(
        loss,
        tokenizer=tokenizer,
        passes=[{"quantize.mixed": {**settings, "include": ["experts"]}}],
        calibration=calibration,
        evaluate={"text": [str(text / "held-out.txt")], "length": 32, "max_tokens": 128},
    )
    assert result.report["before"]["perplexity"] == pytest.approx(twice.report["before"]["perplexity"], rel=1e-6)
    result.save(tmp_path / "saved")
    verify(tmp_path / "saved")
    assert torch.allclose(logits(from_pretrained(tmp_path / "saved")), expected, rtol=1e-4, atol=1e-4)
    result.model.save_pretrained(tmp_path / "by itself")
    assert torch.allclose(logits(from_pretrained(tmp_path / "by itself")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["auto", "disk", "one device"])
def test_loaded_in_parts(way, runs, tmp_path):
    _, finished = runs("small")
    expected = logits(from_pretrained(finished.output))
    options = {
        "auto": {"device_map": "auto"},
        "one device": {"device_map": {"": "cpu"}},
        "disk": {
            "device_map": "auto",
            "max_memory": {"cpu": "60KB"},
            "offload_folder": str(tmp_path / "offloaded"),
        },
    }[way]
    model = from_pretrained(finished.output, **options)
    if way == "disk":
        assert "disk" in model.hf_device_map.values()
    assert torch.allclose(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_its_head_loads_too(runs):
    _, finished = runs("small")
    whole = from_pretrained(finished.output)
    base = AutoModel.from_pretrained(finished.output, dtype=torch.float32).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)


@pytest.mark.parametrize("damage", ["missing", "unknown", "newer", "path"])
def test_damaged_folders_are_refused(damage, runs, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(runs("small")[1].output, folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "q_proj" in n and n.endswith(".codes"))
    if damage == "missing":
        del tensors[name]
    elif damage == "unknown":
        tensors[name.replace(".codes", ".codebook")] = torch.zeros(2)
    elif damage == "newer":
        config["quantization_config"]["format_version"] = 4
    else:
        config["quantization_config"]["matrices"]["model.layers.0.self_attn.p_proj"] = {"bits": 4}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for load in (MoEModel.open, from_pretrained) if damage != "unknown" else (from_pretrained,):
        with pytest.raises(CheckpointError):
            load(folder)


# --- servers ------------------------------------------------------------------------------------------------------

SERVED = {"include": ["experts", "attention", "shared_experts", "dense_mlp"], "group_size": 32}


@pytest.mark.parametrize(("target", "options"), [("vllm", {"widths": [3, 4]}), ("sglang", {"dense_widths": [4, 8]})])
def test_servers_read_every_linear_layer_by_its_scheme(target, options, runs):
    """By the rules of their configs, read here anew; decoded by the library itself; joined ones share a scheme."""
    library = pytest.importorskip("compressed_tensors")
    options = {"widths": [4], **SERVED, **options, "bits": 6}
    source, finished = runs("small", target=target, **options)
    config = json.loads((finished.output / "config.json").read_text())["quantization_config"]
    groups = library.QuantizationConfig.model_validate(config).config_groups.values()
    tensors = {n: t for f in sorted(finished.output.glob("*.safetensors")) for n, t in load_file(f).items()}
    with Checkpoint(source) as before:
        dense = {n: before.get(n) for n in before.tensors}
    modules = [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed") and "experts" not in n]
    report = {f"model.layers.{m['layer']}.{m['matrix']}": m for m in finished.report["beside"]}
    assert set(modules) == set(report)
    assert len(modules) == 3 * 4 + 3
    decode = library.BaseCompressor.get_value_from_registry(config["format"]).decompress
    model = moe_compress.load(finished.output, dtype=torch.bfloat16)
    for module in modules:
        assert not any(matches(entry, module) for entry in config["ignore"])
        (group,) = [g for g in groups if any(matches(t, module) for t in g.targets)]
        assert group.weights.num_bits == report[module]["bits"]
        parts = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
        weight = decode(parts, group)["weight"]
        assert torch.equal(weight, model.get_submodule(module).weight)
        assert (weight.float() - dense[f"{module}.weight"].float()).norm() < 0.3 * dense[
            f"{module}.weight"
        ].float().norm()
    for name in tensors:
        if name.endswith(".weight") and tensors[name].dim() > 1:
            assert any(matches(entry, name.removesuffix(".weight")) for entry in config["ignore"])
    bits = {n.removeprefix("model.layers."): m["bits"] for n, m in report.items()}
    for layer in range(3):
        assert len({bits[f"{layer}.self_attn.{p}_proj"] for p in "qkv"}) == 1
    assert bits["0.mlp.gate_proj"] == bits["0.mlp.up_proj"]
    read = sizes(model_shape(MoEModel.open(finished.output)))  # what inspect and evaluate say
    assert read == {key: finished.report["after"][key] for key in read}
    # 16 bytes of shape beside every matrix count.
    assert sum(m["bytes"] for m in report.values()) == sum(
        t.numel() * t.element_size() for n, t in tensors.items() if n.rpartition(".")[0] in modules
    )


@pytest.mark.parametrize("dense", [4, 8])
def test_transformers_own_loader_arrives_at_the_same_linear_layers(dense, runs):
    pytest.importorskip("compressed_tensors")
    _, finished = runs("small", target="vllm", **{**SERVED, "widths": [4], "dense_widths": [dense], "bits": 9})
    assert "the same experts and linear layers, bit for bit" in finished.report["verification"]["loader"]


def matches(entry, module):
    return bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("vllm", {"include": ["experts", "embeddings"]}, "'vllm' loads no packed embeddings"),
        ("vllm", {"include": ["experts", "head", "embeddings"]}, "no packed embeddings and no head"),
        ("sglang", {"include": ["experts", "attention"]}, "loads 4, 8 bits, not 6: set `dense_widths`"),
        ("native", {"include": ["attention"]}, "keep `experts` in it"),
        ("native", {"include": ["experts", "attention"], "cost": "pmq"}, "`cost: pmq` is of experts alone"),
        ("native", {"include": ["experts", "attention"], "scope": "layer"}, "`scope: layer` is of experts alone"),
        ("native", {"include": ["experts", "shared_experts"]}, "nothing in this model is shared_experts"),
        ("native", {"include": ["experts", "routers"]}, "include"),
    ],
)
def test_what_can_not_be_is_refused_before_any_work(target, options, message, sources, text, tmp_path):
    widths = [4] if target == "sglang" else [2, 4]
    settings = {"bits": 6, "group_size": 32, "widths": widths, **options}
    values = recipe(sources("small"), tmp_path / "out", [{"quantize.mixed": settings}], text, target=target)
    with pytest.raises(RecipeError, match=message):
        run(values)
    assert not (tmp_path / "out.work").exists()


def test_what_stays_is_said(runs):
    _, finished = runs("deepseek_v3", group_size=8)
    notes = finished.report["passes"][0]["notes"]
    uneven = next(n for n in notes if "aren't whole groups of 8" in n)
    assert "self_attn.q_b_proj" in uneven  # its rank is 12

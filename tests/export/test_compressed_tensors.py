"""The compressed-tensors format: its own library decodes it, and servers' rules hold.

A server is played by `server_scheme`, which matches names as vLLM and SGLang do: `ignore` first, then the first target.
"""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from checkpoints import EXPERTS, LAYERS, recipe, small_checkpoint
from families import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_compress
from moe_compress.errors import CheckpointError, RunError, UnsupportedModelError
from moe_compress.export.verify import verify
from moe_compress.export.write import write_folder
from moe_compress.model import FusedExperts, MoEModel, hf
from moe_compress.pipeline import plan_run
from moe_compress.probe import streamed
from moe_compress.progress import Progress
from moe_compress.quant.grid import Grid, Quantized
from moe_compress.quant.packed import pack_experts
from moe_compress.quant.stack import Stack
from moe_compress.recipe import make_recipe

CT = "compressed-tensors"
LIBRARY = importlib.util.find_spec("compressed_tensors") is not None
GROUP = 32


def random_codes(shape, bits, group, generator):
    """A quantized matrix that uses every code, scales of both signs, and one group of zeros."""
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.int32).to(torch.uint8)
    codes[..., 0, 0], codes[..., 0, 1] = 0, (1 << bits) - 1
    scale = torch.randn(*shape[:-1], shape[-1] // group, generator=generator).mul_(0.05).bfloat16()
    scale[..., 0, 0] = 0
    return Quantized(codes, scale, None, Grid(bits, group))


class Packed:
    """An overlay with random packed experts; `bits` of each layer in turn, and what they are."""

    def __init__(self, model, bits, group=GROUP):
        self.blocks, self.values = {}, {}
        generator = torch.Generator().manual_seed(1)
        for number, index in enumerate(model.moe_layers):
            with model.layer(index, stored=True) as layer:
                weights = FusedExperts(layer.block.experts_module).weights()
                everyone = list(range(layer.block.num_experts))
                width = bits[number % len(bits)]
                made = {n: random_codes(tuple(t.shape), width, group, generator) for n, t in weights.matrices()}
                pack_experts(layer.block, {n: [(everyone, Stack.holding(q))] for n, q in made.items()})
                tensors, description = layer.block.state()
                self.blocks[index] = {n: t.clone() for n, t in tensors.items()}, description
                projections = layer.block.experts_module.projections
                self.values[index] = {n: p.matrices(everyone, torch.bfloat16) for n, p in projections.items()}

    def get(self, layer):
        return self.blocks.get(layer)


@pytest.fixture(scope="module")
def written(tmp_path_factory, small):
    """Widths of the layers → (folder, in-memory weights in bfloat16 by layer and projection)."""
    made = {}

    def make(*bits):
        if bits not in made:
            model = MoEModel.open(small)
            overlay = Packed(MoEModel.open(small), bits)
            model.overlay = overlay
            folder = tmp_path_factory.mktemp("written") / "-".join(map(str, bits))
            manifest = {"probe": streamed(model, list(range(3, 19)))}
            assert write_folder(model, folder, manifest, Progress(), quantized=CT) == CT
            made[bits] = folder, overlay.values
        return made[bits]

    return make


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def tensors_of(folder):
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def server_scheme(config, module):
    def hit(entry):
        return re.match(entry[3:], module) if entry.startswith("re:") else entry == module

    if any(hit(entry) for entry in config["ignore"]):
        return None
    return next((g["weights"] for g in config["config_groups"].values() if any(map(hit, g["targets"]))), None)


def dry(model, tmp_path, target="vllm", **options):
    values = {"bits": 9.0, "widths": [4], "group_size": 32, "method": "rtn", "allocation": "uniform"}
    step = {"quantize.mixed": {**values, "protect_super_experts": False, **options}}
    return plan_run(make_recipe(recipe(model, tmp_path / "out", [step], target=target)))[1]


# --- what is in the file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_the_library_itself_decodes_the_weights_that_run(written, bits):
    library = pytest.importorskip("compressed_tensors")
    folder, values = written(bits)
    tensors = tensors_of(folder)
    config = library.QuantizationConfig.model_validate(config_of(folder))
    (scheme,) = config.config_groups.values()
    decode = library.BaseCompressor.get_value_from_registry(config.format).decompress
    assert len(values) == LAYERS
    for layer, projections in values.items():
        assert list(projections) == ["gate", "up", "down"]
        for projection, expected_EOK in projections.items():
            for expert in range(EXPERTS):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj."
                parts = {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}
                weight = decode(parts, scheme)["weight"]
                assert weight.dtype == torch.bfloat16
                assert torch.equal(weight, expected_EOK[expert])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tensors_have_the_names_dtypes_and_shapes_that_servers_allocate(written, bits):
    folder, _ = written(bits)
    tensors = tensors_of(folder)
    sizes = {"gate_proj": (32, 32), "up_proj": (32, 32), "down_proj": (32, 32)}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for leaf, (rows, columns) in sizes.items():
                module = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                parts = {n.removeprefix(module + "."): t for n, t in tensors.items() if n.startswith(module + ".")}
                assert parts.keys() == {"weight_packed", "weight_scale", "weight_shape"}  # no g_idx, no zero points
                assert parts["weight_packed"].dtype == torch.int32
                assert parts["weight_packed"].shape == (rows, columns * bits // 32)
                assert parts["weight_scale"].dtype == torch.bfloat16
                assert parts["weight_scale"].shape == (rows, columns // GROUP)
                assert parts["weight_shape"].dtype == torch.int64
                assert parts["weight_shape"].tolist() == [rows, columns]


def test_everything_else_is_the_source_byte_for_byte(written, small):
    folder, _ = written(4)
    result, source = tensors_of(folder), tensors_of(small)
    dense = {n for n in source if ".experts." not in n}
    assert {n for n in result if ".experts." not in n} == dense
    assert all(torch.equal(result[n], source[n]) and result[n].dtype == source[n].dtype for n in dense)
    assert any(n.endswith("mlp.gate.weight") for n in dense)  # routers among them
    before, after = (json.loads((f / "config.json").read_text()) for f in (small, folder))
    assert after.pop("quantization_config")
    assert after == before


# --- what the config says -----------------------------------------------------------------------------------------


def test_config_has_the_keys_of_the_format(written):
    config = config_of(written(2, 4, 8)[0])
    assert config["quant_method"] == CT
    assert config["format"] == "pack-quantized"  # the global one too: SGLang looks at it
    assert config["quantization_status"] == "compressed"
    assert tuple(map(int, config["version"].split("."))) >= (0, 18, 0)  # packed without gaps
    assert "sparsity_config" not in config
    for group in config["config_groups"].values():
        assert group["format"] == "pack-quantized"
        assert group["input_activations"] is None
        weights = group["weights"]
        assert (weights["type"], weights["strategy"], weights["symmetric"]) == ("int", "group", True)
        assert weights["actorder"] is None
        assert weights["dynamic"] is False
        assert weights["group_size"] == GROUP
        assert all(target.startswith("re:") and "experts" in target for target in group["targets"])


@pytest.mark.parametrize("prefix", ["", "language_model.", "draft."])
@pytest.mark.parametrize("widths", [(4,), (2, 4, 8), (3, 3, 4)])
def test_servers_find_each_layers_scheme_and_leave_the_rest_alone(written, widths, prefix):
    folder, _ = written(*widths)
    config, tensors = config_of(folder), tensors_of(folder)
    assert len(config["config_groups"]) == len(set(widths))
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            layer = int(module.split(".")[2])
            assert server_scheme(config, prefix + module)["num_bits"] == widths[layer % len(widths)]
        elif part == "weight" and tensors[name].dim() == 2:
            assert server_scheme(config, prefix + module) is None
            assert prefix or module in config["ignore"]
    # Modules that servers have and files don't, and a head whose weights are the embedding's.
    assert server_scheme(config, f"{prefix}model.layers.1.mlp.experts.routed_experts.0.gate_proj")
    assert "lm_head" in config["ignore"]


def test_a_draft_models_experts_are_carried_over_and_stay_dense(small, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(small, source)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    names = ["mtp.layers.0.mlp.experts.3.gate_proj", "model.layers.3.mlp.experts.0.down_proj", "model.layers.3.eh_proj"]
    extra = {f"{n}.weight": torch.randn(32, 32).bfloat16() for n in names}
    save_file({**tensors_of(small), **extra}, source / "model.safetensors", {"format": "pt"})
    model = MoEModel.open(source)
    model.overlay = Packed(MoEModel.open(source), (4,))
    write_folder(model, tmp_path / "out", {}, Progress(), quantized=CT)
    config, tensors = config_of(tmp_path / "out"), tensors_of(tmp_path / "out")
    for name in names:
        assert torch.equal(tensors[f"{name}.weight"], extra[f"{name}.weight"])
        assert name in config["ignore"]
        assert server_scheme(config, name) is None
        assert server_scheme(config, f"server.{name}") is None
    assert server_scheme(config, "model.layers.0.mlp.experts.3.gate_proj")["num_bits"] == 4
    assert MoEModel.open(tmp_path / "out").block(0).kind == "packed"


def test_scales_take_a_float16_models_dtype(tmp_path):
    source = small_checkpoint(tmp_path / "bf16")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    model = MoEModel.open(source)
    model.overlay = Packed(MoEModel.open(source), (4,))
    write_folder(model, tmp_path / "out", {}, Progress(), quantized=CT)
    scales = [t for n, t in tensors_of(tmp_path / "out").items() if n.endswith(".weight_scale")]
    assert {t.dtype for t in scales} == {torch.float16}
    model.overlay.blocks[0][0]["mlp.experts.up_proj.b4g32.scale"][0] = 1e6
    with pytest.raises(RunError, match=r"out of the range of torch\.float16"):
        write_folder(model, tmp_path / "large", {}, Progress(), quantized=CT)


# --- names --------------------------------------------------------------------------------------------------------

ONE_BY_ONE = {
    "qwen3_moe": "model.layers.{}.mlp.experts.3.gate_proj",
    "mixtral": "model.layers.{}.block_sparse_moe.experts.3.w1",
    "deepseek_v3": "model.layers.{}.mlp.experts.3.gate_proj",
    "jamba": "model.layers.{}.feed_forward.experts.3.gate_proj",
    "glm4v_moe": "model.language_model.layers.{}.mlp.experts.3.gate_proj",
    "nemotron_h": "backbone.layers.{}.mixer.experts.3.up_proj",
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_names_are_what_the_family_writes(name):
    model = MoEModel.wrap(tiny_model(name))
    index = model.moe_layers[-1]
    block = model.block(index)
    names = model.expert_names(index, block.num_experts)
    first = "gate" if block.experts.has_gate else "up"
    assert names.linear(3, first) == ONE_BY_ONE[name].format(index)
    prefix = f"{model.stack}.{index}."
    state = {prefix + n: t for n, t in block.state()[0].items() if n.startswith(block.path)}
    stored = hf.to_disk_default(model.module, state)
    weights = block.experts.weights()
    for projection in names.leaves:
        for expert in range(block.num_experts):
            own = stored.pop(f"{names.linear(expert, projection)}.weight")
            assert torch.equal(own, getattr(weights, projection)[expert])
    assert not stored


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "gemma4", "zaya"])
def test_experts_that_are_stored_together_have_no_names(name):
    model = MoEModel.wrap(tiny_model(name))
    assert model.expert_names(model.moe_layers[0], 8) is None


# --- reading it back -------------------------------------------------------------------------------------------------

NVFP4 = {"format": "nvfp4-pack-quantized"}


@pytest.mark.parametrize("widths", [(4,), (2, 4, 8), (3, 5, 6)])
def test_the_reader_holds_the_same_integers_and_verifies(written, widths):
    folder, values = written(*widths)
    model = MoEModel.open(folder)
    for index in model.moe_layers:
        with model.layer(index) as layer:
            assert layer.block.kind == "packed"
            for name, projection in layer.block.experts_module.projections.items():
                assert torch.equal(projection.matrices(range(EXPERTS), torch.bfloat16), values[index][name])
    found = verify(folder)
    assert found.distance < 1e-5
    assert ("same experts, bit for bit" in found.loader) == (LIBRARY and len(set(widths)) == 1)
    assert ("these differ" in found.loader) == (LIBRARY and len(set(widths)) > 1)
    assert "streamed" in verify(folder, memory="1 kB").loader


def test_load_keeps_experts_packed_and_transformers_unpacks_the_same(written):
    pytest.importorskip("compressed_tensors")
    folder, values = written(4)
    packed = moe_compress.load(folder, dtype=torch.float32)
    with hf.quiet():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert packed.generation_config.to_dict() == plain.generation_config.to_dict()
    for index, layer in enumerate(packed.model.layers):
        assert layer.mlp.experts.kind == "packed"
        unpacked = FusedExperts(plain.model.layers[index].mlp.experts).weights()
        for name, projection in layer.mlp.experts.projections.items():
            assert torch.equal(projection.matrices(range(EXPERTS), torch.bfloat16), values[index][name])
            assert torch.equal(getattr(unpacked, name), values[index][name])


def test_a_compressed_checkpoint_is_a_dense_source(written, tmp_path):
    """What a run starts from is what the packed experts stand for."""
    folder, values = written(4)
    dry(folder, tmp_path)
    source = MoEModel.open(folder, dequantize=True)
    for index in source.moe_layers:
        with source.layer(index) as layer:
            assert layer.block.kind == "fused"
            for name, matrices in layer.block.experts.weights().matrices():
                assert torch.equal(matrices, values[index][name].float())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, c: t.pop("model.layers.0.mlp.experts.5.up_proj.weight_shape"), CheckpointError, "lacks"),
        (
            lambda t, c: t.pop("model.layers.0.mlp.experts.5.up_proj.weight_packed"),
            CheckpointError,
            "weight_scale|lacks|holds",
        ),
        (lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=8), CheckpointError, "holds codes"),
        (
            lambda t, c: t.update({"model.layers.0.mlp.experts.1.up_proj.weight_zero_point": torch.ones(1)}),
            CheckpointError,
            "says that its codes are symmetric",
        ),
        (lambda t, c: c["config_groups"]["group_0"].update(targets=["Other"]), CheckpointError, "no group"),
        (lambda t, c: c["config_groups"]["group_0"]["weights"].update(symmetric=False), CheckpointError, "zero_point"),
        (
            lambda t, c: [c.update(NVFP4), c["config_groups"]["group_0"].update(NVFP4)],
            UnsupportedModelError,
            "in the format nvfp4",
        ),
        (
            lambda t, c: t.update({"model.layers.0.mlp.experts.1.up_proj.weight_g_idx": torch.zeros(1)}),
            UnsupportedModelError,
            "grouped by activation order",
        ),
        (
            lambda t, c: t.update(
                {"model.layers.0.self_attn.q_proj.weight_packed": t.pop("model.layers.0.self_attn.q_proj.weight")}
            ),
            CheckpointError,
            r"q_proj' is quantized, and its group in config.json is missing",
        ),
    ],
)
def test_what_isnt_a_whole_file_of_this_kind_is_refused(written, tmp_path, change, error, message):
    folder = tmp_path / "changed"
    shutil.copytree(written(4)[0], folder)
    tensors, config = tensors_of(folder), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        MoEModel.open(folder)


# --- whole runs ------------------------------------------------------------------------------------------------------


def quantized(**options):
    values = {"bits": 4.7, "widths": [4], "group_size": 32, "method": "rtn", "allocation": "uniform"}
    return [{"quantize.mixed": {**values, "protect_super_experts": False, **options}}]


def test_the_demo_end_to_end_with_layers_of_different_widths(demo, tmp_path):
    passes = [{"quantize.mixed": {"bits": 3.2, "widths": [2, 4], "group_size": 128, "method": "rtn"}}]
    wanted = recipe(demo / "moe-demo", tmp_path / "out", passes, target="vllm")
    wanted["calibration"] = {"sources": [str(demo / "calibration.jsonl")], "sequences": 4, "length": 64}
    wanted["evaluate"] = {"text": [str(demo / "text" / "text_novels.jsonl")], "length": 64, "max_tokens": 256}
    report = moe_compress.run(make_recipe(wanted)).report
    config = config_of(tmp_path / "out")
    assert [g["weights"]["num_bits"] for g in config["config_groups"].values()] == [2, 4]
    assert report["after"]["bits_per_weight"] <= 3.2
    assert report["verification"]["distance"] < 1e-4
    assert "transformers' own loader was not asked" in report["verification"]["loader"]
    assert 1 < report["after"]["perplexity"]["text_novels"] < 200
    assert 0 < report["after"]["kl"]["text_novels"] < 2
    experts = [n for n in tensors_of(tmp_path / "out") if ".mlp.experts." in n]
    stored = json.loads((tmp_path / "out" / "moe_compress.json").read_text())["tensors"]
    assert report["after"]["expert_bytes"] == sum(stored[n]["bytes"] for n in experts)


def test_the_same_run_gives_the_same_bytes_from_disk_and_in_memory(small, tmp_path):
    for name in ("one", "two"):
        moe_compress.run(make_recipe(recipe(small, tmp_path / name, quantized(), target="vllm")))
    one, two = (json.loads((tmp_path / n / "moe_compress.json").read_text())["tensors"] for n in ("one", "two"))
    assert one == two
    assert [
        (tmp_path / "one" / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "two").glob("*.safetensors")
    ]
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
    moe_compress.compress(model, passes=quantized(), target="vllm").save(tmp_path / "memory")
    memory = json.loads((tmp_path / "memory" / "moe_compress.json").read_text())["tensors"]
    assert {n: e["sha256"] for n, e in memory.items()} == {n: e["sha256"] for n, e in one.items()}
    assert config_of(tmp_path / "memory")["config_groups"] == config_of(tmp_path / "one")["config_groups"]


def test_pruned_then_quantized_loads_with_the_smaller_count(small, text, tmp_path):
    passes = [{"prune.experts": {"experts": 6, "criterion": "reap"}}, *quantized()]
    report = moe_compress.run(make_recipe(recipe(small, tmp_path / "out", passes, text, target="sglang"))).report
    assert MoEModel.open(tmp_path / "out").block(0).num_experts == 6
    assert ("bit for bit" in report["verification"]["loader"]) == LIBRARY
    assert not any(".experts.6." in n for n in tensors_of(tmp_path / "out"))


def test_the_ready_recipe_can_be_carried_out(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(demo.parent)
    from moe_compress.recipe import read_recipe
    from moe_compress.recipes import find_recipe

    checked = read_recipe(find_recipe("vllm-4bit"), {"output": str(tmp_path / "out")})
    forecast = plan_run(checked)[1]
    assert checked.target == "vllm"
    assert 4 < forecast.after.bits_per_weight < 4.2

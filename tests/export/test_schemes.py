"""Served 8-bit schemes in compressed-tensors: its library decodes them, its presets are what the config says, and
servers find what they allocate.
"""

import json
import re
import shutil

import pytest
import torch
from checkpoints import EXPERTS, LAYERS, recipe, small_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moe_compress
from moe_compress.errors import CheckpointError
from moe_compress.export.schemes import SCALED, Scheme
from moe_compress.model import FusedExperts, MoEModel, hf

SIDE = 128
# What the library calls each.
PRESETS = {"fp8": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK", "w8a8": "W8A8", "w4a8": "W4A8"}
CODE = {"fp8": torch.float8_e4m3fn, "fp8-block": torch.float8_e4m3fn, "w8a8": torch.int8, "w4a8": torch.int8}
SCALES = {"fp8": (SIDE, 1), "fp8-block": (1, 2), "w8a8": (SIDE, 1), "w4a8": (SIDE, 2)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Hidden size 256: rows of an up projection are two blocks and groups, those of a down projection one."""
    return small_checkpoint(tmp_path_factory.mktemp("source") / "model", hidden_size=256, moe_intermediate_size=SIDE)


@pytest.fixture(scope="module")
def written(tmp_path_factory, source):
    """Scheme → its folder."""
    made = {}

    def make(scheme):
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("written") / scheme
            passes = [{"quantize.scheme": {"scheme": scheme}}]
            moe_compress.run(recipe(source, made[scheme], passes, target="vllm"))
        return made[scheme]

    return make


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def tensors_of(folder):
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def experts():
    return [(layer, e, p) for layer in range(LAYERS) for e in range(EXPERTS) for p in ("gate", "up", "down")]


@pytest.mark.parametrize("scheme", SCALED)
def test_the_library_itself_decodes_the_weights_that_run(written, scheme):
    library = pytest.importorskip("compressed_tensors")
    folder = written(scheme)
    tensors = tensors_of(folder)
    config = library.QuantizationConfig.model_validate(config_of(folder))
    (group,) = config.config_groups.values()
    decode = library.BaseCompressor.get_value_from_registry(group.format).decompress
    model = MoEModel.open(folder)
    ours = {}
    for layer in model.moe_layers:
        with model.layer(layer) as live:
            for name, projection in live.block.experts_module.projections.items():
                dtype = projection.scale.dtype
                ours[layer, name] = projection.matrices(range(EXPERTS), dtype)
    for layer, expert, projection in experts():
        name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj."
        parts = {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}
        assert torch.equal(decode(parts, group)["weight"], ours[layer, projection][expert])


@pytest.mark.parametrize("scheme", SCALED)
def test_the_config_is_the_librarys_own_preset(written, scheme):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    values = config_of(written(scheme))
    (group,) = QuantizationConfig.model_validate(values).config_groups.values()
    preset = preset_name_to_scheme(PRESETS[scheme], group.targets)
    assert group.weights == preset.weights
    assert group.input_activations == preset.input_activations
    assert group.output_activations is None
    assert values["format"] == group.format == ("float-quantized" if scheme.startswith("fp8") else "int-quantized")


@pytest.mark.parametrize("scheme", SCALED)
def test_tensors_have_the_names_dtypes_and_shapes_that_servers_allocate(written, scheme):
    tensors = tensors_of(written(scheme))
    for layer, expert, projection in experts():
        name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj."
        parts = {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}
        assert parts.keys() == {"weight", "weight_scale"}  # no zero points, no input scales
        down = projection == "down"
        assert parts["weight"].shape == ((256, SIDE) if down else (SIDE, 256))
        assert parts["weight"].dtype == CODE[scheme]
        rows, columns = SCALES[scheme]
        down_shape = {"fp8-block": (2, 1), "w4a8": (256, 1)}.get(scheme, (256, 1))
        assert parts["weight_scale"].shape == (down_shape if down else (rows, columns))
        # servers allocate float32, and bfloat16 for groups of integers: either takes these without rounding
        assert parts["weight_scale"].dtype == (torch.float32 if scheme.startswith("fp8") else torch.bfloat16)
        if scheme == "w4a8":
            assert -8 <= int(parts["weight"].min()) <= int(parts["weight"].max()) <= 7


@pytest.mark.parametrize("scheme", SCALED)
def test_everything_else_is_the_source_byte_for_byte(written, source, scheme):
    result, before = tensors_of(written(scheme)), tensors_of(source)
    dense = {n for n in before if ".experts." not in n}
    assert {n for n in result if ".experts." not in n} == dense
    assert all(torch.equal(result[n], before[n]) and result[n].dtype == before[n].dtype for n in dense)


@pytest.mark.parametrize("prefix", ["", "language_model.", "draft."])
@pytest.mark.parametrize("scheme", SCALED)
def test_servers_find_the_scheme_and_leave_the_rest_alone(written, scheme, prefix):
    config, tensors = config_of(written(scheme)), tensors_of(written(scheme))

    def found(module):
        def hit(entry):
            return re.match(entry[3:], module) if entry.startswith("re:") else entry == module

        if any(hit(entry) for entry in config["ignore"]):
            return None
        return next((g for g in config["config_groups"].values() if any(map(hit, g["targets"]))), None)

    for name, tensor in tensors.items():
        module = prefix + name.rpartition(".")[0]
        if ".experts." in name:
            assert found(module)["weights"]["num_bits"] == (4 if scheme == "w4a8" else 8)
        elif tensor.dim() == 2:
            assert found(module) is None
    assert found(f"{prefix}model.layers.1.mlp.experts.routed_experts.0.gate_proj")


def test_transformers_makes_the_same_of_fp8(written):
    pytest.importorskip("compressed_tensors")
    folder = written("fp8")
    packed = moe_compress.load(folder, dtype=torch.float32)
    with hf.quiet():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, layer in enumerate(packed.model.layers):
        assert layer.mlp.experts.kind == "scaled"
        unpacked = FusedExperts(plain.model.layers[index].mlp.experts).weights()
        for name, projection in layer.mlp.experts.projections.items():
            assert torch.equal(projection.matrices(range(EXPERTS), torch.float32), getattr(unpacked, name))
    report = json.loads((folder / "report.json").read_text())["verification"]["loader"]
    assert "arrives at the same experts, bit for bit" in report


@pytest.mark.parametrize("scheme", ["fp8-block", "w8a8", "w4a8"])
def test_transformers_is_not_asked_about_what_it_cannot_convert_and_stops(written, scheme):
    pytest.importorskip("compressed_tensors")
    report = json.loads((written(scheme) / "report.json").read_text())["verification"]["loader"]
    assert f"was not asked: it has no conversion for {scheme} experts" in report
    with pytest.raises(RuntimeError), hf.quiet():
        AutoModelForCausalLM.from_pretrained(written(scheme))


def test_the_same_run_gives_the_same_bytes_from_disk_and_in_memory(source, written, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    result = moe_compress.compress(model, passes=[{"quantize.scheme": {"scheme": "fp8-block"}}], target="vllm")
    result.save(tmp_path / "memory")
    one, two = (
        json.loads((f / "moe_compress.json").read_text())["tensors"]
        for f in (written("fp8-block"), tmp_path / "memory")
    )
    assert {n: e["sha256"] for n, e in one.items()} == {n: e["sha256"] for n, e in two.items()}
    assert config_of(written("fp8-block"))["config_groups"] == config_of(tmp_path / "memory")["config_groups"]


def _replace(tensors, name, change):
    tensors[name] = change(tensors[name])


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCALED)
def test_a_group_written_by_others_is_read_as_what_it_is(scheme):
    """Fields that say nothing about values may differ: an observer, an absent actorder, a channel's group size."""
    own = Scheme.served(scheme)
    group = own.group(["Linear"])
    weights = {**group["weights"], "observer": "memoryless_minmax", "observer_kwargs": {}}
    del weights["actorder"]
    assert Scheme.of_group({**group, "weights": weights, "format": None}) == own
    assert Scheme.of_group(json.loads(json.dumps(group))) == own


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g["weights"].update(symmetric=False),
        lambda g: g["weights"].update(strategy="tensor"),
        lambda g: g["weights"].update(num_bits=6),
        lambda g: g.update(input_activations=None),
        lambda g: g["input_activations"].update(dynamic=False),
        lambda g: g["input_activations"].update(strategy="tensor"),
        lambda g: g["input_activations"].update(num_bits=4),
    ],
)
@pytest.mark.parametrize("scheme", SCALED)
def test_another_scheme_is_not_taken_for_one_of_ours(scheme, change):
    group = Scheme.served(scheme).group(["Linear"])
    change(group)
    found = Scheme.of_group(group)
    assert found is None or found.name == "wna16"
    if group["input_activations"] is not None:
        assert found is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, c, m: t.pop(f"{m}.weight"), CheckpointError, "lacks .*weight"),
        (
            lambda t, c, m: t.update({f"{m}.weight": t[f"{m}.weight"].float()}),
            CheckpointError,
            "alike|are torch.float32",
        ),
        (lambda t, c, m: _replace(t, f"{m}.weight", lambda w: w[:64].clone()), CheckpointError, "another shape"),
        (
            lambda t, c, m: t.update({f"{m}.weight_scale": t[f"{m}.weight_scale"][:64].clone()}),
            CheckpointError,
            "alike",
        ),
        (lambda t, c, m: c["config_groups"]["group_0"].update(targets=["Other"]), CheckpointError, "no group"),
        (
            lambda t, c, m: c["config_groups"]["group_0"]["weights"].update(strategy="tensor"),
            CheckpointError,
            r"weight_scale' is \[256, 1\], not \[1, 1\]",
        ),
        (
            lambda t, c, m: t.update({"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(1)}),
            CheckpointError,
            "q_proj' is quantized, and its group in config.json is missing",
        ),
    ],
)
def test_what_isnt_a_whole_file_of_this_kind_is_refused(written, tmp_path, change, error, message):
    folder = tmp_path / "changed"
    shutil.copytree(written("fp8"), folder)
    tensors, config = tensors_of(folder), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"], "model.layers.0.mlp.experts.5.up_proj")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        MoEModel.open(folder)


# --- ready recipes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "bits"), [("vllm-fp8", "vllm", 8.17), ("vllm-w8a8", "vllm", 8.08), ("gptq-4bit", "gptq", 4.37)]
)
def test_the_ready_recipes_can_be_carried_out(demo, tmp_path, monkeypatch, name, target, bits):
    monkeypatch.chdir(demo.parent)
    from moe_compress.pipeline import plan_run
    from moe_compress.recipe import read_recipe
    from moe_compress.recipes import find_recipe

    checked = read_recipe(find_recipe(name), {"output": str(tmp_path / "out")})
    assert checked.target == target
    assert plan_run(checked)[1].after.bits_per_weight == pytest.approx(bits, abs=0.01)

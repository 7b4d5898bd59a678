"""GPTQ files, unpacked here from the format's description: word by word, field by field, in plain numpy.

qweight int32 [K·bits/32, N]: field j of word i of column n is the code of input i·(32/bits) + j, lowest bits first
qzeros  int32 [K/g, N·bits/32]: the same along the output; the first version stores the zero point minus 1
scales  [K/g, N], g_idx int32 [K]
weight[n, k] = scales[g_idx[k], n] · (code − zero)
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from checkpoints import EXPERTS, LAYERS, PRUNE, recipe, small_checkpoint
from packs import pack_block
from safetensors.torch import load_file, save_file

import moe_compress
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import CheckpointError, InputError, RecipeError, UnsupportedModelError
from moe_compress.export.gptq_format import module_bits
from moe_compress.export.targets import TARGETS
from moe_compress.export.write import write_folder
from moe_compress.model import MoEModel
from moe_compress.model.shape import model_shape
from moe_compress.pipeline import plan_run
from moe_compress.probe import streamed
from moe_compress.progress import Progress
from moe_compress.recipe import make_recipe
from moe_compress.report.build import sizes


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A hidden size that vLLM's kernel takes, other neurons."""
    return small_checkpoint(tmp_path_factory.mktemp("gptq") / "model", hidden_size=128, moe_intermediate_size=64)


class Widths:
    """An overlay: the width of each layer in turn, None for a dense one; and the values that were packed."""

    def __init__(self, folder, widths, group=32, scale_dtype=torch.bfloat16):
        model = MoEModel.open(folder)
        self.states, self.values = {}, {}
        for index, bits in zip(model.moe_layers, widths, strict=True):
            if bits is None:
                continue
            with model.layer(index, stored=True) as live:
                made = pack_block(live.block, lambda *_, b=bits: (b, group, True), scale_dtype=scale_dtype)
                tensors, description = live.block.state()
                stored = model.stored_dtypes(index)
                self.states[index] = {n: t.to(stored.get(n, t.dtype)).clone() for n, t in tensors.items()}, description
                self.values[index] = made

    def get(self, layer):
        return self.states.get(layer)


@pytest.fixture(scope="module")
def written(tmp_path_factory, source):
    """Widths of the layers → (folder, values by layer and projection)."""
    made = {}

    def make(*widths):
        if widths not in made:
            model = MoEModel.open(source)
            model.overlay = Widths(source, widths)
            folder = tmp_path_factory.mktemp("written") / "out"
            manifest = {"probe": streamed(model, list(range(3, 19)))}
            options = {"quantized": "gptq", "target": TARGETS["gptq"]}
            assert write_folder(model, folder, manifest, Progress(), **options) == "gptq"
            made[widths] = folder, model.overlay.values
        return made[widths]

    return make


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def tensors_of(folder):
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def fields(words, bits, axis):
    """Unsigned fields of int32 words along an axis, lowest first."""
    words = words.numpy().view(np.uint32)
    count = 32 // bits
    shifts = np.arange(count, dtype=np.uint32) * np.uint32(bits)
    split = (np.expand_dims(words, axis + 1) >> shifts.reshape((count, 1) if axis == 0 else (1, count))) & np.uint32(
        (1 << bits) - 1
    )
    shape = list(words.shape)
    shape[axis] *= count
    return split.reshape(shape).astype(np.int64)


def unpacked(tensors, module, bits):
    """A module's weight [N, K], float64."""
    codes_KN = fields(tensors[f"{module}.qweight"], bits, 0)
    zeros_GN = fields(tensors[f"{module}.qzeros"], bits, 1) + 1
    scales_GN = tensors[f"{module}.scales"].double().numpy()
    group_K = tensors[f"{module}.g_idx"].numpy()
    return (scales_GN[group_K] * (codes_KN - zeros_GN[group_K])).T


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_by_the_description_alone(written, bits):
    folder, values = written(bits, bits, bits)
    tensors = tensors_of(folder)
    for layer in range(LAYERS):
        for projection, weight_ENK in values[layer].items():
            for expert in range(EXPERTS):
                module = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
                assert np.array_equal(unpacked(tensors, module, bits), weight_ENK[expert].double().numpy())


@pytest.mark.parametrize("bits", [4, 8])
def test_names_dtypes_and_shapes(written, bits):
    tensors = tensors_of(written(bits, bits, bits)[0])
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for projection, (n, k) in {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}.items():
                module = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
                parts = {name.removeprefix(module + "."): t for name, t in tensors.items() if name.startswith(module)}
                assert {name: (t.dtype, list(t.shape)) for name, t in parts.items()} == {
                    "qweight": (torch.int32, [k * bits // 32, n]),
                    "qzeros": (torch.int32, [k // 32, n * bits // 32]),
                    "scales": (torch.float16, [k // 32, n]),
                    "g_idx": (torch.int32, [k]),
                }
                assert parts["g_idx"].tolist() == [i // 32 for i in range(k)]


def test_config_is_what_readers_ask_for(written, source):
    folder, _ = written(4, 8, 4)
    config = config_of(folder)
    assert {k: config[k] for k in ("quant_method", "checkpoint_format", "bits", "group_size", "sym", "desc_act")} == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
    }
    assert config["lm_head"] is False
    assert [v for v in config["dynamic"].values() if v] == [{"bits": 8}]
    after, before = (json.loads((f / "config.json").read_text()) for f in (folder, source))
    assert {k: v for k, v in after.items() if k != "quantization_config"} == before
    result, untouched = tensors_of(folder), tensors_of(source)
    dense = {n for n in untouched if ".experts." not in n}
    assert all(torch.equal(result[n], untouched[n]) for n in dense)


def width(config, module):
    """As vLLM's get_dynamic_override: rules in order, the first that matches; a "-:" one leaves the module dense."""
    for rule, values in config["dynamic"].items():
        if rule.startswith("-:"):
            if re.match(rule[2:], module):
                return None
        elif re.match(rule[2:] if rule.startswith("+:") else rule, module):
            return values.get("bits", config["bits"])
    return config["bits"]


@pytest.mark.parametrize("prefix", ["", "language_model."])
@pytest.mark.parametrize("widths", [(4, 4, 4), (4, 8, 4), (8, 8, 4), (4, None, 8), (None, 4, 4)])
def test_readers_find_each_layers_width_and_leave_the_rest_dense(written, widths, prefix):
    config, tensors = config_of(written(*widths)[0]), tensors_of(written(*widths)[0])
    for layer, bits in enumerate(widths):
        experts = f"{prefix}model.layers.{layer}.mlp.experts"
        for module in (experts, f"{experts}.routed_experts", f"{experts}.3.gate_proj", f"{experts}.0.down_proj"):
            assert width(config, module) == module_bits(config, module) == bits
    # Fused and other names of servers, which the file doesn't have.
    for module in ("model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate", "model.layers.10.mlp.experts"):
        assert width(config, prefix + module) is None
    for module in ("lm_head", "model.layers.1.mlp.shared_experts.gate_up_proj", "model.embed_tokens"):
        assert width(config, prefix + module) is None
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.dim() == 2:
            assert width(config, prefix + name.removesuffix(".weight")) is None


def test_a_draft_models_experts_stay_dense(source, tmp_path):
    extended = tmp_path / "source"
    shutil.copytree(source, extended)
    for file in extended.glob("*.safetensors*"):
        file.unlink()
    names = [f"mtp.layers.0.mlp.experts.3.{p}_proj" for p in ("gate", "up", "down")] + ["model.layers.3.eh_proj"]
    extra = {f"{n}.weight": torch.randn(32, 32).bfloat16() for n in names}
    save_file({**tensors_of(source), **extra}, extended / "model.safetensors", {"format": "pt"})
    model = MoEModel.open(extended)
    model.overlay = Widths(source, (4, 4, 8))
    write_folder(model, tmp_path / "out", {}, Progress(), quantized="gptq", target=TARGETS["gptq"])
    config = config_of(tmp_path / "out")
    for module in ("mtp.layers.0.mlp.experts", "server.mtp.layers.0.mlp.experts.routed_experts", *names):
        assert width(config, module) is None
    assert width(config, "model.layers.0.mlp.experts") == 4
    assert width(config, "model.layers.2.mlp.experts") == 8
    assert MoEModel.open(tmp_path / "out").block(2).kind == "packed"


def test_scales_that_float16_cannot_hold_stay_as_they_are(source, tmp_path):
    model = MoEModel.open(source)
    model.overlay = Widths(source, (4, 4, 4))
    tiny = model.overlay.states[1][0]["mlp.experts.up_proj.b4g32.scale"]
    tiny[0, 0, 0] = 1.17e-7  # a bfloat16 number; float16 has steps of 6e-8 there
    write_folder(model, tmp_path / "out", {}, Progress(), quantized="gptq", target=TARGETS["gptq"])
    scales = {n: t for n, t in tensors_of(tmp_path / "out").items() if n.endswith(".scales")}
    for name, scale in scales.items():
        assert scale.dtype == (torch.bfloat16 if ".layers.1." in name else torch.float16)
    assert torch.equal(scales["model.layers.1.mlp.experts.0.up_proj.scales"][0, 0], tiny[0, 0, 0])


# --- reading it back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(4, 4, 4), (8, 4, None)])
def test_the_reader_holds_the_same_integers_and_verifies(written, widths):
    from moe_compress.export.verify import verify

    folder, values = written(*widths)
    model = MoEModel.open(folder)
    loaded = moe_compress.load(folder, dtype=torch.float32)
    for index, bits in zip(model.moe_layers, widths, strict=True):
        module = loaded.model.layers[index].mlp.experts
        assert (model.block(index).kind == "packed") == (bits is not None) == (getattr(module, "kind", "") == "packed")
        if bits is None:
            continue
        with model.layer(index) as layer:
            for name, projection in layer.block.experts_module.projections.items():
                assert torch.equal(projection.matrices(range(EXPERTS), torch.float32), values[index][name])
                own = module.projections[name].matrices(range(EXPERTS), torch.float32)
                assert torch.equal(own, values[index][name])
    found = verify(folder)
    assert found.distance < 1e-5
    assert "no loader for experts in it" in found.loader
    assert "streamed" in verify(folder, memory="1 kB").loader


MODULE = "model.layers.0.mlp.experts.5.up_proj"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, c: t.pop(f"{MODULE}.g_idx"), CheckpointError, "lacks .*g_idx"),
        (lambda t, c: t.pop(f"{MODULE}.qweight"), CheckpointError, "lacks|holds"),
        (lambda t, c: t[f"{MODULE}.g_idx"].copy_(t[f"{MODULE}.g_idx"].flip(0)), CheckpointError, "reorders columns"),
        (lambda t, c: t[f"{MODULE}.qzeros"].add_(1), CheckpointError, "qzeros isn't symmetric"),
        (lambda t, c: c.update(bits=8), CheckpointError, "makes it"),
        (lambda t, c: c.update(group_size=64), CheckpointError, "makes it"),
        (lambda t, c: c.update(bits=3), CheckpointError, "makes it 3 bits"),
        (lambda t, c: c.update(sym=False), UnsupportedModelError, "already quantized"),
        (lambda t, c: c.update(desc_act=True), UnsupportedModelError, "already quantized"),
        (lambda t, c: c.update(checkpoint_format="gptq_v2"), UnsupportedModelError, "already quantized"),
        (
            lambda t, c: t.update(
                {f"model.layers.0.self_attn.q_proj.{p}": t[f"{MODULE}.{p}"].clone() for p in ("qweight", "scales")}
            ),
            UnsupportedModelError,
            "isn't an expert",
        ),
    ],
)
def test_what_isnt_such_a_file_is_refused(written, tmp_path, change, error, message):
    folder = tmp_path / "changed"
    shutil.copytree(written(4, 4, 4)[0], folder)
    tensors, config = tensors_of(folder), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        MoEModel.open(folder)


# --- whole runs ------------------------------------------------------------------------------------------------------


def steps(**options):
    values = {"bits": 9.9, "widths": [4], "group_size": 32, "method": "rtn", "allocation": "uniform"}
    return [{"quantize.mixed": {**values, "protect_super_experts": False, **options}}]


@pytest.mark.parametrize("bits", [4, 8])
def test_forecast_plan_report_and_file_agree_to_the_byte(source, bits, tmp_path):
    wanted = recipe(source, tmp_path / "out", steps(widths=[bits], bits=16), target="gptq", format="gptq")
    forecast = plan_run(make_recipe(wanted))[1].after
    report = moe_compress.run(make_recipe(wanted)).report
    with Checkpoint(tmp_path / "out") as written:
        experts = sum(info.nbytes for n, info in written.tensors.items() if ".experts." in n)
        assert written.nbytes == forecast.total_bytes == report["after"]["bytes"]
    assert experts == forecast.expert_bytes == report["after"]["expert_bytes"]
    assert experts == report["passes"][0]["summary"]["expert_bytes"]
    read = sizes(model_shape(MoEModel.open(tmp_path / "out")))  # what inspect and evaluate say
    assert read == {key: report["after"][key] for key in read}


def test_pruned_then_quantized_at_two_widths(source, text, tmp_path):
    passes = [PRUNE, *steps(bits=7.2, widths=[4, 8], allocation="program")]
    report = moe_compress.run(make_recipe(recipe(source, tmp_path / "out", passes, text, target="gptq"))).report
    config = config_of(tmp_path / "out")
    assert {width(config, f"model.layers.{i}.mlp.experts") for i in range(LAYERS)} == {4, 8}
    assert report["after"]["bits_per_weight"] <= 7.2
    assert not any(".experts.6." in n for n in tensors_of(tmp_path / "out"))
    assert MoEModel.open(tmp_path / "out").block(0).num_experts == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": [3, 4]}, "loads 4, 8 bits, not 3"),
        ({"group_size": -1}, "loads groups of 32, 64, 128 weights, not whole rows"),
        ({"symmetric": False}, "loads no zero points"),
    ],
)
def test_refused_in_the_forecast(source, tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        plan_run(make_recipe(recipe(source, tmp_path / "out", steps(**options), target="gptq")))


def test_hidden_sizes_that_vllms_kernel_does_not_take_are_refused(small, tmp_path):
    with pytest.raises(RecipeError, match="hidden size is a multiple of 128, and Qwen3MoeForCausalLM has 32"):
        plan_run(make_recipe(recipe(small, tmp_path / "out", steps(), target="gptq")))


def test_a_gptq_checkpoint_is_no_source(written, tmp_path):
    with pytest.raises(InputError, match=r"already quantized \(gptq\); known are"):
        plan_run(make_recipe(recipe(written(4, 4, 4)[0], tmp_path / "out", steps())))

"""Sources that others quantized: decoded as their own loaders decode them.

References: transformers' loaders with `dequantize=True`, the compressed-tensors library, and plain loops where those
can't read the file (blocks that are cut off at the edge).
"""

import json

import pytest
import torch
from checkpoints import recipe, small_checkpoint
from compressed_tensors.quantization import QuantizationArgs
from families import input_batch, tiny_model
from quantized_sources import (
    by_library,
    ct_config,
    dense_of,
    described,
    edit,
    fp8_config,
    mxfp4_checkpoint,
    to_fp8,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, FineGrainedFP8Config, Mxfp4Config

import moe_compress
from moe_compress.checkpoint.decoded import DecodedCheckpoint
from moe_compress.errors import CheckpointError
from moe_compress.export.matching import ServerView
from moe_compress.export.schemes import Scheme
from moe_compress.export.verify import loaded_bytes
from moe_compress.model import MoEModel
from moe_compress.quant.sources import E2M1, blocks_to_dense, mx_to_dense
from moe_compress.report.text import headline
from moe_compress.units import show_bytes

ROUNDED = {
    "quantize.mixed": {
        "bits": 9.0,
        "widths": [4],
        "method": "rtn",
        "allocation": "uniform",
        "group_size": 32,
        "protect_super_experts": False,
    }
}


# --- fp8 -----------------------------------------------------------------------------------------------------------


def test_fp8_blocks_as_transformers_reads_them(tmp_path):
    """Sides are multiples of the block here: transformers reads no others."""
    folder = edit(small_checkpoint(tmp_path / "m"), fp8_config([16, 16]), lambda t: to_fp8(t, (16, 16)))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ours = moe_compress.load(folder, dtype=torch.bfloat16)
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert getattr(ours.config, "quantization_config", None) is None


@pytest.mark.parametrize("scale", ["float32", "exponents"])
def test_blocks_cut_off_at_the_edge(scale):
    torch.manual_seed(0)
    weight, size = torch.randn(2, 21, 35).to(torch.float8_e4m3fn), (8, 16)
    exponents = torch.randint(120, 134, (2, 3, 3), dtype=torch.uint8)
    factor = torch.rand(2, 3, 3) if scale == "float32" else exponents
    found = blocks_to_dense(weight, factor, size=size, dtype=torch.bfloat16)
    for e in range(2):
        for i in range(21):
            for j in range(35):
                value = factor[e, i // 8, j // 16]
                one = float(value) if scale == "float32" else 2.0 ** (int(value) - 127)
                assert found[e, i, j] == torch.tensor(float(weight[e, i, j]) * one).to(torch.bfloat16)
    if scale == "exponents":  # the dtype that safetensors has for them says the same
        typed = factor.view(torch.float8_e8m0fnu)
        assert torch.equal(blocks_to_dense(weight, typed, size=size, dtype=torch.bfloat16), found)


def test_one_scale_for_a_tensor(tmp_path):
    folder = edit(small_checkpoint(tmp_path / "m"), fp8_config(None), lambda t: to_fp8(t, None, "tensor"))
    stored = load_file(folder / "model.safetensors")
    for name, tensor in dense_of(folder).items():
        scale = stored.get(f"{name}_scale_inv")
        expected = stored[name] if scale is None else (stored[name].float() * scale).to(torch.bfloat16)
        assert torch.equal(tensor, expected), name


def test_a_run_on_fp8(tmp_path):
    """Decoded while streaming: the same result as from the dense checkpoint with the same numbers."""
    quantized = edit(small_checkpoint(tmp_path / "q"), fp8_config([32, 32]), lambda t: to_fp8(t, (32, 32)))
    values = dense_of(quantized)
    dense = small_checkpoint(tmp_path / "d")
    edit(dense, {}, lambda _: values)
    config = json.loads((dense / "config.json").read_text())
    del config["quantization_config"]
    (dense / "config.json").write_text(json.dumps(config))
    results = {}
    for name, folder in (("q", quantized), ("d", dense)):
        results[name] = moe_compress.run(recipe(folder, tmp_path / f"out-{name}", [ROUNDED]))
    q, d = (load_file(results[name].output / "model.safetensors") for name in "qd")
    assert q.keys() == d.keys()
    assert all(torch.equal(q[name], d[name]) for name in q)
    written = json.loads((results["q"].output / "config.json").read_text())
    assert written == json.loads((results["d"].output / "config.json").read_text())
    told = results["q"].report["source"]
    assert told["quantization"] == "fp8"
    assert told["bytes"] == sum(t.nbytes for t in load_file(quantized / "model.safetensors").values())
    stored = ("source as stored (fp8)", show_bytes(told["bytes"]), "")
    assert [stored in headline(results[name].report) for name in "qd"] == [True, False]
    assert results["d"].report["source"] == {"quantization": None, "bytes": results["d"].report["before"]["bytes"]}


def nested_fp8(folder):
    """Of a model that sees, `quantization_config` in its text model's config."""
    tiny_model("qwen3_vl_moe").to(torch.bfloat16).save_pretrained(folder)
    edit(folder, fp8_config([16, 16]), lambda tensors: to_fp8(tensors, (16, 16)))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_the_text_models_config_says(tmp_path):
    """transformers takes `quantization_config` from there too: loaded and written as if it stood at the top."""
    step, results = {"quantize.mixed": {**ROUNDED["quantize.mixed"], "group_size": 8}}, {}
    for name in ("at the top", "nested"):
        folder = nested_fp8(tmp_path / name)
        if name == "at the top":
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = config["text_config"].pop("quantization_config")
            (folder / "config.json").write_text(json.dumps(config))
        loaded = moe_compress.load(folder, dtype=torch.float32)
        written = moe_compress.run(recipe(folder, tmp_path / f"{name}, out", [step]))
        config = json.loads((written.output / "config.json").read_text())
        results[name] = loaded.state_dict(), load_file(written.output / "model.safetensors"), config
    for one, two in zip(results["at the top"][:2], results["nested"][:2], strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[n], two[n]) for n in one)
    assert results["at the top"][2] == results["nested"][2]
    assert "quantization_config" not in results["nested"][2]["text_config"]


# --- mxfp4 ---------------------------------------------------------------------------------------------------------


def test_mxfp4_by_the_formats_definition():
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 3, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 3, 2), dtype=torch.uint8)
    found = mx_to_dense(blocks, scales, dtype=torch.bfloat16)
    assert found.shape == (2, 64, 3)
    for e in range(2):
        for row in range(3):
            for k in range(64):
                byte = int(blocks[e, row, k // 32, k % 32 // 2])
                code = byte >> 4 if k % 2 else byte & 15
                value = (-1.0 if code & 8 else 1.0) * E2M1[code & 7] * 2.0 ** (int(scales[e, row, k // 32]) - 127)
                assert float(found[e, k, row]) == value


def test_memory_of_a_loaded_model_is_that_of_its_dense_weights(tmp_path):
    folder = mxfp4_checkpoint(tmp_path / "m")
    assert loaded_bytes(folder, torch.bfloat16) == sum(t.nbytes for t in dense_of(folder).values())


def test_mxfp4_as_transformers_reads_it(tmp_path):
    folder = mxfp4_checkpoint(tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    ours = moe_compress.load(folder, dtype=torch.bfloat16)
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    streamed = MoEModel.open(folder, dtype=torch.float32)
    with streamed.layer(1) as layer:
        assert torch.equal(
            layer.block.experts_module.gate_up_proj.bfloat16(), state["model.layers.1.mlp.experts.gate_up_proj"]
        )
    with torch.no_grad():
        assert ours(**input_batch(ours)).logits.isfinite().all()


# --- compressed-tensors --------------------------------------------------------------------------------------------

SCHEMES = {
    "int4 in groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16}),
    "int4 with zero points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
    ),
    "int3 per row": ("pack-quantized", {"num_bits": 3, "strategy": "channel"}),
    "int8 per row": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 per tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "fp8 per row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 in blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 16]},
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_as_its_library_reads_it(name, tmp_path):
    form, values = SCHEMES[name]
    arguments = QuantizationArgs(**values)
    config = ct_config({"group_0": (["Linear"], form, arguments)})
    expected = {}
    folder = edit(small_checkpoint(tmp_path / "m"), config, by_library(config, lambda _: "group_0", expected))
    assert len(expected) > 20
    found = dense_of(folder)
    for full, tensor in expected.items():
        assert torch.equal(found[full], tensor.to(found[full].dtype)), full
    seen = MoEModel.open(folder).source  # dense too where nothing here computes with it as it stands
    assert isinstance(seen, DecodedCheckpoint) == (name != "int4 in groups")


MIXED = {
    "projections of two widths": ({"group_0": (["re:.*down_proj"], 8), "group_1": (["Linear"], 4)}, []),
    "a dense expert": ({"group_1": (["Linear"], 4)}, [r"re:.*experts\.3\..*"]),
    "a dense projection": ({"group_1": (["Linear"], 4)}, ["re:.*gate_proj"]),
}


@pytest.mark.parametrize("name", MIXED)
def test_layers_whose_experts_are_stored_in_several_ways_are_seen_dense(name, tmp_path):
    groups, ignored = MIXED[name]
    arguments = {g: QuantizationArgs(num_bits=b, strategy="group", group_size=16) for g, (_, b) in groups.items()}
    config = ct_config({g: (targets, "pack-quantized", arguments[g]) for g, (targets, _) in groups.items()}, ignored)

    def group_of(module):
        if (name == "a dense expert" and "experts.3." in module) or (name[-1] == "n" and "gate_proj" in module):
            return None
        return "group_0" if "group_0" in groups and module.endswith("down_proj") else "group_1"

    expected = {}
    folder = edit(small_checkpoint(tmp_path / "m"), config, by_library(config, group_of, expected))
    seen = MoEModel.open(folder).source
    assert isinstance(seen, DecodedCheckpoint)
    assert {n for n in expected if not torch.equal(seen.get(n), expected[n])} == set()
    loaded = moe_compress.load(folder, dtype=torch.bfloat16).state_dict()
    for expert in range(8):
        down = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(loaded["model.layers.1.mlp.experts.down_proj"][expert], seen.get(down))


def test_zero_points_that_are_zero_say_nothing(tmp_path):
    """Some writers keep them of symmetric weights too. These would else run as they are stored."""
    config = ct_config({"group_0": (["Linear"], "int-quantized", QuantizationArgs(num_bits=8, strategy="channel"))})
    config["config_groups"]["group_0"]["input_activations"] = Scheme.served("w8a8").inputs()
    expected = {}
    compressed = by_library(config, lambda m: "group_0" if ".experts." in m else None, expected)

    def with_zeros(tensors):
        found = compressed(tensors)
        scales = {n: t for n, t in found.items() if n.endswith("weight_scale")}
        return found | {n.replace("scale", "zero_point"): t.new_zeros(t.shape).char() for n, t in scales.items()}

    folder = edit(small_checkpoint(tmp_path / "m"), config, with_zeros)
    seen = MoEModel.open(folder).source
    assert {n for n in expected if not torch.equal(seen.get(n), expected[n])} == set()
    name = "model.layers.0.mlp.experts.3.up_proj.weight_zero_point"
    assert name not in seen.tensors
    edit(folder, config, lambda tensors: {**tensors, name: torch.ones_like(tensors[name])})
    with pytest.raises(CheckpointError, match="zero points that aren't zero"):
        MoEModel.open(folder).source.get(name.replace("_zero_point", ""))


def test_scales_of_caches_are_left_out_of_packed_experts_too(tmp_path):
    """`inspect` would say that they are carried over, and a run has no use for them."""
    arguments = QuantizationArgs(num_bits=4, strategy="group", group_size=16)
    config = ct_config({"group_0": (["re:.*experts.*"], "pack-quantized", arguments)})
    compressed = by_library(config, lambda module: "group_0" if ".experts." in module else None, {})
    scales = {f"model.layers.{i}.self_attn.{of}_scale": torch.ones(1) for i in range(3) for of in "kv"}
    folder = edit(small_checkpoint(tmp_path / "m"), config, lambda tensors: compressed(tensors) | scales)
    for dequantize in (False, True):
        seen = MoEModel.open(folder, dequantize=dequantize)
        assert isinstance(seen.source, DecodedCheckpoint) == dequantize
        assert not seen.weights.unowned
        assert not seen.source.tensors.keys() & scales.keys()


def test_names_come_before_the_class_of_all_linear_layers():
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        "group_1": {"targets": ["re:.*down_proj"], "weights": {"num_bits": 4}},
    }
    view = ServerView({"ignore": ["lm_head"], "config_groups": groups})
    assert view.group("layers.0.mlp.experts.0.up_proj") == groups["group_0"]
    assert view.group("layers.0.mlp.experts.0.down_proj") == groups["group_1"]
    assert view.group("lm_head") is None


# --- decoded by transformers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_what_transformers_decoded_is_saved_dense(method, tmp_path):
    """Its loader remembers the codes' names, and would write dense weights under them."""
    if method == "mxfp4":
        folder, how = mxfp4_checkpoint(tmp_path / "m"), Mxfp4Config(dequantize=True)
    else:
        folder = edit(small_checkpoint(tmp_path / "m"), fp8_config([16, 16]), lambda t: to_fp8(t, (16, 16)))
        how = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how)
    passes = {"prune.experts": {"experts": 6}}
    compressed = moe_compress.compress(model, passes=passes, calibration=torch.arange(40).view(2, 20))
    compressed.save(tmp_path / "saved")
    model.save_pretrained(tmp_path / "theirs")
    for written in ("saved", "theirs"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / written)
        assert again.dtype == torch.bfloat16
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    moe_compress.verify(tmp_path / "saved")


def test_a_text_models_quantization_config_goes_when_it_was_decoded(tmp_path):
    """transformers leaves it in the decoded model's config, and would write it."""
    folder = nested_fp8(tmp_path / "m")
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert model.config.text_config.quantization_config is not None
    ids = torch.arange(40).view(2, 20) + 3
    moe_compress.compress(model, passes={"prune.experts": {"experts": 6}}, calibration=ids).save(tmp_path / "saved")
    model.save_pretrained(tmp_path / "theirs")
    for written in ("saved", "theirs"):
        assert "quantization_config" not in (tmp_path / written / "config.json").read_text()


def test_a_dense_folder_may_say_that_it_is_not_quantized(tmp_path):
    folder = described(small_checkpoint(tmp_path / "m"), None)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    result = moe_compress.run(recipe(folder, tmp_path / "out", [ROUNDED]))
    assert not (result.output / "hf_quant_config.json").exists()  # servers would look for codes

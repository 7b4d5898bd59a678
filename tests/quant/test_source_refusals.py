"""Sources that others quantized and that can't be decoded: refused by name, never taken for plain numbers."""

import pytest
import torch
from checkpoints import small_checkpoint
from quantized_sources import dense_of, described, edit, fp8_config, mxfp4_checkpoint, to_fp8

import moe_compress
from moe_compress.checkpoint.reader import Checkpoint
from moe_compress.errors import CheckpointError, UnsupportedModelError
from moe_compress.model import MoEModel
from moe_compress.quant.sources import decode


def test_floats_without_a_scale_are_refused(tmp_path):
    def broken(tensors):
        found = to_fp8(tensors, (16, 16))
        del found["model.layers.1.self_attn.q_proj.weight_scale_inv"]
        return found

    folder = edit(small_checkpoint(tmp_path / "m"), fp8_config([16, 16]), broken)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight' \(torch.float8_e4m3fn\), and not what fp8"):
        MoEModel.open(folder)


@pytest.mark.parametrize(
    ("name", "scales", "message"),
    [("layers.1.self_attn.q_proj", (3, 1), "neither one per block"), ("norm", (1,), "no matrix of 8-bit floats")],
)
def test_scales_that_do_not_fit_are_refused(name, scales, message, tmp_path):
    def broken(tensors):
        found = to_fp8(tensors, (16, 16))
        found[f"model.{name}.weight"] = found[f"model.{name}.weight"].to(torch.float8_e4m3fn)
        found[f"model.{name}.weight_scale_inv"] = torch.ones(scales)
        return found

    folder = edit(small_checkpoint(tmp_path / "m"), fp8_config([16, 16]), broken)
    with pytest.raises(CheckpointError, match=message):
        MoEModel.open(folder)


def test_mxfp4_beside_the_same_weights_dense_is_refused(tmp_path):
    folder = mxfp4_checkpoint(tmp_path / "m")
    name = "model.layers.0.mlp.experts.down_proj"
    dense = dense_of(folder)[name]
    edit(folder, {"quant_method": "mxfp4"}, lambda tensors: {**tensors, name: dense})
    with pytest.raises(CheckpointError, match=r"down_proj' twice: as it is, and as '.*down_proj_blocks'"):
        MoEModel.open(folder)


@pytest.mark.parametrize(
    ("scales", "values"),
    [
        ((32, 2), {"strategy": "group", "group_size": 32}),  # the library goes on with a last group of 16
        ((32, 4), {"strategy": "group", "group_size": 16}),
        ((1,), {"strategy": "tensor"}),
    ],
)
def test_packed_scales_that_do_not_fit_are_refused(scales, values, tmp_path):
    """Scales of 48 weights for 32, 12 for 16: as many groups as there are scales would be decoded wrongly."""
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    parts = {
        f"{name}_packed": torch.zeros(32, 6, dtype=torch.int32),
        f"{name}_scale": torch.ones(scales),
        f"{name}_shape": torch.tensor([32, 48]),
    }
    group = {"targets": ["re:.*proj"], "weights": {"num_bits": 4, "symmetric": True, **values}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    folder = edit(small_checkpoint(tmp_path / "m"), config, lambda tensors: parts)
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight_scale' is \[.*\], and of \[32, 48\] one scale for every"
    ):
        decode(Checkpoint(folder))


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
@pytest.mark.parametrize("opening", [MoEModel.open, moe_compress.load])
def test_codes_that_config_json_does_not_describe_are_refused(method, opening, tmp_path):
    """Scales beside 8-bit floats would be taken for tensors of no use, and packed experts for missing ones."""
    if method == "mxfp4":
        folder = mxfp4_checkpoint(tmp_path / "m")
    else:
        folder = edit(small_checkpoint(tmp_path / "m"), {}, lambda t: to_fp8(t, (16, 16)))
    described(folder, None)
    with pytest.raises(UnsupportedModelError, match=r"has no quantization_config.*start from the checkpoint in full"):
        opening(folder)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(UnsupportedModelError, match=r"by ModelOpt, FP8\): start from the checkpoint in full precision"):
        opening(folder)


def test_scales_of_another_format_are_refused(tmp_path):
    """The config says compressed-tensors; no scale has a name of theirs."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    folder = edit(small_checkpoint(tmp_path / "m"), config, lambda t: to_fp8(t, (16, 16)))
    with pytest.raises(CheckpointError, match="describes no scale for it"):
        MoEModel.open(folder)


@pytest.mark.parametrize("value", [{}, [], "fp8", {"quant_method": 8}, {"bits": 4}])
def test_a_quantization_config_without_a_method_is_refused(value, tmp_path):
    folder = described(small_checkpoint(tmp_path / "m"), value)
    for opening in (MoEModel.open, moe_compress.load):
        with pytest.raises(CheckpointError, match=r"config\.json: quantization_config names no quant_method"):
            opening(folder)


@pytest.mark.parametrize("block", [16, [16], [0, 16], ["a", "b"]])
def test_blocks_without_sides_are_refused(block, tmp_path):
    folder = edit(small_checkpoint(tmp_path / "m"), fp8_config(block), lambda t: to_fp8(t, (16, 16)))
    with pytest.raises(CheckpointError, match=r"weight_block_size is .*, not rows and columns"):
        MoEModel.open(folder)


@pytest.mark.parametrize("groups", [{}, {"config_groups": None}, {"config_groups": {"group_0": {}}}])
def test_compressed_tensors_without_groups_are_refused(groups, tmp_path):
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", **groups}
    folder = described(small_checkpoint(tmp_path / "m"), config)
    for dequantize in (False, True):
        with pytest.raises(CheckpointError, match="names no config_groups with targets"):
            MoEModel.open(folder, dequantize=dequantize)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "quark"])
def test_unknown_methods_are_refused_by_name(method, tmp_path):
    folder = edit(small_checkpoint(tmp_path / "m"), {"quant_method": method, "bits": 4}, dict)
    with pytest.raises(
        UnsupportedModelError, match=rf"already quantized \({method}\); known are compressed-tensors, fp8"
    ):
        decode(Checkpoint(folder))

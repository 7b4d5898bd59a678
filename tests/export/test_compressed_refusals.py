"""The compressed-tensors format: what can't be written or loaded is refused, before any work or by the exporter."""

import re
from dataclasses import replace

import pytest
import torch
from checkpoints import recipe, small_checkpoint
from families import tiny_model
from packs import layout
from test_compressed_tensors import CT, Packed, dry, random_codes

from moe_compress import feasibility
from moe_compress.errors import InputError, RecipeError, RunError
from moe_compress.export.compressed_tensors import layer_scheme, layer_tensors, quantization_config
from moe_compress.export.matching import WrittenLayer
from moe_compress.export.schemes import Scheme
from moe_compress.export.targets import TARGETS
from moe_compress.export.write import write_folder, write_memory
from moe_compress.model import FusedExperts, MoEModel
from moe_compress.model.expert_names import ExpertNames
from moe_compress.model.shape import model_shape
from moe_compress.pipeline import plan_run
from moe_compress.progress import Progress
from moe_compress.quant.packed import pack_experts
from moe_compress.quant.stack import Encoding, Stack
from moe_compress.recipe import make_recipe

# --- refusals before anything is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("vllm", {"widths": [1, 4]}, "loads 2, 3, 4, 5, 6, 7, 8 bits, not 1"),
        ("sglang", {"widths": [3, 4]}, "loads 4, 8 bits, not 3"),
        ("vllm", {"group_size": 16}, "loads groups of 32, 64, 128 weights, not 16"),
        ("vllm", {"group_size": -1}, "loads groups of 32, 64, 128 weights, not whole rows"),
        ("sglang", {"symmetric": False}, "loads no zero points"),
        ("vllm", {"symmetric": False}, "loads no zero points"),
        ("vllm", {"group_size": 64}, "doesn't divide the hidden size 32 of layer 0; 32 does"),
        ("transformers", {}, "loads no quantized experts"),
    ],
)
def test_refused_in_the_forecast(small, tmp_path, target, options, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        dry(small, tmp_path, target, **options)


def test_sizes_that_no_group_divides_are_refused(tmp_path):
    source = small_checkpoint(tmp_path / "odd", moe_intermediate_size=48)
    with pytest.raises(RecipeError, match="neurons 48 of layer 0; nothing that the target 'vllm' loads does"):
        dry(source, tmp_path)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("gpt_oss", "vllm", "no quantized experts with biases, as GptOssForCausalLM has"),
        ("granitemoe", "vllm", "GraniteMoeForCausalLM stores those of a layer together"),
        ("qwen3_vl_moe", "sglang", "stores those of a layer together"),
        ("nemotron_h", "sglang", "no quantized experts without a gate"),
    ],
)
def test_families_are_refused_with_the_reason(name, target, message):
    model = MoEModel.wrap(tiny_model(name))
    shape = model_shape(model)
    packed = shape.with_layers({i: replace(layer, kind="packed") for i, layer in shape.layers.items()})
    with pytest.raises(RecipeError, match=message):
        feasibility.check_runtime(model, packed, TARGETS[target])
    feasibility.check_runtime(model, shape, TARGETS[target])  # dense they are as they were
    feasibility.check_runtime(model, packed, TARGETS["native"])


def test_a_format_that_the_target_doesnt_have_is_refused(small, tmp_path):
    step = {"quantize.mixed": {"bits": 9.0, "widths": [4], "group_size": 32, "method": "rtn", "allocation": "uniform"}}

    def plan(target, form, passes):
        values = recipe(small, tmp_path / "out", passes, target=target, format=form)
        values["passes"][0] = {n: {**o, "protect_super_experts": False} for n, o in values["passes"][0].items()}
        return plan_run(make_recipe(values))

    for target, form in [("vllm", CT), ("sglang", CT), ("native", "native"), ("vllm", "auto")]:
        plan(target, form, [step])
    with pytest.raises(RecipeError, match="written as 'native', not 'compressed-tensors'; the target 'vllm' has it"):
        plan("native", CT, [step])
    with pytest.raises(RecipeError, match="written as 'compressed-tensors', not 'native'"):
        plan("vllm", "native", [step])
    with pytest.raises(InputError, match="format"):
        plan("vllm", "gguf", [step])


# --- assertions in the exporter --------------------------------------------------------------------------------------


def test_the_exporter_refuses_a_config_that_reads_otherwise():
    names = ExpertNames("model.layers.0.mlp.experts", {"up": "up_proj", "down": "down_proj"})
    codes, scale = torch.zeros(2, 32, 8, dtype=torch.int32), torch.ones(2, 32, 2).bfloat16()
    stack = {f"{p}_proj.b4g32.{n}": t for p in ("up", "down") for n, t in (("codes", codes), ("scale", scale))}
    described = layout(Encoding(4, 32), Encoding(4, 32))
    assert len(layer_tensors(0, stack, described, names, torch.bfloat16)) == 2 * 2 * 3
    layer = WrittenLayer(layer_scheme(0, described), names, 2)
    assert layer.scheme == Scheme(4, 32)
    assert quantization_config({0: layer}, ["lm_head"])["ignore"] == ["lm_head", r"re:(.*\.)?lm_head$"]
    with pytest.raises(RunError, match="would be read with another scheme"):
        quantization_config({0: layer}, [names.linear(0, "up")])
    with pytest.raises(RunError, match="doesn't name decoder layer 7"):
        quantization_config({7: layer}, [])


def test_unequal_layers_and_fused_families_are_not_written(small, tmp_path):
    model = MoEModel.open(small)
    model.overlay = Packed(MoEModel.open(small), (4,))
    fewer, description = model.overlay.blocks[1]
    model.overlay.blocks[1] = fewer, {**description, "num_experts": 6}
    with pytest.raises(RunError, match="different numbers of experts"):
        write_folder(model, tmp_path / "unequal", {}, Progress(), quantized=CT)
    together = MoEModel.wrap(tiny_model("granitemoe"))
    for index in together.moe_layers:
        block = together.block(index)
        matrices = {}
        for name, weight in FusedExperts(block.experts_module).weights().matrices():
            made = random_codes(tuple(weight.shape), 4, 8, torch.Generator().manual_seed(2))
            matrices[name] = [(list(range(block.num_experts)), Stack.holding(made))]
        pack_experts(block, matrices)
    with pytest.raises(RunError, match="doesn't store its experts one by one"):
        write_memory(together, tmp_path / "together", {}, Progress(), quantized=CT)

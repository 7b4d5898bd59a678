"""Which norm and which matrices have to do with what experts read, in every family; moving factors between them.

Promise: that factors can move is checked on the numbers that whole models put out, whatever was found and however; what
is found is written down here for some families, by their classes.
"""

import copy

import pytest
import torch
from families import discover, input_batch, tiny_model

from moe_compress.errors import UnsupportedModelError
from moe_compress.model import MoEModel
from moe_compress.model.reading import Reads, move_factors


def logits(view):
    module = view.module
    with torch.no_grad():
        return module(**input_batch(module)).logits.double()


def view_of(name):
    try:
        return MoEModel.wrap(tiny_model(name))
    except UnsupportedModelError as error:
        pytest.skip(str(error))


SHARED = {f"mlp.shared_experts.{name}_proj.weight": 1 for name in ("gate", "up")}
GATED = {f"mlp.shared_expert.{name}_proj.weight": 1 for name in ("gate", "up")} | {"mlp.shared_expert_gate.weight": 1}
ATTENTION = {f"self_attn.{name}_proj.weight": 1 for name in "qkv"}
NORM, GATE = "post_attention_layernorm", {"mlp.gate.weight": 1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_moe", Reads(NORM, 0.0, GATE)),
        ("gpt_oss", Reads(NORM, 0.0, {"mlp.router.weight": 1})),  # its bias reads nothing
        ("phimoe", Reads(NORM, 0.0, {"mlp.router.weight": 1})),
        ("deepseek_v3", Reads(NORM, 0.0, GATE | SHARED)),
        ("qwen2_moe", Reads(NORM, 0.0, GATE | GATED)),
        ("qwen3_next", Reads(NORM, 1.0, GATE | GATED)),
        ("lfm2_moe", Reads("ffn_norm", 0.0, {"feed_forward.gate.weight": 1})),
        ("cohere2_moe", Reads("input_layernorm", 0.0, GATE | SHARED | ATTENTION)),  # attention beside the block
        ("gemma4", Reads("pre_feedforward_layernorm_2", 0.0, {})),  # the router reads another tensor
        ("inkling", Reads(NORM, 0.0, GATE | {f"mlp.shared_experts.{n}_proj": 2 for n in ("gate", "up")})),
        ("muse_spark", Reads("mlp.pre_expert_norm", 1.0, {})),  # in the space that experts work in
        ("minimax", "puts out is not only multiplied with matrices, but also goes into mul"),  # its residual stream
        ("flex_olmo", "no norm with a weight puts out just what its experts read"),  # norms stand behind
        ("nemotron_h", "no norm with a weight puts out just what its experts read"),  # experts read a projection
        ("axk2", "no norm with a weight puts out just what its experts read"),
        ("qwen4_exp", "can't be followed without data"),
        ("glm5_next", "can't be followed without data"),
    ],
)
def test_what_is_found(name, expected):
    view = view_of(name)
    for found in view.reads.values():
        if isinstance(expected, str):
            assert isinstance(found, str)
            assert expected in found
        else:
            assert found == expected


@pytest.mark.parametrize("name", discover())
@torch.no_grad()
def test_moving_changes_nothing(name):
    """Factors of 1/8 to 8 in every layer where that can be: other norms and matrices, the same logits."""
    view = view_of(name)
    before, state = logits(view), copy.deepcopy(view.module.state_dict())
    generator = torch.Generator().manual_seed(1)
    for index, reads in view.reads.items():
        if isinstance(reads, str):
            continue
        block = view.block(index)
        factor_H = torch.rand(block.experts.hidden_size, generator=generator).mul(6).sub(3).exp2()
        moved_H = move_factors(block, reads, factor_H)
        torch.testing.assert_close(moved_H, factor_H.double(), rtol=1e-3, atol=0)
        after = view.module.state_dict()
        changed = {n for n in state if not torch.equal(state[n], after[n]) and n.startswith(view.prefix(index))}
        expected = {f"{reads.norm}.weight", *reads.readers}
        expected |= {f"{reads.norm}.bias"} & {n.removeprefix(view.prefix(index)) for n in state}
        assert expected <= {n.removeprefix(view.prefix(index)) for n in changed}
        assert set(block.changed_beside) == expected - set(block.own_names())
        assert expected <= block.state()[0].keys()
    assert (logits(view) - before).abs().max() < 5e-5 * before.std()


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next", "phimoe"])
def test_what_is_stored_in_16_bits_fits_together(name):
    """The norm is rounded first, so even where 1 is added to its weight columns get what the norm really lost."""
    view = view_of(name)
    index = view.moe_layers[0]
    block, reads = view.block(index), view.reads[index]
    norm = block.module.get_submodule(reads.norm)
    stored = dict.fromkeys(block.module.state_dict(), torch.bfloat16)
    norm.weight.copy_(norm.weight.bfloat16())
    read_RH = torch.randn(5, len(norm.weight), generator=torch.Generator().manual_seed(0))
    bias_H = getattr(norm, "bias", None)
    before_RH, gate_EH = norm(read_RH), next(iter(reads.readers))
    if bias_H is not None:
        bias_H.zero_()
        before_RH = norm(read_RH)
    factor_H = torch.rand(len(norm.weight), generator=torch.Generator().manual_seed(2)).mul(4).sub(2).exp2()
    weight_EH = block.module.get_parameter(gate_EH).clone()
    moved_H = move_factors(block, reads, factor_H, stored)
    assert torch.equal(norm.weight, norm.weight.bfloat16().float())
    torch.testing.assert_close(norm(read_RH) * moved_H, before_RH.double(), rtol=1e-5, atol=1e-6)
    now_EH = block.module.get_parameter(gate_EH)
    assert torch.equal(now_EH, (weight_EH.double() * moved_H).bfloat16().float())
    assert not torch.equal(moved_H, factor_H.double())


@torch.no_grad()
def test_a_silent_channel_stays():
    view = view_of("qwen3_moe")
    block, reads = view.block(0), view.reads[0]
    block.module.post_attention_layernorm.weight[3] = 0
    gate_EH = block.router.weight.clone()
    moved_H = move_factors(block, reads, torch.full((32,), 4.0))
    assert moved_H[3] == 1
    assert torch.equal(block.router.weight[:, 3], gate_EH[:, 3])
    assert torch.equal(block.router.weight[:, 4], 4 * gate_EH[:, 4])


@torch.no_grad()
def test_what_16_bits_cannot_hold_stays():
    """40 divided by 2^-12 isn't a number in float16; divided by 2^40 it is 0. Neither moves."""
    view = view_of("qwen3_moe")
    index = view.moe_layers[0]
    block, reads = view.block(index), view.reads[index]
    block.module.get_parameter(f"{reads.norm}.weight")[:3] = 40
    before = logits(view)
    factor_H = torch.ones(32, dtype=torch.float64)
    factor_H[:3] = torch.tensor([2.0**-12, 2.0**40, 2.0**-4])
    stored = {f"{reads.norm}.weight": torch.float16}
    moved_H = move_factors(block, reads, factor_H, stored)
    assert moved_H[:3].tolist() == [1, 1, 2.0**-4]
    torch.testing.assert_close(logits(view), before, rtol=1e-4, atol=1e-4)

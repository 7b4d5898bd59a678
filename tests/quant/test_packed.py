"""Packed experts at run time against dense float64 experts, one at a time; and what they hold in memory."""

import copy
import itertools

import pytest
import torch
from families import discover, tiny_model
from packs import DENSE, mixture, pack_block, put
from reference import outputs_ETH
from running import python

from moe_compress.model import MoEModel
from moe_compress.quant import run_packed
from moe_compress.quant.stack import Stack

# Gate and up concatenated; transposed, interleaved, biases; no gate, inputs of size 28; a norm after each expert.
LAYOUTS = sorted({"qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"} & set(discover()))
ROUTINGS = ["spread", "one expert", "uneven", "slots that no expert serves"]


def first_block(name, seed=0, **overrides):
    view = MoEModel.wrap(tiny_model(name, seed, **overrides))
    return view.block(view.moe_layers[0])


def packed_and_dense(block, choose, **dtypes):
    """The packed module, and the family's own with the same weights in float32."""
    dense = copy.deepcopy(block)
    put(dense, pack_block(block, choose, **dtypes))
    return block.experts_module, dense.experts_module


def routing(kind, tokens, experts):
    generator = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, experts, generator=generator).topk(min(3, experts)).indices
    weight = torch.rand(index.shape, generator=generator) + 0.1
    if kind == "one expert":
        index = torch.full((tokens, 1), experts - 1)
        weight = weight[:, :1]
    elif kind == "uneven":  # half of the experts never, expert 0 for every token
        index = torch.stack([torch.zeros(tokens, dtype=torch.long), 1 + index[:, 0] % (experts // 2 - 1)], 1)
        weight = weight[:, :2]
    elif kind == "slots that no expert serves":
        index[::2, 0] = experts  # how expert parallelism marks another device's
        weight[:, 1] = 0
    return index, weight


def expected(dense, hidden, index, weight):
    everyone = outputs_ETH(dense, hidden)
    output = torch.zeros(len(hidden), everyone.shape[-1], dtype=torch.float64)
    for token, slot in itertools.product(*map(range, index.shape)):
        if weight[token, slot] and index[token, slot] < len(everyone):
            output[token] += weight[token, slot].double() * everyone[index[token, slot], token]
    return output


def assert_as_dense(block, choose, kind, tokens, **dtypes):
    experts = block.num_experts
    module, dense = packed_and_dense(block, choose, **dtypes)
    hidden = torch.randn(tokens, module.hidden_size, generator=torch.Generator().manual_seed(3))
    index, weight = routing(kind, tokens, experts)
    output = module(hidden, index, weight)
    reference = expected(dense, hidden, index, weight)
    assert output.dtype == hidden.dtype
    torch.testing.assert_close(output.double(), reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max() + 1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_mixed_widths_equal_dense_experts(name, kind):
    """All ten widths in a layer, other ones in every projection, few tokens and many."""
    for tokens in (1, 2, 60):
        assert_as_dense(first_block(name), mixture, kind, tokens)


@torch.no_grad()
@pytest.mark.parametrize("bits", [*range(1, 9), 1.58])
def test_each_width(bits):
    """Alone in a layer, with every group size that divides the sides 32 and 20, with and without zero points."""
    for group, symmetric in itertools.product((-1, 1, 2, 4), (True, False)):
        if bits >= 2 or symmetric:
            block = first_block("qwen3_moe", moe_intermediate_size=20)
            assert_as_dense(block, lambda *_: (bits, group, symmetric), "spread", 5)  # noqa: B023


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_and_dense_weights_of_another_dtype(dtype):
    assert_as_dense(first_block("gpt_oss"), mixture, "spread", 9, dense_dtype=dtype, scale_dtype=dtype)
    assert_as_dense(first_block("gpt_oss"), lambda *_: DENSE, "spread", 9, dense_dtype=dtype)


@torch.no_grad()
def test_no_token():
    for name in LAYOUTS:
        block = first_block(name)
        pack_block(block, mixture)
        hidden = torch.zeros(0, block.experts.hidden_size)
        output = block.experts_module(hidden, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
        assert output.shape == hidden.shape
        nobody = torch.full((3, 2), block.num_experts)
        assert not block.experts_module(torch.ones(3, hidden.shape[1]), nobody, torch.ones(3, 2)).any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computing_in_16_bits(dtype):
    """Weights are rounded once, from float32: the same as dense experts of that dtype."""
    block = first_block("qwen3_moe")
    dense = copy.deepcopy(block)
    values = pack_block(block, mixture)
    put(dense, values)
    module, dense = block.experts_module, dense.experts_module
    hidden = torch.randn(30, 32).to(dtype)
    index, weight = routing("spread", 30, 8)
    output = module(hidden, index, weight.to(dtype))
    assert output.dtype == dtype
    for name, projection in module.projections.items():
        assert torch.equal(projection.matrices([6, 1, 2], dtype), values[name][[6, 1, 2]].to(dtype))
    reference = expected(dense, hidden.float(), index, weight.to(dtype).float())
    error = (output.double() - reference).norm() / reference.norm()
    assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_gradients_of_inputs_and_routing_weights(name, monkeypatch):
    """As through dense experts, although matrices are unpacked one after the other."""
    monkeypatch.setattr(run_packed, "MOST_WEIGHTS", 100)
    module, dense = packed_and_dense(first_block(name), mixture)
    index, weight = routing("spread", 12, 8)
    hidden, direction = torch.randn(12, 32), torch.randn(12, 32)
    gradients = []
    for experts in (module, dense):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        output = experts(inputs[0], index, inputs[1])
        gradients.append(torch.autograd.grad((output * direction).sum(), inputs))
    for found, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_chunks_do_not_matter(monkeypatch):
    """One expert at a time, or all: the same output."""
    block = first_block("gpt_oss")
    pack_block(block, mixture)
    index, weight = routing("uneven", 40, 8)
    hidden = torch.randn(40, 32)
    together = block.experts_module(hidden, index, weight)
    for weights in (1, 5 * 32, 3 * 32 * 24):  # less than a matrix, some rows of one, three
        monkeypatch.setattr(run_packed, "MOST_WEIGHTS", weights)
        torch.testing.assert_close(block.experts_module(hidden, index, weight), together)


@torch.no_grad()
def test_views_of_experts():
    """`expert`, `weights`, activations: what statistics and reports look at."""
    for name in LAYOUTS:
        block = first_block(name)
        biases = {n: v.clone() for n, v in block.experts.weights().items() if n.endswith("_bias")}
        values = pack_block(block, mixture) | biases
        whole = dict(block.experts.weights().items())
        assert whole.keys() == values.keys()
        for key, value in values.items():
            assert torch.equal(whole[key], value)
            for expert in (0, 5):
                assert torch.equal(getattr(block.experts.expert(expert), key), value[expert])


def peak(function) -> int:
    """Most bytes that torch held at once of what `function` allocated."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert most
    return most


@torch.no_grad()
def test_no_dense_copy_of_a_layer_appears(monkeypatch):
    """All experts visited, one unpacked at a time: memory of one, not of 24."""
    block = first_block("qwen3_moe", hidden_size=128, moe_intermediate_size=96, num_experts=24)
    one = 4 * 128 * 96
    hidden, weight = torch.randn(24, 128), torch.ones(24, 1)
    index = torch.arange(24)[:, None]
    dense = copy.deepcopy(block.experts_module)
    pack_block(block, lambda _, e: ((2, 3, 4)[e % 3], 32, True))
    module = block.experts_module
    monkeypatch.setattr(run_packed, "MOST_WEIGHTS", one // 4)
    monkeypatch.setattr(run_packed, "_idle", [])
    rows = 4 * 24 * (128 + 4 * 96)
    assert peak(lambda: module(hidden, index, weight)) < 4 * one + rows
    # That the measure would see a copy: dense experts made at once are there.
    monkeypatch.setattr(run_packed, "MOST_WEIGHTS", 24 * one // 4)
    assert peak(lambda: module(hidden, index, weight)) > 8 * one  # those of one width
    assert sum(p.numel() * 4 for p in dense.parameters()) == 3 * 24 * one
    # Only experts that got tokens are unpacked.
    seen = []
    monkeypatch.setattr(Stack, "forward", _counting(Stack.forward, seen))
    module(hidden[:2], index[:2], weight[:2])
    assert sum(seen) == 3 * 2


def _counting(forward, seen):
    def counted(self, slots, *more):
        seen.append(len(slots))
        return forward(self, slots, *more)

    return counted


@torch.no_grad()
def test_casting_and_moving_leave_stored_tensors_alone():
    """`.to(dtype)` is for what computes: integers, scales and biases stay what the file says."""
    block = first_block("gpt_oss")
    pack_block(block, mixture)
    module = block.experts_module
    before = {n: t.clone() for n, t in module.state_dict().items()}
    description = module.describe()
    for cast in (lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu")):
        cast(module)
        assert module.state_dict().keys() == before.keys()
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == before[name].dtype, name
            assert torch.equal(tensor, before[name])
        assert module.describe() == description


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_copies_stand_alone(name, tmp_path):
    """deepcopy, pickle and state_dict round trips compute the same and share nothing."""
    block = first_block(name)
    pack_block(block, mixture)
    module = block.experts_module
    hidden = torch.randn(20, module.hidden_size)
    index, weight = routing("spread", 20, 8)
    output = module(hidden, index, weight)
    torch.save(module, tmp_path / "experts.pt")
    copies = [copy.deepcopy(module), torch.load(tmp_path / "experts.pt", weights_only=False)]
    other = first_block(name, seed=1)
    other.restructure(block.state()[1])
    rebuilt = other.experts_module.to_empty(device="cpu")
    rebuilt.load_state_dict(module.state_dict())
    for one in [*copies, rebuilt]:
        assert torch.equal(one(hidden, index, weight), output)
    for parameter in module.parameters():
        parameter.zero_()
    assert not torch.equal(module(hidden, index, weight), output)
    for one in [*copies, rebuilt]:
        assert torch.equal(one(hidden, index, weight), output)


def test_nothing_but_a_gpu_asks_for_triton():
    """All passes are found, and packed experts run on a CPU, where Triton can't be imported."""
    code = """
import sys
sys.modules["triton"] = None
from moe_compress.passes import all_passes
from moe_compress.quant import run_packed
assert "quantize.mixed" in all_passes()
assert "moe_compress.quant.kernels.triton_moe" not in sys.modules
assert run_packed.fused_kernel("cpu") is None
"""
    python("-c", code)

"""Cost of a width against a plain loop: one expert of the model is rounded, the layer runs, errors are summed."""

import copy
import functools
import itertools

import pytest
import torch
from families import input_batch
from reference import KINDS, build, measure
from torch import nn

from moe_compress.model import MoEModel, hf
from moe_compress.model.tap import residual_norms
from moe_compress.quant.cost import QuantizationError
from moe_compress.quant.grid import Grid, dequantize
from moe_compress.quant.rotation import Rotations
from moe_compress.quant.rtn import round_to_nearest

BITS = (1, 3)
GROUP = 4


@functools.cache
def model_of(name):
    return build(name)


def batches_of(name):
    return [input_batch(model_of(name), *shape) for shape in ((2, 9, 1), (1, 6, 2))]


def matrices(experts: nn.Module, expert: int) -> list[tuple[str, torch.Tensor]]:
    """(name, matrix) of one expert in whatever layout, a row being what reads one input. Writing changes the module."""
    found = []
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        stack = getattr(experts, name, None)
        if stack is not None:
            matrix = stack.data[expert].T if experts.is_transposed else stack.data[expert]
            if name == "gate_up_proj":
                half = len(matrix) // 2
                both = (matrix[:half], matrix[half:]) if experts.is_concatenated else (matrix[::2], matrix[1::2])
                found += list(zip(("gate", "up"), both, strict=True))
            else:
                found.append((name.removesuffix("_proj"), matrix))
    return found


def turned(rotate: str, layer: int, name: str, size: int) -> torch.Tensor:
    """Q [K, K], float64, of what a projection reads: the identity where it isn't rotated."""
    turn = Rotations.of_layer(rotate, layer, size, size).of(name)
    unit = torch.eye(size, dtype=torch.float64)
    return unit if turn is None else turn(unit)


def to_nearest(matrix: torch.Tensor, bits: int, rotation: torch.Tensor) -> torch.Tensor:
    """round(W Q) Qᵀ in float64."""
    around = (matrix.double() @ rotation).float()
    return dequantize(round_to_nearest(around[None], Grid(bits, GROUP, True)))[0].double() @ rotation.T


def rounded(
    experts: nn.Module, expert: int, bits: int, only: int | None = None, rotate: str = "none", layer: int = 0
) -> None:
    """Round an expert's matrices in place, or one of them, as they are when rotated."""
    for number, (name, matrix) in enumerate(matrices(experts, expert)):
        if only in (None, number):
            matrix.copy_(to_nearest(matrix, bits, turned(rotate, layer, name, matrix.shape[1])))


@torch.no_grad()
def traced(model, layer: int, batches):
    """(routed output, hidden states behind the layer) of one decoder layer, per sequence, in float64."""
    view = MoEModel.wrap(model)
    routed, hidden, handles = [], [], []

    def experts_ran(_module, arguments, output):
        routed.append(output.double())

    def layer_ran(_module, arguments, output):
        states = output[0] if isinstance(output, tuple) else output
        hidden.append(states.double().flatten(2))

    handles.append(view.block(layer).experts_module.register_forward_hook(experts_ran))
    handles.append(view.layers[layer].register_forward_hook(layer_ran))
    with hf.implementation(model, "eager"):
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    pairs = []
    for flat, states in zip(routed, hidden, strict=True):
        pairs += list(zip(flat.view(*states.shape[:2], -1), states, strict=True))
    return pairs


@pytest.mark.parametrize(
    ("name", "per_matrix", "rotate"),
    [
        *((name, per_matrix, "none") for name in KINDS for per_matrix in (False, True)),
        ("qwen3_moe", True, "down"),
        ("qwen3_moe", False, "both"),
        ("gpt_oss", True, "both"),
    ],
)
def test_every_expert_and_width(name, per_matrix, rotate):
    """Of an expert as a whole, and of each of its matrices."""
    batches = batches_of(name)
    statistic = QuantizationError(BITS, GROUP, True, rotate, per_matrix=per_matrix)
    view = MoEModel.wrap(model_of(name))
    profile = measure(view, batches, [statistic])
    layer = view.moe_layers[0]
    found = profile.of(layer, statistic)
    exact = traced(model_of(name), layer, batches)
    used = 0
    module = view.block(layer).experts_module
    parts = range(len(matrices(module, 0))) if per_matrix else [None]
    for expert, only in itertools.product(range(min(3, view.block(layer).num_experts)), parts):
        for column, bits in enumerate(BITS):
            changed = copy.deepcopy(model_of(name))
            with torch.no_grad():
                rounded(MoEModel.wrap(changed).block(layer).experts_module, expert, bits, only, rotate, layer)
            error = squared = relative = 0.0
            for (before, hidden), (after, _) in zip(exact, traced(changed, layer, batches), strict=True):
                change_T = (before - after).square().sum(-1)
                error += float(change_T.sum().sqrt())
                squared += float(change_T.sum())
                relative += float((change_T / hidden.square().sum(-1)).sum())
            used += squared > 0
            for key, expected in (("error", error), ("squared", squared), ("relative", relative)):
                own = found[key][expert, column] if only is None else found[key][expert, only, column]
                assert float(own) == pytest.approx(expected, rel=2e-3, abs=1e-7), (key, expert, only)
    assert used >= len(BITS)


def test_a_layer_without_hidden_states_per_token_has_no_relative_error():
    assert residual_norms(torch.ones(2, 3, 4), 6).tolist() == [4.0] * 6
    assert residual_norms((torch.ones(2, 3, 2, 4), None), 6).tolist() == [8.0] * 6
    assert residual_norms(torch.ones(2, 3, 4), 5) is None
    assert residual_norms(None, 6) is None
    assert residual_norms((), 6) is None

"""What statistics and passes are compared with: the model's own modules, seen through hooks, one expert at a time.

Promise: nothing here goes through the package's experts view, dispatch or statistics. Routing is what the model's own
forward (transformers' "eager" experts) hands to its experts; an expert's outputs and neuron activations are the
family's own class, asked for one expert at weight 1, in float64. Sums are for the tests to write, as plain loops.

Letters: T tokens, K experts per token, E experts, H hidden, I neurons.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from families import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moe_compress.calib.collect import MemoryStore, Profile, collect
from moe_compress.calib.inputs import BlockInputs
from moe_compress.model import MoEModel, hf
from moe_compress.model.shape import model_shape
from moe_compress.model.sweep import Sweep
from moe_compress.progress import Progress

# One of each kind of routing and layout: softmax renormalised; sigmoid, bias, groups, shared experts; transposed and
# interleaved with biases; no gate, latent space; a class for no expert; router beside the MLP; norm after each expert.
KINDS = ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "zaya", "gemma4", "muse_spark"]


def build(name, demo_model=None, **overrides):
    """A fresh model: the demo checkpoint in float32, or a tiny one of that family."""
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    return tiny_model(name, **overrides)


@dataclass
class Call:
    """What one batch handed to the experts of one layer, and what came back."""

    hidden_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    output_TH: Tensor

    def choices(self) -> Iterator[tuple[int, int, float]]:
        """(token, expert, weight) of every slot that an expert serves; a weight of 0 says that none does."""
        for token in range(self.index_TK.shape[0]):
            for slot in range(self.index_TK.shape[1]):
                weight = float(self.weight_TK[token, slot])
                if weight != 0:
                    yield token, int(self.index_TK[token, slot]), weight


@torch.no_grad()
def experts_calls(model: nn.Module, batches) -> dict[int, list[Call]]:
    """MoE layer → one call per batch, from the model's own full forward."""
    view = MoEModel.wrap(model)
    calls: dict[int, list[Call]] = {layer: [] for layer in view.moe_layers}
    handles = []
    for layer in view.moe_layers:

        def ran(_module, arguments, output, layer=layer):
            calls[layer].append(Call(*(a.detach().clone() for a in (*arguments, output))))

        handles.append(view.block(layer).experts_module.register_forward_hook(ran))
    try:
        with hf.implementation(model, "eager"):
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def joined(calls: list[Call]) -> Call:
    """All batches of a layer as one call."""
    return Call(*(torch.cat(parts) for parts in zip(*(vars(c).values() for c in calls), strict=True)))


@torch.no_grad()
def outputs_ETH(module: nn.Module, hidden_TH: Tensor) -> Tensor:
    """Every expert's output on every token, float64."""
    own = copy.deepcopy(module).double()
    ones = torch.ones(len(hidden_TH), 1, dtype=torch.float64)
    with hf.implementation(own, "eager"):
        one = [own(hidden_TH.double(), torch.full((len(hidden_TH), 1), e), ones) for e in range(len(own.down_proj))]
    return torch.stack(one)


@torch.no_grad()
def activations_ETI(module: nn.Module, hidden_TH: Tensor) -> Tensor:
    """Every expert's neuron activations on every token, float64: what its down projection reads."""
    own = copy.deepcopy(module).double()
    neurons = own.down_proj.shape[1 if own.is_transposed else 2]
    own.down_proj.copy_(torch.eye(*own.down_proj.shape[1:]))  # hands its input on, in the first I of H places
    if own.has_bias:
        own.down_proj_bias.zero_()
    if hasattr(own, "post_expert_norm"):
        own.post_expert_norm = nn.Identity()
    assert neurons <= own.down_proj.shape[2 if own.is_transposed else 1]
    return outputs_ETH(own, hidden_TH)[..., :neurons]


def tokens_of(batches) -> int:
    """Tokens of all batches."""
    return sum(b["input_ids"].numel() for b in batches)


def measure(view: MoEModel, batches, statistics, store=None) -> Profile:
    """The package's own measurement."""
    store = MemoryStore() if store is None else store
    with Sweep(view, batches) as sweep:
        collect(sweep, statistics, store, Progress())
    return Profile(model_shape(view), store, len(view.layers))


def carry_out(view: MoEModel, step, plan, batches, only: int | None = None):
    """Apply a pass to all layers, or to one, each reading what the changed layers before it hand on.

    Returns layer → (report, what the layer read).
    """
    reports = {}
    with Sweep(view, batches) as sweep:
        for at in sweep:
            if at.layer.block is None or only not in (None, at.index):
                continue
            inputs = BlockInputs()
            at.run(inputs.observe, inputs_only=True)
            with view.editing(at.layer) as block:
                reports[at.index] = (step.apply(block, plan.layers[at.index], inputs), inputs)
    return reports


def assert_close(found, expected, rtol=1e-5):
    """Equal but for float32 arithmetic, relative to the largest entry."""
    scale = float(expected.abs().max()) or 1.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol * scale)

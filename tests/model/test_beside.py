"""What is found beside the experts, in every family, and what never is."""

import pytest
import torch
from families import discover, input_batch, tiny_model
from packs import spread
from torch import nn
from transformers import AutoConfig

from moe_compress.export.write import write_folder
from moe_compress.model import MoEModel, beside, hf
from moe_compress.model.beside import KINDS, OUTER
from moe_compress.model.families import installed
from moe_compress.progress import Progress
from moe_compress.quant.grid import Grid
from moe_compress.quant.packed_linear import packed
from moe_compress.quant.rtn import round_to_nearest
from moe_compress.quant.stack import Stack

NAMES = [n for n in discover() if installed().get(n) == "supported"]
# Shared experts and a dense layer; tied; convolutions; a norm with an MLP; classes that look at weights' dtypes.
SOME = {"deepseek_v3", "cohere2_moe", "granitemoehybrid", "axk2", "hy_v4", "lfm2_moe", "nemotron_h", "gpt_oss"}
family = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SOME else [pytest.mark.slow]) for n in NAMES]
)


def found(name):
    view = MoEModel.wrap(tiny_model(name))
    return view, {i: {(m.path, m.kind, m.together) for m in own} for i, own in view.matrices.items()}


def test_in_deepseek_v3():
    view, matrices = found("deepseek_v3")
    attention = {("q_a_proj", "q_a_proj"), ("kv_a_proj_with_mqa", "q_a_proj")}
    attention |= {(p, p) for p in ("q_b_proj", "kv_b_proj", "o_proj")}
    attention = {(f"self_attn.{p}", "attention", f"self_attn.{t}") for p, t in attention}

    def mlp(path, kind):
        own = {("gate_proj", "gate_proj"), ("up_proj", "gate_proj"), ("down_proj", "down_proj")}
        return {(f"{path}.{p}", kind, f"{path}.{t}") for p, t in own}

    assert matrices[0] == attention | mlp("mlp", "dense_mlp")
    assert matrices[1] == attention | mlp("mlp.shared_experts", "shared_experts")
    assert matrices[OUTER] == {
        ("model.embed_tokens", "embeddings", "model.embed_tokens"),
        ("lm_head", "head", "lm_head"),
    }
    assert view.kept == {}
    for own in view.matrices.values():
        for matrix in own:
            assert matrix.bytes == 4 * matrix.weights  # float32
            assert matrix.disk.endswith(matrix.path)


def test_gates_convolutions_and_choosers_stay():
    view, matrices = found("qwen3_next")
    kept = {path.split(".", 3)[-1]: reason for path, reason in view.kept.items()}
    assert kept["mlp.shared_expert_gate"] == "it gates or scores"
    assert kept["linear_attn.in_proj_qkvz"] == "it feeds a convolution or state-space model"
    assert {p for p, _, _ in matrices[1]} >= {"self_attn.q_proj", "mlp.shared_expert.down_proj"}
    kept = {path.split(".", 3)[-1]: reason for path, reason in MoEModel.wrap(tiny_model("axk2")).kept.items()}
    assert kept["self_attn.indexer.wk"] == "it chooses what is attended to"
    assert kept["input_layernorm.mlp.fc1"] == "it belongs to a norm"


def test_weights_that_embeddings_and_head_share_are_one():
    view = MoEModel.wrap(tiny_model("cohere2_moe"))
    (shared,) = view.matrices[OUTER]
    assert (shared.kind, shared.head) == ("embeddings", "lm_head")
    assert shared.among(frozenset({"head"}))
    assert shared.among(frozenset({"embeddings"}))
    assert not shared.among(frozenset({"attention"}))


@family
def test_everything_found_is_a_plain_matrix_outside_router_and_experts(name):
    """And the rest, linear layers of the decoder layers all of them, has a reason or belongs to a block."""
    view = MoEModel.wrap(tiny_model(name))
    for index, own in view.matrices.items():
        paths = [m.path for m in own]
        assert len(set(paths)) == len(paths)
        root = view.module if index == OUTER else view.layers[index]
        for matrix in own:
            assert matrix.kind in KINDS
            module = root.get_submodule(matrix.path)
            assert type(module) in (nn.Linear, nn.Embedding)
            assert tuple(module.weight.shape) == (matrix.rows, matrix.columns)
        if index == OUTER:
            continue
        block = view.block(index) if index in view.moe_layers else None
        parts = (block.path, block.router_path) if block else ()
        inside = [p for p in paths if any(f"{p}.".startswith(f"{part}.") for part in parts)]
        assert inside == []
        for path, module in root.named_modules():
            if isinstance(module, nn.Linear) and not any(f"{path}.".startswith(f"{part}.") for part in parts):
                assert (path in paths) != (f"{view.stack}.{index}.{path}" in view.kept)


class AllPacked:
    """An overlay: every matrix beside the experts at 4 bits. `values`: full path → what the codes mean."""

    def __init__(self, model):
        self.states, self.values = {}, {}
        for index, own in model.matrices.items():
            if index == OUTER:
                with model.outer_weights([m.path for m in own]) as weights:
                    self.add(model, index, own, dict(weights))
                continue
            with model.layer(index, stored=True) as layer:
                self.add(model, index, own, {m.path: layer.module.get_submodule(m.path).weight for m in own})

    def add(self, model, index, own, weights):
        tensors, matrices = {}, {}
        for matrix in own:
            group = next(g for g in (4, 2, 1) if matrix.columns % g == 0)
            rounded = round_to_nearest(weights[matrix.path].detach().float()[None], Grid(4, group))
            module = packed(nn.Linear(matrix.columns, matrix.rows, False), Stack.holding(rounded), torch.float32)
            tensors |= {f"{matrix.path}.{n}": t for n, t in module.packed_tensors().items()}
            matrices[matrix.path] = module.describe() | ({"head": matrix.head} if matrix.head else {})
            scale = spread(rounded.scale[0].float(), matrix.columns)
            self.values[model.prefix(index) + matrix.path] = scale * (rounded.codes[0].float() - 8)
        if matrices:
            self.states[index] = tensors, {"matrices": matrices}

    def get(self, layer):
        return self.states.get(layer)


@family
def test_packed_and_loaded_by_transformers(name, tmp_path):
    """Every family's own forward, on packed matrices: the logits of the dense values that they stand for."""
    source, output = tmp_path / "source", tmp_path / "native"
    tiny_model(name).save_pretrained(source)
    model = MoEModel.open(source)
    overlay = AllPacked(MoEModel.open(source))
    model.overlay = overlay
    assert write_folder(model, output, {}, Progress()) == "native"

    cls = hf.model_class(AutoConfig.from_pretrained(source))
    dense = cls.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, value in overlay.values.items():
            dense.get_submodule(path).weight.copy_(value)
        loaded = cls.from_pretrained(output, dtype=torch.float32).eval()
        expected, got = (m(**input_batch(m)).logits for m in (dense, loaded))
    assert torch.allclose(got, expected, rtol=1e-4, atol=3e-5)  # sums in another order
    assert sum(beside.is_packed(m) for m in loaded.modules()) == len(overlay.values)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    with torch.no_grad():
        back = cls.from_pretrained(again, dtype=torch.float32).eval()
        assert torch.allclose(back(**input_batch(back)).logits, expected, rtol=1e-4, atol=3e-5)

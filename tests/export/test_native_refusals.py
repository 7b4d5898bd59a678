"""Native folders that are damaged, or of a version to come: nothing of them loads, and the error says why."""

import re

import pytest
import torch
import transformers
from loading import experts_of, from_pretrained
from native_reader import Native
from packs import Packed, mixture
from safetensors.torch import load_file, save_file

import moe_compress
from moe_compress.errors import CheckpointError, MoeCompressError, RecipeError
from moe_compress.export.write import write_folder
from moe_compress.model import MoEModel
from moe_compress.probe import streamed
from moe_compress.progress import Progress


def assert_refused(folder, message, error=MoeCompressError, streamed_too=True):
    """By plain from_pretrained, by `load`, and streamed."""
    readers = [from_pretrained, moe_compress.load]
    for read in readers:
        with pytest.raises(error, match=message):
            read(folder)
    if streamed_too:
        with pytest.raises(MoeCompressError):
            run_streamed(folder)


def run_streamed(folder):
    streamed(MoEModel.open(folder), [3, 4, 5])


PACKED = "model.layers.0.mlp.experts.gate_proj.b4row.codes"
ATTENTION = "model.layers.1.self_attn.q_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize("name", [PACKED, PACKED.replace("codes", "scale"), ATTENTION, ROUTER, "model.norm.weight"])
def test_missing_tensors(name, damaged):
    assert_refused(damaged(lambda tensors, _: tensors.pop(name)), rf"holds nothing for '{name}'")


def test_missing_dense_experts_of_a_fused_layer(native, tmp_path):
    """A layer that stays dense in a native folder, one expert's matrix lost on the way."""
    source, _, _ = native("qwen3_moe")
    model = MoEModel.open(source)
    model.overlay = Packed(model, mixture)
    del model.overlay.states[1]
    write_folder(model, tmp_path / "half", {}, Progress())
    half = Native(tmp_path / "half")
    assert half.quantization["blocks"]["1"]["kind"] == "fused"
    assert len(experts_of(from_pretrained(tmp_path / "half"))) == len(half.packed_layers()) == 2
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    lost = next(n for n in tensors if n.startswith("model.layers.1.mlp.experts") and "down" in n)
    del tensors[lost]
    save_file(tensors, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    with pytest.raises((MoeCompressError, RuntimeError)):
        from_pretrained(tmp_path / "half")


@pytest.mark.parametrize("name", [PACKED.replace("codes", "zero"), PACKED.replace("4row", "4g4")])
def test_extra_tensors_among_the_packed(name, damaged):
    def add(tensors, _):
        tensors[name] = torch.zeros(1, dtype=torch.int32)

    assert_refused(damaged(add), "doesn't describe", streamed_too=False)


@pytest.mark.parametrize("name", [PACKED, PACKED.replace("codes", "scale"), ATTENTION, ROUTER])
def test_misshaped_tensors(name, damaged):
    def cut(tensors, _):
        tensors[name] = tensors[name][:-1].clone()

    assert_refused(damaged(cut), "(?s)mismatch|shape", (MoeCompressError, RuntimeError))


def _newer(_, config):
    config["format_version"] = 4


def _unknown_kind(_, config):
    config["blocks"]["0"]["kind"] = "hologram"


def _other_width(_, config):
    layout = config["blocks"]["0"]["layout"]
    layout["encodings"]["b4row"]["bits"] = 5


def _no_such_layer(_, config):
    config["blocks"]["17"] = config["blocks"]["0"]


def _no_such_module(_, config):
    config["blocks"]["0"]["experts"] = "mlp.specialists"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_newer, "format version 4.*up to 3: install a newer"),
        (_unknown_kind, "hologram.*newer moe-compress"),
        (_other_width, "(?s)mismatch|shape"),
        (_no_such_layer, "describes layer 17"),
        (_no_such_module, "describes layer 0"),
    ],
)
def test_descriptions_that_do_not_fit(change, message, damaged):
    assert_refused(damaged(change), message, (MoeCompressError, RuntimeError))


def test_another_architecture(native):
    """A class whose modules are elsewhere says so instead of loading nothing."""
    _, folder, _ = native("qwen3_moe")
    with pytest.raises(CheckpointError, match="doesn't fit LlamaForCausalLM"):
        transformers.LlamaForCausalLM.from_pretrained(folder)


def test_compressing_what_is_packed_already(native, tmp_path):
    """Neither loaded nor from the folder, in the same words."""
    _, folder, _ = native("qwen3_moe")
    passes = [{"quantize.mixed": {"bits": 8, "allocation": "uniform", "method": "rtn"}}]
    with pytest.raises(RecipeError, match="can't change this model: the experts of layer 0 are packed already") as told:
        moe_compress.compress(from_pretrained(folder), passes=passes)
    with pytest.raises(RecipeError, match=re.escape(str(told.value))):
        moe_compress.run({"model": str(folder), "output": str(tmp_path / "out"), "passes": passes})

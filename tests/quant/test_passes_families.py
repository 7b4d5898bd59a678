"""`quantize.mixed` on every family: what is computed in memory is what loads from disk, and more bits err less."""

import pytest
import torch
from families import discover, input_batch, tiny_model

import moe_compress
from moe_compress.model import MoEModel, families

# One of each layout; the others are in the slow part. See tests/reference.py.
FAST = ["qwen3_moe", "gpt_oss", "nemotron_h", "granitemoe"]
SUPPORTED = [name for name in discover() if families.refusal(name) is None]
every_family = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in SUPPORTED]
)


@torch.no_grad()
def logits(model):
    return model(**input_batch(model)).logits


def quantized(name, method, bits):
    """A model whose experts all got that width, the result, and the experts' weights before."""
    model = tiny_model(name)
    view = MoEModel.wrap(model)
    before = {i: view.block(i).experts.weights().map(torch.clone) for i in view.moe_layers}
    options = {"widths": [bits], "bits": 16, "group_size": -1, "method": method, "protect_super_experts": False}
    step = {"quantize.mixed": {**options, "allocation": "uniform"}}
    text = input_batch(model, batch=4, length=16)["input_ids"] if method == "gptq" else None
    return model, moe_compress.compress(model, passes=[step], calibration=text), before


def errors(result, before):
    """Layer → Σ (w − ŵ)² over all experts' matrices."""
    found = {}
    for layer, weights in before.items():
        after = dict(result.model.get_submodule(path_of(result, layer)).weights().items())
        found[layer] = sum(float((after[n] - w).square().sum()) for n, w in weights.matrices())
    return found


def path_of(result, layer):
    paths = [n for n, m in result.model.named_modules() if getattr(m, "kind", "") == "packed"]
    return next(p for p in paths if f".{layer}." in p)


@every_family
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_in_memory_and_from_disk(name, method, tmp_path):
    """The same logits, in memory, saved and loaded; and not those of before."""
    model, result, _ = quantized(name, method, 3)
    output = logits(model)
    assert output.isfinite().all()
    assert not torch.allclose(output, logits(tiny_model(name)), rtol=1e-3, atol=1e-3)
    result.save(tmp_path / "saved")
    loaded = moe_compress.load(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), output, rtol=1e-4, atol=1e-4)


@every_family
def test_more_bits_err_less(name):
    """Round-to-nearest in the weights, GPTQ in what it minimises: the outputs on the calibration text."""
    series = [errors(*quantized(name, "rtn", bits)[1:]) for bits in (2, 4, 8)]
    for layer in series[0]:
        assert series[0][layer] > 5 * series[1][layer] > 100 * series[2][layer] > 0
    left = []
    for bits in (2, 4, 8):
        _, result, _ = quantized(name, "gptq", bits)
        told = [e["quantize.mixed"] for layer in result.report["layers"] for e in layer["experts"]]
        visited = [e for e in told if e["tokens"]]
        assert visited
        assert all(e["down_error"] <= e["down_rtn_error"] for e in visited)
        left.append([sum(e[key] for e in visited) for key in visited[0] if key.endswith("up_error")])
    for two, four, eight in zip(*left, strict=True):
        assert two > 5 * four > 100 * eight >= 0

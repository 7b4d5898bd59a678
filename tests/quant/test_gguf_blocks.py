"""GGUF blocks: bytes against the `gguf` package, errors against brute force and slow references."""

import math

import gguf
import numpy as np
import pytest
import torch

from moe_compress.errors import InputError, RunError
from moe_compress.quant import gguf_quantize
from moe_compress.quant.gguf import _relative_error
from moe_compress.quant.gguf_blocks import TYPES, dequantize, join, split
from moe_compress.quant.gguf_quantize import quantize

NAMES = sorted(TYPES)
BLOCKS = sorted(n for n, t in TYPES.items() if t.kind != "plain")


def number(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weighted_error(weight: torch.Tensor, name: str, importance: torch.Tensor | None, **options) -> float:
    kind = TYPES[name]
    change = dequantize(quantize(weight, kind, importance, **options), kind).double() - weight.double()
    return float((change**2 * (1 if importance is None else importance.unsqueeze(-2).double())).sum())


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_format(name):
    kind = TYPES[name]
    assert (kind.number, (kind.weights, kind.size)) == (number(name), gguf.GGML_QUANT_SIZES[number(name)])


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_read_as_the_package_reads_them(name):
    kind = TYPES[name]
    blocks = torch.randint(0, 256, (40, 3 * kind.size), generator=generator(), dtype=torch.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks.numpy(), number(name))
    np.testing.assert_array_equal(dequantize(blocks, kind).numpy(), expected)  # bit for bit, or both not a number


@pytest.mark.parametrize("name", BLOCKS)
def test_fields_come_back_from_their_bytes(name):
    kind = TYPES[name]
    blocks = quantize(torch.randn(8, 2 * kind.weights, generator=generator()), kind)
    fields = split(blocks.view(-1, kind.size), kind)
    assert torch.equal(join(fields, kind).view(8, -1), blocks)
    top = len(kind.levels) - 1 if kind.levels else kind.high - kind.low
    assert int(fields.codes_NK.max()) <= top


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"])
def test_without_a_search_the_bytes_are_the_packages(name):
    weight = torch.randn(24, 512, generator=generator(3)) * 0.05
    weight[3, :256] = 0
    expected = gguf.quants.quantize(weight.numpy(), number(name)).view(np.uint8)
    np.testing.assert_array_equal(quantize(weight, TYPES[name], search=False).numpy(), expected)


def brute_force(weight: list[float], importance: list[float], levels: list[int]) -> float:
    """Least weighted error of one scale for all weights, over a fine grid of scales of either sign; plain loops."""
    best = math.inf
    largest = max(abs(w) for w in weight)
    reach = max(abs(level) for level in levels)
    for step in range(40, 400):
        for sign in (-1, 1):
            scale = float(np.float16(sign * largest / reach * step / 200))
            if scale == 0:
                continue
            error = 0.0
            for w, q in zip(weight, importance, strict=True):
                error += q * min((w - scale * level) ** 2 for level in levels)
            best = min(best, error)
    return best


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "IQ4_NL"])
def test_single_scales_come_close_to_the_best_there_is(name):
    kind = TYPES[name]
    levels = list(kind.levels) or list(range(kind.low, kind.high + 1))
    weight = torch.randn(4, 32, generator=generator(5))
    importance = torch.rand(32, generator=generator(6)) + 0.05
    ours = weighted_error(weight, name, importance)
    best = sum(brute_force(row, importance.tolist(), levels) for row in weight.tolist())
    assert best * 0.999 <= ours <= best * 1.06


def reference_affine(weight: np.ndarray, importance: np.ndarray, high: int, most: int, parts: int) -> float:
    """Error of one block of Q2_K, Q4_K or Q5_K, float64: each part's line from a grid search, then integers."""
    size = len(weight) // parts
    lines = []
    for part in range(parts):
        x, q = (v[part * size : (part + 1) * size] for v in (weight, importance))
        low, top = min(0.0, x.min()), x.max()
        best = (math.inf, 0.0, 0.0)
        for step in range(15):
            scale = (top - low) / (high - 0.7 + 0.1 * step)
            codes = np.clip(np.round((x - low) / scale), 0, high)
            design = np.stack([codes, np.ones_like(codes)], 1) * np.sqrt(q)[:, None]
            s, b = np.linalg.lstsq(design, x * np.sqrt(q), rcond=None)[0]
            if b > 0:
                s, b = (q * x * codes).sum() / (q * codes**2).sum(), 0.0
            error = (q * (x - s * codes - b) ** 2).sum()
            best = min(best, (error, s, b))
        lines.append(best[1:])
    d = float(np.float16(max(s for s, _ in lines) / most))
    m = float(np.float16(max(-b for _, b in lines) / most))
    total = 0.0
    for part, (s, b) in enumerate(lines):
        x, q = (v[part * size : (part + 1) * size] for v in (weight, importance))
        scale, offset = d * min(most, round(s / d)), m * min(most, round(-b / m)) if m else 0.0
        codes = np.clip(np.round((x + offset) / scale), 0, high) if scale else np.zeros_like(x)
        total += float((q * (x - scale * codes + offset) ** 2).sum())
    return total


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_K"])
@pytest.mark.parametrize("spread", [1, 4])
def test_k_blocks_are_as_good_as_a_plain_search(name, spread):
    kind = TYPES[name]
    weight = torch.randn(16, 256, generator=generator(7))
    importance = torch.rand(256, generator=generator(8)).pow(spread) + 0.01
    arguments = (importance.double().numpy(), kind.high, kind.scale_high, kind.subblocks)
    reference = sum(reference_affine(row.double().numpy(), *arguments) for row in weight)
    assert weighted_error(weight, name, importance) <= reference * 1.005


def reference_scaled(weight: np.ndarray, importance: np.ndarray, kind) -> float:
    """Error of one block of Q3_K, Q6_K or IQ4_XS, float64: weighted grid search per part, then integer scales."""
    levels = np.array(kind.levels or range(kind.low, kind.high + 1), dtype=np.float64)
    size = len(weight) // kind.subblocks

    def nearest(x: np.ndarray) -> np.ndarray:
        return levels[np.abs(x[:, None] - levels).argmin(1)]

    scales = []
    for part in range(kind.subblocks):
        x, q = (v[part * size : (part + 1) * size] for v in (weight, importance))
        largest = x[np.abs(x).argmax()]
        best = (-1.0, 0.0)
        for step in range(-9, 10):
            level = nearest(x * (levels[0] + 0.1 * step) / largest)
            gain = (q * x * level).sum() ** 2 / max((q * level**2).sum(), 1e-12)
            best = max(best, (gain, (q * x * level).sum() / max((q * level**2).sum(), 1e-12)))
        scales.append(best[1])
    d = float(np.float16(max(scales, key=abs) / kind.scale_low))
    total = 0.0
    for part, s in enumerate(scales):
        x, q = (v[part * size : (part + 1) * size] for v in (weight, importance))
        scale = d * min(kind.scale_high, max(kind.scale_low, round(s / d)))
        level = nearest(x / scale) if scale else np.zeros_like(x)
        total += float((q * (x - scale * level) ** 2).sum())
    return total


@pytest.mark.parametrize("name", ["Q3_K", "Q6_K", "IQ4_XS"])
@pytest.mark.parametrize("spread", [1, 4])
def test_scaled_blocks_are_as_good_as_a_plain_search(name, spread):
    weight = torch.randn(16, 256, generator=generator(9))
    importance = torch.rand(256, generator=generator(10)).pow(spread) + 0.01
    reference = sum(reference_scaled(row.double().numpy(), importance.double().numpy(), TYPES[name]) for row in weight)
    assert weighted_error(weight, name, importance) <= reference * 1.005


@pytest.mark.parametrize("name", BLOCKS)
def test_looking_and_weighing_both_pay(name):
    weight = torch.randn(32, 512, generator=generator(11)) * 0.02
    importance = torch.rand(512, generator=generator(12)).pow(4) + 1e-3
    searched = weighted_error(weight, name, importance)
    flat = dequantize(quantize(weight, TYPES[name]), TYPES[name])
    unweighted = float(((flat - weight).double() ** 2 * importance).sum())
    assert searched < unweighted < weighted_error(weight, name, importance, search=False)


@pytest.mark.parametrize("name", NAMES)
def test_experts_together_are_experts_alone(name, monkeypatch):
    weight = torch.randn(3, 8, 512, generator=generator(13))
    importance = torch.rand(3, 512, generator=generator(14))
    together = quantize(weight, TYPES[name], importance)
    assert together.shape == (3, 8, TYPES[name].row_bytes(512))
    monkeypatch.setattr(gguf_quantize, "CHUNK_WEIGHTS", {"cpu": 512 * 5})  # chunks that don't end with an expert
    assert torch.equal(quantize(weight, TYPES[name], importance), together)
    for expert in range(3):
        assert torch.equal(quantize(weight[expert], TYPES[name], importance[expert]), together[expert])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("search", [True, False])
def test_rows_of_nothing_stay_nothing(name, search):
    kind = TYPES[name]
    values = dequantize(quantize(torch.zeros(2, 256), kind, torch.rand(256) if search else None, search=search), kind)
    assert torch.equal(values.abs(), torch.zeros(2, 256))


@pytest.mark.parametrize("name", BLOCKS)
def test_channels_without_importance_are_not_lost(name):
    """Nobody used them in the calibration text; they still stay near their weights."""
    weight = torch.randn(16, 256, generator=generator(15))
    importance = torch.zeros(256)
    values = dequantize(quantize(weight, TYPES[name], importance), TYPES[name])
    assert float((values - weight).square().sum() / weight.square().sum()) < 0.25


@pytest.mark.parametrize("weighted", [False, True])
def test_the_reported_error(weighted):
    kind, weight_EOK = TYPES["Q4_K"], torch.randn(3, 4, 256, generator=generator(16))
    importance_EK = torch.rand(3, 256, generator=generator(17)) if weighted else None
    blocks = quantize(weight_EOK, kind, importance_EK)
    top = bottom = 0.0
    for e in range(3):
        values, exact = dequantize(blocks[e], kind).double(), weight_EOK[e].double()
        counts = importance_EK[e].double() if weighted else torch.ones(256, dtype=torch.float64)
        top, bottom = top + ((values - exact) ** 2 @ counts).sum(), bottom + (exact**2 @ counts).sum()
    assert _relative_error(weight_EOK, blocks, kind, importance_EK) == pytest.approx(float(top / bottom), rel=1e-5)
    zeros = torch.zeros(1, 4, 256)
    assert _relative_error(zeros, quantize(zeros, kind), kind, None) == 0  # a number that JSON has


def test_what_cannot_be_written_is_refused():
    with pytest.raises(InputError, match=r"rows of 128 weights are not whole blocks of 256 \(Q4_K\)"):
        quantize(torch.zeros(2, 128), TYPES["Q4_K"])
    with pytest.raises(InputError, match="importance has shape"):
        quantize(torch.zeros(2, 4, 256), TYPES["Q4_K"], torch.ones(3, 256))
    with pytest.raises(InputError, match="not negative"):
        quantize(torch.zeros(2, 256), TYPES["Q4_K"], -torch.ones(256))
    with pytest.raises(RunError, match="not finite"):
        quantize(torch.full((1, 256), math.inf), TYPES["Q4_K"])
    for name in BLOCKS:
        with pytest.raises(RunError, match=f"too large for {name}"):
            quantize(torch.randn(1, 256, generator=generator()) * 1e9, TYPES[name])

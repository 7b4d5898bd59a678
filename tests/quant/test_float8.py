"""Eight-bit floats against a table of all their values, and activations against loops in float64."""

import math

import pytest
import torch

from moe_compress.errors import InputError, RunError
from moe_compress.quant.float8 import (
    E4M3,
    _round,
    decode_float8,
    encode_float8,
    float8_scales,
    quantized_inputs,
    spread_scales,
)

# Every finite e4m3 number, by its bits: sign, four of exponent (bias 7), three of mantissa; 0x7f and 0xff are NaN.
VALUES = sorted(
    {
        sign * (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
        for sign in (1, -1)
        for e in range(16)
        for m in range(8)
        if (e, m) != (15, 7)
    }
)
BLOCKS = [(1, 24), (4, 6), (2, 24), (1, 6), (8, 1)]


def weights(seed=0, shape=(3, 8, 24)):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight *= 10.0 ** torch.randint(-3, 3, (*shape[:2], 1), generator=generator)  # rows of very different size
    weight[0, 0, 0] *= 50
    return weight


def nearest(value: float) -> float:
    """The e4m3 number nearest to a value, of two the one with an even mantissa; beyond 448, ±448."""
    return min(VALUES, key=lambda v: (abs(v - value), round(abs(v) / 2.0 ** max(_exponent(v) - 3, -9)) % 2))


def _exponent(value: float) -> int:
    return math.floor(math.log2(abs(value))) if value else -9


def tiles(block, shape=(3, 8, 24)):
    rows, columns = block
    for e in range(shape[0]):
        for m in range(shape[1] // rows):
            for n in range(shape[2] // columns):
                yield (e, m, n), (e, slice(m * rows, (m + 1) * rows), slice(n * columns, (n + 1) * columns))


def test_the_table_is_the_dtype():
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    assert sorted(set(codes[codes.isfinite()].tolist())) == VALUES


def test_decoding_gives_the_table():
    every = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8).view(E4M3)
    decoded = decode_float8(every)
    assert torch.equal(decoded, every.float())
    assert sorted(set(decoded.tolist())) == VALUES
    assert decode_float8(every.view(2, 127)).shape == (2, 127)


def test_rounding_is_what_the_dtype_does():
    """Every halfway point between neighbours, what lies just beside it, and everything that is tiny."""
    values = torch.tensor(VALUES, dtype=torch.float64)
    middles = ((values[1:] + values[:-1]) / 2).float()
    inf = torch.tensor(float("inf"))
    tiny = torch.randn(1000, generator=torch.Generator().manual_seed(5)) * torch.logspace(-44, 0, 1000)
    value = torch.cat([middles, middles.nextafter(inf), middles.nextafter(-inf), values.float(), tiny])
    assert torch.equal(_round(value.clone()), value.to(E4M3).float())


@pytest.mark.parametrize("block", BLOCKS)
def test_codes_are_the_nearest_numbers(block):
    weight = weights()
    for search in ("none", "mse"):
        scale = float8_scales(weight, block, search)
        codes = encode_float8(weight, scale, block)
        assert codes.dtype == E4M3
        assert scale.dtype == torch.float32
        for at, part in tiles(block):
            for w, code in zip(weight[part].flatten().tolist(), codes[part].float().flatten().tolist(), strict=True):
                # The quotient that is rounded is a float32 number.
                assert code == nearest(float(torch.tensor(w) / scale[at]))


@pytest.mark.parametrize("block", BLOCKS)
def test_scales_without_search_put_the_largest_weight_on_448(block):
    weight = weights()
    scale = float8_scales(weight, block, "none")
    for at, part in tiles(block):
        assert float(scale[at]) == pytest.approx(float(weight[part].abs().max()) / 448, rel=1e-6)


def squared_error(weight, scale):
    """Of one block at one scale, in float64 with the table."""
    table = torch.tensor(VALUES, dtype=torch.float64)
    ratio = weight.double().flatten() / scale
    return float(((ratio[:, None] - table).abs().amin(1) * scale).square().sum())


@pytest.mark.parametrize("block", [(1, 96), (4, 24)])
def test_a_search_is_never_worse_and_near_the_best_of_a_fine_grid(block):
    weight = weights(1, (2, 8, 96))
    found, plain = float8_scales(weight, block), float8_scales(weight, block, "none")
    own, before, best = [], [], []
    for at, part in tiles(block, weight.shape):
        size = float(weight[part].double().square().sum())
        own.append(squared_error(weight[part], float(found[at])) / size)
        before.append(squared_error(weight[part], float(plain[at])) / size)
        tried = (squared_error(weight[part], float(plain[at]) * 2 ** (k / 64)) for k in range(-64, 64))
        best.append(min(tried) / size)
        assert own[-1] <= before[-1] * (1 + 1e-5)
    assert sum(own) < 1.25 * sum(best)  # of 96 weights; of a whole row the search comes closer
    assert sum(own) < 0.93 * sum(before)


def test_scaling_weights_scales_the_result():
    weight = weights(2)
    one, two = (float8_scales(w, (1, 24)) for w in (weight, weight * 2**5))
    assert torch.equal(two, one * 2**5)
    assert torch.equal(encode_float8(weight * 2**5, two, (1, 24)).float(), encode_float8(weight, one, (1, 24)).float())


def test_an_empty_block_has_scale_1_and_codes_0():
    weight = weights()
    weight[1, 2] = 0
    scale = float8_scales(weight, (1, 24))
    assert float(scale[1, 2, 0]) == 1
    assert not encode_float8(weight, scale, (1, 24))[1, 2].float().any()


@pytest.mark.parametrize("search", ["none", "mse"])
def test_weights_too_small_for_a_scale_are_zeros(search):
    """The largest weight over 448 is below all float32 numbers: no scale is 0, which would make codes NaN."""
    weight = torch.zeros(1, 1, 24)
    weight[0, 0, 3] = 1e-44
    scale = float8_scales(weight, (1, 24), search)
    assert scale.tolist() == [[[1.0]]]
    assert not encode_float8(weight, scale, (1, 24)).float().any()


@pytest.mark.parametrize("block", BLOCKS)
def test_spread_scales_are_those_of_their_block(block):
    scale = float8_scales(weights(), block)
    spread = spread_scales(scale, block).expand(3, 8, 24)
    for at, part in tiles(block):
        assert (spread[part] == scale[at]).all()


def test_chunks_do_not_matter(monkeypatch):
    weight = weights()
    scale = float8_scales(weight, (4, 6))
    codes = encode_float8(weight, scale, (4, 6))
    monkeypatch.setattr("moe_compress.quant.float8.CHUNK_WEIGHTS", {"cpu": 1, "cuda": 1})
    assert torch.equal(float8_scales(weight, (4, 6)), scale)
    assert torch.equal(encode_float8(weight, scale, (4, 6)).float(), codes.float())


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="blocks of 3×24 don't tile matrices of 8×24"):
        float8_scales(weights(), (3, 24))
    with pytest.raises(InputError, match="unknown search 'pnorm'"):
        float8_scales(weights(), (1, 24), "pnorm")
    with pytest.raises(RunError, match="NaN or infinity"):
        float8_scales(weights() * float("inf"), (1, 24))


# --- activations -----------------------------------------------------------------------------------------------------


def rows():
    value = torch.randn(7, 256, generator=torch.Generator().manual_seed(4)) * torch.logspace(-9, 4, 7)[:, None]
    value[3] = 0
    value[4, :128] = 0
    return value


@pytest.mark.parametrize("share", [-1, 128])
@pytest.mark.parametrize("is_float", [False, True])
def test_activations_are_quantized_token_by_token_as_servers_do(share, is_float):
    value = rows()
    found = quantized_inputs(value, share, is_float)
    size = 256 if share == -1 else share
    levels = 448 if is_float else 127
    for row in range(7):
        for start in range(0, 256, size):
            part = value[row, start : start + size].double()
            scale = max(float(part.abs().max()), 1e-10) / levels
            if is_float and share == -1:
                scale = max(scale, 1 / (448 * 512))
            for k, x in enumerate(part.tolist()):
                expected = (nearest(x / scale) if is_float else round(x / scale)) * scale
                own = float(found[row, start + k])
                if own != pytest.approx(expected, rel=1e-6, abs=1e-30):
                    # A tie in exact arithmetic may fall to the other side in float32: never by more than that.
                    step = scale if not is_float else scale * 2.0 ** max(_exponent(x / scale) - 3, -9)
                    assert abs(abs(x - own) - abs(x - expected)) < 1e-5 * step


def test_activations_keep_shape_and_become_float32():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = quantized_inputs(torch.randn(5, 128).to(dtype), -1, False)
        assert (found.dtype, found.shape) == (torch.float32, (5, 128))
    assert quantized_inputs(torch.zeros(0, 128), 128, True).shape == (0, 128)


def test_integers_are_what_they_should_be():
    """What is multiplied are integers: 127 levels on each side, the largest magnitude exactly on the last."""
    value = rows()
    found = quantized_inputs(value, -1, False)
    scale = value.abs().amax(1, keepdim=True) / 127
    ratio = (found / scale)[value.abs().amax(1) > 0]
    torch.testing.assert_close(ratio, ratio.round(), rtol=0, atol=1e-4)
    assert (ratio.abs().amax(1) - 127).abs().max() < 1e-4

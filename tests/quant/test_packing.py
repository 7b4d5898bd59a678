import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_compress.errors import InputError
from moe_compress.quant import packing, trits
from moe_compress.quant.packing import pack, packed_words, unpack

WIDTHS = range(1, 9)


def random_codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def as_integer(words_W: torch.Tensor) -> int:
    """The row as one number, word 0 lowest."""
    return sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words_W))


@settings(max_examples=200, deadline=None)
@given(
    bits=st.integers(1, 8),
    lead=st.lists(st.integers(1, 3), max_size=3),
    columns=st.integers(1, 150),
    seed=st.integers(0, 1000),
)
def test_round_trip_and_layout(bits, lead, columns, seed):
    codes = random_codes(bits, *lead, columns, seed=seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (*lead, packed_words(columns, bits))
    assert torch.equal(unpack(words, bits, columns), codes)
    # The definition, and with it that the bits left over are 0.
    row_codes, row_words = codes.reshape(-1, columns)[-1], words.reshape(-1, words.shape[-1])[-1]
    assert as_integer(row_words) == sum(int(code) << (bits * i) for i, code in enumerate(row_codes))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 100, 768])
def test_same_words_as_compressed_tensors(bits, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(bits, 3, 5, columns)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(pack(codes, bits), theirs)
    assert torch.equal(unpack(theirs, bits, columns), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_at_every_place(bits):
    codes = torch.arange(1 << bits).to(torch.uint8)[:, None].expand(-1, 32).clone()
    assert torch.equal(unpack(pack(codes, bits), bits, 32), codes)
    alone = torch.zeros(32, 32, dtype=torch.uint8)
    alone.fill_diagonal_((1 << bits) - 1)
    assert torch.equal(unpack(pack(alone, bits), bits, 32), alone)
    assert pack(alone, bits).shape == (32, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_chunks_do_not_matter(bits, monkeypatch):
    codes = random_codes(bits, 7, 11, 96)
    words = pack(codes, bits)
    monkeypatch.setitem(packing.CHUNK_CODES, "cpu", 40)
    assert torch.equal(pack(codes, bits), words)
    assert torch.equal(unpack(words, bits, 96), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_input_and_no_shared_memory(bits):
    codes = random_codes(bits, 64, 4)
    words = pack(codes.t(), bits)
    assert torch.equal(words, pack(codes.t().contiguous(), bits))
    assert torch.equal(unpack(words.t().contiguous().t(), bits, 64), codes.t())
    row = random_codes(bits, 64)
    packed = pack(row, bits)
    restored = unpack(packed, bits, 64)
    packed.zero_()
    assert torch.equal(restored, row)
    assert torch.equal(row, random_codes(bits, 64))


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_rows(bits):
    words = pack(torch.zeros(0, 3, 40, dtype=torch.uint8), bits)
    assert words.shape == (0, 3, packed_words(40, bits))
    assert unpack(words, bits, 40).shape == (0, 3, 40)


@settings(max_examples=100, deadline=None)
@given(lead=st.lists(st.integers(0, 3), max_size=2), columns=st.integers(1, 90), seed=st.integers(0, 1000))
def test_ternary_round_trip_and_layout(lead, columns, seed):
    codes = torch.randint(0, 3, (*lead, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = pack(codes, 1.58)
    assert words.dtype == torch.int32
    assert words.shape == (*lead, packed_words(columns, 1.58)) == (*lead, -(-columns // 20))
    assert torch.equal(unpack(words, 1.58, columns), codes)
    if codes.numel():  # the definition: byte j is the number with the digits 5j to 5j + 4, and nothing follows
        row_codes, row_words = codes.reshape(-1, columns)[-1].tolist(), words.reshape(-1, words.shape[-1])[-1]
        digits = row_codes + [0] * (20 * len(row_words) - columns)
        stream = as_integer(row_words).to_bytes(4 * len(row_words), "little")
        assert [sum(d * 3**i for i, d in enumerate(digits[5 * j : 5 * j + 5])) for j in range(len(stream))] == [*stream]


def test_every_ternary_byte_and_chunks(monkeypatch):
    codes = torch.cartesian_prod(*[torch.arange(3)] * 5).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, 1.58), 1.58, 5), codes)
    words = pack(codes.view(5, -1), 1.58)
    monkeypatch.setitem(trits.CHUNK_BYTES, "cpu", 7)
    assert torch.equal(unpack(words, 1.58, 243), codes.view(5, -1))
    with pytest.raises(InputError, match="a code of 3 isn't ternary"):
        pack(codes + 1, 1.58)
    with pytest.raises(InputError, match=r"20 codes of 1.58 bits are int32 \[..., 1\]"):
        unpack(words, 1.58, 20)


def test_errors():
    codes = random_codes(3, 2, 32)
    for bits in (0, 9, -1):
        with pytest.raises(InputError, match="1 to 8 bits"):
            pack(codes, bits)
        with pytest.raises(InputError, match="1 to 8 bits"):
            unpack(pack(codes, 3), bits, 32)
    with pytest.raises(InputError, match="uint8"):
        pack(codes.to(torch.int32), 3)
    with pytest.raises(InputError, match="a code of 4 doesn't fit 2 bits"):
        pack(torch.tensor([1, 4], dtype=torch.uint8), 2)
    with pytest.raises(InputError, match=r"int32 \[..., 3\]"):
        unpack(pack(codes, 3)[:, :2], 3, 32)
    with pytest.raises(InputError, match="int32"):
        unpack(pack(codes, 3).long(), 3, 32)

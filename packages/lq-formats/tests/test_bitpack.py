import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lq_formats import (
    DTypeError,
    ShapeError,
    SpecError,
    dequantize_i4_pack8,
    pack_bits,
    pack_int4,
    packed_items,
    unpack_bits,
    unpack_int4,
)

DTYPES = [torch.uint8, torch.int16, torch.int32]


def stream_of(codes, bits, item_bytes):
    """The bit stream as a Python integer, cut into little-endian items: the definition, one bit at a time."""
    stream = 0
    for i, code in enumerate(codes):
        for b in range(bits):
            stream |= (code >> b & 1) << (bits * i + b)
    items = -(-len(codes) * bits // (8 * item_bytes))
    octets = stream.to_bytes(items * item_bytes, "little")
    signed = item_bytes > 1
    return [
        int.from_bytes(octets[i : i + item_bytes], "little", signed=signed) for i in range(0, len(octets), item_bytes)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 31, 32, 33, 65])
def test_equals_the_definition(bits, count, dtype):
    generator = torch.Generator().manual_seed(bits * 100 + count)
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=generator)
    packed = pack_bits(codes, bits, dtype)
    assert packed.dtype == dtype
    assert packed.tolist() == stream_of(codes.tolist(), bits, dtype.itemsize)
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.integers(1, 8), dtype=st.sampled_from(DTYPES))
def test_round_trip_of_any_codes(data, bits, dtype):
    rows = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack_bits(codes, bits, dtype)
    assert packed.tolist() == stream_of(rows, bits, dtype.itemsize)
    assert unpack_bits(packed, bits, len(rows)).tolist() == rows


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 17), (0, 8), (4, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("bits", [3, 4])
def test_leading_dimensions(shape, bits):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    for dtype in DTYPES:
        packed = pack_bits(codes, bits, dtype)
        assert packed.shape == (*shape[:-1], packed_items(shape[-1], bits, dtype))
        assert torch.equal(unpack_bits(packed, bits, shape[-1]), codes)


def test_strided_input():
    codes = torch.randint(0, 8, (33, 6), dtype=torch.uint8)
    packed = pack_bits(codes.t(), 3, torch.int32)
    assert torch.equal(packed, pack_bits(codes.t().contiguous(), 3, torch.int32))
    assert torch.equal(unpack_bits(packed.t().contiguous().t(), 3, 33), codes.t())


def test_four_bits_are_the_canonical_int4():
    codes = torch.randint(0, 16, (5, 43), dtype=torch.uint8)
    assert torch.equal(pack_bits(codes, 4, torch.int32), pack_int4(codes))


def test_golden_bytes():
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)
    # 000 111 110 101 100 011 010 001, eight bits at a time from the right.
    assert pack_bits(codes, 3).tolist() == [0b11010001, 0b01011000, 0b00011111]
    assert pack_bits(codes, 4).tolist() == [0x21, 0x43, 0x65, 0x07]
    assert pack_bits(codes, 4, torch.int32).tolist() == [0x07654321]
    assert pack_bits(torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1], dtype=torch.uint8), 1).tolist() == [13, 1]


def test_bad_input_is_named():
    codes = torch.tensor([[1, 2]], dtype=torch.uint8)
    for bits in (0, 9, 3.0, None):
        with pytest.raises(SpecError, match=f"bits={bits}: expected an integer from 1 to 8"):
            pack_bits(codes, bits)
    with pytest.raises(SpecError, match="does not fit 1 bits"):
        pack_bits(codes, 1)
    with pytest.raises(DTypeError, match="int64"):
        pack_bits(codes, 4, torch.int64)
    with pytest.raises(DTypeError, match=r"codes have dtype torch\.int32"):
        pack_bits(codes.int(), 4)
    with pytest.raises(ShapeError, match="scalar"):
        pack_bits(torch.tensor(1, dtype=torch.uint8), 4)
    with pytest.raises(ShapeError, match="3 codes of 4 bits need 2 items"):
        unpack_bits(pack_bits(codes, 4), 4, 3)
    with pytest.raises(ShapeError, match="count=-1"):
        packed_items(-1, 4)
    with pytest.raises(DTypeError, match="float32"):
        unpack_bits(torch.zeros(1, 1), 4, 2)


def test_a_dimension_of_one_may_have_any_stride():
    """As after a checkpoint's tensor of one word a row is turned: ``contiguous()`` leaves it as it is."""
    words = pack_int4(torch.arange(40, dtype=torch.uint8).reshape(5, 8) % 16)
    turned = words.reshape(1, 5).t()
    assert turned.stride() != words.stride()
    assert torch.equal(unpack_int4(turned, 8), unpack_int4(words, 8))
    for bits in (2, 4, 8):
        assert torch.equal(unpack_bits(turned, bits, 32 // bits), unpack_bits(words, bits, 32 // bits))
    scales = torch.ones(5, 1)
    assert torch.equal(dequantize_i4_pack8(turned, scales, 8), dequantize_i4_pack8(words, scales, 8))

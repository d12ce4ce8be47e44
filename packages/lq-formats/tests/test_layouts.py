"""Code layouts: one tensor, exact both ways, equal to a loop over the diagram."""

import pytest
import torch
from lq_formats import DTypeError, ShapeError, SizeOverflowError, SpecError, pack_int4
from lq_formats.layouts import GEMLITE, INT4, INT8

ITEMS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def random_codes(rows, columns, bits):
    generator = torch.Generator().manual_seed(rows * 1000 + columns + bits)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 30), (5, 64), (0, 16)])
def test_int4_round_trip(rows, columns):
    codes = random_codes(rows, columns, 4)
    packed = INT4.pack(codes)
    assert packed.shape == INT4.packed_shape(rows, columns)
    assert torch.equal(packed, pack_int4(codes))
    assert torch.equal(INT4.unpack(packed, columns), codes)


def test_int8_flips_the_sign_bit():
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    packed = INT8.pack(codes)
    assert packed.dtype == torch.int8
    assert packed.shape == INT8.packed_shape(2, 128)
    assert packed.flatten().tolist() == list(range(-128, 128))
    assert torch.equal(INT8.unpack(packed), codes)
    assert torch.equal(INT8.unpack(packed, 128), codes)
    with pytest.raises(ShapeError, match="expected in_features=64"):
        INT8.unpack(packed, 64)
    with pytest.raises(DTypeError, match="expected int8"):
        INT8.unpack(codes)


def gemlite_loop(codes, bits, width):
    """Item (i, n) = sum of codes[n, i * E + j] << bits * j, as a signed number of the item's width (8: unsigned)."""
    per_item = width // bits
    rows, columns = codes.shape
    values = [
        [sum(int(codes[n, i * per_item + j]) << (bits * j) for j in range(per_item)) for n in range(rows)]
        for i in range(columns // per_item)
    ]
    if width == 8:
        return values
    return [[v - 2**width if v >= 2 ** (width - 1) else v for v in line] for line in values]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 64), (16, 96)])
def test_gemlite_equals_the_loop(bits, width, rows, columns):
    codes = random_codes(rows, columns, bits)
    packed = GEMLITE.pack(codes, bits, width)
    assert packed.dtype == ITEMS[width]
    assert packed.is_contiguous()
    assert packed.shape == GEMLITE.packed_shape(rows, columns, bits, width)
    assert packed.tolist() == gemlite_loop(codes, bits, width)
    assert torch.equal(GEMLITE.unpack(packed, bits), codes)


def test_gemlite_golden_words():
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8]], dtype=torch.uint8)
    assert GEMLITE.pack(codes).tolist() == [[0x76543210, 0x89ABCDEF - 2**32]]
    assert GEMLITE.pack(codes, 4, 8).tolist() == [[0x10, 0xEF], [0x32, 0xCD], [0x54, 0xAB], [0x76, 0x89]]
    assert GEMLITE.pack(codes, 8, 32).tolist() == [[0x03020100, 0x0C0D0E0F], [0x07060504, 0x08090A0B]]


def test_gemlite_default_is_the_canonical_layout_transposed():
    codes = random_codes(8, 64, 4)
    assert torch.equal(GEMLITE.pack(codes), INT4.pack(codes).t())


def test_bad_input_is_named():
    codes = random_codes(2, 20, 2)
    with pytest.raises(ShapeError, match="in_features=20 is not divisible by the 16 codes of 2 bits"):
        GEMLITE.pack(codes, 2)
    with pytest.raises(SpecError, match="1, 2, 4 or 8"):
        GEMLITE.pack(codes, 3)
    with pytest.raises(SpecError, match="packing_bitwidth=64"):
        GEMLITE.pack(codes, 4, 64)
    with pytest.raises(SpecError, match="does not fit 1 bits"):
        GEMLITE.pack(torch.full((1, 32), 2, dtype=torch.uint8), 1)
    with pytest.raises(DTypeError, match="int64"):
        GEMLITE.unpack(torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(ShapeError, match="expected"):
        GEMLITE.unpack(torch.zeros(4, dtype=torch.int32))
    with pytest.raises(SizeOverflowError):
        INT4.packed_shape(2**40, 2**40)

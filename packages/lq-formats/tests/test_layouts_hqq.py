"""HQQ's layout against loops over its documented bytes, and golden bytes."""

from dataclasses import replace

import pytest
import torch
from lq_formats import DTypeError, FormatError, GroupSizeError, ShapeError, SpecError, UnsupportedError
from lq_formats.layouts import HQQ, AffineWeight


def random_weight(rows, columns, groups, bits=4, scale_dtype=torch.float16):
    generator = torch.Generator().manual_seed(rows + columns + groups + bits)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).to(scale_dtype)
    zero = (torch.rand(rows, groups, generator=generator) * 2**bits - 0.5).to(scale_dtype)
    return AffineWeight(codes, scale, zero, bits)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "columns", "groups"), [(8, 64, 2), (32, 96, 12), (5, 64, 8), (16, 40, 1)])
def test_equals_its_bytes_and_comes_back(bits, scale_dtype, rows, columns, groups):
    weight = random_weight(rows, columns, groups, bits, scale_dtype)
    tensors = HQQ.pack(weight)
    shapes = HQQ.packed_shape(rows, columns, groups, bits)
    assert {name: tuple(tensors[name].shape) for name in shapes} == shapes
    size, height = columns // groups, rows * groups * bits // 8
    expected = [[0] * size for _ in range(height)]
    for n in range(rows):
        for k in range(columns):
            group = n * groups + k // size
            block, byte = divmod(group, height)
            expected[byte][k % size] += int(weight.codes[n, k]) << (8 - bits * (block + 1))
    assert tensors["W_q"].tolist() == expected
    for n in range(rows):
        for g in range(groups):
            assert tensors["scale"][n * groups + g, 0] == weight.scale[n, g]
            assert tensors["zero"][n * groups + g, 0] == weight.zero[n, g]
    back = HQQ.unpack(tensors)
    assert (back.bits, back.g_idx) == (bits, None)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(back, name), getattr(weight, name))
        assert getattr(back, name).dtype == getattr(weight, name).dtype


def test_golden_bytes():
    codes = torch.stack((torch.arange(8), torch.arange(15, 7, -1))).to(torch.uint8)
    scale = torch.tensor([[0.5], [2.0]]).half()
    tensors = HQQ.pack(AffineWeight(codes, scale, torch.tensor([[7.25], [8.0]]).half()))
    assert tensors["W_q"].tolist() == [[0x0F, 0x1E, 0x2D, 0x3C, 0x4B, 0x5A, 0x69, 0x78]]
    assert tensors["zero"].tolist() == [[7.25], [8.0]]
    assert tensors["shape"].tolist() == [2, 8]
    assert bytes(tensors["packing"].tolist()) == b"4bit_u8"
    assert bytes(tensors["compute_dtype"].tolist()) == b"torch.float16"
    assert [int(tensors[name]) for name in ("nbits", "axis", "group_size", "quant_zero")] == [4, 1, 8, 0]
    assert HQQ.unpack(tensors).dequantize()[0, 0] == -7.25 * 0.5


def test_symmetric_and_integer_zeros_become_floats():
    weight = random_weight(8, 64, 2)
    assert (HQQ.unpack(HQQ.pack(replace(weight, zero=None))).zero == 8).all()
    integers = replace(weight, zero=torch.arange(16, dtype=torch.uint8).reshape(8, 2))
    assert torch.equal(HQQ.unpack(HQQ.pack(integers)).zero, integers.zero.half())
    assert torch.equal(HQQ.unpack(HQQ.pack(integers)).dequantize(), integers.dequantize())


def test_what_cannot_be_read_is_named():
    tensors = HQQ.pack(random_weight(8, 64, 2))
    for old in ("scale_q", "zero_q"):
        with pytest.raises(UnsupportedError, match="packed"):
            HQQ.unpack({**tensors, old: torch.zeros(1)})
    with pytest.raises(UnsupportedError, match="axis=0"):
        HQQ.unpack({**tensors, "axis": torch.tensor(0)})
    with pytest.raises(UnsupportedError, match=r"groups of 32 .* do not run along"):
        HQQ.unpack({**tensors, "shape": torch.tensor([16, 16])})
    with pytest.raises(UnsupportedError, match="3bit_32"):
        HQQ.unpack({**tensors, "packing": torch.tensor(list(b"3bit_32"), dtype=torch.uint8)})
    with pytest.raises(UnsupportedError, match="3 bits"):
        HQQ.unpack({**tensors, "nbits": torch.tensor(3)})
    with pytest.raises(FormatError, match="expected one integer"):
        HQQ.unpack({**tensors, "nbits": torch.tensor([4, 4])})
    for axis in (torch.tensor(1j), torch.tensor(1.0), torch.tensor([])):
        with pytest.raises(FormatError, match=r"'axis' is \(.* expected one integer"):
            HQQ.unpack({**tensors, "axis": axis})
    assert torch.equal(HQQ.unpack({**tensors, "axis": torch.tensor(True)}).codes, HQQ.unpack(tensors).codes)
    with pytest.raises(DTypeError, match="'W_q' is of type int: expected"):
        HQQ.unpack({**tensors, "W_q": 5})
    with pytest.raises(FormatError, match="expected characters"):
        HQQ.unpack({**tensors, "packing": torch.zeros(1000, dtype=torch.uint8)})
    with pytest.raises(FormatError, match=r"expected \[out_features, in_features\]"):
        HQQ.unpack({**tensors, "shape": torch.tensor([8, -64])})
    with pytest.raises(ShapeError, match="'W_q' has shape"):
        HQQ.unpack({**tensors, "shape": torch.tensor([16, 64])})
    with pytest.raises(ShapeError, match="'zero' has shape"):
        HQQ.unpack({**tensors, "zero": torch.zeros(4, 1).half()})
    with pytest.raises(DTypeError, match="'zero' has dtype"):
        HQQ.unpack({**tensors, "zero": torch.zeros(16, 1)})
    for name in ("W_q", "scale", "zero", "shape", "nbits"):
        with pytest.raises(FormatError, match=f"has no tensor '{name}'"):
            HQQ.unpack({key: value for key, value in tensors.items() if key != name})


def test_what_the_format_cannot_hold_is_named():
    with pytest.raises(UnsupportedError, match="g_idx"):
        HQQ.pack(replace(random_weight(8, 64, 2), g_idx=torch.zeros(64, dtype=torch.int32)))
    with pytest.raises(ShapeError, match="equal blocks"):
        HQQ.pack(random_weight(5, 64, 1))
    with pytest.raises(SpecError, match="bits=3"):
        HQQ.pack(random_weight(8, 64, 2, 3))
    with pytest.raises(GroupSizeError):
        HQQ.packed_shape(8, 64, 3)
    with pytest.raises(SpecError, match="does not fit 4 bits"):
        HQQ.pack(replace(random_weight(8, 64, 2), codes=torch.full((8, 64), 16, dtype=torch.uint8)))

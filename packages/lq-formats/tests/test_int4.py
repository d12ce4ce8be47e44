import pytest
import torch
from lq_formats import (
    DTypeError,
    GroupSizeError,
    NonFiniteError,
    QuantSpec,
    ShapeError,
    SpecError,
    choose_qparams,
    dequantize_i4_pack8,
    pack_int4,
    quantize_affine,
    quantize_i4_pack8,
    unpack_int4,
)


def word(nibbles):
    value = sum(nibble << (4 * j) for j, nibble in enumerate(nibbles))
    return value - 2**32 if value >= 2**31 else value


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 30, 31, 64])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_pack_equals_the_diagram(rows, columns):
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack_int4(codes)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-columns // 8))
    assert packed.tolist() == [[word(row[i : i + 8]) for i in range(0, columns, 8)] for row in codes.tolist()]
    assert torch.equal(unpack_int4(packed, columns), codes)


def test_golden_words():
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 15, 14, 13]], dtype=torch.uint8)
    assert pack_int4(codes).tolist() == [[0x76543210, 0x00000DEF]]
    assert pack_int4(torch.full((1, 8), 15, dtype=torch.uint8)).tolist() == [[-1]]
    assert pack_int4(torch.full((1, 8), 8, dtype=torch.uint8)).tolist() == [[0x88888888 - 2**32]]


def test_pack_of_strided_codes():
    codes = torch.randint(0, 16, (16, 5), dtype=torch.uint8)
    assert torch.equal(pack_int4(codes.t()), pack_int4(codes.t().contiguous()))
    assert torch.equal(pack_int4(codes[:, :1].t()), pack_int4(codes[:, 0].clone().unsqueeze(0)))


@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 192, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_both_packings_hold_the_codes_of_affine(group_size, dtype):
    w = torch.randn(5, 192, generator=torch.Generator().manual_seed(1)).to(dtype)
    w[2] = 0
    spec = QuantSpec(4, "row") if group_size == -1 else QuantSpec(4, "group", group_size)
    scale, _ = choose_qparams(w, spec)
    codes = quantize_affine(w, scale, None, spec)
    words, scales = quantize_i4_pack8(w, group_size)
    octets, scales8 = quantize_i4_pack8(w, group_size, torch.int8)
    assert torch.equal(scales, scale)
    assert torch.equal(scales8, scale)
    assert torch.equal(words, pack_int4(codes))
    assert octets.dtype == torch.int8
    assert torch.equal(octets, words.view(torch.int8))
    back = dequantize_i4_pack8(words, scales, group_size)
    assert back.dtype == torch.float32
    assert torch.equal(back, dequantize_i4_pack8(octets, scales, group_size))
    assert torch.equal(back, (codes.float() - 8) * scale.repeat_interleave(192 // scale.shape[1], dim=1))
    assert (back[2] == 0).all()


@pytest.mark.parametrize("pack_dtype", [torch.int32, torch.int8], ids=str)
def test_packed_is_a_quarter_of_fp16(pack_dtype):
    w = torch.randn(16, 512, dtype=torch.float16)
    packed, scales = quantize_i4_pack8(w, pack_dtype=pack_dtype)
    assert packed.nbytes * 4 == w.nbytes
    assert scales.shape == (16, 2)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_are_stored_as_asked(scale_dtype):
    w = torch.randn(4, 64)
    packed, scales = quantize_i4_pack8(w, 32, scale_dtype=scale_dtype)
    assert scales.dtype == scale_dtype
    back = dequantize_i4_pack8(packed, scales, 32, dtype=torch.bfloat16)
    assert back.dtype == torch.bfloat16


# Mean absolute error on N(0, 1): the figures that are published for these schemes.
@pytest.mark.parametrize(("group_size", "expected"), [(-1, 0.1415), (128, 0.1002), (256, 0.1083)])
def test_error_on_a_normal_matrix(group_size, expected):
    w = torch.randn(2048, 8192, generator=torch.Generator().manual_seed(0))
    packed, scales = quantize_i4_pack8(w, group_size)
    error = (dequantize_i4_pack8(packed, scales, group_size) - w).abs().mean().item()
    assert error == pytest.approx(expected, rel=5e-3)


def test_bad_input_is_named():
    w = torch.randn(2, 64)
    with pytest.raises(ShapeError, match="in_features=36 is not divisible by the 8 codes"):
        quantize_i4_pack8(torch.randn(2, 36), -1)
    with pytest.raises(GroupSizeError, match="group_size=256 does not divide in_features=64"):
        quantize_i4_pack8(w)
    with pytest.raises(GroupSizeError, match="at least 8"):
        quantize_i4_pack8(w, 4)
    with pytest.raises(DTypeError, match=r"torch\.int32 \(8 codes an item\) or torch\.int8"):
        quantize_i4_pack8(w, 32, torch.uint8)
    with pytest.raises(DTypeError, match="weight has dtype"):
        quantize_i4_pack8(w.int(), 32)
    with pytest.raises(NonFiniteError):
        quantize_i4_pack8(w.fill_(torch.inf), 32)
    with pytest.raises(SpecError, match="hold 16"):
        pack_int4(torch.full((1, 8), 16, dtype=torch.uint8))
    with pytest.raises(DTypeError, match="uint8"):
        pack_int4(torch.zeros(1, 8, dtype=torch.int8))
    with pytest.raises(ShapeError, match=r"in_features=15\.5: expected an integer"):
        unpack_int4(torch.zeros(2, 2, dtype=torch.int32), 15.5)
    with pytest.raises(ShapeError, match="2 words a row: in_features=17 needs 3"):
        unpack_int4(torch.zeros(1, 2, dtype=torch.int32), 17)
    with pytest.raises(DTypeError, match="int32 words"):
        unpack_int4(torch.zeros(1, 8, dtype=torch.int8), 16)
    packed, scales = quantize_i4_pack8(torch.randn(2, 64), 32)
    with pytest.raises(ShapeError, match="scale has shape"):
        dequantize_i4_pack8(packed, scales, 16)


def test_unpacking_compiles_into_one_graph():
    packed, scales = quantize_i4_pack8(torch.randn(4, 64), 32)
    compiled = torch.compile(dequantize_i4_pack8, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed, scales, 32), dequantize_i4_pack8(packed, scales, 32))
    unpack = torch.compile(unpack_int4, fullgraph=True, backend="aot_eager")
    assert torch.equal(unpack(packed, 64), unpack_int4(packed, 64))

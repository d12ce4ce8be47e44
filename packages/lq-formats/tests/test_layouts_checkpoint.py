"""Checkpoint layouts: GPTQ, AWQ and compressed-tensors against loops over their documented words, and golden words."""

from dataclasses import replace

import pytest
import torch
from lq_formats import (
    DeviceError,
    DTypeError,
    FormatError,
    GroupSizeError,
    QuantSpec,
    ShapeError,
    SpecError,
    UnsupportedError,
    choose_qparams,
    dequantize_affine,
    quantize_affine,
)
from lq_formats.layouts import AWQ, COMPRESSED_TENSORS, GPTQ, GPTQ_V2, AffineWeight, GPTQLayout

SHAPES = [
    pytest.param(8, 64, 2, id="N8-K64-g32"),
    pytest.param(32, 96, 12, id="N32-K96-g8"),
    pytest.param(64, 128, 1, id="N64-K128-row"),
    pytest.param(96, 32, 1, id="N96-K32-row"),
]


def random_weight(rows, columns, groups, bits=4, *, symmetric=False, scale_dtype=torch.float16, g_idx=False):
    generator = torch.Generator().manual_seed(rows + columns + groups + bits)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).to(scale_dtype)
    order = None
    if g_idx:
        order = (torch.randperm(columns, generator=generator) // (columns // groups)).to(torch.int32)
    return AffineWeight(codes, scale, None if symmetric else zero, bits, order)


def assert_same(ours, expected):
    assert ours.bits == expected.bits
    assert torch.equal(ours.codes, expected.codes)
    assert torch.equal(ours.scale, expected.scale)
    assert ours.scale.dtype == expected.scale.dtype
    for a, b in ((ours.zero, expected.zero), (ours.g_idx, expected.g_idx)):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def signed(value):
    return value - 2**32 if value >= 2**31 else value


def words_down(matrix, bits):
    """Pack each column of integers densely into words, one bit stream per column, as a list of rows."""
    columns = []
    for column in zip(*matrix, strict=True):
        stream = sum(value << (bits * i) for i, value in enumerate(column))
        count = -(-len(column) * bits // 32)
        columns.append([signed(stream >> (32 * i) & 0xFFFFFFFF) for i in range(count)])
    return [list(row) for row in zip(*columns, strict=True)]


def transposed(rows):
    return [list(row) for row in zip(*rows, strict=True)]


@pytest.mark.parametrize("layout", [GPTQ, GPTQ_V2], ids=lambda layout: layout.name)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "groups"), SHAPES[1:])
@pytest.mark.parametrize("act_order", [False, True], ids=["", "desc_act"])
def test_gptq_equals_its_words_and_comes_back(layout, bits, rows, columns, groups, act_order):
    weight = random_weight(rows, columns, groups, bits, g_idx=act_order and groups > 1)
    tensors = layout.pack(weight)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == layout.packed_shape(
        rows, columns, groups, bits
    )
    assert tensors["qweight"].tolist() == words_down(weight.codes.t().tolist(), bits)
    stored = [[(z - layout.zero_offset) % 2**bits for z in row] for row in weight.zero.tolist()]
    assert tensors["qzeros"].tolist() == transposed(words_down(stored, bits))
    assert torch.equal(tensors["scales"], weight.scale.t())
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same(layout.unpack(tensors, bits), weight)


@pytest.mark.parametrize("layout", [GPTQ, GPTQ_V2], ids=lambda layout: layout.name)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_symmetric(layout, bits):
    weight = random_weight(32, 64, 2, bits, symmetric=True, scale_dtype=torch.bfloat16)
    tensors = layout.pack(weight)
    assert_same(layout.unpack(tensors, bits, symmetric=True), weight)
    stored = layout.unpack(tensors, bits)
    assert (stored.zero == 2 ** (bits - 1)).all()
    assert torch.equal(stored.dequantize(), weight.dequantize())


def test_gptq_golden_words():
    codes = torch.zeros(8, 8, dtype=torch.uint8)
    codes[0] = torch.arange(8)
    codes[1] = torch.arange(15, 7, -1)
    zero = torch.tensor([[8], [1], [2], [3], [4], [5], [6], [7]], dtype=torch.uint8)
    weight = AffineWeight(codes, torch.ones(8, 1, dtype=torch.float16), zero)
    v1, v2 = GPTQ.pack(weight), GPTQ_V2.pack(weight)
    # Column n is out feature n; nibble j is in feature j.
    assert v1["qweight"].tolist() == [[0x76543210, 0x89ABCDEF - 2**32, 0, 0, 0, 0, 0, 0]]
    assert torch.equal(v1["qweight"], v2["qweight"])
    assert v1["qzeros"].tolist() == [[0x65432107]]
    assert v2["qzeros"].tolist() == [[0x76543218]]
    assert v1["g_idx"].tolist() == [0] * 8
    # The words of symmetric 4-bit GPTQ checkpoints in the wild: 0x77777777 in version 1, 0x88888888 in version 2.
    symmetric = replace(weight, zero=None)
    assert GPTQ.pack(symmetric)["qzeros"].tolist() == [[0x77777777]]
    assert GPTQ_V2.pack(symmetric)["qzeros"].tolist() == [[0x88888888 - 2**32]]


def test_gptq_three_bits_cross_words():
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10], codes[0, 21] = 0b101, 0b110
    tensors = GPTQ_V2.pack(AffineWeight(codes, torch.ones(32, 1, dtype=torch.float16), None, 3))
    # Code 10: two bits (01) at the top of word 0, one bit (1) in word 1. Code 21: one bit (0), then two (11) in word 2.
    assert tensors["qweight"][:, 0].tolist() == [0x40000000, 0x00000001, 0x00000003]


def test_gptq_version_1_stores_zero_minus_one_modulo():
    weight = random_weight(8, 64, 2)
    weight = replace(weight, zero=torch.zeros_like(weight.zero))
    tensors = GPTQ.pack(weight)
    assert tensors["qzeros"].tolist() == [[-1], [-1]]
    assert_same(GPTQ.unpack(tensors), weight)


def test_act_order_is_sorted_once():
    weight = random_weight(16, 64, 4, g_idx=True)
    dense = torch.empty(16, 64)
    for n in range(16):
        for k in range(64):
            group = int(weight.g_idx[k])
            dense[n, k] = (float(weight.codes[n, k]) - float(weight.zero[n, group])) * float(weight.scale[n, group])
    assert torch.equal(weight.dequantize(), dense)
    in_order, order = GPTQ.unpack(GPTQ.pack(weight)).sorted_by_group()
    assert in_order.g_idx is None
    assert in_order.spec == QuantSpec(4, "group", 16, False, torch.float16)
    x = torch.randn(3, 64, dtype=torch.float64)
    expected = x @ dense.double().t()
    torch.testing.assert_close(x[:, order] @ in_order.dequantize(torch.float64).t(), expected)
    plain = random_weight(16, 64, 4)
    assert plain.sorted_by_group() == (plain, None)


def test_gptq_without_g_idx():
    weight = random_weight(8, 64, 2)
    tensors = GPTQ.pack(weight)
    del tensors["g_idx"]
    assert_same(GPTQ.unpack(tensors), weight)


def awq_loop(matrix):
    """Word (r, c), nibble i: column 8 c + [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return [
        [signed(sum(row[8 * c + order[i]] << (4 * i) for i in range(8))) for c in range(len(row) // 8)]
        for row in matrix
    ]


@pytest.mark.parametrize(("rows", "columns", "groups"), SHAPES)
def test_awq_equals_its_words_and_comes_back(rows, columns, groups):
    weight = random_weight(rows, columns, groups)
    tensors = AWQ.pack(weight)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == AWQ.packed_shape(rows, columns, groups)
    assert tensors["qweight"].tolist() == awq_loop(weight.codes.t().tolist())
    assert tensors["qzeros"].tolist() == awq_loop(weight.zero.t().tolist())
    assert torch.equal(tensors["scales"], weight.scale.t())
    assert_same(AWQ.unpack(tensors), weight)


def test_awq_golden_words():
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(1).expand(8, 8).contiguous()
    weight = AffineWeight(codes, torch.ones(8, 1, dtype=torch.float16), codes[:, :1])
    tensors = AWQ.pack(weight)
    assert tensors["qweight"].tolist() == [[0x75316420]] * 8
    assert tensors["qzeros"].tolist() == [[0x75316420]]
    symmetric = AWQ.pack(replace(weight, zero=None))
    assert symmetric["qzeros"].tolist() == [[0x88888888 - 2**32]]
    assert_same(AWQ.unpack(symmetric, symmetric=True), replace(weight, zero=None))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "groups"),
    [*SHAPES, pytest.param(5, 24, 3, id="N5-K24-g8"), pytest.param(3, 42, 1, id="N3-K42-row")],
)
def test_compressed_tensors_equals_its_words_and_comes_back(bits, symmetric, scale_dtype, rows, columns, groups):
    weight = random_weight(rows, columns, groups, bits, symmetric=symmetric, scale_dtype=scale_dtype)
    tensors = COMPRESSED_TENSORS.pack(weight)
    shapes = COMPRESSED_TENSORS.packed_shape(rows, columns, groups, bits, symmetric=symmetric)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    # The format is defined on signed codes: add the offset back to them.
    offset = 2 ** (bits - 1)
    signed_codes = weight.codes.int() - offset
    assert tensors["weight_packed"].tolist() == transposed(words_down((signed_codes + offset).t().tolist(), bits))
    assert tensors["weight_shape"].tolist() == [rows, columns]
    if not symmetric:
        assert tensors["weight_zero_point"].tolist() == words_down(weight.zero.tolist(), bits)
        assert tensors["weight_zero_point"].is_contiguous()
    assert_same(COMPRESSED_TENSORS.unpack(tensors, bits), weight)


def test_compressed_tensors_golden_words():
    # Signed codes -8, -7, ..., 0 ..., 7 in row 0.
    codes = torch.stack((torch.arange(16), torch.full((16,), 8))).to(torch.uint8)
    weight = AffineWeight(codes, torch.ones(2, 1), torch.tensor([[8], [11]], dtype=torch.uint8))
    tensors = COMPRESSED_TENSORS.pack(weight)
    assert tensors["weight_packed"].tolist() == [[0x76543210, 0xFEDCBA98 - 2**32], [0x88888888 - 2**32] * 2]
    assert tensors["weight_zero_point"].tolist() == [[0x000000B8]]
    eight = COMPRESSED_TENSORS.pack(AffineWeight(codes[:, :8], torch.ones(2, 1), None, 8))
    assert eight["weight_packed"].tolist() == [[0x03020100, 0x07060504], [0x08080808] * 2]
    assert "weight_zero_point" not in eight


def test_compressed_tensors_g_idx():
    weight = random_weight(8, 64, 4, g_idx=True)
    tensors = COMPRESSED_TENSORS.pack(weight)
    assert_same(COMPRESSED_TENSORS.unpack(tensors), weight)
    tensors["weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    assert COMPRESSED_TENSORS.unpack(tensors).g_idx is None


def test_layouts_agree_with_affine():
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        spec = QuantSpec(4, "group", 32, symmetric, torch.float16)
        scale, zero = choose_qparams(w, spec)
        codes = quantize_affine(w, scale, zero, spec)
        weight = AffineWeight(codes, scale, zero)
        assert weight.spec == spec
        expected = dequantize_affine(codes, scale, zero, spec)
        for layout in (GPTQ, GPTQ_V2, AWQ, COMPRESSED_TENSORS):
            assert torch.equal(layout.unpack(layout.pack(weight)).dequantize(), expected)


@pytest.mark.parametrize("layout", [GPTQ, AWQ, COMPRESSED_TENSORS], ids=lambda layout: layout.name)
def test_foreign_tensors_are_named(layout):
    weight = random_weight(8, 64, 2)
    tensors = layout.pack(weight)
    first = "weight_packed" if layout is COMPRESSED_TENSORS else "qweight"
    with pytest.raises(FormatError, match=f"has no tensor '{first}'"):
        layout.unpack({name: tensor for name, tensor in tensors.items() if name != first})
    with pytest.raises(DTypeError, match=f"'{first}' has dtype"):
        layout.unpack({**tensors, first: tensors[first].long()})
    with pytest.raises(ShapeError, match=f"'{first}' has shape .* expected 2 dimensions"):
        layout.unpack({**tensors, first: tensors[first].flatten()})
    zeros = "weight_zero_point" if layout is COMPRESSED_TENSORS else "qzeros"
    with pytest.raises(ShapeError, match=f"'{zeros}' has shape"):
        layout.unpack({**tensors, zeros: torch.zeros(3, 3, dtype=torch.int32)})
    with pytest.raises((ShapeError, GroupSizeError)):
        layout.unpack({**tensors, first: tensors[first][:-1]})


def test_what_a_format_cannot_hold_is_named():
    with pytest.raises(ShapeError, match="in_features=36"):
        GPTQ.pack(random_weight(8, 36, 1))
    with pytest.raises(ShapeError, match="out_features=5"):
        GPTQ.pack(random_weight(5, 64, 1))
    with pytest.raises(ShapeError, match="out_features=5"):
        AWQ.pack(random_weight(5, 64, 1))
    with pytest.raises(UnsupportedError, match="4 bits only"):
        AWQ.pack(random_weight(8, 64, 1, 8))
    with pytest.raises(UnsupportedError, match="g_idx"):
        AWQ.pack(random_weight(8, 64, 2, g_idx=True))
    with pytest.raises(SpecError, match="4 and 8"):
        COMPRESSED_TENSORS.pack(random_weight(8, 64, 1, 3))
    with pytest.raises(SpecError, match="2, 3, 4 and 8"):
        GPTQ.pack(random_weight(32, 64, 1, 5))
    for layout in (GPTQ, AWQ):
        with pytest.raises(DTypeError, match="float16 or bfloat16"):
            layout.pack(random_weight(8, 64, 1, scale_dtype=torch.float32))
        with pytest.raises(FormatError, match="not all of its zeros are 8"):
            layout.unpack(layout.pack(random_weight(8, 64, 2)), symmetric=True)
    with pytest.raises(SpecError, match="gptq_v3"):
        GPTQLayout("gptq_v3")
    with pytest.raises(SpecError, match="does not fit 4 bits"):
        GPTQ.pack(AffineWeight(torch.full((8, 8), 16, dtype=torch.uint8), torch.ones(8, 1).half(), None))


@pytest.mark.parametrize("layout", [GPTQ, GPTQ_V2, AWQ, COMPRESSED_TENSORS], ids=lambda layout: layout.name)
def test_floating_zeros_that_are_integers_are_stored_as_such(layout):
    weight = random_weight(8, 64, 2)
    floats = replace(weight, zero=weight.zero.to(torch.float16))
    for name, tensor in layout.pack(weight).items():
        assert torch.equal(layout.pack(floats)[name], tensor)
    for odd in (7.5, -1.0, 16.0):
        floats.zero[3, 1] = odd
        with pytest.raises(UnsupportedError, match=f"{layout.name} stores integer zeros"):
            layout.pack(floats)


def test_impossible_groups_are_named():
    weight = random_weight(8, 64, 4, g_idx=True)
    tensors = GPTQ.pack(weight)
    tensors["g_idx"][3] = 4
    with pytest.raises(FormatError, match="groups 0 to 4: expected 0 to 3"):
        GPTQ.unpack(tensors)
    uneven = replace(weight, g_idx=torch.zeros(64, dtype=torch.int32))
    with pytest.raises(FormatError, match="expected 16 in each"):
        uneven.sorted_by_group()
    shape = {**COMPRESSED_TENSORS.pack(random_weight(8, 64, 4)), "weight_shape": torch.tensor([8, 64, 1])}
    with pytest.raises(FormatError, match="weight_shape"):
        COMPRESSED_TENSORS.unpack(shape)
    with pytest.raises(ShapeError, match="weight_packed"):
        COMPRESSED_TENSORS.unpack({**shape, "weight_shape": torch.tensor([8, 128])})


def test_weights_check_themselves():
    codes, scale = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2)
    AffineWeight(codes, scale, None)
    with pytest.raises(SpecError, match="bits=9"):
        AffineWeight(codes, scale, None, 9)
    with pytest.raises(DTypeError, match="codes have dtype"):
        AffineWeight(codes.int(), scale, None)
    with pytest.raises(DTypeError, match="scale has dtype"):
        AffineWeight(codes, scale.double(), None)
    with pytest.raises(ShapeError, match=r"expected \(4, groups\)"):
        AffineWeight(codes, scale.t(), None)
    with pytest.raises(GroupSizeError, match="3 groups do not divide"):
        AffineWeight(codes, torch.ones(4, 3), None)
    with pytest.raises(GroupSizeError, match="at least 8"):
        AffineWeight(codes, torch.ones(4, 8), None)
    with pytest.raises(ShapeError, match="zero has shape"):
        AffineWeight(codes, scale, torch.zeros(4, 1, dtype=torch.uint8))
    with pytest.raises(DTypeError, match="zero has dtype"):
        AffineWeight(codes, scale, torch.zeros(4, 2, dtype=torch.int32))
    with pytest.raises(ShapeError, match="g_idx has shape"):
        AffineWeight(codes, scale, None, 4, torch.zeros(4, dtype=torch.int32))
    with pytest.raises(DTypeError, match="g_idx has dtype"):
        AffineWeight(codes, scale, None, 4, torch.zeros(32))
    with pytest.raises(DeviceError, match="scale is on meta"):
        AffineWeight(codes, scale.to("meta"), None)

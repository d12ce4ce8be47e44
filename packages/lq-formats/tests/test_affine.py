"""Affine quantization against an oracle that goes group by group in numpy, and against its own error bound."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lq_formats import (
    DeviceError,
    DTypeError,
    GroupSizeError,
    NonFiniteError,
    QuantSpec,
    ShapeError,
    choose_qparams,
    dequantize_affine,
    quantize_affine,
)

SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}


def rounded(value, dtype):
    """Round one number to a scale dtype, to nearest even."""
    if dtype == torch.float16:
        return float(np.float16(value))
    if dtype == torch.float32:
        return float(np.float32(value))
    bits = int(np.float32(value).view(np.uint32))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(np.uint32(bits).view(np.float32))


def oracle(w, spec):
    """Scales, zeros and codes of every group, one group at a time."""
    real = np.float64 if w.dtype == torch.float64 else np.float32
    w = w.to(torch.float64).numpy().astype(real)
    rows, columns = w.shape
    if spec.granularity == "tensor":
        w = w.reshape(1, rows * columns)
    size = spec.group_size or w.shape[1]
    scales, zeros, codes = [], [], []
    for group in w.reshape(-1, size):
        low, high = min(group.min(), real(0)), max(group.max(), real(0))
        top = real(2**spec.bits - 1)
        raw = max(-group.min(), group.max()) / real(2 ** (spec.bits - 1) - 1) if spec.symmetric else (high - low) / top
        scale = real(max(rounded(raw, spec.scale_dtype), SMALLEST[spec.scale_dtype])) if raw > 0 else real(1)
        zero = real(2 ** (spec.bits - 1)) if spec.symmetric else np.clip(np.rint(-low / scale), 0, top)
        scales.append(float(scale))
        zeros.append(int(zero))
        codes.append(np.clip(np.rint(group / scale) + zero, 0, top))
    return np.array(scales), np.array(zeros), np.concatenate(codes).reshape(rows, columns)


def check(w, spec):
    scale, zero = choose_qparams(w, spec)
    codes = quantize_affine(w, scale, zero, spec)
    expected_scale, expected_zero, expected_codes = oracle(w, spec)
    shape = spec.scale_shape(*w.shape)
    assert (scale.dtype, tuple(scale.shape)) == (spec.scale_dtype, shape)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    np.testing.assert_array_equal(scale.double().numpy().reshape(-1), expected_scale)
    if spec.symmetric:
        assert zero is None
    else:
        assert (zero.dtype, tuple(zero.shape)) == (torch.uint8, shape)
        np.testing.assert_array_equal(zero.numpy().reshape(-1), expected_zero)
    assert codes.dtype == torch.uint8
    assert codes.is_contiguous()
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    return codes, scale, zero


def spread(tensor, spec, shape):
    """Per-group values at every weight."""
    rows, columns = shape
    if spec.granularity == "tensor":
        return tensor.expand(rows, columns)
    return tensor.repeat_interleave(columns // tensor.shape[1], dim=1)


def check_bound(w, spec, codes, scale, zero):
    """Within half a step wherever the codes reach, and exact zeros."""
    back = dequantize_affine(codes, scale, zero, spec, torch.float64)
    step = spread(scale.double(), spec, w.shape)
    middle = torch.full_like(step, spec.midpoint) if zero is None else spread(zero.double(), spec, w.shape)
    values = w.double()
    reached = (values >= -middle * step) & (values <= (spec.max_code - middle) * step)
    # Division rounds in float32: a quotient near a half may land on either side of it.
    slack = 1 + spec.max_code * 2.0**-22
    assert ((back - values).abs()[reached] <= (step / 2 * slack)[reached]).all()
    assert (back[values == 0] == 0).all()


def weights(rows=6, columns=64, seed=0, dtype=torch.float32):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w[1] = 0
    w[2, :32] = 0
    w[3] = w[3].abs() + 0.5
    w[4] = -w[4].abs() - 0.5
    w[5, 7] = 100.0
    return w.to(dtype)


def make(bits, granularity, symmetric, scale_dtype=torch.float32):
    if isinstance(granularity, int):
        return QuantSpec(bits, "group", granularity, symmetric, scale_dtype)
    return QuantSpec(bits, granularity, None, symmetric, scale_dtype)


def name(*parts):
    return "-".join(str(part).removeprefix("torch.") for part in parts)


SCHEMES = [
    pytest.param(make(bits, granularity, symmetric), id=name(f"int{bits}", granularity, "sym" if symmetric else "asym"))
    for bits, granularity, symmetric in itertools.product(range(1, 9), ["tensor", "row", 8, 16, 64], [True, False])
    if bits > 1 or not symmetric
]


@pytest.mark.parametrize("spec", SCHEMES)
def test_equals_the_oracle(spec):
    w = weights()
    check_bound(w, spec, *check(w, spec))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dtypes_equal_the_oracle(dtype, scale_dtype, symmetric, bits):
    w = weights(seed=bits, dtype=dtype)
    spec = make(bits, 32, symmetric, scale_dtype)
    check_bound(w, spec, *check(w, spec))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_float64_weights_are_not_rounded_first(symmetric):
    w = weights(dtype=torch.float64) * 1e-3
    spec = make(8, 16, symmetric)
    check_bound(w, spec, *check(w, spec))


@pytest.mark.parametrize("columns", [8, 24, 40, 72, 96, 104])
def test_every_divisor_of_k_is_a_group_size(columns):
    w = weights(6, columns, seed=columns)
    for size in (size for size in range(8, columns + 1) if columns % size == 0):
        check(w, make(4, size, False))
        check(w, make(4, size, True))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("magnitude", [1e-45, 1e-41, 1e-38, 1e-30, 1e-8, 1e-5, 1e-4, 1.0, 1e3], ids=str)
def test_magnitudes_from_subnormal_up(magnitude, symmetric, scale_dtype):
    w = (weights() * magnitude).to(torch.float32)
    spec = make(4, 16, symmetric, scale_dtype)
    codes, scale, zero = check(w, spec)
    back = dequantize_affine(codes, scale, zero, spec)
    assert torch.isfinite(back).all()
    assert (back[w == 0] == 0).all()
    # A scale that underflows costs at most the smallest scale, one that rounds badly at most its own rounding.
    largest = spread(scale.double(), spec, w.shape)
    assert ((back.double() - w.double()).abs() <= largest * 4).all()


def test_fp16_scales_use_their_subnormals():
    w = weights() * 1e-5
    spec = make(4, 64, True, torch.float16)
    codes, scale, _ = check(w, spec)
    assert (scale[0] < torch.finfo(torch.float16).smallest_normal).all()
    error = (dequantize_affine(codes, scale, None, spec) - w)[0].abs().max()
    assert error < w[0].abs().max() / 7


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_the_largest_floats_fit_float32_and_bfloat16_scales(symmetric):
    top = torch.finfo(torch.float32).max
    w = torch.tensor([[top, -top, 0.0, top / 2, 0, 0, 0, 0]])
    for scale_dtype in (torch.float32, torch.bfloat16):
        spec = make(4, 8, symmetric, scale_dtype)
        scale, zero = choose_qparams(w, spec)
        codes = quantize_affine(w, scale, zero, spec)
        assert torch.isfinite(scale).all()
        assert int(codes[0, 0]) >= 14
        assert int(codes[0, 1]) <= 1
        assert dequantize_affine(codes, scale, zero, spec, torch.float64)[0, 2] == 0


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).max, 65504.0 * 16, -1e30])
def test_a_scale_beyond_fp16_is_an_error_not_infinity(value, symmetric):
    w = torch.full((2, 8), value)
    with pytest.raises(NonFiniteError, match=r"beyond torch\.float16; use a scale dtype with a larger range"):
        choose_qparams(w, make(4, 8, symmetric, torch.float16))
    with pytest.raises(NonFiniteError, match=r"beyond torch\.float32"):
        choose_qparams(torch.full((2, 8), 1e300, dtype=torch.float64), make(4, 8, symmetric))


def test_a_constant_group_and_negative_zero():
    w = torch.tensor([[0.25] * 8, [-0.25] * 8, [-0.0] * 8, [0.0, -0.0] * 4])
    for symmetric in (True, False):
        spec = make(4, 8, symmetric)
        codes, scale, zero = check(w, spec)
        back = dequantize_affine(codes, scale, zero, spec)
        torch.testing.assert_close(back, w, atol=1e-8, rtol=1e-6)
        assert (scale[2:] == 1).all()


def test_ties_go_to_even():
    w = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.0]])
    codes, scale, _ = check(w, make(4, 8, True))
    assert scale.item() == 1.0
    assert (codes.int() - 8).tolist() == [[7, 0, 2, 2, 0, -2, -2, -7]]


finite = st.floats(-(2.0**100), 2.0**100, allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(finite, min_size=16, max_size=16),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["tensor", "row", 8]),
)
def test_any_floats(values, bits, symmetric, granularity):
    w = torch.tensor(values).reshape(2, 8)
    spec = make(bits, granularity, symmetric)
    scale, zero = choose_qparams(w, spec)
    codes = quantize_affine(w, scale, zero, spec)
    assert int(codes.max()) <= spec.max_code
    check_bound(w, spec, codes, scale, zero)
    again = quantize_affine(dequantize_affine(codes, scale, zero, spec, torch.float64), scale, zero, spec)
    assert torch.equal(again, codes)


@pytest.mark.parametrize("zero_dtype", [torch.float32, torch.float16])
def test_float_zeros_are_added_before_rounding(zero_dtype):
    spec = make(4, 8, False)
    w, scale, zero = torch.tensor([[0.4, -0.4, 1, 2, 3, 4, 5, 6]]), torch.ones(1, 1), torch.tensor([[2.25]])
    codes = quantize_affine(w, scale, zero.to(zero_dtype), spec)
    assert codes.tolist() == [[3, 2, 3, 4, 5, 6, 7, 8]]
    back = dequantize_affine(codes, scale, zero.to(zero_dtype), spec)
    assert back.tolist() == [[0.75, -0.25, 0.75, 1.75, 2.75, 3.75, 4.75, 5.75]]


def test_negative_scales_are_allowed():
    spec = make(4, 8, True)
    w = torch.tensor([[8.0, -7, 1, 2, 3, 4, 5, 6]])
    codes = quantize_affine(w, torch.tensor([[-1.0]]), None, spec)
    assert torch.equal(dequantize_affine(codes, torch.tensor([[-1.0]]), None, spec), w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dequantize_rounds_once(dtype):
    spec = make(4, 16, False, torch.float16)
    w = weights()
    scale, zero = choose_qparams(w, spec)
    codes = quantize_affine(w, scale, zero, spec)
    back = dequantize_affine(codes, scale, zero, spec, dtype)
    assert back.dtype == dtype
    exact = (codes.double() - spread(zero.double(), spec, w.shape)) * spread(scale.double(), spec, w.shape)
    assert torch.equal(back, exact.to(dtype))


def test_strides_do_not_matter():
    w = weights(64, 64).t()
    for granularity in ("tensor", "row", 16):
        spec = make(4, granularity, False)
        for ours, expected in zip(check(w, spec), check(w.contiguous(), spec), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("granularity", ["tensor", "row", 8], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_no_rows(granularity, symmetric):
    spec = make(4, granularity, symmetric)
    w = torch.empty(0, 16)
    scale, zero = choose_qparams(w, spec)
    codes = quantize_affine(w, scale, zero, spec)
    assert tuple(scale.shape) == spec.scale_shape(0, 16)
    assert codes.shape == dequantize_affine(codes, scale, zero, spec).shape == (0, 16)


def test_gradients_do_not_enter():
    w = weights().requires_grad_()
    scale, _ = choose_qparams(w, make(4, 16, True))
    assert not scale.requires_grad


def test_bad_input_is_named():
    w, spec = weights(), make(4, 16, True)
    scale, _ = choose_qparams(w, spec)
    codes = quantize_affine(w, scale, None, spec)
    with pytest.raises(ShapeError, match="2 dimensions"):
        choose_qparams(w[0], spec)
    with pytest.raises(DTypeError, match="int32"):
        choose_qparams(w.int(), spec)
    with pytest.raises(GroupSizeError, match="group_size=24 does not divide in_features=64"):
        choose_qparams(w, make(4, 24, True))
    bad = w.clone()
    bad[3, 5] = math.nan
    with pytest.raises(NonFiniteError, match=r"index \(3, 5\)"):
        choose_qparams(bad, spec)
    with pytest.raises(NonFiniteError, match="scale holds zeros"):
        quantize_affine(w, torch.zeros_like(scale), None, spec)
    with pytest.raises(ShapeError, match=r"scale has shape \(6, 3\).* needs \(6, 4\)"):
        quantize_affine(w, scale[:, :3], None, spec)
    with pytest.raises(ShapeError, match="a zero with symmetric=True"):
        quantize_affine(w, scale, torch.zeros_like(scale), spec)
    with pytest.raises(ShapeError, match="no zero with symmetric=False"):
        dequantize_affine(codes, scale, None, make(4, 16, False))
    with pytest.raises(DTypeError, match="codes have dtype"):
        dequantize_affine(codes.int(), scale, None, spec)
    with pytest.raises(DTypeError, match="the result has dtype"):
        dequantize_affine(codes, scale, None, spec, torch.int8)
    with pytest.raises(DeviceError, match="scale is on meta and weight on cpu"):
        quantize_affine(w, scale.to("meta"), None, spec)


def test_dequantize_compiles_into_one_graph():
    spec = make(4, 16, False)
    scale, zero = choose_qparams(weights(), spec)
    codes = quantize_affine(weights(), scale, zero, spec)
    compiled = torch.compile(dequantize_affine, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(codes, scale, zero, spec), dequantize_affine(codes, scale, zero, spec))

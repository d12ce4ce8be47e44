import numpy as np
import pytest
import torch
from lq_formats import (
    DeviceError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    dequantize_weight_int8,
    quantize_weight_per_channel,
    quantize_weight_per_tensor,
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def weights(dtype=torch.float32):
    w = torch.randn(6, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w[1] = 0
    w[2] *= 1e-4
    w[3, 4] = 50
    return w.to(dtype)


def oracle_row(row):
    """One row in numpy: scale = max / 127, round to nearest even, clamp."""
    top = np.abs(row).max()
    scale = np.float32(top / row.dtype.type(127)) if top > 0 else np.float32(1)
    return np.clip(np.rint(row / row.dtype.type(scale)), -127, 127).astype(np.int8), scale


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_per_channel_equals_the_oracle(dtype):
    w = weights(dtype)
    q, scale = quantize_weight_per_channel(w)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, w.shape, torch.float32, (6,))
    rows = w.double().numpy() if dtype == torch.float64 else w.float().numpy()
    for n, row in enumerate(rows):
        expected, expected_scale = oracle_row(row)
        np.testing.assert_array_equal(q[n].numpy(), expected)
        assert scale[n].item() == expected_scale
    assert (dequantize_weight_int8(q, scale)[1] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_per_tensor_equals_the_oracle(dtype):
    w = weights(dtype)
    q, scale = quantize_weight_per_tensor(w)
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    flat = w.double().numpy() if dtype == torch.float64 else w.float().numpy()
    expected, expected_scale = oracle_row(flat.reshape(-1))
    np.testing.assert_array_equal(q.numpy().reshape(-1), expected)
    assert scale.item() == expected_scale


@pytest.mark.parametrize("quantize", [quantize_weight_per_channel, quantize_weight_per_tensor])
def test_error_is_half_a_step(quantize):
    w = weights()
    q, scale = quantize(w)
    step = scale.double().reshape(-1, 1)
    back = dequantize_weight_int8(q, scale, torch.float64)
    assert ((back - w.double()).abs() <= step / 2 * (1 + 2.0**-14)).all()
    assert int(q.abs().max()) == 127


@pytest.mark.parametrize("quantize", [quantize_weight_per_channel, quantize_weight_per_tensor])
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-40, 1e-38, 3e38])
def test_extreme_rows_stay_finite(quantize, magnitude):
    w = torch.tensor([[1.0, -0.5, 0.0, 0.25], [0.0, -0.0, 0.0, 0.0]]) * magnitude
    q, scale = quantize(w)
    back = dequantize_weight_int8(q, scale)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.isfinite(back).all()
    assert (back[w == 0] == 0).all()
    torch.testing.assert_close(back, w, rtol=0.03, atol=2.0**-126)


def test_no_rows():
    for quantize in (quantize_weight_per_channel, quantize_weight_per_tensor):
        q, scale = quantize(torch.empty(0, 8))
        assert q.shape == dequantize_weight_int8(q, scale).shape == (0, 8)


def test_int8_is_half_of_fp16():
    w = torch.randn(8, 64, dtype=torch.float16)
    assert quantize_weight_per_channel(w)[0].nbytes * 2 == w.nbytes


def test_bad_input_is_named():
    with pytest.raises(ShapeError, match="2 dimensions"):
        quantize_weight_per_channel(torch.zeros(4))
    with pytest.raises(DTypeError, match="int8"):
        quantize_weight_per_tensor(torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(NonFiniteError, match="index"):
        quantize_weight_per_channel(torch.full((2, 2), torch.nan))
    with pytest.raises(NonFiniteError, match="beyond float32"):
        quantize_weight_per_tensor(torch.full((2, 2), 1e300, dtype=torch.float64))
    q = torch.zeros(4, 8, dtype=torch.int8)
    with pytest.raises(ShapeError, match=r"expected \(4,\) per row or \(\) per tensor"):
        dequantize_weight_int8(q, torch.ones(8))
    with pytest.raises(DTypeError, match="expected int8"):
        dequantize_weight_int8(q.float(), torch.ones(4))
    with pytest.raises(DTypeError, match="the result has dtype"):
        dequantize_weight_int8(q, torch.ones(4), torch.int32)
    with pytest.raises(DeviceError, match="scale is on meta and q on cpu"):
        dequantize_weight_int8(q, torch.ones(4, device="meta"))

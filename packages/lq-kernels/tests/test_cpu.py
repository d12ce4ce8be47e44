"""ATen's packed CPU products: strided weights, unusual scales, and every constraint that lq states for them."""

import pytest
import torch
from lq_formats import NoKernelError, dequantize_weight_int8, pack_int4, quantize_weight_per_channel
from lq_kernels import int4_linear, int8_gemm

BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 1e-5}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in BOUNDS]
KERNELS = ["", "aten-cpu", "dequant-blas", "reference"]


def relative_error(y, reference):
    return float((y.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_weights_may_be_slices_and_transposes(dtype, kernel):
    q, scale = quantize_weight_per_channel(torch.randn(64, 128))
    for weight in (q[:, :64], q.t().contiguous().t(), q[::2], q[:, 32:96]):
        x, s = torch.randn(5, weight.shape[1]).to(dtype), scale[:: 64 // weight.shape[0]]
        dense = dequantize_weight_int8(weight, s, torch.float64)
        assert relative_error(int8_gemm(x, weight, s, kernel=kernel), x.double() @ dense.t()) < BOUNDS[dtype]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_scales_may_be_zero_tiny_negative_and_large(dtype, kernel):
    q, scale = quantize_weight_per_channel(torch.randn(16, 128))
    scale[0], scale[1], scale[2], scale[3] = 0.0, 1e-6, -scale[2], 20.0
    x = torch.randn(3, 128).to(dtype)
    y, exact = int8_gemm(x, q, scale, kernel=kernel), x.double() @ dequantize_weight_int8(q, scale, torch.float64).t()
    assert (y[:, 0] == 0).all()
    # A product may round its weight and its result, half a step of the format each, and every sum in float32: of the
    # terms' sum, as some rows may cancel. 1e-6 a step is subnormal in float16, whose spacing there is 2**-24.
    terms = x.double().abs() @ dequantize_weight_int8(q, scale, torch.float64).abs().t()
    step, tiny = torch.finfo(dtype).eps + 128 * 2**-24, 2**-24 * x.double().abs().sum(1, keepdim=True)
    assert ((y.double() - exact).abs()[:, 1:] <= (step * terms + (tiny if dtype == torch.float16 else 0))[:, 1:]).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_int4_words_and_scales_may_be_slices(kernel):
    q = pack_int4(torch.randint(0, 16, (32, 256), dtype=torch.uint8))
    scale, x = torch.rand(32, 8), torch.randn(3, 128)
    expected = int4_linear(x, q[:, :16].clone(), scale[:, :4].clone(), group_size=32, kernel="reference")
    y = int4_linear(x, q[:, :16], scale[:, :4], group_size=32, kernel=kernel)
    assert relative_error(y, expected.double()) < 1e-5


@pytest.mark.parametrize(
    ("n", "k", "group", "dtype", "scale_dtype", "symmetric", "reason"),
    [
        (16, 96, 24, torch.float32, torch.float32, True, "groups of 32, 64, 128, 256, not 24"),
        (24, 64, 32, torch.float32, torch.float32, True, "out features divisible by 16, got 24"),
        (16, 64, 32, torch.float16, torch.float32, True, "scales of torch.float32 would be rounded"),
        (16, 64, 32, torch.bfloat16, torch.bfloat16, False, "zeros would be rounded"),
    ],
    ids=["group", "out-features", "scale-dtype", "zeros"],
)
def test_int4_declines_what_aten_would_refuse_or_round(n, k, group, dtype, scale_dtype, symmetric, reason):
    q = pack_int4(torch.randint(0, 16, (n, k), dtype=torch.uint8))
    scale = torch.rand(n, k // group).to(scale_dtype)
    zero = None if symmetric else torch.full_like(scale, 8).to(torch.uint8)
    x = torch.randn(2, k).to(dtype)
    with pytest.raises(NoKernelError, match=reason):
        int4_linear(x, q, scale, zero, group_size=group, kernel="aten-cpu")
    assert int4_linear(x, q, scale, zero, group_size=group).shape == (2, n)


def test_int8_declines_in_features_that_aten_reads_past():
    with pytest.raises(NoKernelError, match="not divisible by 32, got 100"):
        int8_gemm(torch.randn(1, 100), torch.zeros(4, 100, dtype=torch.int8), torch.ones(4), kernel="aten-cpu")

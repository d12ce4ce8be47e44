"""Every int4 kernel against float64 on the dequantized weight, on the CPU and (marked) on a GPU."""

import pytest
import torch
from lq_formats import NoKernelError, QuantSpec, choose_qparams, dequantize_affine, pack_int4, quantize_affine
from lq_kernels import int4_dequantize, int4_linear, kernel_names, matmul_bf16_i4

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 1e-5}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in BOUNDS]
# out features, in features, group size: multiples of 8, odd everything, non-powers of two, one scale a row, K tails.
SHAPES = [
    pytest.param(64, 256, 128, id="64x256-g128"),
    pytest.param(48, 256, 32, id="48x256-g32"),
    pytest.param(65, 272, 16, id="65x272-g16"),
    pytest.param(33, 96, 24, id="33x96-g24"),
    pytest.param(17, 336, 112, id="17x336-g112"),
    pytest.param(129, 1032, 1032, id="129x1032-row"),
    pytest.param(7, 13, 13, id="7x13-row"),
]
TOKENS = [1, 2, 3, 5, 8, 16, 17, 64, 100, 128, 256, 1000]


class Weight:
    def __init__(self, n: int, k: int, group: int, symmetric: bool, scale_dtype: torch.dtype, device: str) -> None:
        granularity = "row" if group == k else "group"
        spec = QuantSpec(4, granularity, None if group == k else group, symmetric, scale_dtype)
        w = torch.randn(n, k)
        self.group = group
        scale, zero = choose_qparams(w, spec)
        codes = quantize_affine(w, scale, zero, spec)
        self.dense = dequantize_affine(codes, scale, zero, spec, torch.float64)
        self.qweight = pack_int4(codes).to(device)
        self.scale = scale.to(device)
        self.zero = None if zero is None else zero.to(device)

    def linear(self, x: torch.Tensor, **options: object) -> torch.Tensor:
        return int4_linear(x, self.qweight, self.scale, self.zero, group_size=self.group, **options)


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.cpu().double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("kernel", kernel_names("int4"))
@pytest.mark.parametrize("device", DEVICES)
def test_every_kernel_agrees_with_float64(device, kernel, n, k, group, dtype, symmetric):
    torch.manual_seed(n * k + symmetric)
    weight = Weight(n, k, group, symmetric, dtype, device)
    for m in TOKENS if device == "cuda" else TOKENS[:8]:
        x = torch.randn(m, k).to(dtype)
        try:
            y = weight.linear(x.to(device), kernel=kernel)
        except NoKernelError:
            # A kernel may decline a problem, with a reason; it may not decline only some batch sizes.
            assert m == TOKENS[0]
            assert not (device == "cuda" and kernel.startswith("triton"))
            assert kernel not in ("reference", "dequant-blas")
            return
        assert y.dtype == dtype
        assert y.shape == (m, n)
        assert relative_error(y, x.double() @ weight.dense.t()) < BOUNDS[dtype], f"M={m}"


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_scales_of_another_dtype_than_x(device, scale_dtype):
    weight = Weight(72, 256, 64, False, scale_dtype, device)
    x = torch.randn(5, 256).bfloat16()
    for kernel in ("", *(["triton-gemv", "triton-splitk", "triton-gemm"] if device == "cuda" else [])):
        y = weight.linear(x.to(device), kernel=kernel)
        assert relative_error(y, x.double() @ weight.dense.t()) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("device", DEVICES)
def test_floating_zeros(device):
    torch.manual_seed(0)
    weight = Weight(40, 256, 32, False, torch.float32, device)
    shift = torch.rand(40, 8)
    weight.dense -= (shift * weight.scale.cpu()).double().repeat_interleave(32, 1)
    weight.zero = weight.zero.float() + shift.to(device)
    x = torch.randn(9, 256)
    names = [name for name in kernel_names("int4") if device == "cuda" or not name.startswith("triton")]
    for kernel in names:
        if kernel == "aten-cpu" and device == "cuda":
            continue
        try:
            y = weight.linear(x.to(device), kernel=kernel)
        except NoKernelError:
            continue
        assert relative_error(y, x.double() @ weight.dense.t()) < 1e-5, kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_dequantize_is_the_rounded_weight_bit_for_bit(device, n, k, group, dtype):
    weight = Weight(n, k, group, False, dtype, device)
    w = int4_dequantize(weight.qweight, weight.scale, weight.zero, group_size=group, in_features=k, dtype=dtype)
    assert torch.equal(w.cpu(), weight.dense.float().to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions_bias_and_strides(device):
    weight = Weight(24, 128, 32, True, torch.float32, device)
    bias = torch.randn(24, device=device)
    x = torch.randn(3, 128, 4, device=device).transpose(1, 2)
    y = weight.linear(x, bias=bias)
    assert y.shape == (3, 4, 24)
    assert relative_error(y, x.cpu().double() @ weight.dense.t() + bias.cpu().double()) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_and_no_out_features_give_empty_results(device):
    weight = Weight(24, 128, 32, True, torch.float32, device)
    assert weight.linear(torch.empty(0, 128, device=device)).shape == (0, 24)
    assert weight.linear(torch.empty(2, 0, 128, device=device)).shape == (2, 0, 24)
    empty = int4_linear(torch.randn(3, 128, device=device), weight.qweight[:0], weight.scale[:0], group_size=32)
    assert empty.shape == (3, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_reaches_the_activations(device):
    weight = Weight(24, 128, 32, False, torch.float32, device)
    x = torch.randn(5, 128, device=device, requires_grad=True)
    grad = torch.randn(5, 24, device=device)
    weight.linear(x).backward(grad)
    assert relative_error(x.grad, grad.cpu().double() @ weight.dense) < 1e-5


@pytest.mark.parametrize("kernel", ["triton-gemv", "triton-splitk", "triton-gemm", "dequant-blas"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.gpu
def test_non_finite_activations_propagate(kernel, value):
    weight = Weight(40, 256, 64, False, torch.float16, "cuda")
    x = torch.randn(4, 256, dtype=torch.float16, device="cuda")
    x[2, 17] = value
    y = weight.linear(x, kernel=kernel)
    assert not torch.isfinite(y[2]).any()
    assert torch.isfinite(y[[0, 1, 3]]).all()


@pytest.mark.parametrize("kernel", ["triton-gemv", "triton-splitk", "triton-gemm"])
@pytest.mark.gpu
def test_results_are_bitwise_reproducible(kernel):
    weight = Weight(1032, 2048, 128, False, torch.bfloat16, "cuda")
    x = torch.randn(17, 2048, dtype=torch.bfloat16, device="cuda")
    first = weight.linear(x, kernel=kernel)
    for _ in range(50):
        torch.empty(17 * 1032 * 8, device="cuda").fill_(float("nan"))  # poison what the allocator hands out next
        assert torch.equal(weight.linear(x, kernel=kernel), first)


@pytest.mark.parametrize("kernel", ["triton-gemv", "triton-splitk", "triton-gemm"])
@pytest.mark.gpu
def test_offsets_beyond_31_bits(kernel):
    n, k, m = 131_080, 16_384, 2
    qweight = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32, device="cuda")
    scale = torch.rand(n, 1, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    assert n * k > 2**31
    y = int4_linear(x, qweight, scale, group_size=k, kernel=kernel)
    tail = int4_linear(x, qweight[-16:].clone(), scale[-16:].clone(), group_size=k, kernel="reference")
    assert relative_error(y[:, -16:], tail.cpu().double()) < 8e-3


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_compile(device):
    weight = Weight(64, 256, 64, False, torch.float32, device)
    x = torch.randn(3, 256, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.lq.int4_linear.default, (x, weight.qweight, weight.scale, weight.zero, 64, ""))
    torch.library.opcheck(
        torch.ops.lq.int4_dequantize.default, (weight.qweight, weight.scale, weight.zero, 64, 256, torch.float32)
    )
    compiled = torch.compile(weight.linear, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for m in (3, 4, 9):
        x = torch.randn(m, 256, device=device)
        assert torch.equal(compiled(x), weight.linear(x))


@pytest.mark.parametrize("pack_dtype", [torch.int32, torch.int8], ids=["int32", "int8"])
def test_matmul_bf16_i4_takes_both_packings(pack_dtype):
    from lq_formats import dequantize_i4_pack8, quantize_i4_pack8

    w = torch.randn(40, 512)
    packed, scales = quantize_i4_pack8(w, 256, pack_dtype)
    x = torch.randn(2, 3, 512).bfloat16()
    y = matmul_bf16_i4(x, packed, scales, 256)
    dense = dequantize_i4_pack8(packed, scales, 256, dtype=torch.float64)
    assert relative_error(y, x.double() @ dense.t()) < 8e-3
    packed, scales = quantize_i4_pack8(w, -1, pack_dtype)
    assert matmul_bf16_i4(x, packed, scales, -1).shape == (2, 3, 40)


@pytest.mark.parametrize("offset", [1, 2, 4, 7])
def test_matmul_bf16_i4_takes_bytes_that_begin_anywhere(offset):
    import numpy as np
    from lq_formats import quantize_i4_pack8

    packed, scales = quantize_i4_pack8(torch.randn(16, 64), 32, torch.int8)
    x = torch.randn(2, 64).bfloat16()
    expected = matmul_bf16_i4(x, packed, scales, 32)
    buffer = torch.zeros(packed.numel() + 8, dtype=torch.int8)
    octets = buffer[offset : offset + packed.numel()].view(packed.shape).copy_(packed)
    assert torch.equal(matmul_bf16_i4(x, octets, scales, 32), expected)
    compiled = torch.compile(matmul_bf16_i4, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, packed, scales, 32), expected)
    # Here it is the address: the tensor's own storage begins in the middle of an array.
    foreign = torch.from_numpy(np.frombuffer(buffer.numpy().tobytes(), np.int8).copy()[offset:][: packed.numel()])
    assert torch.equal(matmul_bf16_i4(x, foreign.view(packed.shape), scales, 32), expected)

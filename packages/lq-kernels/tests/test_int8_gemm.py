"""Every int8 kernel against float64, on the CPU and (marked) on a GPU."""

import pytest
import torch
from lq_formats import NoKernelError, dequantize_weight_int8, quantize_weight_per_channel, quantize_weight_per_tensor
from lq_kernels import int8_gemm, int8_gemm_torch, kernel_names

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 1e-5}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in BOUNDS]
TOKENS = [1, 2, 3, 5, 8, 16, 17, 64, 100, 128, 256, 1000]
QUANTIZERS = {"row": quantize_weight_per_channel, "tensor": quantize_weight_per_tensor}


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.cpu().double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", QUANTIZERS)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (33, 100), (129, 1032), (7, 13)])
@pytest.mark.parametrize("kernel", kernel_names("int8"))
@pytest.mark.parametrize("device", DEVICES)
def test_every_kernel_agrees_with_float64(device, kernel, n, k, granularity, dtype):
    torch.manual_seed(n * k)
    q, scale = QUANTIZERS[granularity](torch.randn(n, k))
    dense = dequantize_weight_int8(q, scale, torch.float64)
    for m in TOKENS if device == "cuda" else TOKENS[:8]:
        x = torch.randn(m, k).to(dtype)
        try:
            y = int8_gemm(x.to(device), q.to(device), scale.to(device), kernel=kernel)
        except NoKernelError:
            assert m == TOKENS[0]
            assert not (device == "cuda" and kernel.startswith("triton"))
            assert kernel not in ("reference", "dequant-blas")
            return
        assert y.dtype == dtype
        assert relative_error(y, x.double() @ dense.t()) < BOUNDS[dtype], f"M={m}"


def test_int8_gemm_torch_is_the_definition():
    q, scale = quantize_weight_per_channel(torch.randn(33, 100))
    x, bias = torch.randn(2, 3, 100, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    y = int8_gemm_torch(x, q, scale, bias)
    assert relative_error(y, x @ (q.double() * scale.double()[:, None]).t() + bias) < 1e-14


@pytest.mark.parametrize("device", DEVICES)
def test_large_activations_do_not_overflow_float16_on_the_way(device):
    q, scale = quantize_weight_per_channel(torch.randn(64, 256) * 1e-3)
    x = (torch.randn(3, 256) * 1e4).half()
    for kernel in kernel_names("int8"):
        try:
            y = int8_gemm(x.to(device), q.to(device), scale.to(device), kernel=kernel)
        except NoKernelError:
            continue
        assert relative_error(y, x.double() @ dequantize_weight_int8(q, scale, torch.float64).t()) < 1.5e-3, kernel


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", [-12, -15, -18, -21, -23])
def test_small_scales_do_not_overflow_float16_on_the_way(device, power):
    """Sums that are as large as float16 lets the results be."""
    q, scale = torch.full((16, 4096), 127, dtype=torch.int8), torch.linspace(1, 1.9, 16) * 2.0**power
    x = torch.full((2, 4096), min(2.0 ** (-5 - power), 60000.0), dtype=torch.float16)
    exact = x.double() @ dequantize_weight_int8(q, scale, torch.float64).t()
    assert 4096 < exact.max() < 65504
    for kernel in ("", *kernel_names("int8")):
        try:
            y = int8_gemm(x.to(device), q.to(device), scale.to(device), kernel=kernel or None)
        except NoKernelError:
            continue
        assert relative_error(y, exact) < 1.5e-3, kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_of_any_size_are_exact_on_the_cpu(dtype):
    q, _ = quantize_weight_per_channel(torch.randn(64, 256))
    powers = torch.linspace(-30, 4, 64) if dtype == torch.float16 else torch.linspace(-100, 60, 64)
    scale = torch.exp2(powers.double()).float()
    x = torch.randn(3, 256).to(dtype)
    exact = x.double() @ dequantize_weight_int8(q, scale, torch.float64).t()
    y = int8_gemm(x, q, scale, kernel="aten-cpu").double()
    bound = 2.0 ** (-10 if dtype == torch.float16 else -7 if dtype == torch.bfloat16 else -20)
    sums = x.double().abs() @ dequantize_weight_int8(q, scale, torch.float64).abs().t()
    assert ((y - exact).abs() <= bound * sums + (2.0**-24 if dtype == torch.float16 else 0.0)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_opcheck_and_compile(device):
    q, scale = quantize_weight_per_channel(torch.randn(64, 256))
    dense = dequantize_weight_int8(q, scale, torch.float64)
    q, scale = q.to(device), scale.to(device)
    x = torch.randn(5, 256, device=device, requires_grad=True)
    grad = torch.randn(5, 64, device=device)
    int8_gemm(x, q, scale).backward(grad)
    assert relative_error(x.grad, grad.cpu().double() @ dense) < 1e-5
    torch.library.opcheck(torch.ops.lq.int8_linear.default, (x, q, scale, ""))
    torch.library.opcheck(torch.ops.lq.int8_dequantize.default, (q, scale, torch.float32))
    compiled = torch.compile(lambda x: int8_gemm(x, q, scale), fullgraph=True, backend="aot_eager")
    for m in (0, 3, 7):
        x = torch.randn(m, 256, device=device)
        assert torch.equal(compiled(x), int8_gemm(x, q, scale))


@pytest.mark.parametrize("kernel", ["triton-gemv", "triton-splitk", "triton-gemm"])
@pytest.mark.gpu
def test_results_are_bitwise_reproducible(kernel):
    q, scale = quantize_weight_per_channel(torch.randn(1032, 2048, device="cuda"))
    x = torch.randn(17, 2048, dtype=torch.bfloat16, device="cuda")
    first = int8_gemm(x, q, scale, kernel=kernel)
    for _ in range(50):
        torch.empty(17 * 1032 * 8, device="cuda").fill_(float("nan"))
        assert torch.equal(int8_gemm(x, q, scale, kernel=kernel), first)

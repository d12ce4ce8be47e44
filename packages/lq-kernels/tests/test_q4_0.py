"""Q4_0 x Q8_1: every kernel against the blocks' exact arithmetic, and the fused quantizer byte for byte.

One long file: blocks and floats, in one launch and in several, are ways to the same numbers, and share what is drawn for them.
"""

import random
from dataclasses import replace

import pytest
import torch
from lq_formats import dequantize_q4_0, dequantize_q8_1, quantize_q4_0, quantize_q8_1
from lq_kernels import (
    Arch,
    gemm_q4_0_q8_1,
    kernel_names,
    q4_0,
    q4_0_linear,
    quantize_activation_q8_1,
    quantize_gemm_q4_0_q8_1,
)
from lq_kernels.catalog import KERNELS
from lq_kernels.cuda import decode_a16, decode_cuts, prefill_a16
from lq_kernels.cuda import quantize_q8_1 as quantizer
from lq_kernels.cuda.variant import Scales
from lq_kernels.reference import gemm_q4_0_q8_1_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS = [1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 64, 100, 128, 256, 600, 1000]
ROWS = [1, 15, 16, 17, 100, 1032]
# K = 256 * odd is copied in 16-byte pieces; the others exercise the unaligned copies and K tails within a chunk.
DEPTHS = [32, 64, 96, 256, 512, 768, 1056, 4096]


def nmse(y: torch.Tensor, reference: torch.Tensor) -> float:
    reference = reference.to(y.device)
    return float(((y.double() - reference) ** 2).sum() / (reference**2).sum())


@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("kernel", kernel_names("q4_0_q8_1"))
@pytest.mark.parametrize("device", DEVICES)
def test_every_kernel_agrees_with_exact_arithmetic(device, kernel, k):
    if device == "cpu" and kernel.startswith("cuda"):
        pytest.skip("the CUDA kernels need a GPU")
    torch.manual_seed(k)
    rows_to_run = ROWS if device == "cuda" else ROWS[:4]
    tokens_to_run = TOKENS if device == "cuda" else TOKENS[:6]
    w = quantize_q4_0(torch.randn(max(rows_to_run), k))
    a = quantize_q8_1(torch.randn(max(tokens_to_run), k))
    exact = gemm_q4_0_q8_1_reference(w, a).double()
    operands = dequantize_q4_0(w, torch.float64) @ dequantize_q8_1(a, torch.float64).t()
    norm_w, norm_a = dequantize_q4_0(w).double().norm(dim=1), dequantize_q8_1(a).double().norm(dim=1)
    for m in rows_to_run:
        for n in tokens_to_run:
            y = gemm_q4_0_q8_1(w[:m].to(device), a[:n].to(device), m, n, k, kernel=kernel)
            assert y.dtype == torch.float32
            assert y.shape == (m, n)
            # fp32 sums: rounding is relative to the operands, not to a product that may cancel. In 16 bits d8 q8 is
            # rounded, and in the prefill kernel d4 and d4 (q4 - 8) as well.
            relative = {"cuda-decode": 2**-9, "cuda-prefill": 3 * 2**-9}.get(kernel, 1e-5)
            bound = relative * norm_w[:m, None] * norm_a[None, :n]
            assert ((y.cpu().double() - exact[:m, :n]).abs() <= bound).all(), f"M={m} N={n}"
            if m * n >= 64:
                assert nmse(y, operands[:m, :n]) < 5e-5, f"M={m} N={n}"


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_scales_and_random_bytes(device):
    torch.manual_seed(0)
    w = torch.randint(0, 256, (48, 16, 18), dtype=torch.uint8)
    a = torch.randint(0, 256, (24, 16, 36), dtype=torch.uint8)
    extremes = torch.tensor([0.0, -0.0, 6e-8, 6e-5, 65504.0, -65504.0, 1.0, -1.5], dtype=torch.float16)
    w[..., :2] = extremes[torch.randint(0, 8, (48, 16))].unsqueeze(-1).view(torch.uint8)
    a[..., :2] = extremes[torch.randint(0, 8, (24, 16))].unsqueeze(-1).view(torch.uint8)
    a[..., 2:4] = torch.randn(24, 16).half().unsqueeze(-1).view(torch.uint8)
    kernel = (
        "cuda-mma" if device == "cuda" else None
    )  # the others take s for d * sum(q), which random bytes do not keep
    y = gemm_q4_0_q8_1(w.to(device), a.to(device), 48, 24, 512, kernel=kernel)
    assert nmse(y, gemm_q4_0_q8_1_reference(w, a).double()) < 1e-10


@pytest.mark.gpu
def test_llama_shape_reproducible_and_fully_written():
    m, k = 4096, 14336
    w = quantize_q4_0(torch.randn(m, k, device="cuda"))
    dense = dequantize_q4_0(w, torch.float64)
    for n in (1, 2, 8, 16, 33, 128, 600):
        a = quantize_activation_q8_1(torch.randn(n, k, device="cuda"))
        first = gemm_q4_0_q8_1(w, a, m, n, k)
        assert nmse(first, dense @ dequantize_q8_1(a, torch.float64).t()) < 1e-5
        exact = gemm_q4_0_q8_1(w, a, m, n, k, kernel="cuda-mma")
        assert nmse(exact, gemm_q4_0_q8_1_reference(w, a).double()) < 1e-10
        for _ in range(20):
            torch.empty(m * n, device="cuda").fill_(float("nan"))
            assert torch.equal(gemm_q4_0_q8_1(w, a, m, n, k), first)


@pytest.fixture
def poisoned():
    """Fill what is allocated with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would want a setting; only the NaNs are wanted
    yield
    torch.use_deterministic_algorithms(False)


def operands(kind, m, k, n):
    """Return Q4_0 blocks of m weight rows and Q8_1 blocks of n tokens.

    ``trained-like``: rows and tokens of unlike norms, heavy tails, a few channels 30 times larger, activations off zero.
    """
    w, x = torch.randn(m, k), torch.randn(n, k)
    if kind == "trained-like":
        w *= 0.02 * (0.3 * torch.randn(m, 1)).exp() * (0.5 * torch.randn(m, k)).exp()
        x += 0.5 * torch.randn(k)
        x[:, torch.randperm(k)[: k // 64]] *= 30
        x *= torch.randn(n, 1).exp()
    return quantize_q4_0(w), quantize_q8_1(x)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["random", "trained-like"])
@pytest.mark.parametrize(
    ("kernel", "m", "k"),
    [(None, 192, 4096), (None, 4096, 256), ("cuda-decode", 192, 4096), ("cuda-prefill", 192, 4096)],
)
@pytest.mark.parametrize("device", DEVICES)
def test_any_number_of_tokens_is_near_the_exact_product_of_the_operands(device, kernel, m, k, kind):
    if kernel is not None and (device == "cpu" or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("the Hopper kernels need a Hopper GPU")
    w, a = operands(kind, m, k, 600)
    exact = (dequantize_q4_0(w, torch.float64) @ dequantize_q8_1(a, torch.float64).t()).to(device)
    power = (exact**2).sum(dim=0)
    w, a = w.to(device), a.to(device)
    for n in range(1, 601) if device == "cuda" else (1, 2, 17, 600):
        y = gemm_q4_0_q8_1(w, a[:n], m, n, k, kernel=kernel)
        assert torch.equal(gemm_q4_0_q8_1(w, a[:n], m, n, k, kernel=kernel), y), f"N={n}: two runs differ"
        # Token by token, so that one wrong number in a row is seen; the whole is no worse than the worst token.
        nmse_of_tokens = ((y.double() - exact[:, :n]) ** 2).sum(dim=0) / power[:n]
        assert bool((nmse_of_tokens < 5e-5).all()), f"N={n}: {float(nmse_of_tokens.max()):.1e}"  # false of NaN


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_fused_quantizer_writes_the_same_bytes(dtype):
    torch.manual_seed(0)
    x = torch.randn(100, 4096)
    x[1] = 0
    x[2] *= 1e-6
    x[3] *= 1e4 if dtype == torch.float16 else 1e30
    x[4] = torch.randint(-254, 255, (4096,)) / 2  # ties
    x[5, ::32] = 127.0
    x[6] *= 1e-7 if dtype == torch.float16 else 1e-39
    x = x.to(dtype)
    assert torch.equal(quantize_activation_q8_1(x.cuda()).cpu(), quantize_q8_1(x))
    assert torch.equal(
        quantize_activation_q8_1(x.cuda().view(10, 10, 4096)[:, 3]).cpu(), quantize_q8_1(x.view(10, 10, 4096)[:, 3])
    )


def extreme(n, k, dtype):
    """Return n tokens: random ones, ties, and of every size that d has; where there are 9, three with numbers that are none."""
    x = torch.randn(n, k) * torch.tensor([1.0, 1e-6, 0.0, 1e2, 1e-30, 1.0])[torch.arange(n) % 6, None]
    x[0] = torch.randint(-254, 255, (k,)) / 2
    x[0, ::32] = -127.0
    if n > 8:
        x[[2, 5, 8], [3, 33 % k, 63 % k]] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return x.to(dtype)


@pytest.mark.parametrize("kernel", [None, *kernel_names("q4_0_q8_1")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_one_call_multiplies_what_two_do(device, dtype, kernel):
    if (kernel or "").startswith("cuda") and device == "cpu":
        pytest.skip("the CUDA kernels need a GPU")
    if kernel in ("cuda-decode", "cuda-prefill") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    torch.manual_seed(0)
    for m, k in ((40, 96), (33, 256), (500, 4096)) if device == "cuda" else ((40, 96), (33, 256)):
        w = quantize_q4_0(torch.randn(m, k)).to(device)
        for n in (1, 2, 9, 17, 40, 130) if device == "cuda" else (1, 2, 9):
            x = extreme(n, k, dtype).to(device)
            two = gemm_q4_0_q8_1(w, quantize_activation_q8_1(x), m, n, k, kernel=kernel)
            one = quantize_gemm_q4_0_q8_1(w, x, kernel=kernel)
            # The decode kernel may be cut otherwise, and add up otherwise, behind the quantizer.
            order = 1e-6 if device == "cuda" and kernel in (None, "cuda-decode") and n <= 16 else 0.0
            bound = order * dequantize_q4_0(w).norm(dim=1)[:, None] * x.float().norm(dim=1)
            same = torch.where(bound.isfinite() & ((one - two).abs() <= bound), two, one)
            torch.testing.assert_close(same, two, rtol=0, atol=0, equal_nan=True, msg=f"M={m} N={n} K={k}")
            assert torch.isfinite(one).all(dim=0).tolist() == [n < 9 or token not in (2, 5, 8) for token in range(n)]
            strided = torch.empty(n, 2 * k, dtype=dtype, device=device)[:, 1 : k + 1].copy_(x)
            torch.testing.assert_close(
                quantize_gemm_q4_0_q8_1(w, strided, kernel=kernel), one, rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("device", DEVICES)
def test_in_one_call_any_leading_dimensions_gradient_opcheck_and_compile(device):
    w = quantize_q4_0(torch.randn(40, 256)).to(device)
    x = torch.randn(2, 3, 256, device=device, requires_grad=True)
    y = quantize_gemm_q4_0_q8_1(w, x)
    assert torch.equal(y, quantize_gemm_q4_0_q8_1(w, x.detach().view(6, 256)))
    assert y.shape == (40, 6)
    assert y.dtype == torch.float32
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad.view(6, 256), grad.t() @ dequantize_q4_0(w), rtol=1e-4, atol=1e-4)
    assert quantize_gemm_q4_0_q8_1(w, x[:0]).shape == (40, 0)
    assert quantize_gemm_q4_0_q8_1(w[:0], x).shape == (0, 6)
    torch.library.opcheck(
        torch.ops.lq.quantize_gemm_q4_0_q8_1.default, (w, x.detach().view(6, 256).requires_grad_(), "")
    )
    compiled = torch.compile(lambda x: quantize_gemm_q4_0_q8_1(w, x), fullgraph=True, backend="aot_eager")
    for n in (3, 4):
        x = torch.randn(n, 256, device=device)
        assert torch.equal(compiled(x), quantize_gemm_q4_0_q8_1(w, x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activations_do_not_look_finite(device, value):
    w = quantize_q4_0(torch.randn(32, 256)).to(device)
    x = torch.randn(3, 256, device=device)
    x[1, 40] = value
    y = q4_0_linear(x, w)
    assert not torch.isfinite(y[1]).any()
    assert torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1.0, 1e30, 1e34, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_of_any_magnitude_are_as_near(dtype, magnitude):
    generator = torch.Generator().manual_seed(3)
    w = quantize_q4_0(torch.randn(16, 64, generator=generator) * 0.1)
    x = (torch.randn(3, 64, generator=generator) * magnitude).to(dtype)
    exact = x.double() @ dequantize_q4_0(w, torch.float64).T
    for kernel in ("dequant-blas", "reference"):
        y = q4_0_linear(x, w, kernel=kernel)
        assert (y.double() - exact).norm() < 1e-2 * exact.norm()


def test_tokens_are_divided_by_powers_that_float32_holds():
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[64.0], [-65.0], [127.0], [largest], [2.0**-126], [2.0**-149], [0.0], [torch.inf], [torch.nan]])
    exponents = q4_0._exponents(torch.cat((x, torch.zeros_like(x)), 1))[:, 0]
    assert exponents.tolist() == [0, 0, 0, 121, -126, -126, 0, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_linear_is_quantize_multiply_round(device, dtype):
    w = quantize_q4_0(torch.randn(40, 512)).to(device)
    x = torch.randn(2, 5, 512, device=device).to(dtype).requires_grad_()
    bias = torch.randn(40, device=device).to(dtype)
    kernel = "cuda-mma" if device == "cuda" else "dequant-blas"
    y = q4_0_linear(x, w, bias=bias, kernel=kernel)
    blocks = quantize_activation_q8_1(x.detach()).view(10, 16, 36)
    expected = gemm_q4_0_q8_1(w, blocks, 40, 10, 512, kernel=kernel).t().to(dtype) + bias
    assert torch.equal(y, expected.view(2, 5, 40))
    grad = torch.randn_like(y)
    y.backward(grad)
    dense = dequantize_q4_0(w, torch.float64)
    error = (x.grad.double() - grad.double() @ dense).norm() / (grad.double() @ dense).norm()
    assert error < (1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_flat_opcheck_and_compile(device):
    w = quantize_q4_0(torch.randn(40, 256)).to(device)
    a = quantize_q8_1(torch.randn(5, 256)).to(device)
    assert gemm_q4_0_q8_1(w, a[:0], 40, 0, 256).shape == (40, 0)
    assert gemm_q4_0_q8_1(w[:0], a, 0, 5, 256).shape == (0, 5)
    assert q4_0_linear(torch.empty(0, 256, device=device), w).shape == (0, 40)
    assert torch.equal(gemm_q4_0_q8_1(w.flatten(), a.flatten(), 40, 5, 256), gemm_q4_0_q8_1(w, a, 40, 5, 256))
    torch.library.opcheck(torch.ops.lq.gemm_q4_0_q8_1.default, (w, a, ""))
    torch.library.opcheck(torch.ops.lq.quantize_q8_1.default, (torch.randn(3, 64, device=device),))
    compiled = torch.compile(lambda x: q4_0_linear(x, w), fullgraph=True, backend="aot_eager")
    for m in (3, 4):
        x = torch.randn(m, 256, device=device)
        assert torch.equal(compiled(x), q4_0_linear(x, w))


@pytest.mark.gpu
def test_misaligned_views_are_right():
    w = quantize_q4_0(torch.randn(33, 512, device="cuda"))
    a = quantize_activation_q8_1(torch.randn(3, 512, device="cuda"))
    expected = gemm_q4_0_q8_1(w, a, 33, 3, 512)
    for shift in (1, 2, 4):
        buffer = torch.empty(w.numel() + shift, dtype=torch.uint8, device="cuda")
        buffer[shift:] = w.flatten()
        other = torch.empty(a.numel() + shift, dtype=torch.uint8, device="cuda")
        other[shift:] = a.flatten()
        assert nmse(gemm_q4_0_q8_1(buffer[shift:], other[shift:], 33, 3, 512), expected.cpu().double()) < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["cuda-decode", "cuda-prefill"])
def test_linear_takes_activations_as_they_are(kernel, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    for n, k, m in ((40, 32, 3), (4096, 4096, 1), (1000, 14336, 16), (4096, 1056, 7)):
        w = quantize_q4_0(torch.randn(n, k, device="cuda"))
        x = torch.randn(m, k, device="cuda").to(dtype)
        exact = x.double() @ dequantize_q4_0(w, torch.float64).t()
        first = q4_0_linear(x, w, kernel=kernel)
        error = (first.double() - exact).norm() / exact.norm()
        assert error < (8e-3 if dtype == torch.bfloat16 else 1.5e-3), f"N={n} K={k} M={m}"
        assert torch.equal(q4_0_linear(x, w, kernel=kernel), first)
        assert torch.equal(q4_0_linear(x, w), q4_0_linear(x, w))
    w[0, 0, 2:] ^= 0x11  # a change is noticed
    assert not torch.equal(q4_0_linear(x, w, kernel=kernel)[:, 0], first[:, 0])


# ---- the decode kernel on Q8_1 blocks ----

H200 = Arch("cuda", (9, 0), "NVIDIA H200", 132)
Q4_0 = Scales(4, False, False, 128)
DECODE = next(kernel for kernel in KERNELS if (kernel.op, kernel.name) == ("q4_0_q8_1", "cuda-decode"))


@pytest.fixture
def launches(monkeypatch):
    """What is launched on an H200 that is not there, (kernel, macros, bytes of shared memory), in order; nothing runs."""
    asked = []

    def prepare(index, name, kernel, grid, threads, shared, *sizes, defines=(), **options):
        return lambda *pointers: asked.append((name, defines, shared))

    def launch(name, kernel, grid, threads, shared, *arguments, defines=(), **options):
        asked.append((name, defines, shared))

    monkeypatch.setattr(decode_a16, "Launch", prepare)
    monkeypatch.setattr(quantizer, "launch", launch)
    monkeypatch.setattr(Arch, "of", staticmethod(lambda device: H200))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for cached in (decode_a16._prepare, decode_a16._prepare_q8_1):
        cached.cache_clear()
    yield asked
    for cached in (decode_a16._prepare, decode_a16._prepare_q8_1):
        cached.cache_clear()


@pytest.mark.parametrize("k", [32, 64, 96, 128, 256, 1056, 1152, 4096])
def test_decode_multiplies_int8_in_groups_and_bf16_of_single_blocks(k, launches):
    for n in (1, 2, 4, 5, 8, 9, 17, 32):
        w, a = quantize_q4_0(torch.randn(200, k)), quantize_q8_1(torch.randn(n, k))
        assert DECODE.run(w, a).shape == (200, n)
        (before, *_), (kernel, defines, shared) = launches
        assert kernel == "decode_a16"
        assert "LQ_TRANSPOSED=1" in defines
        assert ("LQ_TOKENS_INT8=1" in defines) == (k > 32)
        assert ("LQ_FEW=1" in defines) == (k > 32 and n <= 4)
        assert before == ("fragment_q8_1" if k > 32 else "dequantize_q8_1")
        if n <= 16:  # 13 blocks of rows: a CTA for each multiprocessor, or fewer
            assert 2 * (shared + 1024) > 228 << 10
        launches.clear()


@pytest.mark.parametrize("name", ["cuda-decode", "cuda-prefill"])
def test_floats_take_two_launches_and_few_in_decode_one(name, launches, monkeypatch):
    monkeypatch.setattr(torch.ops.lq, "quantize_q8_1", None)
    monkeypatch.setattr(
        prefill_a16, "linear", lambda x, *_, transposed: launches.append(("prefill_a16", x.dtype, transposed))
    )
    product = next(kernel for kernel in KERNELS if (kernel.op, kernel.name) == ("q4_0_q8_1", name))
    w = quantize_q4_0(torch.randn(200, 4096))
    for n in (1, 2, 16):
        for dtype, macro in ((torch.float32, "Fp32"), (torch.float16, "Fp16"), (torch.bfloat16, "Bf16")):
            product.run(w, torch.randn(n, 4096).to(dtype))
            if name == "cuda-decode" and n <= 2:
                ((kernel, defines, _),) = launches
                assert kernel == "decode_a16"
                assert {f"LQ_QUANTIZED={macro}", "LQ_FEW=1", "LQ_TRANSPOSED=1"} <= set(defines)
            elif name == "cuda-decode":
                (first, *_), (second, defines, last) = launches
                assert (first, second) == ("fragment_q8_1", "decode_a16")
                assert "LQ_TOKENS_INT8=1" in defines
                assert 2 * (last + 1024) > 228 << 10  # a CTA for each multiprocessor
            else:
                (first, *_), (second, *last) = launches
                assert (first, second, last) == ("quantize_q8_1", "prefill_a16", [torch.bfloat16, True])
            launches.clear()


def activations(kind, n, k):
    """Return Q8_1 blocks of n tokens: of random numbers, or any bytes at all, with scales that are no numbers among them."""
    if kind == "random":
        return quantize_q8_1(torch.randn(n, k))
    blocks = torch.randint(0, 256, (n, k // 32, 36), dtype=torch.uint8)
    if kind == "finite":
        scales = torch.randn(n, k // 32).half()
    else:
        extremes = torch.tensor([0.0, -0.0, 6e-8, 65504.0, -1.5, torch.inf, -torch.inf, torch.nan]).half()
        scales = extremes[torch.randint(0, 5, (n, k // 32))]
        token, block = torch.randint(0, n, (3,)), torch.randint(0, k // 32, (3,))
        scales[token, block] = extremes[5:]
    blocks[..., :2] = scales.unsqueeze(-1).view(torch.uint8)
    return blocks


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["random", "finite", "extreme"])
@pytest.mark.parametrize("seed", range(8))
def test_decode_of_blocks_multiplies_their_integers(seed, kind):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    torch.manual_seed(seed)
    draw = random.Random(seed)
    for k in (64, 256, 32 * draw.randint(3, 80), 128 * draw.randint(21, 112)):
        m = draw.choice([16 * draw.randint(1, 40), draw.randint(1, 700)])
        w = quantize_q4_0(torch.randn(m, k)).cuda()
        packed, scales = q4_0.fragments(w)
        for n in (1, draw.randint(2, 3), draw.randint(4, 8), draw.randint(9, 16), draw.randint(17, 32)):
            a = activations(kind, n, k).cuda()
            x = dequantize_q8_1(a, torch.float64)
            dense = dequantize_q4_0(w, torch.float64)
            exact, terms = dense @ x.t(), dense.abs() @ x.abs().t()
            cuts = decode_cuts.candidates(n, packed.shape[1], k, 4, Q4_0, 132, q8_1=True)
            cuts = [cut for cut in cuts if not cut.quantizes]
            for config in draw.sample(cuts, min(len(cuts), 6)):
                y = decode_a16.linear_q8_1(a, packed, scales, m, config)
                label = f"M={m} N={n} K={k} {config}"
                finite = torch.isfinite(exact)
                assert bool(finite.all()) == (kind != "extreme"), label
                # A product with a scale that is no number is none, of whatever sign.
                assert torch.equal(torch.isfinite(y), finite), label
                off = (y.double() - exact).abs()[finite] - 1e-30
                assert bool((off <= 3e-6 * terms[finite]).all()), label


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_tokens_are_quantized_in_the_kernel_to_the_bit(seed, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    torch.manual_seed(seed)
    draw = random.Random(seed)
    for k in (64, 256, 32 * draw.randint(3, 80), 128 * draw.randint(21, 112)):
        m = draw.choice([16 * draw.randint(1, 40), draw.randint(1, 700)])
        packed, scales = q4_0.fragments(quantize_q4_0(torch.randn(m, k)).cuda())
        for n in (1, 2, 3, 4, draw.randint(5, 16), draw.randint(17, 40)):
            x = extreme(n, k, dtype).cuda()
            if seed % 2:  # any bits at all
                integers = torch.int16 if x.itemsize == 2 else torch.int32
                most = 2 ** (8 * x.itemsize - 1)
                x = torch.randint(-most, most, (n, k), dtype=integers, device="cuda").view(dtype)
            blocks = quantize_activation_q8_1(x)
            of_floats, of_blocks = quantizer.fragment_q8_1(x), quantizer.fragment_q8_1(blocks)
            usable = torch.isfinite(blocks[..., :2].contiguous().view(torch.float16)).all()
            assert not usable or torch.equal(of_floats, of_blocks)
            cuts = list(decode_cuts.candidates(n, packed.shape[1], k, 4, Q4_0, 132, q8_1=True))
            for config in draw.sample(cuts, min(len(cuts), 8)):
                like = replace(config, quantizes=False)
                two = decode_a16.linear_q8_1(blocks, packed, scales, m, like)
                one = decode_a16.linear_q8_1(x, packed, scales, m, config)
                label = f"M={m} N={n} K={k} {config}"
                torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True, msg=label)


@pytest.mark.gpu
def test_decode_of_blocks_is_near_float64_and_looks_at_s_no_more_than_before():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    for m, k in ((4096, 14336), (1000, 4096), (333, 1152)):
        w = quantize_q4_0(torch.randn(m, k, device="cuda"))
        dense = dequantize_q4_0(w, torch.float64)
        for n in (*range(1, 17), 24, 32):
            a = quantize_activation_q8_1(torch.randn(n, k, device="cuda"))
            y = gemm_q4_0_q8_1(w, a, m, n, k, kernel="cuda-decode")
            assert nmse(y, dense @ dequantize_q8_1(a, torch.float64).t()) < 5e-6, f"M={m} N={n} K={k}"
            other = a.clone()
            other[..., 2:4] = 0x7F
            assert torch.equal(gemm_q4_0_q8_1(w, other, m, n, k, kernel="cuda-decode"), y)
            shifted = torch.empty(a.numel() + 4, dtype=torch.uint8, device="cuda")[4:].view(a.shape).copy_(a)
            assert torch.equal(gemm_q4_0_q8_1(w, shifted, m, n, k, kernel="cuda-decode"), y)
            if n > 2:  # a view of later tokens starts where bulk copies can
                last = gemm_q4_0_q8_1(w, a[n - 1 :], m, 1, k, kernel="cuda-decode")
                assert nmse(last, y[:, n - 1 :].cpu().double()) < 1e-10


@pytest.mark.gpu
def test_decode_right_behind_the_quantizer_waits_for_it():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    m, k = 4096, 4096
    w = quantize_q4_0(torch.randn(m, k, device="cuda"))
    for n in (1, 2, 8, 16):
        xs = [torch.randn(n, k, device="cuda") for _ in range(20)]
        expected, expected_at_once = [], []
        for x in xs:
            expected.append(gemm_q4_0_q8_1(w, quantize_activation_q8_1(x), m, n, k, kernel="cuda-decode"))
            torch.cuda.synchronize()
            expected_at_once.append(quantize_gemm_q4_0_q8_1(w, x, kernel="cuda-decode"))
            torch.cuda.synchronize()
        again = [gemm_q4_0_q8_1(w, quantize_activation_q8_1(x), m, n, k, kernel="cuda-decode") for x in xs]
        at_once = [quantize_gemm_q4_0_q8_1(w, x, kernel="cuda-decode") for x in xs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [gemm_q4_0_q8_1(w, quantize_activation_q8_1(x), m, n, k, kernel="cuda-decode") for x in xs]
            captured_at_once = [quantize_gemm_q4_0_q8_1(w, x, kernel="cuda-decode") for x in xs]
        graph.replay()
        for found in (again, captured):
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        for found in (at_once, captured_at_once):
            assert all(torch.equal(*pair) for pair in zip(found, expected_at_once, strict=True))

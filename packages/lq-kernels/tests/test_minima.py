"""Int4 weights with minima, and int8 weights in groups, in fragment order, by every kernel: against float64 references."""

import pytest
import torch
from lq_formats import DTypeError, NoKernelError, ShapeError
from lq_formats.layouts import FRAGMENT_INT4, FRAGMENT_INT8
from lq_kernels import (
    Arch,
    Problem,
    batch_invariant,
    explain,
    kernel_names,
    minima_dequantize,
    minima_linear,
    preshuffled_dequantize,
    preshuffled_linear,
)
from lq_kernels.ops import preshuffled_spec

H200 = Arch("cuda", (9, 0), "NVIDIA H200", 132)
DTYPES = [pytest.param(torch.bfloat16, 8e-3, id="bf16"), pytest.param(torch.float16, 1.5e-3, id="fp16")]
TOKENS = (1, 2, 5, 8, 9, 16, 17, 33, 64, 100, 129, 256, 600)
SHAPES = [(256, 1024), (1000, 2304), (40, 96), (17, 4128), (512, 544)]


class Minima:
    """A weight whose groups have a minimum; in a tenth of them the scale is 0."""

    group_size = 32

    def __init__(self, n, k, device="cpu", dtype=torch.float16):
        generator = torch.Generator().manual_seed(n + k)
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(n, k // 32, generator=generator) * 0.02 + 0.001).to(dtype)
        scale[torch.rand(scale.shape, generator=generator) < 0.1] = 0
        minimum = (-7.5 * scale.float() + 0.02 * torch.randn(scale.shape, generator=generator)).to(dtype)
        wide = (each.double().repeat_interleave(32, 1) for each in (scale, minimum))
        self.w = (codes.double() * next(wide) + next(wide)).to(device)
        arranged = (FRAGMENT_INT4.arrange_scales(each, k, 32) for each in (scale, minimum))
        self.tensors = tuple(each.to(device) for each in (FRAGMENT_INT4.pack(codes), *arranged))
        self.sizes = {"group_size": 32, "out_features": n}

    def linear(self, x, **options):
        return minima_linear(x, *self.tensors, **self.sizes, **options)

    def dequantize(self, dtype):
        return minima_dequantize(*self.tensors, **self.sizes, in_features=self.w.shape[1], dtype=dtype)


class Int8Groups:
    """An int8 weight in groups."""

    def __init__(self, n, k, device="cpu", dtype=torch.float16, group_size=32):
        generator = torch.Generator().manual_seed(n + k)
        codes = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8)
        scale = (torch.randn(n, k // group_size, generator=generator) * 0.001).to(dtype)
        self.w = ((codes.double() - 128) * scale.double().repeat_interleave(group_size, 1)).to(device)
        arranged = FRAGMENT_INT8.arrange_scales(scale, k, group_size)
        self.tensors = tuple(each.to(device) for each in (FRAGMENT_INT8.pack(codes), arranged))
        self.sizes = {"bits": 8, "group_size": group_size, "out_features": n}

    def linear(self, x, **options):
        return preshuffled_linear(x, *self.tensors, **self.sizes, **options)

    def dequantize(self, dtype):
        return preshuffled_dequantize(*self.tensors, **self.sizes, in_features=self.w.shape[1], dtype=dtype)


WEIGHTS = [pytest.param(Minima, id="minima"), pytest.param(Int8Groups, id="int8")]


def error(y, x, w, bias=None):
    exact = x.double() @ w.t() + (0 if bias is None else bias.double())
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("make", WEIGHTS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_weight_is_what_is_said(make, n, k):
    weight = make(n, k)
    assert torch.equal(weight.dequantize(torch.float64), weight.w)
    assert torch.equal(weight.dequantize(torch.float32), weight.w.float())


@pytest.mark.parametrize("kernel", [None, "dequant-blas", "reference"])
@pytest.mark.parametrize("make", WEIGHTS)
def test_products_on_the_cpu(make, kernel):
    weight = make(100, 544)
    x, bias = torch.randn(2, 3, 544), torch.randn(100)
    y = weight.linear(x, bias=bias, kernel=kernel)
    assert tuple(y.shape) == (2, 3, 100)
    assert error(y.view(-1, 100), x.view(-1, 544), weight.w, bias) < 1e-5
    if kernel is None:
        with batch_invariant():
            assert torch.equal(weight.linear(x)[0, 0], weight.linear(x[0, 0]))


def test_a_known_weight_is_multiplied_the_same_way_again():
    weight = Minima(48, 160)
    x = torch.randn(3, 160)
    first = weight.linear(x)
    assert torch.equal(weight.linear(x), first)
    # The same tensors as a weight with zero points are another weight.
    other = preshuffled_linear(x, *weight.tensors, bits=4, **weight.sizes)
    assert error(other, x, weight.w) > 0.1
    assert torch.equal(weight.linear(x), first)
    weight.tensors[2].zero_()
    assert error(weight.linear(x), x, weight.w) > 0.1


def test_no_tokens_give_an_empty_result():
    assert tuple(Minima(32, 128).linear(torch.zeros(0, 128)).shape) == (0, 32)


def test_the_gradient_is_that_of_the_dense_weight():
    weight = Minima(32, 128)
    x, bias = torch.randn(4, 128, requires_grad=True), torch.randn(32, requires_grad=True)
    weight.linear(x, bias=bias).sum().backward()
    assert torch.allclose(x.grad.double(), weight.w.sum(0).expand(4, -1), atol=1e-5)
    assert torch.equal(bias.grad, torch.full((32,), 4.0))


def test_opcheck():
    weight = Minima(32, 128)
    x = torch.randn(3, 128, requires_grad=True)
    torch.library.opcheck(torch.ops.lq.minima_linear, (x, *weight.tensors, None, 32, 32, ""))
    torch.library.opcheck(torch.ops.lq.minima_dequantize, (*weight.tensors, 32, 32, 128, torch.float32))


@pytest.mark.parametrize(("op", "bits"), [("preshuffled_minima", 4), ("preshuffled", 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hopper_runs_them_by_its_own_kernels(op, bits, dtype, monkeypatch):
    monkeypatch.setattr("lq_kernels.cuda.constraints.why_not_compile", lambda: None)
    spec = preshuffled_spec(bits, 32, 4096, bits == 8, torch.float16)
    chosen = {m: explain(Problem(op, m, 4096, 4096, spec, dtype, H200)).chosen for m in (1, 4, 64, 256)}
    assert chosen == {1: "cuda-decode", 4: "cuda-decode", 64: "cuda-prefill", 256: "cuda-prefill"}
    mode = Problem(op, 1, 4096, 4096, spec, dtype, H200, batch_invariant=True)
    assert explain(mode).chosen == "cuda-prefill"
    assert explain(Problem(op, 1, 4096, 4096, spec, torch.float32, H200)).chosen == "dequant-blas"


def test_what_does_not_fit_is_named():
    weight = Minima(32, 256)
    packed, scale, minimum = weight.tensors
    x = torch.randn(2, 256)
    with pytest.raises(ShapeError, match="minima are of groups"):
        minima_linear(x, packed, scale, minimum, group_size=256, out_features=32)
    with pytest.raises(ShapeError, match="minimum has shape"):
        minima_linear(x, packed, scale, minimum[:1].contiguous(), **weight.sizes)
    with pytest.raises(DTypeError, match="minimum has dtype"):
        minima_linear(x, packed, scale, minimum.float(), **weight.sizes)
    with pytest.raises(NoKernelError, match="needs a Hopper GPU"):
        weight.linear(x, kernel="cuda-decode")
    packed, scale = Int8Groups(32, 256).tensors
    with pytest.raises(ShapeError, match="8-bit weights in fragment order have no zeros"):
        preshuffled_linear(x, packed, scale, scale, bits=8, group_size=32, out_features=32)


def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("make", WEIGHTS)
@pytest.mark.parametrize("kernel", kernel_names("preshuffled_minima"))
def test_every_kernel_on_a_gpu(kernel, make, dtype, bound):
    if kernel.startswith("cuda"):
        hopper()
    for n, k in SHAPES:
        weight = make(n, k, "cuda")
        for m in TOKENS:
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            bias = torch.randn(n, device="cuda", dtype=dtype) if m % 2 else None
            found = error(weight.linear(x, bias=bias, kernel=kernel), x, weight.w, bias)
            assert found < bound, (n, k, m)
            assert found**2 < 5e-5


@pytest.mark.gpu
@pytest.mark.parametrize("make", WEIGHTS)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_other_scales_on_a_gpu(make, scale_dtype):
    hopper()
    weight = make(400, 1120, "cuda", scale_dtype)
    for m in (1, 12, 70):
        x = torch.randn(m, 1120, device="cuda", dtype=torch.bfloat16)
        for kernel in ("cuda-decode", "cuda-prefill"):
            assert error(weight.linear(x, kernel=kernel), x, weight.w) < 8e-3, (m, kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [64, 128, 256])
def test_longer_groups_of_int8_on_a_gpu(group_size):
    hopper()
    weight = Int8Groups(272, 1280, "cuda", group_size=group_size)
    for m in (1, 12, 70, 300):
        x = torch.randn(m, 1280, device="cuda", dtype=torch.bfloat16)
        for kernel in ("cuda-decode", "cuda-prefill"):
            assert error(weight.linear(x, kernel=kernel), x, weight.w) < 8e-3, (m, kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("make", WEIGHTS)
def test_the_dense_weight_on_a_gpu(make):
    for n, k in SHAPES:
        weight = make(n, k, "cuda")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(weight.dequantize(dtype), weight.w.float().to(dtype)), (n, k, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("make", WEIGHTS)
def test_the_batch_invariant_mode_on_a_gpu(make):
    hopper()
    weight = make(1024, 2048, "cuda")
    x = torch.randn(200, 2048, device="cuda", dtype=torch.bfloat16)
    with batch_invariant():
        whole = weight.linear(x)
        for m in (1, 7, 64, 130):
            assert torch.equal(weight.linear(x[:m]), whole[:m])
    assert error(whole, x, weight.w) < 8e-3

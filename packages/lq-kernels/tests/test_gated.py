"""Fused epilogues: silu(gate) * up and a residual, by every kernel, against float64 references; rows interleave losslessly."""

import functools
import itertools

import lq_kernels
import pytest
import torch
from lq_formats import DTypeError, NoKernelError, ShapeError, pack_int4
from lq_kernels import (
    Arch,
    Problem,
    explain,
    interleave_rows,
    kernel_names,
    preshuffle_int4,
    preshuffle_int8,
    preshuffled_gated_linear,
    preshuffled_linear,
    select,
    separate_rows,
)
from lq_kernels.gated import interleaved_rows
from lq_kernels.ops import preshuffled_spec
from lq_kernels.prepare import units

FORMATS = [
    pytest.param(4, 128, False, torch.bfloat16, id="int4-g128-sym"),
    pytest.param(4, 32, False, torch.float16, id="int4-g32-sym"),
    pytest.param(4, 64, True, torch.bfloat16, id="int4-g64-asym"),
    pytest.param(4, -1, True, torch.bfloat16, id="int4-row-asym"),
    pytest.param(8, -1, False, torch.float32, id="int8-row"),
]
KERNELS = kernel_names("preshuffled_gated")
HOPPER = [name for name in KERNELS if name.startswith("cuda")]
# What the Hopper kernels and the reference round once, relative to the largest that can be meant: see `check`.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
TOKENS = (1, 2, 3, 8, 9, 16, 17, 31, 33, 64, 100, 129, 200, 255, 300)


class Pair:
    """A gate and an up projection ``(h, k)``, random; their weight in fragment order, interleaved and stacked."""

    def __init__(self, h, k, bits, group, zero, scale_dtype, device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.h, self.k, self.bits, self.group = h, k, bits, k if group == -1 else group
        scale = (torch.rand(2 * h, k // self.group, generator=generator) * 0.02 + 0.001).to(scale_dtype)
        codes = torch.randint(0, 1 << bits, (2 * h, k), generator=generator, dtype=torch.uint8)
        zeros = torch.randint(0, 16, scale.shape, generator=generator, dtype=torch.uint8) if zero else None
        offset = zeros.double() if zero else torch.full(scale.shape, float(1 << (bits - 1)), dtype=torch.float64)
        spread = functools.partial(torch.repeat_interleave, repeats=self.group, dim=1)
        self.w = ((codes.double() - spread(offset)) * spread(scale.double())).to(device)
        if bits == 4:
            self.canonical = (pack_int4(codes), scale, zeros)
        else:
            self.canonical = ((codes ^ 0x80).view(torch.int8), scale[:, 0].contiguous(), None)
        self.stacked = self._fragments(self.canonical, device)
        self.weight = self._fragments(tuple(None if t is None else interleave_rows(t) for t in self.canonical), device)

    def _fragments(self, canonical, device):
        if self.bits == 4:
            weight = preshuffle_int4(*canonical, group_size=self.group, in_features=self.k)
        else:
            weight = (*preshuffle_int8(*canonical[:2]), None)
        return tuple(None if t is None else t.to(device) for t in weight)

    def run(self, x, bias=None, kernel=None):
        sizes = {"bits": self.bits, "group_size": self.group, "out_features": self.h}
        return preshuffled_gated_linear(x, *self.weight, **sizes, bias=bias, kernel=kernel)

    def apart(self, x, bias=None, kernel=None):
        sizes = {"bits": self.bits, "group_size": self.group, "out_features": 2 * self.h}
        gate, up = preshuffled_linear(x, *self.stacked, **sizes, bias=bias, kernel=kernel).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def halves(self, x, bias=None):
        return (x.double() @ self.w.t() + (0 if bias is None else bias.double())).chunk(2, -1)

    def exact(self, x, bias=None):
        gate, up = self.halves(x, bias)
        return torch.nn.functional.silu(gate) * up


def error(y, exact):
    """Return the relative error; of results that happen to be small, that of gates and ups of about 1."""
    return float((y.double() - exact).norm() / max(exact.norm(), 0.25 * exact.numel() ** 0.5))


# ---- rows ----


@pytest.mark.parametrize("h", [0, 1, 7, 8, 9, 16, 100])
@pytest.mark.parametrize("rest", [(), (3,), (2, 5)], ids=str)
def test_rows_come_back(h, rest):
    values = torch.randint(0, 255, (2 * h, *rest), dtype=torch.uint8)
    interleaved = interleave_rows(values)
    assert tuple(interleaved.shape) == (interleaved_rows(h), *rest)
    assert torch.equal(separate_rows(interleaved, h), values)


def test_gates_and_ups_alternate_by_eights():
    values = torch.cat((torch.arange(1, 11), 100 + torch.arange(1, 11)))
    gate, up, nothing = list(range(1, 11)), list(range(101, 111)), [0] * 6
    assert interleave_rows(values).tolist() == [*gate[:8], *up[:8], *gate[8:], *nothing, *up[8:], *nothing]


def test_rows_that_are_no_pairs_are_refused():
    with pytest.raises(ShapeError, match=r"\(3, 2\): expected \(2 H"):
        interleave_rows(torch.zeros(3, 2))
    with pytest.raises(ShapeError, match=r"9 gates and ups need \(32"):
        separate_rows(torch.zeros(16, 2), 9)


# ---- without a GPU ----


@pytest.mark.parametrize("kernel", [None, "dequant-blas", "reference"])
@pytest.mark.parametrize("h", [96, 100, 1])
@pytest.mark.parametrize(("bits", "group", "zero", "scale_dtype"), FORMATS)
def test_products_on_the_cpu(bits, group, zero, scale_dtype, h, kernel):
    pair = Pair(h, 256, bits, group, zero, scale_dtype)
    x, bias = torch.randn(2, 3, 256), torch.randn(2 * h)
    for each in (None, bias):
        y = pair.run(x, each, kernel)
        assert tuple(y.shape) == (2, 3, h)
        assert error(y, pair.exact(x, each)) < 1e-4
        assert error(pair.apart(x, each), y.double()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_fused_is_closer_than_apart(dtype):
    pair = Pair(512, 512, 4, 128, False, torch.bfloat16)
    x = torch.randn(64, 512).to(dtype)
    exact = pair.exact(x)
    once, twice, apart = (
        error(y, exact) for y in (pair.run(x, None, "reference"), pair.run(x, None, "dequant-blas"), pair.apart(x))
    )
    assert once < 0.5 * ROUNDING[dtype]
    assert once < twice < apart < 4 * ROUNDING[dtype]


def test_no_tokens_give_an_empty_result():
    pair = Pair(20, 128, 4, 32, False, torch.float32)
    x = torch.zeros(0, 128, requires_grad=True)
    y = pair.run(x)
    assert tuple(y.shape) == (0, 20)
    y.sum().backward()
    assert tuple(x.grad.shape) == (0, 128)


@pytest.mark.parametrize("h", [32, 20])
def test_the_gradient_is_that_of_the_dense_weight(h):
    pair = Pair(h, 128, 4, 32, True, torch.float32)
    x, bias = torch.randn(4, 128).requires_grad_(), torch.randn(2 * h).requires_grad_()
    scale = torch.randn(4, h)
    (pair.run(x, bias) * scale).sum().backward()
    wide = [each.detach().double().requires_grad_() for each in (x, bias)]
    (pair.exact(*wide) * scale).sum().backward()
    for got, want in zip((x, bias), wide, strict=True):
        assert error(got.grad, want.grad) < 1e-5


@pytest.mark.parametrize("h", [32, 20])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_opcheck(h, with_bias):
    pair = Pair(h, 128, 4, 32, True, torch.float32)
    x = torch.randn(3, 128, requires_grad=True)
    bias = torch.randn(2 * h, requires_grad=True) if with_bias else None
    torch.library.opcheck(torch.ops.lq.preshuffled_gated_linear, (x, *pair.weight, bias, 4, 32, h, ""))
    residual, stacked = torch.randn(3, 2 * h, requires_grad=True), (*pair.stacked, bias)
    torch.library.opcheck(torch.ops.lq.preshuffled_linear_add, (x, *stacked, residual, 4, 32, 2 * h, ""))


def test_compiles_into_one_graph_at_any_number_of_tokens():
    pair = Pair(24, 128, 4, 32, False, torch.float32)
    bias = torch.randn(48)

    def product(x, residual):
        sizes = {"bits": 4, "group_size": 32, "out_features": 48}
        return pair.run(x, bias), preshuffled_linear(x, *pair.stacked, **sizes, residual=residual)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(product, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (11, 13):  # sizes of nothing else, of which duck sizing would make one symbol
        x, residual = torch.randn(m, 128), torch.randn(m, 48)
        torch.testing.assert_close(compiled(x, residual), product(x, residual))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_eager_calls_are_remembered():
    pair = Pair(24, 128, 4, 32, False, torch.float32)
    first, second = torch.randn(3, 128), torch.randn(2, 5, 128)
    once = [pair.run(x) for x in (first, second)]
    again = [pair.run(x) for x in (first, second)]
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)
    pair.weight[1].mul_(2)  # scales that change are seen
    assert error(pair.run(first), once[0].double()) > 0.5


def test_bad_arguments_are_named():
    pair = Pair(32, 256, 4, 64, True, torch.float32)
    x = torch.randn(2, 256)
    sizes = {"bits": 4, "group_size": 64}
    with pytest.raises(ShapeError, match="packed has shape"):
        preshuffled_gated_linear(x, *pair.weight, **sizes, out_features=64)
    with pytest.raises(ShapeError, match=r"bias has shape \(32,\): expected \(64,\)"):
        preshuffled_gated_linear(x, *pair.weight, **sizes, out_features=32, bias=torch.zeros(32))
    with pytest.raises(NoKernelError, match="needs a Hopper GPU"):
        preshuffled_gated_linear(x, *pair.weight, **sizes, out_features=32, kernel="cuda-decode")
    with pytest.raises(ShapeError, match=r"residual has shape \(2, 32\): expected \(2, 64\)"):
        preshuffled_linear(x, *pair.stacked, **sizes, out_features=64, residual=torch.zeros(2, 32))
    with pytest.raises(DTypeError, match="residual has dtype"):
        preshuffled_linear(x, *pair.stacked, **sizes, out_features=64, residual=torch.zeros(2, 64).half())


@pytest.mark.parametrize("kernel", [None, "dequant-blas", "reference"])
@pytest.mark.parametrize(("bits", "group", "zero", "scale_dtype"), FORMATS)
def test_a_residual_is_added(bits, group, zero, scale_dtype, kernel):
    pair = Pair(50, 256, bits, group, zero, scale_dtype)
    x, bias, residual = torch.randn(2, 3, 256), torch.randn(100), torch.randn(2, 3, 100)
    sizes = {"bits": bits, "group_size": pair.group, "out_features": 100}
    before = residual.clone()
    for each in (None, bias):
        exact = x.double() @ pair.w.t() + (0 if each is None else each.double()) + residual.double()
        y = preshuffled_linear(x, *pair.stacked, **sizes, bias=each, residual=residual, kernel=kernel)
        assert error(y, exact) < 1e-5
    assert torch.equal(residual, before)


def test_the_gradient_of_a_residual_is_that_of_the_sum():
    pair = Pair(16, 128, 4, 32, True, torch.float32)
    x, bias, residual = (torch.randn(*shape).requires_grad_() for shape in ((4, 128), (32,), (4, 32)))
    sizes = {"bits": 4, "group_size": 32, "out_features": 32}
    scale = torch.randn(4, 32)
    (preshuffled_linear(x, *pair.stacked, **sizes, bias=bias, residual=residual) * scale).sum().backward()
    assert torch.equal(residual.grad, scale)
    assert error(bias.grad, scale.double().sum(0)) < 1e-6
    assert error(x.grad, scale.double() @ pair.w) < 1e-5


def test_selection_is_that_of_the_product_without_the_epilogue():
    arch = Arch("cuda", (9, 0), "NVIDIA H200", 132)
    for bits, group in ((4, 128), (4, 4096), (8, 4096)):
        spec = preshuffled_spec(bits, group, 4096, True, torch.bfloat16)
        for invariant, m in itertools.product((False, True), (1, 16, 4096)):
            gated, plain = (
                Problem(op, m, 28672, 4096, spec, torch.bfloat16, arch) for op in ("preshuffled_gated", "preshuffled")
            )
            with lq_kernels.batch_invariant(invariant):
                found, other = explain(gated), explain(plain)
            assert (found.chosen, found.cut) == (other.chosen, other.cut)
        compiled, others = units(gated), units(plain)
        assert [unit.source for unit in compiled] == [unit.source for unit in others]
        for unit, other in zip(compiled, others, strict=True):
            epilogue = () if unit.source == "dequantize_fragment" else ("LQ_GATED=1",)
            assert unit.defines == (*other.defines, *epilogue)
    assert select(Problem("preshuffled_gated", 1, 64, 64, spec, torch.float32, Arch.of("cpu"))).name == "dequant-blas"


@pytest.mark.parametrize("kernel", ["dequant-blas", "cuda-prefill"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tokens_do_not_depend_on_the_batch_in_the_mode(device, kernel):
    if kernel == "cuda-prefill":
        if device == "cpu":
            pytest.skip("needs a Hopper GPU")
        hopper()
    pair = Pair(104, 1024, 4, 128, False, torch.bfloat16, device)
    x = torch.randn(40, 1024, device=device).to(torch.bfloat16)
    residual = torch.randn(40, 208, device=device).to(torch.bfloat16)
    sizes = {"bits": 4, "group_size": 128, "out_features": 208, "kernel": kernel}
    with lq_kernels.batch_invariant():
        whole, added = pair.run(x, None, kernel), preshuffled_linear(x, *pair.stacked, **sizes, residual=residual)
        for part in (slice(0, 1), slice(7, 24)):
            assert torch.equal(pair.run(x[part], None, kernel), whole[part])
            one = preshuffled_linear(x[part], *pair.stacked, **sizes, residual=residual[part])
            assert torch.equal(one, added[part])
    assert error(whole, pair.exact(x)) < 1e-2


# ---- on a GPU ----


def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def check(y, exact, magnitude, dtype, kernel):
    """Assert every element within what its roundings and fp32 sums explain; ``magnitude`` bounds the terms of the sums."""
    roundings = 1.01 if kernel.startswith("cuda") or kernel == "reference" else 4.0
    bound = roundings * ROUNDING[dtype] * exact.abs() + magnitude
    worst = ((y.double() - exact).abs() / bound).max().item()
    assert worst <= 1.0, f"worst error is {worst:.3g} times its bound"


def check_few(y, pair, x, bias, relative):
    """Assert every element within what gate and up explain, each off by ``2 * relative`` of its usual size or its own."""
    gate, up = pair.halves(x, bias)
    usual = pair.w.norm(dim=1).mean() * x.double().norm(dim=1, keepdim=True) / pair.k**0.5
    gate_off, up_off = (2 * relative * each.abs().maximum(usual) for each in (gate, up))
    exact, silu = pair.exact(x, bias), torch.nn.functional.silu(gate)
    bound = gate_off * 1.1 * (up.abs() + up_off) + silu.abs() * up_off + relative * exact.abs()
    worst = ((y.double() - exact).abs() / bound).max().item()
    assert worst <= 1.0, f"worst error is {worst:.3g} times its bound"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("bits", "group", "zero", "scale_dtype"), FORMATS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_on_a_gpu(kernel, bits, group, zero, scale_dtype, dtype):
    if kernel.startswith("cuda"):
        hopper()
    if kernel == "cuda-prefill" and dtype == torch.float16 and group != -1 and scale_dtype != dtype:
        pytest.skip("scales may not fit float16")
    for h, k in ((256, 1024), (1000, 2304), (44, 512), (8, 256), (3, 256)):
        pair = Pair(h, k, bits, group, zero, scale_dtype, "cuda", seed=h)
        for m in TOKENS:
            # Gates of about 1: far below, silu(gate) is nothing but the error of gate.
            x = (torch.randn(m, k, device="cuda") / pair.w.norm(dim=1).mean()).to(dtype)
            bias = torch.randn(2 * h, device="cuda").to(dtype) if m % 2 else None
            poison = torch.full((m, h), float("nan"), device="cuda", dtype=dtype)
            del poison  # the next result takes its memory
            y = pair.run(x, bias, kernel)
            bound = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3}[dtype]
            if m * h < 512:  # few results: a large gate times an up that is small by chance may be far off
                check_few(y, pair, x, bias, bound)
            else:
                assert error(y, pair.exact(x, bias)) < bound, (h, k, m)
            if kernel == "cuda-decode":  # weights are exact there: one rounding, and fp32 sums
                gate, up = (x.double().abs() @ pair.w.abs().t()).chunk(2, -1)
                exact = pair.exact(x, bias)
                terms = 4e-6 * (gate * (up + 3) + up * (gate + 3)) + 1e-6
                check(y, exact, terms, dtype, kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("bits", "group", "zero", "scale_dtype"), FORMATS)
@pytest.mark.parametrize("kernel", kernel_names("preshuffled"))
def test_every_kernel_adds_a_residual(kernel, bits, group, zero, scale_dtype, dtype):
    if kernel.startswith("cuda"):
        hopper()
    if kernel == "cuda-prefill" and dtype == torch.float16 and group != -1 and scale_dtype != dtype:
        pytest.skip("scales may not fit float16")
    for h, k in ((256, 1024), (500, 2304), (24, 512), (3, 256)):
        n, pair = 2 * h, Pair(h, k, bits, group, zero, scale_dtype, "cuda", seed=h)
        sizes = {"bits": bits, "group_size": pair.group, "out_features": n, "kernel": kernel}
        for m in TOKENS:
            x = torch.randn(m, k, device="cuda").to(dtype)
            bias = torch.randn(n, device="cuda").to(dtype) if m % 2 else None
            # From memory that is not aligned to 16 bytes as well.
            start = 3 if m % 3 == 0 else 0
            residual = (8 * torch.randn(m * n + 3, device="cuda")).to(dtype)[start : start + m * n].view(m, n)
            y = preshuffled_linear(x, *pair.stacked, **sizes, bias=bias, residual=residual)
            exact = x.double() @ pair.w.t() + residual.double() + (0 if bias is None else bias.double())
            assert error(y, exact) < {torch.bfloat16: 8e-3, torch.float16: 1.5e-3}[dtype], (h, k, m)
            if kernel.startswith("cuda"):
                plain = preshuffled_linear(x, *pair.stacked, **sizes, bias=bias)
                zeros = torch.zeros_like(residual)
                assert torch.equal(preshuffled_linear(x, *pair.stacked, **sizes, bias=bias, residual=zeros), plain)
                # The sum is rounded once: what remains of the product is what rounding takes from it, and not nothing.
                rest = preshuffled_linear(x, *pair.stacked, **sizes, bias=bias, residual=-plain)
                assert bool((rest.double().abs() <= ROUNDING[dtype] * plain.double().abs() + 1e-7).all())
                assert float((rest != 0).double().mean()) > 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 200])
@pytest.mark.parametrize("kernel", HOPPER)
def test_runs_are_bitwise_equal_into_poisoned_memory(kernel, m):
    hopper()
    pair = Pair(2048, 2048, 4, 128, False, torch.bfloat16, "cuda")
    x = torch.randn(m, 2048, device="cuda").to(torch.bfloat16)
    residual = torch.randn(m, 4096, device="cuda").to(torch.bfloat16)
    sizes = {"bits": 4, "group_size": 128, "out_features": 4096, "kernel": kernel}
    products = (
        lambda: pair.run(x, None, kernel),
        lambda: preshuffled_linear(x, *pair.stacked, **sizes, residual=residual),
    )
    for product in products:
        first = product()
        different = torch.zeros((), device="cuda", dtype=torch.int64)
        for _ in range(200):
            poison = torch.full_like(first, float("nan"))
            del poison
            different += (product() != first).sum()
        assert int(different) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", HOPPER)
def test_nan_and_infinity_propagate_to_their_token_only(kernel):
    hopper()
    pair = Pair(128, 512, 4, 128, False, torch.bfloat16, "cuda")
    for value in (float("nan"), float("inf")):
        x = torch.randn(20, 512, device="cuda").to(torch.bfloat16)
        x[3, 77] = value
        y = pair.run(x, None, kernel)
        want = pair.apart(x, None, kernel)
        assert torch.equal(torch.isfinite(y), torch.isfinite(want))
        assert not bool(torch.isfinite(y[3]).all())
        assert bool(torch.isfinite(torch.cat((y[:3], y[4:]))).all())


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", HOPPER)
def test_large_gates_of_both_signs(kernel):
    hopper()
    pair = Pair(64, 256, 8, -1, False, torch.float32, "cuda")
    x = torch.randn(9, 256, device="cuda").to(torch.bfloat16) * 30  # gates of several hundred: exp overflows
    exact = pair.exact(x)
    assert float(exact.abs().max()) > 1e4
    assert error(pair.run(x, None, kernel), exact) < 8e-3
    assert bool(torch.isfinite(pair.run(x, None, kernel)).all())


@pytest.mark.gpu
def test_a_cuda_graph_holds_both():
    hopper()
    pair = Pair(256, 512, 4, 128, False, torch.bfloat16, "cuda")
    x = torch.randn(4, 512, device="cuda").to(torch.bfloat16)
    residual = torch.randn(4, 512, device="cuda").to(torch.bfloat16)
    sizes = {"bits": 4, "group_size": 128, "out_features": 512}

    def product():
        return pair.run(x), preshuffled_linear(x, *pair.stacked, **sizes, residual=residual)

    want = product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = product()
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_a_residual_of_no_out_features_is_added():
    packed = preshuffle_int8(torch.zeros(0, 16, dtype=torch.int8), torch.ones(0))
    y = preshuffled_linear(torch.ones(2, 16), *packed, bits=8, group_size=16, out_features=0, residual=torch.ones(2, 0))
    assert y.shape == (2, 0)

"""The Hopper kernels on random shapes, cuts and strides, every result against float64 on dequantized operands.

An example that fails is printed with its seed, from which all its numbers come. What is compiled is fixed (a second each, then
it is cached); shapes, cuts, strides, biases and tokens that are not finite are drawn for it. One long file: the kernels share
what is drawn and how results are compared.
"""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lq_formats.layouts import FRAGMENT_A8_FP8, FRAGMENT_A8_INT8, FRAGMENT_INT4, FRAGMENT_INT8
from lq_kernels import (
    Arch,
    int4_dynamic_linear,
    int8_dynamic_linear,
    interleave_rows,
    preshuffled_gated_linear,
    preshuffled_linear,
)
from lq_kernels.cuda import decode_a16, decode_cuts, linear_a8, prefill_a16, prefill_cuts
from lq_kernels.cuda.quantize_tokens import quantize_tokens
from lq_kernels.cuda.variant import Variant
from lq_kernels.dynamic_reference import dequantize_tokens_reference, quantize_tokens_reference
from lq_kernels.gated import interleaved_rows
from lq_kernels.jit.workspace import workspace

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BOUND = {BF16: 8e-3, FP16: 1.5e-3}
"""Of the norm of the exact result, by the dtype of x."""
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-23}
"""Of one result, at most."""
MOST_TOKENS, MOST_ROWS, MOST_FEATURES = 700, 600, 2048


@dataclasses.dataclass(frozen=True)
class Form:
    """What a kernel for 16-bit tokens is compiled for.

    Attributes:
        x, scale: dtypes.
        bits, group: Of the weight; group -1 for one scale a row.
        zero: Whether there are zeros.
        tile: Tokens of a tile; of the decode kernel in eights.
        epilogue: ``"none"``, ``"residual"``, ``"silu_mul"`` or ``"transposed"``.
    """

    x: torch.dtype
    scale: torch.dtype
    bits: int
    group: int
    zero: bool
    tile: int
    epilogue: str = "none"

    def __str__(self):
        group = "row" if self.group == -1 else f"g{self.group}"
        names = f"int{self.bits}", group, "asym" if self.zero else "sym", str(self.x)[6:], str(self.scale)[6:]
        return "-".join((*names, f"T{self.tile}", self.epilogue))


DECODE = (
    Form(BF16, BF16, 4, 128, False, 1),
    Form(BF16, BF16, 4, 128, False, 2, "residual"),
    Form(BF16, BF16, 4, 128, False, 2, "silu_mul"),
    Form(BF16, FP16, 4, 32, False, 1, "transposed"),
    Form(FP16, FP16, 4, 32, False, 2),
    Form(FP16, FP16, 4, 128, False, 2),
    Form(BF16, BF16, 4, 64, True, 2, "residual"),
    Form(BF16, BF16, 4, 64, True, 1, "silu_mul"),
    Form(BF16, BF16, 4, 128, True, 1),
    Form(FP16, FP16, 4, 32, True, 2, "transposed"),
    Form(BF16, BF16, 4, -1, True, 2),
    Form(BF16, FP16, 4, 32, True, 1),
    Form(BF16, FP32, 4, 256, True, 2),
    Form(FP16, BF16, 4, -1, True, 1, "residual"),
    Form(FP16, FP32, 8, -1, False, 2),
    Form(BF16, FP32, 8, -1, False, 1),
)
PREFILL = (
    Form(BF16, BF16, 4, 128, False, 256),
    Form(BF16, BF16, 4, 128, False, 64, "residual"),
    Form(BF16, BF16, 4, 128, False, 128, "silu_mul"),
    Form(BF16, FP16, 4, 32, False, 16, "transposed"),
    Form(FP16, FP16, 4, 32, False, 32),
    Form(FP16, FP16, 4, 128, False, 16, "residual"),
    Form(BF16, BF16, 4, 64, True, 128, "residual"),
    Form(BF16, BF16, 4, 64, True, 16),
    Form(BF16, FP32, 4, 256, True, 64),
    Form(FP16, BF16, 4, -1, True, 256),
    Form(FP16, FP32, 8, -1, False, 128),
    Form(BF16, FP32, 8, -1, False, 32, "silu_mul"),
)


@dataclasses.dataclass(frozen=True)
class A8Form:
    """What the kernel for 8-bit tokens is compiled for; see :class:`lq_kernels.cuda.linear_a8.A8Variant`."""

    bits: int
    activation: str
    x: torch.dtype
    scale: torch.dtype
    group: int
    lowest: bool
    tile: int
    multicast: bool

    def __str__(self):
        group = "row" if self.group == -1 else f"g{self.group}"
        pair = ("pair",) if self.multicast else ()
        dtypes = str(self.x)[6:], str(self.scale)[6:]
        return "-".join((f"w{self.bits}a8", self.activation, group, *dtypes, f"T{self.tile}", *pair))

    @property
    def promote(self):
        return linear_a8.promotes(self.activation, self.group != -1)


A8 = (
    A8Form(8, "int8", BF16, FP32, -1, False, 256, True),
    A8Form(8, "int8", FP16, BF16, -1, False, 16, False),
    A8Form(8, "fp8", BF16, FP32, -1, False, 192, True),
    A8Form(8, "fp8", FP16, FP32, -1, False, 64, False),
    A8Form(4, "int8", BF16, BF16, 128, False, 64, True),
    A8Form(4, "int8", FP16, FP16, -1, False, 192, False),
    A8Form(4, "fp8", BF16, BF16, 128, False, 128, True),
    A8Form(4, "fp8", FP16, FP32, 256, True, 32, False),
    A8Form(4, "fp8", BF16, FP32, -1, True, 16, False),
)


# ---- what is drawn ----


def edges(unit, most):
    """Return numbers around the first multiples of ``unit``."""
    return [at + by for at in range(unit, 4 * unit, unit) for by in (-1, 0, 1) if 1 <= at + by <= most]


def sizes(tile, least, most):
    """Draw a size, often a small one, an odd one or one at the edge of a tile."""
    near = [size for size in edges(tile, most) if size >= least]
    odd = range(least | 1, most + 1, 2)
    choices = [st.sampled_from(few) for few in (near, odd) if few]
    return st.one_of(st.integers(least, min(most, least + 15)), st.integers(least, most), *choices)


@st.composite
def problems(draw, form, tile, rows=1, unit=8, most=(MOST_TOKENS, MOST_ROWS, MOST_FEATURES)):
    """Draw M, N, K and all else that is not compiled; ``rows``: the least N, ``unit``: what K is a multiple of."""
    group = unit if form.group == -1 else form.group
    least = 1 if tile <= 16 else tile // 2 + 1  # a tile is at least half full
    m = draw(sizes(tile, least, max(most[0], least)))
    n = draw(sizes(128, rows, most[1]))
    k = group * draw(sizes(4, 1 if form.group == -1 else 2, most[2] // group))  # of one group is another form
    return {
        "m": m,
        "n": n,
        "k": k,
        "bias": draw(st.booleans()),
        "stride": draw(st.sampled_from(("none", "wide", "unaligned", "alternate", "transposed"))),
        # A cut for fewer multiprocessors than there are gives each more than one tile.
        "processors": draw(st.sampled_from((20, 40, None))),
        "cut": draw(st.integers(0, 999)),
        "bad": draw(st.sampled_from((None, None, float("nan"), float("inf"), float("-inf")))),
        "seed": draw(st.integers(0, 2**31 - 1)),
    }


MANY = settings(
    max_examples=80,
    deadline=None,
    derandomize=False,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""Other examples each time; a form runs so many, about a third of a second of a GPU."""
FEW = settings(MANY, max_examples=4)


def laid_out(x, stride):
    """Return the same numbers with other strides, in the midst of NaN."""
    m, k = x.shape
    if stride == "none":
        return x
    if stride == "transposed":
        return x.t().contiguous().t()
    shape, at = {
        "wide": ((m, k + 24), (slice(None), slice(8, k + 8))),  # aligned to 16 bytes: read where it is
        "unaligned": ((m, k + 3), (slice(None), slice(1, k + 1))),
        "alternate": ((2 * m, k), (slice(1, None, 2), slice(None))),
    }[stride]
    around = x.new_full(shape, torch.nan)
    around[at] = x
    return around[at]


class Product:
    """Random operands in fragment order, and their product in float64.

    Zeros are multiples of 1/16, which neither kernel rounds, unless they are ``fine``. ``rounded`` is the weight as the prefill
    kernel multiplies it: a group's scale, what its zero adds, and the product with the one plus the other are rounded to x's
    dtype. ``decoded`` is that of the decode kernel: codes less zeros of x's dtype are rounded to it, and nothing else.
    """

    def __init__(self, form, problem, device, fine=False):
        m, n, k = (problem[name] for name in "mnk")
        generator = torch.Generator(device).manual_seed(problem["seed"])

        def integers(most, *shape):
            return torch.randint(0, most, shape, generator=generator, device=device)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=device)

        self.form, self.n, self.group = form, n, k if form.group == -1 else form.group
        gated, groups = form.epilogue == "silu_mul", k // self.group
        rows = 2 * n if gated else n
        codes = integers(1 << form.bits, rows, k).to(torch.uint8)
        scales = (torch.rand(rows, groups, generator=generator, device=device) * 0.02 + 0.005).to(form.scale)
        zeros = (integers(241, rows, groups) / 16).to(form.scale) if form.zero else None
        if form.zero and fine:
            zeros = (0.25 + 14.5 * torch.rand(rows, groups, generator=generator, device=device)).to(form.scale)

        def spread(values):
            return values.double().repeat_interleave(self.group, dim=1)

        middle = 1 << (form.bits - 1)
        difference = codes.double() - (middle if zeros is None else spread(zeros))
        self.w = difference * spread(scales)
        self.rounded = self.decoded = self.w
        if zeros is not None and form.scale == form.x:
            self.decoded = difference.to(form.x).double() * spread(scales)
        if form.group != -1:
            added = 0 if zeros is None else spread(((middle - zeros.double()) * scales.double()).float().to(form.x))
            scaled = (codes.double() - middle) * spread(scales.to(form.x))
            self.rounded = (scaled + added).to(form.x).double()
        largest = (codes.double() - middle).abs() + (0 if zeros is None else spread((zeros - middle).abs()))
        self.largest = largest * spread(scales)

        x = normal(m, k) / (self.w.norm(dim=1).mean() if gated else 1)  # gates of about 1
        self.x = x.to(form.x)
        self.bias = normal(rows).to(form.x) if problem["bias"] else None
        self.residual = (8 * normal(m, n)).to(form.x) if form.epilogue == "residual" else None
        self.bad_token = None if problem["bad"] is None else problem["seed"] % m
        if self.bad_token is not None:
            self.x[self.bad_token, problem["seed"] % k] = torch.nan if gated else problem["bad"]  # silu(-inf) may be 0
        self.given = laid_out(self.x, problem["stride"])

        layout = FRAGMENT_INT4 if form.bits == 4 else FRAGMENT_INT8
        if gated:
            codes, scales, zeros = (t if t is None else interleave_rows(t) for t in (codes, scales, zeros))
        self.weight = (
            layout.pack(codes),
            layout.arrange_scales(scales, k, self.group),
            None if zeros is None else layout.arrange_scales(zeros, k, self.group),
        )

    def run(self, kernel, config):
        options = {
            "none": {},
            "residual": {"residual": self.residual},
            "silu_mul": {"gated": True},
            "transposed": {"transposed": True},
        }[self.form.epilogue]
        return kernel(self.given, *self.weight, self.bias, self.n, self.group, self.form.bits, config=config, **options)

    def expected(self, w):
        """Return the exact result with ``w``, and how far fp32 sums may be from it."""
        x = self.x.double()
        sums = x @ w.T + (0 if self.bias is None else self.bias.double())
        off = 1e-5 * (x.abs() @ self.largest.T + (0 if self.bias is None else self.bias.double().abs()))
        match self.form.epilogue:
            case "residual":
                return sums + self.residual.double(), off
            case "transposed":
                return sums.T, off.T
            case "silu_mul":
                (gate, up), (gate_off, up_off) = sums.chunk(2, 1), off.chunk(2, 1)
                silu = torch.nn.functional.silu(gate)
                terms = 1.1 * gate_off * (up.abs() + up_off) + silu.abs() * up_off
                return silu * up, terms + 2e-5 * (silu * up).abs()
        return sums, off

    def check(self, y, w):
        exact, off = self.expected(w)
        assert y.shape == exact.shape
        assert y.dtype == (FP32 if self.form.epilogue == "transposed" else self.form.x)
        true = exact if w is self.w else self.expected(self.w)[0]
        if self.form.epilogue == "transposed":
            y, exact, off, true = y.T, exact.T, off.T, true.T
        enough = 64 if true is exact or w is self.w else 256
        compare(y, exact, off, true, self.bad_token, BOUND[self.form.x], enough)


def compare(y, exact, off, true, bad, bound, enough=64):
    """Compare a result with the ``exact`` one element by element, and with the ``true`` one as a whole.

    Args:
        y: ``(M, N)``.
        exact: ``(M, N)`` float64, of the operands as the kernel rounds them.
        off: How far an element may be from it, but for one rounding of the result.
        true: Of the operands as they are.
        bad: A token that is not finite, or None.
        bound: Of the norm of the difference, as a share of the norm.
        enough: Results that make up a norm to compare: of few, all may cancel.
    """
    y64 = y.double()
    if bad is not None:
        assert not bool(y64[bad].isfinite().any()), "NaN or infinity of x was lost"
        good = torch.arange(len(y), device=y.device) != bad
        y64, exact, off, true = (t[good] for t in (y64, exact, off, true))
    if y64.numel() == 0:
        return
    allowed = 1.01 * ROUNDING[y.dtype] * exact.abs() + off + 1e-6
    worst = float(((y64 - exact).abs() / allowed).nan_to_num(torch.inf).max())  # NaN is as far off as can be
    assert worst <= 1, f"worst error is {worst:.3g} times its bound"
    if y64.numel() >= enough:
        error = float((y64 - true).norm() / true.norm())
        assert error < bound, f"relative error {error:.3g}"


class A8Product:
    """Tokens and an 8-bit or int4 weight, quantized, and their product in float64."""

    def __init__(self, form, problem, device):
        m, n, k = (problem[name] for name in "mnk")
        generator = torch.Generator(device).manual_seed(problem["seed"])
        self.form, self.n, self.group = form, n, k if form.group == -1 else form.group
        self.x = torch.randn(m, k, generator=generator, device=device).to(form.x)
        self.bad_token = None if problem["bad"] is None else problem["seed"] % m
        if self.bad_token is not None:
            self.x[self.bad_token, problem["seed"] % k] = problem["bad"]
        self.given = laid_out(self.x, problem["stride"])
        bias = torch.randn(n, generator=generator, device=device).to(form.x)
        self.bias = bias if problem["bias"] else None
        groups = 1 if form.bits == 8 else k // self.group
        scales = (torch.rand(n, groups, generator=generator, device=device) * 0.02 + 0.005).to(form.scale)
        if form.bits == 8:
            values = torch.randn(n, k, generator=generator, device=device) * 40
            dtype = torch.int8 if form.activation == "int8" else torch.float8_e4m3fn
            self.weight = values.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else values.to(dtype)
            self.scale = scales[:, 0].contiguous()
            self.w = self.weight.double() * scales.double()
        else:
            low = 0 if form.lowest or form.activation == "int8" else 1
            codes = torch.randint(low, 16, (n, k), generator=generator, device=device, dtype=torch.uint8)
            layout = FRAGMENT_A8_INT8 if form.activation == "int8" else FRAGMENT_A8_FP8
            self.weight = layout.pack(codes)
            self.scale = layout.arrange_scales(scales, k, self.group)
            self.w = (codes.double() - 8) * scales.double().repeat_interleave(self.group, dim=1)

    def run(self, codes, token_scale, config):
        options = {"lowest": self.form.lowest, "promote": self.form.promote, "config": config}
        operands = codes, token_scale, self.weight, self.scale, self.bias
        return linear_a8.linear(*operands, self.n, self.group, self.form.x, **options)

    def check(self, y, codes, token_scale):
        x = dequantize_tokens_reference(codes, token_scale, torch.float64)
        exact = x @ self.w.T + (0 if self.bias is None else self.bias.double())
        fp8 = self.form.activation == "fp8"  # products of e4m3 are added up with fewer bits
        off = (2.0**-9 if fp8 else 2e-6) * (x.abs() @ self.w.abs().T)
        compare(y, exact, off, exact, self.bad_token, 4e-3 if fp8 and y.dtype == FP16 else BOUND[y.dtype])


# ---- without a GPU: what is drawn can be run, and the comparison sees what is wrong ----


def variant_of(form, k):
    """Return what a weight of a form is to a kernel for 16-bit tokens."""
    return Variant.of(form.x, form.scale, form.bits, k if form.group == -1 else form.group, k, form.zero)


def launchable(module, form, problem, processors):
    """Return the cuts of a problem that need no other compilation than ``form``."""
    m, n, k = (problem[name] for name in "mnk")
    if module is linear_a8:
        found = linear_a8.candidates(m, n, k, form.bits, form.promote, processors)
        return [cut for cut in found if (cut.tokens, cut.multicast) == (form.tile, form.multicast)]
    rows = interleaved_rows(n) if form.epilogue == "silu_mul" else n
    variant = variant_of(form, k)
    if module is prefill_a16:
        found = prefill_cuts.candidates(m, rows, k, form.bits, variant.scale_bytes, processors)
        return [cut for cut in found if cut.tokens == form.tile]
    tokens = max(m, 4 * form.tile + 1)  # tiles that are not needed make sense too
    found = decode_cuts.candidates(tokens, -(-rows // 16), k, form.bits, variant.scales, processors)
    return [cut for cut in found if cut.token_tiles == form.tile]


def of(module, form, **options):
    """Return what is drawn for a form of a kernel."""
    if module is not linear_a8:
        return problems(form, form.tile * (8 if module is decode_a16 else 1), **options)
    rows = 129 if form.multicast else 1  # pairs of CTAs have two row tiles
    return problems(form, form.tile, rows, 16 if form.bits == 8 else 8, **options)


ALL = [
    pytest.param(module, form, id=f"{name}-{form}")
    for name, module, forms in (
        ("decode", decode_a16, DECODE),
        ("prefill", prefill_a16, PREFILL),
        ("a8", linear_a8, A8),
    )
    for form in forms
]


@pytest.mark.parametrize(("module", "form"), ALL)
@settings(MANY, max_examples=25)
@given(data=st.data())
def test_every_problem_that_is_drawn_can_be_cut(module, form, data):
    problem = data.draw(of(module, form))
    for processors in (20, 40, 132):
        assert launchable(module, form, problem, processors)


def by_the_reference(
    x, packed, scale, zero, bias, n, group, bits, config=None, residual=None, gated=False, transposed=False
):
    """Multiply as the launchers do, without them."""
    sizes = {"bits": bits, "group_size": group, "out_features": n, "kernel": "reference"}
    if gated:
        return preshuffled_gated_linear(x, packed, scale, zero, bias=bias, **sizes)
    if transposed:
        return preshuffled_linear(
            x.float(), packed, scale, zero, bias=None if bias is None else bias.float(), **sizes
        ).T
    return preshuffled_linear(x, packed, scale, zero, bias=bias, residual=residual, **sizes)


SMALL = (70, 60, 700)


@pytest.mark.parametrize("form", DECODE[:4] + DECODE[6:9] + DECODE[10:11], ids=str)
@FEW
@given(data=st.data())
def test_the_reference_is_right_and_one_wrong_number_is_not(form, data):
    product = Product(form, data.draw(of(decode_a16, form, most=SMALL)), "cpu")
    y = product.run(by_the_reference, None)
    product.check(y, product.w)
    row, column = (data.draw(st.integers(0, size - 1)) for size in y.shape)
    if product.bad_token is None:
        y[row, column] += 0.05 * (1 + y.abs().max())
        with pytest.raises(AssertionError, match="worst error"):
            product.check(y, product.w)
        y[row, column] = torch.nan
        with pytest.raises(AssertionError, match="worst error"):
            product.check(y, product.w)


@pytest.mark.parametrize("form", [A8[0], A8[3], A8[4], A8[7]], ids=str)
@FEW
@given(data=st.data())
def test_the_reference_of_8_bit_tokens_is_right_and_one_wrong_number_is_not(form, data):
    product = A8Product(form, data.draw(of(linear_a8, form, most=(70, 200, 700))), "cpu")
    options = {"bias": product.bias, "kernel": "reference"}
    if form.bits == 8:
        y = int8_dynamic_linear(product.given, product.weight, product.scale, **options)
    else:
        sizes = {"group_size": product.group, "out_features": product.n, "activation": form.activation}
        y = int4_dynamic_linear(product.given, product.weight, product.scale, **sizes, **options)
    quantized = quantize_tokens_reference(product.x, form.activation)
    product.check(y, *quantized)
    if product.bad_token is None:
        y[-1, -1] += 0.5 * (1 + y.abs().max())
        with pytest.raises(AssertionError, match="worst error"):
            product.check(y, *quantized)


# ---- on a GPU ----


def cut_of(module, form, problem):
    """Return the cut that was drawn."""
    found = launchable(module, form, problem, problem["processors"] or Arch.of(torch.device("cuda", 0)).sm_count)
    return found[problem["cut"] % len(found)]


@contextmanager
def poisoned():
    """Fill what is allocated meanwhile, and the scratch memory, with NaN; its counters are zero afterwards."""
    here = torch.device("cuda", torch.cuda.current_device())
    workspace(here, 1, 1).partials.fill_(torch.nan)
    torch.use_deterministic_algorithms(True)  # fills torch.empty
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
    assert not bool(workspace(here, 1, 1).counters.any())


@pytest.fixture(scope="class")
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
class TestOnHopper:
    @pytest.mark.parametrize("form", DECODE, ids=str)
    @MANY
    @given(data=st.data())
    def test_decode(self, form, data):
        problem = data.draw(of(decode_a16, form))
        product, config = Product(form, problem, "cuda", fine=True), cut_of(decode_a16, form, problem)
        with poisoned():
            y = product.run(decode_a16.linear, config)
        product.check(y, product.decoded)

    @pytest.mark.parametrize("form", PREFILL, ids=str)
    @MANY
    @given(data=st.data())
    def test_prefill(self, form, data):
        problem = data.draw(of(prefill_a16, form))
        product, config = Product(form, problem, "cuda"), cut_of(prefill_a16, form, problem)
        with poisoned():
            y = product.run(prefill_a16.linear, config)
        product.check(y, product.w if config.scales_sums(variant_of(form, problem["k"])) else product.rounded)

    @pytest.mark.parametrize("form", A8, ids=str)
    @MANY
    @given(data=st.data())
    def test_8_bit_tokens(self, form, data):
        problem = data.draw(of(linear_a8, form))
        product, config = A8Product(form, problem, "cuda"), cut_of(linear_a8, form, problem)
        with poisoned():
            codes, token_scale = quantize_tokens(product.given, form.activation)
        expected_codes, expected_scale = quantize_tokens_reference(product.x, form.activation)
        assert torch.equal(codes.contiguous().view(torch.uint8), expected_codes.view(torch.uint8))
        assert torch.equal(token_scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))
        with poisoned():
            y = product.run(codes, token_scale, config)
        product.check(y, codes, token_scale)

    @pytest.mark.parametrize(
        ("module", "form", "m"),
        [
            pytest.param(decode_a16, DECODE[6], 29, id="decode"),
            pytest.param(prefill_a16, PREFILL[5], 11, id="prefill"),
            pytest.param(prefill_a16, PREFILL[1], 90, id="prefill-residual"),
            pytest.param(prefill_a16, PREFILL[2], 300, id="prefill-silu_mul"),
            pytest.param(linear_a8, A8[4], 100, id="a8-pair"),
            pytest.param(linear_a8, A8[7], 50, id="a8"),
        ],
    )
    def test_a_thousand_runs_are_bitwise_equal(self, module, form, m):
        sizes = {"m": m, "n": 777, "k": 1792, "bias": True, "stride": "none", "bad": None, "seed": m}
        cuts = launchable(module, form, sizes, Arch.of(torch.device("cuda", 0)).sm_count)
        # Where there is one, a cut in which CTAs add up each other's sums.
        config = max(cuts, key=lambda cut: getattr(cut, "workers", 0) or getattr(cut, "cluster", 0))
        if module is linear_a8:
            product = A8Product(form, sizes, "cuda")
            tokens = quantize_tokens(product.x, form.activation)
            run = lambda: product.run(*tokens, config)  # noqa: E731
        else:
            product = Product(form, sizes, "cuda")
            run = lambda: product.run(module.linear, config)  # noqa: E731
        with poisoned():
            first = run()
        assert bool(first.isfinite().all())
        scratch = workspace(first.device, 1, 1).partials
        different = torch.zeros((), device="cuda", dtype=torch.int64)
        for _ in range(1000):
            scratch.fill_(torch.nan)
            poison = torch.full_like(first, torch.nan)
            del poison  # the next result takes its memory
            different += (run() != first).sum()
        assert int(different) == 0

    @pytest.mark.parametrize("form", [DECODE[0], DECODE[6]], ids=str)
    @pytest.mark.parametrize("kernel", ["cuda-decode", "cuda-prefill"])
    @pytest.mark.parametrize(("batch", "length"), [(3, 5), (2, 70)])
    def test_a_batch_of_sequences_has_the_bits_of_its_tokens(self, kernel, form, batch, length):
        m, n, k = batch * length, 250, 1152
        problem = {"m": m, "n": n, "k": k, "bias": True, "stride": "none", "bad": None, "seed": m}
        product = Product(dataclasses.replace(form, epilogue="residual"), problem, "cuda")
        sizes = {"bits": form.bits, "group_size": product.group, "out_features": n}
        options = {**sizes, "bias": product.bias, "kernel": kernel}
        flat = preshuffled_linear(product.x, *product.weight, **options, residual=product.residual)
        variant, arch = variant_of(form, k), Arch.of(product.x.device)
        scales = (variant.groups, variant.zero, variant.scale_bytes)
        cut = prefill_a16.choice(m, n, k, form.bits, *scales, arch.sm_count, arch.name).config
        exact = kernel == "cuda-decode" or cut.scales_sums(variant)
        product.check(flat, product.w if exact else product.rounded)
        x, residual = product.x.view(batch, length, k), laid_out(product.residual, "wide").view(batch, length, n)
        wide = laid_out(product.x, "wide").unflatten(0, (batch, length))
        for view in (x, x.transpose(0, 1).contiguous().transpose(0, 1), wide):
            y = preshuffled_linear(view, *product.weight, **options, residual=residual)
            assert torch.equal(y, flat.view(batch, length, n))
        for same in (product.x[:1].expand(m, k), x[:, :1].expand(batch, length, k)):
            expected = preshuffled_linear(same.contiguous(), *product.weight, **options)
            assert torch.equal(preshuffled_linear(same, *product.weight, **options), expected)

"""Prefill's results that leave beside the next tile's products: every form of tile that stores so, against float64."""

import pytest
import torch
from lq_formats.layouts import FRAGMENT_INT4, FRAGMENT_INT8
from lq_kernels.cuda.prefill_a16 import linear
from lq_kernels.cuda.prefill_cuts import ROWS, PrefillConfig, cost
from lq_kernels.cuda.sources import VARIANTS
from lq_kernels.cuda.variant import EPILOGUES
from lq_kernels.jit import compiler

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Bits and tokens of a tile: results take a stage of the ring or, where steps are 64 in features, two.
FORMS = [
    (4, 96), (4, 112), (4, 128), (4, 176), (4, 192), (4, 256),
    (8, 112), (8, 128), (8, 176), (8, 192), (8, 256),
]  # fmt: skip
SELDOM = {(4, 112), (4, 176), (8, 176), (8, 192)}
form = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"int{form[0]}-T{form[1]}")
pairs = pytest.mark.parametrize("pairs", [False, True])


class Case:
    """A product and what it is exactly: int4 in groups of 128, or int8 with one scale a row."""

    def __init__(self, form, m, n, k, x=BF16, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)
        bits = form[0]
        self.n, group = n, 128 if bits == 4 else k
        layout, groups = FRAGMENT_INT4 if bits == 4 else FRAGMENT_INT8, -(-k // group)
        codes = torch.randint(0, 1 << bits, (n, k), generator=generator, device="cuda", dtype=torch.uint8)
        scales = torch.rand(n, groups, generator=generator, device="cuda") * 0.02 + 0.005
        scales = scales.to(x if bits == 4 else FP32)
        self.x = torch.randn(m, k, generator=generator, device="cuda").to(x)
        self.bias = torch.randn(n, generator=generator, device="cuda").to(x)
        self.weight = layout.pack(codes), layout.arrange_scales(scales, k, group), None
        self.sizes = group, bits
        weight, factor = codes.double() - (1 << (bits - 1)), scales.double().T
        if group < k:  # a scaled weight is rounded; one scale a row multiplies the sum
            weight = (weight * scales.double().repeat_interleave(group, dim=1)[:, :k]).to(x).double()
            factor = 1.0
        self.exact = self.x.double() @ weight.T * factor
        self.magnitude = self.x.double().abs() @ weight.abs().T * factor

    def run(self, config, bias=None):
        return linear(self.x, *self.weight, bias, self.n, *self.sizes, config=config)

    def check(self, y, more):
        exact = self.exact + more.double()
        # A rounding of the result, and fp32 sums.
        rounding = 2.0**-8 if y.dtype == BF16 else 2.0**-11
        bound = 1.01 * rounding * exact.abs() + 2e-6 * (self.magnitude + more.double().abs()) + 1e-6
        assert y.dtype == self.x.dtype
        assert bool(((y.double() - exact).abs() <= bound).all())


def cuts(form, m, n, pairs):
    """Yield cuts of one CTA, of some that take several tiles and of many; then of such as share tiles first."""
    tiles = -(-n // (ROWS * (1 + pairs))) * -(-m // form[1])
    for ctas, shared in ((1, 0), (2, 0), (100, 0), (2, 2), (1, 1)):
        shared, ctas = min(shared, tiles), min(ctas, tiles)
        wide = form[0] == 8 and form[1] <= 128
        yield PrefillConfig(form[1], ctas, 3, shared, shared and ctas, pairs, wide=wide)


def clocks_of_tiles(config, tiles):
    return cost(config, tiles * config.tokens, ROWS, 2048, 4, 132) - cost(config, config.tokens, ROWS, 2048, 4, 132)


def test_a_large_tile_that_another_follows_costs_less():
    for tokens in (96, 112, 128, 176, 192, 256):
        config = PrefillConfig(tokens, 1, 1, 0, 0)
        one = cost(config, tokens, ROWS, 2048, 4, 132) - 4300
        assert 0.85 * one < clocks_of_tiles(config, 2) < 0.95 * one


@pytest.mark.nvrtc
@pytest.mark.exhaustive(
    where=lambda form, epilogue: (
        form in SELDOM or epilogue != ("none", "residual", "silu_mul")[(FORMS.index(form) + form[0] // 8) % 3]
    )
)
@pytest.mark.parametrize("epilogue", ["none", "residual", "silu_mul"])
@form
def test_results_leave_in_bulk_without_spills(form, epilogue, disassemble):
    config = PrefillConfig(form[1], 1, 1, 0, 0, multicast=True, wide=form[0] == 8 and form[1] <= 128)
    defines = (*VARIANTS[0 if form[0] == 4 else 6].defines, *config.defines, *EPILOGUES[epilogue])
    result = compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)
    used = result.usage()["prefill_a16"]
    assert (used.registers, used.spills, used.stack) == (168, 0, 0)
    assert "C75" not in result.log
    boxes = 1 if epilogue == "silu_mul" else 2
    assert disassemble(result.cubin).count("UTMASTG") == boxes


def another_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)


hopper = [pytest.mark.gpu, pytest.mark.skipif("another_gpu()", reason="needs compute capability 9.0")]


class TestOnHopper:
    pytestmark = hopper

    @pairs
    @form
    def test_results(self, form, pairs):
        # Tiles of one step to more than the ring has, so that results meet every stage and both parities of it; rows that
        # the copy engine takes, in full boxes and not, and rows that it does not.
        tokens = form[1]
        for k in (128, 256, 384, 640, 1032, 2176):
            for n in (4 * ROWS, 4 * ROWS + 40, 72, 4 * ROWS + 12):
                for m in (3 * tokens + 17, 2 * tokens, 5):
                    case = Case(form, m, n, k)
                    for config in cuts(form, m, n, pairs):
                        y = case.run(config, case.bias)
                        case.check(y, case.bias)
                        assert torch.equal(case.run(config, case.bias), y)

    @pytest.mark.parametrize("tokens", [192, 256])
    def test_fp16(self, tokens):
        m, n = 3 * tokens + 17, 4 * ROWS + 40
        for form in ((4, tokens), (8, tokens)):
            case = Case(form, m, n, 640, x=FP16)
            for config in cuts(form, m, n, True):
                case.check(case.run(config, case.bias), case.bias)

    @pairs
    @form
    def test_gates_and_ups(self, form, pairs):
        tokens = form[1]
        for k in (128, 640, 2176):
            for n in (4 * ROWS, 4 * ROWS + 48, 80, 24 * 16):
                for m in (3 * tokens + 17, 5):
                    case = Case(form, m, n, k)
                    gate, up = (case.exact.unflatten(1, (-1, 2, 8))[:, :, i].flatten(1) for i in (0, 1))
                    exact = torch.nn.functional.silu(gate) * up
                    bound = 1.02 * 2.0**-8 * exact.abs() + 1e-4 * (1 + gate.abs()) * (1 + up.abs())
                    args = (case.x, *case.weight, None, n // 2, *case.sizes)
                    for config in cuts(form, m, n, pairs):
                        y = linear(*args, config=config, gated=True)
                        assert bool(((y.double() - exact).abs() <= bound).all())

    @pairs
    @form
    def test_a_residual(self, form, pairs):
        tokens = form[1]
        for k in (128, 640, 2176):
            for n in (4 * ROWS, 4 * ROWS + 40, 72, 4 * ROWS + 12):
                for m in (3 * tokens + 17, 5):
                    case = Case(form, m, n, k)
                    args = (case.x, *case.weight, case.bias, n, *case.sizes)
                    rows = torch.randn(m * n + 1, device="cuda").to(BF16)
                    # At a multiple of 16 bytes, and not: the copy engine does not take the second.
                    for residual in (rows[: m * n].view(m, n), rows[1:].view(m, n)):
                        for config in cuts(form, m, n, pairs):
                            y = linear(*args, config=config, residual=residual)
                            case.check(y, residual.double() + case.bias)

    @pytest.mark.parametrize("form", [(4, 256), (8, 256)], ids=str)
    def test_a_kernel_that_follows_sees_them(self, form):
        # The second product's tokens are the first one's results; programmatic dependent launch, no synchronization between.
        first, second = (Case(form, 2048, 2048, 2048, seed=seed) for seed in (1, 2))
        config = PrefillConfig(form[1], 16, 3, 0, 0, True)
        second.x = first.run(config)
        expected = second.run(config)
        torch.cuda.synchronize()
        for _ in range(50):
            second.x = first.run(config)
            assert torch.equal(second.run(config), expected)

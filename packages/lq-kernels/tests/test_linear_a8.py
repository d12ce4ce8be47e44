"""The kernel for 8-bit tokens: its cuts and its code without a GPU, its results on one."""

import re

import pytest
import torch
from cuda_host.order import pieces
from lq_formats.layouts import FRAGMENT_A8_FP8, FRAGMENT_A8_INT8
from lq_kernels.cuda.linear_a8 import (
    MAX_PROMOTED,
    ROWS,
    STEP,
    THREADS,
    TOKENS,
    A8Config,
    A8Variant,
    a8_config,
    candidates,
    linear,
    ring,
)
from lq_kernels.cuda.quantize_tokens import CODE_DTYPES
from lq_kernels.cuda.quantize_tokens import defines as quantizer_defines
from lq_kernels.cuda.sources import A8_VARIANTS
from lq_kernels.jit import compiler

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    (variant, MAX_PROMOTED[variant.bits] if variant.promote else 256, i % 2 == 0)
    for i, variant in enumerate(A8_VARIANTS)
]
CASES += [(A8_VARIANTS[0], 16, False), (A8_VARIANTS[3], 16, False), (A8_VARIANTS[3], 128, False)]


def case_id(case):
    variant, tokens, multicast = case
    return "-".join(define.split("=")[1] for define in variant.defines) + f"-T{tokens}" + "-multicast" * multicast


# ---- without a GPU ----


@pytest.mark.nvrtc
@pytest.mark.exhaustive(where=lambda case: CASES.index(case) in (2, 4, 5, 6, 8, 9, 10))
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_kernel_compiles_to_8_bit_wgmma_without_spills(case, disassemble):
    variant, tokens, multicast = case
    defines = (*variant.defines, *A8Config(tokens, multicast, 1, 1, 0, 0).defines)
    result = compiler.compile_source(compiler.source("linear_a8"), "sm_90a", "linear_a8", defines)
    usage = result.usage()
    assert set(usage) == {"linear_a8"}
    assert (usage["linear_a8"].spills, usage["linear_a8"].stack) == (0, 0)
    # What all threads have at launch pays for what the consumers take: with less, they would wait for registers forever.
    assert usage["linear_a8"].registers * THREADS >= 128 * 24 + 256 * 240
    # "Potential performance loss: wgmma.mma_async instructions are serialized".
    assert "C75" not in result.log

    sass = disassemble(result.cubin)
    kind = (
        rf"IGMMA\.64x{tokens}x32\.S8\.S8"
        if variant.activation == "int8"
        else rf"QGMMA\.64x{tokens}x32\.F32\.E4M3\.E4M3"
    )
    first = r"R\d+, gdesc" if variant.bits == 4 else "gdesc"
    stages = 2 if variant.promote and variant.bits == 8 else 1  # whose sums are added up at once
    assert len(re.findall(rf"{kind} R\d+, {first}", sass)) == stages * STEP // 32
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert bool(re.search(r"UTMALDG\.2D\.MULTICAST", sass)) is multicast
    assert bool(re.search(r"\bUBLKCP\b", sass)) is (variant.bits == 4)
    assert not re.search(r"\bMEMBAR\b[^\n]*GPU", sass.split("GMMA", 1)[1].rsplit("GMMA", 1)[0])


@pytest.mark.nvrtc
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("activation", ["int8", "fp8"])
@pytest.mark.parametrize("vectors", [1, 8])
def test_the_quantizer_compiles_without_spills(dtype, activation, vectors):
    defines = quantizer_defines(dtype, activation, vectors)
    result = compiler.compile_source(compiler.source("quantize_tokens"), "sm_90a", "quantize_tokens", defines)
    (used,) = result.usage().values()
    assert (used.spills, used.stack) == (0, 0)
    assert used.registers <= 64  # 1024 threads


def test_shared_memory_fits_and_the_ring_is_deep_enough():
    for tokens in TOKENS:
        for bits, scale_bytes in ((4, 0), (4, 32), (4, 64), (8, 0)):
            stages, shared = ring(tokens, bits, scale_bytes)
            assert shared <= 232448
            assert 4 <= stages <= 16


SHAPES = [
    (m, n, k)
    for m in (1, 17, 64, 300, 1000, 2048)
    for n, k in ((8, 16), (4096, 4096), (14336, 4096), (4096, 14336), (4100, 1008))
    if m < 2048 or n < 14336
]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_cut_covers_every_step_of_every_tile_once(m, n, k, bits):
    steps = -(-k // STEP)
    for promote in (False, True):
        for config in candidates(m, n, k, bits, promote, 132):
            assert config.tokens in TOKENS
            assert not promote or config.tokens <= MAX_PROMOTED[bits]
            assert 1 <= config.ctas * config.sharers <= 132
            assert 0 <= config.workers <= config.ctas
            seen = {}
            for row, token, begin, end in pieces(config, *config.tiles(m, n), steps):
                assert 0 <= begin < end <= steps, "a piece without a step"
                for rank in range(config.sharers):
                    seen.setdefault((row * config.sharers + rank, token), []).append((begin, end))
            row_tiles = -(-n // ROWS)
            assert len([row for row, _ in seen if row < row_tiles]) == row_tiles * -(-m // config.tokens)
            for parts in seen.values():
                parts.sort()
                assert [begin for begin, _ in parts] == [0] + [end for _, end in parts[:-1]]
                assert parts[-1][1] == steps
    assert a8_config(m, n, k, bits, False, 0, 132) in set(candidates(m, n, k, bits, False, 132))


def test_cuts_follow_the_size():
    assert a8_config(16, 4096, 4096, 8, False, 0, 132).workers > 32, "32 tiles do not fill 132 multiprocessors"
    large = a8_config(4096, 4096, 4096, 8, False, 0, 132)
    assert (large.tokens, large.multicast, large.ctas) == (256, True, 66), "what reads least"
    assert a8_config(4096, 4096, 4096, 4, True, 32, 132).tokens == MAX_PROMOTED[4]


def test_what_a_variant_is_compiled_for():
    variant = A8Variant(4, "fp8", BF16, FP16, True, True, True)
    assert variant.defines == (
        "LQ_BITS=4", "LQ_CODES=Fp8", "LQ_OUT=Bf16", "LQ_SCALE=Fp16", "LQ_GROUPED=1", "LQ_LOWEST=1", "LQ_PROMOTE=1",
    )  # fmt: skip
    assert variant.scale_bytes == 32
    assert A8Variant(8, "int8", BF16, FP32, False, False, False).scale_bytes == 0


# ---- on a GPU ----


def another_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)


hopper = [pytest.mark.gpu, pytest.mark.skipif("another_gpu()", reason="needs compute capability 9.0")]


class Case:
    """Codes of tokens and of a weight, and their product in float64."""

    def __init__(self, m, n, k, bits=8, activation="int8", group_size=-1, out=BF16, scale=FP32, bias=False, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)
        self.n, self.group_size, self.out, self.activation = n, k if group_size == -1 else group_size, out, activation
        dtype = CODE_DTYPES[activation]

        def codes(rows, spread):
            values = torch.randn(rows, -(-k // 16) * 16, generator=generator, device="cuda") * spread
            return (values.round().clamp(-127, 127) if activation == "int8" else values.clamp(-448, 448)).to(dtype)

        self.x = codes(m, 40.0)[:, :k]  # rows at multiples of 16 bytes, as the quantizer leaves them
        self.token_scale = torch.rand(m, generator=generator, device="cuda") * 0.05 + 0.01
        groups = 1 if bits == 8 else k // self.group_size
        scales = (torch.rand(n, groups, generator=generator, device="cuda") * 0.02 + 0.005).to(scale)
        self.bias = torch.randn(n, generator=generator, device="cuda").to(out) if bias else None
        if bits == 8:
            self.weight = codes(n, 40.0)[:, :k].contiguous()
            self.scale = scales[:, 0].contiguous()
            w = self.weight.double() * scales.double()
        else:
            unsigned = torch.randint(0, 16, (n, k), generator=generator, device="cuda", dtype=torch.uint8)
            layout = FRAGMENT_A8_INT8 if activation == "int8" else FRAGMENT_A8_FP8
            self.weight, self.scale = layout.pack(unsigned), layout.arrange_scales(scales, k, self.group_size)
            w = (unsigned.double() - 8) * scales.double().repeat_interleave(self.group_size, dim=1)
        x = self.x.double() * self.token_scale.double()[:, None]
        self.exact, self.magnitude = x @ w.T, x.abs() @ w.abs().T
        if bias:
            self.exact += self.bias.double()

    def run(self, config=None, **options):
        poison = torch.full((self.x.shape[0], self.n), torch.nan, dtype=self.out, device="cuda")
        del poison  # what the result will be allocated over
        return linear(
            self.x, self.token_scale, self.weight, self.scale, self.bias, self.n, self.group_size, self.out,
            config=config, **options,
        )  # fmt: skip

    def check(self, y, inexact=None):
        """Compare; ``inexact`` is the error allowed as a share of the sum of magnitudes."""
        assert y.shape == self.exact.shape
        assert y.dtype == self.out
        promoted = self.activation == "fp8" and inexact is None
        if inexact is None:
            inexact = 2.0**-9 if promoted else 1e-6
        error = (y.double() - self.exact).abs()
        rounding = 2.0**-8 if self.out == BF16 else 2.0**-11
        bound = 1.01 * rounding * self.exact.abs() + inexact * self.magnitude + 1e-6
        assert bool((error <= bound).all()), f"worst error is {(error / bound).max().item():.3g} times its bound"
        if promoted:
            relative = float((y.double() - self.exact).norm() / self.exact.norm())
            assert relative < (8e-3 if self.out == BF16 else 4e-3), relative


def cut(tokens, m, n, multicast=False, shared_tiles=0, workers=0, ctas=100, raster=3):
    config = A8Config(tokens, multicast, 1, raster, 0, 0)
    rows, columns = config.tiles(m, n)
    tiles = rows * columns
    shared_tiles = min(shared_tiles, tiles)
    ctas = max(min(ctas, tiles - shared_tiles), workers, 1)
    return A8Config(tokens, multicast, ctas, raster, shared_tiles, workers if shared_tiles else 0)


FORMS = [
    pytest.param({"bits": 8, "activation": "int8"}, id="w8a8-int8"),
    pytest.param({"bits": 8, "activation": "fp8"}, id="w8a8-fp8"),
    pytest.param({"bits": 4, "activation": "int8", "group_size": 128}, id="w4a8-int8-g128"),
    pytest.param({"bits": 4, "activation": "fp8", "group_size": 128}, id="w4a8-fp8-g128"),
    pytest.param({"bits": 4, "activation": "int8"}, id="w4a8-int8-row"),
    pytest.param({"bits": 4, "activation": "fp8"}, id="w4a8-fp8-row"),
]


def largest(form, tokens):
    """Return whether a tile of so many tokens exists for the form's sums."""
    promoted = form["activation"] == "fp8" or "group_size" in form
    return not promoted or tokens <= MAX_PROMOTED[form["bits"]]


class TestOnHopper:
    pytestmark = hopper

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("tokens", TOKENS)
    def test_every_tile_and_every_way_to_share(self, form, tokens):
        if not largest(form, tokens):
            pytest.skip("no such tile")
        m, n, k = tokens + tokens // 2 + 1, 2 * ROWS + 40, 2176  # 3 x 2 tiles of 17 steps
        case = Case(m, n, k, bias=True, **form)
        case.check(case.run(cut(tokens, m, n)))
        case.check(case.run(cut(tokens, m, n, ctas=1)))  # one CTA that takes every tile
        for shared_tiles, workers in ((1, 2), (4, 5), (6, 7), (6, 16), (6, 3), (6, 6 * 17)):
            config = cut(tokens, m, n, False, shared_tiles, workers)
            first = case.run(config)
            case.check(first)
            assert torch.equal(case.run(config), first)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("tokens", [64, 128, 192, 256])
    @pytest.mark.parametrize("n", [64, 129, 384, 1000])
    def test_multicast(self, form, tokens, n):
        if not largest(form, tokens):
            pytest.skip("no such tile")
        m = 2 * tokens + 3
        case = Case(m, n, 1920, **form)
        configs = [cut(tokens, m, n, True, ctas=ctas) for ctas in (1, 2, 66)]
        for shared_tiles, workers in ((1, 2), (2, 5), (3, 2), (100, 16)):
            tiles = -(-n // (2 * ROWS)) * 3
            configs.append(cut(tokens, m, n, True, shared_tiles, min(workers, min(shared_tiles, tiles) * 15)))
        for config in configs:
            first = case.run(config)
            case.check(first)
            for _ in range(5):
                assert torch.equal(case.run(config), first)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("out", [BF16, FP16])
    @pytest.mark.parametrize("scale", [BF16, FP16, FP32])
    def test_dtypes(self, form, out, scale):
        for m in (7, 100, 300):
            case = Case(m, 264, 1024, out=out, scale=scale, bias=True, **form)
            case.check(case.run())
            if form["bits"] == 4:
                assert torch.equal(case.run(lowest=True), case.run())

    def test_groups_of_several_steps_and_codes_without_the_lowest(self):
        for activation in ("int8", "fp8"):
            for group_size in (256, 512):
                case = Case(100, 264, 1024, 4, activation, group_size)
                case.check(case.run())
        case = Case(100, 264, 1024, 4, "fp8", 128)
        codes = FRAGMENT_A8_FP8.unpack(case.weight, 264, 1024).clamp(min=1)
        case.weight = FRAGMENT_A8_FP8.pack(codes)
        assert torch.equal(case.run(lowest=False), case.run(lowest=True))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        ("m", "n", "k"),
        [
            (1, 16, 128),
            (17, 1, 128),
            (33, 7, 256),
            (64, 15, 384),
            (65, 127, 1152),
            (129, 129, 4096),
            (300, 4099, 512),
            (1000, 5000, 1024),
        ],
    )
    def test_awkward_shapes(self, form, m, n, k):
        case = Case(m, n, k, bias=True, **form)
        case.check(case.run())

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("activation", ["int8", "fp8"])
    @pytest.mark.parametrize("k", [8, 16, 24, 48, 136, 1000, 1040])
    def test_tails_of_k(self, bits, activation, k):
        if bits == 8 and k % 16:
            pytest.skip("a weight's rows start at multiples of 16 bytes")
        for m in (1, 70, 300):
            case = Case(m, 200, k, bits, activation)
            case.check(case.run())

    @pytest.mark.parametrize("form", FORMS)
    def test_every_number_of_tokens(self, form):
        for m in [*range(1, 70), 100, 127, 128, 129, 191, 193, 255, 256, 257, 300]:
            case = Case(m, 200, 384, seed=m, **form)
            case.check(case.run())

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("m", [17, 256, 1024, 4096])
    @pytest.mark.parametrize(("n", "k"), [(4096, 4096), (14336, 4096), (4096, 14336)])
    def test_model_shapes_repeatedly_with_equal_bits(self, form, m, n, k):
        case = Case(m, n, k, **form)
        first = case.run()
        case.check(first)
        for _ in range(10):
            assert torch.equal(case.run(), first)

    def test_int8_sums_are_exact_at_their_largest(self):
        m, n, k = 130, 140, 65536
        case = Case(m, n, k)
        case.x.fill_(-127), case.weight.fill_(-127)
        case.token_scale.fill_(2.0**-20), case.scale.fill_(2.0**-10)
        expected = torch.full((m, n), 127 * 127 * k * 2.0**-30, device="cuda", dtype=torch.float64).to(BF16)
        assert torch.equal(case.run(), expected)
        assert torch.equal(case.run(cut(64, m, n, False, 3, 40)), expected)

    def test_promoted_e4m3_sums_do_not_drift(self):
        # All positive: a sum grows with K, and what is cut off each product with it.
        m, n, k = 64, 256, 16384
        case = Case(m, n, k, activation="fp8", out=FP16)
        case.x = case.x.float().abs().to(torch.float8_e4m3fn)
        case.weight = case.weight.float().abs().to(torch.float8_e4m3fn)
        case.token_scale.fill_(2.0**-10), case.scale.fill_(2.0**-12)
        exact = (case.x.double() * 2.0**-10) @ (case.weight.double() * 2.0**-12).T

        def relative(y):
            return float(((y.double() - exact).abs() / exact).max())

        promoted = relative(case.run())
        assert promoted < 2.0**-7, promoted
        assert promoted < relative(case.run(promote=False))

    def test_sums_that_are_not_promoted(self):
        for bits, activation in ((8, "fp8"), (4, "fp8"), (4, "int8"), (8, "int8")):
            case = Case(300, 520, 4096, bits, activation)
            for promote in (False, True):
                case.check(case.run(promote=promote), 1e-6 if activation == "int8" else 2.0**-7)

    def test_a_token_with_a_nan_scale_is_nan_and_no_other(self):
        for activation in ("int8", "fp8"):
            case = Case(200, 300, 512, activation=activation)
            case.x[77].zero_()
            case.token_scale[77] = torch.nan
            y = case.run()
            assert bool(y[77].isnan().all())
            assert not bool(y[torch.arange(200, device="cuda") != 77].isnan().any())

    def test_nothing_is_written_past_the_result(self):
        for multicast in (False, True):
            cases = [Case(m, n, 256, seed=m) for m, n in ((17, 9), (63, 130), (129, 24))]
            configs = [cut(64, case.x.shape[0], case.n, multicast) for case in cases]
            pairs = [pair for pair in zip(cases, configs, strict=True) for _ in range(3)]
            results = [case.run(config) for case, config in pairs]
            for (case, _), y in zip(pairs, results, strict=True):
                case.check(y)

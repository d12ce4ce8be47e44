"""The prefill kernel: its code without a GPU, its results on one. Its cuts: test_prefill_cuts.py."""

import re

import pytest
import torch
from lq_formats import CompileError
from lq_formats.layouts import FRAGMENT_INT4, FRAGMENT_INT8
from lq_kernels.cuda.prefill_a16 import linear
from lq_kernels.cuda.prefill_cuts import (
    BETWEEN,
    ROWS,
    TALL,
    TOKENS,
    PrefillConfig,
)
from lq_kernels.cuda.sources import VARIANTS
from lq_kernels.cuda.variant import Variant
from lq_kernels.jit import compiler

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = sorted((*TOKENS, *BETWEEN))
CASES = [(VARIANTS[0], tokens) for tokens in SIZES] + [(variant, 256) for variant in VARIANTS[2:]]
WIDE = [
    PrefillConfig(tokens, 1, 1, 0, 0, multicast=tokens in (64, 96), split=tokens in (32, 128), wide=True)
    for tokens in (16, 32, 64, 96, 128)
]


def case_id(case):
    variant, tokens = case
    return "-".join(define.split("=")[1] for define in variant.defines) + f"-T{tokens}"


# ---- without a GPU ----


@pytest.mark.nvrtc
@pytest.mark.exhaustive(where=lambda case: CASES.index(case) % 4)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_kernel_compiles_to_wgmma_from_registers_without_spills(case, disassemble):
    variant, tokens = case
    defines = (*variant.defines, f"LQ_TOKENS={tokens}")
    result = compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)
    usage = result.usage()
    assert set(usage) == {"prefill_a16"}
    assert usage["prefill_a16"].spills == 0
    assert usage["prefill_a16"].stack == 0
    # What all threads have at launch pays for what the consumers take: with less, they would wait for registers forever.
    assert usage["prefill_a16"].registers * 384 >= 128 * 40 + 256 * 232
    # "Potential performance loss: wgmma.mma_async instructions are serialized".
    assert "C75" not in result.log

    sass = disassemble(result.cubin)
    kind = "BF16" if variant.x == BF16 else "F32"
    products = re.findall(rf"HGMMA\.64x{tokens}x16\.F32\S* R\d+, R\d+, gdesc", sass)
    assert kind in products[0]
    assert len(products) == (4 if tokens > 128 else 512 // variant.bits // 16)  # a stage, once, or half of it
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert re.search(r"\bUTMALDG\b", sass)
    assert not re.search(r"\bI2FP?\b|\bI2F\b", sass.split("HGMMA", 1)[1].rsplit("HGMMA", 1)[0])


@pytest.mark.nvrtc
@pytest.mark.exhaustive(where=lambda variant, tokens: (TOKENS.index(tokens) + variant.bits // 4) % 3)
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[6]], ids=["int4", "int8"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_pairs_share_tokens_without_spills(variant, tokens):
    defines = (*variant.defines, *PrefillConfig(tokens, 1, 1, 0, 0, multicast=True).defines)
    result = compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)
    assert (result.usage()["prefill_a16"].spills, result.usage()["prefill_a16"].stack) == (0, 0)
    assert "C75" not in result.log


def compiled(variant, config):
    defines = (*variant.defines, *config.defines)
    result = compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)
    used = result.usage()["prefill_a16"]
    assert (used.spills, used.stack) == (0, 0), defines
    # What three or four warpgroups have at launch is what they take.
    left, taken = (40, 232) if config.rows == ROWS else (32, 160)
    assert used.registers * config.threads >= 128 * left + 2 * config.rows * taken
    assert "C75" not in result.log
    return result


@pytest.mark.nvrtc
@pytest.mark.exhaustive(
    where=lambda number, tokens, pair: (number // 2 + tokens // 64 + (pair == "split")) % 2 or number in (4, 12)
)
@pytest.mark.parametrize(
    ("number", "tokens", "pair"),
    [
        *((number, tokens, pair) for number in (0, 6) for tokens in (64, 128) for pair in ("multicast", "split")),
        *((number, 128, "multicast") for number in (2, 4, 5, 10, 12)),
    ],
)
def test_three_warpgroups_multiply_without_spills(number, tokens, pair):
    config = PrefillConfig(tokens, 1, 1, 0, 0, rows=TALL, wide=number == 6 and tokens < 128, **{pair: True})
    assert config.threads == 512
    compiled(VARIANTS[number], config)


@pytest.mark.nvrtc
@pytest.mark.exhaustive(where=lambda config: config.tokens in (16, 96))
@pytest.mark.parametrize("config", WIDE, ids=lambda config: f"T{config.tokens}")
def test_wide_steps_of_int8_multiply_in_groups_of_two(config, disassemble):
    result = compiled(VARIANTS[6], config)
    sass = disassemble(result.cubin)
    assert sass.count("HGMMA") == 8
    assert sass.count("WARPGROUP.ARRIVE") == 4


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    ("number", "config", "message"),
    [
        (0, PrefillConfig(192, 1, 1, 0, 0, rows=TALL), "three warpgroups have registers for 128 tokens"),
        (6, PrefillConfig(192, 1, 1, 0, 0, wide=True), "steps of 128"),
        (12, PrefillConfig(64, 1, 1, 0, 0, wide=True), "steps of 128"),
    ],
)
def test_forms_that_the_source_is_not_written_for(number, config, message):
    defines = (*VARIANTS[number].defines, *config.defines)
    with pytest.raises(CompileError, match=message):
        compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)


# ---- on a GPU ----


def another_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)


class Case:
    """A weight in fragment order, and the product of what the kernel makes of it."""

    def __init__(self, m, n, k, bits=4, group_size=128, x=BF16, scale=BF16, zero=None, bias=False, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)
        self.bits, self.n, self.group_size = bits, n, k if group_size == -1 else group_size
        self.x = torch.randn(m, k, generator=generator, device="cuda").to(x)
        codes = torch.randint(0, 1 << bits, (n, k), generator=generator, device="cuda", dtype=torch.uint8)
        groups = -(-k // self.group_size)
        scales = (torch.rand(n, groups, generator=generator, device="cuda") * 0.02 + 0.005).to(scale)
        zeros = None
        if zero == "integer":
            zeros = torch.randint(0, 16, (n, groups), generator=generator, device="cuda").to(scale)
        elif zero == "float":
            # Not so small that a 512th is subnormal in fp16, where sums are scaled.
            zeros = (0.25 + 14.5 * torch.rand(n, groups, generator=generator, device="cuda")).to(scale)
        self.bias = torch.randn(n, generator=generator, device="cuda").to(x) if bias else None
        layout = FRAGMENT_INT4 if bits == 4 else FRAGMENT_INT8
        self.packed = layout.pack(codes)
        self.scales = layout.arrange_scales(scales, k, self.group_size)
        self.zeros = None if zeros is None else layout.arrange_scales(zeros, k, self.group_size)

        def spread(values):
            return values.repeat_interleave(self.group_size, dim=1)[:, :k]

        # What zeros add is rounded to x's dtype, and so is the weight; where sums are scaled, codes less zeros.
        self.variant = Variant.of(x, scale, bits, self.group_size, k, zeros is not None)
        middle = torch.full_like(scales, 1 << (bits - 1)) if zeros is None else zeros
        differences = (codes.double() - spread(middle.to(x)).double()).to(x).double()
        self.unrounded = differences * spread(scales).double()
        self.weight, offset, factor = codes.double() - (1 << (bits - 1)), 0.0, 1.0
        if self.group_size == k:  # the scale is not rounded: it multiplies the sum
            factor = scales.double().T
            if zeros is not None:
                offset = (8 - zeros.float()).to(x).double()
        else:
            self.weight *= spread(scales.to(x)).double()
            if zeros is not None:
                offset = spread(((8 - zeros.double()) * scales.double()).float().to(x)).double()
        self.weight = (self.weight + offset).to(x).double()
        self.exact = self.x.double() @ self.weight.T * factor
        self.magnitude = self.x.double().abs() @ self.weight.abs().T * factor
        if self.bias is not None:
            self.exact += self.bias.double()

    def run(self, config=None):
        return linear(
            self.x, self.packed, self.scales, self.zeros, self.bias, self.n, self.group_size, self.bits, config=config
        )

    def check(self, y, config=None):
        exact = self.exact
        if config is not None and config.scales_sums(self.variant):
            exact = self.x.double() @ self.unrounded.T + (0 if self.bias is None else self.bias.double())
        assert y.shape == exact.shape
        assert y.dtype == self.x.dtype
        error = (y.double() - exact).abs()
        # A rounding of the result, and fp32 sums.
        rounding = 2.0**-8 if y.dtype == BF16 else 2.0**-11
        bound = 1.01 * rounding * exact.abs() + 2e-6 * self.magnitude + 1e-6
        assert bool((error <= bound).all()), f"worst error is {(error / bound).max().item():.3g} times its bound"


def config_of(tokens, m, n, shared_tiles=0, workers=0, ctas=100, raster=3, multicast=False, rows=ROWS, wide=False):
    tiles = -(-n // (rows * (1 + multicast))) * -(-m // tokens)
    shared_tiles = min(shared_tiles, tiles)
    ctas = max(min(ctas, tiles - shared_tiles), workers, 1)
    return PrefillConfig(
        tokens, ctas, raster, shared_tiles, workers if shared_tiles else 0, multicast, False, rows, wide
    )


hopper = [pytest.mark.gpu, pytest.mark.skipif("another_gpu()", reason="needs compute capability 9.0")]


class TestOnHopper:
    pytestmark = hopper

    @pytest.mark.parametrize("tokens", SIZES)
    def test_every_tile_and_every_way_to_share(self, tokens):
        m, n, k = tokens + tokens // 2 + 1, 2 * ROWS + 40, 2176  # 3 x 2 tiles of 17 steps
        case = Case(m, n, k, bias=True)
        case.check(case.run(config_of(tokens, m, n)))
        case.check(case.run(config_of(tokens, m, n, ctas=1)))  # one CTA that takes every tile
        for shared_tiles in (1, 4, 6):
            for workers in (1, 2, 3, 5, 7, 16):
                config = config_of(tokens, m, n, shared_tiles, workers)
                case.check(case.run(config))
                assert torch.equal(case.run(config), case.run(config))
        case.check(case.run(config_of(tokens, m, n, 6, 6 * 17)))  # a step a CTA

    @pytest.mark.parametrize("tokens", [16, 32, *BETWEEN, 128, 256])
    @pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
    @pytest.mark.parametrize("zero", [None, "integer", "float"])
    @pytest.mark.parametrize(("x", "scale"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, BF16)])
    def test_int4(self, tokens, group_size, zero, x, scale):
        case = Case(100, 264, 1024, 4, group_size, x, scale, zero)
        for config in (config_of(tokens, 100, 264), config_of(tokens, 100, 264, 3, 5)):
            case.check(case.run(config), config)

    @pytest.mark.parametrize("tokens", SIZES)
    @pytest.mark.parametrize("x", [BF16, FP16])
    def test_int8(self, tokens, x):
        case = Case(100, 264, 1000, 8, -1, x, FP32, bias=True)
        case.check(case.run(config_of(tokens, 100, 264)))
        case.check(case.run(config_of(tokens, 100, 264, 2, 7)))

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("tokens", BETWEEN)
    def test_epilogues_of_tiles_between(self, tokens, bits):
        group_size, scale = (128, BF16) if bits == 4 else (-1, FP32)
        m, n = 2 * tokens + 3, 2 * ROWS + 48
        case = Case(m, n, 1152, bits, group_size, scale=scale)
        case.bias = None
        args = (case.x, case.packed, case.scales, case.zeros, None)
        gate, up = (case.exact.unflatten(1, (-1, 2, 8))[:, :, i].flatten(1) for i in (0, 1))
        gated = torch.nn.functional.silu(gate) * up
        residual = torch.randn(m, n, device="cuda").to(BF16)
        for shared_tiles, workers, multicast in ((0, 0, False), (0, 0, True), (3, 5, False), (2, 5, True)):
            cut = config_of(tokens, m, n, shared_tiles, workers, multicast=multicast)
            turned = linear(*args, n, case.group_size, bits, config=cut, transposed=True)
            assert turned.dtype == FP32
            assert bool(((turned.T.double() - case.exact).abs() <= 2e-6 * case.magnitude + 1e-6).all())
            y = linear(*args, n, case.group_size, bits, config=cut, residual=residual)
            exact = case.exact + residual.double()
            bound = 1.01 * 2.0**-8 * exact.abs() + 2e-6 * (case.magnitude + residual.double().abs()) + 1e-6
            assert bool(((y.double() - exact).abs() <= bound).all())
            y = linear(*args, n // 2, case.group_size, bits, config=cut, gated=True)
            bound = 1.02 * 2.0**-8 * gated.abs() + 1e-4 * (1 + gate.abs()) * (1 + up.abs())
            assert bool(((y.double() - gated).abs() <= bound).all())

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("tokens", SIZES)
    def test_pairs_that_load_tokens_for_each_other(self, tokens, bits):
        group_size, scale = (128, BF16) if bits == 4 else (-1, FP32)
        for n in (2 * ROWS + 40, 4 * ROWS, 24):  # the last pair has rows for one CTA, for both, for less than one
            for m in (
                tokens + tokens // 2 + 1,
                tokens // 2,
                1,
                3 * tokens,
            ):  # the second CTA has some, no, no and all tokens
                case = Case(m, n, 2176, bits, group_size, scale=scale, bias=True)
                case.check(case.run(config_of(tokens, m, n, multicast=True)))
                for shared_tiles, workers in ((1, 3), (2, 2), (3, 7), (4, 16)):
                    config = config_of(tokens, m, n, shared_tiles, workers, multicast=True)
                    case.check(case.run(config))
                    assert torch.equal(case.run(config), case.run(config))

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("multicast", [False, True])
    @pytest.mark.parametrize("tokens", [64, 96, 128])
    def test_tiles_of_three_warpgroups(self, tokens, multicast, bits):
        group_size, scale = (128, BF16) if bits == 4 else (-1, FP32)
        form = {"multicast": multicast, "rows": TALL, "wide": bits == 8}
        for n in (2 * TALL, 3 * TALL - 40, 24):
            for m in (tokens + tokens // 2 + 1, 1, 3 * tokens):
                case = Case(m, n, 2176, bits, group_size, scale=scale, bias=True)
                case.check(case.run(config_of(tokens, m, n, **form)))
                case.check(case.run(config_of(tokens, m, n, ctas=1, **form)))
                for shared_tiles, workers in ((1, 3), (2, 2), (4, 16)):
                    config = config_of(tokens, m, n, shared_tiles, workers, **form)
                    case.check(case.run(config))
                    assert torch.equal(case.run(config), case.run(config))

    @pytest.mark.parametrize("x", [BF16, FP16])
    @pytest.mark.parametrize("multicast", [False, True])
    @pytest.mark.parametrize("tokens", [16, 32, 64, 96, 128])
    def test_wide_steps_of_int8(self, tokens, multicast, x):
        for k in (8, 64, 72, 128, 136, 1000, 2112, 2176, 4160):  # a last step of one piece and of both, full and not
            for m, n in ((tokens + 3, 2 * ROWS + 40), (1, 24), (2 * tokens, 4 * ROWS)):
                case = Case(m, n, k, 8, -1, x, FP32, bias=True)
                form = {"multicast": multicast, "wide": True}
                case.check(case.run(config_of(tokens, m, n, **form)))
                case.check(case.run(config_of(tokens, m, n, ctas=1, **form)))
                if k > 1000:
                    case.check(case.run(config_of(tokens, m, n, 2, 7, **form)))

    def test_what_a_wide_step_leaves_in_its_ring_is_not_seen(self):
        # The last step's second piece is of an earlier tile, or of an earlier kernel, and meets zeros alone.
        case = Case(200, 1024, 64 * 9, 8, -1, scale=FP32)
        for ctas in (1, 2, 100):
            case.check(case.run(config_of(64, 200, 1024, ctas=ctas, wide=True)))

    @pytest.mark.parametrize(
        ("m", "n", "k"),
        [
            (1, 16, 8),
            (17, 1, 8),
            (33, 7, 136),
            (64, 15, 264),
            (65, 127, 1096),
            (129, 129, 4096),
            (300, 4099, 512),
            (1000, 5000, 1032),
        ],
    )
    def test_awkward_shapes(self, m, n, k):
        for bits in (4, 8):
            case = Case(m, n, k, bits, 128 if bits == 4 else -1, scale=BF16 if bits == 4 else FP32, bias=True)
            case.check(case.run())

    @pytest.mark.parametrize("m", [17, 64, 128, 256, 1024, 4096])
    @pytest.mark.parametrize(("n", "k"), [(4096, 4096), (14336, 4096), (4096, 14336)])
    def test_model_shapes_twice_with_equal_bits(self, m, n, k):
        case = Case(m, n, k)
        first = case.run()
        case.check(first)
        for _ in range(5):
            assert torch.equal(case.run(), first)

    def test_rows_of_a_wider_tensor(self):
        case = Case(100, 256, 512)
        wide = torch.full((100, 1024), torch.nan, device="cuda", dtype=BF16)
        wide[:, 256:768] = case.x
        case.x = wide[:, 256:768]
        case.check(case.run())

    def test_nothing_is_written_past_the_result(self):
        # Results that follow each other in memory: the second launch must leave the first one's alone, and the other way round.
        cases = [Case(m, n, 256, seed=m) for m, n in ((17, 9), (63, 130), (129, 24))]
        results = [case.run() for case in cases for _ in range(3)]
        for case, y in zip((case for case in cases for _ in range(3)), results, strict=True):
            case.check(y)

    def test_graphs_have_workspaces_of_their_own(self):
        case = Case(64, 512, 4096)
        config = config_of(64, 64, 512, 4, 64)
        expected = case.run(config)
        streams = [torch.cuda.Stream() for _ in range(2)]
        graphs, results = [], []
        for stream in streams:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                results.append([case.run(config) for _ in range(20)])
            graphs.append(graph)
        for _ in range(20):
            for stream, graph in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            eager = [case.run(config) for _ in range(20)]
            torch.cuda.synchronize()
            for y in (*results[0], *results[1], *eager):
                assert torch.equal(y, expected)

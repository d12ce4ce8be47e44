"""The prefill kernel: its cuts and its code without a GPU, its results on one."""

import math
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
    candidates,
    cost,
    forms,
    prefill_config,
    ring,
)
from lq_kernels.cuda.sources import VARIANTS
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
    assert usage["prefill_a16"].registers * 384 >= 128 * 24 + 256 * 232
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
    assert used.registers * config.threads >= 128 * 24 + 2 * config.rows * (232 if config.rows == ROWS else 160)
    assert "C75" not in result.log
    return result


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    ("number", "tokens", "pair"),
    [
        *((number, tokens, pair) for number in (0, 6) for tokens in (64, 128) for pair in ("multicast", "split")),
        *((number, 128, "multicast") for number in (2, 4, 5, 10, 12)),
    ],
)
def test_three_warpgroups_multiply_without_spills(number, tokens, pair):
    config = PrefillConfig(tokens, 1, 1, 0, 0, rows=TALL, wide=number == 6, **{pair: True})
    assert config.threads == 512
    compiled(VARIANTS[number], config)


@pytest.mark.nvrtc
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


def test_shared_memory_fits_and_the_ring_is_deep_enough():
    for config in WIDE:
        for rows, split in ((ROWS, False), (ROWS, True), (TALL, False), (TALL, True)):
            stages, shared = ring(config.tokens, 8, 0, split and config.tokens > 16, rows, wide=True)
            assert stages >= 3
            assert shared <= 232448
    for tokens in SIZES:
        for bits, scale_bytes in ((4, 0), (4, 32), (4, 64), (4, 256), (4, 512), (8, 0)):
            stages, shared = ring(tokens, bits, scale_bytes)
            assert shared <= 232448
            # One that is multiplied, one that is read ahead, one in flight; the largest tile is not used with wide scales.
            assert stages >= (2 if tokens == 256 and scale_bytes > 64 else 3), (tokens, bits, scale_bytes)


def pieces(config, m, n, k, bits):
    """Return (row tile, token tile, first K step, last) of every CTA in its order: what struct Work of the source yields."""
    rows, tokens, steps = -(-n // config.rows), -(-m // config.tokens), config.steps(k, bits)
    units, result = config.shared_tiles * steps, []
    for cta in range(config.ctas):
        mine = []
        if cta < config.workers:
            unit, stop = cta * units // config.workers, (cta + 1) * units // config.workers
            while unit < stop:
                tile = unit // steps
                end = min(stop - tile * steps, steps)
                mine.append((tile, unit - tile * steps, end))
                unit = tile * steps + end
        mine += [(tile, 0, steps) for tile in range(config.shared_tiles + cta, rows * tokens, config.ctas)]
        for tile, begin, end in mine:
            band, in_band = divmod(tile, config.raster * tokens)
            height = min(rows - band * config.raster, config.raster)
            token, row = divmod(in_band, height)
            middle = (begin + end + 1) // 2
            for part in ((begin, middle), (middle, end)) if config.split else ((begin, end),):
                result.append((band * config.raster + row, token, *part))
    return result


SHAPES = [
    (m, n, k)
    for m in (1, 17, 64, 65, 128, 1000, 4096)
    for n, k in ((8, 8), (4096, 4096), (14336, 4096), (4096, 14336), (4100, 1000))
] + [(m, n, 4096) for m in (96, 200, 256, 384, 512, 2048) for n in (5120, 6144)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize(("bits", "scale_bytes"), [(4, 32), (8, 0)])
def test_every_cut_covers_every_step_of_every_tile_once(m, n, k, bits, scale_bytes):
    sizes = (m, n, k, bits, scale_bytes, 132)
    for config in candidates(*sizes):
        assert config.tokens in SIZES
        assert config.wide == (bits == 8 and scale_bytes == 0 and config.tokens <= 128)
        steps = -(-k // 64) if bits == 8 and not config.wide else -(-k // 128)
        assert 1 <= config.workers <= config.ctas <= 132 or config.workers == 0 < config.ctas <= 132
        seen = {}
        for row, token, begin, end in pieces(config, m, n, k, bits):
            assert 0 <= begin < end <= steps, "a piece without a step"
            seen.setdefault((row, token), []).append((begin, end))
        assert len(seen) == -(-n // config.rows) * -(-m // config.tokens)
        for parts in seen.values():
            parts.sort()
            assert [begin for begin, _ in parts] == [0] + [end for _, end in parts[:-1]]
            assert parts[-1][1] == steps
    assert prefill_config(*sizes) in set(candidates(*sizes))


def test_cuts_follow_the_size():
    few = prefill_config(64, 4096, 4096, 4, 32, 132)
    assert few.split, "32 tiles do not fill 132 multiprocessors"
    fewer = prefill_config(64, 4096, 14336, 4, 32, 132)
    assert (fewer.split, fewer.parts) == (True, 2), "long ones are worth more than two parts, of a pair each"
    large = prefill_config(4096, 4096, 4096, 4, 32, 132)
    assert large.tokens == 256, "the largest tile reads least"
    assert large.ctas * large.sharers == 132
    assert not prefill_config(64, 128, 4096, 4, 32, 132).multicast, "one tile of rows has no neighbour"


@pytest.mark.parametrize(("bits", "scale_bytes"), [(4, 32), (8, 0)])
@pytest.mark.parametrize(("n", "k"), [(2048, 2048), (3072, 2048), (4096, 4096), (6144, 4096), (5120, 8192), (64, 4096)])
def test_tall_tiles_are_compiled_where_they_pay(n, k, bits, scale_bytes):
    sizes = (n, k, bits, scale_bytes, 132)
    known = {cut.defines for cut in forms(*sizes)}
    tall = {cut.defines for cut in forms(*sizes) if cut.rows == TALL}
    between = {cut.defines for cut in forms(*sizes) if cut.tokens in BETWEEN}
    assert len(known - tall - between) <= 11
    assert bool(tall) == (n % 384 == 0)
    asked = {cut.defines for m in (*range(1, 2100, 13), 4096, 8192) for cut in candidates(m, *sizes)}
    assert asked <= known
    # Each is the fastest by the model for some number of tokens.
    chosen = {prefill_config(m, *sizes).defines for m in range(16, 2049, 16)}
    assert tall <= chosen
    # For some number of tokens it gains 7%: nothing is compiled for less. Many tokens fill the machine with any tile.
    gains = dict.fromkeys(tall, 1.0)
    for m in {m for step in (64, 96) for m in range(step, 2049, step)}:
        times = {}
        for cut in candidates(m, *sizes):
            times[cut.defines] = min(times.get(cut.defines, math.inf), cost(cut, m, n, k, bits, 132))
        usual = min(us for form, us in times.items() if form not in tall)
        gains |= {form: min(gains[form], times[form] / usual) for form in tall & times.keys()}
    assert all(gain < 0.93 for gain in gains.values())
    assert not {cut.defines for cut in candidates(2049, *sizes)} & tall


@pytest.mark.parametrize(
    ("m", "n", "k", "tokens", "rows"),
    [
        (384, 4096, 4096, 96, ROWS),
        (384, 6144, 4096, 96, TALL),
        (512, 6144, 4096, 128, TALL),
        (512, 3072, 2048, 112, ROWS),
        (512, 5120, 8192, 176, ROWS),
    ],
)
def test_tiles_fill_the_multiprocessors(m, n, k, tokens, rows):
    cut = prefill_config(m, n, k, 4, 32, 132)
    assert (cut.tokens, cut.rows, cut.shared_tiles) == (tokens, rows, 0)
    assert cut.ctas * cut.pair == (120 if tokens in BETWEEN else 128)


@pytest.mark.parametrize(("bits", "scale_bytes"), [(4, 32), (8, 0)])
@pytest.mark.parametrize(
    ("n", "k", "tokens"), [(3072, 2048, 112), (5120, 8192, 176), (10240, 5120, 176), (4096, 4096, 0), (14336, 4096, 0)]
)
def test_tiles_between_are_compiled_where_they_pay(n, k, tokens, bits, scale_bytes):
    sizes = (n, k, bits, scale_bytes, 132)
    between = {cut.defines for cut in forms(*sizes) if cut.tokens in BETWEEN}
    assert {f"LQ_TOKENS={tokens}"} <= {defines[0] for defines in between} if tokens else not between
    gains = dict.fromkeys(between, 1.0)
    for m in (256, 384, 512, 768, 1024, 1536, 2048):
        times = {}
        for cut in candidates(m, *sizes):
            times[cut.defines] = min(times.get(cut.defines, math.inf), cost(cut, m, n, k, bits, 132))
        usual = min(us for form, us in times.items() if form not in between and "LQ_ROWS=192" not in form)
        gains |= {form: min(gains[form], times[form] / usual) for form in between & times.keys()}
    assert all(gain < 0.96 for gain in gains.values())
    assert not {cut.defines for cut in candidates(2049, *sizes)} & between


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
            zeros = (torch.rand(n, groups, generator=generator, device="cuda") * 15).to(scale)
        self.bias = torch.randn(n, generator=generator, device="cuda").to(x) if bias else None
        layout = FRAGMENT_INT4 if bits == 4 else FRAGMENT_INT8
        self.packed = layout.pack(codes)
        self.scales = layout.arrange_scales(scales, k, self.group_size)
        self.zeros = None if zeros is None else layout.arrange_scales(zeros, k, self.group_size)

        def spread(values):
            return values.repeat_interleave(self.group_size, dim=1)[:, :k]

        # What zeros add is rounded to x's dtype, and so is the weight.
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

    def check(self, y):
        assert y.shape == self.exact.shape
        assert y.dtype == self.x.dtype
        error = (y.double() - self.exact).abs()
        # A rounding of the result, and fp32 sums.
        rounding = 2.0**-8 if y.dtype == BF16 else 2.0**-11
        bound = 1.01 * rounding * self.exact.abs() + 2e-6 * self.magnitude + 1e-6
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

    @pytest.mark.parametrize("tokens", [32, *BETWEEN, 128, 256])
    @pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
    @pytest.mark.parametrize("zero", [None, "integer", "float"])
    @pytest.mark.parametrize(("x", "scale"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, BF16)])
    def test_int4(self, tokens, group_size, zero, x, scale):
        case = Case(100, 264, 1024, 4, group_size, x, scale, zero)
        case.check(case.run(config_of(tokens, 100, 264)))
        case.check(case.run(config_of(tokens, 100, 264, 3, 5)))

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

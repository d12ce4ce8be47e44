"""Pairs of CTAs that share the K of a tile in the prefill kernel, of every one or of those that are left over (halved).

Their cuts and code without a GPU, their results on one.
"""

import math
import re

import cuda_host.cases
import pytest
import torch
from lq_formats import CompileError, ShapeError
from lq_formats.layouts import FRAGMENT_INT4, FRAGMENT_INT8
from lq_kernels.cuda import invariant
from lq_kernels.cuda.prefill_a16 import linear
from lq_kernels.cuda.prefill_cuts import (
    HALVED_TOKENS,
    ROWS,
    SPLIT_TOKENS,
    TALL,
    PrefillConfig,
    candidates,
    cost,
    forms,
    ring,
    ring_of,
)
from lq_kernels.cuda.sources import VARIANTS
from lq_kernels.cuda.variant import EPILOGUES, Variant
from lq_kernels.gated import interleave_rows
from lq_kernels.jit import compiler

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = 132


def split(tokens, m, n, ctas=66, raster=3, rows=ROWS, wide=False, shared=0, parts=1):
    """Return a cut of pairs; the first ``shared`` tiles have ``parts`` parts."""
    tiles = -(-n // rows) * -(-m // tokens)
    workers = parts * shared
    pairs = max(workers, min(ctas, tiles - shared))
    return PrefillConfig(tokens, pairs, raster, shared, workers, split=True, rows=rows, wide=wide)


def halved(m, n, ctas=66, raster=3, wide=False, shared=1, tokens=128, parts=1):
    """Return a cut of pairs that have the same tokens, and halve the first ``shared`` pairs of tiles, or parts of these."""
    tiles, workers = -(-n // (2 * ROWS)) * -(-m // tokens), 2 * parts * shared
    pairs = max(workers, min(ctas, tiles - shared))
    return PrefillConfig(tokens, pairs, raster, shared, workers, multicast=True, split=True, wide=wide)


def fits(config, bits, scale_bytes):
    return ring_of(config, bits, scale_bytes)[0] >= 3


# ---- without a GPU ----


USUAL = {
    (0, 64, "none"),
    *((number, 128, "none") for number in (0, 6, 10)),
    (0, 128, "residual"),
    (6, 32, "silu_mul"),
}
"""What is compiled in every run of the tests: variant, tokens, epilogue."""


@pytest.mark.nvrtc
@pytest.mark.exhaustive(where=lambda number, tokens, epilogue: (number, tokens, epilogue) not in USUAL)
@pytest.mark.parametrize(
    ("number", "tokens", "epilogue"),
    [
        *(
            (0, tokens, epilogue)
            for tokens in SPLIT_TOKENS
            for epilogue in EPILOGUES
            if tokens == 128 or epilogue == "none"
        ),
        *((number, 128, "none") for number in (2, 4, 5, 6, 10, 12)),
        (2, 32, "none"),
        (6, 32, "silu_mul"),
    ],
)
def test_it_compiles_without_spills_and_waits_for_the_memory_only_where_parts_are_left(
    number, tokens, epilogue, disassemble
):
    variant = VARIANTS[number]
    defines = (*PrefillConfig(tokens, 1, 1, 0, 0, split=True).macros(variant), *EPILOGUES[epilogue])
    result = compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)
    (used,) = result.usage().values()
    assert (used.spills, used.stack) == (0, 0)
    assert "C75" not in result.log
    sass = disassemble(result.cubin)
    fewer, more = sorted(int(count, 16) for count in re.findall(r"USETMAXREG\S*(?: UP\d,)? (0x[0-9a-f]+)", sass))
    assert used.registers * 384 >= 128 * fewer + 256 * more  # or a warpgroup would wait forever
    assert len(re.findall(rf"HGMMA\.64x{tokens}x16\.F32\S* R\d+, R\d+, gdesc", sass)) == 512 // variant.bits // 16
    assert re.search(r"\bSTAS\.128\b", sass)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    # The exchange needs no barrier of the whole memory; parts of a tile do, before they are counted, and for the count itself.
    products, after = sass.rsplit("STAS.128", 1)
    assert not re.search(r"\bMEMBAR\.\S*(GPU|SYS)", products)
    assert len(re.findall(r"\bMEMBAR\.\S*(GPU|SYS)", after)) <= 2


@pytest.mark.nvrtc
@pytest.mark.exhaustive(
    where=lambda number, epilogue, tokens: (
        (number, epilogue, tokens) not in {(0, "none", 128), (0, "residual", 192), (6, "none", 256)}
    )
)
@pytest.mark.parametrize(
    ("number", "epilogue"),
    [*((i, each) for i in (0, 6) for each in EPILOGUES), *((number, "none") for number in (2, 4, 5, 10, 12))],
)
@pytest.mark.parametrize("tokens", HALVED_TOKENS)
def test_halved_tiles_compile_without_spills_and_wait_for_the_memory_only_where_parts_are_left(
    number, epilogue, tokens, disassemble
):
    variant = VARIANTS[number]
    config = halved(200, 512, wide=variant.bits == 8 and variant.groups == 0 and tokens == 128, tokens=tokens)
    if not fits(config, variant.bits, variant.scale_bytes):
        assert tokens == 256 if variant.scale_bytes < 256 else tokens >= 192
        pytest.skip("no room for an inbox")
    defines = (*variant.defines, *config.defines, *EPILOGUES[epilogue])
    result = compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)
    (used,) = result.usage().values()
    assert (used.spills, used.stack) == (0, 0)
    assert "C75" not in result.log
    sass = disassemble(result.cubin)
    steps = 128 if config.wide else 512 // variant.bits
    body = steps // 2 if tokens > 128 and steps == 128 else steps
    assert len(re.findall(rf"HGMMA\.64x{tokens}x16\.F32\S* R\d+, R\d+, gdesc", sass)) == body // 16
    assert re.search(r"\bSTAS\.128\b", sass)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    _, after = re.split(r"\bSTAS\.128\b", sass, maxsplit=1)
    assert len(re.findall(r"\bMEMBAR\.\S*(GPU|SYS)", sass)) == len(re.findall(r"\bMEMBAR\.\S*(GPU|SYS)", after)) <= 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("m", "n", "k", "both", "int8"),  # tokens, pairs of tiles that are left over, and parts of their row tiles
    [
        (1024, 5120, 8192, [(128, 28, 1)], [(256, 14, 1), (256, 14, 2)]),
        (512, 10240, 5120, [(128, 28, 1)], [(256, 14, 1), (256, 14, 2)]),
        (512, 14336, 4096, [(128, 26, 1)], []),
        (384, 12288, 4096, [(192, 30, 1)], []),
        (2048, 5120, 8192, [(192, 22, 1)], [(256, 28, 1)]),
        (1024, 4096, 4096, [], []),  # of 128 and 256 tokens 62 pairs of tiles are left over
        (512, 4096, 4096, [], []),  # too few tiles
        (1024, 5120, 8200, [], []),  # an odd number of steps
    ],
)
def test_tiles_that_are_left_over_are_halved_where_that_pays(m, n, k, both, int8, bits):
    sizes = (n, k, bits, 32 if bits == 4 else 0, H200)
    found = [config for config in candidates(m, *sizes) if config.halved]
    assert sorted((config.tokens, config.shared_tiles, config.parts) for config in found) == both + int8 * (bits == 8)
    for config in found:
        assert fits(config, bits, sizes[3])
        assert (config.workers, config.ctas) == (2 * config.parts * config.shared_tiles, 66)
        assert config.workers <= 66
    known = {config.defines for config in forms(*sizes)}
    for config in found:
        assert (config.pair, config.sharers, config.runs, config.aside(bits)) == (2, 2, 1, True)
        assert math.prod(config.tiles(m, n)) % 66 == config.shared_tiles
        assert config.defines in known
        assert {"LQ_MULTICAST=1", "LQ_SPLIT=1"} <= set(config.defines)
        whole = PrefillConfig(config.tokens, 66, config.raster, 0, 0, multicast=True, wide=config.wide)
        assert cost(config, m, n, k, bits, H200) < cost(whole, m, n, k, bits, H200)
    # Compiled ahead for no number of tokens that does not ask for it.
    asked = {config.defines for tokens in range(16, 2100, 48) for config in candidates(tokens, *sizes)}
    assert asked <= known


def test_what_cannot_be_halved_is_refused():
    packed = FRAGMENT_INT4.pack(torch.zeros(512, 640, dtype=torch.uint8))
    scale = FRAGMENT_INT4.arrange_scales(torch.ones(512, 5, dtype=BF16), 640, 128)
    x = torch.zeros(200, 640, dtype=BF16)
    with pytest.raises(
        ShapeError, match=r"K=640: halved tiles have an even number of workers each.*2 workers of 1 tiles and 5 steps"
    ):
        linear(x, packed, scale, None, None, 512, 128, 4, halved(200, 512))
    config = PrefillConfig(128, 3, 1, 1, 3, multicast=True, split=True)
    with pytest.raises(ShapeError, match="3 workers of 1 tiles"):
        linear(x, packed, scale, None, None, 512, 128, 4, config)
    with pytest.raises(ShapeError, match="4 workers of 1 tiles and 5 steps"):
        linear(x, packed, scale, None, None, 512, 128, 4, halved(200, 512, parts=2))


@pytest.mark.nvrtc
def test_pairs_share_one_thing():
    for macros in (("LQ_TOKENS=64", "LQ_MULTICAST=1"), ("LQ_TOKENS=256",), ("LQ_TOKENS=16",), ("LQ_TOKENS=192",)):
        defines = (*VARIANTS[0].defines, *macros, "LQ_SPLIT=1")
        with pytest.raises(CompileError, match="pairs share K"):
            compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 17, 33, 64, 100, 128, 256, 1000])
@pytest.mark.parametrize(("n", "k"), [(8, 8), (64, 136), (4096, 4096), (14336, 4096), (1000, 200)])
def test_there_are_pairs_where_tiles_are_few(m, n, k, bits):
    found = [config for config in candidates(m, n, k, bits, 32, H200) if config.split and not config.halved]
    expected = set()
    for tokens in SPLIT_TOKENS:
        tiles = -(-n // ROWS) * -(-m // tokens)
        if 2 * m > tokens and k * bits > 512 and tiles <= H200:
            expected.add((tokens, min(tiles, H200 // 2)))
    whole = [config for config in found if not config.shared_tiles]
    assert {(config.tokens, config.ctas) for config in whole} == expected
    assert len(whole) == len(expected)
    assert len(set(found)) == len(found)
    for config in found:
        tiles = math.prod(config.tiles(m, n))
        assert (config.multicast, config.pair, config.runs) == (False, 2, 1)
        assert config.workers == config.shared_tiles * (config.parts if config.shared_tiles else 0)
        assert config.workers <= config.ctas <= H200 // 2
        assert config.shared_tiles in (0, tiles)
        assert 2 * config.parts <= config.steps(k, bits)
        assert ring(config.tokens, bits, 32, split=True)[0] >= 3
        assert 1 <= config.raster <= -(-n // ROWS)


def test_buffers_for_sums_fit_beside_the_ring():
    for tokens in SPLIT_TOKENS:
        for bits, scale_bytes in ((4, 0), (4, 32), (4, 512), (8, 0), (8, 128)):
            stages, shared = ring(tokens, bits, scale_bytes, split=True)
            alone, _ = ring(tokens, bits, scale_bytes)
            assert shared <= 232448
            assert 3 <= stages <= alone
            # Of 32-bit sums: half of the tokens, for all rows.
            assert shared - stages * (tokens * 1024 // bits + 8 * (1024 + scale_bytes)) >= tokens * 256 + 456


def test_the_batch_invariant_mode_has_none_of_them():
    for m in (17, 64, 256):
        assert not invariant.prefill_config(m, 4096, 4096, 4, 32, H200).split
        cuts = invariant._prefill_cuts(m, 4096, 4096, 4, 32, H200, 1)
        assert cuts
        assert not any(config.split for config in cuts)


def test_a_single_step_cannot_be_shared():
    for bits, layout in ((4, FRAGMENT_INT4), (8, FRAGMENT_INT8)):
        k = 512 // bits
        packed = layout.pack(torch.zeros(128, k, dtype=torch.uint8))
        scale = layout.arrange_scales(torch.ones(128, 1, dtype=BF16), k, k)
        with pytest.raises(ShapeError, match=f"K={k}: a pair shares two steps"):
            linear(torch.zeros(64, k, dtype=BF16), packed, scale, None, None, 128, k, bits, split(64, 64, 128))
        packed, scale = (
            layout.pack(torch.zeros(128, 3 * k, dtype=torch.uint8)),
            layout.arrange_scales(torch.ones(128, 1, dtype=BF16), 3 * k, 3 * k),
        )
        parts = split(64, 64, 128, shared=1, parts=2)
        with pytest.raises(ShapeError, match=f"K={3 * k}: a pair shares two steps"):
            linear(torch.zeros(64, 3 * k, dtype=BF16), packed, scale, None, None, 128, 3 * k, bits, parts)


# ---- on a GPU ----


def another_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)


class Case:
    """A weight in fragment order, an epilogue, and the product of what the kernel makes of them, in float64."""

    def __init__(self, m, n, k, bits=4, group=128, x=BF16, scale=BF16, zero=False, epilogue="none", bias=True):
        rows = 2 * n if epilogue == "silu_mul" else n
        self.m, self.n, self.bits, self.group, self.epilogue = m, n, bits, k if group == -1 else group, epilogue
        codes = torch.randint(0, 1 << bits, (rows, k), device="cuda", dtype=torch.uint8)
        groups = -(-k // self.group)
        scales = (torch.rand(rows, groups, device="cuda") * 0.02 + 0.005).to(scale)
        zeros = torch.randint(0, 16, scales.shape, device="cuda").to(scale) if zero else None

        def spread(values):
            return values.double().repeat_interleave(self.group, dim=1)[:, :k]

        w, factor = codes.double() - (1 << (bits - 1)), 1.0
        if self.group == k:
            factor = scales.double().T
            w = w if zeros is None else w + 8 - zeros.double()
        else:
            w *= spread(scales.to(x))
            w = w if zeros is None else w + spread(((8 - zeros.double()) * scales.double()).float().to(x))
        w = w.to(x).double()
        self.x = (torch.randn(m, k, device="cuda") / (w.norm(dim=1) * factor).mean()).to(x)
        self.bias = torch.randn(rows, device="cuda").to(x) if bias else None
        self.residual = torch.randn(m, n, device="cuda").to(x) if epilogue == "residual" else None
        sums = self.x.double() @ w.T * factor + (0 if self.bias is None else self.bias.double())
        off = 2e-6 * (self.x.double().abs() @ w.abs().T * factor) + 1e-6
        if epilogue == "silu_mul":
            (gate, up), (gate_off, up_off) = sums.chunk(2, 1), off.chunk(2, 1)
            sums, off = torch.nn.functional.silu(gate) * up, 2 * (gate_off * (up.abs() + 3) + up_off * (gate.abs() + 3))
            codes, scales, zeros = (each if each is None else interleave_rows(each) for each in (codes, scales, zeros))
        elif epilogue == "residual":
            sums += self.residual.double()
        elif epilogue == "transposed":
            sums, off = sums.T, off.T
        self.exact, self.off = sums, off
        layout = FRAGMENT_INT4 if bits == 4 else FRAGMENT_INT8
        self.packed, self.scales = layout.pack(codes), layout.arrange_scales(scales, k, self.group)
        self.zeros = None if zeros is None else layout.arrange_scales(zeros, k, self.group)

    def run(self, tokens, ctas=66, raster=3, tile_rows=ROWS, wide=False, shared=0, parts=1, config=None):
        rows = self.packed.shape[1] * 16
        poison = torch.full(self.exact.shape, torch.nan, device="cuda", dtype=FP32)
        del poison  # what the result will be allocated over
        return linear(
            self.x,
            self.packed,
            self.scales,
            self.zeros,
            self.bias,
            self.n,
            self.group,
            self.bits,
            config=config or split(tokens, self.m, rows, ctas, raster, tile_rows, wide, shared, parts),
            transposed=self.epilogue == "transposed",
            residual=self.residual,
            gated=self.epilogue == "silu_mul",
        )

    def check(self, y):
        assert y.shape == self.exact.shape
        assert y.dtype == (FP32 if self.epilogue == "transposed" else self.x.dtype)
        rounding = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}[y.dtype]
        worst = ((y.double() - self.exact).abs() / (1.01 * rounding * self.exact.abs() + self.off)).max().item()
        assert worst <= 1.0, f"worst error is {worst:.3g} times its bound"


@pytest.mark.gpu
@pytest.mark.skipif("another_gpu()", reason="needs compute capability 9.0")
class TestOnHopper:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("tokens", SPLIT_TOKENS)
    def test_every_tile(self, tokens, bits):
        step, group, scale = (128, 128, BF16) if bits == 4 else (64, -1, FP32)
        for k in (
            step + 8,
            2 * step,
            3 * step,
            17 * step,
            40 * step - 24,
        ):  # one step for each, more for the first, alike
            for m, n in (
                (tokens + tokens // 2 + 1, 2 * ROWS + 40),
                (3 * tokens, 4 * ROWS),
                (tokens // 2, 24),  # the second CTA stores nothing
                (1, 7),
                (tokens // 2 + 1, ROWS + 1),
                (tokens - 1, ROWS),
            ):
                case = Case(m, n, k, bits, group, scale=scale)
                for ctas, raster in ((66, 1), (2, 2), (1, 3)):  # a tile a pair, several, all
                    case.check(case.run(tokens, ctas, raster))

    @pytest.mark.parametrize("epilogue", EPILOGUES)
    @pytest.mark.parametrize("tokens", SPLIT_TOKENS)
    def test_epilogues(self, tokens, epilogue):
        for m, n in ((tokens + tokens // 2 + 3, 200), (2 * tokens, 2 * ROWS), (tokens // 2 - 1, 100), (tokens, 9)):
            for bias in (False, True):
                case = Case(m, n, 1152, epilogue=epilogue, bias=bias)  # nine steps
                for ctas in (66, 1, 2):
                    case.check(case.run(tokens, ctas))

    @pytest.mark.parametrize("tokens", SPLIT_TOKENS)
    @pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
    @pytest.mark.parametrize("zero", ["", "zeros"], ids=["sym", "asym"])
    @pytest.mark.parametrize(("x", "scale"), [(BF16, BF16), (FP16, FP16), (BF16, FP32)])
    def test_int4(self, tokens, group, zero, x, scale):
        options, config = {"group": group, "x": x, "scale": scale, "zero": zero}, split(tokens, 100, 272, 2)
        case = cuda_host.cases.Case.of_prefill(config, 100, 264, 768, **options).cuda()
        case.check(case.run_over_nan(linear, config))

    @pytest.mark.parametrize("epilogue", EPILOGUES)
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("rows", [ROWS, TALL])
    @pytest.mark.parametrize("tokens", [32, 64, 96, 128])
    def test_tall_tiles_and_wide_steps(self, tokens, rows, bits, epilogue):
        group, scale = (128, BF16) if bits == 4 else (-1, FP32)
        for m, n, k in (
            (tokens + tokens // 2 + 3, 2 * TALL + 40, 2112),
            (2 * tokens, 2 * TALL, 1152),
            (tokens // 2, 24, 136),
            (tokens + 1, TALL + 1, 256),
        ):
            case = Case(m, n, k, bits, group, scale=scale, epilogue=epilogue)
            for wide in (True, False) if bits == 8 and tokens == 128 else (bits == 8,):
                for ctas, raster in ((66, 1), (2, 2), (1, 3)):
                    case.check(case.run(tokens, ctas, raster, rows, wide))

    @pytest.mark.parametrize("epilogue", EPILOGUES)
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("tokens", SPLIT_TOKENS)
    def test_parts_of_tiles(self, tokens, bits, epilogue):
        group, scale = (128, BF16) if bits == 4 else (-1, FP32)
        for rows in (ROWS, TALL) if tokens > 32 else (ROWS,):
            for m, n, steps in (
                (tokens + tokens // 2 + 3, 2 * rows + 40, 17),  # more tiles than are shared: taken whole afterwards
                (tokens, 2 * rows, 8),
                (tokens // 2 - 1, 24, 9),  # half of the CTAs store nothing
                (tokens - 1, rows + 1, 31),
            ):
                case = Case(m, n, 128 * steps - 24, bits, group, scale=scale, epilogue=epilogue)
                for parts in (2, 3, 4):
                    for shared in {1, min(2, -(-case.packed.shape[1] * 16 // rows) * -(-m // tokens))}:
                        for ctas in (66, 2):
                            cut = {"shared": shared, "parts": parts}
                            y, again = (case.run(tokens, ctas, 2, rows, bits == 8, **cut) for _ in range(2))
                            case.check(y)
                            assert torch.equal(again, y)

    @pytest.mark.parametrize("epilogue", EPILOGUES)
    @pytest.mark.parametrize(
        ("bits", "group", "scale", "zero"),
        [(4, 128, BF16, False), (4, 32, BF16, True), (4, -1, FP32, True), (8, -1, FP32, False), (8, 64, BF16, False)],
    )
    @pytest.mark.parametrize("tokens", HALVED_TOKENS)
    def test_halved_tiles(self, bits, group, scale, zero, epilogue, tokens):
        wide = bits == 8 and group == -1 and tokens == 128
        variant = Variant.of(BF16, scale, bits, 1024 if group == -1 else group, 1024, zero)
        if not fits(halved(512, 512, wide=wide, tokens=tokens), bits, variant.scale_bytes):
            assert tokens > 128
            pytest.skip("no room for an inbox")
        for m, n, k in (
            (200, 512, 1024),
            (tokens + 2, 4 * ROWS + 40, 512),  # the last pair has one row tile, the last tile two tokens
            (tokens + tokens // 2 + 1, 3 * ROWS, 2048),
            (1024, 1000, 4096),
            (3 * tokens, 2 * ROWS, 256 if wide else 1024 // bits),  # a step each
        ):
            case = Case(m, n, k, bits, group, scale=scale, zero=zero, epilogue=epilogue)
            rows = case.packed.shape[1] * 16
            tiles = -(-rows // (2 * ROWS)) * -(-m // tokens)
            for shared, parts in {
                (1, 1),
                (min(3, tiles), 1),
                (min(33, tiles), 1),
                (1, 2),
                (min(16, tiles), 2),
                (min(5, tiles), 4),
            }:
                for ctas, raster in ((66, 1), (1, 2)):  # a tile each behind that, or all by a few
                    config = halved(m, rows, ctas, raster, wide, shared, tokens, parts)
                    if config.steps(k, bits) % (2 * parts):
                        continue
                    y = case.run(tokens, config=config)
                    case.check(y)
                    assert torch.equal(case.run(tokens, config=config), y)

    @pytest.mark.parametrize("parts_of", [(1, 1), (2, 2), (1, 4)])
    @pytest.mark.parametrize(("tokens", "bits"), [(128, 4), (192, 4), (128, 8), (192, 8), (256, 8)])
    def test_halved_tiles_have_equal_bits_a_hundred_times(self, tokens, bits, parts_of):
        cases = [Case(m, n, k, bits, -1 if bits == 8 else 128) for m, n, k in ((1000, 2048, 4096), (600, 5120, 2048))]
        configs = [
            halved(case.m, case.packed.shape[1] * 16, shared=shared, tokens=tokens, parts=parts)
            for case, shared, parts in zip(cases, (15, 5), parts_of, strict=True)
        ]
        first = [case.run(tokens, config=config) for case, config in zip(cases, configs, strict=True)]
        for case, y in zip(cases, first, strict=True):
            case.check(y)
        for _ in range(100):
            for case, config, y in zip(cases, configs, first, strict=True):
                assert torch.equal(case.run(tokens, config=config), y)

    @pytest.mark.parametrize("tokens", SPLIT_TOKENS)
    def test_equal_bits_a_hundred_times(self, tokens):
        # By turns with other numbers, so that what an exchange left behind would show.
        cases = [Case(2 * tokens - 5, n, k) for n, k in ((4096, 4096), (1000, 2176))]
        for ctas in (66, 5):
            first = [case.run(tokens, ctas) for case in cases]
            for case, y in zip(cases, first, strict=True):
                case.check(y)
            for _ in range(100):
                for case, y in zip(cases, first, strict=True):
                    assert torch.equal(case.run(tokens, ctas), y)
        first = [case.run(tokens, shared=4, parts=4) for case in cases]
        for case, y in zip(cases, first, strict=True):
            case.check(y)
        for _ in range(100):
            for case, y in zip(cases, first, strict=True):
                assert torch.equal(case.run(tokens, shared=4, parts=4), y)

    def test_graphs_run_beside_each_other(self):
        case = Case(64, 2048, 4096)
        expected = case.run(64)
        case.check(expected)
        streams = [torch.cuda.Stream() for _ in range(2)]
        graphs, results = [], []
        for stream in streams:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                results.append([case.run(64) for _ in range(20)])
            graphs.append(graph)
        for _ in range(20):
            for stream, graph in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(y, expected) for found in results for y in found)

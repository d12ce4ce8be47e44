"""CTAs that multiply K in runs, for many tokens: they have the bits of tiles that CTAs share. Without a GPU, and on one."""

import re
from dataclasses import replace

import pytest
import torch
from lq_formats import CompileError, ShapeError
from lq_formats.layouts import FRAGMENT_INT4, FRAGMENT_INT8
from lq_kernels.cuda.prefill_a16 import linear
from lq_kernels.cuda.prefill_cuts import ROWS, RUNS_TOKENS, PrefillConfig, cost
from lq_kernels.cuda.sources import VARIANTS
from lq_kernels.cuda.variant import EPILOGUES
from lq_kernels.gated import interleave_rows
from lq_kernels.jit import compiler

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def in_runs(tokens, parts, m, n, ctas=66, multicast=False, wide=False):
    whole = PrefillConfig(tokens, 0, 2, 0, parts, multicast, wide=wide, rounded=True)
    row_tiles, token_tiles = whole.tiles(m, n)
    return replace(whole, ctas=min(ctas, row_tiles * token_tiles))


def shared(tokens, parts, m, n, multicast=False, wide=False):
    row_tiles, token_tiles = PrefillConfig(tokens, 0, 2, 0, 0, multicast).tiles(m, n)
    tiles = row_tiles * token_tiles
    return PrefillConfig(tokens, parts * tiles, 2, tiles, parts * tiles, multicast, wide=wide, rounded=True)


# ---- without a GPU ----


USUAL = {
    *((0, tokens, "none") for tokens in (64, 96)),
    *((number, 128, "none") for number in (6, 12)),
    (10, 128, "residual"),  # the most registers
    (0, 128, "silu_mul"),
    (6, 64, "transposed"),
}
"""What is compiled in every run of the tests: variant, tokens, epilogue."""


@pytest.mark.nvrtc
@pytest.mark.exhaustive(where=lambda number, tokens, epilogue: (number, tokens, epilogue) not in USUAL)
@pytest.mark.parametrize(
    ("number", "tokens", "epilogue"),
    [
        *(
            (0, tokens, epilogue)
            for tokens in RUNS_TOKENS
            for epilogue in EPILOGUES
            if tokens == 128 or epilogue == "none"
        ),
        *((number, 128, "none") for number in (2, 4, 5, 6, 8, 10, 12)),
        *((number, 128, "residual") for number in (4, 10)),  # the most registers
        *((number, 64, "transposed") for number in (0, 6)),
        *((6, tokens, "silu_mul") for tokens in RUNS_TOKENS),
    ],
)
def test_it_compiles_without_spills_and_without_a_workspace(number, tokens, epilogue, disassemble):
    variant = VARIANTS[number]
    wide = variant.bits == 8 and variant.groups == 0
    config = in_runs(tokens, 4, 1024, 4096, multicast=True, wide=wide)
    defines = (*variant.defines, *config.defines, *EPILOGUES[epilogue])
    result = compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)
    (used,) = result.usage().values()
    assert (used.spills, used.stack) == (0, 0)
    assert used.registers * config.threads >= 128 * 40 + 256 * 232
    assert "C75" not in result.log, "wgmmas are serialized"
    sass = disassemble(result.cubin)
    products = re.findall(rf"HGMMA\.64x{tokens}x16\.F32\S* R\d+, R\d+, gdesc\S+ R\d+(, UP\d)?", sass)
    assert len(products) == (8 if wide else 512 // variant.bits // 16)
    assert [bool(each) for each in products] == [True] + [False] * (len(products) - 1), "the first clears its sums"
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert not re.search(r"\bMEMBAR\.\S*(GPU|SYS)", sass), "sums in the workspace"


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    "macros", [("LQ_TOKENS=256",), ("LQ_TOKENS=32",), ("LQ_TOKENS=64", "LQ_SPLIT=1"), ("LQ_TOKENS=64", "LQ_ROWS=192")]
)
def test_forms_that_the_source_is_not_written_for(macros):
    with pytest.raises(CompileError, match="sums twice in registers"):
        compiler.compile_source(
            compiler.source("prefill_a16"), "sm_90a", "prefill_a16", (*VARIANTS[0].defines, *macros, "LQ_RUNS=1")
        )


def test_a_cut_says_whether_it_has_runs():
    config = in_runs(64, 3, 1024, 4096)
    assert (config.runs, config.shared_tiles) == (3, 0)
    assert config.defines == ("LQ_TOKENS=64", "LQ_RUNS=1")
    for other in (shared(64, 3, 1024, 4096), replace(config, workers=0)):
        assert other.runs == 1
        assert other.defines == ("LQ_TOKENS=64",)
        assert cost(other, 1024, 4096, 4096, 4, 132) > 0


def test_there_are_no_more_runs_than_steps():
    for bits, layout in ((4, FRAGMENT_INT4), (8, FRAGMENT_INT8)):
        k = 1024 // bits
        packed = layout.pack(torch.zeros(128, k, dtype=torch.uint8))
        scale = layout.arrange_scales(torch.ones(128, 1, dtype=BF16), k, k)
        with pytest.raises(ShapeError, match=f"K={k}: 3 runs"):
            linear(torch.zeros(64, k, dtype=BF16), packed, scale, None, None, 128, k, bits, in_runs(64, 3, 64, 128))


# ---- on a GPU ----


def another_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)


class Case:
    """A weight in fragment order, tokens and an epilogue."""

    def __init__(self, m, n, k, bits=4, group=128, x=BF16, scale=BF16, zero="", epilogue="none"):
        rows = 2 * n if epilogue == "silu_mul" else n
        self.m, self.n, self.rows, self.bits, self.group = m, n, rows, bits, k if group == -1 else group
        codes = torch.randint(0, 1 << bits, (rows, k), device="cuda", dtype=torch.uint8)
        groups = -(-k // self.group)
        scales = (torch.rand(rows, groups, device="cuda") * 0.02 + 0.005).to(scale)
        zeros = torch.randint(0, 16, scales.shape, device="cuda").to(scale) if zero == "zeros" else None
        if zero == "minima":
            zeros = -8 * scales * torch.rand(scales.shape, device="cuda").to(scale)
        if epilogue == "silu_mul":
            codes, scales, zeros = (each if each is None else interleave_rows(each) for each in (codes, scales, zeros))
        layout = FRAGMENT_INT4 if bits == 4 else FRAGMENT_INT8
        self.packed, self.scales = layout.pack(codes), layout.arrange_scales(scales, k, self.group)
        self.zeros = None if zeros is None else layout.arrange_scales(zeros, k, self.group)
        self.x = (torch.randn(m, k, device="cuda") / 8).to(x)
        self.bias = torch.randn(rows, device="cuda").to(x)
        self.options = {"minimum": zero == "minima", "transposed": epilogue == "transposed", "gated": rows > n}
        if epilogue == "residual":
            self.options["residual"] = torch.randn(m, n, device="cuda").to(x)

    def run(self, config):
        poison = torch.full((self.m, self.n), torch.nan, device="cuda", dtype=FP32)
        del poison  # what the result will be allocated over
        fixed = (self.packed, self.scales, self.zeros, self.bias, self.n, self.group, self.bits)
        return linear(self.x, *fixed, config=config, **self.options)

    def check(self, tokens, parts, multicast=False, ctas=(66, 1), wide=False):
        """Check that runs have the bits of shared tiles, of their own size and of the smallest."""
        sizes = (parts, self.m, self.rows)
        expected = self.run(shared(16, *sizes, wide=wide))
        assert torch.equal(self.run(shared(tokens, *sizes, multicast, wide)), expected)
        for each in ctas:
            config = in_runs(tokens, *sizes, each, multicast, wide)
            assert torch.equal(self.run(config), expected), (tokens, parts, each)
        return expected


@pytest.mark.gpu
@pytest.mark.skipif("another_gpu()", reason="needs compute capability 9.0")
class TestOnHopper:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("multicast", [False, True])
    @pytest.mark.parametrize("tokens", RUNS_TOKENS)
    def test_runs_have_the_bits_of_shared_tiles(self, tokens, multicast, bits):
        step, group, scale = (128, 128, BF16) if bits == 4 else (64, -1, FP32)
        for m, n, k in (
            (tokens + tokens // 2 + 1, 2 * ROWS + 40, 17 * step),
            (3 * tokens, 4 * ROWS, 16 * step - 24),
            (tokens // 2, 24, 16 * step),  # the second CTA of a pair stores nothing
            (1, 7, 16 * step + 8),
            (tokens + 1, ROWS + 1, 33 * step),
        ):
            case = Case(m, n, k, bits, group if group == -1 or k % group == 0 else -1, scale=scale)
            for parts in (2, 3, 4, 5, 7, 8, 16):
                case.check(tokens, parts, multicast, (66, 2, 1))
                if bits == 8 and parts <= 8:
                    case.check(tokens, parts, multicast, (66, 2, 1), wide=True)

    def test_the_place_of_a_cut_shows(self):
        """What is asked above could fail: sums of one run, of two and of three differ."""
        case = Case(512, 512, 4096)
        results = [case.check(128, parts) for parts in (2, 3)]
        results.append(case.run(replace(in_runs(128, 2, 512, 512), workers=0)))
        for i, y in enumerate(results):
            assert not torch.equal(y, results[i - 1])
            assert (y.double() - results[0].double()).norm() / results[0].double().norm() < 4e-3

    @pytest.mark.parametrize("epilogue", EPILOGUES)
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("tokens", RUNS_TOKENS)
    def test_epilogues(self, tokens, bits, epilogue):
        group, scale = (128, BF16) if bits == 4 else (-1, FP32)
        for m, n in ((tokens + tokens // 2 + 3, 200), (2 * tokens, 2 * ROWS), (tokens // 2 - 1, 100), (tokens, 9)):
            case = Case(m, n, 1152, bits, group, scale=scale, epilogue=epilogue)
            for multicast in (False, True):
                case.check(tokens, 4, multicast)

    @pytest.mark.parametrize("tokens", RUNS_TOKENS)
    @pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
    @pytest.mark.parametrize("zero", ["", "zeros", "minima"])
    @pytest.mark.parametrize(("x", "scale"), [(BF16, BF16), (FP16, FP16), (BF16, FP32)])
    def test_int4(self, tokens, group, zero, x, scale):
        if zero == "minima" and group == -1:
            pytest.skip("minima are in groups")
        for parts in (2, 3):
            Case(200, 264, 768, 4, group, x, scale, zero).check(tokens, parts, True)

    @pytest.mark.parametrize("group", [32, 64, 128])
    def test_int8_in_groups(self, group):
        Case(200, 264, 768, 8, group, scale=FP16).check(128, 5, True)

    def test_what_is_no_number_passes_through(self):
        case = Case(130, 256, 1024)
        case.x[3, 1000], case.x[7, 0] = torch.inf, torch.nan
        sizes = (4, case.m, case.rows)
        y, expected = case.run(in_runs(64, *sizes)), case.run(shared(64, *sizes))
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())
        assert y[7].isnan().all()
        assert not y[8].isnan().any()

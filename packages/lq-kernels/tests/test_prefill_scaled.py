"""Sums of groups that the prefill kernel scales, and not weights: when and how without a GPU, results on one."""

import re
from dataclasses import replace

import pytest
import torch
from cuda_host.cases import Case
from lq_formats import CompileError
from lq_formats.layouts import FRAGMENT_INT4
from lq_kernels import batch_invariant, preshuffled_linear
from lq_kernels.cuda import invariant, prefill_cuts
from lq_kernels.cuda.prefill_a16 import linear
from lq_kernels.cuda.prefill_cuts import TALL, PrefillConfig
from lq_kernels.cuda.variant import EPILOGUES, Variant
from lq_kernels.jit import compiler

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ZEROS = Variant(BF16, BF16, 4, 1, True)
HALVES = Variant(FP16, FP16, 4, 1, False)
PLAIN = Variant(BF16, BF16, 4, 1, False)
TWO_GROUPS = Variant(BF16, FP32, 4, 2, True)


def cut(tokens, ctas=1, shared=0, workers=0, **form):
    return PrefillConfig(tokens, ctas, 2, shared, workers, **form)


FORMS = {
    "16": cut(16),
    "16-teams": cut(16, teams=2),
    "32": cut(32),
    "32-teams": cut(32, teams=2),
    "32-split": cut(32, split=True),
    "64-multicast": cut(64, multicast=True),
}


# ---- without a GPU ----


def test_which_sums_are_scaled():
    assert all(form.scales_sums(ZEROS) for form in FORMS.values())
    assert [name for name, form in FORMS.items() if not form.scales_sums(HALVES)] == ["64-multicast"]
    assert {name for name, form in FORMS.items() if form.scales_sums(TWO_GROUPS)} == {"16", "16-teams", "32-teams"}
    others = [cut(64), cut(64, split=True), cut(64, multicast=True, rows=TALL), cut(96, multicast=True), cut(128)]
    assert not any(form.scales_sums(ZEROS) for form in others)
    for variant in (
        PLAIN,
        Variant(BF16, BF16, 4, 4, True),  # four groups
        Variant(BF16, BF16, 4, 0, True),  # one scale a row: sums are scaled once, whatever the tile
        Variant(FP16, FP16, 4, 1, True, minimum=True),
        Variant(FP16, FP32, 8, 1, False),
    ):
        assert not any(form.scales_sums(variant) for form in FORMS.values())


def test_the_batch_invariant_mode_rounds_weights_in_tiles_of_all_sizes():
    n, k, scale_bytes = 4096, 4096, ZEROS.scale_bytes
    for m in (1, 16, 17, 32, 33, 64, 100, 128, 512, 4096):
        config = invariant.prefill_config(m, n, k, 4, scale_bytes, 132)
        assert not config.scales_sums(ZEROS)
        assert not config.scales_sums(HALVES)
    for form in invariant.forms(n, k, 4, scale_bytes, 132):
        assert "LQ_SCALED=1" not in form.macros(ZEROS)
    assert any("LQ_SCALED=1" in form.macros(ZEROS) for form in prefill_cuts.forms(n, k, 4, scale_bytes, 132))


@pytest.mark.nvrtc
@pytest.mark.exhaustive(where=lambda name, variant: (name, variant) not in {("32", ZEROS), ("16-teams", HALVES)})
@pytest.mark.parametrize("variant", [ZEROS, HALVES, TWO_GROUPS], ids=["zeros", "fp16", "two-groups"])
@pytest.mark.parametrize("name", FORMS)
def test_a_code_is_one_operation_and_a_sum_one_for_its_group(name, variant, disassemble):
    form = FORMS[name]
    if not form.scales_sums(variant):
        pytest.skip("weights are rounded")
    results = {
        scaled: compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)
        for scaled, defines in ((True, form.macros(variant)), (False, (*variant.defines, *form.defines)))
    }
    counts = {}
    for scaled, result in results.items():
        (used,) = result.usage().values()
        assert (used.spills, used.stack) == (0, 0)
        assert "C75" not in result.log
        sass = disassemble(result.cubin)
        products = re.findall(rf"HGMMA\.64x{form.tokens}x16\.F32\S* R\d+, R\d+, gdesc", sass)
        assert len(products) == 8
        loop = sass.split("HGMMA", 1)[1].rsplit("HGMMA", 1)[0]
        counts[scaled] = (len(re.findall(r"\bH(?:FMA2|ADD2|MUL2)\b", loop)), len(re.findall(r"\bFFMA\b", sass)))
    # Of 64 codes, in pairs, those of the first products are made before them.
    assert counts[True][0] <= 32 + 8
    assert counts[False][0] >= counts[True][0] + 16
    # A thread's sums: before the first products of each group of a step, and at the end of a tile.
    assert counts[True][1] - counts[False][1] == (variant.groups + 1) * form.tokens // 2


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    "defines",
    [
        (*ZEROS.defines, "LQ_TOKENS=96", "LQ_SCALED=1"),
        (*Variant(BF16, BF16, 4, 0, True).defines, "LQ_TOKENS=16", "LQ_SCALED=1"),
        (*Variant(BF16, FP32, 8, 0, False).defines, "LQ_TOKENS=16", "LQ_SCALED=1"),
    ],
    ids=["many", "rows", "int8"],
)
def test_forms_that_the_source_is_not_written_for(defines):
    with pytest.raises(CompileError, match="sums of groups of int4 are scaled, of few tokens"):
        compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)


# ---- on a GPU ----


def another_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)


def cuts(form, m, rows, steps):
    """Yield cuts of one CTA, or pair, of several, and of such as share tiles."""
    row_tiles, token_tiles = form.tiles(m, rows)
    tiles = row_tiles * token_tiles
    shares = ((tiles, 2), (tiles, 3)) if form.split else ((1, 2), (tiles, 3), (tiles, steps))
    for ctas in {1, 2, tiles}:
        yield cut(form.tokens, ctas, multicast=form.multicast, split=form.split, teams=form.teams)
    for shared, parts in shares:
        workers = shared * parts
        if (2 if form.split else 1) * parts <= steps and workers <= 64:
            ctas = max(workers, tiles - shared)
            yield cut(form.tokens, ctas, shared, workers, multicast=form.multicast, split=form.split, teams=form.teams)


@pytest.mark.gpu
@pytest.mark.skipif("another_gpu()", reason="needs compute capability 9.0")
class TestOnHopper:
    @pytest.mark.parametrize("epilogue", EPILOGUES)
    @pytest.mark.parametrize("name", FORMS)
    def test_every_tile(self, name, epilogue):
        form = FORMS[name]
        for steps in (2, 3, 13, 32):
            for m, n in ((form.tokens + 5, 300), (1, 7), (2 * form.tokens, 256)):
                options = {"zero": "zeros", "epilogue": epilogue, "bias": epilogue != "transposed"}
                case = Case.of_prefill(form, m, n, 128 * steps - 24, **options).cuda()
                for config in cuts(form, m, 16 * case.blocks, steps):
                    assert config.scales_sums(case.variant)
                    y = case.run_over_nan(linear, config)
                    case.check(y)
                    assert torch.equal(case.run_over_nan(linear, config), y)

    @pytest.mark.parametrize("name", FORMS)
    @pytest.mark.parametrize("group", [64, 128, 256, 384])
    @pytest.mark.parametrize("zero", ["", "zeros"])
    @pytest.mark.parametrize(("x", "scale"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, BF16)])
    def test_weights(self, name, group, zero, x, scale):
        form = FORMS[name]
        options = {"group": group, "x": x, "scale": scale, "zero": zero}
        case = Case.of_prefill(form, 2 * form.tokens - 3, 392, 2304, **options).cuda()
        for config in cuts(form, 2 * form.tokens - 3, 400, 18):
            case.check(case.run_over_nan(linear, config))

    @pytest.mark.parametrize("name", FORMS)
    def test_nothing_is_rounded_but_the_result(self, name):
        """Where weights are rounded the same sums are farther from the product of weights as they are."""
        form = FORMS[name]
        case = Case(form.tokens, 1000, 4096, zero="zeros").cuda()
        config = replace(form, ctas=4)
        scaled, rounded = (
            case.run_over_nan(linear, each).double() - case.exact for each in (config, replace(config, rounded=True))
        )
        assert scaled.norm() < 0.8 * rounded.norm()

    @pytest.mark.parametrize("name", FORMS)
    def test_equal_bits_a_thousand_times(self, name):
        form = FORMS[name]
        case = Case.of_prefill(form, form.tokens, 1000, 4096, zero="zeros").cuda()
        for config in list(cuts(form, form.tokens, 1008, 32))[-2:]:
            first = case.run_over_nan(linear, config)
            case.check(first)
            for _ in range(500):
                assert torch.equal(case.run(linear, config), first)

    @pytest.mark.parametrize("name", FORMS)
    def test_what_is_no_number_stays_in_its_token(self, name):
        form = FORMS[name]
        case = Case.of_prefill(form, 16, 300, 1000, zero="zeros", bias=False).cuda()
        case.x[3, 700], case.x[5, 0], case.x[7, 999] = torch.nan, torch.inf, -torch.inf
        bad = torch.tensor([3, 5, 7], device="cuda")
        for config in cuts(form, 16, 304, 8):
            y = case.run_over_nan(linear, config)
            assert not y[bad].isfinite().any()
            good = torch.ones(16, dtype=torch.bool, device="cuda").index_fill(0, bad, False)
            assert y[good].isfinite().all()

    @pytest.mark.parametrize("x", [BF16, FP16])
    @pytest.mark.parametrize("zero", [False, True])
    @pytest.mark.parametrize("group", [64, 128])
    def test_the_batch_invariant_mode_has_the_same_bits_for_any_number_of_tokens(self, group, zero, x):
        n, k = 1000, 2048
        packed = torch.randint(-(2**31), 2**31 - 1, FRAGMENT_INT4.packed_shape(n, k), device="cuda", dtype=torch.int32)
        shape = FRAGMENT_INT4.scale_shape(n, k, group)
        scale = (torch.rand(shape, device="cuda") * 0.02 + 0.005).to(x)
        zeros = torch.randint(0, 16, shape, device="cuda").to(x) if zero else None
        tokens = torch.randn(300, k, device="cuda").to(x)
        with batch_invariant():
            sizes = {"bits": 4, "group_size": group, "out_features": n}
            results = {
                m: preshuffled_linear(tokens[:m], packed, scale, zeros, **sizes) for m in (1, 9, 16, 24, 60, 300)
            }
        for m, y in results.items():
            assert torch.equal(y, results[300][:m]), m

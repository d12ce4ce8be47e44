"""Two teams of warpgroups that take K steps by turns in the prefill kernel: cuts and code without a GPU, results on one."""

import math
import re

import pytest
import torch
from cuda_host.cases import Case
from lq_formats import CompileError
from lq_formats.layouts import FRAGMENT_INT4
from lq_kernels.cuda import invariant
from lq_kernels.cuda.prefill_a16 import linear
from lq_kernels.cuda.prefill_cuts import (
    ROWS,
    TEAM_TOKENS,
    PrefillConfig,
    candidates,
    cost,
    forms,
    prefill_config,
    ring_of,
)
from lq_kernels.cuda.sources import VARIANTS
from lq_kernels.cuda.variant import EPILOGUES
from lq_kernels.jit import compiler

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = 132
INT4 = [number for number, variant in enumerate(VARIANTS) if variant.bits == 4]


def teams(tokens, ctas, raster=3, shared=0, workers=0):
    """Return a cut of two teams."""
    return PrefillConfig(tokens, ctas, raster, shared, workers, teams=2)


# ---- without a GPU ----


USUAL = {*((number, 32, "none") for number in (0, 2, 4, 10)), (0, 16, "none"), (1, 16, "none"), (0, 32, "residual")}
"""What is compiled in every run of the tests: variant, tokens, epilogue."""


@pytest.mark.nvrtc
@pytest.mark.exhaustive(where=lambda number, tokens, epilogue: (number, tokens, epilogue) not in USUAL)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("tokens", TEAM_TOKENS)
@pytest.mark.parametrize("number", INT4)
def test_it_compiles_without_spills_and_with_registers_for_all(number, tokens, epilogue, disassemble):
    defines = (*teams(tokens, 1).macros(VARIANTS[number]), *EPILOGUES[epilogue])
    result = compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)
    (used,) = result.usage().values()
    assert (used.spills, used.stack) == (0, 0)
    assert "C75" not in result.log
    sass = disassemble(result.cubin)
    fewer, more = sorted(int(count, 16) for count in re.findall(r"USETMAXREG\S*(?: UP\d,)? (0x[0-9a-f]+)", sass))
    threads = teams(tokens, 1).threads
    assert threads == 640
    assert used.registers * threads >= 128 * fewer + 512 * more  # or a warpgroup would wait forever
    assert len(re.findall(rf"HGMMA\.64x{tokens}x16\.F32\S* R\d+, R\d+, gdesc", sass)) == 8
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    "macros",
    [
        ("LQ_TOKENS=64",),
        ("LQ_TOKENS=32", "LQ_SPLIT=1"),
        ("LQ_TOKENS=32", "LQ_ROWS=192"),
        ("LQ_TOKENS=64", "LQ_RUNS=1"),
    ],
)
def test_there_are_registers_for_few_tokens_alone(macros):
    defines = (*VARIANTS[0].defines, *macros, "LQ_TEAMS=2")
    with pytest.raises(CompileError, match="two teams have registers for few tokens"):
        compiler.compile_source(compiler.source("prefill_a16"), "sm_90a", "prefill_a16", defines)


def test_a_stage_is_always_the_same_teams():
    """In a ring of an odd number it would not be, and a team might take a stage for what it was two rounds before."""
    for tokens in TEAM_TOKENS:
        for scale_bytes in (0, 32, 64, 128, 256, 512):
            stages, shared = ring_of(teams(tokens, 1), 4, scale_bytes)
            assert stages % 2 == 0
            assert 8 <= stages <= 12
            assert shared <= 232448
            # Sums of all rows and tokens in 32 bits, beside the ring and what one team has.
            alone = ring_of(PrefillConfig(tokens, 1, 1, 0, 0), 4, scale_bytes)
            stage = tokens * 256 + 8 * (1024 + scale_bytes)
            assert shared - stages * stage == alone[1] - alone[0] * stage + tokens * ROWS * 4 + 2 * 8 * 8


@pytest.mark.parametrize(
    ("n", "k", "sizes"),
    [
        (14336, 4096, {16, 32}),
        (28672, 4096, {16, 32}),
        (57344, 8192, {16, 32}),
        (10240, 8192, {16, 32}),
        (8192, 8192, {16}),
        (8192, 28672, {16, 32}),
        (16384, 2048, set()),
        (4096, 14336, {16}),
        (4096, 4096, set()),
        (2048, 8192, set()),
        (1024, 8192, set()),
        (8, 8, set()),
    ],
)
def test_they_are_compiled_where_they_pay(n, k, sizes):
    weight = (n, k, 4, 32, H200)
    known = {cut.defines: cut for cut in forms(*weight)}
    found = {defines: cut for defines, cut in known.items() if cut.teams > 1}
    assert {cut.tokens for cut in found.values()} == sizes
    assert all("LQ_TEAMS=2" in defines for defines in found)
    asked = {cut.defines for m in (*range(1, 130), 200, 1000) for cut in candidates(m, *weight)}
    assert asked <= known.keys()
    for tokens in sizes:
        best = prefill_config(tokens, *weight)
        assert (best.tokens, best.teams) == (tokens, 2)
        usual = min(cost(cut, tokens, n, k, 4, H200) for cut in candidates(tokens, *weight) if cut.teams == 1)
        assert cost(best, tokens, n, k, 4, H200) < 0.986 * usual
    for m in (65, 128, 4096):
        assert not any(cut.teams > 1 for cut in candidates(m, *weight))


def test_other_weights_and_the_batch_invariant_mode_have_none():
    assert not any(cut.teams > 1 for cut in forms(57344, 8192, 8, 0, H200))
    sizes = (57344, 8192, 4, 32, H200)
    assert not any(cut.teams > 1 for cut in invariant.forms(*sizes))
    for m in (1, 16, 17, 32, 64):
        assert any(cut.teams > 1 for cut in candidates(m, *sizes))
        assert invariant.prefill_config(m, *sizes).teams == 1


# ---- on a GPU ----


def another_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)


def cuts(tokens, m, rows, steps):
    """Yield cuts of one CTA that has all tiles, of a few and of many; then of such as share some tiles, or all."""
    tiles = -(-rows // ROWS) * -(-m // tokens)
    for ctas in {1, min(3, tiles), tiles}:
        yield teams(tokens, ctas)
    for shared in {1, tiles}:
        for workers in {shared * parts for parts in (2, 3, steps)} | {min(shared * steps, 2 * shared + 1)}:
            if shared < workers <= min(shared * steps, H200):
                yield teams(tokens, max(workers, min(tiles - shared, H200)), 2, shared, workers)


@pytest.mark.gpu
@pytest.mark.skipif("another_gpu()", reason="needs compute capability 9.0")
class TestOnHopper:
    @pytest.mark.parametrize("epilogue", EPILOGUES)
    @pytest.mark.parametrize("tokens", TEAM_TOKENS)
    def test_every_tile(self, tokens, epilogue):
        # One step, which is one team's; as many for both; one more; more than the ring has; a last one that is not full.
        for steps in (1, 2, 3, 13, 32):
            for m, n in ((tokens + 5, 2 * ROWS + 40), (3 * tokens, 3 * ROWS), (1, 7), (tokens - 1, ROWS + 1)):
                case = Case(
                    m, n, 128 * steps - 24, group=-1 if steps == 1 else 128, epilogue=epilogue, rounded=True
                ).cuda()
                for config in cuts(tokens, m, 16 * case.blocks, steps):
                    y = case.run_over_nan(linear, config)
                    case.check(y)
                    assert torch.equal(case.run_over_nan(linear, config), y)

    @pytest.mark.parametrize("tokens", TEAM_TOKENS)
    @pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
    @pytest.mark.parametrize("zero", ["", "zeros", "minima"])
    @pytest.mark.parametrize(("x", "scale"), [(BF16, BF16), (FP16, FP16), (BF16, FP32)])
    def test_weights(self, tokens, group, zero, x, scale):
        if zero == "minima" and group == -1:
            pytest.skip("minima are of groups")
        options = {"group": group, "x": x, "scale": scale, "zero": zero}
        case = Case.of_prefill(teams(tokens, 1), 2 * tokens - 3, 392, 2304, **options).cuda()
        for config in (teams(tokens, 2), teams(tokens, 8), teams(tokens, 16, 3, 8, 16), teams(tokens, 7, 3, 2, 7)):
            case.check(case.run_over_nan(linear, config))

    @pytest.mark.parametrize("tokens", TEAM_TOKENS)
    def test_equal_bits_a_thousand_times(self, tokens):
        """By turns with other numbers, so that a stage, or sums, of another tile or launch would show."""
        cases = [Case(tokens, n, k, rounded=True).cuda() for n, k in ((4096, 2048), (1000, 2176))]
        for ctas in (132, 5):
            configs = [teams(tokens, min(ctas, math.prod(teams(tokens, 1).tiles(tokens, case.n)))) for case in cases]
            first = [case.run_over_nan(linear, config) for case, config in zip(cases, configs, strict=True)]
            for case, y in zip(cases, first, strict=True):
                case.check(y)
            for _ in range(500):
                for case, config, y in zip(cases, configs, first, strict=True):
                    assert torch.equal(case.run(linear, config), y)

    def test_tiles_from_memory_have_equal_bits(self):
        """Weights that are not in L2 arrive late and in any order."""
        n, k = 28672, 4096
        packed = torch.randint(-(2**31), 2**31 - 1, FRAGMENT_INT4.packed_shape(n, k), device="cuda", dtype=torch.int32)
        scale = (torch.rand(FRAGMENT_INT4.scale_shape(n, k, 128), device="cuda") * 0.02 + 0.005).bfloat16()
        x = torch.randn(32, k, device="cuda").bfloat16()
        for tokens in TEAM_TOKENS:
            for config in (teams(tokens, 132), teams(tokens, 132, 3, 224, 132), teams(tokens, 132, 3, 92, 132)):
                first = linear(x, packed, scale, None, None, n, 128, 4, config)
                assert torch.isfinite(first).all()
                for _ in range(100):
                    assert torch.equal(linear(x, packed, scale, None, None, n, 128, 4, config), first)

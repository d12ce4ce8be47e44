"""The Hopper kernels compile without a GPU to what they should: no spills, warpgroup products from registers, bulk copies."""

import itertools
import re
from dataclasses import asdict, replace

import pytest
import torch
from lq_formats import CompileError
from lq_kernels.cuda import decode_cuts
from lq_kernels.cuda.decode_a16 import q8_1_defines
from lq_kernels.cuda.decode_cuts import Form, alone, beside_next, candidates, cost, cut, forms, sum_bytes
from lq_kernels.cuda.quantize_q8_1 import FRAGMENT_KERNELS
from lq_kernels.cuda.sources import VARIANTS
from lq_kernels.cuda.variant import EPILOGUES, Scales, Variant
from lq_kernels.jit import compiler

PLAIN = Scales(1, False, False, 32)
"""Symmetric groups of 128, bf16."""
Q4_0 = Scales(4, False, False, 128)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OF_Q8_1 = [
    (form, m, dtype)
    for form in forms(Q4_0, q8_1=True)
    for m in ((1,) if form.quantizes else (1, 8) if form.token_tiles == 1 else (16,))
    for dtype in (DTYPES if form.quantizes else DTYPES[:1])
]
"""What is compiled for tokens that are quantized like Q8_1 blocks."""
IDS = ["-".join(define.split("=")[1] for define in variant.defines) for variant in VARIANTS]
FORMS = [(number, form) for number, variant in enumerate(VARIANTS) for form in range(len(forms(variant.scales)))]


def build(name, defines, arch="sm_90a"):
    return compiler.compile_source(compiler.source(name), arch, name, defines)


@pytest.mark.nvrtc
@pytest.mark.exhaustive(where=lambda number, form: form != number % len(forms(VARIANTS[number].scales)))
@pytest.mark.parametrize(("number", "form"), FORMS, ids=[f"{IDS[number]}-{form}" for number, form in FORMS])
def test_decode_compiles_without_spills(disassemble, number, form):
    variant, form = VARIANTS[number], forms(VARIANTS[number].scales)[form]
    result = build("decode_a16", (*variant.defines, *form.defines))
    (used,) = result.usage().values()
    assert (used.spills, used.stack) == (0, 0)
    assert used.registers <= 65536 // (10 * 32 * form.ctas) // 8 * 8  # ten warps a CTA
    sass = disassemble(result.cubin)
    assert re.search(r"\bHMMA\.16816\.F32", sass)
    assert re.search(r"\bUBLKCP\b", sass)
    assert re.search(r"\bACQBULK\b", sass)  # griddepcontrol.wait
    assert not re.search(r"\bI2FP?\.(F32|F16|BF16)\.S(8|16|32)\b", sass)


@pytest.mark.nvrtc
@pytest.mark.exhaustive(where=lambda number, epilogue: (number // 2 + (epilogue == "residual")) % 3)
@pytest.mark.parametrize("name", ["decode_a16", "prefill_a16"])
@pytest.mark.parametrize("epilogue", ["residual", "silu_mul"])
@pytest.mark.parametrize("number", range(0, len(VARIANTS), 2), ids=lambda number: IDS[number])
def test_epilogues_compile_without_spills(number, epilogue, name):
    variant = VARIANTS[number]
    form = forms(variant.scales)[2 if epilogue == "residual" else -1]
    size = form.defines if name == "decode_a16" else ("LQ_TOKENS=256",)
    result = build(name, (*variant.defines, *size, *EPILOGUES[epilogue]))
    (used,) = result.usage().values()
    assert (used.spills, used.stack) == (0, 0)
    assert used.registers <= 168
    assert "C75" not in result.log


@pytest.mark.nvrtc
@pytest.mark.exhaustive(
    where=lambda form, m, dtype: dtype != torch.bfloat16 or (form.streamed and form.warp_blocks == 1)
)
@pytest.mark.parametrize(("form", "m", "dtype"), OF_Q8_1)
def test_decode_of_q8_1_multiplies_integers_without_spills(disassemble, form, m, dtype):
    q4_0 = Variant.of(torch.bfloat16, torch.float16, 4, 32, 4096, False)
    result = build(
        "decode_a16", (*q4_0.defines, *form.defines, *EPILOGUES["transposed"], *q8_1_defines(form, m, dtype))
    )
    (used,) = result.usage().values()
    assert (used.spills, used.stack) == (0, 0)
    assert used.registers <= 65536 // (10 * 32 * form.ctas) // 8 * 8
    sass = disassemble(result.cubin)
    assert (
        len(re.findall(r"\bIMMA\.16832\.S8\.S8\b", sass)) == 8 * form.token_tiles
    )  # two steps, or blocks, of four groups
    assert not re.search(r"\bHMMA\b|\bI2FP?\b", sass)
    # Of sums to be scaled half are another token's where there are few, and another column of the same.
    loop = sass[sass.index("IMMA") : sass.rindex("IMMA")]
    assert len(re.findall(r"\bFFMA\b", loop)) < (40 if m <= 4 else 64 * form.token_tiles)
    assert not re.search(r"\bMOV\b.*0x4b400000|\bIMAD\.MOV.*0x4b400000", loop)  # the magic number stays in registers


@pytest.mark.nvrtc
def test_int8_tokens_are_for_symmetric_int4_in_groups_of_32():
    with pytest.raises(CompileError, match="int8 tokens: symmetric int4 in groups of 32"):
        build("decode_a16", (*VARIANTS[0].defines, "LQ_TILES=1", *EPILOGUES["transposed"], "LQ_TOKENS_INT8=1"))
    q4_0 = Variant.of(torch.bfloat16, torch.float16, 4, 32, 4096, False)
    with pytest.raises(CompileError, match="few tokens: a tile of int8"):
        build("decode_a16", (*q4_0.defines, "LQ_TILES=1", *EPILOGUES["transposed"], "LQ_FEW=1"))


@pytest.mark.nvrtc
def test_fragments_of_q8_1_compile_without_spills(disassemble):
    result = build("fragment_q8_1", ())
    assert set(result.usage()) == set(FRAGMENT_KERNELS.values())
    assert all((used.spills, used.stack) == (0, 0) for used in result.usage().values())


@pytest.mark.nvrtc
def test_one_epilogue_at_a_time():
    for one, other in itertools.combinations(("transposed", "residual", "silu_mul"), 2):
        defines = (*VARIANTS[0].defines, "LQ_TILES=1", *EPILOGUES[one], *EPILOGUES[other])
        with pytest.raises(CompileError, match="one epilogue"):
            build("decode_a16", defines)


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("number", [0, 4, 6, -4, -1], ids=lambda number: IDS[number])
def test_the_dequantizer_compiles_for_any_gpu(number, arch):
    defines = tuple(define.replace("LQ_X=", "LQ_OUT=") for define in VARIANTS[number].defines)
    (used,) = build("dequantize_fragment", defines, arch).usage().values()
    assert used.spills == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (14336, 4096), (4096, 14336), (512, 2048), (16, 8), (28672, 8192)])
@pytest.mark.parametrize("m", [1, 5, 8, 16, 31, 32, 33, 512])
def test_every_decode_cut_covers_the_product_and_fits(m, n, k, bits):
    blocks = -(-n // 16)
    cuts = list(candidates(m, blocks, k, bits, PLAIN, 132))
    if not cuts:
        assert m * k > 300_000  # tokens that do not fit
        return
    config = min(cuts, key=lambda config: cost(config, m, blocks, k, bits, 132))
    assert config.cluster in (1, 2, 4, 8)
    assert config.slots in (1, 2, 4, 8, 16)[config.warp_blocks - 1 : 3 + config.warp_blocks]
    assert 1 <= config.stages <= 16
    assert config.clusters <= blocks
    assert config.cluster <= -(-k // (512 // bits))
    assert config.shared <= 232448
    assert config.pitch % 128 == 16 or k % 64  # rows of x fall into different banks
    if config.boxes == 1:
        assert -(-blocks // config.clusters) <= config.slots


@pytest.mark.parametrize("m", [1, 7, 16, 40])
@pytest.mark.parametrize("scales", [PLAIN, Scales(4, True, True, 256)])
def test_cuts_alike_are_all_cuts_with_these_fields(m, scales):
    sizes = (m, 256, 4096, 4, scales, 132)
    # Cuts that take more shared memory than they need are not found again by their fields, but by the room that was measured.
    taken = {76800 + 1024, 115712 + 1024}
    every = [config for config in candidates(*sizes) if config.shared not in taken]
    assert any(config.shared in taken for config in candidates(*sizes))
    for config in every:
        same = [
            each for each in every if all(getattr(each, name) == getattr(config, name) for name in decode_cuts.SAME)
        ]
        assert list(candidates(*sizes, asdict(config))) == same
    assert list(candidates(*sizes, asdict(replace(every[0], stages=17)))) == []
    assert list(candidates(*sizes, {"cluster": 1})) == []


def test_sums_of_tokens_have_room():
    without, with_sums = (cut(5, 256, 4096, 4, 64, Form(1, 1, 2), 2, 66, 232448, sums) for sums in (0, 4))
    assert with_sums.shared - without.shared == 16 * 8 * 4  # 16 K steps of a CTA, 8 tokens, a float
    assert replace(with_sums, shared=without.shared) == without
    assert sum_bytes(Scales(1, True, True, 128)) == 4
    assert sum_bytes(Scales(4, True, True, 256)) == 16
    assert sum_bytes(Scales(0, True, True, 0)) == 4
    assert sum_bytes(Scales(4, True, False, 256)) == 0


def test_zeros_of_x_s_dtype_need_no_sums():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for x, scale, zero, minimum, sums in (
        (bf16, bf16, True, False, False),
        (fp16, fp16, True, False, False),
        (bf16, bf16, False, False, False),
        (bf16, fp16, True, False, True),
        (fp16, fp32, True, False, True),
        (fp16, fp16, True, True, True),
    ):
        assert Variant.of(x, scale, 4, 128, 4096, zero, minimum).scales.sums == sums


def test_tokens_that_are_added_up_are_not_streamed():
    for groups, size in itertools.product((0, 1, 2, 4), (32, 128, 256)):
        assert not any(form.streamed for form in forms(Scales(groups, True, True, size)))
        streamed = [form for form in forms(Scales(groups, True, False, size)) if form.streamed]
        kept = {form for form in forms(Scales(groups, True, False, size)) if not form.streamed}
        assert {form._replace(streamed=False) for form in streamed if form.warp_blocks == 1} == kept


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16, 33])
def test_a_streamed_cut_has_a_room_for_x_in_every_stage(m, bits):
    step = 512 // bits
    for form in (form for form in forms(PLAIN) if form.streamed):
        kept, here = form._replace(streamed=False), min(m, 8 * form.token_tiles)
        for blocks, k, clusters in ((256, 14336, 64), (256, 4096, 15), (9, 1280, 1), (40, 4096, 8)):
            sizes = (m, blocks, k, bits, 32)
            found = cut(*sizes, form, 2, clusters, 232448)
            rows = -(-blocks // clusters)
            if rows > 16 * form.warp_blocks:
                assert found is None  # three passes
                continue
            passes = -(-rows // found.slots)
            assert found.boxes == passes <= 2
            few, more, last = found.shares(blocks)
            assert clusters * few + more == blocks
            assert {1 << (last & 0xFF), 1 << (last >> 8)} == {found.slots}  # every pass has as many
            assert found.pitch == 16 // found.slots * step * 2 + 16
            x_bytes = -(-here * found.pitch // 128) * 128
            fewer = cut(*sizes, form, 2, clusters, found.shared, most_stages=2)
            assert found.shared - fewer.shared == (found.stages - fewer.stages) * (16 * (1024 + 32) + x_bytes)
            # K that is no multiple of a step has numbers that nobody would bring, and x in one piece has not.
            assert cut(m, blocks, k + 8, bits, 32, form, 2, clusters, 232448) is None
            assert cut(m, blocks, 1288, bits, 32, kept, 2, clusters, 232448) is not None


@pytest.mark.parametrize("warp_blocks", [1, 2])
@pytest.mark.parametrize("share", [1, 14, 32, 112])
def test_passes_cover_the_rows_and_leave_few_slots_empty(warp_blocks, share):
    for rows in range(1, 130):
        slots = decode_cuts._slots(rows, share, warp_blocks)
        passes, places = decode_cuts._passes(rows, slots, warp_blocks)
        assert (passes - 1) * slots < rows <= places <= passes * slots
        last = places - (passes - 1) * slots
        assert last in (1, 2, 4, 8, 16)
        assert last == warp_blocks or rows - (passes - 1) * slots > last / 2
        stages = decode_cuts._stage_count(rows, share, slots, warp_blocks, False)
        assert stages * 16 >= places * share > (stages - passes) * 16
    assert decode_cuts._slots(17, 32, 2) == 16  # 16 and 2, not three times 8
    assert decode_cuts._passes(17, 16, 2) == (2, 18)


@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 17, 40])
def test_no_two_ctas_share_a_multiprocessor_where_each_can_have_its_own(m):
    seen = set()
    for config in candidates(m, 256, 14336, 4, Q4_0, 132):
        launched = alone(config, m, 132)
        assert replace(launched, shared=config.shared) == config
        # 66 pairs, 30 fours and 15 eights run at once with a CTA a multiprocessor.
        at_once = {1: 132, 2: 66, 4: 30, 8: 15}[config.cluster]
        single = config.clusters * -(-m // (8 * config.token_tiles)) <= at_once
        # A multiprocessor has 228 KB, of which a CTA takes a KB more than it asks for.
        assert (2 * (launched.shared + 1024) > 228 << 10) or not single
        assert launched.shared == config.shared or (single and launched.shared <= 232448)
        seen.add((single, launched.shared == config.shared))
    assert (False, True) in seen
    assert ((True, False) in seen) == (m <= 16)  # tokens that need no more than half of it


@pytest.mark.parametrize("m", [1, 8, 16])
def test_one_more_cta_fits_a_multiprocessor_where_each_has_one(m):
    seen = set()
    for config in candidates(m, 128, 2048, 4, PLAIN, 132):
        launched = beside_next(config, m, 132)
        assert replace(launched, shared=config.shared) == config
        single = config.clusters * -(-m // (8 * config.token_tiles)) <= {1: 132, 2: 66, 4: 30, 8: 15}[config.cluster]
        assert (3 * (launched.shared + 1024) > 228 << 10) or not single
        assert launched.shared == config.shared or (single and 2 * (launched.shared + 1024) <= 228 << 10)
        seen.add((single, launched.shared == config.shared))
    assert {(True, False), (True, True)} <= seen


def test_a_cut_that_does_not_fit_is_none():
    assert cut(32, 256, 14336, 4, 32, Form(2, 1, 1), 1, 132, 232448) is None
    assert cut(1, 4, 4096, 4, 32, Form(1, 1, 3), 1, 8, 232448) is None

"""Compiling ahead: at every number of tokens, what is launched was among what was compiled."""

import pytest
import torch
from lq_formats import CompileError, QuantSpec, SpecError
from lq_formats.layouts import FRAGMENT_A8_FP8, FRAGMENT_INT4, FRAGMENT_INT8
from lq_kernels import Arch, Problem, select
from lq_kernels.cuda import constraints, decode_a16, linear_a8, prefill_a16, quantize_q8_1, quantize_tokens
from lq_kernels.cuda.sources import SOURCES
from lq_kernels.prepare import Unit, compile_units, into_cache, representatives, units
from lq_kernels.tuned import lookup

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H200 = Arch("cuda", (9, 0), "NVIDIA H200", 132)
EVERY_M = (*range(1, 400), *range(400, 8193, 13))


@pytest.fixture
def launches(monkeypatch):
    """What the launchers ask for, (source, kernel, macros), on an H200 that is not there; nothing runs."""
    asked = set()

    def launched(index, name, kernel, *args, defines=(), **options):
        asked.add((name, kernel, defines))
        return lambda *pointers: None

    def launch(name, kernel, *args, defines=(), **options):
        asked.add((name, kernel, defines))

    empty = torch.empty(0)
    for module in (decode_a16, prefill_a16, linear_a8, quantize_q8_1, quantize_tokens):
        for name, fake in (("Launch", launched), ("launch", launch)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fake)
        if hasattr(module, "tensor_map"):
            monkeypatch.setattr(module, "tensor_map", lambda *args: None)
        if hasattr(module, "workspace"):
            monkeypatch.setattr(module, "workspace", lambda *args: _Workspace(empty, empty))
    monkeypatch.setattr(Arch, "of", staticmethod(lambda device: H200))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    monkeypatch.setattr(constraints, "why_not_compile", lambda: None)
    lookup.forget()
    yield asked
    lookup.forget()


class _Workspace(tuple):
    def __new__(cls, partials, counters):
        return super().__new__(cls, (partials, counters))

    partials = property(lambda self: self[0])
    counters = property(lambda self: self[1])


def compiled(problem, **options):
    return {
        (unit.source, kernel, unit.defines)
        for unit in units(problem, **options)
        for kernel in unit.kernels or (unit.source,)
    }


def fragment(bits, n, k, group_size, scale, zero):
    """A weight in fragment order that holds nothing: launchers look at its sizes."""
    layout = FRAGMENT_INT4 if bits == 4 else FRAGMENT_INT8
    shape = layout.packed_shape(n, k)
    scales = torch.empty(layout.scale_shape(n, k, group_size), dtype=scale)
    return torch.empty(shape, dtype=torch.int32), scales, torch.empty_like(scales) if zero else None


FORMS = {
    "int4-g128": (QuantSpec(4, "group", 128, True, BF16), BF16, 4096, 4096),
    "int4-g32-asym-fp32": (QuantSpec(4, "group", 32, False, FP32), BF16, 1024, 4096),
    "int4-g64-fp16": (QuantSpec(4, "group", 64, True, FP16), FP16, 14336, 512),
    "int4-row": (QuantSpec(4, "row", None, True, BF16), BF16, 100, 16384),
    "int8-row": (QuantSpec(8, "row", None, True, FP32), BF16, 2048, 2048),
    "int8-g32": (QuantSpec(8, "group", 32, True, FP16), FP16, 2048, 4128),
    "minima": (QuantSpec(4, "group", 32, False, FP16), BF16, 4096, 2048),
}


@pytest.mark.parametrize("form", FORMS)
def test_no_number_of_tokens_asks_for_what_was_not_compiled(form, launches):
    spec, dtype, n, k = FORMS[form]
    size = k if spec.group_size is None else spec.group_size
    packed, scale, zero = fragment(spec.bits, n, k, size, spec.scale_dtype, not spec.symmetric)
    op = "preshuffled_minima" if form == "minima" else "preshuffled"
    problem = Problem(op, 1, n, k, spec, dtype, H200)
    ready = compiled(problem)
    x = torch.empty(8192, k, dtype=dtype)
    # Every number of tokens up to 400 for the usual form; the others every 41st, and all up to 130.
    for m in EVERY_M if form == "int4-g128" else (*range(1, 131), *range(131, 8193, 41)):
        for module in (decode_a16, prefill_a16):
            choice = module.choice_of(Problem(op, m, n, k, spec, dtype, H200))
            if choice is not None and (module is prefill_a16 or m <= 256):
                options = {"minimum": form == "minima"}
                module.linear(x[:m], packed, scale, zero, None, n, size, spec.bits, choice.config, **options)
        assert launches <= ready, m
    assert {name for name, _, _ in launches} == {"decode_a16", "prefill_a16"}
    assert len(ready) <= 19, "no more than the kernel has forms of this weight"
    assert {unit.source for unit in units(problem)} == {"decode_a16", "prefill_a16", "dequantize_fragment"}


@pytest.mark.parametrize("out_features", [3070, 3072])
def test_nor_does_a_gated_product_whose_rows_are_padded(out_features, launches):
    """Tall tiles are for weights whose rows fill pairs of them: for 6144 gates and ups, not for 6140 in as many rows."""
    spec, k = QuantSpec(4, "group", 128, True, BF16), 4096
    ready = compiled(Problem("preshuffled_gated", 1, 2 * out_features, k, spec, BF16, H200))
    packed, scale, _ = fragment(4, 6144, k, 128, BF16, False)
    for m in range(40, 1200, 8):
        prefill_a16.linear(torch.empty(m, k, dtype=BF16), packed, scale, None, None, out_features, 128, 4, gated=True)
    tall = {"LQ_ROWS=192" in defines for _, _, defines in launches}
    assert tall == ({False, True} if out_features == 3072 else {False})
    assert launches <= ready


@pytest.mark.parametrize("activation", ["int8", "fp8"])
@pytest.mark.parametrize("bits", [4, 8])
def test_nor_for_8_bit_tokens(bits, activation, launches):
    n, k, group = 2048, 1024, 128
    codes = quantize_tokens.CODE_DTYPES[activation]
    if bits == 8:
        weight, scale, spec = torch.empty(n, k, dtype=codes), torch.empty(n), QuantSpec(8, "row", None, True, FP32)
    else:
        weight = torch.empty(FRAGMENT_A8_FP8.packed_shape(n, k), dtype=torch.int32)
        scale, spec = (
            torch.empty(k // group, weight.shape[1] * 16, dtype=BF16),
            QuantSpec(4, "group", group, True, BF16),
        )
    op = f"int{bits}_dynamic"
    for lowest in (False, True):
        ready = compiled(Problem(op, 1, n, k, spec, BF16, H200, activation), lowest=lowest)
        for m in (*range(1, 300), *range(300, 8193, 97)):
            x = torch.empty(m, k, dtype=BF16)
            tokens, token_scale = quantize_tokens.quantize_tokens(x, activation)
            size = group if bits == 4 else k
            linear_a8.linear(tokens, token_scale, weight, scale, None, n, size, BF16, lowest=lowest)
            assert launches <= ready, m
        assert {name for name, _, _ in launches} == {"linear_a8", "quantize_tokens"}
        launches.clear()


def test_q4_0_blocks_are_multiplied_as_int4_on_hopper(launches):
    spec, n, k = QuantSpec(4, "group", 32, True, FP16), 512, 1024
    ready = compiled(Problem("q4_0", 1, n, k, spec, BF16, H200))
    packed, scale, _ = fragment(4, n, k, 32, FP16, False)
    for m in range(1, 300, 7):
        for module in (decode_a16, prefill_a16):
            choice = module.choice_of(Problem("preshuffled", m, n, k, spec, BF16, H200))
            module.linear(torch.empty(m, k, dtype=BF16), packed, scale, None, None, n, 32, 4, choice.config)
            assert launches <= ready
    elsewhere = units(Problem("q4_0", 1, n, k, spec, BF16, Arch("cuda", (8, 9), "NVIDIA L4", 58)))
    assert {unit.source for unit in elsewhere} == set(SOURCES)


@pytest.mark.parametrize("k", [1024, 1056])
def test_nor_for_q4_0_times_q8_1(k, launches, monkeypatch):
    n, spec = 512, QuantSpec(4, "group", 32, True, FP16)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)  # nothing runs, so none is asked for
    ready = compiled(Problem("q4_0_q8_1", 1, n, k, spec, FP32, H200))
    packed, scale, _ = fragment(4, n, k, 32, FP16, False)
    for m in (*range(1, 9), *range(9, 300, 7)):
        for dtype in (BF16, FP16, FP32):
            decode_a16.linear_q8_1(torch.empty(m, k, dtype=dtype), packed, scale, n)
        decode_a16.linear_q8_1(torch.empty(m, k // 32, 36, dtype=torch.uint8), packed, scale, n)
        x = torch.empty(m, k, dtype=BF16)
        prefill_a16.linear(x, packed, scale, None, None, n, 32, 4, transposed=True)
        assert launches <= ready, m
    fragments = {("fragment_q8_1", kernel, ()) for kernel in quantize_q8_1.FRAGMENT_KERNELS.values()}
    assert {("dequantize_q8_1", "dequantize_q8_1", ())} <= ready - launches
    assert fragments <= launches
    of_decode = {defines for name, _, defines in launches if name == "decode_a16"}
    assert {"LQ_QUANTIZED=Bf16", "LQ_QUANTIZED=Fp16", "LQ_QUANTIZED=Fp32", "LQ_FEW=1"} <= set().union(*of_decode)
    names = {"decode_a16", "prefill_a16", "fragment_q8_1", "dequantize_q8_1", *SOURCES}
    assert {name for name, _, _ in ready} == names


def test_nor_where_a_row_is_one_block(launches, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    spec, n = QuantSpec(4, "row", None, True, FP16), 512
    ready = compiled(Problem("q4_0_q8_1", 1, n, 32, spec, FP32, H200))
    packed, scale, _ = fragment(4, n, 32, 32, FP16, False)
    for m in (1, 4, 9, 64, 200):
        for module in (decode_a16, prefill_a16):
            module.linear(torch.empty(m, 32, dtype=BF16), packed, scale, None, None, n, 32, 4, transposed=True)
        assert launches <= ready, m
    assert {name for name, _, _ in ready} == {"decode_a16", "prefill_a16", "dequantize_q8_1", *SOURCES}


@pytest.mark.parametrize("op", ["int4", "preshuffled"])
def test_representatives_stand_for_every_kernel_that_is_selected(op, launches):
    for n, k in ((4096, 4096), (2048, 8192), (1024, 4096)):
        problem = Problem(op, 1, n, k, QuantSpec(4, "group", 128, True, BF16), BF16, H200)
        chosen = representatives(problem)
        assert chosen[0] == 1
        names = {select(Problem(op, m, n, k, problem.spec, BF16, H200)).name for m in chosen}
        assert len(names) <= len(chosen) <= 6
        # Between the numbers that are looked at, one of these may win by a tile; what they compile is among the units.
        assert {"prefill_a16", "dequantize_fragment"} <= {unit.source for unit in units(problem)}
        for m in range(1, 8193, 29):
            assert select(Problem(op, m, n, k, problem.spec, BF16, H200)).name in names | {
                "cuda-prefill",
                "dequant-blas",
            }


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "another Hopper"])
@pytest.mark.parametrize("op", ["int4", "int8", "q4_0", "preshuffled_gated"])
def test_what_is_not_compiled_ahead_is_selected_at_its_representatives_only(op, name, launches, monkeypatch):
    from lq_kernels.triton import constraints as triton_constraints
    from lq_kernels.triton.config import tile_m

    monkeypatch.setattr(triton_constraints, "_installed", lambda: True)
    arch = Arch("cuda", (9, 0), name, 132)
    bits, size, scale = (8, None, FP32) if op == "int8" else (4, 32, FP16) if op == "q4_0" else (4, 128, BF16)
    spec = QuantSpec(bits, "row" if size is None else "group", size, True, scale)
    ahead, later = {"cuda-decode", "cuda-prefill", "dequant-blas"}, set()
    for n, k in ((4096, 4096), (28672, 4096), (1024, 4096), (512, 256), (64, 128), (16, 1024)):
        problem = Problem(op, 1, n, k, spec, BF16, arch)

        def choice(m, problem=problem):
            chosen = select(problem_at(problem, m)).name
            return chosen, tile_m(m) if chosen.startswith("triton-") else 0

        ready = {choice(m) for m in representatives(problem)}
        # At the numbers of tokens that are looked at by default, all of them; few Triton kernels win on a Hopper GPU.
        for m in sorted({m for power in range(14) for m in (1 << power, (1 << power) + 1, 3 << power) if m <= 8192}):
            chosen = choice(m)
            assert chosen[0] in ahead or chosen in ready, (n, k, m)
            later |= {chosen[0]} - ahead
    assert later or op == "preshuffled_gated", "small weights go to other kernels, or this shows nothing"


@pytest.mark.parametrize(("op", "group"), [("int4", 128), ("ggml", 32)])
def test_tiles_of_triton_kernels_have_representatives(op, group, monkeypatch):
    from lq_kernels.triton import config, ggml_config
    from lq_kernels.triton import constraints as triton_constraints

    tile_m = (ggml_config if op == "ggml" else config).tile_m

    monkeypatch.setattr(triton_constraints, "_installed", lambda: True)
    lookup.forget()
    arch = Arch("cuda", (8, 9), "NVIDIA L4", 58)
    problem = Problem(op, 1, 4096, 4096, QuantSpec(4, "group", group, True, BF16), BF16, arch)
    ready = {(select(problem_at(problem, m)).name, tile_m(m)) for m in representatives(problem)}
    for m in (*range(1, 65), *range(65, 8193, 17)):
        name = select(problem_at(problem, m)).name
        assert (name, tile_m(m)) in ready or not name.startswith("triton-")
    lookup.forget()


def problem_at(problem, m):
    import dataclasses

    return dataclasses.replace(problem, m=m)


def test_what_has_no_cuda_kernel_compiles_nothing(monkeypatch):
    spec = QuantSpec(4, "group", 128, True, BF16)
    assert units(Problem("int4", 1, 64, 128, spec, BF16, Arch("cpu"))) == ()
    assert units(Problem("int4", 1, 64, 128, spec, BF16, Arch("cuda", (8, 9), "NVIDIA L4", 58))) == ()
    assert units(Problem("int4", 1, 64, 128, spec, FP32, H200)) == ()
    monkeypatch.setattr(constraints, "why_not_compile", lambda: "NVRTC is not installed")
    assert units(Problem("int4", 1, 64, 128, spec, BF16, H200)) == ()
    monkeypatch.setattr(constraints, "why_not_compile", lambda: None)
    blocks = Problem("q4_0_q8_1", 1, 64, 128, QuantSpec(4, "group", 32, True, FP16), FP32, H200)
    assert {"gemm_q4_0_q8_1", "quantize_q8_1"} <= {unit.source for unit in units(blocks)}
    assert all(set(unit.kernels) == set(SOURCES[unit.source]) for unit in units(blocks) if unit.source in SOURCES)


def test_units_are_compiled_once_in_threads_and_one_that_fails_does_not_stop_the_rest():
    import threading

    wanted = [Unit("a"), Unit("b", ("X=1",)), Unit("a"), Unit("b", ("X=2",))]
    done, together = [], threading.Barrier(3, timeout=10)
    progress = []

    def compiler(unit):
        together.wait()  # three at once, or this breaks
        done.append(unit)
        if unit.source == "a":
            raise CompileError("no")

    with pytest.raises(CompileError, match="no"):
        compile_units(wanted, compiler, threads=3, progress=lambda *step: progress.append(step))
    assert len(done) == 3
    assert set(done) == set(wanted)
    assert [step[:2] for step in progress] == [(1, 3), (2, 3), (3, 3)]
    assert compile_units([], compiler) == 0


def test_the_longest_compilation_starts_first():
    started = []
    problems = [
        Problem("preshuffled", 1, n, 4096, QuantSpec(4, "group", 128, True, BF16), BF16, H200) for n in (64, 4096)
    ]
    wanted = [unit for problem in problems for unit in units(problem)]
    assert compile_units(wanted, started.append, threads=1) == len(set(wanted))
    for threads in (-1, 1.5):
        with pytest.raises(SpecError, match=f"threads={threads}: expected a positive integer"):
            compile_units(wanted, started.append, threads=threads)
    tokens = [dict(define.split("=") for define in unit.defines).get("LQ_TOKENS") for unit in started]
    assert tokens[0] == "256"
    assert started[-1].source == "dequantize_fragment"
    halves = [unit for unit in started if "LQ_SPLIT=1" in unit.defines and "LQ_MULTICAST=1" not in unit.defines]
    alone = [int(each) for each, unit in zip(tokens, started, strict=True) if each and unit not in halves]
    assert alone == sorted(alone, reverse=True)
    assert halves


def test_tiles_that_are_halved_compile_as_long_as_others():
    whole = Unit("prefill_a16", ("LQ_TOKENS=256", "LQ_MULTICAST=1"))
    halved = Unit("prefill_a16", (*whole.defines, "LQ_SPLIT=1"))
    split = Unit("prefill_a16", ("LQ_TOKENS=128", "LQ_SPLIT=1"))
    smaller = Unit("prefill_a16", ("LQ_TOKENS=192", "LQ_MULTICAST=1"))
    started = []
    assert compile_units([split, smaller, halved, whole], started.append, threads=1) == 4
    assert set(started[:2]) == {whole, halved}
    assert started[2:] == [smaller, split]


def test_into_cache_compiles_for_another_gpu(monkeypatch):
    from lq_kernels.jit import launcher

    asked = []
    monkeypatch.setattr(launcher, "cubin", lambda *what: asked.append(what))
    compile_units([Unit("decode_a16", ("LQ_BITS=4",))], into_cache(H200))
    assert asked == [("decode_a16", "sm_90a", ("LQ_BITS=4",))]


@pytest.mark.gpu
def test_after_loading_nothing_is_compiled(monkeypatch):
    from lq_kernels.jit import launcher
    from lq_kernels.prepare import onto_gpu

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    n, k = 1040, 1024
    spec = QuantSpec(4, "group", 128, True, BF16)
    problem = Problem("preshuffled", 1, n, k, spec, BF16, Arch.of("cuda"))
    compile_units(units(problem), onto_gpu(torch.device("cuda")))
    monkeypatch.setattr(launcher, "cubin", None)
    packed, scale, _ = fragment(4, n, k, 128, BF16, False)
    packed, scale = packed.zero_().cuda(), scale.zero_().cuda()
    for m in (1, 9, 17, 33, 65, 100, 129, 300, 1000, 5000):
        x = torch.zeros(m, k, dtype=BF16, device="cuda")
        for linear in (decode_a16.linear, prefill_a16.linear):
            if linear is prefill_a16.linear or m <= 128:
                linear(x, packed, scale, None, None, n, 128, 4)
    torch.cuda.synchronize()

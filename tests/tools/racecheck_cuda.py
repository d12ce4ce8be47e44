"""Run every structurally different path of lq's Hopper kernels under racecheck: few launches of few CTAs, whose rings all wrap.

First without the sanitizer, so that no compilation happens under it, then with it, some groups of launches a process:

    python3 tests/tools/racecheck_cuda.py
    compute-sanitizer --tool racecheck --kernel-name kns=decode_a16 --racecheck-num-workers 3 --report-api-errors no \
        --error-exitcode 1 python3 tests/tools/racecheck_cuda.py 'decode-streamed-*'

Kernels are compiled for racecheck (LQ_RACECHECK, see ``lq/hopper.cuh``): all threads arrive where one does it for others, as
racecheck follows no order from a thread through ``__syncwarp`` or ``bar.sync`` to the one that arrives; and all warps wait at
the first cluster barrier, without which decode of passes that its ring does not hold, and pairs of CTAs, did not end. --shipped
compiles what is shipped. Copies by tensor map, and what wgmma reads, racecheck does not look at: of 8-bit weights it sees the
epilogue.

In some launches CTAs of a cluster arrive at each other's mbarriers: decode-kept-*-cluster2 and -cluster4 (five passes: boxes
are used again), prefill-multicast-*, prefill-runs and a8-pair-* (stages), prefill-split-* (boxes) and prefill-halved-* (both).
In no other do they.

tests/tools/sanitize_cuda.py has more launches, for the other tools.
"""

import argparse
import dataclasses
import fnmatch
import functools
import sys
import time
from collections.abc import Callable, Iterator

import torch
from lq_formats import dequantize_q4_0, dequantize_q8_1, quantize_q4_0, quantize_q8_1
from lq_kernels import q4_0 as q4_0_kernel
from lq_kernels.cuda import decode_a16, decode_cuts, linear_a8, prefill_a16, prefill_cuts
from lq_kernels.cuda.sources import A8_VARIANTS, VARIANTS
from lq_kernels.cuda.variant import EPILOGUES, Variant
from lq_kernels.jit import launcher
from sanitize_cuda import FEATURES, ROWS, SHARED, Case, a8_operands, close, forms_of, forms_of_q8_1

Launches = Iterator[tuple[str, Callable[[], None]]]
_SHORT = 512
"""In features: with two blocks of 16 rows a pass, five passes of a stage or more through a ring of two."""
_TWO_PASSES = {"k": FEATURES, "slots": 8}
"""Nine blocks in passes of eight and one, or twice eight, through a ring of two as well: boxes are used once, and nobody says
that they are free."""
_whole = functools.partial(prefill_cuts.PrefillConfig, ctas=1, raster=1, shared_tiles=0, workers=0)
"""One CTA, or pair, has all tiles, each whole."""


def main() -> None:
    every = dict(launches())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="launches: " + " ".join(every),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "patterns", nargs="*", default=["*"], metavar="PATTERN", help="which launches: names, * for any"
    )
    parser.add_argument("--shipped", action="store_true", help="compile the kernels as they are shipped")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("torch finds no GPU of compute capability 9.0")
    names = [name for name in every if any(fnmatch.fnmatchcase(name, pattern) for pattern in arguments.patterns)]
    if not names:
        parser.error(f"no launch is named {' or '.join(arguments.patterns)}")
    if not arguments.shipped:
        compile_for_racecheck()
    torch.manual_seed(0)
    for name in names:
        start = time.perf_counter()
        every[name]()
        torch.cuda.synchronize()
        print(f"{name}: right, {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{len(names)} launches are right", flush=True)


def compile_for_racecheck() -> None:
    """Compile everything from here on with LQ_RACECHECK."""
    compiled = launcher.cubin
    launcher.cubin = lambda name, arch, defines=(): compiled(name, arch, (*defines, "LQ_RACECHECK=1"))


def launches() -> Launches:
    yield from _decode()
    yield from _decode_q8_1()
    yield from _prefill()
    yield from _prefill_aside()
    yield from _a8()


def _decode() -> Launches:
    """Every form in five passes, or in two where x passes by, alone and in clusters of two and four; every epilogue and
    arrangement of scales in two."""
    for form in forms_of(VARIANTS[0]):
        way, sizes = ("streamed", _TWO_PASSES) if form.streamed else ("kept", {})
        for cluster in (1, 2, 4):
            name = f"decode-{way}-{form.token_tiles}-{form.warp_blocks}-{form.ctas}-cluster{cluster}"
            yield name, functools.partial(_run_decode, VARIANTS[0], "none", form, cluster, **sizes)
    for epilogue in EPILOGUES:
        if epilogue != "none":
            form = forms_of(VARIANTS[0])[0]
            yield f"decode-{epilogue}", functools.partial(_run_decode, VARIANTS[0], epilogue, form, 2, **_TWO_PASSES)
    for i in (2, 4, 5, 6, 10):
        forms = forms_of(VARIANTS[i])
        form = forms[i % len(forms)]
        yield f"decode-variant{i}", functools.partial(_run_decode, VARIANTS[i], "none", form, 2, **_TWO_PASSES)


def _run_decode(
    variant: Variant, epilogue: str, form: decode_cuts.Form, cluster: int, k: int = _SHORT, slots: int = 2
) -> None:
    case = Case(variant, epilogue, 8 * form.token_tiles - 3, k)
    sums = decode_cuts.sum_bytes(variant.scales)
    sizes = (case.m, case.blocks, case.k, variant.bits, variant.scale_bytes)
    config = decode_cuts.cut(*sizes, form, cluster, 1, SHARED, sums, 2)
    assert config is not None
    if form.streamed:  # of as many slots as its stages have room for
        assert (config.stages, config.boxes) == (2, 3 - form.warp_blocks)
    else:
        config = dataclasses.replace(config, slots=slots, stages=2, boxes=2)
    case.run(decode_a16.linear, dataclasses.replace(config, shared=SHARED))


def _decode_q8_1() -> Launches:
    """Tokens that are quantized like Q8_1 blocks: in a launch before, few and more; and here, more than are loaded at once."""
    for form in forms_of_q8_1():
        way = "quantized" if form.quantizes else "streamed" if form.streamed else "kept"
        for cluster in (1, 2):
            name = f"q8_1-{way}-{form.token_tiles}-{form.warp_blocks}-{form.ctas}-cluster{cluster}"
            yield name, functools.partial(_run_decode_q8_1, form, cluster)


def _run_decode_q8_1(form: decode_cuts.Form, cluster: int) -> None:
    few = form.quantizes or cluster == 1
    m, k = 11 if form.token_tiles == 2 else 4 if few else 7, (4608 if form.quantizes else 1536) * cluster
    w = quantize_q4_0(torch.randn(ROWS - 1, k)).cuda()
    x = torch.randn(m, k, device="cuda").to((torch.bfloat16, torch.float16)[cluster - 1])
    packed, scales = q4_0_kernel.fragments(w)
    config = decode_cuts.cut(m, 9, k, 4, 128, form, cluster, 1, SHARED, most_stages=2, q8_1=True)
    assert config is not None
    y = decode_a16.linear_q8_1(x, packed, scales, ROWS - 1, config)
    close(y, dequantize_q4_0(w, torch.float64) @ dequantize_q8_1(quantize_q8_1(x), torch.float64).T)


def _prefill() -> Launches:
    """Tiles, alone, in pairs that share tokens or K, also tall; parts; K in runs; epilogues; scales and zeros; shared tiles."""
    for tokens in (16, 64, 96, 256):
        yield f"prefill-{tokens}", functools.partial(_run_prefill, VARIANTS[0], "none", _whole(tokens))
    yield (
        "prefill-shared",
        functools.partial(_run_prefill, VARIANTS[0], "none", prefill_cuts.PrefillConfig(16, 3, 1, 1, 3)),
    )
    for tokens in (64, 256):
        config = _whole(tokens, multicast=True)
        yield f"prefill-multicast-{tokens}", functools.partial(_run_prefill, VARIANTS[0], "none", config)
    for tokens in (32, 128):
        config = _whole(tokens, split=True)
        yield f"prefill-split-{tokens}", functools.partial(_run_prefill, VARIANTS[0], "none", config)
    for tokens, epilogue in ((96, "none"), (128, "residual"), (64, "transposed")):
        config = prefill_cuts.PrefillConfig(tokens, 2, 1, 1, 2, split=True)
        yield f"prefill-split-parts-{epilogue}", functools.partial(_run_prefill, VARIANTS[0], epilogue, config)
    config = prefill_cuts.PrefillConfig(128, 2, 1, 1, 2, multicast=True, split=True)
    for i, epilogue, tokens in (
        (0, "none", 128),
        (0, "residual", 128),
        (6, "none", 128),
        (0, "none", 192),
        (6, "none", 256),
    ):
        each = dataclasses.replace(config, tokens=tokens, wide=i == 6 and tokens == 128)
        yield (
            f"prefill-halved-{tokens}-{epilogue}-variant{i}",
            functools.partial(_run_prefill, VARIANTS[i], epilogue, each),
        )
    # Two tiles in unequal parts, and one in equal ones.
    for i, epilogue, tiles, workers in ((0, "none", 2, 3), (0, "residual", 1, 2), (6, "none", 1, 2)):
        each = prefill_cuts.PrefillConfig(256, workers, 1, tiles, workers)
        yield f"prefill-shared-256-{epilogue}-variant{i}", functools.partial(_run_prefill, VARIANTS[i], epilogue, each)
    for i, tokens in ((0, 128), (6, 256)):
        each = prefill_cuts.PrefillConfig(tokens, 4, 1, 1, 4, multicast=True, split=True)
        yield (
            f"prefill-halved-parts-{tokens}-variant{i}",
            functools.partial(_run_prefill, VARIANTS[i], "none", each, k=1024),
        )
    for way in ("multicast", "split"):
        config = _whole(64, rows=prefill_cuts.TALL, **{way: True})
        yield f"prefill-{way}-tall", functools.partial(_run_prefill, VARIANTS[0], "none", config)
    config = prefill_cuts.PrefillConfig(64, 1, 1, 0, 2, multicast=True)
    yield "prefill-runs", functools.partial(_run_prefill, VARIANTS[0], "none", config)
    yield "prefill-runs-residual", functools.partial(_run_prefill, VARIANTS[0], "residual", _whole(128, workers=3))
    for tokens, epilogue, i in ((16, "none", 0), (32, "residual", 4)):
        config = _whole(tokens, teams=2)
        yield f"prefill-teams-{tokens}", functools.partial(_run_prefill, VARIANTS[i], epilogue, config, k=1664)
    config = prefill_cuts.PrefillConfig(16, 3, 1, 2, 3, teams=2)
    yield "prefill-teams-shared", functools.partial(_run_prefill, VARIANTS[2], "none", config)
    for i, each in (
        (1, _whole(16, teams=2)),
        (2, _whole(32, split=True)),
        (2, _whole(64, multicast=True)),
        (8, prefill_cuts.PrefillConfig(16, 3, 1, 2, 3)),
    ):
        yield f"prefill-scaled-{each.tokens}-variant{i}", functools.partial(_run_prefill, VARIANTS[i], "none", each)
    yield "prefill-wide", functools.partial(_run_prefill, VARIANTS[6], "none", _whole(64, wide=True))
    for epilogue in EPILOGUES:
        if epilogue != "none":
            yield f"prefill-{epilogue}", functools.partial(_run_prefill, VARIANTS[0], epilogue, _whole(16))
    for i in (2, 4, 5, 6):
        yield f"prefill-variant{i}", functools.partial(_run_prefill, VARIANTS[i], "none", _whole(32))


def _prefill_aside() -> Launches:
    """Results of whole vectors, which leave by the ring: a stage or, of int8, two; a residual; gates; after a part; of runs."""
    for name, i, epilogue, config in (
        ("aside", 0, "none", _whole(256)),
        ("multicast-aside", 0, "none", _whole(256, multicast=True)),
        ("aside-residual", 0, "residual", _whole(256)),
        ("multicast-aside-residual", 0, "residual", _whole(256, multicast=True)),
        ("aside-silu_mul", 0, "silu_mul", _whole(192)),
        ("multicast-aside-variant6", 6, "none", _whole(192, multicast=True)),
        ("aside-residual-variant6", 6, "residual", _whole(256)),
        ("aside-shared", 0, "none", prefill_cuts.PrefillConfig(192, 2, 1, 1, 2)),
        ("multicast-aside-128", 0, "none", _whole(128, multicast=True)),
        ("aside-128-variant6", 6, "none", _whole(128, wide=True)),
        ("aside-runs", 0, "none", _whole(128, workers=3)),
        ("multicast-aside-runs-variant12", 12, "none", _whole(64, workers=3, multicast=True)),
    ):
        yield f"prefill-{name}", functools.partial(_run_prefill, VARIANTS[i], epilogue, config, full=False)


def _run_prefill(
    variant: Variant, epilogue: str, config: prefill_cuts.PrefillConfig, full: bool = True, k: int = FEATURES
) -> None:
    case = Case(variant, epilogue, config.tokens + config.tokens // 2 + 1, k, full)
    case.run(prefill_a16.linear, config)


def _a8() -> Launches:
    """Weights of 4 and 8 bits, sums promoted or not, with groups or one scale a row, alone and in pairs; a shared tile."""
    for i in (0, 1, 3, 4, 6, 7, 8):
        for multicast in (False, True):
            config = linear_a8.A8Config(64 if multicast else 32, multicast, 1, 1, 0, 0)
            name = f"a8-{'pair' if multicast else 'alone'}-variant{i}"
            yield name, functools.partial(_run_a8, A8_VARIANTS[i], config)
    for i in (0, 3, 6):
        config = linear_a8.A8Config(128, True, 1, 1, 0, 0)
        yield f"a8-aside-variant{i}", functools.partial(_run_a8, A8_VARIANTS[i], config, full=True)
    yield "a8-shared", functools.partial(_run_a8, A8_VARIANTS[3], linear_a8.A8Config(32, False, 3, 1, 1, 3))


def _run_a8(variant: linear_a8.A8Variant, config: linear_a8.A8Config, full: bool = False) -> None:
    m, n = config.tokens + config.tokens // 2 + 1, 2 * ROWS - (0 if full else 5)
    group = 128 if variant.grouped else FEATURES
    operands, exact = a8_operands(variant, m, n, FEATURES, group)
    options = {"lowest": variant.lowest, "promote": variant.promote, "config": config}
    close(linear_a8.linear(*operands, n, group, variant.out, **options), exact)


if __name__ == "__main__":
    sys.exit(main())

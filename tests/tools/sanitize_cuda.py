"""Run every path of lq's CUDA C++ kernels on small shapes and check the results, alone or under compute-sanitizer.

First without the sanitizer, so that no compilation happens under it (about a second a variant, then cached):

    python3 tests/tools/sanitize_cuda.py

Then under each of its tools:

    compute-sanitizer --tool memcheck  --report-api-errors no --error-exitcode 1 python3 tests/tools/sanitize_cuda.py
    compute-sanitizer --tool racecheck --report-api-errors no --error-exitcode 1 python3 tests/tools/sanitize_cuda.py
    compute-sanitizer --tool synccheck --report-api-errors no --error-exitcode 1 python3 tests/tools/sanitize_cuda.py
    compute-sanitizer --tool initcheck --report-api-errors no --error-exitcode 1 python3 tests/tools/sanitize_cuda.py

Name parts to run fewer. racecheck is slow: --light has fewer launches, one or two of every compiled kernel and case with cuts
that differ from case to case, NAME:I/N is what process I of N does of a part, and a kernel's name leaves out those of torch.
Processes share a GPU in turns and start a worker for every core unless told otherwise, so a few are enough:

    for i in 0 1 2 3; do
        compute-sanitizer --tool racecheck --kernel-name kns=prefill_a16 --racecheck-num-workers 3 \
            --report-api-errors no --error-exitcode 1 python3 tests/tools/sanitize_cuda.py --light prefill_a16:$i/4 &
    done; wait

racecheck 2025.3 does not follow a warp's order through __syncwarp to the lane that arrives at an mbarrier: it reports what the
other 31 lanes read of a stage (see docs/kernel-notes.md).

PYTORCH_NO_CUDA_MEMORY_CACHING=1 (set here) makes every tensor its own allocation, so that an access past its end is seen.
Parts that need a Hopper GPU are passed over, and named, where there is another.
"""

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from lq_formats import dequantize_q4_0, dequantize_q8_1, quantize_q4_0, quantize_q8_1
from lq_formats.layouts import FRAGMENT_A8_FP8, FRAGMENT_A8_INT8, FRAGMENT_INT4, FRAGMENT_INT8
from lq_kernels import gemm_q4_0_q8_1, interleave_rows, quantize_activation_q8_1
from lq_kernels import q4_0 as q4_0_kernel
from lq_kernels.cuda import decode_a16, decode_cuts, linear_a8, prefill_a16, prefill_cuts
from lq_kernels.cuda import dequantize_fragment as fragment
from lq_kernels.cuda.quantize_q8_1 import dequantize_q8_1 as dequantize_q8_1_cuda
from lq_kernels.cuda.quantize_q8_1 import round_q8_1
from lq_kernels.cuda.quantize_tokens import quantize_tokens
from lq_kernels.cuda.sources import A8_VARIANTS, VARIANTS
from lq_kernels.cuda.variant import EPILOGUES, Scales, Variant
from lq_kernels.dynamic_reference import dequantize_tokens_reference, quantize_tokens_reference
from lq_kernels.reference import gemm_q4_0_q8_1_reference
from torch import Tensor

Q4_0_SHAPES = [(1, 1, 32), (15, 3, 64), (33, 9, 96), (100, 17, 256), (64, 33, 1056), (129, 65, 768), (32, 130, 4096)]
ROWS = 136
"""Out features, about: two tiles of 128 rows, nine blocks of 16, the last of each not full."""
FEATURES = 1280
SHARED = 232448
"""Bytes of shared memory that a block may have on Hopper."""


C = TypeVar("C")


class Selection:
    """What of a part is run: the cases of one share of several, with all of their cuts or, where light, few."""

    def __init__(self, share: int = 0, shares: int = 1, light: bool = False) -> None:
        self.share, self.shares, self.light = share, shares, light
        self.case = -1

    def takes(self) -> bool:
        """Count a case; return whether it is this share's."""
        self.case += 1
        return self.case % self.shares == self.share

    def cuts(self, cuts: Iterable[C], kind: Callable[[C], Hashable] = lambda _: None) -> Iterator[C]:
        """Yield the cuts of this case; where light, one of each kind: the first in every other case, in turn in the rest."""
        kinds: dict[Hashable, list[C]] = {}
        for number, cut in enumerate(cuts):
            kinds.setdefault(kind(cut) if self.light else number, []).append(cut)
        for same in kinds.values():
            yield same[self.case % 2 * (self.case // 2 % len(same))]


def close(y: Tensor, exact: Tensor) -> None:
    error = float((y.double() - exact).norm() / exact.norm())
    assert error < 8e-3, f"relative error {error:.3g}"


# ---- weights in fragment order and 16-bit tokens ----


def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
    """``Tensor.new_empty`` with NaN in it: initcheck does not see what tensor maps store, and nothing else looks right."""
    made = NEW_EMPTY(self, *args, **kwargs)
    return made.fill_(math.nan) if made.is_floating_point() else made


NEW_EMPTY = Tensor.new_empty
Tensor.new_empty = poisoned  # type: ignore[method-assign]


class Case:
    """Operands of a product for a variant and an epilogue, and the exact result."""

    def __init__(self, variant: Variant, epilogue: str, m: int, k: int = FEATURES, full: bool = True) -> None:
        """Make them: ``full`` with a bias, rows of x that start anywhere and a residual that does."""
        self.variant, self.m, self.k = variant, m, k
        gated = epilogue == "silu_mul"
        # Tokens whose results do not start at whole vectors, or do.
        self.n = ROWS // 2 + (0 if full else 4) if gated else ROWS - full
        rows = 2 * self.n if gated else self.n
        self.group = 512 // variant.bits // variant.groups if variant.groups else k
        codes = torch.randint(0, 1 << variant.bits, (rows, k), dtype=torch.uint8, device="cuda")
        scales = (torch.rand(rows, k // self.group, device="cuda") * 0.02 + 0.005).to(variant.scale)
        zeros = torch.randint(0, 16, scales.shape, device="cuda").to(variant.scale) if variant.zero else None
        if variant.minimum:
            zeros = -8 * scales * torch.rand(scales.shape, device="cuda").to(variant.scale)
        offset = 1 << (variant.bits - 1) if zeros is None else zeros.double().repeat_interleave(self.group, 1)
        scale = scales.double().repeat_interleave(self.group, 1)
        self.w = codes.double() * scale + offset if variant.minimum else (codes.double() - offset) * scale
        x = (torch.randn(m, k, device="cuda") / self.w.norm(dim=1).mean()).to(variant.x)
        wide = torch.cat((x, x), 1)
        wide[:, 1 : k + 1] = x
        self.x = wide[:, 1 : k + 1] if full else x
        self.bias = torch.randn(rows, device="cuda").to(variant.x) if full else None
        minimum: dict[str, object] = {"minimum": True} if variant.minimum else {}
        self.options = dict(minimum)
        residual = None
        if epilogue == "residual":
            residual = (
                torch.randn(m * self.n + 3, device="cuda").to(variant.x)[3 if full else 0 :][: m * self.n].view(m, -1)
            )
            self.options |= {"residual": residual}
        elif epilogue != "none":
            self.options |= {"gated" if gated else "transposed": True}
        self.exact = x.double() @ self.w.T + (0 if self.bias is None else self.bias.double())
        if gated:
            gate, up = self.exact.chunk(2, 1)
            self.exact = torch.nn.functional.silu(gate) * up
            codes, scales, zeros = (t if t is None else interleave_rows(t) for t in (codes, scales, zeros))
        elif residual is not None:
            self.exact += residual.double()
        elif epilogue == "transposed":
            self.exact = self.exact.T
        layout = FRAGMENT_INT4 if variant.bits == 4 else FRAGMENT_INT8
        self.weight = (
            layout.pack(codes),
            layout.arrange_scales(scales, k, self.group),
            None if zeros is None else layout.arrange_scales(zeros, k, self.group),
        )
        self.blocks = self.weight[0].shape[1]

    def run(self, kernel: Callable[..., Tensor], config: object) -> None:
        """Multiply and compare."""
        sizes = (self.n, self.group, self.variant.bits)
        y = kernel(self.x, *self.weight, self.bias, *sizes, config=config, **self.options)
        close(y, self.exact)


def decode(selection: Selection) -> int:
    """Tiles, epilogues and variants; clusters of every size, one pass and several, a ring that wraps and one that does not."""
    cases = [(VARIANTS[0], epilogue, form) for epilogue in EPILOGUES for form in forms_of(VARIANTS[0])]
    cases += [(v, "none", forms_of(v)[i % len(forms_of(v))]) for i, v in enumerate(VARIANTS)]
    runs = 0
    for at, (variant, epilogue, form) in enumerate(cases):
        tiles = form.token_tiles
        for m, k in ((8 * tiles - 3, FEATURES), (8 * tiles + 1, FEATURES if variant.groups else 1000)):
            if not selection.takes():
                continue
            case = Case(variant, epilogue, m, k, full=(at + m) % 2 == 0)
            for config in selection.cuts(cuts_of(case, form), lambda config: config.cluster > 1):
                case.run(decode_a16.linear, config)
                runs += 1
    return runs


def forms_of(variant: Variant) -> tuple[decode_cuts.Form, ...]:
    return decode_cuts.forms(variant.scales)


def forms_of_q8_1() -> tuple[decode_cuts.Form, ...]:
    """Return the forms of Q4_0 whose tokens are quantized like Q8_1 blocks."""
    return decode_cuts.forms(Scales(4, False, False, 128), q8_1=True)


def cuts_of(case: Case, form: decode_cuts.Form) -> Iterator[decode_cuts.DecodeConfig]:
    bits, scale_bytes = case.variant.bits, case.variant.scale_bytes
    sums = decode_cuts.sum_bytes(case.variant.scales)
    for cluster in (1, 2, 4, 8):
        for clusters in (1, 2, 4, 5, case.blocks):  # two passes of eight slots, one, then one of four, two and one
            sizes = (case.m, case.blocks, case.k, bits, scale_bytes, form, cluster, clusters)
            whole = decode_cuts.cut(*sizes, SHARED, sums)
            if whole is None:
                continue
            if whole.stages > 2:
                wrapping = decode_cuts.cut(*sizes, SHARED, sums, most_stages=2)
                assert wrapping is not None
                yield wrapping
            yield whole


def prefill(selection: Selection) -> int:
    """Tiles, epilogues and variants; whole tiles, tiles that CTAs share in equal parts and across their ends, pairs of CTAs."""
    forms = [(VARIANTS[0], "none", tokens) for tokens in (*prefill_cuts.TOKENS, *prefill_cuts.BETWEEN)]
    forms += [(VARIANTS[0], epilogue, tokens) for epilogue in EPILOGUES if epilogue != "none" for tokens in (16, 64)]
    fp16_scales = [v for v in VARIANTS[1:] if v.groups == 0 or v.x != torch.float16 or v.scale == v.x]
    forms += [(v, "none", (32, 128)[i % 2]) for i, v in enumerate(fp16_scales)]
    forms += [(VARIANTS[i], "none", tokens) for i, tokens in ((2, 16), (2, 32), (2, 64), (8, 16))]  # scaled sums
    runs = 0
    for at, (variant, epilogue, tokens) in enumerate(forms):
        for full in (True, False):
            if not selection.takes():
                continue
            m = tokens + tokens // 2 + (1 if full else 0)
            case = Case(variant, epilogue, m, FEATURES if variant.groups or at % 2 else 1000, full)
            wide = variant.bits == 8 and variant.groups == 0 and tokens <= 128
            cuts = (dataclasses.replace(each, wide=wide) for each in cuts_of_prefill(tokens, variant.bits))
            for config in selection.cuts(cuts, lambda config: config.defines):
                case.run(prefill_a16.linear, config)
                runs += 1
    return runs


def cuts_of_prefill(tokens: int, bits: int) -> Iterator[prefill_cuts.PrefillConfig]:
    for multicast in (False, True)[: 1 + (tokens >= prefill_cuts.MULTICAST_FROM)]:
        # Two row tiles by two token tiles, or a pair of the former.
        for ctas, shared_tiles, workers in (
            (1, 0, 0),
            (4, 0, 0),
            (3, 1, 3),
            (2, 2, 2),
            (7, 3, 7),
            (8, 4, 8),
            (20, 4, 20),
        ):
            if not multicast or shared_tiles <= 2:
                raster = 1 + ctas % 2
                yield prefill_cuts.PrefillConfig(tokens, ctas, raster, shared_tiles, workers, multicast)
    if tokens in prefill_cuts.TEAM_TOKENS and bits == 4:
        for ctas, shared_tiles, workers in ((1, 0, 0), (3, 1, 3), (7, 3, 7)):
            yield prefill_cuts.PrefillConfig(tokens, ctas, 1, shared_tiles, workers, teams=2)
    if tokens in prefill_cuts.RUNS_TOKENS:
        for ctas, multicast in ((1, False), (4, False), (1, True)):
            yield prefill_cuts.PrefillConfig(tokens, ctas, 1, 0, 3, multicast)
    if tokens in prefill_cuts.SPLIT_TOKENS:
        for ctas in (1, 4):
            yield prefill_cuts.PrefillConfig(tokens, ctas, 1, 0, 0, split=True)
        yield prefill_cuts.PrefillConfig(tokens, 4, 1, 2, 4, split=True)  # parts of tiles, and others whole
    if tokens in prefill_cuts.HALVED_TOKENS:
        for tiles in (1, 2):
            yield prefill_cuts.PrefillConfig(tokens, 2 * tiles, 1, tiles, 2 * tiles, multicast=True, split=True)
    if tokens in (64, 128):
        yield prefill_cuts.PrefillConfig(tokens, 1, 1, 0, 0, multicast=True, rows=prefill_cuts.TALL)
        yield prefill_cuts.PrefillConfig(tokens, 1, 1, 0, 0, split=True, rows=prefill_cuts.TALL)


def dequantize(selection: Selection) -> int:
    """The dense weight of every variant, in every dtype, with tails of rows and of in features."""
    runs = 0
    for variant in VARIANTS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if not selection.takes():
                continue
            case = Case(variant, "none", 1, FEATURES if variant.groups else 1000)
            sizes = (case.n, case.k, case.group, variant.bits)
            dense = fragment.dequantize(*case.weight, *sizes, dtype, minimum=variant.minimum)
            close(dense, case.w)
            runs += 1
    return runs


# ---- 8-bit tokens ----


def a8(selection: Selection) -> int:
    """Variants and tiles, alone and in pairs; whole tiles, and tiles that CTAs share."""
    runs = 0
    for at, variant in enumerate(A8_VARIANTS):
        most = linear_a8.MAX_PROMOTED[variant.bits] if variant.promote else max(linear_a8.TOKENS)
        tiles = [tokens for tokens in linear_a8.TOKENS if tokens <= most]
        for tokens, multicast in ((tiles[at % 2], False), (tiles[-1 - at % 2], True), (tiles[2], at % 2 == 0)):
            if not selection.takes():
                continue
            m, n = tokens + tokens // 2 + 1, 2 * ROWS - (0 if multicast else 5)
            k = FEATURES if variant.grouped or at % 2 else FEATURES - 112
            group = 256 if variant.grouped and at % 2 else 128 if variant.grouped else k
            operands, exact = a8_operands(variant, m, n, k, group)
            rows, columns = linear_a8.A8Config(tokens, multicast, 1, 1, 0, 0).tiles(m, n)
            count = rows * columns
            cuts = ((1, 0, 0), (count, 0, 0), (2, 2, 2), (3, 1, 3), (7, 2, 7), (16, count, 16))
            for ctas, shared, workers in selection.cuts(cuts):
                config = linear_a8.A8Config(tokens, multicast, ctas, 1 + ctas % 2, min(shared, count), workers)
                options = {"lowest": variant.lowest, "promote": variant.promote, "config": config}
                close(linear_a8.linear(*operands, n, group, variant.out, **options), exact)
                runs += 1
    return runs


def a8_operands(variant: linear_a8.A8Variant, m: int, n: int, k: int, group: int) -> tuple[tuple[Tensor, ...], Tensor]:
    activation = variant.activation
    x = torch.randn(m, k, device="cuda").to(variant.out)
    codes, token_scale = quantize_tokens(x, "int8" if activation == "int8" else "fp8")
    scales = (torch.rand(n, k // group, device="cuda") * 0.02 + 0.005).to(variant.scale)
    bias = torch.randn(n, device="cuda").to(variant.out)
    if variant.bits == 8:
        values = torch.randn(n, k, device="cuda") * 40
        whole = values.round().clamp(-127, 127).to(torch.int8)
        weight, scale = whole if activation == "int8" else values.to(torch.float8_e4m3fn), scales[:, 0].contiguous()
        w = weight.double() * scales.double()
    else:
        unsigned = torch.randint(0 if variant.lowest else 1, 16, (n, k), device="cuda", dtype=torch.uint8)
        layout = FRAGMENT_A8_INT8 if activation == "int8" else FRAGMENT_A8_FP8
        weight, scale = layout.pack(unsigned), layout.arrange_scales(scales, k, group)
        w = (unsigned.double() - 8) * scales.double().repeat_interleave(group, 1)
    exact = dequantize_tokens_reference(codes, token_scale, torch.float64) @ w.T + bias.double()
    return (codes, token_scale, weight, scale, bias), exact


def tokens(selection: Selection) -> int:
    """The quantizer of tokens, a vector a thread and several, with a token that is not finite."""
    runs = 0
    for dtype in (torch.bfloat16, torch.float16):
        for k in (8, 136, 1032, 2056, 5000, 65536):
            for m in (1, 5):
                if not selection.takes():
                    continue
                x = torch.randn(m, k + 8, device="cuda").to(dtype)[:, 8:]
                x[m // 2, k // 2] = torch.nan if m > 1 else 0.0
                for activation in ("int8", "fp8"):
                    codes, scale = quantize_tokens(x, activation)
                    expected, expected_scale = quantize_tokens_reference(x, activation)
                    assert torch.equal(codes.contiguous().view(torch.uint8), expected.view(torch.uint8))
                    assert torch.equal(scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))
                    runs += 1
    return runs


# ---- ggml blocks ----


def q4_0(selection: Selection) -> int:
    """The Q4_0 product, aligned and not."""
    runs = 0
    for rows, columns, k in Q4_0_SHAPES:
        if not selection.takes():
            continue
        w, a = quantize_q4_0(torch.randn(rows, k)), quantize_q8_1(torch.randn(columns, k))
        y = gemm_q4_0_q8_1(w.cuda(), a.cuda(), rows, columns, k, kernel="cuda-mma")
        expected = gemm_q4_0_q8_1_reference(w, a)
        assert torch.allclose(y.cpu(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        runs += 1
    return runs


def q8_1(selection: Selection) -> int:
    """The quantizers of activations to Q8_1, and to what it stands for."""
    runs = 0
    for _, columns, k in Q4_0_SHAPES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            if not selection.takes():
                continue
            x = torch.randn(columns, k).to(dtype)
            assert torch.equal(quantize_activation_q8_1(x.cuda()).cpu(), quantize_q8_1(x))
            assert torch.equal(round_q8_1(x.cuda()).cpu(), dequantize_q8_1(quantize_q8_1(x)).to(torch.bfloat16))
            runs += 1
    return runs


def from_q8_1(selection: Selection) -> int:
    """Q8_1 blocks to bf16, from memory that starts at any byte."""
    runs = 0
    for _, columns, k in Q4_0_SHAPES:
        if not selection.takes():
            continue
        blocks = quantize_q8_1(torch.randn(columns, k))
        shifted = torch.empty(blocks.numel() + 1, dtype=torch.uint8, device="cuda")
        shifted[1:] = blocks.flatten().cuda()
        for given in (blocks.cuda(), shifted[1:].view(blocks.shape)):
            assert torch.equal(dequantize_q8_1_cuda(given).cpu(), dequantize_q8_1(blocks).to(torch.bfloat16))
            runs += 1
    return runs


def decode_q8_1(selection: Selection) -> int:
    """Tokens that are quantized like Q8_1 blocks, in a launch before or by decode itself, and such blocks."""
    runs = 0
    for k in (96, 128, FEATURES, 4096):
        w = quantize_q4_0(torch.randn(ROWS - 1, k)).cuda()
        packed, scales = q4_0_kernel.fragments(w)
        for m in (1, 3, 4, 8, 9, 16, 17):
            if not selection.takes():
                continue
            x = torch.randn(m, k).to((torch.bfloat16, torch.float16, torch.float32)[m % 3])
            blocks = quantize_q8_1(x).cuda()
            exact = dequantize_q4_0(w, torch.float64) @ dequantize_q8_1(blocks, torch.float64).T
            for form in forms_of_q8_1():
                for cluster, clusters in selection.cuts(((1, 1), (1, 9), (2, 4), (4, 2), (8, 5))):
                    config = decode_cuts.cut(m, 9, k, 4, 128, form, cluster, clusters, SHARED, q8_1=True)
                    for given in (x.cuda(), blocks):
                        if config is not None and not (form.quantizes and given is blocks):
                            close(decode_a16.linear_q8_1(given, packed, scales, ROWS - 1, config), exact)
                            runs += 1
    return runs


@dataclasses.dataclass(frozen=True)
class Part:
    """What runs under one name, and whether it needs a Hopper GPU."""

    run: Callable[[Selection], int]
    hopper: bool = True


PARTS = {
    "decode_a16": Part(decode),
    "prefill_a16": Part(prefill),
    "dequantize_fragment": Part(dequantize),
    "linear_a8": Part(a8),
    "quantize_tokens": Part(tokens),
    "gemm_q4_0_q8_1": Part(q4_0, hopper=False),
    "quantize_q8_1": Part(q8_1, hopper=False),
    "dequantize_q8_1": Part(from_q8_1),
    "decode_a16_q8_1": Part(decode_q8_1),
}


def chosen(argument: str) -> tuple[str, int, int]:
    """Return the part that ``NAME`` or ``NAME:I/N`` names, and I and N."""
    match = re.fullmatch(r"(\w+)(?::(\d+)/(\d+))?", argument)
    name, share, shares = (match[1], int(match[2] or 0), int(match[3] or 1)) if match else (argument, 0, 1)
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"no part {name!r}: expected {', '.join(PARTS)}")
    if share >= shares:
        raise argparse.ArgumentTypeError(f"no share {share} of {shares}: they are counted from 0")
    return name, share, shares


def main() -> None:
    lines = [f"  {name:20} {part.run.__doc__}" for name, part in PARTS.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["parts, by the name of their source:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts",
        nargs="*",
        type=chosen,
        metavar="NAME[:I/N]",
        help="what to run, or share I of N of it: see below; everything by default",
    )
    parser.add_argument("--light", action="store_true", help="fewer launches, for racecheck")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU on this machine")
    torch.manual_seed(0)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for name, share, shares in arguments.parts or [(name, 0, 1) for name in PARTS]:
        if PARTS[name].hopper and not hopper:
            print(f"{name}: passed over, needs compute capability 9.0")
            continue
        runs = PARTS[name].run(Selection(share, shares, arguments.light))
        torch.cuda.synchronize()
        print(f"{name}{f':{share}/{shares}' * (shares > 1)}: {runs} launches are right", flush=True)


if __name__ == "__main__":
    main()

"""The Hopper kernels for many tokens, cut so that no result depends on the other tokens: the batch-invariant mode.

An element is summed in the order of K within a run of K steps, and the sums of runs in the order of K. So its bits depend on
where K is cut, and on nothing else: the size of a token tile and what else a CTA does change neither order. Here K of every
tile has the same number of parts, which depends on the weight and the GPU alone. Few tokens share every tile; with w workers
for each of t tiles

    first step of worker i = floor(i * t * steps / (t * w)) = floor(i * steps / w)

so runs begin with tiles, and all tiles are cut alike, whatever t is. CTAs never wait for each other, so there may be more of
them than multiprocessors. For many 16-bit tokens there are tiles enough: one CTA multiplies all parts of a tile, one run
after the other, and adds up their sums in the same order, in registers. With one part there is nothing to add.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from lq_formats import ShapeError
from torch import Tensor

from lq_kernels.cuda import linear_a8, prefill_a16, prefill_cuts
from lq_kernels.cuda.linear_a8 import A8Config
from lq_kernels.cuda.prefill_cuts import ROWS, PrefillConfig
from lq_kernels.cuda.variant import Variant
from lq_kernels.plans import Plan
from lq_kernels.problem import Arch, Problem

MAX_PARTS = 16
MAX_UNITS = 1 << 31
"""Workers times K steps of shared tiles: the kernels compute with 32 bits."""
MAX_PARTIALS = 1 << 26
"""Numbers in the workspace, about (256 MB): more 16-bit tokens share no tiles, of 8-bit ones some are taken at a time."""
_SEEN, _A8_SEEN = (1, 64, 256, 1024), (1, 64, 1024)
"""Tokens whose times decide on the parts: few want many, and more pay for writing sums out and reading them back."""
_ALIKE = 1.04
"""Parts whose times differ by less, on average, are alike: the model knows no better, and the fewest write least."""
_RUN_CLOCKS = 200.0
"""What a run costs a CTA that has all of a tile's, beside a clock for each token: its products are waited for, and added.
Measured with 2 to 16 runs: 350 clocks in all with 96 tokens, 90 with 128 (H200); by count of the machine code 300."""
_FEW_CLOCKS = 37.0
"""Clocks for 16 in features that up to 16 tokens take less than prefill's model says, in one wave: int4 with one token takes
71 (H200, 1 to 8 parts of five weights)."""

_C = TypeVar("_C", PrefillConfig, A8Config)


def prefill_config(m: int, n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> PrefillConfig:
    """Return the fastest batch-invariant cut by a model; arguments and errors as of :func:`prefill_cuts.prefill_config`."""
    parts = prefill_parts(n, k, bits, scale_bytes, sm_count)
    cuts = _prefill_cuts(m, n, k, bits, scale_bytes, sm_count, parts)
    _check(cuts, m, n, k)
    return min(cuts, key=lambda config: _prefill_clocks(config, m, n, k, bits, sm_count))


@functools.lru_cache(maxsize=4096)
def prefill_parts(n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> int:
    """Return in how many parts K is cut, for any number of tokens."""

    def clocks(parts: int, m: int) -> float:
        cuts = _prefill_cuts(m, n, k, bits, scale_bytes, sm_count, parts)
        return min((_prefill_clocks(config, m, n, k, bits, sm_count) for config in cuts), default=math.inf)

    return _parts(clocks, _steps(k, bits, scale_bytes), _SEEN, _ALIKE)


def a8_config(m: int, n: int, k: int, bits: int, promote: bool, scale_bytes: int, sm_count: int) -> A8Config:
    """Return the fastest batch-invariant cut by a model; arguments and errors as of :func:`linear_a8.a8_config`."""
    parts = a8_parts(n, k, bits, promote, scale_bytes, sm_count)
    cuts = _a8_cuts(m, n, k, bits, promote, sm_count, parts)
    _check(cuts, m, n, k)
    return min(cuts, key=lambda config: _a8_clocks(config, m, n, k, bits, promote, scale_bytes, sm_count))


@functools.lru_cache(maxsize=4096)
def a8_parts(n: int, k: int, bits: int, promote: bool, scale_bytes: int, sm_count: int) -> int:
    """Return in how many parts K is cut, for any number of tokens."""

    def clocks(parts: int, m: int) -> float:
        cuts = _a8_cuts(m, n, k, bits, promote, sm_count, parts)
        times = (_a8_clocks(config, m, n, k, bits, promote, scale_bytes, sm_count) for config in cuts)
        return min(times, default=math.inf)

    return _parts(clocks, -(-k // linear_a8.STEP), _A8_SEEN, 1.0)


def tokens_at_once(n: int, steps: int, parts: int) -> int:
    """Return how many tokens a launch takes, a multiple of 128: the limits above, for tiles of 128 tokens.

    Args:
        n: Out features.
        steps: K steps.
        parts: Parts of K that tiles are shared in; 1 where CTAs may take whole tiles.
    """
    row_tiles = -(-n // ROWS)
    if parts == 1:
        return 16 * max(8, (1 << 30) // row_tiles // 8 * 8)
    units = math.isqrt((MAX_UNITS - 1) // (parts * steps)) // row_tiles
    partials = MAX_PARTIALS // (2 * parts * row_tiles * ROWS * 128)
    return 128 * max(1, min(units, partials))


def forms(n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> tuple[PrefillConfig, ...]:
    """Return a cut of every form (:attr:`PrefillConfig.defines`) that any number of tokens may ask for, the largest first.

    Arguments are those of :func:`prefill_config`.
    """
    whole = [replace(cut, shared_tiles=0, workers=0) for cut in prefill_cuts.forms(n, k, bits, scale_bytes, sm_count)]
    parts = prefill_parts(n, k, bits, scale_bytes, sm_count)
    cuts = (*_in_runs(_alike(whole), parts), *_alike(whole, parts))
    return tuple(sorted(cuts, key=lambda cut: cut.tokens, reverse=True))


def _alike(cuts: Iterable[PrefillConfig], parts: int = 1) -> list[PrefillConfig]:
    """Return those of prefill's cuts that this mode can have: rows in tiles of one size, and K, where it is cut, in such steps.

    Larger tiles than runs can have are too dear to share, and take int8 in smaller steps: uncut, that is the same order. Tiles
    that are compiled for some weights alone are left out: they win where CTAs have whole tiles. Weights are rounded
    in all.
    """
    most = (prefill_cuts.TOKENS if parts == 1 else prefill_cuts.RUNS_TOKENS)[-1]
    sizes = [tokens for tokens in prefill_cuts.TOKENS if tokens <= most]
    return [
        replace(config, rounded=True)
        for config in cuts
        if not config.split and config.teams == 1 and config.rows == ROWS and config.tokens in sizes
    ]


def _steps(k: int, bits: int, scale_bytes: int) -> int:
    """Return the K steps of tiles whose K can be cut: of 128 in features, but for int8 in groups."""
    return -(-k // (512 // bits if scale_bytes else 128))


def _in_runs(whole: Iterable[PrefillConfig], parts: int) -> Iterator[PrefillConfig]:
    """Yield the cuts whose CTAs may take all parts of a tile, so that they do."""
    for config in whole:
        if parts > 1 and config.tokens in prefill_cuts.RUNS_TOKENS:
            yield replace(config, workers=parts)


def _prefill_cuts(
    m: int, n: int, k: int, bits: int, scale_bytes: int, sm_count: int, parts: int
) -> tuple[PrefillConfig, ...]:
    cuts = prefill_cuts.candidates(m, n, k, bits, scale_bytes, sm_count)
    whole = _alike((config for config in cuts if not config.shared_tiles), parts)
    alike = _cut_alike(whole, lambda config: math.prod(config.tiles(m, n)), _steps(k, bits, scale_bytes), parts)
    shared = (cut for cut in alike if _partials(cut) <= MAX_PARTIALS or m <= cut.tokens)
    return (*shared, *_in_runs(whole, parts))


def _partials(config: PrefillConfig) -> int:
    return 2 * config.workers * config.sharers * config.tokens * ROWS


def _a8_cuts(m: int, n: int, k: int, bits: int, promote: bool, sm_count: int, parts: int) -> tuple[A8Config, ...]:
    whole = [config for config in linear_a8.candidates(m, n, k, bits, promote, sm_count) if not config.shared_tiles]
    return _cut_alike(whole, lambda config: math.prod(config.tiles(m, n)), -(-k // linear_a8.STEP), parts)


def _cut_alike(whole: list[_C], tiles: Callable[[_C], int], steps: int, parts: int) -> tuple[_C, ...]:
    if parts == 1:
        return tuple(whole)
    cuts = []
    for config in whole:
        shared_tiles = tiles(config)
        workers = parts * shared_tiles
        if workers * shared_tiles * steps < MAX_UNITS:
            cuts.append(replace(config, ctas=workers, shared_tiles=shared_tiles, workers=workers))
    return tuple(cuts)


def _check(cuts: Sequence[object], m: int, n: int, k: int) -> None:
    if not cuts:
        raise ShapeError(f"M={m}, N={n}, K={k}: too many steps for one batch-invariant launch; split the tokens")


def _prefill_clocks(config: PrefillConfig, m: int, n: int, k: int, bits: int, sm_count: int) -> float:
    if config.shared_tiles:
        parts, rows = config.workers // config.shared_tiles, ROWS * config.sharers
        tile = replace(config, ctas=parts, shared_tiles=1, workers=parts)
        waves = -(-config.workers * config.sharers // sm_count)
        clocks = waves * prefill_cuts.cost(tile, config.tokens, rows, k, bits, sm_count)
    else:
        parts, waves = 1, -(-math.prod(config.tiles(m, n)) // config.ctas)
        clocks = prefill_cuts.cost(config, m, n, k, bits, sm_count)
        if config.runs > 1:
            clocks += waves * config.runs * (_RUN_CLOCKS + config.tokens)
    return clocks - (_FEW_CLOCKS * k / 16 / parts if m <= config.tokens == 16 and waves == 1 else 0.0)


def _a8_clocks(
    config: A8Config, m: int, n: int, k: int, bits: int, promote: bool, scale_bytes: int, sm_count: int
) -> float:
    if not config.workers:
        return linear_a8.cost(config, m, n, k, bits, promote, scale_bytes, sm_count)
    parts, rows = config.workers // config.shared_tiles, ROWS * config.sharers
    tile = replace(config, ctas=parts, shared_tiles=1, workers=parts)
    waves = -(-config.workers * config.sharers // sm_count)
    return waves * linear_a8.cost(tile, config.tokens, rows, k, bits, promote, scale_bytes, sm_count)


def _parts(clocks: Callable[[int, int], float], steps: int, seen: Sequence[int], alike: float) -> int:
    """Return the fewest parts with about the least product of the times at a few numbers of tokens: each counts alike."""
    known = range(1, min(MAX_PARTS, steps) + 1)
    times = {parts: math.prod(clocks(parts, tokens) for tokens in seen) for parts in known}
    most = min(times.values()) * alike ** len(seen)
    return next(parts for parts in known if times[parts] <= most)


def plan_prefill(problem: Problem) -> Plan:
    """Plan the kernel for tokens of 16 bits, on an H200's clock; more tokens than a launch takes count as several."""
    spec, sm_count = problem.spec, max(problem.arch.sm_count, 1)
    variant = Variant.of(problem.dtype, spec.scale_dtype, spec.bits, problem.group_size, problem.k, not spec.symmetric)
    weight = (problem.n, problem.k, spec.bits)
    config, most = _prefill_choice(problem.m, *weight, variant.scale_bytes, sm_count)
    launches = -(-problem.m // most)
    return Plan(launches * _prefill_clocks(config, min(problem.m, most), *weight, sm_count) / 1750.0, str(config))


def plan_a8(problem: Problem) -> Plan:
    """Plan the kernel for 8-bit tokens, with quantizing them."""
    grouped, sm_count = problem.group_size != problem.k, max(problem.arch.sm_count, 1)
    promote = linear_a8.promotes(problem.activation, grouped)
    scale_bytes = 16 * problem.spec.scale_dtype.itemsize if grouped else 0
    weight = (problem.n, problem.k, problem.spec.bits, promote, scale_bytes, sm_count)
    config, most = _a8_choice(problem.m, *weight)
    clocks = -(-problem.m // most) * _a8_clocks(config, min(problem.m, most), *weight)
    return Plan(clocks / 1750.0 + linear_a8.quantize_us(problem), str(config))


@functools.lru_cache(maxsize=4096)
def _prefill_choice(m: int, n: int, k: int, bits: int, scale_bytes: int, sm_count: int) -> tuple[PrefillConfig, int]:
    """Return the cut of a launch, and how many tokens one takes."""
    most = tokens_at_once(n, _steps(k, bits, scale_bytes), 1)
    return prefill_config(min(m, most), n, k, bits, scale_bytes, sm_count), most


@functools.lru_cache(maxsize=4096)
def _a8_choice(
    m: int, n: int, k: int, bits: int, promote: bool, scale_bytes: int, sm_count: int
) -> tuple[A8Config, int]:
    parts = a8_parts(n, k, bits, promote, scale_bytes, sm_count)
    most = tokens_at_once(n, -(-k // linear_a8.STEP), parts)
    return a8_config(min(m, most), n, k, bits, promote, scale_bytes, sm_count), most


def prefill(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    transposed: bool = False,
    residual: Tensor | None = None,
    gated: bool = False,
    minimum: bool = False,
) -> Tensor:
    """Return :func:`lq_kernels.cuda.prefill_a16.linear`, batch-invariant; arguments and errors are those."""
    m, k = x.shape
    variant = Variant.of(x.dtype, scale.dtype, bits, group_size, k, zero is not None)
    rows = 2 * out_features if gated else out_features
    sizes = (rows, k, bits, variant.scale_bytes, Arch.of(x.device).sm_count)

    def multiply(part: Tensor, added: Tensor | None) -> Tensor:
        config, _ = _prefill_choice(part.shape[0], *sizes)
        return prefill_a16.linear(
            part,
            packed,
            scale,
            zero,
            bias,
            out_features,
            group_size,
            bits,
            config=config,
            transposed=transposed,
            residual=added,
            gated=gated,
            minimum=minimum,
        )

    _, most = _prefill_choice(m, *sizes)
    if m <= most:
        return multiply(x, residual)
    parts = torch.split(x, most)
    added = [None] * len(parts) if residual is None else torch.split(residual, most)
    return torch.cat([multiply(*each) for each in zip(parts, added, strict=True)], int(transposed))


def a8(
    codes: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    lowest: bool = True,
) -> Tensor:
    """Return :func:`lq_kernels.cuda.linear_a8.linear`, batch-invariant; arguments and errors are those."""
    m, k = codes.shape
    grouped = group_size != k
    promote = linear_a8.promotes("int8" if codes.dtype == torch.int8 else "fp8", grouped)
    bits = 4 if weight.dtype == torch.int32 else 8
    scale_bytes = 16 * scale.element_size() if grouped else 0
    sizes = (out_features, k, bits, promote, scale_bytes, Arch.of(codes.device).sm_count)

    def multiply(part: Tensor, part_scale: Tensor) -> Tensor:
        config, _ = _a8_choice(part.shape[0], *sizes)
        return linear_a8.linear(
            part, part_scale, weight, scale, bias, out_features, group_size, dtype, lowest=lowest, config=config
        )

    _, most = _a8_choice(m, *sizes)
    if m <= most:
        return multiply(codes, token_scale)
    parts = zip(torch.split(codes, most), torch.split(token_scale, most), strict=True)
    return torch.cat([multiply(part, part_scale) for part, part_scale in parts])

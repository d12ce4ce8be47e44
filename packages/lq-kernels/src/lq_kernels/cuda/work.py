"""What the persistent CTAs of a kernel share (``Work`` in ``lq/stream_k.cuh``), in numbers with which they need not divide.

A quotient takes a GPU some twenty instructions, one after the other, and leaves the registers that all lanes share; a CTA needs
up to seven before its first copy.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from lq_formats import ShapeError

from lq_kernels.tuned.lookup import Choice

_C = TypeVar("_C")

_BITS = 31
"""Of what is divided."""


@functools.lru_cache(maxsize=4096)
def work(rows: int, tokens: int, steps: int, raster: int, shared_tiles: int, workers: int) -> tuple[int, ...]:
    """Return the arguments, and :func:`divisor` of all that CTAs divide by, in the kernels' order.

    Args:
        rows: Row tiles, or pairs of them.
        tokens: Token tiles.
        steps: K steps of a tile.
        raster: Row tiles of a band.
        shared_tiles: Tiles whose K steps are shared.
        workers: CTAs that share them, or runs of K.

    Raises:
        ShapeError: If there are more tiles, or shared steps times workers, than 31 bits count.
    """
    units = shared_tiles * steps
    if max(rows * tokens, units * workers, steps * workers) >= 1 << _BITS:
        raise ShapeError(
            f"{rows} x {tokens} tiles of {steps} steps, {shared_tiles} of them for {workers} CTAs, are more than one launch "
            f"counts, {1 << _BITS}; split the tokens, or the weight"
        )
    last = (rows - 1) % raster + 1
    divided = tuple(divisor(max(each, 1)) for each in (steps, raster * tokens, raster, last, units, workers))
    return (rows, tokens, steps, raster, shared_tiles, workers, *divided)


def reordered(config: _C, tiles: tuple[int, int], heights: Iterable[int]) -> Iterator[_C]:
    """Yield a cut with other heights of bands, its ``raster``, which take the same tiles in another order.

    Args:
        config: A cut; one whose tiles are all taken at once (``ctas``) has no order.
        tiles: Row tiles, or pairs of them, and token tiles.
        heights: Which; those of more row tiles than there are stand for all of these.
    """
    cut: Any = config
    rows, tokens = tiles
    if rows * tokens > cut.ctas:
        for height in sorted({max(1, min(each, rows)) for each in heights} - {cut.raster}):
            yield replace(cut, raster=height)


def in_measured_order(chosen: Choice[_C], rows: int) -> Choice[_C]:
    """Return what was chosen with the order of tiles that was measured, if one was: a table's, as far as there are rows."""
    if chosen.measured is None:
        return chosen
    cut: Any = chosen.config
    height = dict(chosen.measured.point.cut).get("raster", cut.raster)
    return replace(chosen, config=replace(cut, raster=max(1, min(height, rows))))


def divisor(value: int) -> int:
    """Return ``p << 32 | f``, so that ``n // value == n * f >> p`` for all n below ``2**31``.

    f is ``2**p / value``, rounded up: it is too large by less than 1, and n times that by less than ``2**31``, which is at most
    ``2**p / value``'s last bit.

    Args:
        value: From 1 to ``2**31``.
    """
    shift = _BITS + (value - 1).bit_length()
    return shift << 32 | -(-(1 << shift) // value)

"""What the persistent CTAs of a kernel share (``Work`` in ``lq/stream_k.cuh``), in numbers with which they need not divide.

A quotient takes a GPU some twenty instructions, one after the other, and leaves the registers that all lanes share; a CTA needs
up to seven before its first copy.
"""

import functools

from lq_formats import ShapeError

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


def divisor(value: int) -> int:
    """Return ``p << 32 | f``, so that ``n // value == n * f >> p`` for all n below ``2**31``.

    f is ``2**p / value``, rounded up: it is too large by less than 1, and n times that by less than ``2**31``, which is at most
    ``2**p / value``'s last bit.

    Args:
        value: From 1 to ``2**31``.
    """
    shift = _BITS + (value - 1).bit_length()
    return shift << 32 | -(-(1 << shift) // value)

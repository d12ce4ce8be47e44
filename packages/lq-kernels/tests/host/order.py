"""Which pieces of a product persistent CTAs take, in which order: what ``Work`` of ``lq/stream_k.cuh`` yields."""

from collections.abc import Iterator
from typing import Any


def pieces(config: Any, rows: int, tokens: int, steps: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row tile, token tile, first K step, last) of every CTA in its order.

    Args:
        config: The cut.
        rows: Row tiles, or pairs of them.
        tokens: Token tiles.
        steps: K steps of a tile.
    """
    units = config.shared_tiles * steps
    for cta in range(config.ctas):
        mine = []
        if cta < config.workers:
            unit, stop = cta * units // config.workers, (cta + 1) * units // config.workers
            while unit < stop:
                tile = unit // steps
                end = min(stop - tile * steps, steps)
                mine.append((tile, unit - tile * steps, end))
                unit = tile * steps + end
        mine += [(tile, 0, steps) for tile in range(config.shared_tiles + cta, rows * tokens, config.ctas)]
        for tile, begin, end in mine:
            band, in_band = divmod(tile, config.raster * tokens)
            height = min(rows - band * config.raster, config.raster)
            token, row = divmod(in_band, height)
            yield band * config.raster + row, token, begin, end

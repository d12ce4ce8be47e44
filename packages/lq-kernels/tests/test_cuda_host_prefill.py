"""The prefill kernel, and the one that makes weights dense, without a GPU (see ``host/machine.py``)."""

from typing import Any, NamedTuple

import pytest
import torch
from cuda_host.cases import Case
from lq_kernels.cuda import prefill_a16
from lq_kernels.cuda.prefill_cuts import TALL, PrefillConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Product(NamedTuple):
    """A product, its cuts, and what the weight and its epilogue are."""

    m: int
    n: int
    k: int
    cuts: tuple[PrefillConfig, ...]
    options: dict[str, Any]


def whole(tokens, ctas, raster=2, **form):
    return PrefillConfig(tokens, ctas, raster, 0, 0, **form)


def shared(tokens, ctas, tiles, workers, raster=2, **form):
    """CTAs share the K steps of the first tiles."""
    return PrefillConfig(tokens, ctas, raster, tiles, workers, **form)


def halved(ctas, tiles, raster=2, tokens=128, parts=1, **form):
    """Pairs of CTAs share the first pairs of tiles, a row tile or a part of one each."""
    return PrefillConfig(tokens, ctas, raster, tiles, 2 * parts * tiles, multicast=True, split=True, **form)


PRODUCTS = {
    # Whole tiles, parts of tiles that begin anywhere, and both; K and rows that end within a step and a tile.
    "int4": Product(21, 200, 648, (whole(16, 3), shared(16, 4, 2, 3), shared(16, 4, 4, 4)), {}),
    "multicast": Product(
        70, 400, 384, (whole(64, 1, multicast=True), shared(64, 2, 3, 2, multicast=True)), {"zero": "zeros"}
    ),
    "halved": Product(200, 400, 512, (halved(2, 1), halved(4, 2), halved(1, 0)), {"bias": False}),
    "halved-odd": Product(140, 264, 256, (halved(4, 2), halved(8, 4)), {"zero": "zeros", "group": 32, "epilogue": "silu_mul"}),
    "halved-residual": Product(
        300, 200, 512, (halved(2, 1), halved(2, 1, wide=True)), {"epilogue": "residual", "bits": 8, "group": -1, "scale": FP32}
    ),
    "halved-transposed": Product(190, 272, 256, (halved(3, 1),), {"epilogue": "transposed", "bias": False}),
    "halved-parts": Product(200, 400, 1024, (halved(4, 1, parts=2), halved(8, 1, parts=4)), {}),
    "halved-192": Product(
        300, 264, 512, (halved(2, 1, tokens=192), halved(4, 1, tokens=192, parts=2)), {"epilogue": "residual"}
    ),
    "halved-256": Product(270, 264, 256, (halved(4, 2, tokens=256),), {"bits": 8, "group": -1, "scale": FP32, "bias": False}),
    "split": Product(
        40, 150, 648, (whole(32, 2, split=True), shared(32, 4, 2, 4, split=True)), {"epilogue": "residual"}
    ),
    "split-int8": Product(
        200, 150, 768, (whole(128, 2, split=True, wide=True), whole(128, 2, split=True)),
        {"bits": 8, "group": -1, "scale": FP32},
    ),
    "split-transposed": Product(45, 40, 384, (whole(32, 1, split=True),), {"epilogue": "transposed", "bias": False}),
    "runs": Product(50, 136, 640, (PrefillConfig(64, 2, 2, 0, 3),), {"group": 32, "zero": "zeros", "x": FP16, "scale": FP16}),
    "runs-multicast": Product(70, 264, 512, (PrefillConfig(64, 2, 2, 0, 2, multicast=True),), {"epilogue": "silu_mul"}),
    "aside": Product(200, 272, 256, (whole(192, 2), shared(192, 3, 2, 3)), {"group": 64}),
    "aside-odd": Product(30, 137, 256, (whole(192, 2),), {"group": 64}),
    "aside-residual": Product(
        70, 200, 256, (whole(192, 1, multicast=True),), {"epilogue": "residual", "bits": 8, "group": -1, "scale": FP32}
    ),
    "aside-96": Product(210, 264, 256, (whole(96, 1, multicast=True), shared(96, 2, 1, 2)), {"bias": False}),
    "aside-128": Product(200, 200, 256, (whole(128, 1), shared(128, 3, 2, 3)), {"epilogue": "silu_mul"}),
    "aside-112": Product(
        150, 272, 256, (whole(112, 1, wide=True, multicast=True),), {"bits": 8, "group": -1, "scale": FP32}
    ),
    "aside-128-residual": Product(
        140, 136, 256, (whole(128, 2),), {"epilogue": "residual", "bits": 8, "group": 64, "scale": FP16, "x": FP16}
    ),
    "256-tokens": Product(40, 264, 328, (whole(256, 2),), {"epilogue": "silu_mul"}),
    # Parts of tiles of more than 128 tokens: equal ones are added up in sections, and several are loaded ahead.
    "parts": Product(
        200, 136, 1024, (shared(192, 3, 1, 3), shared(192, 5, 1, 5), shared(192, 4, 2, 4), shared(192, 5, 3, 5)), {"group": 64}
    ),
    "parts-residual": Product(
        210, 137, 768, (shared(192, 3, 1, 3), shared(192, 4, 2, 4), shared(192, 4, 3, 4)), {"epilogue": "residual"}
    ),
    "parts-gated": Product(
        270, 264, 512, (shared(256, 4, 2, 4), shared(256, 3, 2, 3, multicast=True)),
        {"epilogue": "silu_mul", "bits": 8, "group": -1, "scale": FP32},
    ),
    "parts-176": Product(180, 200, 768, (shared(176, 4, 2, 4, multicast=True), shared(176, 3, 1, 3)), {"bias": False}),
    "tall": Product(66, 384, 384, (whole(64, 1, rows=TALL, multicast=True),), {}),
    "tall-int8": Product(
        130, 384, 256, (whole(128, 1, rows=TALL, split=True), whole(128, 1, rows=TALL, multicast=True)),
        {"bits": 8, "group": -1, "scale": FP32},
    ),
    "int8": Product(19, 140, 328, (whole(16, 2), shared(16, 3, 1, 2)), {"bits": 8, "group": -1, "scale": FP32}),
    "int8-wide": Product(
        35, 140, 328, (whole(32, 2, wide=True), shared(32, 3, 2, 3, wide=True)), {"bits": 8, "group": -1, "scale": FP32}
    ),
    "int8-groups": Product(17, 72, 256, (whole(16, 2),), {"bits": 8, "group": 32, "x": FP16, "scale": FP16}),
    "minima": Product(18, 72, 288, (whole(16, 2),), {"group": 32, "zero": "minima", "scale": FP16}),
    "rows-zeros": Product(9, 72, 264, (whole(16, 1),), {"group": -1, "zero": "zeros", "scale": FP32}),
    # Groups of three steps, of which parts begin with the second and the third.
    "long-groups": Product(
        20, 72, 1152, (whole(16, 1), shared(16, 4, 1, 4), shared(16, 7, 1, 7)), {"group": 384, "zero": "zeros"}
    ),
    "gated": Product(18, 104, 384, (whole(16, 2), shared(16, 3, 3, 3)), {"epilogue": "silu_mul", "group": 256}),
    # Two teams take steps by turns: several tiles each, odd numbers of steps, parts of one step.
    "teams": Product(
        37, 200, 648,
        (whole(16, 1, teams=2), whole(32, 2, teams=2), shared(16, 4, 4, 4, teams=2), shared(32, 12, 2, 12, teams=2)), {},
    ),
    "teams-odd": Product(
        20, 140, 328, (whole(16, 1, teams=2), whole(32, 1, teams=2)), {"epilogue": "residual", "group": 32, "zero": "zeros"}
    ),
    "teams-gated": Product(
        40, 136, 384, (whole(32, 1, teams=2), shared(16, 3, 2, 3, teams=2)), {"epilogue": "silu_mul", "x": FP16, "scale": FP16}
    ),
    "teams-transposed": Product(
        30, 136, 128, (whole(16, 1, teams=2),), {"epilogue": "transposed", "bias": False, "group": 32, "scale": FP16}
    ),
    # Sums of groups are scaled: of a step, of two and of half a one; parts begin within a group, and a team may have no step.
    "scaled": Product(
        37, 140, 648,
        (whole(16, 2), whole(32, 2, teams=2), shared(32, 12, 2, 12, teams=2), whole(64, 1, multicast=True)), {"zero": "zeros"},
    ),
    "scaled-long": Product(
        35, 140, 1152, (whole(32, 1, split=True), shared(16, 7, 3, 7), shared(64, 3, 1, 3, multicast=True)),
        {"zero": "zeros", "group": 256, "scale": FP32, "epilogue": "residual"},
    ),
    "scaled-short": Product(
        20, 72, 328, (whole(16, 1), whole(16, 2, teams=2), whole(32, 1, teams=2)),
        {"zero": "zeros", "group": 64, "x": FP16, "scale": FP16, "epilogue": "silu_mul"},
    ),
    "scaled-fp16": Product(
        20, 72, 392, (whole(32, 1, split=True), whole(16, 1, teams=2)), {"x": FP16, "scale": FP16, "epilogue": "transposed"}
    ),
}  # fmt: skip
SELDOM = (
    "halved-transposed",
    "halved-192",
    "parts-176",
    "parts-residual",
    "aside-96",
    "aside-112",
    "aside-128-residual",
)
"""What others have parts of: run with all cases."""


@pytest.mark.exhaustive(where=lambda product: any(product is PRODUCTS[name] for name in SELDOM))
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products(host, product):
    for config in product.cuts:
        case = Case.of_prefill(config, product.m, product.n, product.k, **product.options).guard(host.guard)
        host.seed = 0
        first = case.run(prefill_a16.linear, config)
        case.check(first)
        for host.seed in (1, 2):
            assert torch.equal(case.run(prefill_a16.linear, config), first)


def test_runs_have_the_bits_of_shared_tiles(host):
    case = Case(50, 136, 640, rounded=True).guard(host.guard)
    apart = case.run(prefill_a16.linear, shared(64, 4, 2, 4))
    case.check(apart)
    assert torch.equal(case.run(prefill_a16.linear, PrefillConfig(64, 2, 2, 0, 2)), apart)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("bits", "group", "zero"), [(4, 96, "zeros"), (4, 32, "minima"), (8, -1, "")], ids=["zeros", "minima", "int8"]
)
def test_the_dense_weight(host, bits, group, zero, dtype):
    case = Case(1, 50, 200 if group < 0 else 288, bits, group, scale=FP32, zero=zero)
    assert torch.equal(case.dequantized(dtype), case.w.float().to(dtype))

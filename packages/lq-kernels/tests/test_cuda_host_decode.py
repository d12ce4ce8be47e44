"""The decode kernel without a GPU (see ``host/machine.py``)."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cuda_host.cases import Case
from lq_kernels.cuda import decode_a16
from lq_kernels.cuda.decode_cuts import SHARED, Form, cut, sum_bytes

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def config(m, blocks, k, variant, form, cluster, clusters, stages=16):
    sums = sum_bytes(variant.scales)
    found = cut(m, blocks, k, variant.bits, variant.scale_bytes, form, cluster, clusters, SHARED[1], sums, stages)
    assert found is not None
    return found


@dataclass(frozen=True)
class Product:
    """A product, and cuts of it: CTAs of a cluster, clusters, and stages at most."""

    m: int
    n: int
    k: int
    form: Form
    cuts: tuple[tuple[int, int, int], ...]
    options: dict[str, Any] = field(default_factory=dict)


PRODUCTS = {
    # One tile of tokens and two; K that ends within a step; more stages than the ring has; passes with slots that stay empty.
    "int4": Product(7, 200, 648, Form(1, 1, 2), ((1, 2, 2), (2, 1, 2), (4, 1, 16))),
    "five-passes": Product(8, 600, 512, Form(1, 1, 2), ((2, 1, 4), (4, 1, 2))),
    "zeros": Product(11, 152, 1152, Form(2, 1, 2), ((1, 1, 2), (2, 3, 3)), {"zero": "zeros"}),
    "streamed": Product(7, 136, 1024, Form(1, 1, 2, True), ((1, 2, 2), (2, 1, 3), (4, 2, 16))),
    "streamed-pairs": Product(6, 500, 768, Form(1, 2, 2, True), ((1, 1, 2), (2, 2, 3)), {"group": 64}),
    "groups-of-32": Product(13, 72, 392, Form(2, 1, 2), ((1, 1, 2), (2, 1, 2)), {"group": 32, "scale": FP32, "x": FP16}),
    "groups-of-256": Product(3, 40, 1288, Form(1, 1, 3), ((1, 1, 3), (4, 1, 2)), {"group": 256, "epilogue": "residual"}),
    "sums-of-256": Product(2, 40, 768, Form(1, 2, 1), ((2, 1, 2),), {"group": 256, "scale": FP32, "zero": "zeros"}),
    "sums-of-64": Product(9, 88, 320, Form(2, 1, 2), ((1, 1, 2),), {"group": 64, "scale": FP32, "zero": "zeros"}),
    "minima": Product(12, 90, 416, Form(2, 1, 1), ((2, 1, 2),), {"group": 32, "scale": FP16, "zero": "minima"}),
    "rows-zeros": Product(4, 33, 520, Form(1, 1, 2), ((1, 1, 2), (4, 1, 2)), {"group": -1, "scale": FP32, "zero": "zeros"}),
    "gated": Product(5, 72, 384, Form(1, 1, 2), ((1, 2, 2), (2, 1, 2)), {"epilogue": "silu_mul"}),
    "int8": Product(10, 70, 456, Form(2, 1, 2), ((1, 1, 2), (2, 2, 2)), {"bits": 8, "group": -1, "scale": FP32}),
    "int8-groups": Product(1, 50, 256, Form(1, 1, 2), ((4, 1, 2),), {"bits": 8, "group": 32, "x": FP16, "scale": FP16}),
    "transposed": Product(3, 35, 264, Form(1, 2, 2), ((2, 1, 2),), {"epilogue": "transposed", "bias": False}),
}  # fmt: skip


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products(host, product):
    m, n, k = product.m, product.n, product.k
    case = Case(m, n, k, **product.options).guard(host.guard)
    for cluster, clusters, stages in product.cuts:
        how = config(m, case.blocks, k, case.variant, product.form, cluster, clusters, stages)
        host.seed = 0
        first = case.run(decode_a16.linear, how)
        case.check(first)
        for host.seed in (1, 2):
            assert torch.equal(case.run(decode_a16.linear, how), first)


def test_many_orders(host):
    # K ends within the one stage, the ring is shorter than the passes, and CTAs meet in a cluster.
    case = Case(8, 300, 136).guard(host.guard)
    for cluster, clusters in ((1, 3), (2, 1)):
        how = config(8, case.blocks, 136, case.variant, Form(1, 1, 2), cluster, clusters, 2)
        for host.seed in range(24):
            case.check(case.run(decode_a16.linear, how))


@pytest.mark.parametrize(("cluster", "stages", "seeds"), [(2, 4, (4, 33)), (4, 2, (10,))])
def test_lanes_that_send_nothing_do_not_fall_behind(host, cluster, stages, seeds):
    # With two tokens one lane in four sends, and a pass waits for the one before the last. In these orders of threads a lane
    # that does not send missed a phase, and waited for ever.
    case = Case(2, 600, 512).guard(host.guard)
    how = config(2, case.blocks, 512, case.variant, Form(1, 1, 2), cluster, 1, stages)
    for host.seed in seeds:
        case.check(case.run(decode_a16.linear, how))


def test_a_token_does_not_depend_on_the_others(host):
    case = Case(20, 40, 512).guard(host.guard)
    how = config(20, case.blocks, 512, case.variant, Form(1, 1, 2), 2, 1)
    whole = case.run(decode_a16.linear, how)  # three tiles
    case.check(whole)
    case.x = host.guard(case.x[9:12].clone())
    how = config(3, case.blocks, 512, case.variant, Form(1, 1, 2), 2, 1)
    assert torch.equal(case.run(decode_a16.linear, how), whole[9:12])

"""Decode of tokens that are quantized like Q8_1 blocks, without a GPU (see ``host/machine.py``)."""

import pytest
import torch
from cuda_host.cases import Case
from lq_formats import quantize_q8_1
from lq_formats.ggml import dequantize_q8_1
from lq_kernels.cuda import decode_a16
from lq_kernels.cuda.decode_cuts import SHARED, Form, cut
from lq_kernels.cuda.quantize_q8_1 import fragment_q8_1

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMS = (
    Form(1, 1, 2),
    Form(2, 1, 2),
    Form(1, 1, 2, True),
    Form(2, 1, 2, True),
    Form(1, 2, 2, True),
    Form(1, 1, 2, quantizes=True),
)


def config(m, blocks, k, variant, form, cluster, clusters, stages=16):
    found = cut(m, blocks, k, 4, variant.scale_bytes, form, cluster, clusters, SHARED[1], most_stages=stages, q8_1=True)
    assert found is not None
    return found


def tokens_of(m, k, dtype):
    x = torch.randn(m, k) * torch.tensor([1.0, 1e-4, 1e3]).repeat(m)[:m, None]
    x[-1, 40:44] = torch.tensor([0.5, -0.5, 3e4, -0.0])
    return x.to(dtype)


def in_order(blocks):
    """Return Q8_1 blocks ``(M, B, 36)`` in the order of int8 tokens, element by element."""
    m, count, _ = blocks.shape
    steps = -(-count // 4)
    q, d = torch.zeros(m, steps * 128, dtype=torch.uint8), torch.zeros(m, steps * 4)
    q[:, : count * 32] = blocks[..., 4:].reshape(m, -1)
    d[:, :count] = blocks[..., :2].contiguous().view(FP16)[..., 0].float()
    parts = []
    for tile in range(0, m, 8):
        for step in range(steps):
            here = q[tile : tile + 8, step * 128 : step * 128 + 128].reshape(-1, 2, 2, 2, 16)  # half, group, 16s
            for half in range(2):
                for token in here[:, half]:
                    for t in range(4):
                        parts.append(token[..., [2 * t, 2 * t + 8, 2 * t + 1, 2 * t + 9]].flatten())
            parts.append(d[tile : tile + 8, step * 4 : step * 4 + 4].contiguous().view(torch.uint8).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("m", "k"), [(1, 128), (3, 64), (9, 160), (17, 256)])
def test_codes_and_scales_are_those_of_the_blocks(host, m, k, dtype):
    torch.manual_seed(m)
    x = tokens_of(m, k, dtype)
    x[0, :32], x[-1, 32:64] = 0.0, 1e-42  # no inverse
    blocks = quantize_q8_1(x)
    expected = in_order(blocks)
    assert torch.equal(fragment_q8_1(host.guard(x)), expected)
    assert torch.equal(fragment_q8_1(host.guard(blocks)), expected)
    name = str(dtype).removeprefix("torch.")
    assert host.kernels == [f"fragment_q8_1_{name}", "fragment_q8_1_blocks"]


# x that passes by is whole steps.
PRODUCTS = [
    (form, m, k)
    for form in FORMS
    for m, k in ((1, 384), (3, 640 if form.streamed else 672), (8, 1152), (12, 256), (20, 640))
]


@pytest.mark.exhaustive(
    where=lambda form, m, k: (
        FORMS.index(form) % 2 if m == 12 else m != 3 and (m != 8 or form.streamed or form.token_tiles > 1)
    )
)
@pytest.mark.parametrize(("form", "m", "k"), PRODUCTS)
def test_products_are_those_of_the_blocks(host, m, k, form):
    torch.manual_seed(m)
    dtype = (BF16, FP16, FP32)[m % 3]
    case = Case(m, 200, k, group=32, scale=FP16, epilogue="transposed", bias=False).guard(host.guard)
    x = host.guard(tokens_of(m, k, dtype))
    blocks = host.guard(quantize_q8_1(x))
    exact = case.w @ dequantize_q8_1(blocks).double().view(m, k).T
    for cluster, clusters, stages in ((1, 2, 2), (2, 1, 3), (2, 3, 16)):
        how = config(m, case.blocks, k, case.variant, form, cluster, clusters, stages)

        def run(x, how=how):
            return decode_a16.linear_q8_1(x, case.packed, case.scales, 200, how)

        host.seed = 0
        first = run(x)
        for column in range(m):
            assert float((first[:, column].double() - exact[:, column]).norm() / exact[:, column].norm()) < 1e-6
        for host.seed in (1, 2):
            assert torch.equal(run(x), first)
        if not form.quantizes:
            assert torch.equal(run(blocks), first)


def test_what_is_not_finite_stays_so(host):
    m, k = 3, 256
    case = Case(m, 40, k, group=32, scale=FP16, epilogue="transposed", bias=False).guard(host.guard)
    x = torch.randn(m, k)
    x[0, 5], x[1, 200] = float("nan"), -float("inf")
    for form in (Form(1, 1, 2), Form(1, 1, 2, quantizes=True)):
        how = config(m, case.blocks, k, case.variant, form, 1, 1)
        for dtype in (BF16, FP16, FP32):
            y = decode_a16.linear_q8_1(host.guard(x.to(dtype)), case.packed, case.scales, 40, how)
            assert not y[:, :2].isfinite().any()
            assert y[:, 2].isfinite().all()

"""Forward mode and the transforms of torch.func: every product has the derivatives of the dequantized weight's."""

import pytest
import torch
from lq_formats import UnsupportedError, ggml_format, pack_int4
from lq_formats.layouts import FRAGMENT_INT4, ggml_planes
from lq_kernels import (
    ggml_linear,
    int4_dynamic_linear,
    int4_linear,
    int8_dynamic_linear,
    int8_gemm,
    interleave_rows,
    minima_linear,
    pack_int4_dynamic,
    preshuffle_int4,
    preshuffled_gated_linear,
    preshuffled_linear,
    q4_0_linear,
    quantize_gemm_q4_0_q8_1,
)
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812

M, N, K, GROUP = 3, 16, 64, 32


pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def int4():
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    scale = torch.rand(N, K // GROUP) + 0.5
    return codes, scale, (codes.double() - 8) * scale.double().repeat_interleave(GROUP, 1)


def make(kind):
    """Return a function of activations and a bias, and the float64 function that it stands for."""
    codes, scale, w = int4()
    packed = pack_int4(codes)
    sizes = {"group_size": GROUP, "out_features": N}

    def dense(x, bias):
        return F.linear(x, w, bias)

    if kind == "int4":
        return lambda x, bias: int4_linear(x, packed, scale, group_size=GROUP, bias=bias), dense
    if kind in ("preshuffled", "residual"):
        arranged = preshuffle_int4(packed, scale, group_size=GROUP, in_features=K)
        if kind == "preshuffled":
            return lambda x, bias: preshuffled_linear(x, *arranged, bits=4, bias=bias, **sizes), dense
        return (
            lambda x, bias: preshuffled_linear(x, *arranged, bits=4, bias=bias, residual=x[:, :N] * 2, **sizes),
            lambda x, bias: dense(x, bias) + x[:, :N] * 2,
        )
    if kind == "gated":
        rows = [interleave_rows(each) for each in (packed, scale)]
        arranged = preshuffle_int4(*rows, group_size=GROUP, in_features=K)

        def gated(x, bias):
            half = None if bias is None else bias[:N]
            sizes = {"group_size": GROUP, "out_features": N // 2}
            return preshuffled_gated_linear(x, *arranged, bits=4, bias=half, **sizes)

        def silu(x, bias):
            gate, up = dense(x, bias).chunk(2, -1)
            return F.silu(gate) * up

        return gated, silu
    if kind == "minima":
        minimum = torch.randn(N, K // GROUP)
        arranged = [FRAGMENT_INT4.arrange_scales(each, K, GROUP) for each in (scale, minimum)]
        w = codes.double() * scale.double().repeat_interleave(GROUP, 1) + minimum.repeat_interleave(GROUP, 1).double()
        return lambda x, bias: minima_linear(x, FRAGMENT_INT4.pack(codes), *arranged, bias=bias, **sizes), dense
    if kind == "int4-dynamic":
        packed, arranged, _ = pack_int4_dynamic(packed, scale, group_size=GROUP, in_features=K, activation="int8")
        return lambda x, bias: int4_dynamic_linear(x, packed, arranged, bias, activation="int8", **sizes), dense
    if kind in ("int8", "int8-dynamic"):
        q, row = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N) + 0.5
        w = q.double() * row.double()[:, None]
        product = int8_gemm if kind == "int8" else int8_dynamic_linear
        return lambda x, bias: product(x, q, row, bias), dense
    form = ggml_format("q8_0" if kind == "ggml" else "q4_0")
    blocks = form.quantize(torch.randn(N, K))
    w = form.dequantize(blocks, torch.float64)
    if kind == "ggml":
        planes = ggml_planes(form.name).pack(blocks)
        return lambda x, bias: ggml_linear(x, planes, ggml_type=form.name, bias=bias), dense
    if kind == "q4_0":
        return lambda x, bias: q4_0_linear(x, blocks, bias=bias), dense
    return lambda x, bias: quantize_gemm_q4_0_q8_1(blocks, x).t() + bias, dense


KINDS = ["int4", "int8", "preshuffled", "residual", "gated", "minima", "int4-dynamic", "int8-dynamic", "ggml", "q4_0"]
KINDS += ["quantize-gemm"]
ROUNDED = ("int4-dynamic", "int8-dynamic", "q4_0", "quantize-gemm")
"""Where x is rounded, on the way to the value and straight through in derivatives."""


def near(found, expected, bound=1e-5):
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_in_every_mode_are_those_of_the_dequantized_weight(kind):
    call, dense = make(kind)
    x, tangent, bias, of_bias = torch.randn(M, K), torch.randn(M, K), torch.randn(N), torch.randn(N)
    plain = call(x, bias)  # it is known from here on
    assert torch.equal(call(x, bias), plain)
    wide = tuple(each.double() for each in (x, bias, tangent, of_bias))
    value, expected = torch.func.jvp(dense, wide[:2], wide[2:])
    near(plain, value, 0.05 if kind in ROUNDED else 1e-5)

    found = torch.func.jvp(call, (x, bias), (tangent, of_bias))
    assert torch.equal(found[0], plain)
    near(found[1], expected)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            pair = forward_ad.make_dual(x, tangent), forward_ad.make_dual(bias, of_bias)
            found = forward_ad.unpack_dual(call(*pair))
            assert torch.equal(found.primal, plain)
            near(found.tangent, expected)
            assert forward_ad.unpack_dual(call(x, bias)).tangent is None
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        near(jacobian(call)(x, bias), torch.func.jacfwd(dense)(*wide[:2]))
    wants = x.clone().requires_grad_()
    expected = torch.func.jvp(lambda x: dense(x, wide[1]), wide[:1], wide[2:3])[1]
    with forward_ad.dual_level():
        y = call(forward_ad.make_dual(wants, tangent), bias)
        near(forward_ad.unpack_dual(y).tangent, expected)
        y.sum().backward()
    near(wants.grad, torch.func.grad(lambda x: dense(x, wide[1]).sum())(wide[0]))
    near(torch.func.grad(lambda x: call(x, bias).sum())(x), wants.grad.double())


@pytest.mark.parametrize("kind", ["int4", "preshuffled", "gated", "ggml"])
def test_transforms_are_nested(kind):
    call, dense = make(kind)
    x, bias = torch.randn(1, K), torch.randn(N)
    found = torch.func.hessian(lambda x: (call(x, bias) / 100).square().sum())(x)
    near(found, torch.func.hessian(lambda x: (dense(x, bias.double()) / 100).square().sum())(x.double()), 1e-3)
    x = torch.randn(4, 1, K)
    found = torch.func.vmap(torch.func.grad(lambda x: call(x, bias).sum()))(x)
    near(found, torch.func.vmap(torch.func.grad(lambda x: dense(x, bias.double()).sum()))(x.double()))
    assert torch.equal(torch.func.vmap(lambda x: call(x, None))(x), torch.stack([call(each, None) for each in x]))


def test_operators_refuse_tangents():
    q, row, x = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N), torch.randn(M, K)
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), x)
            with pytest.raises(UnsupportedError, match="lq::int8_linear has no forward-mode derivative"):
                torch.ops.lq.int8_linear(dual, q, row, "")
            assert torch.ops.lq.int8_linear(x, q, row, "").shape == (M, N)
    with pytest.raises(UnsupportedError, match="lq::int8_linear has no forward-mode derivative"):
        torch.func.jvp(lambda x: torch.ops.lq.int8_linear(x, q, row, ""), (x,), (x,))

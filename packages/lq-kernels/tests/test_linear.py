"""Bad input gets a named error; compiled graphs take any number of tokens; importing is free."""

import subprocess
import sys

import pytest
import torch
from lq_formats import DeviceError, DTypeError, GroupSizeError, ShapeError, pack_int4
from lq_kernels import (
    gemm_q4_0_q8_1,
    int4_dequantize,
    int4_linear,
    int8_gemm,
    matmul_bf16_i4,
    q4_0_linear,
    quantize_activation_q8_1,
)

N, K, GROUP = 16, 64, 32
X = torch.randn(2, K)
Q = pack_int4(torch.randint(0, 16, (N, K), dtype=torch.uint8))
S = torch.rand(N, K // GROUP)
W8 = torch.randint(-128, 128, (N, K), dtype=torch.int8)
S8 = torch.rand(N)
W4 = torch.zeros(N, 2, 18, dtype=torch.uint8)
A8 = torch.zeros(3, 2, 36, dtype=torch.uint8)


def i4(x=X, q=Q, s=S, z=None, group_size=GROUP, **options):
    return int4_linear(x, q, s, z, group_size=group_size, **options)


BAD = {
    "int4-x-dtype": (lambda: i4(x=X.double()), DTypeError, "x has dtype torch.float64"),
    "int4-x-rank": (lambda: i4(x=torch.tensor(1.0)), ShapeError, r"x has shape \(\)"),
    "int4-x-no-in-features": (lambda: i4(x=X[:, :0]), ShapeError, r"x has shape \(2, 0\)"),
    "int4-k-mismatch": (lambda: i4(x=X[:, :40]), ShapeError, r"64 in features.*have 40"),
    "int4-q-dtype": (lambda: i4(q=Q.long()), DTypeError, "qweight has dtype torch.int64: expected int32"),
    "int4-q-rank": (lambda: i4(q=Q[0]), ShapeError, r"qweight has shape \(8,\)"),
    "int4-group-does-not-divide": (lambda: i4(group_size=24), GroupSizeError, "group_size=24 does not divide the 64"),
    "int4-group-zero": (lambda: i4(group_size=0), GroupSizeError, "group_size=0"),
    "int4-group-small": (lambda: i4(group_size=4), GroupSizeError, "at least 8"),
    "int4-group-float": (lambda: i4(group_size=32.0), GroupSizeError, "expected an integer"),
    "int4-scale-shape": (lambda: i4(s=S[:, :1]), ShapeError, r"scale has shape \(16, 1\): expected \(16, 2\)"),
    "int4-scale-dtype": (lambda: i4(s=S.double()), DTypeError, "scale has dtype torch.float64"),
    "int4-zero-shape": (lambda: i4(z=S[:1]), ShapeError, "zero has shape"),
    "int4-zero-dtype": (lambda: i4(z=S.long()), DTypeError, "zero has dtype torch.int64"),
    "int4-device": (lambda: i4(q=Q.to("meta")), DeviceError, "qweight is on meta"),
    "int4-bias-shape": (lambda: i4(bias=torch.zeros(3)), ShapeError, r"bias has shape \(3,\): expected \(16,\)"),
    "int4-bias-dtype": (lambda: i4(bias=torch.zeros(N).half()), DTypeError, "bias has dtype torch.float16"),
    "int4-dequantize-k": (
        lambda: int4_dequantize(Q, S, group_size=GROUP, in_features=96),
        ShapeError,
        "64 in features.*have 96",
    ),
    "i4-pack8-int8-rank": (lambda: matmul_bf16_i4(X, Q.view(torch.int8)[0], S, GROUP), ShapeError, "packed has shape"),
    "i4-pack8-dtype": (lambda: matmul_bf16_i4(X, Q.view(torch.uint8), S, GROUP), DTypeError, "torch.uint8"),
    "int8-weight-dtype": (lambda: int8_gemm(X, W8.int(), S8), DTypeError, "weight has dtype torch.int32"),
    "int8-k-mismatch": (lambda: int8_gemm(X[:, :40], W8, S8), ShapeError, r"\(16, 64\): x with 40 in features"),
    "int8-scale-shape": (lambda: int8_gemm(X, W8, S8[:3]), ShapeError, r"scale has shape \(3,\)"),
    "int8-scale-dtype": (lambda: int8_gemm(X, W8, S8.double()), DTypeError, "scale has dtype"),
    "int8-device": (lambda: int8_gemm(X, W8, S8.to("meta")), DeviceError, "scale is on meta"),
    "q4_0-negative": (lambda: gemm_q4_0_q8_1(W4, A8, -N, 3, K), ShapeError, "M=-16"),
    "q4_0-k-not-32": (lambda: gemm_q4_0_q8_1(W4, A8, N, 3, 48), ShapeError, "multiple of 32"),
    "q4_0-k-zero": (lambda: gemm_q4_0_q8_1(W4, A8, N, 3, 0), ShapeError, "multiple of 32"),
    "q4_0-float-size": (lambda: gemm_q4_0_q8_1(W4, A8, 16.0, 3, K), ShapeError, "expected integers"),
    "q4_0-truncated": (lambda: gemm_q4_0_q8_1(W4[:-1], A8, N, 3, K), ShapeError, "weight_q has 540 bytes.*need 576"),
    "q4_0-oversized": (lambda: gemm_q4_0_q8_1(W4, A8, N, 2, K), ShapeError, "activation_q has 216 bytes.*need 144"),
    "q4_0-huge": (lambda: gemm_q4_0_q8_1(W4, A8, 2**60, 2**60, K), ShapeError, "weight_q has 576 bytes"),
    "q4_0-dtype": (lambda: gemm_q4_0_q8_1(W4.char(), A8, N, 3, K), DTypeError, "weight_q has dtype torch.int8"),
    "q4_0-device": (lambda: gemm_q4_0_q8_1(W4, A8.to("meta"), N, 3, K), DeviceError, "activation_q is on meta"),
    "q4_0-linear-k": (lambda: q4_0_linear(X[:, :32], W4), ShapeError, r"weight_q has shape \(16, 2, 18\): x with 32"),
    "q4_0-linear-dtype": (lambda: q4_0_linear(X, W4.char()), DTypeError, "weight_q has dtype"),
    "q8_1-k": (lambda: quantize_activation_q8_1(X[:, :40]), ShapeError, "x has 40 in features"),
    "q8_1-dtype": (lambda: quantize_activation_q8_1(X.int()), DTypeError, "x has dtype torch.int32"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


LINEARS = {
    "int4": (lambda x: int4_linear(x, Q, S, group_size=GROUP), "int4_linear"),
    "int8": (lambda x: int8_gemm(x, W8, S8), "int8_linear"),
    "q4_0": (lambda x: q4_0_linear(x, W4), None),
}


@pytest.mark.parametrize("name", LINEARS)
def test_no_tokens_have_an_empty_result_and_an_empty_gradient(name):
    x = torch.empty(0, K, requires_grad=True)
    y = LINEARS[name][0](x)
    assert y.shape == (0, N)
    assert y.dtype == x.dtype
    y.sum().backward()
    assert x.grad.shape == (0, K)


@pytest.mark.parametrize("name", LINEARS)
def test_one_compiled_graph_takes_any_number_of_tokens(name):
    linear = LINEARS[name][0]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(linear, fullgraph=True, backend=backend)
    for m in (7, 2, 3, 100):
        x = torch.randn(m, K)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), linear(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("kernel", ["aten-cpu", "dequant-blas", "reference"])
def test_results_share_no_memory_with_arguments(kernel):
    inputs = {t.untyped_storage().data_ptr() for t in (X, Q, S, W8, S8)}
    for y in (i4(kernel=kernel), int8_gemm(X, W8, S8, kernel=kernel)):
        assert y.untyped_storage().data_ptr() not in inputs


def test_scales_get_no_gradient_and_activations_do():
    scale = S.clone().requires_grad_()
    x = X.clone().requires_grad_()
    i4(x=x, s=scale).sum().backward()
    assert scale.grad is None
    dense = int4_dequantize(Q, S, group_size=GROUP, in_features=K)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, K))


def test_importing_loads_no_compiler_and_starts_no_gpu():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import lq_kernels, lq_kernels.catalog\n"
        "lazy = {'triton.language', 'cuda.bindings', 'gemlite', 'transformers', 'gguf'}\n"
        "loaded = lazy & (set(sys.modules) - before)\n"
        "late = [m for m in sys.modules if m in ('lq_kernels.triton.int4', 'lq_kernels.triton.int8', 'lq_kernels.jit')]\n"
        "assert not late, late\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

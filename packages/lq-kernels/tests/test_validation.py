"""Bad arguments that test_linear.py does not try: every tensor's rank, size and device, and sizes that are no sizes."""

import pytest
import torch
from lq_formats import DeviceError, DTypeError, GroupSizeError, LQError, NoKernelError, ShapeError, SpecError, pack_int4
from lq_kernels import (
    gemm_q4_0_q8_1,
    int4_dequantize,
    int4_linear,
    int8_gemm,
    int8_gemm_torch,
    matmul_bf16_i4,
    minima_linear,
    preshuffle_int4,
    preshuffle_int8,
    preshuffled_dequantize,
    preshuffled_linear,
    q4_0_linear,
    quantize_activation_q8_1,
    quantize_gemm_q4_0_q8_1,
    quantize_tokens,
    restore_int4,
    restore_int8,
)
from lq_kernels.gated import interleaved_rows

N, K, GROUP = 16, 64, 32
X = torch.randn(2, K)
Q = pack_int4(torch.randint(0, 16, (N, K), dtype=torch.uint8))
S = torch.rand(N, K // GROUP)
Z = torch.full((N, K // GROUP), 8, dtype=torch.uint8)
W8 = torch.randint(-128, 128, (N, K), dtype=torch.int8)
S8 = torch.rand(N)
W4 = torch.zeros(N, 2, 18, dtype=torch.uint8)
A8 = torch.zeros(3, 2, 36, dtype=torch.uint8)
FRAGMENTS = preshuffle_int4(Q, S, group_size=GROUP, in_features=K)


def meta(tensor):
    return tensor.to("meta")


def i4(x=X, q=Q, s=S, z=None, group_size=GROUP, **options):
    return int4_linear(x, q, s, z, group_size=group_size, **options)


def dense(q=Q, s=S, z=None, group_size=GROUP, in_features=K, **options):
    return int4_dequantize(q, s, z, group_size=group_size, in_features=in_features, **options)


def preshuffled(group_size):
    return preshuffled_linear(X, *FRAGMENTS, bits=4, group_size=group_size, out_features=N)


def restore(group_size):
    return restore_int4(*FRAGMENTS, group_size=group_size, out_features=N, in_features=K)


MINIMA = (FRAGMENTS[0], FRAGMENTS[1], torch.zeros_like(FRAGMENTS[1]))


BAD = {
    **{
        f"out-features-{size!r}": (
            lambda size=size: preshuffled_linear(X, *FRAGMENTS, bits=4, group_size=GROUP, out_features=size),
            ShapeError,
            f"out_features={size!r}: expected an integer",
        )
        for size in (32.0, "32", None, True, -16)
    },
    "in-features-none": (
        lambda: preshuffle_int4(Q, S, group_size=GROUP, in_features=None),
        ShapeError,
        "in_features=None: expected an integer",
    ),
    "restore-out-features": (
        lambda: restore_int4(*FRAGMENTS, group_size=GROUP, out_features=None, in_features=K),
        ShapeError,
        "out_features=None",
    ),
    "restore-int8-in-features": (
        lambda: restore_int8(*preshuffle_int8(W8, S8), out_features=N, in_features="64"),
        ShapeError,
        "in_features='64'",
    ),
    "minima-group": (
        lambda: minima_linear(X, *MINIMA, group_size="32", out_features=N),
        GroupSizeError,
        "group_size='32': expected an integer",
    ),
    "interleaved-rows": (lambda: interleaved_rows(1.5), ShapeError, "out_features=1.5: expected an integer"),
    "dequantize-to-text": (lambda: dense(dtype="float16"), DTypeError, "dtype=float16: expected float16"),
    "fragments-to-text": (
        lambda: preshuffled_dequantize(
            *FRAGMENTS, bits=4, group_size=GROUP, out_features=N, in_features=K, dtype="float16"
        ),
        DTypeError,
        "dtype=float16: expected float16",
    ),
    "matmul-none": (lambda: matmul_bf16_i4(X, None, S, GROUP), DTypeError, "packed is of type NoneType"),
    "matmul-list": (lambda: matmul_bf16_i4([1.0], Q, S, GROUP), DTypeError, "x is of type list"),
    "int4-scale-device": (lambda: i4(s=meta(S)), DeviceError, "scale is on meta and the other tensors on cpu"),
    "int4-zero-device": (lambda: i4(z=meta(Z)), DeviceError, "zero is on meta"),
    "int4-bias-device": (lambda: i4(bias=meta(S8)), DeviceError, "bias is on meta"),
    "int4-x-device": (lambda: i4(x=meta(X)), DeviceError, "qweight is on cpu and the other tensors on meta"),
    "int4-x-integer": (lambda: i4(x=X.int()), DTypeError, "torch.int32: expected float16, bfloat16 or float32"),
    "int4-q-too-wide": (lambda: i4(q=torch.cat([Q, Q], 1)), ShapeError, r"\(16, 16\).*expected \(N, 8\)"),
    "int4-scale-rank": (lambda: i4(s=S[:, :1].squeeze(1)), ShapeError, r"scale has shape \(16,\): expected \(16, 2\)"),
    "int4-scale-transposed": (lambda: i4(s=S.t()), ShapeError, r"scale has shape \(2, 16\): expected \(16, 2\)"),
    "int4-zero-other-float": (lambda: i4(z=S.half()), DTypeError, "zero has dtype torch.float16.*torch.float32"),
    "int4-group-negative": (lambda: i4(group_size=-1), GroupSizeError, "group_size=-1 does not divide the 64"),
    "int4-group-above-k": (lambda: i4(group_size=128), GroupSizeError, "group_size=128 does not divide the 64"),
    "int4-unknown-kernel": (lambda: i4(kernel="fastest"), NoKernelError, "fastest: there is no such kernel"),
    "int4-kernel-of-a-gpu": (lambda: i4(kernel="triton-gemv"), NoKernelError, "triton-gemv: needs a GPU"),
    "dequantize-scale-device": (lambda: dense(s=meta(S)), DeviceError, "scale is on meta"),
    "dequantize-zero-device": (lambda: dense(z=meta(Z)), DeviceError, "zero is on meta"),
    "dequantize-negative-k": (lambda: dense(in_features=-K), ShapeError, "in_features=-64: expected a positive"),
    "dequantize-no-k": (lambda: dense(in_features=0), ShapeError, "in_features=0: expected a positive"),
    "dequantize-float-k": (lambda: dense(in_features=64.0), ShapeError, "in_features=64.0: expected a positive"),
    "dequantize-dtype": (lambda: dense(dtype=torch.int8), DTypeError, "torch.int8: expected float16"),
    "i4-pack8-k-not-8": (
        lambda: matmul_bf16_i4(X[:, :60], Q.view(torch.int8)[:, :30], S, 60),
        ShapeError,
        r"packed has shape \(16, 30\) int8: expected \(N, K // 2\) with K divisible by 8",
    ),
    "i4-pack8-row-scales": (lambda: matmul_bf16_i4(X, Q, S, -1), ShapeError, r"expected \(16, 1\) for group_size=64"),
    "i4-pack8-default-group": (
        lambda: matmul_bf16_i4(X, Q, S),
        GroupSizeError,
        "group_size=256 does not divide the 64",
    ),
    "i4-pack8-no-rank": (lambda: matmul_bf16_i4(torch.tensor(1.0), Q, S, -1), ShapeError, r"x has shape \(\)"),
    "int8-weight-rank": (lambda: int8_gemm(X, W8[0], S8), ShapeError, r"weight has shape \(64,\).*needs \(N, 64\)"),
    "int8-scale-column": (lambda: int8_gemm(X, W8, S8[:, None]), ShapeError, r"expected \(16,\) per row or \(\) per"),
    "int8-x-dtype": (lambda: int8_gemm(X.double(), W8, S8), DTypeError, "x has dtype torch.float64"),
    "int8-bias-shape": (lambda: int8_gemm(X, W8, S8, S8[:3]), ShapeError, r"bias has shape \(3,\): expected \(16,\)"),
    "int8-bias-dtype": (lambda: int8_gemm(X, W8, S8, S8.half()), DTypeError, "bias has dtype torch.float16 and x"),
    "int8-bias-device": (lambda: int8_gemm(X, W8, S8, meta(S8)), DeviceError, "bias is on meta"),
    "int8-weight-device": (lambda: int8_gemm(X, meta(W8), S8), DeviceError, "weight is on meta"),
    "int8-unknown-kernel": (lambda: int8_gemm(X, W8, S8, kernel="cuda-mma"), NoKernelError, "no such kernel"),
    "reference-x-dtype": (lambda: int8_gemm_torch(X.int(), W8, S8), DTypeError, "x has dtype torch.int32"),
    "reference-x-rank": (lambda: int8_gemm_torch(torch.tensor(1.0), W8, S8), ShapeError, r"x has shape \(\)"),
    "reference-x-k": (lambda: int8_gemm_torch(X[:, :60], W8, S8), ShapeError, r"\(2, 60\).*needs \(\.\.\., 64\)"),
    "reference-x-device": (lambda: int8_gemm_torch(meta(X), W8, S8), DeviceError, "x is on meta and weight on cpu"),
    "reference-weight-rank": (lambda: int8_gemm_torch(X, W8[0], S8), ShapeError, r"weight has shape \(64,\)"),
    "reference-weight-dtype": (lambda: int8_gemm_torch(X, W8.float(), S8), DTypeError, "float32: expected int8"),
    "reference-scale-shape": (lambda: int8_gemm_torch(X, W8, S8[:3]), ShapeError, r"scale has shape \(3,\)"),
    "reference-scale-device": (lambda: int8_gemm_torch(X, W8, meta(S8)), DeviceError, "scale is on meta"),
    "reference-bias-shape": (lambda: int8_gemm_torch(X, W8, S8, S8[:3]), ShapeError, r"bias has shape \(3,\)"),
    "reference-bias-dtype": (lambda: int8_gemm_torch(X, W8, S8, S8.int()), DTypeError, "bias has dtype torch.int32"),
    "reference-bias-device": (lambda: int8_gemm_torch(X, W8, S8, meta(S8)), DeviceError, "bias is on meta"),
    "q4_0-boolean-rows": (lambda: gemm_q4_0_q8_1(W4, A8, True, 3, K), ShapeError, "M=True.*expected integers"),
    "q4_0-boolean-tokens": (lambda: gemm_q4_0_q8_1(W4, A8, N, False, K), ShapeError, "N=False.*expected integers"),
    "q4_0-float-k": (lambda: gemm_q4_0_q8_1(W4, A8, N, 3, 64.0), ShapeError, r"K=64\.0: expected integers"),
    "q4_0-negative-tokens": (lambda: gemm_q4_0_q8_1(W4, A8, N, -3, K), ShapeError, "N=-3.*expected M, N >= 0"),
    "q4_0-negative-k": (lambda: gemm_q4_0_q8_1(W4, A8, N, 3, -K), ShapeError, "K=-64.*positive multiple of 32"),
    "q4_0-sizes-swapped": (lambda: gemm_q4_0_q8_1(W4, A8, 3, N, K), ShapeError, "weight_q has 576 bytes.*need 108"),
    "q4_0-operands-swapped": (lambda: gemm_q4_0_q8_1(A8, W4, N, 3, K), ShapeError, "weight_q has 216 bytes"),
    "q4_0-activation-dtype": (lambda: gemm_q4_0_q8_1(W4, A8.float(), N, 3, K), DTypeError, "activation_q has dtype"),
    "q4_0-unknown-kernel": (
        lambda: gemm_q4_0_q8_1(W4, A8, N, 3, K, kernel="aten-cpu"),
        NoKernelError,
        "no such kernel",
    ),
    "q4_0-linear-rank": (lambda: q4_0_linear(X, W4[0]), ShapeError, r"weight_q has shape \(2, 18\)"),
    "q4_0-linear-k-not-32": (lambda: q4_0_linear(X[:, :40], W4), ShapeError, "x with 40 in features"),
    "q4_0-linear-block-size": (lambda: q4_0_linear(X, A8), ShapeError, r"weight_q has shape \(3, 2, 36\)"),
    "q4_0-linear-device": (lambda: q4_0_linear(X, meta(W4)), DeviceError, "weight_q is on meta"),
    "q4_0-linear-bias-shape": (lambda: q4_0_linear(X, W4, bias=S8[:3]), ShapeError, r"expected \(16,\)"),
    "q4_0-linear-bias-dtype": (lambda: q4_0_linear(X, W4, bias=S8.half()), DTypeError, "bias has dtype torch.float16"),
    "q4_0-linear-bias-device": (lambda: q4_0_linear(X, W4, bias=meta(S8)), DeviceError, "bias is on meta"),
    "in-one-call-double": (lambda: quantize_gemm_q4_0_q8_1(W4, X.double()), DTypeError, "x has dtype torch.float64"),
    "in-one-call-swapped": (lambda: quantize_gemm_q4_0_q8_1(X, W4), DTypeError, "x has dtype torch.uint8"),
    "in-one-call-k": (lambda: quantize_gemm_q4_0_q8_1(W4, X[:, :32]), ShapeError, "x with 32 in features needs"),
    "kernel-number": (lambda: i4(kernel=5), SpecError, "kernel=5: expected the name of a kernel"),
    "kernel-zero": (lambda: int8_gemm(X, W8, S8, kernel=0), SpecError, "kernel=0: expected the name"),
    "preshuffled-group-zero": (lambda: preshuffled(0), GroupSizeError, "group_size=0 does not divide the 64"),
    "preshuffled-group-negative": (lambda: preshuffled(-1), GroupSizeError, "group_size=-1 does not divide the 64"),
    "preshuffled-group-48": (lambda: preshuffled(48), GroupSizeError, "group_size=48 does not divide the 64"),
    "preshuffled-group-float": (lambda: preshuffled(32.0), GroupSizeError, "group_size=32.0: expected an integer"),
    "restore-group-zero": (lambda: restore(0), GroupSizeError, "group_size=0 does not divide the 64"),
    "restore-group-string": (lambda: restore("32"), GroupSizeError, "group_size='32': expected"),
    "preshuffle-int8-integer-scale": (lambda: preshuffle_int8(W8, S8.int()), DTypeError, "scale has dtype torch.int32"),
    "preshuffle-int8-double-scale": (
        lambda: preshuffle_int8(W8, S8.double()),
        DTypeError,
        "torch.float64: expected float16, bfloat16 or float32",
    ),
    "preshuffle-int8-float": (lambda: preshuffle_int8(X, S8), DTypeError, "float32: expected int8"),
    "preshuffle-int8-rank": (lambda: preshuffle_int8(W8[0], S8), ShapeError, r"weight has shape \(64,\)"),
    "tokens-list": (lambda: quantize_tokens(X, []), SpecError, r"activation=\[\]: expected 'int8' or 'fp8'"),
    "tokens-none": (lambda: quantize_tokens(X, None), SpecError, "activation=None: expected"),
    "int8-dequantize-int8": (
        lambda: torch.ops.lq.int8_dequantize(W8, S8, torch.int8),
        DTypeError,
        "torch.int8: expected float16",
    ),
    "int8-dequantize-meta": (
        lambda: torch.ops.lq.int8_dequantize(meta(W8), meta(S8), torch.bool),
        DTypeError,
        "torch.bool: expected float16",
    ),
    "dynamic-dequantize-int8": (
        lambda: torch.ops.lq.int8_dynamic_dequantize(W8, S8, torch.int8),
        DTypeError,
        "torch.int8: expected float16",
    ),
    "q8_1-rank": (lambda: quantize_activation_q8_1(torch.tensor(1.0)), ShapeError, r"x has shape \(\)"),
    "q8_1-no-in-features": (lambda: quantize_activation_q8_1(X[:, :0]), ShapeError, r"x has shape \(2, 0\)"),
    "q8_1-double": (lambda: quantize_activation_q8_1(X.double()), DTypeError, "x has dtype torch.float64"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, LQError)
    assert isinstance(caught.value, ValueError | TypeError | RuntimeError), "a careful caller's except clause works"


def test_the_good_arguments_are_good():
    for y in (i4(), i4(z=Z), int8_gemm(X, W8, S8, S8), matmul_bf16_i4(X, Q, S, GROUP), q4_0_linear(X, W4, bias=S8)):
        assert y.shape == (2, N)
    assert dense().shape == (N, K)
    assert gemm_q4_0_q8_1(W4, A8, N, 3, K).shape == (N, 3)
    assert gemm_q4_0_q8_1(W4.flatten(), A8.flatten(), N, 3, K).shape == (N, 3)
    assert gemm_q4_0_q8_1(W4[:0], A8, 0, 3, K).shape == (0, 3)
    assert quantize_activation_q8_1(X).shape == (2, 2, 36)


def test_bad_input_is_refused_on_the_meta_device_too():
    with pytest.raises(ShapeError, match="scale has shape"):
        int4_linear(meta(X), meta(Q), meta(S[:, :1]), group_size=GROUP)
    assert int4_linear(meta(X), meta(Q), meta(S), group_size=GROUP).shape == (2, N)

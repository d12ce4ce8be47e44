"""What is no tensor where one belongs is named, in every argument of every public function of codecs and products."""

import inspect
import typing

import lq_formats
import lq_kernels
import pytest
import torch
from lq_formats import DTypeError, QuantSpec
from lq_formats.layouts import ggml_planes
from torch import Tensor

N, K = 16, 256
W = torch.randn(N, K)
X = torch.randn(2, K)
SPEC = QuantSpec(4, "group", 32, False, torch.float32)
SCALE, ZERO = lq_formats.choose_qparams(W, SPEC)
CODES = lq_formats.quantize_affine(W, SCALE, ZERO, SPEC)
Q4 = lq_formats.pack_int4(CODES)
PACK8, SCALES8 = lq_formats.quantize_i4_pack8(W, 32)
W8, S8 = lq_formats.quantize_weight_per_channel(W)
BIAS = torch.randn(N)
BLOCKS, A8 = lq_formats.quantize_q4_0(W), lq_formats.quantize_q8_1(X)
PACKED, ARRANGED, ZEROS = lq_kernels.preshuffle_int4(Q4, SCALE, ZERO, group_size=32, in_features=K)
PACKED8, ARRANGED8 = lq_kernels.preshuffle_int8(W8, S8)
FRAGMENTS = lq_kernels.preshuffle_q4_0(BLOCKS)
SCALE8 = torch.rand(N, 2)
*DYNAMIC, _ = lq_kernels.pack_int4_dynamic(Q4, SCALE8, in_features=K, group_size=128, activation="int8")
PAIR = tuple(lq_kernels.interleave_rows(each) for each in (CODES, SCALE, ZERO))
GATED = lq_kernels.preshuffle_int4(lq_formats.pack_int4(PAIR[0]), *PAIR[1:], group_size=32, in_features=K)
SIZES = {"out_features": N, "in_features": K}
GROUPS = {"group_size": 32}
EIGHT = {"group_size": 128, "activation": "int8"}
CALLS = {
    "quantize_affine": (W, SCALE, ZERO, SPEC),
    "dequantize_affine": (CODES, SCALE, ZERO, SPEC),
    "choose_qparams": (W, SPEC),
    "search_qparams": (W, SPEC, "mse", torch.rand(K)),
    "pack_int4": (CODES,),
    "unpack_int4": (Q4, K),
    "pack_bits": (CODES, 4),
    "unpack_bits": (lq_formats.pack_bits(CODES, 4), 4, K),
    "quantize_i4_pack8": (W, 32),
    "dequantize_i4_pack8": (PACK8, SCALES8, 32),
    "quantize_weight_per_channel": (W,),
    "quantize_weight_per_tensor": (W,),
    "dequantize_weight_int8": (W8, S8),
    "check_finite": (W,),
    "check_float": (W,),
    "check_matrix": (W,),
    **{f"quantize_{name}": (W,) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1")},
    "dequantize_q4_0": (BLOCKS,),
    "dequantize_q4_1": (lq_formats.quantize_q4_1(W),),
    "dequantize_q5_0": (lq_formats.quantize_q5_0(W),),
    "dequantize_q5_1": (lq_formats.quantize_q5_1(W),),
    "dequantize_q8_0": (lq_formats.quantize_q8_0(W),),
    "dequantize_q8_1": (A8,),
    "int4_linear": (X, Q4, SCALE, ZERO, {**GROUPS, "bias": BIAS}),
    "int4_dequantize": (Q4, SCALE, ZERO, {**GROUPS, "in_features": K}),
    "int8_gemm": (X, W8, S8, BIAS),
    "int8_gemm_torch": (X, W8, S8, BIAS),
    "gemm_q4_0_q8_1": (BLOCKS, A8, N, 2, K),
    "quantize_gemm_q4_0_q8_1": (BLOCKS, X),
    "quantize_activation_q8_1": (X,),
    "q4_0_linear": (X, BLOCKS, {"bias": BIAS}),
    "quantize_tokens": (X,),
    "int8_dynamic_linear": (X, W8, S8, BIAS),
    "preshuffle_int4": (Q4, SCALE, ZERO, {**GROUPS, "in_features": K}),
    "preshuffle_int8": (W8, S8),
    "preshuffle_q4_0": (BLOCKS,),
    "restore_int4": (PACKED, ARRANGED, ZEROS, {**GROUPS, **SIZES}),
    "restore_int8": (PACKED8, ARRANGED8, SIZES),
    "restore_q4_0": (*FRAGMENTS, {**SIZES, "rows": torch.arange(3)}),
    "preshuffled_linear": (X, PACKED, ARRANGED, ZEROS, {**GROUPS, "bits": 4, "out_features": N, "bias": BIAS}),
    "preshuffled_dequantize": (PACKED, ARRANGED, ZEROS, {**GROUPS, **SIZES, "bits": 4}),
    "preshuffled_gated_linear": (X, *GATED, {**GROUPS, "bits": 4, "out_features": N // 2, "bias": BIAS}),
    "minima_linear": (X, PACKED, ARRANGED, ZEROS, {**GROUPS, "out_features": N, "bias": BIAS}),
    "minima_dequantize": (PACKED, ARRANGED, ZEROS, {**GROUPS, **SIZES}),
    "pack_int4_dynamic": (Q4, SCALE8, {**EIGHT, "in_features": K}),
    "restore_int4_dynamic": (*DYNAMIC, {**EIGHT, **SIZES}),
    "int4_dynamic_linear": (X, *DYNAMIC, BIAS, {**EIGHT, "out_features": N}),
    "int4_dynamic_dequantize": (*DYNAMIC, {**EIGHT, **SIZES}),
    "interleave_rows": (W,),
    "separate_rows": (W, N // 2),
}


def arguments(name):
    """Return a function, its arguments by name, and which of them are tensors."""
    function = getattr(lq_formats, name, None) or getattr(lq_kernels, name)
    *positional, last = CALLS[name]
    named = last if isinstance(last, dict) else {}
    bound = inspect.signature(function).bind(*positional, *(() if named else (last,)), **named)
    return function, bound.arguments, [key for key, value in bound.arguments.items() if isinstance(value, Tensor)]


CASES = [(name, key) for name in CALLS for key in arguments(name)[2]]


@pytest.mark.parametrize(("name", "key"), CASES)
@pytest.mark.parametrize("value", [[1.0, 2.0], "weight"], ids=["list", "string"])
def test_what_is_no_tensor_is_named(name, key, value):
    function, given, _ = arguments(name)
    with pytest.raises(DTypeError, match=f"of type {type(value).__name__}: expected a torch"):
        function(**{**given, key: value})


@pytest.mark.parametrize("name", CALLS)
def test_nor_is_none_where_a_tensor_is_needed(name):
    function, given, tensors = arguments(name)
    hints = typing.get_type_hints(function)
    for key in tensors:
        if hints[key] is Tensor:
            with pytest.raises(DTypeError, match="of type NoneType: expected a torch"):
                function(**{**given, key: None})


@pytest.mark.parametrize("name", CALLS)
def test_what_belongs_there_does(name):
    function, given, _ = arguments(name)
    function(**given)


def test_planes_are_named_too():
    layout = ggml_planes("q4_k")
    for planes in (None, W, layout):
        with pytest.raises(DTypeError, match="expected GGMLPlanes"):
            lq_kernels.ggml_linear(X, planes, ggml_type="q4_k")

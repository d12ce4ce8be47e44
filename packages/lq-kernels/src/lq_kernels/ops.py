"""Every torch operator of lq, and the only file that registers any (in a library of :mod:`lq_kernels.derivatives`).

Operators take canonical packings, choose a kernel by the sizes they see at run time, and are registered with a fake
implementation (so ``torch.compile(fullgraph=True)`` and export trace them with dynamic sizes) and a gradient for the
activations. Arguments are validated by the callers in :mod:`lq_kernels.linear`.

Longer than other files because it is the only one: an operator is four short pieces here, and nothing else.
"""

import functools
from dataclasses import replace

import torch
from lq_formats import QuantSpec, dequantize_q4_0, quantize_q8_1
from torch import Tensor

from lq_kernels import dequant_blas, dynamic_kernels, dynamic_reference, gated, ggml_kernels
from lq_kernels.cuda import constraints as cuda_constraints
from lq_kernels.derivatives import DifferentiableLibrary
from lq_kernels.invariance import asked, is_batch_invariant
from lq_kernels.problem import Q4_0_SPEC, Arch, Problem
from lq_kernels.reference import int4_spec, int8_spec
from lq_kernels.registry import Kernel, select
from lq_kernels.validation import to_floats

_LIBRARY = DifferentiableLibrary("lq", "DEF")
_LIBRARY.define(
    "int4_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? zero, int group_size, str kernel) -> Tensor"
)
_LIBRARY.define("int8_linear(Tensor x, Tensor qweight, Tensor scale, str kernel) -> Tensor")
_LIBRARY.define(
    "int4_dequantize(Tensor qweight, Tensor scale, Tensor? zero, int group_size, SymInt in_features, ScalarType dtype)"
    " -> Tensor"
)
_LIBRARY.define("int8_dequantize(Tensor qweight, Tensor scale, ScalarType dtype) -> Tensor")
_LIBRARY.define(
    "preshuffled_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, "
    "SymInt out_features, str kernel) -> Tensor"
)
_LIBRARY.define(
    "preshuffled_linear_add(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, Tensor residual, int bits, "
    "int group_size, SymInt out_features, str kernel) -> Tensor"
)
_LIBRARY.define(
    "preshuffled_gated_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int bits, "
    "int group_size, SymInt out_features, str kernel) -> Tensor"
)
_LIBRARY.define(
    "preshuffled_dequantize(Tensor packed, Tensor scale, Tensor? zero, int bits, int group_size, SymInt out_features, "
    "SymInt in_features, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "minima_linear(Tensor x, Tensor packed, Tensor scale, Tensor minimum, Tensor? bias, int group_size, "
    "SymInt out_features, str kernel) -> Tensor"
)
_LIBRARY.define(
    "minima_dequantize(Tensor packed, Tensor scale, Tensor minimum, int group_size, SymInt out_features, "
    "SymInt in_features, ScalarType dtype) -> Tensor"
)
_LIBRARY.define("gemm_q4_0_q8_1(Tensor weight_q, Tensor activation_q, str kernel) -> Tensor")
_LIBRARY.define("quantize_gemm_q4_0_q8_1(Tensor weight_q, Tensor x, str kernel) -> Tensor")
_LIBRARY.define("q4_0_linear(Tensor x, Tensor weight_q, str kernel) -> Tensor")
_LIBRARY.define("quantize_q8_1(Tensor x) -> Tensor")
_LIBRARY.define("quantize_tokens(Tensor x, str activation) -> (Tensor, Tensor)")
_LIBRARY.define("int8_dynamic_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str kernel) -> Tensor")
_LIBRARY.define("int8_dynamic_dequantize(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor")
_LIBRARY.define(
    "int4_dynamic_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int group_size, SymInt out_features, "
    "str activation, bool lowest, str kernel) -> Tensor"
)
_LIBRARY.define(
    "int4_dynamic_dequantize(Tensor packed, Tensor scale, int group_size, SymInt out_features, SymInt in_features, "
    "str activation, ScalarType dtype) -> Tensor"
)


def _chosen(problem: Problem, kernel: str) -> Kernel:
    name, batch_invariant = asked(kernel)
    # A graph that was traced outside the mode may run inside it.
    if batch_invariant or is_batch_invariant():
        problem = replace(problem, batch_invariant=True)
    return select(problem, name)


def _int4_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, kernel: str
) -> Tensor:
    m, k = x.shape
    n = qweight.shape[0]
    if m == 0 or n == 0:
        return x.new_empty((m, n))
    spec = int4_spec(group_size, k, zero is None, scale.dtype)
    problem = Problem("int4", m, n, k, spec, x.dtype, Arch.of(x.device))
    return _chosen(problem, kernel).run(x, qweight, scale, zero, group_size)


def _int8_linear(x: Tensor, qweight: Tensor, scale: Tensor, kernel: str) -> Tensor:
    m, k = x.shape
    n = qweight.shape[0]
    if m == 0 or n == 0:
        return x.new_empty((m, n))
    spec = int8_spec(scale)
    problem = Problem("int8", m, n, k, spec, x.dtype, Arch.of(x.device))
    return _chosen(problem, kernel).run(x, qweight, scale)


@functools.lru_cache(maxsize=1024)
def preshuffled_spec(bits: int, group_size: int, in_features: int, symmetric: bool, dtype: torch.dtype) -> QuantSpec:
    """Return how a weight in fragment order is quantized."""
    if group_size == in_features:
        return QuantSpec(bits, "row", None, symmetric, dtype)
    return QuantSpec(bits, "group", group_size, symmetric, dtype)


def _preshuffled_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    kernel: str,
) -> Tensor:
    m, k = x.shape
    if m == 0 or out_features == 0:
        return x.new_empty((m, out_features))
    spec = preshuffled_spec(bits, group_size, k, zero is None, scale.dtype)
    problem = Problem("preshuffled", m, out_features, k, spec, x.dtype, Arch.of(x.device))
    return _chosen(problem, kernel).run(x, packed, scale, zero, bias, out_features, group_size, bits)


def _preshuffled_linear_add(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    bits: int,
    group_size: int,
    out_features: int,
    kernel: str,
) -> Tensor:
    m, k = x.shape
    if m == 0 or out_features == 0:
        return x.new_empty((m, out_features))
    spec = preshuffled_spec(bits, group_size, k, zero is None, scale.dtype)
    problem = Problem("preshuffled", m, out_features, k, spec, x.dtype, Arch.of(x.device))
    weight = (packed, scale, zero, bias, out_features, group_size, bits)
    return _chosen(problem, kernel).run(x, *weight, residual=residual.contiguous())


def _preshuffled_gated_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    kernel: str,
) -> Tensor:
    m, k = x.shape
    if m == 0 or out_features == 0:
        return x.new_empty((m, out_features))
    spec = preshuffled_spec(bits, group_size, k, zero is None, scale.dtype)
    problem = Problem("preshuffled_gated", m, 2 * out_features, k, spec, x.dtype, Arch.of(x.device))
    return _chosen(problem, kernel).run(x, packed, scale, zero, bias, out_features, group_size, bits)


def _minima_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    kernel: str,
) -> Tensor:
    m, k = x.shape
    if m == 0 or out_features == 0:
        return x.new_empty((m, out_features))
    spec = preshuffled_spec(4, group_size, k, False, scale.dtype)
    problem = Problem("preshuffled_minima", m, out_features, k, spec, x.dtype, Arch.of(x.device))
    return _chosen(problem, kernel).run(x, packed, scale, minimum, bias, out_features, group_size)


def _gemm_q4_0_q8_1(weight_q: Tensor, activation: Tensor, kernel: str) -> Tensor:
    """Multiply with Q8_1 blocks, or with floats as if they had been quantized to them: by the same kernel."""
    n, blocks, _ = weight_q.shape
    m = activation.shape[0]
    if m == 0 or n == 0:
        return torch.empty((n, m), dtype=torch.float32, device=weight_q.device)
    problem = Problem("q4_0_q8_1", m, n, blocks * 32, Q4_0_SPEC, torch.float32, Arch.of(weight_q.device))
    return _chosen(problem, kernel).run(weight_q, activation)


def _q4_0_linear(x: Tensor, weight_q: Tensor, kernel: str) -> Tensor:
    m, k = x.shape
    n = weight_q.shape[0]
    if m == 0 or n == 0:
        return x.new_empty((m, n))
    problem = Problem("q4_0", m, n, k, Q4_0_SPEC, x.dtype, Arch.of(x.device))
    return _chosen(problem, kernel).run(x, weight_q)


def _quantize_q8_1(x: Tensor) -> Tensor:
    arch = Arch.of(x.device)
    capable = arch.kind == "cuda" and arch.capability >= cuda_constraints.MIN_CAPABILITY
    if capable and x.numel() and cuda_constraints.why_not_compile() is None and x.dtype != torch.float64:
        from lq_kernels.cuda.quantize_q8_1 import quantize_q8_1 as fused

        blocks: Tensor = fused(x)
        return blocks
    return quantize_q8_1(x, check=False)


def _quantize_tokens(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    codes, scale = dynamic_kernels.quantize(x, activation)
    return codes.contiguous(), scale


def _int8_dynamic_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
    m, k = x.shape
    n = weight.shape[0]
    if m == 0 or n == 0:
        return x.new_empty((m, n))
    activation = "int8" if weight.dtype == torch.int8 else "fp8"
    problem = Problem("int8_dynamic", m, n, k, int8_spec(scale), x.dtype, Arch.of(x.device), activation)
    return _chosen(problem, kernel).run(x, weight, scale, bias)


def _int4_dynamic_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    activation: str,
    lowest: bool,
    kernel: str,
) -> Tensor:
    m, k = x.shape
    if m == 0 or out_features == 0:
        return x.new_empty((m, out_features))
    spec = int4_spec(group_size, k, True, scale.dtype)
    problem = Problem("int4_dynamic", m, out_features, k, spec, x.dtype, Arch.of(x.device), activation)
    return _chosen(problem, kernel).run(x, packed, scale, bias, group_size, out_features, activation, lowest)


for _name, _implementation in (
    ("int4_linear", _int4_linear),
    ("int8_linear", _int8_linear),
    ("int4_dequantize", to_floats(dequant_blas.int4_dequantize)),
    ("int8_dequantize", to_floats(dequant_blas.int8_dequantize)),
    ("preshuffled_linear", _preshuffled_linear),
    ("preshuffled_linear_add", _preshuffled_linear_add),
    ("preshuffled_gated_linear", _preshuffled_gated_linear),
    ("preshuffled_dequantize", to_floats(dequant_blas.preshuffled_dequantize)),
    ("minima_linear", _minima_linear),
    ("minima_dequantize", to_floats(dequant_blas.minima_dequantize)),
    ("gemm_q4_0_q8_1", _gemm_q4_0_q8_1),
    ("quantize_gemm_q4_0_q8_1", _gemm_q4_0_q8_1),
    ("q4_0_linear", _q4_0_linear),
    ("quantize_q8_1", _quantize_q8_1),
    ("quantize_tokens", _quantize_tokens),
    ("int8_dynamic_linear", _int8_dynamic_linear),
    ("int8_dynamic_dequantize", to_floats(dynamic_reference.int8_dynamic_dequantize)),
    ("int4_dynamic_linear", _int4_dynamic_linear),
    ("int4_dynamic_dequantize", to_floats(dynamic_reference.int4_dynamic_dequantize)),
):
    _LIBRARY.impl(_name, _implementation, "CPU")
    _LIBRARY.impl(_name, _implementation, "CUDA")


@torch.library.register_fake("lq::int4_linear", lib=_LIBRARY)
def _(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, kernel: str) -> Tensor:
    return x.new_empty((x.shape[0], qweight.shape[0]))


@torch.library.register_fake("lq::int8_linear", lib=_LIBRARY)
def _(x: Tensor, qweight: Tensor, scale: Tensor, kernel: str) -> Tensor:
    return x.new_empty((x.shape[0], qweight.shape[0]))


@torch.library.register_fake("lq::int4_dequantize", lib=_LIBRARY)
@to_floats
def _(
    qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    return qweight.new_empty((qweight.shape[0], in_features), dtype=dtype)


@torch.library.register_fake("lq::int8_dequantize", lib=_LIBRARY)
@to_floats
def _(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(qweight, dtype=dtype)


@torch.library.register_fake("lq::preshuffled_linear_add", lib=_LIBRARY)
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    bits: int,
    group_size: int,
    out_features: int,
    kernel: str,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


@torch.library.register_fake("lq::preshuffled_gated_linear", lib=_LIBRARY)
@torch.library.register_fake("lq::preshuffled_linear", lib=_LIBRARY)
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    kernel: str,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


@torch.library.register_fake("lq::preshuffled_dequantize", lib=_LIBRARY)
@to_floats
def _(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((out_features, in_features), dtype=dtype)


@torch.library.register_fake("lq::minima_linear", lib=_LIBRARY)
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    kernel: str,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


@torch.library.register_fake("lq::minima_dequantize", lib=_LIBRARY)
@to_floats
def _(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((out_features, in_features), dtype=dtype)


@torch.library.register_fake("lq::quantize_gemm_q4_0_q8_1", lib=_LIBRARY)
@torch.library.register_fake("lq::gemm_q4_0_q8_1", lib=_LIBRARY)
def _(weight_q: Tensor, activation: Tensor, kernel: str) -> Tensor:
    return weight_q.new_empty((weight_q.shape[0], activation.shape[0]), dtype=torch.float32)


@torch.library.register_fake("lq::q4_0_linear", lib=_LIBRARY)
def _(x: Tensor, weight_q: Tensor, kernel: str) -> Tensor:
    return x.new_empty((x.shape[0], weight_q.shape[0]))


@torch.library.register_fake("lq::quantize_q8_1", lib=_LIBRARY)
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 32, 36), dtype=torch.uint8)


@torch.library.register_fake("lq::quantize_tokens", lib=_LIBRARY)
def _(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dtype = torch.int8 if activation == "int8" else torch.float8_e4m3fn
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.register_fake("lq::int8_dynamic_linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("lq::int8_dynamic_dequantize", lib=_LIBRARY)
@to_floats
def _(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


@torch.library.register_fake("lq::int4_dynamic_linear", lib=_LIBRARY)
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    activation: str,
    lowest: bool,
    kernel: str,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


@torch.library.register_fake("lq::int4_dynamic_dequantize", lib=_LIBRARY)
@to_floats
def _(
    packed: Tensor,
    scale: Tensor,
    group_size: int,
    out_features: int,
    in_features: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((out_features, in_features), dtype=dtype)


def _int4_setup(ctx, inputs, output) -> None:
    x, qweight, scale, zero, group_size, _ = inputs
    ctx.save_for_backward(qweight, scale, zero)
    ctx.group_size, ctx.in_features, ctx.dtype = group_size, x.shape[1], x.dtype


def _int4_backward(ctx, grad):
    qweight, scale, zero = ctx.saved_tensors
    w = torch.ops.lq.int4_dequantize(qweight, scale, zero, ctx.group_size, ctx.in_features, ctx.dtype)
    return grad @ w, None, None, None, None, None


def _int8_setup(ctx, inputs, output) -> None:
    x, qweight, scale, _ = inputs
    ctx.save_for_backward(qweight, scale)
    ctx.dtype = x.dtype


def _int8_backward(ctx, grad):
    qweight, scale = ctx.saved_tensors
    return grad @ torch.ops.lq.int8_dequantize(qweight, scale, ctx.dtype), None, None, None


torch.library.register_autograd("lq::int4_linear", _int4_backward, setup_context=_int4_setup, lib=_LIBRARY)
torch.library.register_autograd("lq::int8_linear", _int8_backward, setup_context=_int8_setup, lib=_LIBRARY)


def _preshuffled_setup(ctx, inputs, output) -> None:
    x, packed, scale, zero, _, bits, group_size, out_features, _ = inputs
    ctx.save_for_backward(packed, scale, zero)
    ctx.sizes, ctx.dtype = (bits, group_size, out_features, x.shape[1]), x.dtype


def _preshuffled_backward(ctx, grad):
    packed, scale, zero = ctx.saved_tensors
    w = torch.ops.lq.preshuffled_dequantize(packed, scale, zero, *ctx.sizes, ctx.dtype)
    bias = grad.sum(0) if ctx.needs_input_grad[4] else None
    return grad @ w, None, None, None, bias, None, None, None, None


torch.library.register_autograd(
    "lq::preshuffled_linear", _preshuffled_backward, setup_context=_preshuffled_setup, lib=_LIBRARY
)


def _minima_setup(ctx, inputs, output) -> None:
    x, packed, scale, minimum, _, group_size, out_features, _ = inputs
    ctx.save_for_backward(packed, scale, minimum)
    ctx.sizes, ctx.dtype = (group_size, out_features, x.shape[1]), x.dtype


def _minima_backward(ctx, grad):
    w = torch.ops.lq.minima_dequantize(*ctx.saved_tensors, *ctx.sizes, ctx.dtype)
    bias = grad.sum(0) if ctx.needs_input_grad[4] else None
    return grad @ w, None, None, None, bias, None, None, None


torch.library.register_autograd("lq::minima_linear", _minima_backward, setup_context=_minima_setup, lib=_LIBRARY)


def _linear_add_setup(ctx, inputs, output) -> None:
    x, packed, scale, zero, _, _, bits, group_size, out_features, _ = inputs
    ctx.save_for_backward(packed, scale, zero)
    ctx.sizes, ctx.dtype = (bits, group_size, out_features, x.shape[1]), x.dtype


def _linear_add_backward(ctx, grad):
    packed, scale, zero = ctx.saved_tensors
    w = torch.ops.lq.preshuffled_dequantize(packed, scale, zero, *ctx.sizes, ctx.dtype)
    bias = grad.sum(0) if ctx.needs_input_grad[4] else None
    return grad @ w, None, None, None, bias, grad, None, None, None, None


torch.library.register_autograd(
    "lq::preshuffled_linear_add", _linear_add_backward, setup_context=_linear_add_setup, lib=_LIBRARY
)


def _gated_setup(ctx, inputs, output) -> None:
    x, packed, scale, zero, bias, bits, group_size, out_features, _ = inputs
    ctx.save_for_backward(x, packed, scale, zero, bias)
    ctx.sizes, ctx.out_features = (bits, group_size, gated.interleaved_rows(out_features)), out_features


def _gated_backward(ctx, grad):
    x, packed, scale, zero, bias = ctx.saved_tensors
    interleaved = None if bias is None else gated.interleave_rows(bias)
    # Gates and ups are not kept: they are as large as the result twice, and one product away.
    y = torch.ops.lq.preshuffled_linear(x, packed, scale, zero, interleaved, *ctx.sizes, "")
    of_y = gated.backward(grad, y)
    w = torch.ops.lq.preshuffled_dequantize(packed, scale, zero, *ctx.sizes, x.shape[1], x.dtype)
    of_bias = gated.separate_rows(of_y.sum(0), ctx.out_features) if ctx.needs_input_grad[4] else None
    return of_y @ w, None, None, None, of_bias, None, None, None, None


torch.library.register_autograd(
    "lq::preshuffled_gated_linear", _gated_backward, setup_context=_gated_setup, lib=_LIBRARY
)


def _q4_0_setup(ctx, inputs, output) -> None:
    x, weight_q, _ = inputs
    ctx.save_for_backward(weight_q)
    ctx.dtype = x.dtype


def _q4_0_backward(ctx, grad):
    (weight_q,) = ctx.saved_tensors
    return grad @ dequantize_q4_0(weight_q, ctx.dtype), None, None


def _quantize_gemm_setup(ctx, inputs, output) -> None:
    weight_q, x, _ = inputs
    ctx.save_for_backward(weight_q)
    ctx.dtype = x.dtype


def _quantize_gemm_backward(ctx, grad):
    (weight_q,) = ctx.saved_tensors
    return None, grad.t().to(ctx.dtype) @ dequantize_q4_0(weight_q, ctx.dtype), None


# Straight through, where activations are rounded to 8 bits.
torch.library.register_autograd("lq::q4_0_linear", _q4_0_backward, setup_context=_q4_0_setup, lib=_LIBRARY)
torch.library.register_autograd(
    "lq::quantize_gemm_q4_0_q8_1", _quantize_gemm_backward, setup_context=_quantize_gemm_setup, lib=_LIBRARY
)


def _int8_dynamic_setup(ctx, inputs, output) -> None:
    x, weight, scale, _, _ = inputs
    ctx.save_for_backward(weight, scale)
    ctx.dtype = x.dtype


def _int8_dynamic_backward(ctx, grad):
    w = torch.ops.lq.int8_dynamic_dequantize(*ctx.saved_tensors, ctx.dtype)
    bias = grad.sum(0) if ctx.needs_input_grad[3] else None
    return grad @ w, None, None, bias, None


def _int4_dynamic_setup(ctx, inputs, output) -> None:
    x, packed, scale, _, group_size, out_features, activation, _, _ = inputs
    ctx.save_for_backward(packed, scale)
    ctx.sizes, ctx.dtype = (group_size, out_features, x.shape[1], activation), x.dtype


def _int4_dynamic_backward(ctx, grad):
    w = torch.ops.lq.int4_dynamic_dequantize(*ctx.saved_tensors, *ctx.sizes, ctx.dtype)
    bias = grad.sum(0) if ctx.needs_input_grad[3] else None
    return grad @ w, None, None, bias, None, None, None, None, None


# Straight through: the rounding of the activations has the gradient of the identity.
torch.library.register_autograd(
    "lq::int8_dynamic_linear", _int8_dynamic_backward, setup_context=_int8_dynamic_setup, lib=_LIBRARY
)
torch.library.register_autograd(
    "lq::int4_dynamic_linear", _int4_dynamic_backward, setup_context=_int4_dynamic_setup, lib=_LIBRARY
)


_LIBRARY.define(
    "ggml_linear(Tensor x, Tensor codes, Tensor? high, Tensor scale, Tensor? bias, str ggml_type, str kernel) -> Tensor"
)
_LIBRARY.define(
    "ggml_dequantize(Tensor codes, Tensor? high, Tensor scale, str ggml_type, SymInt in_features, ScalarType dtype) -> Tensor"
)


def _ggml_linear(
    x: Tensor, codes: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, ggml_type: str, kernel: str
) -> Tensor:
    m, k = x.shape
    n = codes.shape[0]
    if m == 0 or n == 0:
        return x.new_empty((m, n))
    problem = ggml_kernels.make_problem(m, n, k, ggml_type, x.dtype, Arch.of(x.device))
    return _chosen(problem, kernel).run(x, codes, high, scale, bias, ggml_type)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("ggml_linear", _ggml_linear, _device)
    _LIBRARY.impl("ggml_dequantize", to_floats(ggml_kernels.dequantize), _device)


@torch.library.register_fake("lq::ggml_linear", lib=_LIBRARY)
def _(
    x: Tensor, codes: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, ggml_type: str, kernel: str
) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


@torch.library.register_fake("lq::ggml_dequantize", lib=_LIBRARY)
@to_floats
def _(
    codes: Tensor, high: Tensor | None, scale: Tensor, ggml_type: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((codes.shape[0], in_features), dtype=dtype)


def _ggml_setup(ctx, inputs, output) -> None:
    x, codes, high, scale, _, ggml_type, _ = inputs
    ctx.save_for_backward(codes, high, scale)
    ctx.ggml_type, ctx.in_features, ctx.dtype = ggml_type, x.shape[1], x.dtype


def _ggml_backward(ctx, grad):
    w = torch.ops.lq.ggml_dequantize(*ctx.saved_tensors, ctx.ggml_type, ctx.in_features, ctx.dtype)
    bias = grad.sum(0) if ctx.needs_input_grad[4] else None
    return grad @ w, None, None, None, bias, None, None


torch.library.register_autograd("lq::ggml_linear", _ggml_backward, setup_context=_ggml_setup, lib=_LIBRARY)

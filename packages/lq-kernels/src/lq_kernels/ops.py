"""Every torch operator of lq, and the only file that registers any (in a library of :mod:`lq_kernels.derivatives`).

Operators take canonical packings, choose a kernel by the sizes they see at run time, and are registered with a fake
implementation (so ``torch.compile(fullgraph=True)`` and export trace them with dynamic sizes) and a gradient for the
activations, and for bias and residual. Arguments are validated by the callers in :mod:`lq_kernels.linear`.

Longer than other files because it is the only one: families of operators, each with its schemas and what they call.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lq_formats import QuantSpec, dequantize_q4_0, quantize_q8_1
from torch import Tensor

from lq_kernels import dequant_blas, dynamic_kernels, dynamic_reference, gated, ggml_kernels
from lq_kernels.cuda import constraints as cuda_constraints
from lq_kernels.derivatives import DifferentiableLibrary
from lq_kernels.invariance import asked, is_batch_invariant
from lq_kernels.problem import Q4_0_SPEC, Arch, Op, Problem
from lq_kernels.reference import int4_spec, int8_spec
from lq_kernels.registry import Kernel, select
from lq_kernels.validation import check_dense_dtype, to_floats

_LIBRARY = DifferentiableLibrary("lq", "DEF")  # type: ignore[no-untyped-call]
_ARGUMENT = re.compile(r"(\w+)(?=[,)])")


class _Gradient(NamedTuple):
    """What autograd calls: ``setup(ctx, inputs, output)`` with the forward pass, ``backward(ctx, grad)``."""

    setup: Callable[..., None]
    backward: Callable[..., Any]


def _names(schema: str) -> list[str]:
    """Return the names of an operator's arguments, in their order."""
    return _ARGUMENT.findall(schema.partition(" -> ")[0])


def _operator(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Callable[[list[str]], _Gradient] | None = None,
) -> None:
    """Register an operator.

    Args:
        schema: Its name, arguments and results.
        run: The implementation on any device, which gets all arguments in their order.
        fake: Returns empty results for arguments without values, which it gets by name.
        gradient: Makes the derivatives from the names of the arguments; None where there are none.
    """
    name, names = schema.partition("(")[0], _names(schema)
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(
        f"lq::{name}", lambda *values: fake(**dict(zip(names, values, strict=True))), lib=_LIBRARY
    )
    if gradient is not None:
        setup, backward = gradient(names)
        torch.library.register_autograd(f"lq::{name}", backward, setup_context=setup, lib=_LIBRARY)


def _dense(
    weight: Callable[..., Tensor], x: str = "x", *, transposed: bool = False
) -> Callable[[list[str]], _Gradient]:
    """Return what makes the gradient of the product with a dequantized weight, straight through any rounding of ``x``.

    Args:
        weight: Returns it, from the operator's other arguments and ``dtype`` and ``in_features`` of x, by name.
        x: Name of what is multiplied.
        transposed: Whether the result is ``(N, M) float32``.
    """
    added = (x, "bias", "residual")

    def make(names: list[str]) -> _Gradient:
        kept = [name for name in names if name not in added]

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            given = dict(zip(names, inputs, strict=True))
            tensors = {name: given[name] for name in kept if given[name] is None or isinstance(given[name], Tensor)}
            ctx.save_for_backward(*tensors.values())
            ctx.tensors = tuple(tensors)
            ctx.others = {name: given[name] for name in kept if name not in tensors}
            ctx.others |= {"in_features": given[x].shape[-1], "dtype": given[x].dtype}

        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            w = weight(**dict(zip(ctx.tensors, ctx.saved_tensors, strict=True)), **ctx.others)
            grads = {x: (grad.t().to(w.dtype) if transposed else grad) @ w}
            if "bias" in names and ctx.needs_input_grad[names.index("bias")]:
                grads["bias"] = grad.sum(0)
            if "residual" in names:
                grads["residual"] = grad
            return tuple(grads.get(name) for name in names)

        return _Gradient(setup, backward)

    return make


def _rows_of(weight: str) -> Callable[..., Tensor]:
    """Return the fake of a product with a weight that has a row for each out feature."""
    return lambda **given: given["x"].new_empty((given["x"].shape[0], given[weight].shape[0]))


def _out_features(x: Tensor, out_features: int, **_: Any) -> Tensor:
    """Return an empty result, as a fake: of a weight in tiles, which may have more rows than out features."""
    return x.new_empty((x.shape[0], out_features))


def _dense_weight(packed: Tensor, out_features: int, in_features: int, dtype: torch.dtype, **_: Any) -> Tensor:
    """Return an empty dense weight, as a fake; of any other weight than int8, which keeps its strides."""
    check_dense_dtype(dtype)
    return packed.new_empty((out_features, in_features), dtype=dtype)


def _dense_int8(weight: Tensor, dtype: torch.dtype) -> Tensor:
    check_dense_dtype(dtype)
    return torch.empty_like(weight, dtype=dtype)


def _chosen(problem: Problem, kernel: str) -> Kernel:
    name, batch_invariant = asked(kernel)
    # A graph that was traced outside the mode may run inside it.
    if batch_invariant or is_batch_invariant():
        problem = replace(problem, batch_invariant=True)
    return select(problem, name)


def _product(
    op: Op,
    x: Tensor,
    out_features: int,
    kernel: str,
    spec: Callable[[], QuantSpec],
    *weight: Any,
    rows: int | None = None,
    activation: str = "",
    **options: Any,
) -> Tensor:
    """Return the product by the kernel for it.

    Args:
        op: The problem's.
        x: ``(M, K)``.
        out_features: Of the result.
        kernel: Its name, or empty.
        spec: Returns how the weight is quantized; not called where the product is empty.
        weight: What kernels take after x.
        rows: Of the weight, if not ``out_features``.
        activation: The problem's.
        options: What kernels take by name.
    """
    m, k = x.shape
    if m == 0 or out_features == 0:
        return x.new_empty((m, out_features))
    n = out_features if rows is None else rows
    problem = Problem(op, m, n, k, spec(), x.dtype, Arch.of(x.device), activation)
    return _chosen(problem, kernel).run(x, *weight, **options)


# ---- int4 and int8 ----


def _int4_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, kernel: str
) -> Tensor:
    def spec() -> QuantSpec:
        return int4_spec(group_size, x.shape[1], zero is None, scale.dtype)

    return _product("int4", x, qweight.shape[0], kernel, spec, qweight, scale, zero, group_size)


def _int8_linear(x: Tensor, qweight: Tensor, scale: Tensor, kernel: str) -> Tensor:
    return _product("int8", x, qweight.shape[0], kernel, lambda: int8_spec(scale), qweight, scale)


def _int4_weight(
    qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype, **_: Any
) -> Tensor:
    w: Tensor = torch.ops.lq.int4_dequantize(qweight, scale, zero, group_size, in_features, dtype)
    return w


def _int8_weight(qweight: Tensor, scale: Tensor, dtype: torch.dtype, **_: Any) -> Tensor:
    w: Tensor = torch.ops.lq.int8_dequantize(qweight, scale, dtype)
    return w


_operator(
    "int4_linear(Tensor x, Tensor qweight, Tensor scale, Tensor? zero, int group_size, str kernel) -> Tensor",
    _int4_linear,
    _rows_of("qweight"),
    _dense(_int4_weight),
)
_operator(
    "int8_linear(Tensor x, Tensor qweight, Tensor scale, str kernel) -> Tensor",
    _int8_linear,
    _rows_of("qweight"),
    _dense(_int8_weight),
)
_operator(
    "int4_dequantize(Tensor qweight, Tensor scale, Tensor? zero, int group_size, SymInt in_features, ScalarType dtype)"
    " -> Tensor",
    to_floats(dequant_blas.int4_dequantize),
    lambda qweight, in_features, **given: _dense_weight(qweight, qweight.shape[0], in_features, given["dtype"]),
)
_operator(
    "int8_dequantize(Tensor qweight, Tensor scale, ScalarType dtype) -> Tensor",
    to_floats(dequant_blas.int8_dequantize),
    lambda qweight, scale, dtype: _dense_int8(qweight, dtype),
)

# ---- weights in fragment order ----


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
    op: Op = "preshuffled",
    **options: Any,
) -> Tensor:
    def spec() -> QuantSpec:
        return preshuffled_spec(bits, group_size, x.shape[1], zero is None, scale.dtype)

    weight = (packed, scale, zero, bias, out_features, group_size, bits)
    return _product(op, x, out_features, kernel, spec, *weight, **options)


def _preshuffled_linear_add(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor, *rest: Any
) -> Tensor:
    return _preshuffled_linear(x, packed, scale, zero, bias, *rest, residual=residual.contiguous())


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
    sizes = (bits, group_size, out_features, kernel)
    return _preshuffled_linear(x, packed, scale, zero, bias, *sizes, "preshuffled_gated", rows=2 * out_features)


def _preshuffled_weight(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    **_: Any,
) -> Tensor:
    sizes = (bits, group_size, out_features, in_features)
    w: Tensor = torch.ops.lq.preshuffled_dequantize(packed, scale, zero, *sizes, dtype)
    return w


def _gated_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero, bias, bits, group_size, out_features, _ = inputs
    ctx.save_for_backward(x, packed, scale, zero, bias)
    ctx.sizes, ctx.out_features = (bits, group_size, gated.interleaved_rows(out_features)), out_features


def _gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, scale, zero, bias = ctx.saved_tensors
    interleaved = None if bias is None else gated.interleave_rows(bias)
    # Gates and ups are not kept: they are as large as the result twice, and one product away.
    y = torch.ops.lq.preshuffled_linear(x, packed, scale, zero, interleaved, *ctx.sizes, "")
    of_y = gated.backward(grad, y)
    w = torch.ops.lq.preshuffled_dequantize(packed, scale, zero, *ctx.sizes, x.shape[1], x.dtype)
    of_bias = gated.separate_rows(of_y.sum(0), ctx.out_features) if ctx.needs_input_grad[4] else None
    return of_y @ w, None, None, None, of_bias, None, None, None, None


_operator(
    "preshuffled_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, "
    "SymInt out_features, str kernel) -> Tensor",
    _preshuffled_linear,
    _out_features,
    _dense(_preshuffled_weight),
)
_operator(
    "preshuffled_linear_add(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, Tensor residual, int bits, "
    "int group_size, SymInt out_features, str kernel) -> Tensor",
    _preshuffled_linear_add,
    _out_features,
    _dense(_preshuffled_weight),
)
_operator(
    "preshuffled_gated_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int bits, "
    "int group_size, SymInt out_features, str kernel) -> Tensor",
    _preshuffled_gated_linear,
    _out_features,
    lambda names: _Gradient(_gated_setup, _gated_backward),
)
_operator(
    "preshuffled_dequantize(Tensor packed, Tensor scale, Tensor? zero, int bits, int group_size, SymInt out_features, "
    "SymInt in_features, ScalarType dtype) -> Tensor",
    to_floats(dequant_blas.preshuffled_dequantize),
    _dense_weight,
)

# ---- int4 with minima ----


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
    def spec() -> QuantSpec:
        return preshuffled_spec(4, group_size, x.shape[1], False, scale.dtype)

    weight = (packed, scale, minimum, bias, out_features, group_size)
    return _product("preshuffled_minima", x, out_features, kernel, spec, *weight)


def _minima_weight(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    **_: Any,
) -> Tensor:
    sizes = (group_size, out_features, in_features)
    w: Tensor = torch.ops.lq.minima_dequantize(packed, scale, minimum, *sizes, dtype)
    return w


_operator(
    "minima_linear(Tensor x, Tensor packed, Tensor scale, Tensor minimum, Tensor? bias, int group_size, "
    "SymInt out_features, str kernel) -> Tensor",
    _minima_linear,
    _out_features,
    _dense(_minima_weight),
)
_operator(
    "minima_dequantize(Tensor packed, Tensor scale, Tensor minimum, int group_size, SymInt out_features, "
    "SymInt in_features, ScalarType dtype) -> Tensor",
    to_floats(dequant_blas.minima_dequantize),
    _dense_weight,
)

# ---- Q4_0 and Q8_1 ----


def _gemm_q4_0_q8_1(weight_q: Tensor, activation: Tensor, kernel: str) -> Tensor:
    """Multiply with Q8_1 blocks, or with floats as if they had been quantized to them: by the same kernel."""
    n, blocks, _ = weight_q.shape
    m = activation.shape[0]
    if m == 0 or n == 0:
        return torch.empty((n, m), dtype=torch.float32, device=weight_q.device)
    problem = Problem("q4_0_q8_1", m, n, blocks * 32, Q4_0_SPEC, torch.float32, Arch.of(weight_q.device))
    return _chosen(problem, kernel).run(weight_q, activation)


def _q4_0_linear(x: Tensor, weight_q: Tensor, kernel: str) -> Tensor:
    return _product("q4_0", x, weight_q.shape[0], kernel, lambda: Q4_0_SPEC, weight_q)


def _quantize_q8_1(x: Tensor) -> Tensor:
    arch = Arch.of(x.device)
    capable = arch.kind == "cuda" and arch.capability >= cuda_constraints.MIN_CAPABILITY
    if capable and x.numel() and cuda_constraints.why_not_compile() is None and x.dtype != torch.float64:
        from lq_kernels.cuda.quantize_q8_1 import quantize_q8_1 as fused

        blocks: Tensor = fused(x)
        return blocks
    return quantize_q8_1(x, check=False)


def _q4_0_weight(weight_q: Tensor, dtype: torch.dtype, **_: Any) -> Tensor:
    return dequantize_q4_0(weight_q, dtype)


def _of_blocks(weight_q: Tensor, activation: Tensor) -> Tensor:
    return weight_q.new_empty((weight_q.shape[0], activation.shape[0]), dtype=torch.float32)


_operator(
    "gemm_q4_0_q8_1(Tensor weight_q, Tensor activation_q, str kernel) -> Tensor",
    _gemm_q4_0_q8_1,
    lambda weight_q, activation_q, kernel: _of_blocks(weight_q, activation_q),
)
_operator(
    "quantize_gemm_q4_0_q8_1(Tensor weight_q, Tensor x, str kernel) -> Tensor",
    _gemm_q4_0_q8_1,
    lambda weight_q, x, kernel: _of_blocks(weight_q, x),
    _dense(_q4_0_weight, transposed=True),
)
_operator(
    "q4_0_linear(Tensor x, Tensor weight_q, str kernel) -> Tensor",
    _q4_0_linear,
    _rows_of("weight_q"),
    _dense(_q4_0_weight),
)
_operator(
    "quantize_q8_1(Tensor x) -> Tensor",
    _quantize_q8_1,
    lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 32, 36), dtype=torch.uint8),
)

# ---- tokens of 8 bits ----


def _quantize_tokens(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    codes, scale = dynamic_kernels.quantize(x, activation)
    return codes.contiguous(), scale


def _empty_tokens(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dtype = torch.int8 if activation == "int8" else torch.float8_e4m3fn
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:1], dtype=torch.float32)


def _int8_dynamic_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kernel: str) -> Tensor:
    activation = "int8" if weight.dtype == torch.int8 else "fp8"
    operands = (weight, scale, bias)
    return _product(
        "int8_dynamic", x, weight.shape[0], kernel, lambda: int8_spec(scale), *operands, activation=activation
    )


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
    def spec() -> QuantSpec:
        return int4_spec(group_size, x.shape[1], True, scale.dtype)

    weight = (packed, scale, bias, group_size, out_features, activation, lowest)
    return _product("int4_dynamic", x, out_features, kernel, spec, *weight, activation=activation)


def _int8_dynamic_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype, **_: Any) -> Tensor:
    w: Tensor = torch.ops.lq.int8_dynamic_dequantize(weight, scale, dtype)
    return w


def _int4_dynamic_weight(
    packed: Tensor,
    scale: Tensor,
    group_size: int,
    out_features: int,
    in_features: int,
    activation: str,
    dtype: torch.dtype,
    **_: Any,
) -> Tensor:
    sizes = (group_size, out_features, in_features)
    w: Tensor = torch.ops.lq.int4_dynamic_dequantize(packed, scale, *sizes, activation, dtype)
    return w


_operator(
    "quantize_tokens(Tensor x, str activation) -> (Tensor, Tensor)",
    _quantize_tokens,
    _empty_tokens,
)
_operator(
    "int8_dynamic_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str kernel) -> Tensor",
    _int8_dynamic_linear,
    _rows_of("weight"),
    _dense(_int8_dynamic_weight),
)
_operator(
    "int8_dynamic_dequantize(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor",
    to_floats(dynamic_reference.int8_dynamic_dequantize),
    lambda weight, scale, dtype: _dense_int8(weight, dtype),
)
_operator(
    "int4_dynamic_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int group_size, SymInt out_features, "
    "str activation, bool lowest, str kernel) -> Tensor",
    _int4_dynamic_linear,
    _out_features,
    _dense(_int4_dynamic_weight),
)
_operator(
    "int4_dynamic_dequantize(Tensor packed, Tensor scale, int group_size, SymInt out_features, SymInt in_features, "
    "str activation, ScalarType dtype) -> Tensor",
    to_floats(dynamic_reference.int4_dynamic_dequantize),
    _dense_weight,
)

# ---- other blocks of ggml ----


def _ggml_linear(
    x: Tensor, codes: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, ggml_type: str, kernel: str
) -> Tensor:
    m, k = x.shape
    n = codes.shape[0]
    if m == 0 or n == 0:
        return x.new_empty((m, n))
    problem = ggml_kernels.make_problem(m, n, k, ggml_type, x.dtype, Arch.of(x.device))
    return _chosen(problem, kernel).run(x, codes, high, scale, bias, ggml_type)


def _ggml_weight(
    codes: Tensor, high: Tensor | None, scale: Tensor, ggml_type: str, in_features: int, dtype: torch.dtype, **_: Any
) -> Tensor:
    w: Tensor = torch.ops.lq.ggml_dequantize(codes, high, scale, ggml_type, in_features, dtype)
    return w


_operator(
    "ggml_linear(Tensor x, Tensor codes, Tensor? high, Tensor scale, Tensor? bias, str ggml_type, str kernel) -> Tensor",
    _ggml_linear,
    _rows_of("codes"),
    _dense(_ggml_weight),
)
_operator(
    "ggml_dequantize(Tensor codes, Tensor? high, Tensor scale, str ggml_type, SymInt in_features, ScalarType dtype) -> Tensor",
    to_floats(ggml_kernels.dequantize),
    lambda codes, in_features, **given: _dense_weight(codes, codes.shape[0], in_features, given["dtype"]),
)

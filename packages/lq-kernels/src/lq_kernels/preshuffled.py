"""Weights in fragment order: the form that the Hopper kernels read, made once from canonical bits and as large.

A layer that keeps its weight so stores it once, for decoding and prefill alike. Nothing is lost: ``restore_int4``,
``restore_int8`` and ``restore_q4_0`` give the canonical bits back, on any device.
"""

import torch
from lq_formats import DeviceError, DTypeError, OutOfRangeError, ShapeError, check_tensors, pack_int4, unpack_int4
from lq_formats.layouts import FRAGMENT_INT4, FRAGMENT_INT8, INT8, FragmentLayout
from torch import Tensor
from torch.nn.functional import linear

from lq_kernels import ops as _ops  # noqa: F401  (registers the operators)
from lq_kernels import q4_0
from lq_kernels.cuda import constraints
from lq_kernels.derivatives import differentiable
from lq_kernels.eager import invisible, recall, remember
from lq_kernels.gated import interleaved_rows, separate_rows
from lq_kernels.invariance import ask
from lq_kernels.ops import preshuffled_spec
from lq_kernels.problem import Arch
from lq_kernels.validation import (
    ACTIVATIONS,
    check_activations,
    check_bias,
    check_dense_dtype,
    check_devices,
    check_group_size,
    check_int4,
    check_sizes,
)

_LAYOUTS = {4: FRAGMENT_INT4, 8: FRAGMENT_INT8}


def preshuffle_int4(
    qweight: Tensor, scale: Tensor, zero: Tensor | None = None, *, group_size: int, in_features: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring a canonical int4 weight into fragment order.

    Args:
        qweight: ``(N, ceil(K / 8)) int32``, the packing of :func:`lq_formats.pack_int4`.
        scale: ``(N, K // group_size)`` fp16, bf16 or fp32.
        zero: ``(N, K // group_size)``, uint8 or of scale's dtype; None for symmetric weights.
        group_size: In features per scale; K for one scale a row.
        in_features: K.

    Returns:
        packed (:class:`lq_formats.layouts.FragmentLayout`), scale and zero (its ``scale_shape``), zero in
        scale's dtype.

    Raises:
        ShapeError, GroupSizeError, DTypeError: If the arguments do not fit each other.
    """
    check_sizes(in_features=in_features)
    check_int4(qweight, scale, zero, group_size, in_features)
    start_compiler(qweight.device)
    packed = FRAGMENT_INT4.pack(unpack_int4(qweight, in_features))
    sizes = in_features, group_size
    arranged = FRAGMENT_INT4.arrange_scales(scale, *sizes)
    return packed, arranged, None if zero is None else FRAGMENT_INT4.arrange_scales(zero.to(scale.dtype), *sizes)


def preshuffle_int8(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Bring an int8 weight ``(N, K)`` with scales ``(N,)`` or ``()`` into fragment order.

    Returns:
        packed, and scale ``(1, rows)``.

    Raises:
        ShapeError, DTypeError: If the arguments do not fit each other.
    """
    check_tensors(weight=weight, scale=scale)
    if weight.dtype != torch.int8:
        raise DTypeError(f"weight has dtype {weight.dtype}: expected int8")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ShapeError(f"weight has shape {tuple(weight.shape)}: expected (N, K)")
    if scale.dtype not in ACTIVATIONS:
        raise DTypeError(f"scale has dtype {scale.dtype}: expected float16, bfloat16 or float32")
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != weight.shape[0]):
        raise ShapeError(
            f"scale has shape {tuple(scale.shape)}: expected ({weight.shape[0]},) per row or () per tensor"
        )
    start_compiler(weight.device)
    packed = FRAGMENT_INT8.pack(INT8.unpack(weight))
    rows, columns = weight.shape
    return packed, FRAGMENT_INT8.arrange_scales(scale.expand(rows)[:, None], columns, columns)


def preshuffle_q4_0(weight_q: Tensor) -> tuple[Tensor, Tensor]:
    """Bring ggml's Q4_0 blocks into fragment order: they are an int4 weight in groups of 32 with fp16 scales.

    Args:
        weight_q: ``(N, K // 32, 18) uint8``.

    Returns:
        packed, and scale fp16: what :func:`preshuffled_linear` multiplies with ``bits=4, group_size=32``.

    Raises:
        ShapeError, DTypeError: If these are not such blocks.
    """
    check_tensors(weight_q=weight_q)
    if weight_q.dtype != torch.uint8:
        raise DTypeError(f"weight_q has dtype {weight_q.dtype}: expected uint8 Q4_0 blocks")
    if weight_q.dim() != 3 or weight_q.shape[2] != 18 or weight_q.shape[1] == 0:
        raise ShapeError(f"weight_q has shape {tuple(weight_q.shape)}: expected (N, K / 32, 18)")
    start_compiler(weight_q.device)
    return q4_0.pack_codes(weight_q), q4_0.pack_scales(weight_q)


def restore_int4(
    packed: Tensor, scale: Tensor, zero: Tensor | None, *, group_size: int, out_features: int, in_features: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undo :func:`preshuffle_int4`; zero stays in scale's dtype.

    Raises:
        ShapeError, GroupSizeError, DTypeError: If the tensors are not those of such a weight.
    """
    check_sizes(out_features=out_features, in_features=in_features)
    check_group_size(group_size, in_features)
    check_tensors(packed=packed, scale=scale)
    if zero is not None:
        check_tensors(zero=zero)
    sizes = out_features, in_features, group_size
    return (
        pack_int4(FRAGMENT_INT4.unpack(packed, out_features, in_features)),
        FRAGMENT_INT4.restore_scales(scale, *sizes),
        None if zero is None else FRAGMENT_INT4.restore_scales(zero, *sizes),
    )


def restore_int8(packed: Tensor, scale: Tensor, *, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`preshuffle_int8`; scale is ``(N,)``."""
    check_sizes(out_features=out_features, in_features=in_features)
    check_tensors(packed=packed, scale=scale)
    codes = FRAGMENT_INT8.unpack(packed, out_features, in_features)
    return INT8.pack(codes), FRAGMENT_INT8.restore_scales(scale, out_features, in_features, in_features)[
        :, 0
    ].contiguous()


def restore_q4_0(
    packed: Tensor, scale: Tensor, *, out_features: int, in_features: int, rows: Tensor | None = None
) -> Tensor:
    """Undo :func:`preshuffle_q4_0`, byte for byte.

    Args:
        packed: As :func:`preshuffle_q4_0` returns it.
        scale: Likewise.
        out_features: N.
        in_features: K.
        rows: ``(R,)`` int32 or int64, 0 to N - 1, for some rows only; the others are not read.

    Returns:
        ``(N, K // 32, 18) uint8``, or ``(R, K // 32, 18)``.

    Raises:
        ShapeError, DTypeError: If the tensors are not those of such a weight.
        OutOfRangeError: If there is no such row; a GPU ends the process as for a dense embedding.
    """
    check_sizes(out_features=out_features, in_features=in_features)
    if in_features % q4_0.BLOCK:
        raise ShapeError(f"in_features={in_features}: Q4_0 needs a multiple of {q4_0.BLOCK}")
    check_tensors(scale=scale)
    if scale.dtype != torch.float16:
        raise DTypeError(f"scale has dtype {scale.dtype}: Q4_0 has float16 scales")
    check_fragments(packed, scale, None, 4, q4_0.BLOCK, out_features, in_features)
    if rows is not None:
        return q4_0.unpack_rows(packed, scale, _checked_rows(rows, out_features, packed.device), in_features)
    blocks = packed.new_empty((out_features, in_features // q4_0.BLOCK, 18), dtype=torch.uint8)
    every = torch.arange(out_features, device=packed.device)
    for some in q4_0.row_slices(out_features, in_features):
        blocks[some] = q4_0.unpack_rows(packed, scale, every[some], in_features)
    return blocks


def _checked_rows(rows: Tensor, out_features: int, device: torch.device) -> Tensor:
    check_tensors(rows=rows)
    if rows.dtype not in (torch.int32, torch.int64):
        raise DTypeError(f"rows have dtype {rows.dtype}: expected int32 or int64")
    if rows.dim() != 1:
        raise ShapeError(f"rows have shape {tuple(rows.shape)}: expected (R,)")
    if rows.device != device:
        raise DeviceError(f"rows are on {rows.device} and the other tensors on {device}; move one of them")
    try:
        # Indexing checks them, which padded rows would hide.
        return torch.arange(out_features, device=device).index_select(0, rows)
    except IndexError:
        raise OutOfRangeError(
            f"rows from {int(rows.min())} to {int(rows.max())}: this weight has rows 0 to {out_features - 1}"
        ) from None


def reads_fragments(device: torch.device) -> bool:
    """Return whether the kernels that read fragment order run on a device: a Hopper GPU, with NVRTC."""
    return constraints.why_not_hopper(Arch.of(device)) is None


def start_compiler(device: torch.device) -> None:
    """Start NVRTC in a thread if :func:`reads_fragments`: once a process, and not where the disk cache has kernels.

    What quantizes or packs a weight calls this first: the processor has time while the GPU works, and
    :func:`lq_torch.warmup` finds the compiler started. An error is left to the first kernel that compiles.
    """
    if reads_fragments(device):
        from lq_kernels.jit import nvrtc

        nvrtc.start()


def preshuffled_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Multiply activations with a weight in fragment order: ``y = x @ ((u - zero) * scale).T + bias + residual``.

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32.
        packed: As :func:`preshuffle_int4` or :func:`preshuffle_int8` returns it.
        scale: Arranged alike (:meth:`lq_formats.layouts.FragmentLayout.scale_shape`).
        zero: As ``scale``; None for symmetric weights, as 8-bit ones are.
        bits: 4 or 8.
        group_size: In features per scale; K for one scale a row.
        out_features: N.
        bias: ``(N,)`` in x's dtype; added in fp32 before the result is rounded, by the Hopper kernels.
        residual: ``(..., N)`` in x's dtype; added likewise, in the same launch.
        kernel: Force a kernel by name; see :func:`lq_kernels.kernel_names`.

    Returns:
        ``(..., N)`` in x's dtype.

    Raises:
        ShapeError, DTypeError, DeviceError: If the arguments do not fit each other.
        NoKernelError: If the forced kernel cannot run this problem.
    """
    direct = kernel is None and residual is None and invisible(x, bias)
    values = (out_features, group_size, bits)
    if direct and (known := recall(x, packed, (scale, zero, bias), values)) is not None:
        return known
    k = check_activations(x)
    check_fragments(packed, scale, zero, bits, group_size, out_features, k)
    check_devices(x, packed=packed, scale=scale, zero=zero, bias=bias)
    if bias is not None:
        check_bias(bias, out_features, x.dtype)
    weight, sizes = (packed, scale, zero, bias), (bits, group_size, out_features)
    shape = (*x.shape[:-1], out_features)

    def dense(x: Tensor) -> Tensor:
        w: Tensor = torch.ops.lq.preshuffled_dequantize(packed, scale, zero, *sizes, k, x.dtype)
        return w

    if residual is not None:
        check_devices(x, residual=residual)
        if residual.shape != shape:
            raise ShapeError(f"residual has shape {tuple(residual.shape)}: expected {shape}")
        if residual.dtype != x.dtype:
            raise DTypeError(f"residual has dtype {residual.dtype} and x {x.dtype}: convert one of them")
        y = differentiable(
            lambda x, bias, residual: torch.ops.lq.preshuffled_linear_add(
                x, packed, scale, zero, bias, residual, *sizes, ask(kernel)
            ),
            lambda x, bias, residual: linear(x, dense(x), bias) + residual,
            x.reshape(-1, k),
            bias,
            residual.reshape(x.numel() // k, out_features),  # -1 is ambiguous where there are no out features
        )
    else:
        y = differentiable(
            lambda x, bias: torch.ops.lq.preshuffled_linear(x, packed, scale, zero, bias, *sizes, ask(kernel)),
            lambda x, bias: linear(x, dense(x), bias),
            x.reshape(-1, k),
            bias,
        )
    if direct:
        spec = preshuffled_spec(bits, group_size, k, zero is None, scale.dtype)
        remember("preshuffled", weight, values, out_features, k, spec, x.dtype)
    return y.view(shape)


def preshuffled_gated_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    bias: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Multiply activations with a gate and an up projection in one launch: ``silu(x @ gate.T) * (x @ up.T)``.

    The weight is that of both: their codes, scales and zeros were stacked, interleaved by :func:`lq_kernels.interleave_rows`
    and then brought into fragment order.

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32.
        packed: As :func:`preshuffle_int4` or :func:`preshuffle_int8` returns it for interleaved rows.
        scale: Arranged alike (:meth:`lq_formats.layouts.FragmentLayout.scale_shape`).
        zero: As ``scale``; None for symmetric weights.
        bits: 4 or 8.
        group_size: In features per scale; K for one scale a row.
        out_features: H, of each of the two.
        bias: ``(2 H,)`` in x's dtype, that of the gates and then that of the ups, not interleaved.
        kernel: Force a kernel by name; see :func:`lq_kernels.kernel_names` of ``"preshuffled_gated"``.

    Returns:
        ``(..., H)`` in x's dtype. The Hopper kernels round it once, so it is closer to the exact result than that of layers
        apart; see :mod:`lq_kernels.gated`.

    Raises:
        ShapeError, DTypeError, DeviceError: If the arguments do not fit each other.
        NoKernelError: If the forced kernel cannot run this problem.
    """
    direct = kernel is None and invisible(x, bias)
    values = (out_features, group_size, bits)
    if direct and (known := recall(x, packed, (scale, zero, bias), values)) is not None:
        return known
    k = check_activations(x)
    check_fragments(packed, scale, zero, bits, group_size, interleaved_rows(out_features), k)
    check_devices(x, packed=packed, scale=scale, zero=zero, bias=bias)
    if bias is not None:
        check_bias(bias, 2 * out_features, x.dtype)
    sizes = (bits, group_size)

    def dense(x: Tensor, bias: Tensor | None) -> Tensor:
        rows = interleaved_rows(out_features)
        w = torch.ops.lq.preshuffled_dequantize(packed, scale, zero, *sizes, rows, k, x.dtype)
        gate, up = linear(x, separate_rows(w, out_features), bias).chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up  # silu has no derivative of second order in forward mode

    y = differentiable(
        lambda x, bias: torch.ops.lq.preshuffled_gated_linear(
            x, packed, scale, zero, bias, *sizes, out_features, ask(kernel)
        ),
        dense,
        x.reshape(-1, k),
        bias,
    )
    if direct:
        spec = preshuffled_spec(bits, group_size, k, zero is None, scale.dtype)
        remember("preshuffled_gated", (packed, scale, zero, bias), values, 2 * out_features, k, spec, x.dtype)
    return y.view(*x.shape[:-1], out_features)


def preshuffled_dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the ``(out_features, in_features)`` weight in ``dtype``, rounded once from fp32.

    Arguments and errors are those of :func:`preshuffled_linear`.
    """
    check_fragments(packed, scale, zero, bits, group_size, out_features, in_features)
    check_devices(packed, scale=scale, zero=zero)
    check_dense_dtype(dtype)
    w: Tensor = torch.ops.lq.preshuffled_dequantize(
        packed, scale, zero, bits, group_size, out_features, in_features, dtype
    )
    return w


def check_fragments(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    k: int,
    second: str = "zero",
) -> None:
    """Raise unless the tensors are a weight in fragment order with ``k`` in features; ``second`` is the name of ``zero``."""
    layout: FragmentLayout | None = _LAYOUTS.get(bits)
    if layout is None:
        raise ShapeError(f"bits={bits!r}: expected 4 or 8")
    check_sizes(out_features=out_features, in_features=k)
    check_tensors(packed=packed, scale=scale)
    if zero is not None:
        check_tensors(**{second: zero})
    if packed.dtype != torch.int32:
        raise DTypeError(f"packed has dtype {packed.dtype}: expected int32")
    shape = layout.packed_shape(out_features, k)
    if tuple(packed.shape) != shape:
        raise ShapeError(f"packed has shape {tuple(packed.shape)}: {out_features} out and {k} in features need {shape}")
    if not (packed.is_contiguous() and scale.is_contiguous() and (zero is None or zero.is_contiguous())):
        raise ShapeError("a weight in fragment order is contiguous; call .contiguous() on its tensors")
    if bits == 8 and zero is not None:
        raise ShapeError("8-bit weights in fragment order have no zeros")
    check_group_size(group_size, k)
    expected = layout.scale_shape(out_features, k, group_size)
    for name, tensor in (("scale", scale), (second, zero)):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}: expected {expected} for group_size={group_size}")
    if scale.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise DTypeError(f"scale has dtype {scale.dtype}: expected float16, bfloat16 or float32")
    if zero is not None and zero.dtype != scale.dtype:
        raise DTypeError(f"{second} has dtype {zero.dtype}: expected the scales' {scale.dtype}")

"""Products of a gate and an up projection that end as ``silu(gate) * up``: how rows are ordered for them, and how computed.

A kernel can multiply a gate with its up where one lane holds both. So the rows of the two weights, stacked ``(2 H, K)``,
alternate by eights, and in fragment order (:class:`lq_formats.layouts.FragmentLayout`) a lane's rows g and g + 8 are a pair::

    row of a block     0  1  2  3  4  5  6  7 | 8  9 10 11 12 13 14 15
    block 0            gate 0 ... gate 7      | up 0 ... up 7
    block 1            gate 8 ... gate 15     | up 8 ... up 15

Nothing is lost: it is a permutation, padded with zeros where H is no multiple of 8. Biases keep their order, gates then ups.

Error: the Hopper kernels compute the epilogue in fp32 from fp32 sums and round once. ``dequant-blas`` rounds gate and up to x's
dtype before, and layers apart round silu(gate) as well: each is farther from the exact result than the one before.
"""

from dataclasses import replace

import torch
from lq_formats import ShapeError, check_tensors
from torch import Tensor

from lq_kernels import cost, dequant_blas, plans
from lq_kernels.plans import Plan
from lq_kernels.problem import Problem
from lq_kernels.reference import preshuffled_dequantize_reference
from lq_kernels.validation import check_sizes

_HALF = 8


def interleaved_rows(out_features: int) -> int:
    """Return how many rows the interleaved weight of so many gates has: whole blocks of 16."""
    check_sizes(out_features=out_features)
    return -(-out_features // _HALF) * 2 * _HALF


def interleave_rows(values: Tensor) -> Tensor:
    """Bring rows of gates, then ups, into the order above.

    Args:
        values: ``(2 H, ...)``: codes, scales or zeros of the stacked weights, a bias, or a gradient.

    Returns:
        ``(interleaved_rows(H), ...)``, padded with zeros.

    Raises:
        ShapeError: If there are not as many gates as ups.
    """
    check_tensors(values=values)
    if values.dim() == 0 or values.shape[0] % 2:
        raise ShapeError(f"values have shape {tuple(values.shape)}: expected (2 H, ...), gates and then as many ups")
    half = values.shape[0] // 2
    rest, padding = values.shape[1:], -half % _HALF
    pair = values.reshape(2, half, *rest)
    if padding:
        pair = torch.cat((pair, pair.new_zeros(2, padding, *rest)), dim=1)
    blocks = (half + padding) // _HALF
    return pair.reshape(2, blocks, _HALF, *rest).transpose(0, 1).reshape(2 * blocks * _HALF, *rest)


def separate_rows(values: Tensor, out_features: int) -> Tensor:
    """Undo :func:`interleave_rows`: return the ``(2 out_features, ...)`` that it was given.

    Raises:
        ShapeError: If ``values`` are not so many rows.
    """
    check_tensors(values=values)
    check_sizes(out_features=out_features)
    if values.dim() == 0 or values.shape[0] != interleaved_rows(out_features):
        expected = interleaved_rows(out_features)
        raise ShapeError(
            f"values have shape {tuple(values.shape)}: {out_features} gates and ups need ({expected}, ...)"
        )
    rest, blocks = values.shape[1:], values.shape[0] // (2 * _HALF)
    pair = values.reshape(blocks, 2, _HALF, *rest).transpose(0, 1).reshape(2, blocks * _HALF, *rest)
    return pair[:, :out_features].reshape(2 * out_features, *rest)


def silu_multiply(y: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
    """Return ``silu(gate) * up (M, out_features)`` of a product ``y (M, interleaved_rows(out_features))``.

    Computed in float32 (float64 for a float64 ``y``), rounded once to ``dtype``.
    """
    m, rows = y.shape
    pairs = y.view(m, rows // (2 * _HALF), 2, _HALF)
    gate, up = pairs[:, :, 0], pairs[:, :, 1]
    wide = gate.to(torch.promote_types(y.dtype, torch.float32), copy=True)
    result = torch.nn.functional.silu(wide, inplace=True).mul_(up).to(dtype)
    return result.view(m, rows // 2)[:, :out_features].contiguous()


def dense(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
) -> Tensor:
    """Return ``silu(gate) * up`` by unpacking the weight and the vendor's product; see :mod:`lq_kernels.dequant_blas`."""
    rows = interleaved_rows(out_features)
    interleaved = None if bias is None else interleave_rows(bias)
    y = dequant_blas.preshuffled_linear(x, packed, scale, zero, interleaved, rows, group_size, bits)
    return silu_multiply(y, out_features, x.dtype)


def reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
) -> Tensor:
    """Return ``silu(gate) * up`` in float64, rounded once to x's dtype."""
    sizes = (bits, group_size, interleaved_rows(out_features), x.shape[1])
    y = x.to(torch.float64) @ preshuffled_dequantize_reference(packed, scale, zero, *sizes, torch.float64).t()
    if bias is not None:
        y += interleave_rows(bias).to(torch.float64)
    return silu_multiply(y, out_features, x.dtype)


def backward(grad: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the product ``y (M, rows)`` before the epilogue, in its dtype.

    Args:
        grad: ``(M, H)``, of ``silu(gate) * up``.
        y: ``(M, interleaved_rows(H))``, the product with its bias.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    gate, up = separate_rows(y.t(), grad.shape[1]).to(wide).chunk(2)
    outer = grad.t().to(wide)
    gate_share = torch.sigmoid(gate)
    silu = gate * gate_share
    of_gate = outer * up * (gate_share + silu * (1 - gate_share))
    return interleave_rows(torch.cat((of_gate, outer * silu))).t().to(y.dtype)


def plan_dense(problem: Problem) -> Plan:
    """Plan :func:`dense`: the product, then four small kernels over 30 bytes a result."""
    limits = cost.machine(problem.arch)
    found = plans.dense(problem)
    return replace(found, us=found.us + 4 * limits.launch + 15 * problem.m * problem.n / limits.bandwidth)


def predict_dense_us(problem: Problem) -> float:
    """Predict the microseconds of :func:`dense`."""
    return plan_dense(problem).us

"""What the arguments of this package's functions must be: each condition stated once, each error named."""

import functools
from collections.abc import Callable

import torch
from lq_formats import DeviceError, DTypeError, GroupSizeError, ShapeError, check_tensors
from torch import Tensor

ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (int, torch.SymInt)
_MIN_GROUP_SIZE = 8


def check_activations(x: Tensor) -> int:
    """Return the in features of x.

    Raises:
        DTypeError, ShapeError: If x is not a floating point tensor of at least one dimension.
    """
    check_tensors(x=x)
    if x.dtype not in ACTIVATIONS:
        raise DTypeError(f"x has dtype {x.dtype}: expected float16, bfloat16 or float32")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ShapeError(f"x has shape {tuple(x.shape)}: expected (..., in_features)")
    return x.shape[-1]


def check_int4(qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, k: int) -> None:
    """Raise unless the tensors are a canonical int4 weight with ``k`` in features."""
    check_tensors(qweight=qweight, scale=scale)
    if qweight.dtype != torch.int32:
        raise DTypeError(f"qweight has dtype {qweight.dtype}: expected int32 words of eight codes")
    words = -(-k // 8)
    if qweight.dim() != 2:
        raise ShapeError(f"qweight has shape {tuple(qweight.shape)}: {k} in features need (N, {words})")
    if qweight.shape[1] != words:
        raise ShapeError(
            f"qweight has shape {tuple(qweight.shape)}, at most {8 * qweight.shape[1]} in features, and the activations "
            f"have {k}: expected (N, {words})"
        )
    check_group_size(group_size, k)
    if group_size < _MIN_GROUP_SIZE and group_size != k:
        raise GroupSizeError(f"group_size={group_size}: expected at least {_MIN_GROUP_SIZE}")
    expected = (qweight.shape[0], k // group_size)
    if tuple(scale.shape) != expected:
        raise ShapeError(f"scale has shape {tuple(scale.shape)}: expected {expected} for group_size={group_size}")
    if scale.dtype not in ACTIVATIONS:
        raise DTypeError(f"scale has dtype {scale.dtype}: expected float16, bfloat16 or float32")
    if zero is not None:
        check_tensors(zero=zero)
        if tuple(zero.shape) != expected:
            raise ShapeError(f"zero has shape {tuple(zero.shape)}: expected {expected} for group_size={group_size}")
        if zero.dtype not in (torch.uint8, scale.dtype):
            raise DTypeError(f"zero has dtype {zero.dtype}: expected uint8 or the scales' {scale.dtype}")


def check_sizes(**sizes: object) -> None:
    """Raise ShapeError, by name, unless these are integers from 0 up."""
    for name, size in sizes.items():
        if not isinstance(size, INTEGERS) or isinstance(size, bool) or (isinstance(size, int) and size < 0):
            raise ShapeError(f"{name}={size!r}: expected an integer from 0 up")


def check_group_size(group_size: int, k: int) -> None:
    """Raise GroupSizeError unless the group size divides ``k`` in features."""
    if not isinstance(group_size, INTEGERS):
        raise GroupSizeError(f"group_size={group_size!r}: expected an integer")
    if group_size < 1 or k % group_size:
        raise GroupSizeError(f"group_size={group_size} does not divide the {k} in features")


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Raise DeviceError unless all tensors are on x's device; DTypeError if what is there is no tensor."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        check_tensors(**{name: tensor})
        if tensor.device != x.device:
            raise DeviceError(f"{name} is on {tensor.device} and the other tensors on {x.device}; move one of them")


def check_bias(bias: Tensor, out_features: int, dtype: torch.dtype) -> None:
    """Raise unless ``bias`` is ``(out_features,)`` in x's dtype."""
    check_tensors(bias=bias)
    if tuple(bias.shape) != (out_features,):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}: expected ({out_features},)")
    if bias.dtype != dtype:
        raise DTypeError(f"bias has dtype {bias.dtype} and x {dtype}: convert one of them")


def check_dense_dtype(dtype: object) -> None:
    """Raise DTypeError unless a weight can be dequantized to ``dtype``: integers would round it to zeros."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise DTypeError(
            f"dtype={dtype}: expected float16, bfloat16, float32 or float64; weights are not dequantized to integers"
        )


def to_floats(dequantize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an operator that dequantizes to the dtype that is its last argument, with that checked."""

    @functools.wraps(dequantize)
    def run(*args: object) -> Tensor:
        check_dense_dtype(args[-1])
        return dequantize(*args)

    return run

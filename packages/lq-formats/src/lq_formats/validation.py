"""Checks that every codec makes of its input, each stated once, each with an error that says what to do."""

import torch
from torch import Tensor

from lq_formats.errors import (
    DeviceError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    SizeOverflowError,
    SpecError,
    UnsupportedError,
)

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_ELEMENTS = 2**63 - 1


def check_tensors(**values: object) -> None:
    """Raise DTypeError, by name, unless these are tensors."""
    for name, value in values.items():
        check_tensor(value, name)


def check_tensor(value: object, name: str) -> None:
    """Raise DTypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise DTypeError(
            f"{name} is of type {type(value).__name__}: expected a torch.Tensor (torch.as_tensor makes one)"
        )


def check_float(tensor: Tensor, name: str = "weight") -> None:
    """Raise DTypeError unless ``tensor`` is one, of fp16, bf16, fp32 or fp64."""
    check_tensor(tensor, name)
    if tensor.dtype not in FLOAT_DTYPES:
        raise DTypeError(
            f"{name} has dtype {tensor.dtype}: expected float16, bfloat16, float32 or float64; convert it with .to()"
        )


def check_matrix(tensor: Tensor, name: str = "weight") -> tuple[int, int]:
    """Return ``(out_features, in_features)`` of a 2-D tensor with in features; raise ShapeError or DTypeError otherwise."""
    check_tensor(tensor, name)
    if tensor.dim() != 2:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}: expected 2 dimensions (out_features, in_features)")
    rows, columns = tensor.shape
    if columns == 0:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}: expected at least one in feature")
    return rows, columns


def check_finite(tensor: Tensor, name: str = "weight") -> None:
    """Raise NonFiniteError, naming the tensor and the first bad element, if it holds NaN or infinity.

    Raises:
        DeviceError: If it is on meta, and holds nothing.
        UnsupportedError: If it is sparse, or otherwise has no strides.
        DTypeError: If it is no tensor.
    """
    check_tensor(tensor, name)
    if tensor.device.type == "meta":
        raise DeviceError(f"{name} is on meta and has no values; load the weights first")
    if tensor.layout is not torch.strided:
        raise UnsupportedError(
            f"{name} has the layout {tensor.layout}: expected torch.strided; make it so with .to_dense()"
        )
    if tensor.numel() == 0:
        return
    # min and max see every NaN and infinity without a temporary of the tensor's size.
    low, high = torch.aminmax(tensor.detach())
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return
    bad = ~torch.isfinite(tensor.detach())
    index = tuple(int(i) for i in bad.nonzero()[0])
    value = float(tensor.detach()[index])
    raise NonFiniteError(
        f"{name} holds {int(bad.sum())} non-finite values, the first ({value}) at index {index}: no quantized format "
        "can represent them; repair or exclude this weight"
    )


def check_scale(scale: Tensor, name: str = "scale") -> None:
    """Raise NonFiniteError if a scale is NaN, infinite or zero: nothing can be divided by it."""
    check_finite(scale, name)
    if scale.numel() and bool((scale == 0).any()):
        raise NonFiniteError(f"{name} holds zeros: a group of zero weights takes any positive scale, for example 1")


def check_codes(codes: Tensor, bits: int, name: str = "codes") -> None:
    """Raise DTypeError or SpecError unless ``codes`` are uint8 numbers of ``bits`` bits."""
    check_tensor(codes, name)
    if codes.dtype != torch.uint8:
        raise DTypeError(f"{name} have dtype {codes.dtype}: expected unsigned codes in uint8")
    if bits < 8 and codes.numel():
        largest = int(codes.max())
        if largest >> bits:
            raise SpecError(f"{name} hold {largest}, which does not fit {bits} bits: expected 0 to {(1 << bits) - 1}")


def check_device(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Raise DeviceError unless both tensors are on one device; DTypeError if one is no tensor."""
    check_tensor(tensor, name)
    check_tensor(other, other_name)
    if tensor.device != other.device:
        raise DeviceError(
            f"{name} is on {tensor.device} and {other_name} on {other.device}: move one of them with .to()"
        )


def check_elements(*sizes: int, name: str = "weight") -> int:
    """Return the product of ``sizes``, or raise SizeOverflowError if it does not fit a signed 64-bit integer."""
    total = 1
    for size in sizes:
        if size < 0:
            raise ShapeError(f"{name} has a negative size in {sizes}")
        total *= size
    if total > _MAX_ELEMENTS:
        raise SizeOverflowError(f"{name} of sizes {sizes} has {total} elements: more than 2**63 - 1")
    return total

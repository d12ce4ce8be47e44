"""The named tensors of one linear layer in a checkpoint: taken with their dtype and shape checked."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lq_formats.errors import DTypeError, FormatError, ShapeError
from lq_formats.validation import check_tensor


def take(
    tensors: Mapping[str, Tensor], name: str, layout: str, dtypes: tuple[torch.dtype, ...], rank: int | None
) -> Tensor:
    """Return ``tensors[name]``.

    Raises:
        FormatError: If it is missing.
        DTypeError, ShapeError: If it is no tensor, not of one of ``dtypes``, or not of rank ``rank`` (any, if None).
    """
    if name not in tensors:
        raise FormatError(f"{layout} layer has no tensor {name!r}: it has {sorted(tensors)}")
    tensor = tensors[name]
    check_tensor(tensor, f"{layout} tensor {name!r}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise DTypeError(f"{layout} tensor {name!r} has dtype {tensor.dtype}: expected {expected}")
    if rank is not None and tensor.dim() != rank:
        raise ShapeError(f"{layout} tensor {name!r} has shape {tuple(tensor.shape)}: expected {rank} dimensions")
    return tensor


def expect_shape(tensor: Tensor, name: str, layout: str, shape: tuple[int, ...]) -> None:
    """Raise ShapeError unless ``tensor`` has ``shape``."""
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{layout} tensor {name!r} has shape {tuple(tensor.shape)}: expected {shape}")


def symmetric_zero(zero: Tensor, bits: int, layout: str) -> None:
    """Raise FormatError unless every stored zero is the midpoint that a symmetric weight implies."""
    midpoint = 1 << (bits - 1)
    if bool((zero != midpoint).any()):
        raise FormatError(
            f"{layout} layer claims to be symmetric, but not all of its zeros are {midpoint}: read it as asymmetric"
        )


def meaningful_g_idx(g_idx: Tensor, groups: int, layout: str) -> Tensor | None:
    """Return ``g_idx: (K,)`` as int32, or None if it says nothing: consecutive groups, or all -1 (not initialised).

    Raises:
        FormatError: If a group is out of range.
    """
    size = g_idx.shape[0] // groups
    consecutive = torch.arange(g_idx.shape[0], device=g_idx.device, dtype=g_idx.dtype) // size
    if torch.equal(g_idx, consecutive) or bool((g_idx == -1).all()):
        return None
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise FormatError(f"{layout} g_idx holds groups {low} to {high}: expected 0 to {groups - 1}")
    return g_idx.to(torch.int32)

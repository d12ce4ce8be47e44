"""Tensor maps: what Hopper's copy engine knows of a matrix in global memory.

Encoding one on the host takes microseconds, so maps are cached by everything they hold: the address, the sizes and the box.
"""

import ctypes
import functools
from typing import Any

import torch
from lq_formats import DTypeError, ShapeError
from torch import Tensor

from lq_kernels.jit import driver

_MAX_BOX = 256
_SWIZZLE_BYTES = 128


class TensorMap:
    """A kernel parameter of 128 bytes (CUtensorMap).

    Attributes:
        address: Where its bytes are on the host.
    """

    def __init__(self, encoded: Any) -> None:
        self._encoded = encoded  # owns the bytes
        self.address = ctypes.addressof(encoded)


def tensor_map(matrix: Tensor, box_rows: int, box_columns: int) -> TensorMap:
    """Return the map that copies boxes of a row-major matrix to shared memory in the 128-byte swizzle.

    What a box has outside of the matrix arrives as zeros.

    Args:
        matrix: ``(rows, columns)`` of 8- or 16-bit elements on a GPU, rows contiguous, its address and the distance of rows
            multiples of 16 bytes.
        box_rows: Rows of a box, at most 256.
        box_columns: Columns of a box: 128 bytes.

    Raises:
        ShapeError, DTypeError: If the copy engine cannot take the matrix.
        LaunchError: If the driver refuses.
    """
    rows, columns = matrix.shape
    size = matrix.element_size()
    if size not in (1, 2):
        raise DTypeError(f"matrix has dtype {matrix.dtype}: expected 8 or 16 bits")
    pitch = matrix.stride(0) * size
    if matrix.stride(1) != 1 or matrix.data_ptr() % 16 or pitch % 16:
        raise ShapeError(
            f"matrix of shape {tuple(matrix.shape)} and strides {matrix.stride()} does not start and continue at multiples of "
            "16 bytes: copy it"
        )
    if not 0 < box_rows <= _MAX_BOX or box_columns * size != _SWIZZLE_BYTES:
        raise ShapeError(f"box of {box_rows} x {box_columns}: expected up to {_MAX_BOX} rows of {_SWIZZLE_BYTES} bytes")
    return _encode(matrix.data_ptr(), rows, columns, pitch, size, box_rows, matrix.dtype == torch.bfloat16)


@functools.lru_cache(maxsize=1024)
def _encode(address: int, rows: int, columns: int, pitch: int, size: int, box_rows: int, bf16: bool) -> TensorMap:
    dtype = "uint8" if size == 1 else "bfloat16" if bf16 else "float16"
    return TensorMap(driver.encode_tensor_map(dtype, address, rows, columns, pitch, box_rows, _SWIZZLE_BYTES // size))

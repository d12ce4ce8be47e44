"""The few functions of NVIDIA's driver that lq calls, through ctypes, on the library that torch has loaded.

``cuda.core`` has no programmatic dependent launch, and importing it takes 0.3 s: more than everything else that a process with
a full cache does before its first product.
"""

import ctypes
import functools
from typing import Any

from lq_formats import LaunchError

SUCCESS = 0
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: among others, no context is current on the thread
_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_UINT8, _FLOAT16, _BFLOAT16 = 0, 6, 9  # CUtensorMapDataType
_TENSOR_MAP_BYTES, _TENSOR_MAP_ALIGNMENT = 128, 64
_SWIZZLE_128B, _L2_PROMOTION_256B = 3, 3
_TYPES = {"uint8": _UINT8, "float16": _FLOAT16, "bfloat16": _BFLOAT16}

_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuCtxGetCurrent": (ctypes.c_void_p,),
    "cuCtxSetCurrent": (ctypes.c_void_p,),
    "cuDeviceGet": (ctypes.c_void_p, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.c_void_p, ctypes.c_int),
    "cuKernelSetAttribute": (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int),
    "cuLaunchKernelEx": (ctypes.c_void_p,) * 4,
    "cuLibraryGetKernel": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
    "cuLibraryLoadData": (
        ctypes.c_void_p,
        ctypes.c_char_p,
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
    ),
    "cuTensorMapEncodeTiled": (
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int,) * 4,
    ),
}


@functools.cache
def function(name: str) -> Any:
    """Return a function of the driver that returns a status."""
    library = ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")
    found = getattr(library, name)
    found.argtypes = _ARGUMENTS[name]
    found.restype = ctypes.c_int
    return found


def make_current(index: int) -> None:
    """Make the primary context of GPU ``index`` current on this thread, if there is none.

    Raises:
        LaunchError: If the driver refuses.
    """
    context, device = ctypes.c_void_p(), ctypes.c_int()
    _check(function("cuCtxGetCurrent")(ctypes.byref(context)), "cannot say which context is current")
    if not context.value:
        _check(function("cuDeviceGet")(ctypes.byref(device), index), f"has no GPU {index}")
        _check(function("cuDevicePrimaryCtxRetain")(ctypes.byref(context), device), f"has no context for GPU {index}")
        _check(function("cuCtxSetCurrent")(context), f"cannot use the context of GPU {index}")


def load_kernel(code: bytes, kernel: str) -> int:
    """Load a cubin, for all GPUs and until the process ends, and return the handle of one of its kernels.

    Raises:
        LaunchError: If the driver does not take it.
    """
    library, handle = ctypes.c_void_p(), ctypes.c_void_p()
    status = function("cuLibraryLoadData")(ctypes.byref(library), code, None, None, 0, None, None, 0)
    _check(status, f"does not take the code of {kernel}")
    _check(function("cuLibraryGetKernel")(ctypes.byref(handle), library, kernel.encode()), f"finds no kernel {kernel}")
    return int(handle.value or 0)


def allow_shared(handle: int, index: int, most: int) -> int:
    """Let a kernel use ``most`` bytes of shared memory on GPU ``index``, and prefer it to L1; return the status."""
    status: int = function("cuKernelSetAttribute")(_MAX_DYNAMIC_SHARED_SIZE, most, handle, index)
    # All of it: by default the driver leaves some to the L1 cache, and a second CTA of a multiprocessor does not fit.
    function("cuKernelSetAttribute")(_SHARED_CARVEOUT, 100, handle, index)
    return status


def encode_tensor_map(
    dtype: str, address: int, rows: int, columns: int, pitch: int, box_rows: int, box_columns: int
) -> Any:
    """Return 128 bytes (CUtensorMap) that describe a row-major matrix, its boxes in the 128-byte swizzle.

    Args:
        dtype: ``"uint8"``, ``"float16"`` or ``"bfloat16"``.
        address: Of the matrix.
        rows: Of the matrix.
        columns: Of the matrix.
        pitch: Bytes from row to row.
        box_rows: Rows of a box.
        box_columns: Columns of a box.

    Returns:
        A ctypes array; ``ctypes.addressof`` of it is a multiple of 64.

    Raises:
        LaunchError: If the driver refuses.
    """
    space = (ctypes.c_char * (_TENSOR_MAP_BYTES + _TENSOR_MAP_ALIGNMENT))()
    encoded = (ctypes.c_char * _TENSOR_MAP_BYTES).from_buffer(space, -ctypes.addressof(space) % _TENSOR_MAP_ALIGNMENT)
    status = function("cuTensorMapEncodeTiled")(
        encoded,
        _TYPES[dtype],
        2,
        address,
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(pitch),
        (ctypes.c_uint32 * 2)(box_columns, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,  # no interleaving
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        0,  # zeros outside
    )
    _check(status, f"refuses a tensor map of {rows} x {columns} with a pitch of {pitch} bytes")
    return encoded


def _check(status: int, complaint: str) -> None:
    if status != SUCCESS:
        raise LaunchError(f"the driver {complaint}: CUDA error {status}")

"""Find a compiled kernel for the current GPU and launch it on torch's current stream, cheaply.

A kernel is loaded once a device and process. A call then costs a dictionary look-up and the driver's launch. Arguments
are 64-bit: Python ints (sizes, pointers) go as they are, so kernels declare ``long long`` and pointers only.
"""

import functools
import threading
from typing import Any

import torch
from lq_formats import CompileError
from torch import Tensor

from lq_kernels.jit import cache
from lq_kernels.jit.compiler import STANDARD, architecture, compile_source, compiler_version, headers, source

_lock = threading.Lock()
_kernels: dict[tuple[int, str, str], Any] = {}
_streams: dict[tuple[int, int], Any] = {}


def cubin(name: str, arch: str) -> bytes:
    """Return ``cuda/src/NAME.cu`` compiled for ``arch``, from the disk cache where it can be."""
    entry = _entry(name, arch)
    found = cache.load(entry)
    if found is None:
        found = compile_source(source(name), arch, name).cubin
        cache.store(entry, found)
    return found


def launch(
    name: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    device: torch.device,
    *arguments: Tensor | int,
) -> None:
    """Launch a kernel on ``device``'s current torch stream.

    Args:
        name: Source file under ``cuda/src``, without its suffix.
        kernel: Name of an ``extern "C"`` kernel in it.
        grid: Blocks in x, y and z.
        threads: Threads in a block.
        shared: Bytes of dynamic shared memory.
        device: The GPU.
        arguments: Tensors (passed as pointers) and ints (passed as 64 bits).

    Raises:
        CompileError: If the kernel cannot be compiled or loaded.
    """
    from cuda.core import launch as launch_kernel

    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        function = _kernels.get((index, name, kernel))
        if function is None:
            function = _load(index, name, kernel, shared)
        values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        launch_kernel(_stream(index), _config(grid, threads, shared), function, *values)


@functools.cache
def _entry(name: str, arch: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("lq-kernels")
    except PackageNotFoundError:  # a bare checkout
        release = "checkout"
    return cache.key(name, source(name), headers(), arch, STANDARD, compiler_version(), release)


@functools.lru_cache(maxsize=4096)
def _config(grid: tuple[int, int, int], threads: int, shared: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=threads, shmem_size=shared)


def _stream(index: int) -> Any:
    from cuda.core import Stream

    raw = torch.cuda.current_stream(index).cuda_stream
    found = _streams.get((index, raw))
    if found is None:
        # Wrapping a raw handle costs 6 us: once a stream.
        found = _streams[index, raw] = Stream.from_handle(raw)
    return found


def _load(index: int, name: str, kernel: str, shared: int) -> Any:
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    with _lock:
        if (index, name, kernel) in _kernels:
            return _kernels[index, name, kernel]
        Device(index).set_current()
        arch = architecture(torch.cuda.get_device_capability(index))
        code = cubin(name, arch)
        try:
            function = ObjectCode.from_cubin(code).get_kernel(kernel)
        except Exception:
            # The entry was whole but the driver refuses it: compile anew, once.
            cache.discard(_entry(name, arch))
            try:
                function = ObjectCode.from_cubin(cubin(name, arch)).get_kernel(kernel)
            except Exception as error:
                raise CompileError(f"the driver cannot load {kernel} of {name}.cu for {arch}: {error}") from error
        if shared > 48 << 10:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (status,) = driver.cuKernelSetAttribute(attribute, shared, function.handle, Device(index).device_id)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise CompileError(f"{kernel} needs {shared} bytes of shared memory, which this GPU refuses ({status})")
        _kernels[index, name, kernel] = function
        return function

"""Find a compiled kernel for the current GPU and launch it on torch's current stream, cheaply.

A kernel is loaded once a device and process, and a launch (grid, cluster, attributes, sizes) is prepared once. A call then
costs a look-up, filling in the pointers, and the driver's launch: about 2 us. Kernels have pointers and
:class:`lq_kernels.jit.tensor_map.TensorMap` parameters first and ``long long`` ones after them.

The driver is called through ctypes (:mod:`lq_kernels.jit.driver`): ``cuda.core`` has no programmatic dependent launch, and the
generated bindings build their argument arrays anew in each call.
"""

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lq_formats import CompileError, LaunchError
from torch import Tensor

from lq_kernels.jit import cache, driver
from lq_kernels.jit.compiler import (
    STANDARD,
    architecture,
    compile_source,
    compiler_version,
    headers,
    source,
)

if TYPE_CHECKING:
    from lq_kernels.jit.tensor_map import TensorMap

_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_SHARED_WITHOUT_ASKING = 48 << 10
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

_functions: dict[tuple[int, str, str, tuple[str, ...]], int] = {}
_locks: dict[tuple[int, str, str, tuple[str, ...]], threading.Lock] = {}
"""One a kernel: a thread that wants what another one compiles waits for it, and kernels do not wait for each other."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a union of 64 bytes, of which lq uses at most three integers."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_uint * 3),
        ("rest", ctypes.c_char * 52),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class Launch:
    """A kernel with its launch configuration and the arguments that do not change.

    May be called by several threads: what the driver reads is filled and read under a lock.
    """

    def __init__(
        self,
        index: int,
        name: str,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        pointers: int,
        sizes: Sequence[int],
        cluster: int = 0,
        dependent: bool = False,
        defines: tuple[str, ...] = (),
    ) -> None:
        """Load the kernel on GPU ``index``, and compile it if need be.

        Args:
            index: Which GPU.
            name: Source file under ``cuda/src``, without its suffix.
            kernel: Name of an ``extern "C"`` kernel in it.
            grid: Blocks in x, y and z.
            threads: Threads in a block.
            shared: Bytes of dynamic shared memory.
            pointers: How many parameters are pointers or tensor maps; they come first.
            sizes: The parameters after them, 64-bit integers.
            cluster: Blocks in a cluster, along x; 0 for a kernel that uses no cluster instruction (1 is a cluster too).
            dependent: The kernel waits for its predecessor itself (``griddepcontrol.wait``), so it may start early.
            defines: ``NAME=VALUE`` of macros that the source is compiled with.

        Raises:
            CompileError: If the kernel cannot be compiled or loaded.
        """
        attributes = []
        if cluster:
            attributes.append(_Attribute(_CLUSTER_DIMENSION, b"", (cluster, 1, 1)))
        if dependent:
            attributes.append(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, b"", (1, 0, 0)))
        self._attributes = (_Attribute * max(1, len(attributes)))(*attributes)
        self._config = _Config(grid, (threads, 1, 1), shared, None, self._attributes, len(attributes))
        self._reference = ctypes.byref(self._config)
        self._function = ctypes.c_void_p(load(index, name, kernel, shared, defines))
        self._label = f"{kernel} of {name}.cu"
        count = pointers + len(sizes)
        self._values = (ctypes.c_longlong * count)(*([0] * pointers), *sizes)
        start = ctypes.addressof(self._values)
        self._parameters = (ctypes.c_void_p * count)(*(start + 8 * i for i in range(count)))
        self._driver = driver.function("cuLaunchKernelEx")
        self._index = index
        self._lock = threading.Lock()

    def __call__(self, *pointers: "int | TensorMap") -> None:
        """Launch on the GPU's current torch stream.

        Args:
            pointers: Addresses in the GPU's memory, and tensor maps, in the kernel's order.

        Raises:
            LaunchError: If the driver refuses the launch.
        """
        index = self._index
        if index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                self(*pointers)
            return
        with self._lock:
            for i, pointer in enumerate(pointers):
                if type(pointer) is int:
                    self._values[i] = pointer
                else:
                    self._parameters[i] = pointer.address  # type: ignore[union-attr]
            # What torch.compile's generated code calls as well: 0.1 us, where torch.cuda.current_stream takes 1 us.
            self._config.stream = torch._C._cuda_getCurrentRawStream(index)
            status = self._driver(self._reference, self._function, self._parameters, None)
            if status == driver.INVALID_CONTEXT:
                # A new thread, as autograd's, in which nothing has called CUDA's runtime yet.
                driver.make_current(index)
                status = self._driver(self._reference, self._function, self._parameters, None)
        if status:
            raise LaunchError(
                f"the driver refuses to launch {self._label} with grid {tuple(self._config.grid)} and "
                f"{self._config.shared} bytes of shared memory: CUDA error {status}"
            )


@functools.lru_cache(maxsize=4096)
def prepared(
    index: int,
    name: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    pointers: int,
    sizes: tuple[int, ...],
    *,
    cluster: int = 0,
    dependent: bool = False,
    defines: tuple[str, ...] = (),
) -> Launch:
    """Return :class:`Launch` of these arguments, made once."""
    return Launch(index, name, kernel, grid, threads, shared, pointers, sizes, cluster, dependent, defines)


def launch(
    name: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    device: torch.device,
    *arguments: "Tensor | int | TensorMap",
    cluster: int = 0,
    dependent: bool = False,
    defines: tuple[str, ...] = (),
) -> None:
    """Launch a kernel on ``device``'s current torch stream.

    Args:
        name: See :class:`Launch`, and so on.
        kernel: Name of the kernel.
        grid: Blocks in x, y and z.
        threads: Threads in a block.
        shared: Bytes of dynamic shared memory.
        device: The GPU.
        arguments: Tensors (passed as pointers) and tensor maps (passed by value), then ints.
        cluster: Blocks in a cluster.
        dependent: Whether it may start early.
        defines: Macros.

    Raises:
        CompileError: If the kernel cannot be compiled or loaded.
        LaunchError: If the driver refuses the launch.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    addresses = [a if isinstance(a, int) else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    pointers = 1 + max(i for i, argument in enumerate(arguments) if not isinstance(argument, int))
    sizes = tuple(argument for argument in arguments[pointers:] if isinstance(argument, int))
    ready = prepared(
        index,
        name,
        kernel,
        grid,
        threads,
        shared,
        pointers,
        sizes,
        cluster=cluster,
        dependent=dependent,
        defines=defines,
    )
    ready(*addresses[:pointers])


def cubin(name: str, arch: str, defines: tuple[str, ...] = ()) -> bytes:
    """Return ``cuda/src/NAME.cu`` compiled for ``arch``, from the disk cache where it can be."""
    entry = _entry(name, arch, defines)
    found = cache.load(entry)
    if found is None:
        found = compile_source(source(name), arch, name, defines).cubin
        cache.store(entry, found)
    return found


def load(index: int, name: str, kernel: str, shared: int, defines: tuple[str, ...] = ()) -> int:
    """Return the handle of a kernel on GPU ``index``, compiled if need be, that may use ``shared`` bytes of shared memory.

    Raises:
        CompileError: If it cannot be compiled or loaded.
    """
    key = (index, name, kernel, defines)
    function = _functions.get(key)
    if function is None:
        with _locks.setdefault(key, threading.Lock()):
            function = _functions.get(key)
            if function is None:
                function = _functions[key] = _loaded(index, name, kernel, defines)
    if shared > _SHARED_WITHOUT_ASKING:
        driver.make_current(index)
        most = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
        status = driver.allow_shared(function, index, most)
        if status or shared > most:
            raise CompileError(
                f"{kernel} needs {shared} bytes of shared memory: this GPU has {most} (CUDA error {status})"
            )
    return function


def _loaded(index: int, name: str, kernel: str, defines: tuple[str, ...]) -> int:
    arch = architecture(torch.cuda.get_device_capability(index))
    code = cubin(name, arch, defines)
    driver.make_current(index)
    try:
        return driver.load_kernel(code, kernel)
    except LaunchError:
        # The entry was whole but the driver refuses it: compile anew, once.
        cache.discard(_entry(name, arch, defines))
    try:
        return driver.load_kernel(cubin(name, arch, defines), kernel)
    except LaunchError as error:
        raise CompileError(f"{name}.cu was compiled for {arch} and cannot be loaded: {error}") from error


@functools.cache
def _entry(name: str, arch: str, defines: tuple[str, ...]) -> str:
    return cache.key(name, source(name), headers(), arch, *defines, STANDARD, compiler_version(), release())


@functools.cache
def release() -> str:
    """Return the version of this package, for cache keys."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lq-kernels")
    except PackageNotFoundError:  # a bare checkout
        return "checkout"

"""NVRTC, CUDA's compiler, in this process: the library that torch has loaded.

CUDA builds of torch link it and cannot be imported without. Beside another build a package or a toolkit may bring it.

Its generated bindings import those of the driver, which takes 60 ms, and ``cuda.core`` 150 to 300 ms: every process with an
empty cache would wait for that before its first kernel compiles. So it is called through ctypes
(:mod:`lq_kernels.jit.nvrtc_program`).
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence

import torch
from lq_formats import CompileError, MissingPackageError

from lq_kernels.jit import cache
from lq_kernels.jit.nvrtc_program import Nvrtc, NvrtcError

_INSTALL = "pip install cuda-pathfinder nvidia-cuda-nvrtc"
_unstarted = threading.Lock()
"""Held, for good, once :func:`start` has begun."""


def why_not() -> str | None:
    """Return why nothing can be compiled, or None; with a CUDA build of torch in microseconds, as NVRTC is loaded."""
    try:
        _nvrtc()
    except MissingPackageError:
        return f"NVRTC, CUDA's compiler, is not installed; run: {_INSTALL}"
    return None


def version() -> tuple[int, int]:
    """Return NVRTC's version, major and minor.

    Raises:
        MissingPackageError: If NVRTC is not installed.
    """
    with _failures():
        return _nvrtc().version()


def path() -> str:
    """Return the file of the library.

    Raises:
        CompileError: If nobody knows.
        MissingPackageError: If it is not installed.
    """
    with _failures():
        return _nvrtc().path()


def compile_program(text: str, name: str, options: Sequence[bytes]) -> tuple[bytes | None, str]:
    """Compile CUDA C++ in this process, as :meth:`lq_kernels.jit.nvrtc_program.Nvrtc.compile_program` does, of text.

    Raises:
        CompileError: If NVRTC fails otherwise than at the source.
        MissingPackageError: If it is not installed.
    """
    with _failures():
        cubin, log = _nvrtc().compile_program(text.encode(), name.encode(), options)
    return cubin, log.decode(errors="replace")


def start() -> None:
    """Have NVRTC do in a thread what it does once a process; later calls do nothing.

    The first program pays for it otherwise (0.3 s on GPU servers), while no other compiles. Where the disk cache has entries it
    is not done: such a process may need no NVRTC.
    """
    if _unstarted.acquire(blocking=False):
        # No daemon, whatever thread asks: a process that ends while C++ runs in one may crash. This one is waited for.
        with contextlib.suppress(RuntimeError):  # no more threads to be had
            threading.Thread(target=_start, name="lq-nvrtc", daemon=False).start()


def _start() -> None:
    # Whatever is wrong, the first kernel that compiles meets it too, and says so where it matters.
    with contextlib.suppress(Exception):
        if cache.is_empty():
            compile_program('extern "C" __global__ void nothing() {}', "nothing.cu", [b"-arch=sm_90a"])


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except NvrtcError as error:
        raise CompileError(f"NVRTC {error}") from error


@functools.cache
def _nvrtc() -> Nvrtc:
    """Return the library that torch has loaded, or the one of an installed package or toolkit."""
    major = (torch.version.cuda or "").split(".")[0]
    try:
        return Nvrtc(ctypes.CDLL(f"libnvrtc.so.{major}"))
    except OSError:
        pass
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return Nvrtc(ctypes.CDLL(load_nvidia_dynamic_lib("nvrtc").abs_path))
    except (ImportError, RuntimeError) as error:
        raise MissingPackageError("nvidia-cuda-nvrtc", "Compiling CUDA kernels", _INSTALL) from error

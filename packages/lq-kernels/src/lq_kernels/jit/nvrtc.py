"""The few functions of NVRTC that lq calls, through ctypes, on the library that torch has loaded.

CUDA builds of torch link it and cannot be imported without. Beside another build a package or a toolkit may bring it.

Its generated bindings import those of the driver, which takes 60 ms, and ``cuda.core`` 150 to 300 ms: every process with an
empty cache would wait for that before its first kernel compiles.
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from lq_formats import CompileError, MissingPackageError

from lq_kernels.jit import cache

_POINTER = ctypes.c_void_p
_STRINGS = ctypes.POINTER(ctypes.c_char_p)
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "nvrtcVersion": (_POINTER, _POINTER),
    "nvrtcCreateProgram": (_POINTER, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, _STRINGS, _STRINGS),
    "nvrtcCompileProgram": (_POINTER, ctypes.c_int, _STRINGS),
    "nvrtcGetProgramLogSize": (_POINTER, _POINTER),
    "nvrtcGetProgramLog": (_POINTER, ctypes.c_char_p),
    "nvrtcGetCUBINSize": (_POINTER, _POINTER),
    "nvrtcGetCUBIN": (_POINTER, ctypes.c_char_p),
    "nvrtcDestroyProgram": (_POINTER,),
}
_INSTALL = "pip install cuda-pathfinder nvidia-cuda-nvrtc"
_unstarted = threading.Lock()
"""Held, for good, once :func:`start` has begun."""


def why_not() -> str | None:
    """Return why nothing can be compiled, or None; with a CUDA build of torch in microseconds, as NVRTC is loaded."""
    try:
        _library()
    except MissingPackageError:
        return f"NVRTC, CUDA's compiler, is not installed; run: {_INSTALL}"
    return None


def version() -> tuple[int, int]:
    """Return NVRTC's version, major and minor.

    Raises:
        MissingPackageError: If NVRTC is not installed.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_function("nvrtcVersion")(ctypes.byref(major), ctypes.byref(minor)), "has no version")
    return major.value, minor.value


def compile_program(text: str, name: str, options: Sequence[bytes]) -> tuple[bytes | None, str]:
    """Compile CUDA C++; other threads run meanwhile.

    Args:
        text: The source.
        name: Of the source, for messages.
        options: As NVRTC's manual lists them.

    Returns:
        The cubin, None if the source does not compile, and the compiler's log.

    Raises:
        CompileError: If NVRTC fails otherwise.
        MissingPackageError: If it is not installed.
    """
    program = _POINTER()
    status = _function("nvrtcCreateProgram")(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    _check(status, f"does not take {name}")
    try:
        listed = (ctypes.c_char_p * len(options))(*options)
        failed = _function("nvrtcCompileProgram")(program, len(options), listed)
        log = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        return None if failed else _read(program, "CUBIN"), log
    finally:
        _function("nvrtcDestroyProgram")(ctypes.byref(program))


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


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(_function(f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"has no {what}")
    space = ctypes.create_string_buffer(size.value)
    _check(_function(f"nvrtcGet{what}")(program, space), f"returns no {what}")
    return space.raw


@functools.cache
def _function(name: str) -> Any:
    found = getattr(_library(), name)
    found.argtypes = _ARGUMENTS[name]
    found.restype = ctypes.c_int
    return found


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the library that torch has loaded, or the one of an installed package or toolkit."""
    major = (torch.version.cuda or "").split(".")[0]
    try:
        return ctypes.CDLL(f"libnvrtc.so.{major}")
    except OSError:
        pass
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (ImportError, RuntimeError) as error:
        raise MissingPackageError("nvidia-cuda-nvrtc", "Compiling CUDA kernels", _INSTALL) from error


def _check(status: int, complaint: str) -> None:
    if status:
        raise CompileError(f"NVRTC {complaint}: error {status}")

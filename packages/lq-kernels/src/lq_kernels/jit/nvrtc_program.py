"""NVRTC's functions, through ctypes; and, run as a script, a process that compiles for another one.

``python -I -S nvrtc_program.py LIBRARY FD FD ...`` has a thread for each connected socket that it was given. A thread reads a
message (source, name and options), compiles, answers with another (:data:`COMPILED`, :data:`REJECTED` or :data:`FAILED`, the
cubin or what is wrong, and the log) and ends when the other end is closed. :mod:`lq_kernels.jit.processes` starts it. Only a
little of the standard library is imported here, no torch: it is up in 30 ms.
"""

import ctypes
import os
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

COMPILED, REJECTED, FAILED = b"compiled", b"rejected", b"failed"
_MAX_PARTS = 256
_MAX_BYTES = 64 << 20
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


class NvrtcError(Exception):
    """NVRTC returned an error that is not about the source, or a message is not one."""


class Nvrtc:
    """The library; several threads may use it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Take a loaded ``libnvrtc``."""
        self._functions = {name: getattr(library, name) for name in _ARGUMENTS}
        for name, function in self._functions.items():
            function.argtypes, function.restype = _ARGUMENTS[name], ctypes.c_int

    def version(self) -> tuple[int, int]:
        """Return the version, major and minor.

        Raises:
            NvrtcError: If it has none.
        """
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", "has no version", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def compile_program(self, text: bytes, name: bytes, options: Sequence[bytes]) -> tuple[bytes | None, bytes]:
        """Compile CUDA C++; other threads run meanwhile.

        Args:
            text: The source.
            name: Of the source, for messages.
            options: As NVRTC's manual lists them.

        Returns:
            The cubin, None if the source does not compile, and the compiler's log.

        Raises:
            NvrtcError: If NVRTC fails otherwise.
        """
        program = _POINTER()
        given = (ctypes.byref(program), text, name, 0, None, None)
        self._check("nvrtcCreateProgram", f"does not take {os.fsdecode(name)}", *given)
        try:
            failed = self._functions["nvrtcCompileProgram"](
                program, len(options), (ctypes.c_char_p * len(options))(*options)
            )
            log = self._read(program, "ProgramLog").rstrip(b"\0")
            return None if failed else self._read(program, "CUBIN"), log
        finally:
            self._functions["nvrtcDestroyProgram"](ctypes.byref(program))

    def path(self) -> str:
        """Return the file that the library was loaded from, with which another process may load it.

        Raises:
            NvrtcError: If the linker does not know.
        """
        found = _Symbol()
        address = ctypes.cast(self._functions["nvrtcVersion"], _POINTER)
        lookup = ctypes.CDLL(None).dladdr
        lookup.argtypes, lookup.restype = (_POINTER, _POINTER), ctypes.c_int
        if not lookup(address, ctypes.byref(found)) or not found.file:
            raise NvrtcError("was loaded from nowhere")
        return os.fsdecode(found.file)

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(f"nvrtcGet{what}Size", f"has no {what}", program, ctypes.byref(size))
        space = ctypes.create_string_buffer(size.value)
        self._check(f"nvrtcGet{what}", f"returns no {what}", program, space)
        return space.raw

    def _check(self, name: str, complaint: str, *arguments: Any) -> None:
        status = self._functions[name](*arguments)
        if status:
            raise NvrtcError(f"{complaint}: error {status}")


class _Symbol(ctypes.Structure):
    """Dl_info."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def message(parts: Sequence[bytes]) -> bytes:
    """Return the bytes that :func:`receive` takes apart."""
    return struct.pack(f"<I{len(parts)}Q", len(parts), *map(len, parts)) + b"".join(parts)


def receive(read: Callable[[int], bytes]) -> list[bytes]:
    """Return the parts of the next message.

    Args:
        read: Returns up to so many bytes, none at the end.

    Raises:
        EOFError: If there is none, or it is cut off.
        NvrtcError: If it says it has more parts or bytes than any.
    """
    (count,) = struct.unpack("<I", _exactly(read, 4))
    if count > _MAX_PARTS:
        raise NvrtcError(f"a message of {count} parts")
    sizes = struct.unpack(f"<{count}Q", _exactly(read, 8 * count))
    if sum(sizes) > _MAX_BYTES:
        raise NvrtcError(f"a message of {sum(sizes)} bytes")
    return [_exactly(read, size) for size in sizes]


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        some = read(size - len(found))
        if not some:
            raise EOFError
        found += some
    return bytes(found)


def _serve(nvrtc: Nvrtc, descriptor: int) -> None:
    while True:
        try:
            text, name, *options = receive(lambda size: os.read(descriptor, size))
        except EOFError:
            return
        try:
            cubin, log = nvrtc.compile_program(text, name, options)
            answer = message((REJECTED, b"", log) if cubin is None else (COMPILED, cubin, log))
        except NvrtcError as error:
            answer = message((FAILED, str(error).encode(), b""))
        while answer:
            answer = answer[os.write(descriptor, answer) :]


def main(arguments: Sequence[str]) -> None:
    """Serve with ``LIBRARY FD FD ...`` until every other end is closed."""
    nvrtc = Nvrtc(ctypes.CDLL(arguments[0]))
    threads = [threading.Thread(target=_serve, args=(nvrtc, int(each))) for each in arguments[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1:])

"""Processes that compile beside this one.

NVRTC parses one program at a time in a process, whatever its threads: 33 ms each on a GPU server, 0.8 s for a model's 23, and
0.35 s with two processes more (``docs/kernel-notes.md``). They are started where many programs are compiled on many
processors, and end when those are done.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from lq_formats import CompileError

from lq_kernels.jit import nvrtc, nvrtc_program

_PROCESSES = 2
"""More gain nothing: of 23 turns a third take as long as the longest compilation."""
_LEAST_THREADS = 8
_LEAST_PROGRAMS = 4
"""Fewer are compiled here: a process is up in 30 ms and has NVRTC to load."""
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": ""}
"""NVRTC's first compilation initialises the driver, though it needs no GPU: 0.2 s for each that a process sees."""
_TIMEOUT_S = 120.0
"""For one program: hundreds of times what one takes."""

_lock = threading.Lock()
_active: "_Helpers | None" = None
_users = 0
_warned = False


@contextlib.contextmanager
def helped(threads: int) -> Iterator[None]:
    """Let other processes compile too while the body runs, if it asks for several programs with 8 threads or more.

    What this process cannot have from them (it may start none, or one ends) it compiles itself, and warns once.

    Args:
        threads: How many compile at once. Each other process takes a third of them; of bodies that run at once the first says
            how many.
    """
    global _active, _users
    with _lock:
        if _users == 0:
            _active = _Helpers(threads)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            unused, _active = (_active, None) if _users == 0 else (None, _active)
        if unused is not None:
            unused.close()


def compile_program(text: str, name: str, options: Sequence[bytes]) -> tuple[bytes | None, str]:
    """Compile as :func:`lq_kernels.jit.nvrtc.compile_program` does, in another process if one is there (:func:`helped`)."""
    helpers = _active
    found = helpers.compile_program(text, name, options) if helpers is not None else None
    return nvrtc.compile_program(text, name, options) if found is None else found


class _Helpers:
    """The processes, and a socket for each of the threads that they have."""

    def __init__(self, threads: int) -> None:
        self._threads = threads // (_PROCESSES + 1) if threads >= _LEAST_THREADS else 0
        self._lock = threading.Lock()
        self._asked = 0
        self._closed = False
        self._free: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def compile_program(self, text: str, name: str, options: Sequence[bytes]) -> tuple[bytes | None, str] | None:
        """Return what NVRTC does in another process; None if none has a thread to spare, or it fails."""
        with self._lock:
            self._asked += 1
            if self._asked == _LEAST_PROGRAMS and self._threads:
                self._start()
            if not self._free:
                return None
            connection = self._free.pop()
        try:
            connection.sendall(nvrtc_program.message((text.encode(), name.encode(), *options)))
            kind, cubin, log = nvrtc_program.receive(connection.recv)
        except (OSError, EOFError, ValueError, nvrtc_program.NvrtcError) as error:
            connection.close()
            _warn(f"one that should has ended or does not answer ({error!r})")
            return None
        with self._lock:
            if self._closed:
                connection.close()
            else:
                self._free.append(connection)
        if kind == nvrtc_program.FAILED:
            return None
        return cubin if kind == nvrtc_program.COMPILED else None, log.decode(errors="replace")

    def close(self) -> None:
        """Let the processes end; nobody waits for that, as a warm-up would."""
        with self._lock:
            self._closed = True
            for connection in self._free:
                connection.close()
            self._free = []
        for process in self._processes:
            threading.Thread(target=process.wait, name="lq-nvrtc-helper", daemon=True).start()

    def _start(self) -> None:
        executable = _interpreter()
        if executable is None:
            return
        connections: list[list[socket.socket]] = []
        try:
            library = nvrtc.path()
            while len(self._processes) < _PROCESSES:
                process, ours = _process(executable, library, self._threads)
                self._processes.append(process)
                connections.append(ours)
        except (OSError, CompileError) as error:
            _warn(f"none can be started ({error})")
        # From one process, then the other.
        self._free = [connection for each in zip(*connections, strict=True) for connection in each]


def _process(executable: str, library: str, threads: int) -> tuple["subprocess.Popen[bytes]", list[socket.socket]]:
    """Return a process that has so many threads, and the connections to them.

    Raises:
        OSError: If there is none to be had.
    """
    with contextlib.ExitStack() as failed, contextlib.ExitStack() as theirs:
        ours, descriptors = [], []
        for _ in range(threads):
            here, there = socket.socketpair()
            failed.enter_context(here)
            descriptors.append(theirs.enter_context(there).fileno())
            here.settimeout(_TIMEOUT_S)
            ours.append(here)
        process = subprocess.Popen(
            [executable, "-I", "-S", nvrtc_program.__file__, library, *map(str, descriptors)],
            pass_fds=descriptors,
            env={**os.environ, **_ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt is for the process that asks
        )
        failed.pop_all()
        return process, ours


def _interpreter() -> str | None:
    """Return Python's executable; None where that is a program which has Python in it, or a process cannot be given sockets."""
    from multiprocessing import spawn

    executable = spawn.get_executable()
    if getattr(sys, "frozen", False) or not executable or os.name != "posix":
        return None
    return executable.decode() if isinstance(executable, bytes) else executable


def _warn(why: str) -> None:
    global _warned
    with _lock:
        first, _warned = not _warned, True
    if first:
        warnings.warn(f"kernels compile in this process alone, more slowly than with others: {why}", stacklevel=2)

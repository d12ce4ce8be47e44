"""Time cuts in a process of their own, so that one that hangs or breaks the GPU's context costs itself and nothing else.

The tuner writes requests to the process's standard input and reads answers from its standard output, a JSON object a line.
The process says which cut it is about to run; where it then dies, or says nothing for too long, that cut has failed, and
a new process takes over. What the process itself prints goes to standard error.
"""

import collections
import contextlib
import ctypes
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from lq_formats import DeviceError

from lq_kernels.tuned.table import Cut, Weight

START_S = 180.0
SILENT_S = 45.0
MAX_RESTARTS = 20


@dataclass(frozen=True)
class Device:
    """The GPU that a worker has."""

    name: str
    sm_count: int
    capability: tuple[int, int]
    torch: str
    driver: str


class WorkerTimer:
    """A timer (see :mod:`lq_kernels.tuned.search`) that runs cuts in a worker process.

    Args:
        command: How to start the worker; by default this module.
        start_s: Seconds that it may take to start.
        silent_s: Seconds between two of its messages after which it is taken for hung.

    Raises:
        DeviceError: If it does not start: there is no GPU, or none that can be used.
    """

    def __init__(
        self, command: Sequence[str] | None = None, *, start_s: float = START_S, silent_s: float = SILENT_S
    ) -> None:
        self._command = list(command or (sys.executable, "-m", "lq_kernels.tuned.worker"))
        self._start_s, self._silent_s = start_s, silent_s
        self._process: subprocess.Popen[str] | None = None
        self._restarts = 0
        self._start()

    def times(self, weight: Weight, m: int, cuts: Sequence[tuple[str, Cut]], replays: int) -> list[float | str]:
        """Return the median microseconds of each cut; of one that fails, why.

        Raises:
            DeviceError: If the worker cannot be started again.
        """
        found: dict[int, float | str] = {}
        while waiting := [index for index in range(len(cuts)) if index not in found]:
            request = {
                "weight": asdict(weight),
                "m": m,
                "cuts": [[cuts[index][0], dict(cuts[index][1])] for index in waiting],
                "replays": replays,
            }
            answer, running, reason = self._ask(request)
            if answer is not None:
                found |= dict(zip(waiting, answer, strict=True))
                continue
            for index in waiting if running is None else [waiting[running]]:
                found[index] = reason
            self._restart()
        return [found[index] for index in range(len(cuts))]

    def close(self) -> None:
        """End the worker."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # of a hung GPU, the driver may not let go at once
            process.wait(10.0)
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> "WorkerTimer":
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _ask(self, request: Mapping[str, Any]) -> tuple[list[float | str] | None, int | None, str]:
        """Return the answer, or None, what was running and what happened to it."""
        running: int | None = None
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            return None, None, f"the timing process ended: {self._last_words()}"
        while True:
            try:
                message = self._messages.get(timeout=self._silent_s)
            except queue.Empty:
                return None, running, f"did not end within {self._silent_s:g} s"
            if message is None:
                return None, running, f"ended the timing process: {self._last_words()}"
            if "times" in message:
                return message["times"], None, ""
            running = message.get("at", running)

    def _restart(self) -> None:
        self.close()
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise DeviceError(f"the timing process was lost {self._restarts} times; the GPU may need a reset")
        self._start()

    def _start(self) -> None:
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._words: collections.deque[str] = collections.deque(maxlen=20)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        threading.Thread(target=_listen, args=(self._process.stdout, self._messages), daemon=True).start()
        self._overhearing = threading.Thread(target=_overhear, args=(self._process.stderr, self._words), daemon=True)
        self._overhearing.start()
        try:
            hello = self._messages.get(timeout=self._start_s)
        except queue.Empty:
            hello = {"error": f"the timing process did not start within {self._start_s:g} s"}
        if hello is None or "error" in hello:
            reason = self._last_words() if hello is None else str(hello["error"])
            self.close()
            raise DeviceError(f"lq-kernels tune needs a GPU that it can use: {reason}")
        self.device = Device(**{**hello, "capability": tuple(hello["capability"])})

    def _last_words(self) -> str:
        self._overhearing.join(2.0)
        return next((line.strip()[:300] for line in reversed(self._words) if line.strip()), "it said nothing")


def _listen(stream: TextIO, messages: "queue.Queue[dict[str, Any] | None]") -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in stream:
            messages.put(json.loads(line))
    messages.put(None)


def _overhear(stream: TextIO, words: "collections.deque[str]") -> None:
    with contextlib.suppress(OSError, ValueError):
        words.extend(stream)


def _driver() -> str:
    """Return the CUDA version of the driver that torch has loaded."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(version))
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def main() -> None:
    """Serve requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    import torch

    from lq_kernels.problem import Arch
    from lq_kernels.tuned.timer import GraphTimer

    if not torch.cuda.is_available():
        say({"error": "torch finds none on this machine"})
        return
    device = torch.device("cuda", torch.cuda.current_device())
    arch = Arch.of(device)
    if arch.kind != "cuda" or arch.capability != (9, 0):
        say({"error": f"the kernels that are tuned run on Hopper GPUs (compute capability 9.0), this is {arch.name}"})
        return
    say(
        {
            "name": arch.name,
            "sm_count": arch.sm_count,
            "capability": arch.capability,
            "torch": str(torch.__version__),
            "driver": _driver(),
        }
    )
    timer = GraphTimer(device)
    for line in sys.stdin:
        request = json.loads(line)
        cuts = [(kernel, tuple(sorted(cut.items()))) for kernel, cut in request["cuts"]]
        weight = Weight(**request["weight"])
        say({"times": timer.times(weight, request["m"], cuts, request["replays"], lambda index: say({"at": index}))})


if __name__ == "__main__":
    main()

"""Timing: the median time of one call, with weights that are not in the cache.

A decoding step reads every weight of a model once, so each read comes from memory. A benchmark that multiplies by one
weight again and again reads it from the L2 cache instead and flatters every kernel. Here each call has its own copy
of the weight, enough copies that a round over them is several times larger than the L2 (60 MB on an H200).

On a GPU the calls of a round are captured into a CUDA graph: the figure has no launch overhead of Python in it, as in a
serving engine. It is the median over replays, divided by the calls in one.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 192 << 20
MAX_COPIES = 48

Call = Callable[[], object]


def copies(bytes_per_call: int, cold_bytes: int = COLD_BYTES) -> int:
    """Return how many weight copies make a round cold: 2 to 48, ``cold_bytes`` together where that suffices."""
    return max(2, min(MAX_COPIES, math.ceil(cold_bytes / max(1, bytes_per_call))))


def time_us(calls: Sequence[Call], device: torch.device | str, *, budget_s: float = 2.0) -> float:
    """Return the median microseconds of one of ``calls``, which do the same on different copies of the data.

    Args:
        calls: At least one function without arguments; on a GPU they must allow capture in a CUDA graph.
        device: Where they run.
        budget_s: Rough limit for CPU timing; a GPU needs a fixed number of replays.
    """
    if torch.device(device).type == "cuda":
        return cuda_graph_us(calls)
    return cpu_us(calls, budget_s)


def cuda_graph_us(calls: Sequence[Call], *, replays: int = 7, min_calls: int = 16) -> float:
    """Time calls in a CUDA graph that holds every one of them, repeated up to at least ``min_calls``."""
    rounds = max(1, math.ceil(min_calls / len(calls)))
    warm_up = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        # Compilation, workspaces and what a kernel derives from each weight must exist before the capture.
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(warm_up)
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()

    times: list[float] = []
    for _ in range(replays):
        start, stop = _event(), _event()
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (rounds * len(calls)))
    del graph
    return statistics.median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def cpu_us(calls: Sequence[Call], budget_s: float = 2.0, *, min_samples: int = 3, max_samples: int = 50) -> float:
    """Time calls one by one on the CPU until ``budget_s`` is spent (``min_samples`` at least), and take the median."""
    for call in calls:  # a kernel may repack each weight when it first sees it
        call()
    deadline = time.perf_counter() + budget_s
    times: list[float] = []
    while len(times) < min_samples or (len(times) < max_samples and time.perf_counter() < deadline):
        call = calls[len(times) % len(calls)]
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)

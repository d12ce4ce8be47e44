"""Replay a CUDA graph without a pause, and tell what its replays took: for the tuner, and for benchmarks."""

import itertools
import time
from collections.abc import Sequence

import torch

_AHEAD = 4
"""Replays that are queued beside the one that runs."""


def event() -> torch.cuda.Event:
    """Return an event that has a time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def ends_ms(graph: torch.cuda.CUDAGraph, seconds: float) -> list[float]:
    """Replay a graph for so long, twice at least; return the milliseconds after which each replay ended."""
    start, ends = event(), list[torch.cuda.Event]()
    start.record()
    until = time.perf_counter() + seconds
    while len(ends) < 2 or time.perf_counter() < until:
        graph.replay()
        ends.append(event())
        ends[-1].record()
        if len(ends) > _AHEAD:
            ends[-_AHEAD].synchronize()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for end in ends]


def took_us(ends: Sequence[float], calls: int) -> list[float]:
    """Return the microseconds of a call in each replay but the first, with so many calls, of :func:`ends_ms`."""
    return [(end - begin) * 1e3 / calls for begin, end in itertools.pairwise(ends)]


def late_us(ends: Sequence[float], calls: int, seconds: float) -> list[float]:
    """Return those of replays that began in the last ``seconds``, or of the last one."""
    took = took_us(ends, calls)
    late = [us for us, begin in zip(took, ends, strict=False) if begin >= ends[-1] - seconds * 1e3]
    return late or took[-1:]

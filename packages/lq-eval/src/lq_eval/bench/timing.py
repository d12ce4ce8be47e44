"""Timing: the median time of one call, with weights that are not in the cache.

A decoding step reads every weight of a model once, so each read comes from memory. A benchmark that multiplies by one
weight again and again reads it from the L2 cache instead and flatters every kernel. Here each call has its own copy
of the weight, enough copies that a round over them is several times larger than the L2 (60 MB on an H200).

On a GPU the calls of a round are captured into a CUDA graph: the figure has no launch overhead of Python in it, as in a
serving engine. It is the median over replays, divided by the calls in one.

Products of many tokens take a GPU to the limit of its power. For some 30 ms after a pause its clock stays up; then it falls,
by as much as a product takes power, and needs 50 to 100 ms to settle (H200, 14336x4096 with 384 tokens, cuBLAS: 61.5 us, then
71 to 76). Replayed in turn, competitors share a clock that neither would have alone. So :func:`steady_times_us` gives each two
times: with the clock up, and when it has run for long, by itself as in a model of its own.
"""

import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from lq_formats import LQError, SpecError
from lq_kernels.tuned.replays import ends_ms, event, late_us, took_us

from lq_eval.errors import last_line

COLD_BYTES = 192 << 20
MAX_COPIES = 128
WARM_UP_S = 0.008
SETTLE_S = 0.15
"""Warm-up after calls that took much longer: a GPU that was at its power limit takes a tenth of a second to clock up again."""
PAUSE_S = 0.08
"""Before the times of :func:`steady_times_us`: the clock is up again."""
STEADY_S = 0.18
"""That a graph is replayed then, all in all."""
_TAIL_S = 0.08
"""The last part of that, whose time counts."""
STEADY_FROM = 256
"""Tokens from which products take a GPU to the limit of its power, and are timed so."""
_BURST_MS = 10.0
"""The first part, in which the clock is up."""
_MUCH_LONGER = 4
_MOST_CYCLES_A_S = 2.5e9
"""More than a GPU's clock has: what it waits in cycles is no shorter than was asked for."""

Call = Callable[[], object]
_Name = TypeVar("_Name", bound=Hashable)
_Time = TypeVar("_Time")


class Steady(NamedTuple):
    """Microseconds of a call at the limit of a GPU's power; ``burst_us`` right after a pause, or None on a CPU."""

    us: float
    burst_us: float | None


def copies(bytes_per_call: int, cold_bytes: int = COLD_BYTES, most: int = MAX_COPIES) -> int:
    """Return how many weight copies make a round cold: 2 to ``most``, ``cold_bytes`` together where that suffices."""
    return max(2, min(most, math.ceil(cold_bytes / max(1, bytes_per_call))))


def check_replays(replays: int) -> None:
    """Raise SpecError unless there is a replay to take the median of."""
    if replays < 1:
        raise SpecError(f"replays={replays}: expected at least 1")


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


def times_us(
    competitors: Sequence[Sequence[Call]],
    device: torch.device | str,
    *,
    replays: int = 7,
    min_calls: int = 16,
) -> list[float]:
    """Return the median microseconds of a call of each of ``competitors``; see :func:`cuda_graphs_us`.

    On a CPU every call is timed by itself, ``replays`` of them.

    Raises:
        SpecError: If there are no replays.
    """
    check_replays(replays)
    if torch.device(device).type == "cuda":
        return cuda_graphs_us(competitors, replays=replays, min_calls=min_calls)
    return [cpu_us(calls, 0.0, min_samples=replays) for calls in competitors]


def steady_times_us(
    competitors: Sequence[Sequence[Call]], device: torch.device | str, *, rounds: int = 2, min_calls: int = 16
) -> list[Steady]:
    """Return the microseconds of a call of each of ``competitors`` when it runs by itself, for long and right after a pause.

    In each round the competitors take turns: a pause of 80 ms, then its graph (as in :func:`cuda_graphs_us`) for 0.18 s. The
    medians count of replays in the last 80 ms, and of those that end in the first 10, but the very first; of the rounds their
    mean. On a CPU every call is timed by itself.

    Raises:
        SpecError: If there are no rounds.
    """
    check_replays(rounds)
    if torch.device(device).type != "cuda":
        return [Steady(cpu_us(calls, 0.0, min_samples=rounds), None) for calls in competitors]
    graphs = [_capture(calls, times) for calls, times in zip(competitors, _rounds(competitors, min_calls), strict=True)]
    found: list[list[tuple[float, float]]] = [[] for _ in graphs]
    for _ in range(rounds):
        for (graph, calls), each in zip(graphs, found, strict=True):
            time.sleep(PAUSE_S)
            each.append(steady_us(ends_ms(graph, STEADY_S), calls))
    means = [tuple(map(statistics.mean, zip(*each, strict=True))) for each in found]
    _longest.us = max(us for us, _ in means)
    return [Steady(us, burst) for us, burst in means]


def steady_us(ends: Sequence[float], calls: int) -> tuple[float, float]:
    """Return microseconds of a call in the end and in the beginning, of when replays with so many calls ended: two at least."""
    took = took_us(ends, calls)
    early = [us for us, end in zip(took, ends[1:], strict=True) if end <= _BURST_MS]
    # Medians: where the processor is late, the GPU has nothing to do for a while.
    return statistics.median(late_us(ends, calls, _TAIL_S)), statistics.median(early or took[:1])


def times_or_reasons(
    competitors: Mapping[_Name, Sequence[Call]], device: torch.device | str, *, replays: int = 7, min_calls: int = 16
) -> dict[_Name, float | str]:
    """Return what :func:`times_us` does by name; of a competitor that fails, why.

    Raises:
        SpecError: If there are no replays.
    """
    check_replays(replays)

    def measure(calls: list[Sequence[Call]]) -> list[float]:
        return times_us(calls, device, replays=replays, min_calls=min_calls)

    return _or_reasons(competitors, measure)


def steady_or_reasons(
    competitors: Mapping[_Name, Sequence[Call]], device: torch.device | str, *, min_calls: int = 16
) -> dict[_Name, Steady | str]:
    """Return what :func:`steady_times_us` does by name; of a competitor that fails, why."""

    def measure(calls: list[Sequence[Call]]) -> list[Steady]:
        return steady_times_us(calls, device, min_calls=min_calls)

    return _or_reasons(competitors, measure)


def settled_or_reasons(
    competitors: Mapping[_Name, Sequence[Call]],
    device: torch.device | str,
    m: int,
    *,
    replays: int = 7,
    min_calls: int = 16,
) -> dict[_Name, Steady | str]:
    """Return what :func:`steady_or_reasons` does for ``STEADY_FROM`` tokens or more, :func:`times_or_reasons` for fewer.

    Raises:
        SpecError: If there are no replays.
    """
    if m >= STEADY_FROM:
        return steady_or_reasons(competitors, device, min_calls=min_calls)
    found = times_or_reasons(competitors, device, replays=replays, min_calls=min_calls)
    return {name: us if isinstance(us, str) else Steady(us, None) for name, us in found.items()}


def _or_reasons(
    competitors: Mapping[_Name, Sequence[Call]], measure: Callable[[list[Sequence[Call]]], list[_Time]]
) -> dict[_Name, _Time | str]:
    if not competitors:
        return {}
    try:
        return dict(zip(competitors, measure(list(competitors.values())), strict=True))
    except (LQError, RuntimeError, ImportError) as error:
        if len(competitors) == 1:
            return {name: last_line(error) for name in competitors}
    found: dict[_Name, _Time | str] = {}
    for name, calls in competitors.items():  # each alone, to learn which it was
        alone = _or_reasons({name: calls}, measure)
        found |= alone
    return found


def cuda_graph_us(calls: Sequence[Call], *, replays: int = 7, min_calls: int = 16) -> float:
    """Time calls in a CUDA graph that holds every one of them, repeated up to at least ``min_calls``."""
    return cuda_graphs_us([calls], replays=replays, min_calls=min_calls)[0]


def cuda_graphs_us(competitors: Sequence[Sequence[Call]], *, replays: int = 7, min_calls: int = 16) -> list[float]:
    """Time several ways of doing the same, each in a CUDA graph, and replay the graphs in turn.

    Replayed in turn they meet the same clocks and temperatures, so that ratios hold when the times themselves drift: in
    another order each time, as one that always stood first was up to 7% faster than the same product further on. Each
    is replayed once before its clock starts: what the other one left behind is not its cost. The GPU waits until both
    replays are queued, so that a processor that is slow to queue them is no part of the time. Graphs hold about as many
    calls, whole rounds over the copies of each, so that all run about as long: near the limit of its power a GPU's clock falls
    after some 30 ms, and the competitor with fewer copies of its weight would be done before.

    Args:
        competitors: For each of them its calls on different copies of the data.
        replays: Replays of each graph; the median counts.
        min_calls: The calls are repeated in a graph until it holds as many; and until it has about as many as the
            competitor with most.

    Returns:
        Microseconds of one call, for each of ``competitors``.
    """
    graphs = [
        _capture(calls, rounds) for calls, rounds in zip(competitors, _rounds(competitors, min_calls), strict=True)
    ]
    _raise_clocks(graphs)
    queueing = [_queueing_s(graph) for graph, _ in graphs]
    times: list[list[float]] = [[] for _ in graphs]
    shuffled = random.Random(0)
    for _ in range(replays):
        for index in shuffled.sample(range(len(graphs)), len(graphs)):
            (graph, count), seconds, found = graphs[index], queueing[index], times[index]
            start, stop = event(), event()
            _hold(4 * seconds)
            graph.replay()
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(stop) * 1e3 / count)
    medians = [statistics.median(found) for found in times]
    _longest.us = max(medians)
    return medians


def _rounds(competitors: Sequence[Sequence[object]], least: int) -> list[int]:
    """Return how often each is repeated: to have ``least`` calls, and about as many as the one with most."""
    most = max(map(len, competitors), default=0)
    return [max(math.ceil(least / len(calls)), round(most / len(calls)), 1) for calls in competitors]


def _hold(seconds: float) -> None:
    """Keep the GPU waiting at least so long, from when it has done what it was given."""
    torch.cuda._sleep(int(seconds * _MOST_CYCLES_A_S))  # type: ignore[no-untyped-call]


def _queueing_s(graph: torch.cuda.CUDAGraph) -> float:
    """Return the seconds that the processor takes to queue a replay: the longest of three."""
    longest = 0.0
    for _ in range(3):
        start = time.perf_counter()
        graph.replay()
        longest = max(longest, time.perf_counter() - start)
        torch.cuda.synchronize()
    return longest


class _Longest(threading.local):
    """Microseconds of the longest call that was timed last."""

    us = 0.0


_longest = _Longest()


def _raise_clocks(graphs: Sequence[tuple[torch.cuda.CUDAGraph, int]]) -> None:
    """Replay graphs, with so many calls each, for a while: a GPU is not at full speed right after a pause or heavy work.

    One token times 14336x4096 took 12.0 us right behind products of 8192x8192x8192, and 9.9 us 0.1 s later (H200).
    """
    start = time.perf_counter()
    deadline, longest = start + WARM_UP_S, 0.0
    while (now := time.perf_counter()) < deadline:
        for graph, calls in graphs:
            graph.replay()
            torch.cuda.synchronize()
            before, now = now, time.perf_counter()
            longest = max(longest, (now - before) / calls * 1e6)
        if _longest.us > _MUCH_LONGER * longest:
            deadline = start + SETTLE_S


def _capture(calls: Sequence[Call], rounds: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """Return a graph of ``calls``, ``rounds`` times over, replayed once, and the number of calls in it."""
    warm_up = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        # Compilation, tuning, workspaces and what a kernel derives from each weight must exist before the capture.
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
    return graph, rounds * len(calls)


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

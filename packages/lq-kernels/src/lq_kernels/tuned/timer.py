"""Time cuts on the GPU of this process: in CUDA graphs, with weights that are not in the cache.

A decoding step reads every weight of a model once, so each read comes from memory. Each call in a graph has its own copy of
the weight, and a round over the copies is several times larger than the L2 cache (50 MB on an H200). Graphs are replayed in
turn, so that cuts meet the same clocks and temperatures; the median of the replays counts.

Products of many tokens take a GPU to the limit of its power, where the fastest cut may be another one, which takes less energy:
up to 9% (H200). So they are timed there; for a short look in turn, at a clock that they share, and where more replays are
asked for each by itself for 0.15 s, at a clock of its own, as it runs in a model.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lq_formats import LQError
from lq_formats.layouts import FRAGMENT_INT4, FRAGMENT_INT8
from torch import Tensor

from lq_kernels.problem import Arch
from lq_kernels.tuned.kernels import DTYPE, config_of, group_size, scale_dtype
from lq_kernels.tuned.replays import ends_ms, event, late_us
from lq_kernels.tuned.search import SHORT
from lq_kernels.tuned.table import Q8_1, Cut, Weight

COLD_BYTES = 160 << 20
MAX_COPIES = 64
_MIN_CALLS = {512: 16, 1 << 31: 4}
"""Calls in a graph, at least, up to so many tokens."""
_MAX_DIFFERENCE = 0.05
"""Of the largest result: three times what rounding weights and scales to bf16 makes."""
_HOLD_CYCLES = 500_000
"""That the GPU waits while the processor queues a replay, else part of the time where that is slow: 0.25 ms or more."""
_HOT_TOKENS = 256
"""Tokens from which the GPU is at the limit of its power."""
_HEAT_S = 0.1
"""Seconds that it takes to get there."""
_ALONE_S = 0.05
"""Seconds of which the times then count, where a cut runs by itself."""
_EXPECTED = "expected"
"""Beside the kernels: what gives the result by another way."""

_Call = Callable[[Tensor, Any], Tensor]


class GraphTimer:
    """Times cuts of one weight after another; see the module docstring."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sm_count = Arch.of(device).sm_count
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copies: tuple[Weight, list[dict[str, _Call]]] | None = None

    def times(
        self,
        weight: Weight,
        m: int,
        cuts: Sequence[tuple[str, Cut]],
        replays: int,
        announce: Callable[[int], None] = lambda index: None,
    ) -> list[float | str]:
        """Return the median microseconds of each of ``cuts``, kernels and their fields; of one that fails, why.

        Args:
            weight: What is multiplied.
            m: Tokens.
            cuts: Kernels and cuts.
            replays: How often each graph is replayed, if not for 0.15 s.
            announce: Called with a cut's position before it runs, so that one that never ends is known.

        Raises:
            RuntimeError: If a cut broke the process's CUDA context; nothing can run after it.
        """
        copies = self._prepare(weight)
        x = torch.randn(m, weight.k, device=self._device, dtype=DTYPE)
        found: dict[int, float | str] = {}
        graphs: dict[int, torch.cuda.CUDAGraph] = {}
        expected = copies[0][_EXPECTED](x, None)
        least = next(calls for most, calls in _MIN_CALLS.items() if m <= most)
        count = len(copies) * math.ceil(least / len(copies))
        for index, (kernel, cut) in enumerate(cuts):
            announce(index)
            try:
                config = config_of(kernel, weight, m, self._sm_count, cut)
                calls = [functools.partial(copy[kernel], x, config) for copy in copies]
                result = calls[0]()
                torch.cuda.synchronize(self._device)
                reason = _difference(result, expected)
                if reason:
                    found[index] = reason
                    continue
                graphs[index] = _capture(calls, count, self._stream)
                torch.cuda.synchronize(self._device)
            except (LQError, RuntimeError) as error:
                found[index] = _first_line(error)
                torch.cuda.synchronize(self._device)  # raises if the context is broken
        hot = m >= _HOT_TOKENS
        times: dict[int, list[float]] = {}
        if hot and replays > SHORT:
            for index, graph in graphs.items():
                announce(index)
                times[index] = late_us(ends_ms(graph, _HEAT_S + _ALONE_S), count, _ALONE_S)
        else:
            if hot:
                self._heat(graphs, announce)
            times = self._in_turn_us(graphs, count, replays, announce, pausing=not hot)
        found |= {index: statistics.median(each) for index, each in times.items()}
        return [found[index] for index in range(len(cuts))]

    def _in_turn_us(
        self,
        graphs: Mapping[int, torch.cuda.CUDAGraph],
        count: int,
        replays: int,
        announce: Callable[[int], None],
        *,
        pausing: bool,
    ) -> dict[int, list[float]]:
        """Return the microseconds of a call in each replay: with pauses between all, or between rounds alone."""
        times: dict[int, list[float]] = {index: [] for index in graphs}
        for _ in range(replays):
            events = {}
            for index, graph in graphs.items():
                announce(index)
                start, stop = events[index] = event(), event()
                if pausing or len(events) == 1:
                    torch.cuda._sleep(_HOLD_CYCLES)  # type: ignore[no-untyped-call]
                start.record()
                graph.replay()
                stop.record()
                if pausing:
                    torch.cuda.synchronize(self._device)
            torch.cuda.synchronize(self._device)
            for index, (start, stop) in events.items():
                times[index].append(start.elapsed_time(stop) * 1e3 / count)
        return times

    def _heat(self, graphs: Mapping[int, torch.cuda.CUDAGraph], announce: Callable[[int], None]) -> None:
        """Replay graphs for a while, with hardly a pause."""
        until = time.perf_counter() + _HEAT_S
        while graphs and time.perf_counter() < until:
            for index, graph in graphs.items():
                announce(index)
                graph.replay()
            torch.cuda.synchronize(self._device)

    def _prepare(self, weight: Weight) -> list[dict[str, _Call]]:
        if self._copies is None or self._copies[0] != weight:
            self._copies = None  # freed, as are the graphs' results, before the next weight is made
            torch.cuda.empty_cache()
            nbytes = weight.n * weight.k * weight.bits // 8
            count = max(2, min(MAX_COPIES, math.ceil(COLD_BYTES / nbytes)))
            make = {"": _a16_calls, Q8_1: _q8_1_calls}.get(weight.activation, _a8_calls)
            generator = torch.Generator(self._device).manual_seed(0)
            first = make(weight, self._device, generator)
            copies = [first, *(make(weight, self._device, generator) for _ in range(count - 1))]
            self._copies = (weight, copies)
        return self._copies[1]


def _numbers(weight: Weight, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return random codes in fragment order, with scales and zeros."""
    layout = FRAGMENT_INT4 if weight.bits == 4 else FRAGMENT_INT8
    size, rows = group_size(weight), weight.n
    shape = layout.packed_shape(rows, weight.k)
    packed = torch.randint(-(2**31), 2**31 - 1, shape, device=device, dtype=torch.int32, generator=generator)
    scales = layout.scale_shape(rows, weight.k, size)
    scale = (torch.rand(scales, device=device, generator=generator) * 0.01 + 0.001).to(scale_dtype(weight))
    zero = None
    if weight.zero:
        zero = torch.randint(0, 16, scales, device=device, generator=generator).to(scale.dtype)
    return packed, scale, zero


def _a16_calls(weight: Weight, device: torch.device, generator: torch.Generator) -> dict[str, _Call]:
    return _products(weight, *_numbers(weight, device, generator))


def _products(
    weight: Weight, packed: Tensor, scale: Tensor, zero: Tensor | None, *, transposed: bool = False
) -> dict[str, _Call]:
    from lq_kernels import dequant_blas
    from lq_kernels.cuda import decode_a16, prefill_a16

    rest = (packed, scale, zero, None, weight.n, group_size(weight), weight.bits)

    def turned(y: Tensor) -> Tensor:
        return y.t().float() if transposed else y

    return {
        _EXPECTED: lambda x, config: turned(dequant_blas.preshuffled_linear(x, *rest)),
        "decode_a16": lambda x, config: decode_a16.linear(x, *rest, config, transposed),
        "prefill_a16": lambda x, config: prefill_a16.linear(x, *rest, config, transposed),
        "dequant_blas": lambda x, config: dequant_blas.preshuffled_linear(x, *rest),
    }


def _q8_1_calls(weight: Weight, device: torch.device, generator: torch.Generator) -> dict[str, _Call]:
    """Return products behind a launch that rounds their tokens; decode's quantizes them itself, or in a launch of its own."""
    from lq_kernels.cuda import decode_a16
    from lq_kernels.cuda.quantize_q8_1 import round_q8_1

    packed, scale, _ = _numbers(weight, device, generator)
    calls = _products(weight, packed, scale, None, transposed=True)

    def behind(call: _Call) -> _Call:
        return lambda x, config: call(round_q8_1(x), config)

    found = {name: behind(call) for name, call in calls.items() if name != "dequant_blas"}
    if weight.groups:
        found["decode_a16"] = lambda x, config: decode_a16.linear_q8_1(x, packed, scale, weight.n, config)
    return found


def _a8_calls(weight: Weight, device: torch.device, generator: torch.Generator) -> dict[str, _Call]:
    from lq_kernels.cuda import linear_a8
    from lq_kernels.cuda.quantize_tokens import CODE_DTYPES
    from lq_kernels.dynamic_reference import LAYOUTS, int4_dynamic_dequantize, int8_dynamic_dequantize

    rows, size = weight.n, group_size(weight)
    codes = CODE_DTYPES[weight.activation]
    if weight.bits == 4:
        unsigned = torch.randint(1, 16, (rows, weight.k), device=device, dtype=torch.uint8, generator=generator)
        packed = LAYOUTS[weight.activation].pack(unsigned)
        scales: tuple[int, ...] = LAYOUTS[weight.activation].scale_shape(rows, weight.k, size)
    else:
        packed = torch.randint(-100, 101, (rows, weight.k), device=device, generator=generator).float().to(codes)
        scales = (rows,)
    scale = (torch.rand(scales, device=device, generator=generator) * 0.01 + 0.001).to(scale_dtype(weight))

    def run(x: Tensor, config: Any) -> Tensor:
        tokens, token_scale = _quantized(x, weight.activation)
        y: Tensor = linear_a8.linear(
            tokens, token_scale, packed, scale, None, rows, size, DTYPE, lowest=False, config=config
        )
        return y

    def expected(x: Tensor, config: Any) -> Tensor:
        tokens, token_scale = _quantized(x, weight.activation)
        if weight.bits == 4:
            w = int4_dynamic_dequantize(packed, scale, size, rows, weight.k, weight.activation, DTYPE)
        else:
            w = int8_dynamic_dequantize(packed, scale, DTYPE)
        return torch.nn.functional.linear((tokens.float() * token_scale[:, None]).to(DTYPE), w)

    return {_EXPECTED: expected, "linear_a8": run}


_tokens: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}


def _quantized(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Quantize once; the product alone is timed."""
    from lq_kernels.dynamic_kernels import quantize

    found = _tokens.get((id(x), activation))
    if found is None or found[0] is not x:
        _tokens.clear()
        found = _tokens[id(x), activation] = (x, *quantize(x, activation))
    return found[1], found[2]


def _capture(calls: Sequence[Callable[[], Tensor]], count: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Return a graph of ``count`` calls, replayed once.

    Not by ``torch.cuda.graph``, which empties the allocator's cache each time.
    """
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # what a stream has for itself must exist before the capture
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for index in range(count):
                calls[index % len(calls)]()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    return graph


def _difference(result: Tensor, expected: Tensor) -> str:
    """Return what is wrong with a result, or nothing."""
    if not bool(result.isfinite().all()):
        return "gives results that are not finite"
    most = float(expected.abs().max())
    difference = float((result - expected).abs().max())
    if difference <= _MAX_DIFFERENCE * most:
        return ""
    return f"is wrong by {difference:.3g}, where the largest result is {most:.3g}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]

"""The process that :mod:`lq_eval.bench.cold` starts: ``python -m lq_eval.bench.cold_process OPTIONS ANSWER``.

It builds the layers, quantizes them, calls ``lq_torch.warmup`` (if it is told for which tokens) and then every layer at numbers
of tokens that it may not have seen, and writes the seconds of each step.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lq_torch import quantize_, warmup
from torch import nn

from lq_eval.bench.cold import ColdOptions
from lq_eval.bench.shapes import parse_shapes
from lq_eval.schemes import parse_scheme


def start(options: ColdOptions) -> Mapping[str, Any]:
    """Return the measured fields of a :class:`lq_eval.bench.cold.ColdRow`."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    shapes = parse_shapes(options.shapes)
    # Never called one after another: only a place that holds the layers.
    model = nn.Sequential(*(nn.Linear(s.k, s.n, bias=False, device=device, dtype=dtype) for s in shapes))
    inputs = {(m, s.k): torch.randn(m, s.k, device=device, dtype=dtype) for s in shapes for m in options.new_ms}
    with torch.no_grad():
        # The context, the allocator and the vendor's library, which a dense model waits for as well.
        for layer, shape in zip(model, shapes, strict=True):
            for m in options.new_ms:
                layer(inputs[m, shape.k])
        _wait(device)

        quantize_s = _seconds(lambda: quantize_(model, parse_scheme(options.scheme)), device)
        compiled, children = [0.0], _children_s()
        warmup_s = rerun_s = cpu_s = 0.0
        if options.batch_sizes:
            started, cpu_started = time.perf_counter(), time.process_time()

            def progress(done: int, total: int, what: str) -> None:
                if " x " not in what:  # a source, not a layer with its tokens
                    compiled.append(time.perf_counter() - started)

            warmup_s = _seconds(lambda: warmup(model, options.batch_sizes, progress), device)
            cpu_s = time.process_time() - cpu_started
            rerun_s = _seconds(lambda: warmup(model, options.batch_sizes), device)
        calls = {
            (index, m): _seconds(functools.partial(layer, inputs[m, shape.k]), device)
            for index, (layer, shape) in enumerate(zip(model, shapes, strict=True))
            for m in options.new_ms
        }
    if options.batch_sizes:
        cpu_s += _children_s() - children  # of processes that compiled, which have ended long since
    slowest = max(calls, key=lambda key: calls[key])
    return {
        "layers": len(shapes),
        "quantize_s": quantize_s,
        "warmup_s": warmup_s,
        "warmup_cpu_s": cpu_s,
        "compile_s": compiled[-1],
        "rerun_s": rerun_s,
        "first_call_s": calls[slowest],
        "first_call_m": slowest[1],
    }


def _children_s() -> float:
    """Return the processors' seconds of the processes that this one started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: list[str]) -> None:
    """Run with ``OPTIONS ANSWER``: options as JSON, and the file to write."""
    options = ColdOptions.from_json(arguments[0])
    Path(arguments[1]).write_text(json.dumps(start(options)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What one eager call costs the CPU: decoding outside of a CUDA graph waits for Python, not for the GPU.

Calls are launched back to back in batches without waiting for the GPU, all contenders in turn; the figure is the median over
batches of a batch's time on the CPU divided by its calls. A batch is short enough not to fill the GPU's queue of launches.
On a CPU device the product itself is in the figure.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lq_formats import LQError, SpecError
from lq_kernels import int4_linear, int8_gemm
from lq_torch import Int4Tensor, Int8Tensor, quantize_
from torch import Tensor, nn

from lq_eval.bench.shapes import Shape
from lq_eval.bench.timing import Call
from lq_eval.errors import last_line
from lq_eval.schemes import parse_scheme

BASELINE = "F.linear"


@dataclass(frozen=True)
class EagerRow:
    """The CPU's cost of one way to multiply.

    Attributes:
        call: Which way.
        n: Out features.
        k: In features.
        m: Tokens.
        dtype: dtype of x.
        cpu_us: Median microseconds of the CPU; None if it could not run.
        ratio: ``cpu_us`` over that of ``F.linear`` with a dense weight.
        note: Why it could not run.
    """

    call: str
    n: int
    k: int
    m: int
    dtype: str
    cpu_us: float | None
    ratio: float | None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return asdict(self)


def run_eager(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    m: int = 1,
    group_size: int = 128,
    batches: int = 41,
    calls: int = 50,
) -> Iterator[EagerRow]:
    """Yield the cost of a dense product, of layers with int4 and int8 weights, and of lq's functions called directly.

    Args:
        shape: The weight.
        dtype: dtype of x.
        device: Where to run.
        m: Tokens.
        group_size: Group size of int4; -1 for one scale a row.
        batches: Batches of each contender.
        calls: Calls in a batch.

    Raises:
        SpecError: If a number is not positive.
    """
    if min(m, batches, calls) < 1:
        raise SpecError(f"m={m}, batches={batches}, calls={calls}: expected positive numbers")
    x = torch.randn(m, shape.k, device=device, dtype=dtype)
    contenders, notes = _contenders(shape, dtype, device, x, group_size)
    with torch.no_grad():
        times = cpu_cost(contenders, device, batches=batches, calls=calls)
    name = str(dtype).removeprefix("torch.")
    for call, us in times.items():
        yield EagerRow(call, shape.n, shape.k, m, name, us, us / times[BASELINE])
    for call, note in notes.items():
        yield EagerRow(call, shape.n, shape.k, m, name, None, None, note)


def cpu_cost(
    contenders: Mapping[str, Call],
    device: torch.device,
    *,
    batches: int,
    calls: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median microseconds that the CPU spends on one call of each contender.

    Args:
        contenders: Functions without arguments, called ``calls`` times without waiting for the device.
        device: What to wait for between batches.
        batches: Batches of each, the contenders taking turns.
        calls: Calls in a batch.
        clock: Seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(3):  # compilation, and what is kept from a first call
            call()
    _wait(device)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(batches):
            for name, call in contenders.items():
                start = clock()
                for _ in range(calls):
                    call()
                times[name].append((clock() - start) * 1e6 / calls)
                _wait(device)
    finally:
        if collecting:
            gc.enable()
    return {name: statistics.median(found) for name, found in times.items()}


def _contenders(
    shape: Shape, dtype: torch.dtype, device: torch.device, x: Tensor, group_size: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the calls by name, and for those that cannot run why not."""
    dense = _linear(shape, dtype, device)
    w = dense.weight.detach()
    found: dict[str, Call] = {BASELINE: lambda: nn.functional.linear(x, w), "nn.Linear": lambda: dense(x)}
    notes: dict[str, str] = {}
    group = "row" if group_size == -1 else f"g{group_size}"
    for scheme, direct in ((f"int4-{group}", "int4_linear"), ("int8", "int8_gemm")):
        layer_name = f"nn.Linear {scheme}"
        try:
            model = nn.Sequential(_linear(shape, dtype, device))
            quantize_(model, parse_scheme(scheme))
            layer = model[0]
            product = _direct(layer, x)
            with torch.no_grad():
                layer(x)
                product()
        except (LQError, RuntimeError, ImportError) as error:
            notes |= {layer_name: last_line(error), direct: last_line(error)}
        else:
            found |= {layer_name: lambda layer=layer: layer(x), direct: product}  # type: ignore[misc]
    return found, notes


def _direct(layer: nn.Module, x: Tensor) -> Call:
    weight = layer.weight
    if isinstance(weight, Int4Tensor):
        q, scale, zero, group = weight.qdata, weight.scale, weight.zero, weight.group_size
        return lambda: int4_linear(x, q, scale, zero, group_size=group)
    assert isinstance(weight, Int8Tensor)
    q, scale = weight.qdata, weight.scale
    return lambda: int8_gemm(x, q, scale)


def _linear(shape: Shape, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    return nn.Linear(shape.k, shape.n, bias=False, device=device, dtype=dtype)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""lq's kernels against the vendor's dense product, over batch sizes and the layers of well-known models.

A measured point is one product ``y (M, N) = x (M, K) @ w (N, K).T``. ``dense`` is ``F.linear`` with a weight of x's dtype
(cuBLAS on an NVIDIA GPU). Weights are random bits: kernels take the same time for any. For Q4_0 and the ``a8`` products
the time includes the quantization of the activations.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lq_formats import LQError, SpecError
from lq_kernels import Arch

from lq_eval.bench.peers import PEERS, Calls, peer_calls
from lq_eval.bench.products import AUTO, OPS, Product
from lq_eval.bench.shapes import Shape, check_tokens
from lq_eval.bench.timing import COLD_BYTES, copies, time_us
from lq_eval.errors import last_line

ALL = "all"


@dataclass(frozen=True)
class GemmOptions:
    """What to measure.

    Attributes:
        shapes: Weights.
        ms: Numbers of tokens.
        dtypes: dtypes of x.
        ops: Products, see :mod:`lq_eval.bench.products`.
        kernels: Kernel names; ``auto`` is the registry's choice, ``all`` every kernel that can
            run but the reference.
        peers: Other libraries, see :mod:`lq_eval.bench.peers`.
        group_size: Group size of int4; -1 for one scale a row.
        symmetric: Whether int4 is symmetric.
        device: Where to run.
        seconds: Stop starting new points after this time.
        cold_bytes: Bytes of weights in a round, see :mod:`lq_eval.bench.timing`.
    """

    shapes: tuple[Shape, ...]
    ms: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    ops: tuple[str, ...] = ("int4", "int8", "q4_0")
    kernels: tuple[str, ...] = (AUTO,)
    peers: tuple[str, ...] = ()
    group_size: int = 128
    symmetric: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = math.inf
    cold_bytes: int = COLD_BYTES

    def __post_init__(self) -> None:
        for name, values, known in (("op", self.ops, tuple(OPS)), ("peer", self.peers, tuple(PEERS))):
            for value in values:
                if value not in known:
                    raise SpecError(f"unknown {name} {value!r}: expected one of {', '.join(known)}")
        known_kernels = {name for product in self.products for name in product.kernels}
        for kernel in self.kernels:
            if kernel not in known_kernels | {AUTO, ALL}:
                raise SpecError(f"unknown kernel {kernel!r}: expected auto, all, {', '.join(sorted(known_kernels))}")
        check_tokens(self.ms)
        for product in self.products:
            for shape in self.shapes:
                product.check(shape)
        if not points(self):
            raise SpecError("there is nothing to time: no kernel or peer was chosen that has one of the products")

    @property
    def products(self) -> tuple[Product, ...]:
        """The products to time."""
        return tuple(Product(op, self.group_size, self.symmetric) for op in self.ops)


@dataclass(frozen=True)
class GemmRow:
    """One measured point.

    Attributes:
        op: What was multiplied, see :mod:`lq_eval.bench.products`.
        shape: Label of the weight.
        n: Out features.
        k: In features.
        m: Tokens.
        dtype: dtype of x.
        group_size: In features per scale; 0 for per row int8.
        kernel: What was asked for: ``auto``, a kernel or a peer.
        ran: The kernel that ran.
        us: Median microseconds; None if it could not run.
        dense_us: Median microseconds of the dense product.
        gb_per_s: Bytes of packed weight read per second, in 1e9.
        note: Why it could not run.
        burst_us: Of a point that was timed at the limit of the GPU's power (:func:`lq_eval.bench.timing.steady_times_us`), its
            microseconds right after a pause.
        dense_burst_us: Those of the dense product.
    """

    op: str
    shape: str
    n: int
    k: int
    m: int
    dtype: str
    group_size: int
    kernel: str
    ran: str
    us: float | None
    dense_us: float
    gb_per_s: float | None
    note: str = ""
    burst_us: float | None = None
    dense_burst_us: float | None = None

    @property
    def speedup(self) -> float | None:
        """Time of the dense product over this time."""
        return self.dense_us / self.us if self.us else None

    @property
    def burst_speedup(self) -> float | None:
        """The same right after a pause."""
        return self.dense_burst_us / self.burst_us if self.burst_us and self.dense_burst_us else None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values, with its speedups; without those of a burst where there are none."""
        row = {**asdict(self), "speedup": self.speedup, "burst_speedup": self.burst_speedup}
        return {name: value for name, value in row.items() if "burst" not in name or value is not None}

    @staticmethod
    def of(
        product: Product,
        shape: Shape,
        m: int,
        dtype: torch.dtype,
        *,
        kernel: str,
        ran: str,
        us: float | None,
        dense_us: float,
        nbytes: int,
        note: str = "",
        burst_us: float | None = None,
        dense_burst_us: float | None = None,
    ) -> "GemmRow":
        """Return the row of a point; ``nbytes`` are those of the packed weight."""
        return GemmRow(
            product.op,
            shape.label,
            shape.n,
            shape.k,
            m,
            str(dtype).removeprefix("torch."),
            product.group(shape),
            kernel,
            ran,
            us,
            dense_us,
            nbytes / us / 1e3 if us else None,
            note,
            burst_us,
            dense_burst_us,
        )


def points(options: GemmOptions) -> int:
    """Return how many rows :func:`run_gemm` yields at most."""
    per_point = sum(
        len(_kernels(product, options)) + sum(_times(peer, product) for peer in options.peers)
        for product in options.products
    )
    return len(options.shapes) * len(options.dtypes) * len(options.ms) * per_point


def run_gemm(options: GemmOptions) -> Iterator[GemmRow]:
    """Measure every point, one at a time, until all are done or the time is up.

    A kernel that was asked for by name and cannot run a point yields a row that says why. Peers, which may spend minutes on
    tuning, come last, beside the dense times of the same run.
    """
    deadline = time.monotonic() + options.seconds
    cases = [(shape, dtype) for shape in options.shapes for dtype in options.dtypes]
    dense: dict[tuple[Shape, torch.dtype], dict[int, float]] = {}
    for shape, dtype in cases:
        dense[shape, dtype] = _dense_times(shape, dtype, options, deadline)
        for product in options.products:
            yield from _lq_rows(product, shape, dtype, dense[shape, dtype], options, deadline)
            _release(options.device)
    for peer in options.peers:
        for shape, dtype in cases:
            for product in options.products:
                if _times(peer, product) and time.monotonic() <= deadline:
                    yield from _peer_rows(peer, product, shape, dtype, dense[shape, dtype], options, deadline)
                    _release(options.device)


def _lq_rows(
    product: Product,
    shape: Shape,
    dtype: torch.dtype,
    dense: dict[int, float],
    options: GemmOptions,
    deadline: float,
) -> Iterator[GemmRow]:
    kernels = _kernels(product, options)
    if not kernels:
        return
    arch = Arch.of(options.device)
    operand, missing = None, ""
    try:
        operand = product.operand(shape, dtype, options.device, options.cold_bytes)
    except (LQError, RuntimeError, ImportError) as error:
        missing = last_line(error)
    for m, dense_us in dense.items():
        for kernel in kernels:
            if kernel not in options.kernels and kernel != AUTO and product.cannot(shape, m, dtype, arch, kernel):
                continue  # it was not asked for by name, only by "all"
            if time.monotonic() > deadline:
                return
            us, ran, note = None, kernel, missing
            if operand is not None:
                try:
                    ran = product.ran(shape, m, dtype, arch, kernel)
                    x = torch.randn(m, shape.k, device=options.device, dtype=dtype)
                    calls = operand.calls(x, "" if kernel == AUTO else kernel)
                    us = time_us(calls, options.device, budget_s=_cpu_budget(options))
                except (LQError, RuntimeError, ImportError) as error:
                    # One kernel that fails to compile or runs out of memory must not end the benchmark.
                    note = last_line(error)
            nbytes = operand.nbytes if operand is not None else 0
            yield GemmRow.of(
                product, shape, m, dtype, kernel=kernel, ran=ran, us=us, dense_us=dense_us, nbytes=nbytes, note=note
            )


def _dense_times(shape: Shape, dtype: torch.dtype, options: GemmOptions, deadline: float) -> dict[int, float]:
    calls = dense_calls(shape, dtype, options.device, options.cold_bytes)
    found: dict[int, float] = {}
    for m in options.ms:
        if time.monotonic() > deadline:
            break
        x = torch.randn(m, shape.k, device=options.device, dtype=dtype)
        found[m] = time_us(calls(x), options.device, budget_s=_cpu_budget(options))
    del calls
    _release(options.device)
    return found


def dense_calls(shape: Shape, dtype: torch.dtype, device: torch.device, cold_bytes: int) -> Calls:
    """Return a function from x ``(M, K)`` to the dense products with enough copies of a weight."""
    count = copies(shape.n * shape.k * dtype.itemsize, cold_bytes)
    weights = [torch.randn(shape.n, shape.k, device=device, dtype=dtype) for _ in range(count)]
    return lambda x: [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]


def _peer_rows(
    peer: str,
    product: Product,
    shape: Shape,
    dtype: torch.dtype,
    dense: dict[int, float],
    options: GemmOptions,
    deadline: float,
) -> Iterator[GemmRow]:
    make: Calls | None = None
    missing = ""
    try:
        make = peer_calls(peer, product, shape, dtype, options.device, options.cold_bytes)
    except Exception as error:  # whatever another library raises, its row says so and the benchmark goes on
        missing = last_line(error)
    for m, dense_us in dense.items():
        if time.monotonic() > deadline:
            return
        us, note = None, missing
        if make is not None:
            try:
                us = time_us(make(torch.randn(m, shape.k, device=options.device, dtype=dtype)), options.device)
            except Exception as error:
                note = last_line(error)
        yield GemmRow.of(
            product,
            shape,
            m,
            dtype,
            kernel=peer,
            ran=peer,
            us=us,
            dense_us=dense_us,
            nbytes=shape.n * shape.k * product.bits() // 8,
            note=note,
        )


def _times(peer: str, product: Product) -> bool:
    return product.op in PEERS[peer].ops


def _kernels(product: Product, options: GemmOptions) -> tuple[str, ...]:
    """Return the kernels to time for a product; ``all`` leaves out the reference, which is an oracle."""
    chosen: list[str] = []
    for kernel in options.kernels:
        if kernel == ALL:
            chosen += [AUTO, *(name for name in product.kernels if name != "reference")]
        elif kernel == AUTO or kernel in product.kernels:
            chosen.append(kernel)
    return tuple(dict.fromkeys(chosen))


def _cpu_budget(options: GemmOptions) -> float:
    return 0.5 if math.isinf(options.seconds) else max(0.05, options.seconds / (8 * max(1, points(options))))


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()

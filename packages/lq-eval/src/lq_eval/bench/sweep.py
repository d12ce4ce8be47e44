"""The sweep: is lq ever slower than the dense layer it replaces, and does its time ever jump with one token more?

Every distinct layer of the models of :mod:`lq_eval.bench.shapes` at every M from 1 to 64 and a dozen above, the registry's
choice against the dense product. The graphs of one point are replayed in turn, so that a ratio compares like with like; from
256 tokens on, where a GPU is at the limit of its power, each by itself, for long and right after a pause.
Copies of a weight are made once a shape and round; the first round takes a few M of every shape, the second the rest: a
run that is cut short has seen everything once. At last, on a GPU, points between which time drops as M grows are measured
twice more, and the median counts: products of 2 us take 5% more in some captures of a graph than in others.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
from lq_formats import LQError, SpecError
from lq_kernels import Arch

from lq_eval.bench.gemm import GemmRow, dense_calls
from lq_eval.bench.operands import Operand
from lq_eval.bench.products import AUTO, Product
from lq_eval.bench.shapes import MODELS, Shape, check_tokens, parse_shapes
from lq_eval.bench.timing import COLD_BYTES, Call, check_replays, settled_or_reasons
from lq_eval.errors import BenchError, last_line
from lq_eval.points import check_points
from lq_eval.results import Record, check_keys

SWEEP_MS = (*range(1, 65), 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
FIRST_ROUND = (1, 16, 64, 256, 1024, 4096)
MONOTONE_UP_TO = 512
TOLERANCE = 0.08
AGAIN = 2
"""How often points are measured again, where that is asked for."""
DENSE = "dense"
_ROW_KEYS = ("op", "shape", "n", "k", "m", "dtype", "group_size", "ran", "us", "speedup")

Point: TypeAlias = tuple[str, int, int, int, str, int]
"""op, n, k, m, dtype, group size: what makes a row the same measurement."""


@dataclass(frozen=True)
class SweepOptions:
    """What to measure.

    Attributes:
        shapes: Weights.
        ms: Numbers of tokens.
        ops: Products, see :mod:`lq_eval.bench.products`.
        dtype: dtype of x.
        group_size: Group size of int4; -1 for one scale a row.
        device: Where to run.
        seconds: Stop starting new points after this time.
        replays: Replays of each graph, of which the median counts.
        cold_bytes: Bytes of weights in a round, see :mod:`lq_eval.bench.timing`.
        done: Points to leave out.
        again: Whether points between which time drops are measured again (:func:`suspects`), ``AGAIN`` times.
    """

    shapes: tuple[Shape, ...]
    ms: tuple[int, ...] = SWEEP_MS
    ops: tuple[str, ...] = ("int4", "int8")
    dtype: torch.dtype = torch.bfloat16
    group_size: int = 128
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = math.inf
    replays: int = 5
    cold_bytes: int = COLD_BYTES
    done: frozenset[Point] = frozenset()
    again: bool = False

    def __post_init__(self) -> None:
        check_replays(self.replays)
        check_tokens(self.ms)
        for product in self.products:
            for shape in self.shapes:
                product.check(shape)

    @property
    def products(self) -> tuple[Product, ...]:
        """The products to time."""
        return tuple(Product(op, self.group_size) for op in self.ops)


@dataclass(frozen=True)
class Violation:
    """The largest drop of time as M grows: where one more token would have been cheaper than none.

    Attributes:
        excess: Time at ``slow_m`` over time at ``fast_m``, minus one; 0 if time never drops.
        slow_m: The smaller number of tokens, which takes longer.
        fast_m: The larger number of tokens, which is done sooner.
    """

    excess: float
    slow_m: int
    fast_m: int


@dataclass(frozen=True)
class SweepSummary:
    """What the sweep found for one weight and product.

    Attributes:
        op: The product.
        shape: Label of the weight.
        n: Out features.
        k: In features.
        dtype: dtype of x.
        group_size: In features per scale.
        points: Points measured.
        failed: Points that could not run.
        min_speedup: The smallest ratio of dense time to lq's.
        min_m: Where it is.
        min_ran: The kernel that ran there.
        excess: Of the largest violation of "time grows with M" up to 512 tokens.
        slow_m: Its smaller M.
        fast_m: Its larger M.
        min_burst_speedup: The smallest ratio right after a pause, of points that have one.
        min_burst_m: Where it is.
    """

    op: str
    shape: str
    n: int
    k: int
    dtype: str
    group_size: int
    points: int
    failed: int
    min_speedup: float | None
    min_m: int | None
    min_ran: str
    excess: float | None
    slow_m: int | None
    fast_m: int | None
    min_burst_speedup: float | None = None
    min_burst_m: int | None = None

    @property
    def monotone(self) -> bool:
        """Whether time grows with M within the tolerance, 8%."""
        return self.excess is not None and self.excess <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {**asdict(self), "monotone": self.monotone}


def all_shapes() -> tuple[Shape, ...]:
    """Return the distinct layers of all models, the models taking turns so that variety comes first."""
    per_model = [parse_shapes(name) for name in MODELS]
    turns = [shapes[i] for i in range(max(map(len, per_model))) for shapes in per_model if i < len(shapes)]
    return tuple({(shape.n, shape.k): shape for shape in reversed(turns)}.values())[::-1]


def rounds(ms: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of tokens of each round, ascending: a few over the whole range, then the rest."""
    first = tuple(sorted(set(ms) & set(FIRST_ROUND)))
    rest = tuple(sorted(set(ms) - set(FIRST_ROUND)))
    return tuple(part for part in (first, rest) if part)


def points(options: SweepOptions) -> int:
    """Return how many rows :func:`run_sweep` yields if the time suffices."""
    return sum(
        _key(product, shape, m, options) not in options.done
        for product in options.products
        for shape in options.shapes
        for m in set(options.ms)
    )


def run_sweep(options: SweepOptions) -> Iterator[GemmRow]:
    """Measure every point that is not done yet, until the time is up.

    Of a point that is measured again every row comes, the one with the median time last: of repeated points the last counts.
    """
    deadline = time.monotonic() + options.seconds
    measured: dict[tuple[Shape, Product], dict[int, list[GemmRow]]] = {}
    for ms in rounds(options.ms):
        for shape in options.shapes:
            for product, row in _run_shape(shape, [(m, _missing(shape, m, options)) for m in ms], options, deadline):
                if row.us is not None:
                    measured.setdefault((shape, product), {})[row.m] = [row]
                yield row
            _free(options.device)
    for shape in options.shapes if options.again else ():
        rows = {product: measured.get((shape, product), {}) for product in options.products}
        found = {product: suspects({m: _us(row) for m, (row,) in rows[product].items()}) for product in rows}
        todo = [(m, [each for each in options.products if m in found[each]]) for m in sorted(set(options.ms))]
        for _ in range(AGAIN):
            for product, row in _run_shape(shape, todo, options, deadline):
                if row.us is not None:
                    rows[product][row.m].append(row)
                yield row
        for same in (of_product[m] for of_product in rows.values() for m in sorted(of_product)):
            median = sorted(same, key=_us)[len(same) // 2]
            if median is not same[-1]:
                yield median
        _free(options.device)


def _us(row: GemmRow) -> float:
    return math.inf if row.us is None else row.us


def _free(device: torch.device) -> None:
    """Give back the memory of the copies of a weight, which nothing holds any more."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def suspects(times: Mapping[int, float], last: int = MONOTONE_UP_TO) -> list[int]:
    """Return the numbers of tokens that take longer than some larger one, by more than half the tolerance, and these.

    Args:
        times: Microseconds by M.
        last: Larger M are left out.
    """
    found: set[int] = set()
    fast: int | None = None
    for m in sorted((m for m in times if m <= last), reverse=True):
        if fast is not None and times[m] > times[fast] * (1 + TOLERANCE / 2):
            found |= {m, fast}
        if fast is None or times[m] < times[fast]:
            fast = m
    return sorted(found)


def _run_shape(
    shape: Shape, wanted: Sequence[tuple[int, Sequence[Product]]], options: SweepOptions, deadline: float
) -> Iterator[tuple[Product, GemmRow]]:
    todo = [(m, products) for m, products in wanted if products]
    if not todo or time.monotonic() > deadline:
        return
    operands: dict[Product, Operand | str] = {}
    for product in dict.fromkeys(product for _, products in todo for product in products):
        try:
            operands[product] = product.operand(shape, options.dtype, options.device, options.cold_bytes)
        except (LQError, RuntimeError, ImportError) as error:
            operands[product] = last_line(error)
    dense = dense_calls(shape, options.dtype, options.device, options.cold_bytes)
    arch = Arch.of(options.device)
    for m, products in todo:
        if time.monotonic() > deadline:
            return
        x = torch.randn(m, shape.k, device=options.device, dtype=options.dtype)
        calls: dict[Product | str, Sequence[Call]] = {DENSE: dense(x)}
        for product in products:
            operand = operands[product]
            if isinstance(operand, Operand):
                calls[product] = operand.calls(x, "")
        repeat = calls_per_graph(m, shape.n, shape.k)
        found = settled_or_reasons(calls, options.device, m, replays=options.replays, min_calls=repeat)
        dense_time = found[DENSE]
        if isinstance(dense_time, str):
            raise BenchError(f"the dense product of {shape.label} failed for {m} tokens: {dense_time}")
        for product in products:
            operand = operands[product]
            timed = operand if isinstance(operand, str) else found[product]
            measured, burst_us = (None, None) if isinstance(timed, str) else timed
            yield (
                product,
                GemmRow.of(
                    product,
                    shape,
                    m,
                    options.dtype,
                    kernel=AUTO,
                    ran=AUTO if measured is None else product.ran(shape, m, options.dtype, arch),
                    us=measured,
                    dense_us=dense_time.us,
                    nbytes=operand.nbytes if isinstance(operand, Operand) else 0,
                    note=timed if isinstance(timed, str) else "",
                    burst_us=burst_us,
                    dense_burst_us=dense_time.burst_us,
                ),
            )


def calls_per_graph(m: int, n: int, k: int) -> int:
    """Return how many calls fill half a millisecond of a large GPU (700 TFLOPS, 4 TB/s), from 1 to 16.

    Short calls are repeated for the clock's resolution; a call of milliseconds needs no repetition and the sweep's time.
    """
    us = max(2 * m * n * k / 700e6, 2 * n * k / 4e6)
    return max(1, min(16, math.ceil(500 / us)))


def largest_violation(times: Mapping[int, float], last: int = MONOTONE_UP_TO) -> Violation:
    """Return where time drops most as M grows, over all pairs of M up to ``last``.

    Args:
        times: Microseconds by M.
        last: Larger M are left out.

    Raises:
        SpecError: If no M is up to ``last``.
    """
    ms = sorted(m for m in times if m <= last)
    if not ms:
        raise SpecError(f"no time of at most {last} tokens")
    slow = ms[0]
    worst = Violation(0.0, slow, slow)
    for m in ms:
        if times[m] > times[slow]:
            slow = m
        excess = times[slow] / times[m] - 1
        if excess > worst.excess:
            worst = Violation(excess, slow, m)
    return worst


def summarize(rows: Iterable[Mapping[str, Any]]) -> tuple[SweepSummary, ...]:
    """Return a summary of each weight and product, in the order of their first rows; of a repeated point the last counts."""
    groups: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["op"], row["n"], row["k"], row["dtype"], row["group_size"])
        groups.setdefault(key, {})[row["m"]] = row
    return tuple(_summary(by_m) for by_m in groups.values())


def _summary(by_m: Mapping[int, Mapping[str, Any]]) -> SweepSummary:
    measured = {m: row for m, row in by_m.items() if row["us"]}
    first = next(iter(by_m.values()))
    least = min(measured.values(), key=lambda row: row["speedup"], default=None)
    bursts = [row for row in measured.values() if row.get("burst_speedup")]
    least_burst = min(bursts, key=lambda row: row["burst_speedup"], default=None)
    times = {m: row["us"] for m, row in measured.items() if m <= MONOTONE_UP_TO}
    violation = largest_violation(times) if times else None
    return SweepSummary(
        op=first["op"],
        shape=first["shape"],
        n=first["n"],
        k=first["k"],
        dtype=first["dtype"],
        group_size=first["group_size"],
        points=len(measured),
        failed=len(by_m) - len(measured),
        min_speedup=least["speedup"] if least else None,
        min_m=least["m"] if least else None,
        min_ran=least["ran"] if least else "",
        excess=violation.excess if violation else None,
        slow_m=violation.slow_m if violation else None,
        fast_m=violation.fast_m if violation else None,
        min_burst_speedup=least_burst["burst_speedup"] if least_burst else None,
        min_burst_m=least_burst["m"] if least_burst else None,
    )


def point_of(row: Mapping[str, Any]) -> Point:
    """Return which point a recorded row measured."""
    return row["op"], row["n"], row["k"], row["m"], row["dtype"], row["group_size"]


def known_points(records: Iterable[Record], here: Mapping[str, Any]) -> dict[Point, dict[str, Any]]:
    """Return the measured rows of earlier sweeps that ``here`` need not measure again.

    Args:
        records: Of any benchmarks.
        here: This environment; records of another GPU or another commit are measured again.

    Raises:
        FormatError: If a row of a sweep lacks what such rows have, or has anything else for it.
    """
    found: dict[Point, dict[str, Any]] = {}
    for record in records:
        if record.bench == "sweep" and all(record.environment.get(key) == here[key] for key in ("gpu", "git")):
            check_keys(record.rows, _ROW_KEYS, "the sweep to resume")
            check_points(record.rows, "the sweep to resume")
            found |= {point_of(row): dict(row) for row in record.rows if row["us"]}
    return found


def _key(product: Product, shape: Shape, m: int, options: SweepOptions) -> Point:
    name = str(options.dtype).removeprefix("torch.")
    return product.op, shape.n, shape.k, m, name, product.group(shape)


def _missing(shape: Shape, m: int, options: SweepOptions) -> list[Product]:
    return [product for product in options.products if _key(product, shape, m, options) not in options.done]

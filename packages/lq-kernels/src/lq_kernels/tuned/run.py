"""What a run of the tuner measures, the most important first, and how its results become a table."""

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

from lq_formats import DeviceError, SpecError

from lq_kernels.prepare import Unit
from lq_kernels.tuned.kernels import TUNABLES, config_of, weight
from lq_kernels.tuned.lookup import source_digests
from lq_kernels.tuned.search import CANDIDATES, Failed, Found, Timer, proposals, search
from lq_kernels.tuned.shapes import MODELS, Shape, linear_shapes
from lq_kernels.tuned.table import Q8_1, Cut, Point, Stamp, Table, Weight, read, write

Q8_1_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
A8_TOKENS = tuple(m for m in TOKENS if m >= 16)
SHAPES: tuple[Shape, ...] = (
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (8192, 8192),
    (2048, 2048),
    (2048, 8192),
    (8192, 2048),
    (6144, 4096),
    (28672, 4096),
    (1024, 4096),
)
"""What the shipped tables hold first: out features, in features."""

Task = tuple[Weight, int]
"""A weight and a number of tokens."""


def device_preset() -> list[Task]:
    """Return the tasks of a table that ships: int4 in groups of 128, int8, other groups and zeros, 8-bit tokens, models.

    Of a weight many tokens come first: what is fastest for them is tried with fewer.
    """
    main = SHAPES[:4]
    groups: list[tuple[Sequence[Shape], Sequence[int], dict[str, object]]] = [
        (SHAPES, TOKENS, {"bits": 4, "group_size": 128}),
        (SHAPES, TOKENS, {"bits": 8, "group_size": -1}),
        (main, TOKENS, {"bits": 4, "group_size": 128, "symmetric": False}),
        (main, TOKENS, {"bits": 4, "group_size": 64}),
        (main, TOKENS, {"bits": 4, "group_size": 32}),
        (main, TOKENS, {"bits": 4, "group_size": 32, "symmetric": False}),
        (main, TOKENS, {"bits": 4, "group_size": -1}),
        (main, A8_TOKENS, {"bits": 8, "group_size": -1, "activation": "int8"}),
        (main, A8_TOKENS, {"bits": 8, "group_size": -1, "activation": "fp8"}),
        (main, A8_TOKENS, {"bits": 4, "group_size": 128, "activation": "fp8"}),
        (main, A8_TOKENS, {"bits": 4, "group_size": 128, "activation": "int8"}),
        (main, Q8_1_TOKENS, {"bits": 4, "group_size": 32, "activation": Q8_1}),
    ]
    models = tuple(dict.fromkeys(shape for model in MODELS.values() for shape in linear_shapes(model)))
    rest = tuple(shape for shape in models if shape not in SHAPES)
    groups += [(rest, TOKENS, {"bits": 4, "group_size": 128}), (rest, TOKENS, {"bits": 8, "group_size": -1})]
    groups += [
        (SHAPES, (8192,), {"bits": 4, "group_size": 128}),
        (SHAPES, (3, 6, 12, 24, 48), {"bits": 4, "group_size": 128}),
    ]
    tasks = [
        (weight(n=n, k=k, **form), m)  # type: ignore[arg-type]
        for shapes, ms, form in groups
        for n, k in shapes
        for m in sorted(ms, reverse=True)
    ]
    return list(dict.fromkeys(tasks))


def requested(
    shapes: Collection[Shape],
    ms: Sequence[int],
    *,
    bits: Sequence[int] = (4,),
    group_sizes: Sequence[int] = (128,),
    symmetric: Sequence[bool] = (True,),
    activations: Sequence[str] = ("",),
) -> tuple[list[Task], list[str]]:
    """Return the tasks of these shapes in all these forms, one form after the other, and why some have none.

    Raises:
        SpecError: If none of them has a kernel.
    """
    weights, skipped = [], []
    for b, a, sym, g in itertools.product(bits, activations, symmetric, group_sizes):
        for n, k in shapes:
            try:
                weights.append(weight(b, g, n, k, symmetric=sym, activation=a))
            except SpecError as error:
                skipped.append(str(error))
    if not weights:
        raise SpecError(skipped[0] if skipped else "there is no shape to tune")
    return [(each, m) for each in dict.fromkeys(weights) for m in sorted(set(ms), reverse=True)], list(
        dict.fromkeys(skipped)
    )


def without_measured(tasks: Iterable[Task], table: Table, sm_count: int) -> list[Task]:
    """Return the tasks of which some kernel that can run them has not been measured."""
    return [task for task in tasks if unmeasured(task, table, sm_count)]


def unmeasured(task: Task, table: Table, sm_count: int) -> tuple[str, ...]:
    """Return the kernels that can run a task and have not been measured."""
    each, m = task
    return tuple(
        kernel
        for kernel, tunable in TUNABLES.items()
        if tunable.useful(each, m)
        and all(point.m != m for point in table.points.get((kernel, each), ()))
        and tunable.ranked(each, m, sm_count)
    )


def compilations(
    tasks: Iterable[Task],
    sm_count: int,
    candidates: int = CANDIDATES,
    kernels: Callable[[Task], Iterable[str]] = lambda task: TUNABLES,
) -> list[Unit]:
    """Return what the cuts of the tasks compile, with these kernels of each, in the order in which they are needed."""
    found = (
        unit
        for task in tasks
        for _, _, unit in proposals(*task, sm_count, candidates=candidates, kernels=kernels(task))
    )
    return list(dict.fromkeys(found))


def opened(path: Path, device: str, sm_count: int) -> Table:
    """Return the table in ``path`` that a run adds to, or a new one; without cuts of other sources, or of other candidates.

    Raises:
        FormatError: If the file is not a table.
        DeviceError: If it was measured on another GPU.
    """
    if not path.exists():
        return Table(Stamp(device, sm_count))
    table = read(path)
    if (table.stamp.device, table.stamp.sm_count) != (device, sm_count):
        raise DeviceError(
            f"{path.name} was measured on {table.stamp.device} ({table.stamp.sm_count} multiprocessors), this is "
            f"{device} ({sm_count}); write to another file"
        )
    fresh = table.without_stale(source_digests())
    own = {
        (kernel, each): tuple(point for point in points if _is_own(kernel, each, point, sm_count))
        for (kernel, each), points in fresh.points.items()
    }
    return replace(fresh, points={key: points for key, points in own.items() if points})


@functools.lru_cache(maxsize=1 << 16)  # a run reads its file again at each save, and thousands of points take seconds
def _is_own(kernel: str, each: Weight, point: Point, sm_count: int) -> bool:
    with contextlib.suppress(SpecError):
        config_of(kernel, each, point.m, sm_count, point.cut)
        return True
    return False


def stamp(device: str, sm_count: int, torch: str, driver: str) -> Stamp:
    """Return the stamp of what is measured now."""
    from lq_kernels.jit.launcher import release

    return Stamp(device, sm_count, release(), torch, driver, date.today().isoformat())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs that save in a folder waiting, where the system and the file system have such locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # then two runs must not save in the same milliseconds
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@dataclass
class Run:
    """A run of the tuner, which measures tasks one by one and keeps the file up to date.

    Several may have one file: what others saved meanwhile is kept.

    Attributes:
        table: What has been measured, this time and before; and by other runs, as of the last save.
        path: Where it is written, after each weight and at the end.
        stamp: Where and when.
        timer: Times cuts.
        candidates: Cuts of each kernel that are timed.
        again: Whether kernels that were measured before are measured too.
        failures: What failed, with its weight and tokens.
    """

    table: Table
    path: Path
    stamp: Stamp
    timer: Timer
    candidates: int = CANDIDATES
    again: bool = False
    failures: list[tuple[Weight, int, Failed]] = field(default_factory=list)
    _own: dict[tuple[str, Weight, int], Point] = field(default_factory=dict, init=False, repr=False)

    def kernels(self, task: Task) -> tuple[str, ...]:
        """Return the kernels of a task that are measured."""
        return tuple(TUNABLES) if self.again else unmeasured(task, self.table, self.stamp.sm_count)

    def measure(
        self, tasks: Sequence[Task], deadline: float, now: Callable[[], float] = time.monotonic
    ) -> Iterator[tuple[int, Task, list[Found]]]:
        """Measure tasks until ``now()`` passes the deadline; yield how many are done, which it was and what was found.

        Raises:
            SpecError: If the file cannot be written; :func:`~lq_kernels.tuned.table.check_target` says so before.
            FormatError, DeviceError: If something that is no table, or another GPU's, has taken its place meanwhile.
        """
        digests, last = source_digests(), None
        try:
            for done, (each, m) in enumerate(tasks, 1):
                if now() > deadline:
                    break
                if last is not None and last != each:
                    self._save()
                last = each
                kernels = self.kernels((each, m))
                found, failed = search(
                    each,
                    m,
                    self.timer,
                    self.stamp.sm_count,
                    candidates=self.candidates,
                    kernels=kernels,
                    known={kernel: self._near(kernel, each, m) for kernel in kernels},
                )
                self.failures += [(each, m, failure) for failure in failed]
                for one in found:
                    self.table = self.table.merged(self.stamp, one.kernel, digests[one.kernel], each, one.point)
                    self._own[one.kernel, each, m] = one.point
                yield done, (each, m), found
        finally:
            if self.table.points:
                self._save()

    def _save(self) -> None:
        digests = source_digests()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.parent):
                table = opened(self.path, self.stamp.device, self.stamp.sm_count)
                for (kernel, each, _), point in self._own.items():
                    table = table.merged(self.stamp, kernel, digests[kernel], each, point)
                write(table, self.path)
            self.table = table
        except OSError as error:
            raise SpecError(
                f"cannot write {str(self.path)!r}: {error.strerror or error}; give another file with --output"
            ) from error

    def _near(self, kernel: str, each: Weight, m: int) -> list[Cut]:
        """Return the cuts of the next numbers of tokens: two that are larger, and one that is smaller."""
        points = self.table.points.get((kernel, each), ())
        larger, smaller = [p.cut for p in points if p.m > m], [p.cut for p in points if p.m < m]
        return larger[:2] + smaller[-1:]

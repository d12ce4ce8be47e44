"""Find what was measured for a product on a GPU: in the user's table first, then in the one that ships for its class.

Nothing is read at import; a file is read when a kernel of its GPU is first chosen. A kernel asks with :func:`choose` for one
of its own cuts, so that a table cannot make it run another.
"""

import functools
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from lq_kernels import env
from lq_kernels.tuned.table import SOURCES, Cut, Point, Table, Weight, read

_C = TypeVar("_C")

SHIPPED_FOLDER = Path(__file__).parent
_CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"\bH200\b", ("h200",)),
    (r"\b(H100|H800|GH200)\b", ("h100", "h200")),
)
"""Patterns of device names, and the tables that ship for them; the times of another class's table are not used."""


@dataclass(frozen=True)
class Measured:
    """A point of a table.

    Attributes:
        point: Its tokens, cut and time; the tokens may be almost twice those that were asked for.
        table: Name of the file.
        timed: Whether the time holds for this GPU; a table of another class gives cuts alone.
    """

    point: Point
    table: str
    timed: bool


@dataclass(frozen=True)
class Choice(Generic[_C]):
    """The cut that a kernel takes.

    Attributes:
        config: Its configuration.
        measured: Where it was measured; None if the cost model chose it.
        near: Where another cut was measured at more tokens, whose time tells how far the model is off.
    """

    config: _C
    measured: Measured | None
    near: Measured | None = None


def choose(
    cuts: Iterable[_C], cost: Callable[[_C], float], same: tuple[str, ...], found: Iterable[Measured]
) -> Choice[_C] | None:
    """Return the cut of the first measurement that is among a kernel's cuts, else the cheapest.

    Args:
        cuts: Every configuration that the kernel takes for this product.
        cost: The kernel's model.
        same: Fields by which a cut is found again at another number of tokens; of several, the one nearest in all fields.
        found: What :func:`measurements` yields.
    """
    known, points = list(cuts), list(found)
    for each in points:
        found_again = alike(each.point.cut, known, same)
        if found_again is not None:
            return Choice(found_again, each)
    return Choice(min(known, key=cost), None, next(iter(points), None)) if known else None


def alike(cut: Cut, configs: Iterable[_C], same: tuple[str, ...]) -> _C | None:
    """Return which of a kernel's configurations is what ``cut`` was at another number of tokens, or None.

    Args:
        cut: Fields of a configuration, as tables hold them.
        configs: Configurations for the number of tokens that is asked for.
        same: Fields that must be the same; of several that have them, the one nearest in all fields.
    """
    wanted = dict(cut)
    found = (config for config in configs if all(int(getattr(config, name)) == wanted.get(name, -1) for name in same))
    return min(found, key=lambda config: _distance(config, wanted), default=None)


def _distance(config: object, wanted: dict[str, int]) -> int:
    return sum(abs(int(getattr(config, name, 0)) - value) for name, value in wanted.items())


def measurements(kernel: str, m: int, weight: Weight, device: str, sm_count: int) -> Iterator[Measured]:
    """Yield what the tables of a GPU hold for a kernel and ``m`` tokens, the user's table first.

    A point serves the numbers of tokens below it too, down to the next point, while they are more than half as many:
    tiles are counted up.
    """
    for table, name, timed in tables(device, sm_count):
        points = table.points.get((kernel, weight), ())
        point = next((point for point in points if point.m >= m), None)
        if point is not None and point.covers(m):
            yield Measured(point, name, timed)


@functools.lru_cache(maxsize=64)
def tables(device: str, sm_count: int) -> tuple[tuple[Table, str, bool], ...]:
    """Return the tables that hold for a GPU, with their names and whether their times do.

    Args:
        device: Name as the driver reports it.
        sm_count: Multiprocessors; cuts that were measured with another number are of no use.

    Raises:
        FormatError: If a file is not a table.
    """
    return _loaded(device, sm_count) if device else ()


def _loaded(device: str, sm_count: int) -> tuple[tuple[Table, str, bool], ...]:
    found: list[tuple[Table, str, bool]] = []
    user = _users(device)
    if user is not None:
        table = _fresh(read(user), user.name)
        if (table.stamp.device, table.stamp.sm_count) == (device, sm_count):
            found.append((table, user.name, True))
        else:
            warnings.warn(
                f"{user.name} was measured on {table.stamp.device} with {table.stamp.sm_count} multiprocessors, not on "
                f"this {device} with {sm_count}, and is not used; run `lq-kernels tune` here",
                stacklevel=2,
            )
    for position, name in enumerate(shipped(device)):
        path = SHIPPED_FOLDER / f"{name}.json"
        if path.is_file():
            table = _fresh(read(path), path.name)
            if table.stamp.sm_count == sm_count:
                found.append((table, path.name, position == 0))
    return tuple(found)


def _users(device: str) -> Path | None:
    """Return where the user's table of a device is; None if there is none, or, with a warning, if that cannot be told."""
    if env.usable_cache_dir() is None:
        return None
    path = user_path(device)
    try:
        return path if stat.S_ISREG(path.stat().st_mode) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        warnings.warn(
            f"tables of `lq-kernels tune` cannot be looked for in {path.parent} ({error.strerror or error}) and are not "
            "used. Set LQ_CACHE_DIR to a folder that can be read, or LQ_DISABLE_CACHE=1",
            stacklevel=2,
        )
        return None


def shipped(device: str) -> tuple[str, ...]:
    """Return the names of the shipped tables that serve a device, its own class first."""
    return next((names for pattern, names in _CLASSES if re.search(pattern, device)), ())


def user_path(device: str) -> Path:
    """Return where the user's table of a device is, or would be.

    Raises:
        SpecError: If the cache is below a home directory that cannot be found.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")[:80]
    return env.cache_dir() / "tuned" / f"{slug}.json"


@functools.cache
def source_digests() -> dict[str, str]:
    """Return a digest of the CUDA source of every kernel that can be in a table, comments and blanks apart."""
    read = functools.cache(_code)  # they share headers
    return {kernel: _digest(name, read) for kernel, name in SOURCES.items()}


def _code(path: Path) -> tuple[bytes, list[Path]]:
    """Return a source without comments and superfluous blanks, and what it includes."""
    from lq_kernels.jit.compiler import INCLUDE_FOLDER

    text = path.read_text(encoding="utf-8")
    code = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))
    included = [INCLUDE_FOLDER / each for each in re.findall(r'#include\s+"(lq/[^"]+)"', text)]
    return " ".join(code.split()).encode(), included


def _digest(name: str, read: Callable[[Path], tuple[bytes, list[Path]]] = _code) -> str:
    import hashlib

    from lq_kernels.jit.compiler import SOURCE_FOLDER

    digest, seen, waiting = hashlib.sha256(), set(), [SOURCE_FOLDER / f"{name}.cu"]
    while waiting:
        path = waiting.pop(0)
        if path in seen:
            continue
        seen.add(path)
        code, included = read(path)
        waiting += included
        digest.update(code + b"\0")
    return digest.hexdigest()[:16]


def _fresh(table: Table, name: str) -> Table:
    fresh = table.without_stale(source_digests())
    stale = sorted(set(table.sources) - set(fresh.sources))
    if stale:
        warnings.warn(
            f"{name} was measured with other sources of {', '.join(stale)} than these, whose cuts lq's cost model chooses "
            "now; run `lq-kernels tune` to measure them again",
            stacklevel=2,
        )
    return fresh


def forget() -> None:
    """Read tables anew when they are next needed, and choose anew; for tests, and after tuning in this process."""
    tables.cache_clear()
    for module in ("cuda.decode_a16", "cuda.prefill_a16", "cuda.linear_a8", "registry", "eager"):
        loaded = sys.modules.get(f"lq_kernels.{module}")
        for name in ("choice", "_prepare", "_prepare_q8_1", "select", "_selected"):
            clear = getattr(getattr(loaded, name, None), "cache_clear", None)
            if clear is not None:
                clear()

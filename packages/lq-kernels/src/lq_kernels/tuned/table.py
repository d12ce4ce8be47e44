"""A tuning table: for weights and numbers of tokens, the fastest cut of each kernel and its measured time.

The file is JSON (UTF-8), one weight and kernel a line::

    {"format": "lq-tuned", "version": 1,
     "stamp": {"device": "NVIDIA H200", "sm_count": 132, "package": "0.1.0", "torch": ..., "driver": ..., "date": ...},
     "sources": {"decode_a16": <digest of the CUDA source that was measured>, ...},
     "entries": [
      {"kernel": "decode_a16", "bits": 4, "groups": 1, "zero": false, "scale_bytes": 32, "activation": "",
       "n": 4096, "k": 4096, "m": [1, 2, 4], "us": [5.2, 5.3, 5.3], "cut": {"cluster": [1, 1, 2], ...}}, ...]}

A table can make lq slower, never wrong: what runs is one of the kernel's own candidates, found by the cut's fields. Files are
untrusted: their size, and every value, is checked before it is used.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from lq_formats import FormatError, SpecError
from lq_formats.errors import UnknownVersionError
from lq_formats.folders import why_not_place

FORMAT, VERSION = "lq-tuned", 1
SOURCES: Mapping[str, str] = {
    "decode_a16": "decode_a16",
    "prefill_a16": "prefill_a16",
    "linear_a8": "linear_a8",
    "dequant_blas": "dequantize_fragment",
}
"""Kernels that can be in a table, and the CUDA source that each of them runs."""

Q8_1 = "q8_1"
"""What activations are where they are quantized like Q8_1 blocks, right before the product or in it: ggml's Q4_0 x Q8_1."""

MAX_BYTES = 8 << 20
MAX_ENTRIES = 20_000
MAX_POINTS = 1024
_MAX_SIZE = 1 << 31
_MAX_US = 1e8
_MAX_TEXT = 200

Cut: TypeAlias = tuple[tuple[str, int], ...]
"""A cut's fields by name, sorted; booleans as 0 and 1."""


@dataclass(frozen=True)
class Weight:
    """What a cut depends on besides the tokens.

    Attributes:
        bits: 4 or 8.
        groups: Groups in a K step (512 / bits in features): 1 (also for longer groups), 2, 4 and so on; 0 for one scale a row.
        zero: Whether there are zero points, or minima.
        scale_bytes: Bytes of scales and zeros beside the codes of 16 rows and a K step.
        activation: What tokens are quantized to, ``"int8"`` or ``"fp8"``; ``"q8_1"`` where they are quantized
            like Q8_1 blocks, which the time includes; empty where they are not.
        n: Out features, rounded up to blocks of 16.
        k: In features.
    """

    bits: int
    groups: int
    zero: bool
    scale_bytes: int
    activation: str
    n: int
    k: int

    def __post_init__(self) -> None:
        sizes = (self.n, self.k, self.scale_bytes)
        if (
            any(type(value) is not int for value in (self.bits, self.groups, *sizes))
            or type(self.zero) is not bool
            or self.bits not in (4, 8)
            or self.groups not in (0, 1, 2, 4, 8, 16)
            or self.activation not in ("", "int8", "fp8", Q8_1)
            or not (0 < self.n < _MAX_SIZE and 0 < self.k < _MAX_SIZE and 0 <= self.scale_bytes <= 4096)
            or self.n % 16
        ):
            raise SpecError(f"{asdict(self)} is no weight that lq tunes")

    def __str__(self) -> str:
        size = f"g{512 // self.bits // self.groups}" if self.groups else "row"
        rest = [self.activation] if self.activation else []
        return "-".join([f"int{self.bits}", size, *rest, "asym" if self.zero else "sym", f"{self.n}x{self.k}"])


_WEIGHT = tuple(each.name for each in fields(Weight))


@dataclass(frozen=True)
class Point:
    """The fastest cut at so many tokens.

    Attributes:
        m: Tokens.
        us: Measured microseconds, weights from memory.
        cut: Of the kernel's configuration; empty for a kernel that has none.
    """

    m: int
    us: float
    cut: Cut = ()

    def covers(self, m: int) -> bool:
        """Return whether a table uses this point for ``m`` tokens: more than half as many, and no more than it has."""
        return self.m < 2 * m <= 2 * self.m


@dataclass(frozen=True)
class Stamp:
    """Where, when and with what a table was measured; only the first two decide whether it is used."""

    device: str
    sm_count: int
    package: str = ""
    torch: str = ""
    driver: str = ""
    date: str = ""


@dataclass(frozen=True)
class Table:
    """Measured cuts of one GPU.

    Attributes:
        stamp: Where they were measured.
        sources: Digest of the measured CUDA source, by kernel.
        points: By kernel and weight, in ascending order of tokens.
    """

    stamp: Stamp
    sources: Mapping[str, str] = field(default_factory=dict)
    points: Mapping[tuple[str, Weight], tuple[Point, ...]] = field(default_factory=dict)

    def without_stale(self, sources: Mapping[str, str]) -> "Table":
        """Return the table without the kernels whose digest is not that of ``sources``."""
        fresh = {kernel for kernel, digest in self.sources.items() if sources.get(kernel) == digest}
        if len(fresh) == len(self.sources):
            return self  # its points are not looked at
        points = {key: found for key, found in self.points.items() if key[0] in fresh}
        return Table(self.stamp, {kernel: self.sources[kernel] for kernel in sorted(fresh)}, points)

    def merged(self, stamp: Stamp, kernel: str, digest: str, weight: Weight, point: Point) -> "Table":
        """Return the table with one more point, in place of an older one for as many tokens, or of cuts with other fields."""
        names = dict(point.cut).keys()
        old = (old for old in self.points.get((kernel, weight), ()) if dict(old.cut).keys() == names)
        kept = {each.m: each for each in old} | {point.m: point}
        points = {**self.points, (kernel, weight): tuple(kept[m] for m in sorted(kept))}
        return Table(stamp, {**self.sources, kernel: digest}, points)


_Columns: TypeAlias = tuple[list[int], list[float], dict[str, list[int]]]
"""Tokens, microseconds and the values of each field of a cut, all as long."""


class _Points(Mapping[tuple[str, Weight], tuple[Point, ...]]):
    """The points of a file, made when a weight is looked up: there are thousands, and a process needs few weights'.

    Objects that nobody asks for take longer than the rest of reading a table, and enough of them that Python looks for garbage.
    """

    def __init__(self, columns: Mapping[tuple[str, Weight], _Columns]) -> None:
        self._columns = columns
        self._made: dict[tuple[str, Weight], tuple[Point, ...]] = {}

    def __getitem__(self, key: tuple[str, Weight]) -> tuple[Point, ...]:
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = _made(*self._columns[key])
        return made

    def __iter__(self) -> Iterator[tuple[str, Weight]]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def _made(ms: list[int], times: list[float], cut: dict[str, list[int]]) -> tuple[Point, ...]:
    names = sorted(cut)
    rows = zip(*(cut[name] for name in names), strict=True) if names else [()] * len(ms)
    cuts = (tuple(zip(names, row, strict=True)) for row in rows)
    return tuple(Point(m, float(us), each) for m, us, each in zip(ms, times, cuts, strict=True))


def cut_of(config: Any) -> Cut:
    """Return the fields of a kernel's configuration, a dataclass of integers and booleans; not those marked as not tuned."""
    tuned = [each.name for each in fields(config) if each.metadata.get("tuned", True)]
    return tuple(sorted((name, int(getattr(config, name))) for name in tuned))


def read(path: Path) -> Table:
    """Read a table.

    Raises:
        FormatError: If the file is not a table, with its name and how to get rid of it.
        UnknownVersionError: If another release of lq wrote it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        return parse(data)
    except (FormatError, OSError) as error:
        kind = type(error) if isinstance(error, FormatError) else FormatError
        raise kind(
            f"{path.name} is not a tuning table that lq can use: {error}; delete the file (lq then chooses by its cost "
            "model) or write it anew with `lq-kernels tune`. A user's tables are in the folder 'tuned' of lq's cache "
            "(LQ_CACHE_DIR)"
        ) from None


def write(table: Table, path: Path) -> None:
    """Write a table in one step: readers see the old file or the new one."""
    text = dump(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".lq-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def check_target(path: Path) -> None:
    """Raise SpecError unless :func:`write` can write a table at ``path``: before a measurement, not after it.

    Nothing is created. Folders that are missing are no reason; the first one that is there decides.
    """
    if reason := why_not_place(path):
        raise SpecError(f"cannot write {str(path)!r}: {reason}; give another file with --output")


def dump(table: Table) -> str:
    """Return a table as the text of its file."""
    lines = []
    for (kernel, weight), points in sorted(
        table.points.items(), key=lambda item: (item[0][0], *asdict(item[0][1]).values())
    ):
        names = [name for name, _ in points[0].cut]
        cut = {name: [dict(point.cut)[name] for point in points] for name in names}
        entry = {"kernel": kernel, **asdict(weight), "m": [point.m for point in points]}
        lines.append(json.dumps({**entry, "us": [round(point.us, 3) for point in points], "cut": cut}))
    head = {
        "format": FORMAT,
        "version": VERSION,
        "stamp": asdict(table.stamp),
        "sources": dict(sorted(table.sources.items())),
    }
    return json.dumps(head, indent=1)[:-2] + ',\n "entries": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def parse(data: bytes) -> Table:
    """Return the table of a file's bytes.

    Raises:
        FormatError: If it is none.
        UnknownVersionError: If another release of lq wrote it.
    """
    if len(data) > MAX_BYTES:
        _refuse(f"it has more than {MAX_BYTES} bytes")
    try:
        found = json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        _refuse(f"no JSON ({error})")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        _refuse(f"no object with the format {FORMAT!r}")
    if found.get("version") != VERSION:
        raise UnknownVersionError(f"version {str(found.get('version'))[:20]!r}, this release reads {VERSION}")
    _keys(found, "format", "version", "stamp", "sources", "entries")
    sources, entries = found["sources"], found["entries"]
    if not isinstance(sources, dict) or not all(_is_text(value) for value in sources.values()):
        _refuse("'sources' holds something else than digests")
    if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
        _refuse(f"'entries' is not a list of at most {MAX_ENTRIES}")
    columns: dict[tuple[str, Weight], _Columns] = {}
    for entry in entries:
        key, value = _entry(entry)
        if key in columns:
            _refuse(f"{key[0]} for {key[1]} is there twice")
        if key[0] not in sources:
            _refuse(f"{key[0]} has no digest")
        columns[key] = value
    return Table(_stamp(found["stamp"]), dict(sources), _Points(columns))


def _stamp(found: Any) -> Stamp:
    names = [each.name for each in fields(Stamp)]
    _keys(found, *names)
    texts = [found[name] for name in names if name != "sm_count"]
    if not all(_is_text(text) for text in texts) or not _are_integers([found["sm_count"]], 1):
        _refuse("the stamp holds something else than names and a number of multiprocessors")
    return Stamp(**found)


def _entry(found: Any) -> tuple[tuple[str, Weight], _Columns]:
    _keys(found, "kernel", *_WEIGHT, "m", "us", "cut")
    if not _is_text(found["kernel"]) or found["kernel"] not in SOURCES:
        _refuse(f"no kernel is called {str(found['kernel'])[:40]!r}")
    try:
        weight = Weight(**{name: found[name] for name in _WEIGHT})
    except (SpecError, TypeError, RecursionError):
        _refuse("an entry's weight is none")
    ms, times, cut = found["m"], found["us"], found["cut"]
    if not isinstance(ms, list) or not 0 < len(ms) <= MAX_POINTS or not _are_integers(ms, 1):
        _refuse(f"'m' of {weight} is not a list of 1 to {MAX_POINTS} sizes")
    if ms != sorted(set(ms)):
        _refuse(f"'m' of {weight} does not ascend")
    if not isinstance(times, list) or len(times) != len(ms) or not all(map(_is_time, times)):
        _refuse(f"'us' of {weight} is not a list of as many times as 'm'")
    if not isinstance(cut, dict) or len(cut) > 32 or not all(map(_is_text, cut)):
        _refuse(f"'cut' of {weight} is not an object")
    for name, values in cut.items():
        if not isinstance(values, list) or len(values) != len(ms) or not _are_integers(values, 0):
            _refuse(f"{name!r} of {weight} is not a list of as many integers as 'm'")
    return (found["kernel"], weight), (ms, times, cut)


def _keys(found: Any, *names: str) -> None:
    if not isinstance(found, dict) or set(found) != set(names):
        _refuse(f"an object without exactly the keys {', '.join(names)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _are_integers(values: list[Any], least: int) -> bool:
    return set(map(type, values)) == {int} and least <= min(values) and max(values) < _MAX_SIZE


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < _MAX_US


def _refuse(what: str) -> NoReturn:
    raise FormatError(what)

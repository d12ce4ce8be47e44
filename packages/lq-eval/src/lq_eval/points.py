"""Points among the rows of records: what a sweep goes on from and a figure draws, checked, since records are files."""

import reprlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from lq_formats import FormatError

from lq_eval.results import check_keys

_SIZES = ("n", "k", "m")
_VALUES = ("speedup", "us", "total_us", "dense_us")
_TEXTS = ("op", "shape", "dtype", "kernel")
_LARGEST_SIZE = 2**63 - 1


def speedup(row: Mapping[str, Any]) -> float | None:
    """Return how many times as long the dense product takes."""
    return row.get("speedup")


def microseconds(row: Mapping[str, Any]) -> float | None:
    """Return the time of a row; of the steps of Q4_0 x Q8_1, that of all of them."""
    return row.get("us") or row.get("total_us")


def check_points(rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """Raise FormatError, which begins with ``where``, unless rows with a time or a speedup say for which product it is."""
    measured = [row for row in rows if speedup(row) or microseconds(row)]
    check_keys(measured, _SIZES, where)
    for row in measured:
        for key in _SIZES:
            if type(row[key]) is not int or not 1 <= row[key] <= _LARGEST_SIZE:
                raise FormatError(
                    f"{where}: a row with {key}={reprlib.repr(row[key])}; expected a positive integer of at most 63 bits"
                )
        for key in _VALUES:
            value = row.get(key)
            if value is not None and not _is_time(value):
                raise FormatError(f"{where}: a row with {key}={reprlib.repr(value)}; expected a number, 0 or above")
        group = row.get("group_size", 0)
        if group is not None and type(group) is not int:
            raise FormatError(f"{where}: a row with group_size={reprlib.repr(group)}; expected an integer")
        for key in _TEXTS:
            if not isinstance(row.get(key, ""), str | None):
                raise FormatError(f"{where}: a row with {key}={reprlib.repr(row[key])}; expected a text")


def _is_time(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= sys.float_info.max

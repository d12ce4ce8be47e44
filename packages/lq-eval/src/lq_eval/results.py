"""Machine-readable results: JSON lines, each of which says where and with what it was measured.

One line is one record: ``{"bench": name, "environment": {...}, "rows": [{...}, ...]}``. A benchmark appends a line as
soon as it has a result, so that a run that is cut short leaves what it measured.
"""

import functools
import importlib.metadata
import json
import math
import os
import platform
import reprlib
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lq_formats import FormatError, SpecError
from lq_formats.folders import why_not_place

from lq_eval import env

PACKAGES = ("lq-formats", "lq-kernels", "lq-torch", "lq-eval")
_KEYS = {"bench", "environment", "rows"}


@dataclass(frozen=True)
class Record:
    """One measurement or a table of them.

    Attributes:
        bench: Which benchmark wrote it, for example ``"gemm"``.
        environment: What :func:`environment` returned.
        rows: JSON objects.
    """

    bench: str
    environment: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def environment() -> Mapping[str, Any]:
    """Describe this machine and the versions in use (looked up once a process; the date is that of the first call)."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": gpu,
        "gpu_count": torch.cuda.device_count() if gpu else 0,
        "driver": driver_version() if gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "git": git_commit(),
        **{name: version(name) for name in PACKAGES},
    }


def driver_version() -> str | None:
    """Return the NVIDIA driver's version, or None where ``nvidia-smi`` does not say."""
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0].strip() if found else None


def git_commit() -> str | None:
    """Return the commit of the checkout that this file is in, ``-dirty`` if tracked files changed; None outside one.

    ``LQ_GIT_COMMIT`` (see :mod:`lq_eval.env`) takes precedence.
    """
    if named := env.git_commit():
        return named
    here = str(Path(__file__).parent)
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    changed = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit.strip()}-dirty" if changed else commit.strip()


def check_target(path: str | Path) -> None:
    """Raise SpecError unless a file can be written at ``path``: before a measurement, not after it. Nothing is created."""
    target = Path(path)
    try:
        reason = _why_not_write(target)
    except OSError as error:  # a name that is too long, or a folder that cannot be searched
        reason = error.strerror or str(error)
    if reason:
        raise SpecError(f"cannot write {str(target)!r}: {reason}; give another file")


def _why_not_write(target: Path) -> str:
    if target.exists() and not target.is_dir():
        return "" if os.access(target, os.W_OK) else "it may not be written"
    return why_not_place(target)


def append_record(path: str | Path, bench: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append one record to a JSONL file (its folder is created).

    Raises:
        SpecError: If the file cannot be written; :func:`check_target` says so before a measurement.
    """
    target = Path(path)
    record = {"bench": bench, "environment": dict(environment()), "rows": [_plain(row) for row in rows]}
    line = json.dumps(record, allow_nan=False) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise SpecError(f"cannot write {str(target)!r}: {error.strerror or error}; give another file") from error


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield the records of a JSONL file.

    Raises:
        FormatError: If a line is not such a record (its number is named).
        FileNotFoundError: If there is no such file.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse(line, f"{path}, line {number}")


def _parse(line: bytes, where: str) -> Record:
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8 ({error}); expected records that a benchmark wrote") from error
    except (ValueError, RecursionError) as error:  # also of a number of too many digits, or brackets nested too deep
        raise FormatError(f"{where}: not JSON ({error}); was the run cut short? delete that line") from error
    if not isinstance(data, dict) or set(data) != _KEYS:
        raise FormatError(f"{where}: expected an object with the keys {sorted(_KEYS)}")
    if not isinstance(data["environment"], dict) or not isinstance(data["rows"], list):
        raise FormatError(f"{where}: 'environment' must be an object and 'rows' a list")
    for number, row in enumerate(data["rows"], start=1):
        if not isinstance(row, dict):
            raise FormatError(f"{where}: row {number} is {reprlib.repr(row)}; expected an object")
    return Record(str(data["bench"]), data["environment"], data["rows"])


def check_keys(rows: Iterable[Mapping[str, Any]], keys: Collection[str], where: str) -> None:
    """Raise FormatError, which begins with ``where``, unless each of ``rows`` has all of ``keys``."""
    for row in rows:
        if missing := [key for key in keys if key not in row]:
            raise FormatError(
                f"{where}: a row lacks {', '.join(missing)}; it has {', '.join(map(str, row)) or 'nothing'}"
            )


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity; null says "not measured" to every reader."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None

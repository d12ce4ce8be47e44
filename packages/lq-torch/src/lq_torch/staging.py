"""Replace the files of a model's folder in such a way that no failure leaves a mix of two models.

New files are written to a folder within it and take their places when all are whole. One file, without which the folder is
refused, is removed before the first and put in place after the last. So whenever writing ends, the folder holds the old model,
the new one, or none.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lq_formats import SpecError
from lq_formats.folders import why_not_write

_PARTIAL = ".lq-partial"


@contextmanager
def replacing(folder: Path, last: str, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty folder for new files, which replace those in ``folder`` when the block ends without an error.

    Until then ``folder`` is as it was, so there has to be room for both. On an error the new files are removed; what a killed
    process has left there, the next one removes.

    Args:
        folder: Made if needed.
        last: Name of the file without which the folder is no model.
        stale: Patterns of the names of files that belong to an earlier model: those that are not replaced are removed, in this
            order and before any file is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / _PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _publish(partial, folder, last, stale)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raise SpecError where there can be no folder, as something else is in its place, or it cannot be written."""
    if reason := why_not_write(folder):
        raise SpecError(f"cannot write to {folder}: {reason}; name another folder to write")


def refuse_holding(folder: Path, names: Sequence[str], what: str) -> None:
    """Raise SpecError if a folder to write to holds one of the files that make it ``what``."""
    for name in names:
        if (folder / name).exists():
            raise SpecError(
                f"{folder} holds {name}: it is {what}; name another folder to write, or delete that one first"
            )


def _publish(partial: Path, folder: Path, last: str, stale: Sequence[str]) -> None:
    names = sorted(path.name for path in partial.iterdir())
    for name in names:
        with (partial / name).open("rb+") as file:
            os.fsync(file.fileno())
    (folder / last).unlink(missing_ok=True)
    for pattern in stale:
        for path in folder.glob(pattern):
            if path.name not in names:
                path.unlink()
    for name in names:
        if name != last:
            (partial / name).replace(folder / name)
    (partial / last).replace(folder / last)

"""Every environment variable that lq reads: its name, type, default and meaning, in one place.

- ``LQ_CACHE_DIR`` (path; default ``$XDG_CACHE_HOME/lq`` or ``~/.cache/lq``): where compiled CUDA kernels are kept between
  processes, and the tables of ``lq-kernels tune``.
- ``LQ_DISABLE_CACHE`` (bool; default 0): 1 compiles in memory and neither reads nor writes the disk cache, tables included.
- ``LQ_REQUIRE_GPU`` (bool; default 0): read by the test suite only; 1 makes GPU tests fail instead of skip without a GPU.

Booleans are ``0`` or ``1``. Variables are read when they are needed, not at import.
"""

import os
import warnings
from pathlib import Path

from lq_formats import SpecError

_warned = False


def cache_dir() -> Path:
    """Return the folder of lq's disk cache (it may not exist yet).

    Raises:
        SpecError: If it is below a home directory that cannot be found.
    """
    chosen, base = os.environ.get("LQ_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(chosen) if chosen else Path(base or "~/.cache") / "lq"
    try:
        return folder.expanduser()
    except RuntimeError:
        raise SpecError(
            f"the folder of lq's cache is {str(folder)!r}, below a home directory that cannot be found; set LQ_CACHE_DIR "
            "to an absolute folder"
        ) from None


def usable_cache_dir() -> Path | None:
    """Return the folder of the disk cache, or None: it is switched off, or has no name, which costs a warning, once.

    Raises:
        SpecError: If ``LQ_DISABLE_CACHE`` is neither 0 nor 1.
    """
    global _warned
    if cache_disabled():
        return None
    try:
        return cache_dir()
    except SpecError as error:
        if not _warned:
            _warned = True
            warnings.warn(
                f"{error}, or LQ_DISABLE_CACHE=1. Without it every process compiles kernels again, and no table of "
                "`lq-kernels tune` is found",
                stacklevel=2,
            )
        return None


def cache_disabled() -> bool:
    """Return whether the disk cache is switched off.

    Raises:
        SpecError: If ``LQ_DISABLE_CACHE`` is neither 0 nor 1.
    """
    return _boolean("LQ_DISABLE_CACHE")


def _boolean(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("", "0", "1"):
        raise SpecError(f"{name}={value!r}: expected 0 or 1")
    return value == "1"

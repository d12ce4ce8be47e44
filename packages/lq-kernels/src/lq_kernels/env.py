"""Every environment variable that lq reads: its name, type, default and meaning, in one place.

- ``LQ_CACHE_DIR`` (path; default ``$XDG_CACHE_HOME/lq`` or ``~/.cache/lq``): where compiled CUDA kernels are kept between
  processes, and the tables of ``lq-kernels tune``.
- ``LQ_DISABLE_CACHE`` (bool; default 0): 1 compiles in memory and neither reads nor writes the disk cache, tables included.
- ``LQ_REQUIRE_GPU`` (bool; default 0): read by the test suite only; 1 makes GPU tests fail instead of skip without a GPU.

Booleans are ``0`` or ``1``. Variables are read when they are needed, not at import.
"""

import os
from pathlib import Path

from lq_formats import SpecError


def cache_dir() -> Path:
    """Return the folder of lq's disk cache (it may not exist yet)."""
    chosen = os.environ.get("LQ_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "lq"


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

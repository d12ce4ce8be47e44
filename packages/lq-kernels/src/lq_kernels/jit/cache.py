"""The disk cache of compiled kernels: atomic, versioned, and able to recover from anything that happens to a file.

An entry is one file named by a SHA-256 over the source, every header, the options, the architecture, the compiler's and
lq's version. Its first 32 bytes are the SHA-256 of the rest. A file that is truncated, corrupted or foreign fails that
check, is deleted and compiled again. Writes go to a temporary file that replaces the entry in one step, so readers never
see half a file and concurrent writers do not harm each other. A folder that cannot be written, or is below a
home directory that cannot be found, costs a warning, once; so does an entry that may not be read. Where several users share a
folder, the umask says whether they share entries.
"""

import contextlib
import hashlib
import os
import secrets
import warnings
from pathlib import Path

from lq_kernels import env

VERSION = 1
MAX_BYTES = 64 << 20
_DIGEST = 32
_warned = False


def key(*parts: str) -> str:
    """Return the name of an entry that depends on ``parts``."""
    digest = hashlib.sha256()
    for part in (str(VERSION), *parts):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def load(name: str) -> bytes | None:
    """Return an entry's bytes, or None if there is none that is whole."""
    path = _path(name)
    if path is None:
        return None
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
    except PermissionError as error:
        _warn(f"compiled kernels in {path.parent} cannot be read ({error})")
        return None
    except OSError:
        return None
    body = data[_DIGEST:]
    if body and hashlib.sha256(body).digest() == data[:_DIGEST]:
        return body
    discard(name)
    return None


def store(name: str, body: bytes) -> None:
    """Write an entry in one step; a folder that cannot be written costs a warning, once a process."""
    path = _path(name)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not mkstemp, whose files nobody else may read.
        temporary = path.with_name(f".lq-{secrets.token_hex(8)}")
        try:
            with temporary.open("xb") as file:
                file.write(hashlib.sha256(body).digest() + body)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        _warn(f"compiled kernels cannot be kept in {path.parent} ({error})")


def is_empty() -> bool:
    """Return whether :func:`load` can find nothing, whatever the name; entries are not read."""
    pattern = _path("*")
    try:
        return pattern is None or not any(pattern.parent.glob(pattern.name))
    except OSError:
        return True


def discard(name: str) -> None:
    """Delete an entry, if it is there and can be."""
    path = _path(name)
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink()


def _warn(what: str) -> None:
    """Say once a process what costs it compilations."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"{what}; every process will compile them again. Set LQ_CACHE_DIR to a folder that can be written, or "
            "LQ_DISABLE_CACHE=1",
            stacklevel=3,
        )


def _path(name: str) -> Path | None:
    folder = env.usable_cache_dir()
    return None if folder is None else folder / "cubin" / f"{name}.bin"

"""The disk cache of compiled kernels: whole entries are used, anything else is deleted and compiled again."""

import hashlib
import os
import subprocess
import sys
import warnings

import pytest
from lq_kernels import env
from lq_kernels.jit import cache, launcher
from lq_kernels.jit.compiler import Compiled

BODY = b"cubin of the test"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LQ_DISABLE_CACHE", raising=False)
    monkeypatch.setattr(cache, "_warned", False)
    return tmp_path / "cubin"


@pytest.fixture
def compiled(monkeypatch):
    """Replace the compiler by one that notes what it was asked for."""
    calls = []

    def compile_source(text, arch, name, defines=()):
        calls.append((name, arch))
        return Compiled(BODY, "")

    monkeypatch.setattr(launcher, "compile_source", compile_source)
    monkeypatch.setattr(launcher, "compiler_version", lambda: "13.0")
    launcher._entry.cache_clear()
    yield calls
    launcher._entry.cache_clear()


def entries(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


PARTS = ("name", "source", "headers", "sm_90a", "c++17", "13.0", "0.1.0")


@pytest.mark.parametrize("part", range(len(PARTS)))
def test_a_key_depends_on_every_part(part):
    other = [text + "x" if i == part else text for i, text in enumerate(PARTS)]
    assert cache.key(*PARTS) == cache.key(*PARTS)
    assert cache.key(*other) != cache.key(*PARTS)


def test_a_key_depends_on_the_cache_version_and_on_where_parts_end(monkeypatch):
    before = cache.key("ab", "c")
    assert before != cache.key("a", "bc")
    assert before != cache.key("ab", "c", "")
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert before != cache.key("ab", "c")


def test_round_trip(folder):
    name = cache.key("round trip")
    assert cache.load(name) is None
    cache.store(name, BODY)
    assert cache.load(name) == BODY
    assert entries(folder) == [f"{name}.bin"]
    cache.store(name, b"other")
    assert cache.load(name) == b"other"
    cache.discard(name)
    assert cache.load(name) is None
    cache.discard(name)  # nothing there: no error


def test_a_source_is_compiled_once_for_each_architecture(folder, compiled):
    for _ in range(3):
        assert launcher.cubin("quantize_q8_1", "sm_80") == BODY
    launcher.cubin("quantize_q8_1", "sm_90a")
    launcher.cubin("gemm_q4_0_q8_1", "sm_80")
    assert compiled == [("quantize_q8_1", "sm_80"), ("quantize_q8_1", "sm_90a"), ("gemm_q4_0_q8_1", "sm_80")]
    assert len(entries(folder)) == 3


WHOLE = hashlib.sha256(BODY).digest() + BODY
DAMAGE = {
    "truncated": WHOLE[:-1],
    "truncated-in-the-digest": WHOLE[:20],
    "one-bit-of-the-body": WHOLE[:-1] + bytes([WHOLE[-1] ^ 1]),
    "one-bit-of-the-digest": bytes([WHOLE[0] ^ 1]) + WHOLE[1:],
    "empty": b"",
    "digest-of-nothing": hashlib.sha256(b"").digest(),
    "foreign": b"\x7fELF" + bytes(4096),
    "appended": WHOLE + b"\0",
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_deleted_and_compiled_again(folder, compiled, content):
    launcher.cubin("quantize_q8_1", "sm_80")
    (path,) = folder.iterdir()
    assert path.read_bytes() == WHOLE
    path.write_bytes(content)
    assert cache.load(path.stem) is None
    assert not path.exists()
    path.write_bytes(content)
    assert launcher.cubin("quantize_q8_1", "sm_80") == BODY
    assert len(compiled) == 2
    assert path.read_bytes() == WHOLE


def test_an_oversized_entry_is_deleted_without_reading_it(folder, compiled):
    launcher.cubin("quantize_q8_1", "sm_80")
    (path,) = folder.iterdir()
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # sparse: reading it would not fit into memory
    assert launcher.cubin("quantize_q8_1", "sm_80") == BODY
    assert len(compiled) == 2
    assert path.read_bytes() == WHOLE


def test_a_folder_in_place_of_an_entry_does_not_stop_the_program(folder, compiled):
    launcher.cubin("quantize_q8_1", "sm_80")
    (path,) = folder.iterdir()
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert launcher.cubin("quantize_q8_1", "sm_80") == BODY
    assert entries(folder) == [path.name]  # no temporary file is left


@pytest.mark.parametrize("changed", ["source", "headers", "compiler_version"])
def test_a_change_of_what_is_compiled_changes_the_entry(folder, compiled, monkeypatch, changed):
    launcher.cubin("quantize_q8_1", "sm_80")
    before = getattr(launcher, changed)
    monkeypatch.setattr(launcher, changed, lambda *args: before(*args) + "\n// changed")
    launcher._entry.cache_clear()
    launcher.cubin("quantize_q8_1", "sm_80")
    assert len(compiled) == 2
    assert len(entries(folder)) == 2


def test_every_header_is_part_of_the_key(tmp_path, monkeypatch):
    from lq_kernels.jit import compiler

    monkeypatch.setattr(compiler, "INCLUDE_FOLDER", tmp_path)
    seen = set()
    (tmp_path / "lq").mkdir()
    for name, text in (("a", "1"), ("a", "2"), ("b", "2"), ("b", "")):
        (tmp_path / "lq" / f"{name}.cuh").write_text(text)
        compiler.headers.cache_clear()
        seen.add(compiler.headers())
    compiler.headers.cache_clear()
    assert len(seen) == 4


def test_the_cache_can_be_switched_off(folder, compiled, monkeypatch):
    launcher.cubin("quantize_q8_1", "sm_80")
    monkeypatch.setenv("LQ_DISABLE_CACHE", "1")
    launcher.cubin("quantize_q8_1", "sm_80")
    launcher.cubin("quantize_q8_1", "sm_90a")
    assert len(compiled) == 3
    assert len(entries(folder)) == 1


def test_a_folder_that_cannot_be_written_warns_once(compiled, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setenv("LQ_CACHE_DIR", str(file / "below"))
    monkeypatch.delenv("LQ_DISABLE_CACHE", raising=False)
    monkeypatch.setattr(cache, "_warned", False)
    with pytest.warns(UserWarning, match="LQ_CACHE_DIR") as caught:
        assert launcher.cubin("quantize_q8_1", "sm_80") == BODY
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launcher.cubin("quantize_q8_1", "sm_90a") == BODY
    assert len(compiled) == 2


def test_who_may_read_an_entry_is_what_the_umask_says(folder):
    for mask in (0o022, 0o027):
        before = os.umask(mask)
        try:
            cache.store("entry", BODY)
        finally:
            os.umask(before)
        assert (folder / "entry.bin").stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_entry_that_may_not_be_read_warns_once(folder, compiled, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    launcher.cubin("quantize_q8_1", "sm_80")
    (path,) = folder.iterdir()
    monkeypatch.setattr(cache.Path, "read_bytes", refuse)
    with pytest.warns(UserWarning, match=r"cannot be read .*Permission denied.*LQ_CACHE_DIR") as caught:
        assert launcher.cubin("quantize_q8_1", "sm_80") == BODY
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launcher.cubin("quantize_q8_1", "sm_80") == BODY
    assert len(compiled) == 3
    assert entries(folder) == [path.name]  # another user's: not deleted


def test_without_a_home_everything_is_compiled_with_one_warning(compiled, monkeypatch):
    monkeypatch.setenv("LQ_CACHE_DIR", "~no-such-user-of-lq/cache")
    monkeypatch.delenv("LQ_DISABLE_CACHE", raising=False)
    monkeypatch.setattr(env, "_warned", False)
    with pytest.warns(UserWarning, match="home directory that cannot be found; set LQ_CACHE_DIR") as caught:
        assert launcher.cubin("quantize_q8_1", "sm_80") == BODY
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.store("entry", BODY)
        assert cache.load("entry") is None
        cache.discard("entry")
        assert cache.is_empty()
    assert len(compiled) == 1


def test_a_folder_that_cannot_be_looked_into_is_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path / ("long" * 100)))  # which no file system has, whoever asks
    monkeypatch.delenv("LQ_DISABLE_CACHE", raising=False)
    assert cache.is_empty()
    assert cache.load("entry") is None
    cache.discard("entry")


def test_a_full_disk_leaves_no_temporary_file(folder, compiled, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert launcher.cubin("quantize_q8_1", "sm_80") == BODY
    assert entries(folder) == []


WRITERS = """
import os
from lq_kernels.jit import cache

def write(letter):
    body = letter * 100_000
    for _ in range(50):
        cache.store("shared", body)
        found = cache.load("shared")
        assert found is not None and len(found) == 100_000 and len(set(found)) == 1, "half an entry was read"

children = []
for letter in (b"a", b"b", b"c", b"d"):
    child = os.fork()
    if child == 0:
        try:
            write(letter)
        except BaseException:
            os._exit(1)
        os._exit(0)
    children.append(child)
failed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
raise SystemExit(any(failed))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its writers")
def test_concurrent_writers_leave_one_whole_entry(folder):
    subprocess.run([sys.executable, "-c", WRITERS], check=True, timeout=120)
    assert entries(folder) == ["shared.bin"]
    found = cache.load("shared")
    assert found is not None
    assert found in {letter * 100_000 for letter in (b"a", b"b", b"c", b"d")}

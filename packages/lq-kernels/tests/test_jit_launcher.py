"""Loading kernels: once each, by whichever thread comes first, and anew where the driver refuses what was kept."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lq_formats import CompileError, LaunchError
from lq_kernels.jit import cache, driver, launcher


@pytest.fixture
def gpu(monkeypatch):
    """A Hopper GPU that is not there, whose driver takes any code."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(driver, "make_current", lambda index: None)
    monkeypatch.setattr(driver, "load_kernel", lambda code, kernel: int(code))
    monkeypatch.setattr(launcher, "_functions", {})
    monkeypatch.setattr(launcher, "_locks", {})


def test_threads_that_want_one_kernel_compile_it_once(gpu, monkeypatch):
    compiled, release = [], threading.Event()

    def cubin(name, arch, defines):
        compiled.append((name, arch, defines))
        assert release.wait(10)
        return b"7"

    monkeypatch.setattr(launcher, "cubin", cubin)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(launcher.load, 0, "one", "kernel", 0, ("A=1",)) for _ in range(4)]
        release.set()
    assert [future.result() for future in futures] == [7] * 4
    assert compiled == [("one", "sm_90a", ("A=1",))]
    assert launcher.load(0, "one", "kernel", 0, ("A=1",)) == 7
    assert launcher.load(1, "one", "kernel", 0, ("A=1",)) == 7
    assert len(compiled) == 2, "each GPU has its own"


def test_kernels_are_compiled_and_loaded_at_once(gpu, monkeypatch):
    compiling, loading = threading.Barrier(3, timeout=10), threading.Barrier(3, timeout=10)

    def cubin(name, arch, defines):
        compiling.wait()  # three at once, or this breaks
        return name.encode()

    def load_kernel(code, kernel):
        loading.wait()
        return int(code)

    monkeypatch.setattr(launcher, "cubin", cubin)
    monkeypatch.setattr(driver, "load_kernel", load_kernel)
    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(lambda name: launcher.load(0, name, "kernel", 0), "123")) == [1, 2, 3]


def test_one_that_does_not_compile_is_tried_again_by_the_next(gpu, monkeypatch):
    answers = [CompileError("no"), b"5"]

    def cubin(name, arch, defines):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(launcher, "cubin", cubin)
    with pytest.raises(CompileError, match="no"):
        launcher.load(0, "one", "kernel", 0)
    assert launcher.load(0, "one", "kernel", 0) == 5


def test_code_that_the_driver_refuses_is_compiled_anew_once(gpu, monkeypatch):
    kept, discarded = [b"old", b"9"], []
    monkeypatch.setattr(launcher, "cubin", lambda name, arch, defines: kept.pop(0))
    monkeypatch.setattr(launcher, "_entry", lambda *parts: "entry")
    monkeypatch.setattr(cache, "discard", discarded.append)

    def load_kernel(code, kernel):
        if not code.isdigit():
            raise LaunchError("the driver does not take it")
        return int(code)

    monkeypatch.setattr(driver, "load_kernel", load_kernel)
    assert launcher.load(0, "one", "kernel", 0) == 9
    assert discarded == ["entry"]
    kept[:] = [b"old", b"older"]
    with pytest.raises(CompileError, match=r"two\.cu was compiled for sm_90a and cannot be loaded"):
        launcher.load(0, "two", "kernel", 0)


def test_more_shared_memory_than_there_is_is_an_error(gpu, monkeypatch):
    asked = []
    properties = type("Properties", (), {"shared_memory_per_block_optin": 100_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(driver, "allow_shared", lambda *what: asked.append(what) or 0)
    monkeypatch.setattr(launcher, "cubin", lambda name, arch, defines: b"3")
    assert launcher.load(0, "one", "kernel", 100_000) == 3
    assert launcher.load(0, "one", "kernel", 1024) == 3
    assert asked == [(3, 0, 100_000)]
    with pytest.raises(CompileError, match="needs 100001 bytes of shared memory: this GPU has 100000"):
        launcher.load(0, "one", "kernel", 100_001)

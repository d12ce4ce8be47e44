"""NVRTC is started ahead, in the background: once, where kernels will be compiled, and without a word of its own."""

import threading

import pytest
import torch
from lq_formats import CompileError, pack_int4
from lq_kernels import Arch, pack_int4_dynamic, preshuffle_int4, preshuffle_int8, preshuffle_q4_0
from lq_kernels.cuda import constraints
from lq_kernels.jit import cache, nvrtc

HOPPER = Arch("cuda", (9, 0), "NVIDIA H200", 132)
ADA = Arch("cuda", (8, 9), "NVIDIA L4", 58)
SCALES = torch.ones(16, 1)
PACK = {
    "int4": lambda: preshuffle_int4(codes(), SCALES, group_size=128, in_features=128),
    "int8": lambda: preshuffle_int8(torch.zeros(16, 128, dtype=torch.int8), SCALES[:, 0]),
    "q4_0": lambda: preshuffle_q4_0(torch.zeros(16, 4, 18, dtype=torch.uint8)),
    "int4-dynamic": lambda: pack_int4_dynamic(codes(), SCALES, group_size=128, in_features=128, activation="fp8"),
}


def codes():
    return pack_int4(torch.full((16, 128), 8, dtype=torch.uint8))


@pytest.fixture(autouse=True)
def unstarted(tmp_path, monkeypatch):
    """A process in which NVRTC was not started, with an empty cache; returns the errors that threads end with."""
    errors = []
    monkeypatch.setattr(nvrtc, "_unstarted", threading.Lock())
    monkeypatch.setattr(threading, "excepthook", errors.append)
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LQ_DISABLE_CACHE", raising=False)
    return errors


@pytest.fixture
def compiled(monkeypatch):
    """Replace the compiler by one that notes the threads in which it is called."""
    calls = []
    monkeypatch.setattr(nvrtc, "compile_program", lambda *program: calls.append(threading.current_thread()))
    return calls


def finish():
    for thread in threading.enumerate():
        if thread.name == "lq-nvrtc":
            thread.join()


def test_many_threads_start_it_once_and_a_daemon_does_not_make_it_one(compiled):
    together = threading.Barrier(8, timeout=10)

    def ask():
        together.wait()
        nvrtc.start()

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    nvrtc.start()
    finish()
    (started,) = compiled
    assert started.name == "lq-nvrtc"
    assert not started.daemon


def test_a_process_with_cached_kernels_does_not_start_it(compiled, tmp_path):
    cache.store(cache.key("kernel"), b"cubin")
    nvrtc.start()
    finish()
    (tmp_path / "cubin" / f"{cache.key('kernel')}.bin").unlink()
    nvrtc.start()  # nor later
    finish()
    assert compiled == []


def test_other_files_are_no_kernels(compiled, tmp_path):
    (tmp_path / "cubin").mkdir()
    (tmp_path / "cubin" / ".lq-temporary").touch()
    (tmp_path / "tuned.json").touch()
    nvrtc.start()
    finish()
    assert len(compiled) == 1


def test_a_cache_that_is_switched_off_has_no_kernels(compiled, monkeypatch):
    cache.store(cache.key("kernel"), b"cubin")
    monkeypatch.setenv("LQ_DISABLE_CACHE", "1")
    nvrtc.start()
    finish()
    assert len(compiled) == 1


@pytest.mark.parametrize("error", [CompileError("NVRTC does not take it"), OSError("no such library")], ids=repr)
def test_an_error_of_the_compiler_is_left_to_the_first_kernel(unstarted, monkeypatch, error):
    asked = []

    def compile_program(*program):
        asked.append(program)
        raise error

    monkeypatch.setattr(nvrtc, "compile_program", compile_program)
    nvrtc.start()
    finish()
    assert len(asked) == 1
    assert unstarted == []


def test_nor_does_a_wrong_variable_or_a_lack_of_threads_raise(unstarted, compiled, monkeypatch):
    monkeypatch.setenv("LQ_DISABLE_CACHE", "maybe")
    nvrtc.start()
    finish()

    def none_left(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(nvrtc, "_unstarted", threading.Lock())
    monkeypatch.setattr(threading.Thread, "start", none_left)
    nvrtc.start()
    assert compiled == []
    assert unstarted == []


@pytest.mark.nvrtc
def test_what_it_compiles_is_a_program(monkeypatch):
    real, results = nvrtc.compile_program, []
    monkeypatch.setattr(nvrtc, "compile_program", lambda *program: results.append(real(*program)))
    nvrtc.start()
    finish()
    ((cubin, log),) = results
    assert cubin is not None, log
    assert cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize("pack", PACK.values(), ids=PACK)
def test_packing_a_weight_for_hopper_starts_it(pack, monkeypatch):
    started = []
    monkeypatch.setattr(nvrtc, "start", lambda: started.append(True))
    monkeypatch.setattr(constraints, "why_not_compile", lambda: None)
    pack()  # on a CPU
    monkeypatch.setattr(Arch, "of", staticmethod(lambda device: ADA))
    pack()
    assert started == []
    monkeypatch.setattr(Arch, "of", staticmethod(lambda device: HOPPER))
    pack()
    assert started == [True]
    monkeypatch.setattr(constraints, "why_not_compile", lambda: "NVRTC is not installed")
    pack()
    assert started == [True]

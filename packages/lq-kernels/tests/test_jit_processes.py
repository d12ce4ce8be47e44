"""Processes that compile beside this one: the same bytes, none left behind, and nothing lost where there are none."""

import re
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import spawn

import pytest
from lq_formats import CompileError
from lq_kernels import prepare
from lq_kernels.jit import compiler, nvrtc, nvrtc_program, processes

OPTIONS = (b"-arch=sm_90a",)
TEXTS = [f'extern "C" __global__ void kernel(int* to) {{ *to = {i}; }}' for i in range(12)]


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    """A process that has not warned, with NVRTC's own cache switched off."""
    monkeypatch.setattr(processes, "_warned", False)
    monkeypatch.setenv("CUDA_CACHE_DISABLE", "1")


@pytest.fixture
def here(monkeypatch):
    """Return what has been compiled in this process."""
    real, texts = nvrtc.compile_program, []

    def compile_program(text, name, options):
        texts.append(text)
        return real(text, name, options)

    monkeypatch.setattr(nvrtc, "compile_program", compile_program)
    return texts


@pytest.fixture
def started(monkeypatch):
    """Return the processes that were started."""
    real, found = subprocess.Popen, []

    def popen(*arguments, **options):
        found.append(real(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    return found


def compile_all(texts=TEXTS, threads=8):
    """Compile one after another, in a body that says it has so many threads."""
    with processes.helped(threads):
        return [processes.compile_program(text, "kernel.cu", OPTIONS) for text in texts]


def cubins(found):
    return [cubin for cubin, _ in found]


@pytest.mark.nvrtc
def test_processes_compile_to_the_same_bytes_and_end(here, started):
    found = compile_all()
    assert here == TEXTS[: processes._LEAST_PROGRAMS - 1]  # the others, somewhere else
    assert cubins(found) == [nvrtc.compile_program(text, "kernel.cu", OPTIONS)[0] for text in TEXTS]
    assert len(set(cubins(found))) == len(TEXTS)
    assert len(started) == processes._PROCESSES
    assert [process.wait(timeout=60) for process in started] == [0] * processes._PROCESSES


@pytest.mark.nvrtc
def test_processes_see_no_gpu_whose_driver_nvrtc_would_initialise(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("LQ_OF_THIS_PROCESS", "kept")
    real, found = subprocess.Popen, []

    def popen(*arguments, **options):
        found.append(options["env"])
        return real(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    compile_all()
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == [""] * processes._PROCESSES
    assert {each["LQ_OF_THIS_PROCESS"] for each in found} == {"kept"}


@pytest.mark.nvrtc
def test_threads_use_both_processes_at_once(here, started):
    with processes.helped(9), ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda text: processes.compile_program(text, "kernel.cu", OPTIONS), TEXTS * 3))
        assert len(processes._active._free) == 6  # a third of the threads each, and all are given back
    assert processes._active is None
    assert 3 <= len(here) < len(found)
    assert cubins(found) == [nvrtc.compile_program(text, "kernel.cu", OPTIONS)[0] for text in TEXTS] * 3
    for process in started:
        assert process.wait(timeout=60) == 0


@pytest.mark.nvrtc
def test_few_programs_or_threads_start_none(here, started):
    compile_all(TEXTS[: processes._LEAST_PROGRAMS - 1])
    compile_all(threads=processes._LEAST_THREADS - 1)
    processes.compile_program(TEXTS[0], "kernel.cu", OPTIONS)
    assert len(here) == processes._LEAST_PROGRAMS + len(TEXTS)
    assert not started


@pytest.mark.nvrtc
def test_bodies_that_run_at_once_share_the_processes(started):
    with processes.helped(8):
        compile_all()
        assert len(started) == processes._PROCESSES
        compile_all()
        assert len(started) == processes._PROCESSES
        assert [process.poll() for process in started] == [None] * processes._PROCESSES
    for process in started:
        assert process.wait(timeout=60) == 0


@pytest.mark.nvrtc
@pytest.mark.parametrize("ending", ["at once", "later"])
def test_what_ended_processes_leave_is_compiled_here_with_a_warning(ending, here, started, monkeypatch):
    if ending == "at once":
        monkeypatch.setattr(processes, "_interpreter", lambda: shutil.which("false"))

    def compile_some(texts):
        found.extend(processes.compile_program(text, "kernel.cu", OPTIONS) for text in texts)

    found, why = [], "compile in this process alone.*has ended or does not answer"
    with processes.helped(8), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        compile_some(TEXTS[:6])
        for process in started:
            process.kill()
            process.wait(timeout=60)
        compile_some(TEXTS[6:])
    assert [bool(re.search(why, str(each.message))) for each in warned] == [True]  # however many programs
    assert set(TEXTS[6:]) <= set(here)
    assert cubins(found) == [nvrtc.compile_program(text, "kernel.cu", OPTIONS)[0] for text in TEXTS]


@pytest.mark.nvrtc
def test_a_process_that_cannot_be_started_costs_a_warning(here, monkeypatch):
    monkeypatch.setattr(processes, "_interpreter", lambda: "/nowhere/python")
    with pytest.warns(UserWarning, match="none can be started.*No such file"):
        found = compile_all()
    assert here == TEXTS
    assert all(cubins(found))


@pytest.mark.nvrtc
def test_a_second_process_that_cannot_be_started_leaves_the_first(here, started, monkeypatch):
    real = processes._process

    def process(*arguments):
        if started:
            raise OSError("no more")
        return real(*arguments)

    monkeypatch.setattr(processes, "_process", process)
    with pytest.warns(UserWarning, match="no more"):
        found = compile_all()
    assert len(here) < len(TEXTS)
    assert all(cubins(found))
    assert started[0].wait(timeout=60) == 0


@pytest.mark.nvrtc
def test_no_process_is_started_from_a_program_that_has_python_in_it(here, started, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_all()
    monkeypatch.delattr(sys, "frozen")
    monkeypatch.setattr(spawn, "get_executable", lambda: None)
    compile_all()
    assert here == TEXTS * 2
    assert not started


def test_the_interpreter_is_multiprocessings(monkeypatch):
    monkeypatch.setattr(spawn, "get_executable", lambda: b"/usr/bin/python9")
    assert processes._interpreter() == "/usr/bin/python9"


@pytest.mark.nvrtc
def test_an_error_in_a_source_has_the_other_processes_log(here):
    with processes.helped(8):
        for text in TEXTS[:4]:
            processes.compile_program(text, "kernel.cu", OPTIONS)
        with pytest.raises(CompileError, match=r"wrong\.cu does not compile for sm_90a with LQ_A=1(.|\n)*unknown"):
            compiler.compile_source("unknown type;", "sm_90a", "wrong", ("LQ_A=1",))
    assert "unknown type;" not in here


@pytest.mark.nvrtc
def test_what_nvrtc_fails_at_elsewhere_is_tried_here(here, monkeypatch):
    answer = nvrtc_program.message((nvrtc_program.FAILED, b"is out of memory", b""))

    others = []

    def process(executable, library, threads):
        ours, theirs = socket.socketpair()
        theirs.sendall(answer)
        others.append(theirs)
        return subprocess.Popen([executable, "-c", ""]), [ours]

    monkeypatch.setattr(processes, "_process", process)
    found = compile_all(TEXTS[:4])
    for each in others:
        each.close()
    assert here == TEXTS[:4]
    assert all(cubins(found))


@pytest.mark.nvrtc
def test_compile_units_is_helped(here, started, monkeypatch, tmp_path):
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "source", lambda name: "")
    units = [prepare.Unit("nothing", (f"LQ_A={i}",)) for i in range(8)]

    def compile_one(unit):
        return compiler.compile_source(TEXTS[0], "sm_90a", unit.source, unit.defines).cubin

    assert prepare.compile_units(units, compile_one, threads=8) == 8
    assert len(started) == processes._PROCESSES
    assert len(here) < 8
    for process in started:
        assert process.wait(timeout=60) == 0


class Unlucky:
    """NVRTC that fails at ``bad``, does not take ``wrong``, and compiles everything else to itself."""

    def compile_program(self, text, name, options):
        if text == b"bad":
            raise nvrtc_program.NvrtcError("is out of memory")
        return None if text == b"wrong" else text + b"|".join(options), b"log of " + name


def test_a_thread_answers_every_message_until_the_other_end_is_closed():
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=nvrtc_program._serve, args=(Unlucky(), theirs.fileno()))
    thread.start()
    long = b"x" * 3_000_000  # more than a socket takes at once
    with theirs, ours:
        for sent, expected in [
            ((b"right", b"a.cu", b"-1", b"-2"), [b"compiled", b"right-1|-2", b"log of a.cu"]),
            ((b"bad", b"b.cu"), [b"failed", b"is out of memory", b""]),
            ((b"wrong", b"c.cu"), [b"rejected", b"", b"log of c.cu"]),
            ((long, b"d.cu"), [b"compiled", long, b"log of d.cu"]),
        ]:
            ours.sendall(nvrtc_program.message(sent))
            assert nvrtc_program.receive(ours.recv) == expected
        ours.shutdown(socket.SHUT_WR)
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.mark.parametrize("cut", [0, 3, 4, 19, 20, 24])
def test_a_message_that_is_cut_off_is_none(cut):
    whole = nvrtc_program.message((b"abc", b"de"))
    assert len(whole) == 25
    rest = [whole[i : i + 1] for i in range(cut)][::-1]
    with pytest.raises(EOFError):
        nvrtc_program.receive(lambda size: rest.pop() if rest else b"")


@pytest.mark.parametrize(
    ("begin", "why"),
    [((1 << 31).to_bytes(4, "little"), "2147483648 parts"), (b"\1\0\0\0" + (1 << 40).to_bytes(8, "little"), "bytes")],
)
def test_a_message_that_claims_too_much_is_refused_before_it_is_read(begin, why):
    rest = [begin]

    def read(size):
        found, rest[0] = rest[0][:size], rest[0][size:]
        return found

    with pytest.raises(nvrtc_program.NvrtcError, match=why):
        nvrtc_program.receive(read)


@pytest.mark.nvrtc
def test_the_library_is_where_another_process_finds_it():
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).nvrtcVersion"
    subprocess.run([sys.executable, "-I", "-S", "-c", code, nvrtc.path()], check=True, timeout=60)

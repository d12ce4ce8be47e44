import dataclasses
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from lq_eval.bench import cold_process
from lq_eval.bench.cold import STATES, ColdOptions, child_environment, run_cold
from lq_eval.errors import BenchError
from lq_eval.results import read_records

OPTIONS = ColdOptions("64x128,64x64", "int4-g64", "float32", "cpu", (1, 2), (1, 3))


def replace_run(monkeypatch, run):
    fake = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr("lq_eval.bench.cold.subprocess", fake)


def test_options_reach_the_child_unchanged():
    assert ColdOptions.from_json(OPTIONS.to_json()) == OPTIONS


def test_the_child_measures_every_step(tmp_path):
    answer = tmp_path / "answer.json"
    cold_process.main([OPTIONS.to_json(), str(answer)])
    found = json.loads(answer.read_text())
    assert found["layers"] == 2
    assert found["first_call_m"] in (1, 3)
    assert min(found[f"{step}_s"] for step in ("quantize", "warmup", "warmup_cpu", "rerun", "first_call")) > 0
    assert found["compile_s"] == 0, "nothing is compiled ahead for a CPU"


def test_the_child_knows_when_the_last_kernel_was_loaded(tmp_path, monkeypatch):
    def warmup(model, sizes, progress=None):
        if progress is not None:
            for step in ((0, 2, "0 x 1"), (1, 2, "decode_a16"), (2, 2, "prefill_a16")):
                progress(*step)
            time.sleep(0.01)
            progress(1, 2, "0 x 2")

    monkeypatch.setattr(cold_process, "warmup", warmup)
    found = cold_process.start(OPTIONS)
    assert 0 < found["compile_s"] < found["warmup_s"]


def test_without_batch_sizes_nothing_is_warmed_up(monkeypatch):
    monkeypatch.setattr(cold_process, "warmup", None)
    found = cold_process.start(dataclasses.replace(OPTIONS, batch_sizes=()))
    assert found["warmup_s"] == found["rerun_s"] == found["compile_s"] == 0
    assert found["first_call_s"] > 0


def test_every_cache_is_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LQ_DISABLE_CACHE", "1")
    found = child_environment(tmp_path)
    for name in ("LQ_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"):
        assert found[name].startswith(str(tmp_path))
    assert found["LQ_DISABLE_CACHE"] == "0"
    assert found["PATH"] == os.environ["PATH"]


def test_later_processes_find_what_the_first_left(lq_eval, tmp_path, monkeypatch):
    """Processes that only leave a file where kernels are kept and report whether it was there."""
    started, sizes = [], []

    def run(command, *, env, **options):
        kept = os.path.join(env["LQ_CACHE_DIR"], "kernel")
        started.append(os.path.exists(kept))
        os.makedirs(env["LQ_CACHE_DIR"], exist_ok=True)
        open(kept, "w").close()
        assert command[:3] == [sys.executable, "-m", "lq_eval.bench.cold_process"]
        sizes.append(ColdOptions.from_json(command[3]).batch_sizes)
        measured = {"layers": 1, "quantize_s": 1.0, "warmup_s": 2.0, "warmup_cpu_s": 3.0, "compile_s": 1.5}
        measured |= {"rerun_s": 0.5, "first_call_s": 0.25}
        with open(command[4], "w") as file:
            json.dump({**measured, "first_call_m": 3}, file)
        return subprocess.CompletedProcess(command, 0, "", "")

    replace_run(monkeypatch, run)
    record = tmp_path / "cold.jsonl"
    result = lq_eval("bench", "cold", "--shapes", "8x8", "--schemes", "int8", "--device", "cpu", "--json", record)
    assert result.exit_code == 0, result.output
    assert started == [False, True, True]
    assert [bool(each) for each in sizes] == [True, True, False]
    rows = [row for found in read_records(record) if found.bench == "cold" for row in found.rows]
    assert [(row["cache"], row["warmup_s"]) for row in rows] == [(state, 2.0) for state in STATES]


def test_a_real_process_answers():
    first = next(run_cold(OPTIONS))
    assert (first.cache, first.layers, first.scheme) == ("empty", 2, "int4-g64")
    assert first.warmup_s > 0


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [("Traceback\nNoKernelError: none fits\n", "none fits"), ("", "exit status 9")],
    ids=["error", "silent"],
)
def test_a_process_that_fails_says_why(monkeypatch, stderr, reason):
    replace_run(monkeypatch, lambda command, **options: subprocess.CompletedProcess(command, 9, "", stderr))
    with pytest.raises(BenchError, match=reason):
        next(run_cold(OPTIONS))


def test_a_process_that_hangs_is_ended():
    with pytest.raises(BenchError, match=r"not done in 0\.01 s"):
        next(run_cold(OPTIONS, timeout_s=0.01))

"""The process that times cuts for the tuner, without a GPU: what becomes of one that dies, hangs or cannot be had."""

import sys

import pytest
from lq_formats import DeviceError
from lq_kernels import cli
from lq_kernels.tuned import worker
from lq_kernels.tuned.kernels import weight

W4 = weight(4, 128, 4096, 4096)
FAKE_WORKER = """
import json, os, sys, time
mood = sys.argv[1]
starts = sys.argv[2]
count = int(open(starts).read()) if os.path.exists(starts) else 0
open(starts, "w").write(str(count + 1))
def say(message):
    print(json.dumps(message), flush=True)
if mood == "no-gpu":
    say({"error": "torch finds none on this machine"})
    sys.exit()
if mood == "crash" or (mood == "never-again" and count):
    sys.exit("ImportError: nothing works here")
say({"name": "NVIDIA H200", "sm_count": 132, "capability": [9, 0], "torch": "2", "driver": "CUDA 13.0"})
for line in sys.stdin:
    request = json.loads(line)
    times = []
    for index, (kernel, cut) in enumerate(request["cuts"]):
        say({"at": index})
        if kernel == "prefill_a16" and cut.get("tokens") == 64:
            if mood == "hang":
                time.sleep(60)
            if mood in ("die", "never-again"):
                sys.exit("RuntimeError: CUDA error: an illegal memory access was encountered")
        times.append("LaunchError: refused" if cut.get("tokens") == 16 else 1.0 + index)
    say({"times": times})
"""


@pytest.fixture
def start(tmp_path):
    """Start a timing process of a certain mood; ``starts(mood)`` is how many there were."""
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE_WORKER)
    started = []

    def begin(mood, **options):
        timer = worker.WorkerTimer([sys.executable, "-S", str(script), mood, str(tmp_path / mood)], **options)
        started.append(timer)
        return timer

    begin.starts = lambda mood: int((tmp_path / mood).read_text())
    yield begin
    for timer in started:
        timer.close()


def cuts_of(*tokens):
    return [("prefill_a16", (("tokens", each),)) for each in tokens]


def test_times_and_failures_of_a_process(start):
    timer = start("well")
    assert timer.device == worker.Device("NVIDIA H200", 132, (9, 0), "2", "CUDA 13.0")
    assert timer.times(W4, 4, cuts_of(32, 16, 128), 3) == [1.0, "LaunchError: refused", 3.0]
    assert timer.times(W4, 4, [], 3) == []
    assert start.starts("well") == 1


@pytest.mark.parametrize(
    ("mood", "reason"), [("hang", "did not end within 1 s"), ("die", "an illegal memory access was encountered")]
)
def test_a_cut_that_takes_the_process_with_it_fails_alone(start, mood, reason):
    timer = start(mood, silent_s=1.0)
    times = timer.times(W4, 4, cuts_of(32, 64, 128), 3)
    assert [times[0], times[2]] == [1.0, 2.0]
    assert reason in times[1]
    assert start.starts(mood) == 2
    assert timer.times(W4, 4, cuts_of(32), 3) == [1.0]


def test_a_process_that_cannot_be_had_is_a_named_error(start, monkeypatch):
    with pytest.raises(DeviceError, match="torch finds none"):
        start("no-gpu")
    with pytest.raises(DeviceError, match="ImportError: nothing works here"):
        start("crash")
    timer = start("never-again")
    with pytest.raises(DeviceError, match="nothing works here"):
        timer.times(W4, 4, cuts_of(64, 32), 3)
    monkeypatch.setattr(worker, "MAX_RESTARTS", 0)
    with pytest.raises(DeviceError, match="lost 1 times"):
        start("die").times(W4, 4, cuts_of(64), 3)


def test_without_a_gpu_the_command_says_so(tmp_path, capsys, monkeypatch, start):
    monkeypatch.setattr(cli, "WorkerTimer", lambda: start("no-gpu"))
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LQ_DISABLE_CACHE", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", "--shape", "64x128"])
    assert caught.value.code == 2
    assert "needs a GPU that it can use: torch finds none" in capsys.readouterr().err
    cli.main(["tune", "--shape", "128x128", "--tokens", "2", "--list"])
    assert capsys.readouterr().out == "int4-row-sym-128x128 M=2\n"

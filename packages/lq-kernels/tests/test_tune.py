"""The tuner without a GPU: which cuts it times, what it keeps, and its command."""

import os
from dataclasses import replace

import pytest
from lq_formats import DeviceError, FormatError
from lq_kernels import cli
from lq_kernels.tuned import lookup, run, search, worker
from lq_kernels.tuned.kernels import TUNABLES, config_of, fields_of, variant_of, weight
from lq_kernels.tuned.lookup import source_digests
from lq_kernels.tuned.table import Point, Stamp, Table, read

H200 = ("NVIDIA H200", 132)
W4 = weight(4, 128, 4096, 4096)
WEIGHTS = (
    W4,
    weight(4, 32, 2048, 8192, symmetric=False),
    weight(4, -1, 1024, 4096),
    weight(8, -1, 4100, 1008),
    weight(8, -1, 4096, 4096, activation="fp8"),
    weight(4, 128, 4096, 4096, activation="int8"),
)


class FakeTimer:
    """Gives cuts times by a rule, and remembers what it was asked."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def times(self, weight, m, cuts, replays):
        self.asked.append((weight, m, list(cuts), replays))
        return [self.rule(kernel, cut) for kernel, cut in cuts]


@pytest.mark.parametrize("each", WEIGHTS, ids=str)
@pytest.mark.parametrize("m", [1, 17, 128, 1000])
def test_what_is_timed_are_the_kernels_own_cuts_and_the_models_choice_first(each, m):
    found = list(search.proposals(each, m, 132, candidates=4))
    by_kernel = {}
    for kernel, cut, unit in found:
        by_kernel.setdefault(kernel, []).append(cut)
        assert fields_of(config_of(kernel, each, m, 132, cut)) == cut
        assert unit.source in source_digests() or unit.source == "dequantize_fragment"
    assert set(by_kernel) == {kernel for kernel, tunable in TUNABLES.items() if tunable.useful(each, m)}
    for kernel, cuts in by_kernel.items():
        ranked = TUNABLES[kernel].ranked(each, m, 132)
        assert cuts == [fields_of(config) for config in ranked[:4]]
        assert len(set(cuts)) == len(cuts)


def test_the_models_choice_is_what_runs_without_a_table():
    from lq_kernels.cuda import decode_a16, linear_a8, prefill_a16

    scales, here = (W4.groups, W4.zero, W4.scale_bytes), (132, "")
    for m in (1, 16, 100, 1000):
        (_, first, _), *_ = search.proposals(W4, m, 132, kernels=["prefill_a16"])
        assert first == fields_of(prefill_a16.choice(m, W4.n, W4.k, 4, *scales, *here).config)
        if m <= 100:
            (_, first, _), *_ = search.proposals(W4, m, 132, kernels=["decode_a16"])
            assert first == fields_of(decode_a16.choice(m, W4.n // 16, W4.k, 4, variant_of(W4).scales, *here).config)
        a8 = WEIGHTS[4]
        (_, first, _), *_ = search.proposals(a8, m, 132)
        assert first == fields_of(linear_a8.choice(m, a8.n, a8.k, 8, "fp8", True, False, 0, 132, "").config)


def test_the_fastest_cut_of_each_kernel_is_found_and_the_finalists_are_timed_again():
    cuts = {name: [c for k, c, _ in search.proposals(W4, 128, 132) if k == name] for name in TUNABLES}
    fastest = {"decode_a16": cuts["decode_a16"][-1], "prefill_a16": cuts["prefill_a16"][3], "dequant_blas": ()}
    timer = FakeTimer(lambda kernel, cut: 5.0 if cut == fastest[kernel] else 9.0)
    found, failed = search.search(W4, 128, timer, 132)
    assert not failed
    assert {one.kernel: (one.point.cut, one.point.us, one.point.m) for one in found} == {
        kernel: (cut, 5.0, 128) for kernel, cut in fastest.items()
    }
    assert {one.kernel: one.model_us for one in found} == {"decode_a16": 9.0, "prefill_a16": 9.0, "dequant_blas": 5.0}
    (_, _, first, short), (_, _, second, long) = timer.asked
    assert short < long
    assert len(first) == sum(one.tried for one in found)
    for kernel, own in cuts.items():
        again = [cut for name, cut in second if name == kernel]
        assert len(again) <= 4
        if own:
            assert fastest[kernel] in again
            assert own[0] in again  # what the model chose, to say what was gained


def test_the_order_of_the_fastest_cut_s_tiles_is_timed_last():
    a8 = WEIGHTS[4]
    cuts = [cut for _, cut, _ in search.proposals(a8, 4096, 132)]
    fastest = next(cut for cut in cuts[1:] if not dict(cut)["shared_tiles"])
    config = config_of("linear_a8", a8, 4096, 132, fastest)
    orders = [fields_of(each) for each in TUNABLES["linear_a8"].orders(a8, 4096, config)]
    assert len(orders) == len(set(orders)) > 3
    assert fastest not in orders
    for best in (fastest, orders[1]):
        timer = FakeTimer(lambda kernel, cut, best=best: 4.0 if cut == best else 5.0 if cut == fastest else 9.0)
        ((one,), failed) = search.search(a8, 4096, timer, 132)
        assert not failed
        assert (one.point.cut, one.point.us, one.tried) == (best, 4.0, len(cuts) + len(orders))
        assert [cut for _, cut in timer.asked[-1][2]] == [fastest, *orders]
        assert config_of("linear_a8", a8, 4096, 132, best)
    # The last round's times are of another minute: only their ratios count.
    for factor in (1.0, 0.9):
        timer = FakeTimer(None)

        def drifting(kernel, cut, timer=timer, factor=factor):
            if len(timer.asked) == 3:
                return 8.0 * factor if cut == orders[1] else 8.0
            return 5.0 if cut == fastest else 9.0

        timer.rule = drifting
        ((one,), _) = search.search(a8, 4096, timer, 132)
        assert one.point.cut == (orders[1] if factor < 1 else fastest)
        assert one.point.us == pytest.approx(5.0 * factor)
    # Tiles that are all taken at once have none, and neither have other kernels.
    few = TUNABLES["linear_a8"].ranked(a8, 16, 132)[0]
    assert not list(TUNABLES["linear_a8"].orders(a8, 16, few))
    assert not list(TUNABLES["decode_a16"].orders(W4, 1, None))


@pytest.mark.parametrize(("m", "some"), [(4096, True), (64, False)])
def test_prefill_s_tiles_are_taken_in_other_orders_where_a_cta_has_several(m, some):
    prefill = TUNABLES["prefill_a16"]
    for config in prefill.ranked(W4, m, 132)[:20]:
        rows, tokens = config.tiles(m, W4.n)
        orders = list(prefill.orders(W4, m, config))
        assert bool(orders) == (some and rows > 1 and rows * tokens > config.ctas)
        assert len({each.raster for each in (config, *orders)}) == len(orders) + 1
        for each in orders:
            assert replace(each, raster=config.raster) == config
            assert 1 <= each.raster <= rows
            assert config_of("prefill_a16", W4, m, 132, fields_of(each)) == each


def test_what_was_fastest_with_more_tokens_is_timed_with_fewer(tmp_path):
    six = TUNABLES["decode_a16"].ranked(W4, 6, 132)
    timed = [cut for kernel, cut, _ in search.proposals(W4, 1, 132) if kernel == "decode_a16"]
    one = TUNABLES["decode_a16"].ranked(W4, 1, 132)
    again = {fields_of(config): lookup.alike(fields_of(config), one, TUNABLES["decode_a16"].same) for config in six}
    far, here = next((cut, fields_of(c)) for cut, c in again.items() if c is not None and fields_of(c) not in timed)
    table = run.opened(tmp_path / "table.json", *H200)
    table = table.merged(Stamp(*H200), "decode_a16", source_digests()["decode_a16"], W4, Point(6, 8.0, far))
    timer = FakeTimer(lambda kernel, cut: 7.0 if cut == here else 9.0)
    job = run.Run(table, tmp_path / "table.json", Stamp(*H200), timer)
    ((_, _, found),) = job.measure([(W4, 1)], float("inf"))
    assert next(each.point.cut for each in found if each.kernel == "decode_a16") == here
    # One that the kernel does not take is not timed.
    other = tuple(sorted({**dict(here), "clusters": 5}.items()))
    assert list(search.proposals(W4, 1, 132, known={"decode_a16": [other]})) == list(search.proposals(W4, 1, 132))


def test_a_cut_that_fails_is_reported_and_never_chosen():
    first = next(cut for kernel, cut, _ in search.proposals(W4, 64, 132, kernels=["prefill_a16"]))
    timer = FakeTimer(lambda kernel, cut: "LaunchError: no" if cut == first else 7.0)
    found, failed = search.search(W4, 64, timer, 132, kernels=["prefill_a16"])
    assert [(one.kernel, one.cut, one.reason) for one in failed] == [("prefill_a16", first, "LaunchError: no")]
    assert found[0].point.cut != first
    assert found[0].model_us is None
    # All of them fail: nothing is found, nothing is raised. A time of zero is no time.
    found, failed = search.search(W4, 64, FakeTimer(lambda kernel, cut: 0.0), 132)
    assert not found
    assert failed


def test_a_run_writes_resumes_and_keeps_to_its_budget(tmp_path):
    path = tmp_path / "table.json"
    tasks, skipped = run.requested([(4096, 4096), (2048, 2048), (64, 100)], [1, 64])
    assert len(skipped) == 1
    assert "64x100" in skipped[0]
    stamp = Stamp(*H200)
    clock = iter(range(100))
    timer = FakeTimer(lambda kernel, cut: 10.0)
    job = run.Run(run.opened(path, *H200), path, stamp, timer)
    assert [task for _, task, _ in job.measure(tasks, deadline=2.5, now=lambda: next(clock))] == tasks[:3]
    table = read(path)
    assert table == job.table
    assert table.sources.keys() == {"decode_a16", "prefill_a16"}
    left = run.without_measured(tasks, run.opened(path, *H200), 132)
    assert left == tasks[3:]
    again = run.Run(run.opened(path, *H200), path, stamp, FakeTimer(lambda kernel, cut: 8.0))
    assert len(list(again.measure(left, float("inf")))) == 1
    merged = read(path)
    assert {point.us for points in merged.points.values() for point in points} == {10.0, 8.0}
    assert run.without_measured(tasks, merged, 132) == []
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_two_runs_keep_each_other_s_measurements(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "new" / "table.json"
    locks, write = [], run.write

    def writing(table, target):
        handle = os.open(target.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        locks.append(target)
        write(table, target)

    monkeypatch.setattr(run, "write", writing)
    others = weight(4, 128, 512, 512), weight(4, 128, 64, 512)
    jobs = [
        run.Run(run.opened(path, *H200), path, Stamp(*H200), FakeTimer(lambda kernel, cut, us=us: us))
        for us in (3.0, 2.0)
    ]
    first = jobs[0].measure([(W4, 1), (others[0], 1)], float("inf"))
    next(first)
    list(jobs[1].measure([(W4, 1), (W4, 2), (others[1], 1)], float("inf")))
    list(first)  # saves last: what it measured too is its own
    found = {(each, point.m): point.us for (_, each), points in read(path).points.items() for point in points}
    assert found == {(W4, 1): 3.0, (W4, 2): 2.0, (others[0], 1): 3.0, (others[1], 1): 2.0}
    assert read(path) == jobs[0].table
    assert len(locks) == 4
    # What nobody can read is nobody's to replace.
    path.write_text("{}")
    with pytest.raises(FormatError, match=r"table\.json is not a tuning table"):
        list(jobs[1].measure([(W4, 4)], float("inf")))
    assert path.read_text() == "{}"


def test_a_run_that_is_stopped_keeps_what_it_measured(tmp_path):
    def rule(kernel, cut):
        if len(timer.asked) > 3:
            raise KeyboardInterrupt
        return 3.0

    timer = FakeTimer(rule)
    job = run.Run(Table(Stamp(*H200)), tmp_path / "t.json", Stamp(*H200), timer)
    with pytest.raises(KeyboardInterrupt):
        list(job.measure([(W4, 1), (W4, 2), (W4, 4)], float("inf")))
    assert {point.m for points in read(tmp_path / "t.json").points.values() for point in points} == {1}


def test_a_file_of_another_gpu_is_not_added_to_and_stale_points_are_dropped(tmp_path):
    from lq_kernels.tuned.table import write

    path = tmp_path / "t.json"
    stamp, digest = Stamp(*H200), source_digests()["decode_a16"]
    _, cut, _ = next(search.proposals(W4, 1, 132, kernels=["decode_a16"]))
    fresh = Table(stamp).merged(stamp, "decode_a16", digest, W4, Point(1, 2.0, cut))
    other = weight(4, 128, 512, 512)
    found = fresh.merged(stamp, "prefill_a16", "old", W4, Point(1, 2.0, cut))
    write(found.merged(stamp, "decode_a16", digest, other, Point(1, 2.0, (("cluster", 77),))), path)
    assert run.opened(path, *H200) == fresh
    with pytest.raises(DeviceError, match=r"t\.json was measured on NVIDIA H200 \(132"):
        run.opened(path, "NVIDIA H100 PCIe", 114)


# ---- the command ----


class FakeWorker(FakeTimer):
    device = worker.Device(*H200, (9, 0), "2.11.0", "CUDA 13.0")

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@pytest.fixture
def compiled(monkeypatch):
    """What the command compiles, with a GPU that is not there."""
    seen = []
    monkeypatch.setattr(cli, "into_cache", lambda arch: lambda unit: seen.append((unit.source, arch.capability)))
    monkeypatch.setattr(cli, "WorkerTimer", lambda: FakeWorker(lambda kernel, cut: 4.0 + sum(v for _, v in cut) % 7))
    return seen


def test_the_command_writes_the_users_table_and_lq_reads_it(tmp_path, monkeypatch, capsys, compiled):
    import torch
    from lq_formats import QuantSpec
    from lq_kernels import Arch, Problem, explain
    from lq_kernels.cuda import constraints

    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LQ_DISABLE_CACHE", raising=False)
    monkeypatch.setattr(constraints, "why_not_compile", lambda: None)
    monkeypatch.setattr(lookup, "SHIPPED_FOLDER", tmp_path / "none")
    arguments = ["tune", "--shape", "512x1024", "--tokens", "1,128", "--candidates", "3"]
    cli.main(arguments)
    out = capsys.readouterr()
    assert "int4-g128-sym-512x1024 M=1 decode_a16" in out.out
    assert "2 products measured, 0 cuts failed, in nvidia-h200.json" in out.err
    sources = {"decode_a16", "prefill_a16", "dequantize_fragment"}
    assert set(compiled) == {(source, (9, 0)) for source in sources}
    path = tmp_path / "tuned" / "nvidia-h200.json"
    table = read(path)
    lookup.forget()
    spec = QuantSpec(4, "group", 128, True, torch.bfloat16)
    problem = Problem("preshuffled", 1, 512, 1024, spec, torch.bfloat16, Arch("cuda", (9, 0), *H200))
    found = explain(problem)
    measured = {kernel: point.us for (kernel, _), points in table.points.items() for point in points if point.m == 1}
    assert found.predicted_us == min(measured.values())
    assert found.source == "nvidia-h200.json"
    assert "measurements in nvidia-h200.json" in str(found)
    lookup.forget()
    cli.main(arguments)
    assert "0 products to measure" in capsys.readouterr().err
    assert read(path) == table


def test_the_command_keeps_to_its_budget_and_to_the_device_of_a_preset(tmp_path, capsys, compiled, monkeypatch):
    tasks = run.device_preset()
    monkeypatch.setattr(run, "device_preset", lambda: tasks[::40])  # what all of them compile takes seconds to find
    path = tmp_path / "out.json"
    cli.main(["tune", "--device-preset", "h200", "--budget", "0.0001", "--output", str(path), "--candidates", "1"])
    assert "0 products measured" in capsys.readouterr().err
    assert not path.exists()
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", "--device-preset", "h100", "--output", str(path)])
    assert caught.value.code == 2
    assert "this GPU is NVIDIA H200" in capsys.readouterr().err


def test_a_budget_of_nothing_measures_nothing(tmp_path, capsys, compiled):
    path = tmp_path / "out.json"
    cli.main(
        ["tune", "--shape", "64x128", "--tokens", "1", "--candidates", "1", "--budget", "0", "--output", str(path)]
    )
    assert "0 products measured" in capsys.readouterr().err
    assert not path.exists()


def no_worker():
    pytest.fail("a worker was started")


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", "--shape", "64x128", "--tokens", "1", *arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "WorkerTimer", no_worker)
    monkeypatch.delenv("LQ_DISABLE_CACHE", raising=False)
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert "it is a folder; give another file" in refused(["--output", str(tmp_path)], capsys)
    assert "is no folder; give another file" in refused(["--output", str(file / "t.json")], capsys)
    monkeypatch.setenv("LQ_CACHE_DIR", str(file))
    assert "is no folder; give another file" in refused([], capsys)
    monkeypatch.setenv("LQ_CACHE_DIR", "~no-such-user-of-lq/cache")
    assert "set LQ_CACHE_DIR to an absolute folder" in refused([], capsys)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "may not be written; give another" in refused(["--output", str(tmp_path / "new" / "t.json")], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_table_that_nobody_would_read_is_not_measured(tmp_path, capsys, monkeypatch, compiled):
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LQ_DISABLE_CACHE", "1")
    path = tmp_path / "new" / "out.json"
    cli.main(["tune", "--shape", "64x128", "--tokens", "1", "--candidates", "1", "--output", str(path)])
    assert read(path).points
    monkeypatch.setattr(cli, "WorkerTimer", no_worker)
    assert "LQ_DISABLE_CACHE=1: lq would not read the user's table; pass --output" in refused([], capsys)


def test_a_disk_that_fills_up_is_a_named_error(tmp_path, capsys, monkeypatch, compiled):
    monkeypatch.setattr(run, "write", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    path = tmp_path / "out.json"
    error = refused(["--candidates", "1", "--output", str(path)], capsys)
    assert f"SpecError: cannot write {str(path)!r}: No space left on device; give another file" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to tune"),
        (["--shape", "17"], "unknown shape"),
        (["--shape", "64x64", "--bits", "5"], "no kernel to tune for int5"),
        (["--shape", "64x128", "--candidates", "0"], "at least 1"),
        (["--shape", "64x64", "--device-preset", "h200"], "leave out --shape\n"),
        (["--device-preset", "h200", "--bits", "4"], "leave out --bits\n"),
        (["--device-preset", "h200", "--group-size", "32", "--zeros", "no"], "leave out --group-size, --zeros\n"),
        (["--device-preset", "h200", "--activation", "int8", "--tokens", "1"], "leave out --activation, --tokens\n"),
        (["--shape", "64x128", "--tokens=-1"], "--tokens='-1': expected positive integers"),
        (["--shape", "64x128", "--tokens="], "--tokens='': expected positive integers"),
        (["--shape", "64x128", "--bits=-1"], "--bits='-1': expected positive integers"),
        (["--shape", "64x128", "--budget", "nan"], "--budget nan: expected a finite number"),
        (["--shape", "64x128", "--budget", "inf"], "--budget inf: expected a finite number"),
        (["--shape", "64x128", "--budget=-1"], "--budget -1: expected a finite number"),
        (["--model", "nowhere.json"], "cannot be read"),
        (["--shape", "64x128", "--activation", "int3"], "no kernel to tune"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("each", WEIGHTS, ids=str)
def test_every_cut_can_be_timed(each):
    import torch

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    with worker.WorkerTimer() as timer:
        for m in (1, 100, 300):
            found, failed = search.search(each, m, timer, timer.device.sm_count)
            assert not failed
            assert {one.kernel for one in found} == {k for k, tunable in TUNABLES.items() if tunable.useful(each, m)}
            assert all(0.5 < one.point.us <= (one.model_us or 0) for one in found)

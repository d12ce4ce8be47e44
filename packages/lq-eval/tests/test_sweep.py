import json

import pytest
import torch
from lq_eval.bench import sweep
from lq_eval.bench.shapes import MODELS, parse_shapes
from lq_eval.bench.sweep import (
    SWEEP_MS,
    SweepOptions,
    all_shapes,
    calls_per_graph,
    known_points,
    largest_violation,
    point_of,
    points,
    rounds,
    run_sweep,
    summarize,
    suspects,
)
from lq_eval.bench.timing import Steady
from lq_eval.results import Record, read_records
from lq_formats import FormatError, SpecError


@pytest.fixture
def no_waiting(monkeypatch):
    """Every call is made once; the dense product takes 3 us, the others 2."""

    def times(competitors, device, **effort):
        for calls in competitors:
            calls[0]()
        return [3.0, *(2.0 for _ in competitors[1:])] if len(competitors) > 1 else [3.0]

    monkeypatch.setattr("lq_eval.bench.timing.times_us", times)


def options(**changes):
    values = {"shapes": parse_shapes("64x128,128x64"), "ms": (1, 2, 3, 16), "dtype": torch.float32, "group_size": 32}
    return SweepOptions(**(values | {"cold_bytes": 1} | changes))


def row(m, us, dense_us=10.0, ran="k", **changes):
    values = {"op": "int4", "shape": "a", "n": 8, "k": 8, "m": m, "dtype": "bfloat16", "group_size": 8, "ran": ran}
    return {**values, "us": us, "dense_us": dense_us, "speedup": dense_us / us if us else None, **changes}


@pytest.mark.parametrize(
    ("times", "excess", "slow", "fast"),
    [
        ({1: 5.0}, 0, 1, 1),
        ({1: 5.0, 2: 5.0, 3: 6.0}, 0, 1, 1),
        ({1: 5.0, 2: 6.0, 3: 5.5}, 6 / 5.5 - 1, 2, 3),
        ({1: 4.0, 2: 9.0, 3: 8.0, 4: 10.0, 5: 6.0}, 10 / 6 - 1, 4, 5),
        ({4: 6.0, 3: 5.0, 1: 10.0, 2: 12.0}, 12 / 5 - 1, 2, 3),
        ({1: 2.0, 512: 2.0, 1024: 1.0}, 0, 1, 1),
        ({1: 9.0, 2: 7.0, 3: 8.0, 4: 7.5}, 9 / 7 - 1, 1, 2),
    ],
    ids=["one", "monotone", "dip", "latest-peak", "unsorted", "beyond-512", "not-adjacent"],
)
def test_largest_violation(times, excess, slow, fast):
    found = largest_violation(times)
    assert found.excess == pytest.approx(excess)
    assert (found.slow_m, found.fast_m) == (slow, fast)


def test_largest_violation_is_that_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        times = {m: 1 + float(torch.rand((), generator=generator)) for m in range(1, 20)}
        pairs = [times[a] / times[b] - 1 for a in times for b in times if a <= b]
        assert largest_violation(times).excess == pytest.approx(max(pairs))


def test_no_time_to_compare_is_an_error():
    with pytest.raises(SpecError, match="512"):
        largest_violation({1024: 1.0})


def test_a_summary_finds_the_worst_point():
    rows = [row(1, 5.0), row(2, 12.5, ran="slow"), row(3, 10.0), row(4, None), row(1024, 20.0, 19.0)]
    (found,) = summarize(rows)
    assert (found.points, found.failed) == (4, 1)
    assert (found.min_speedup, found.min_m, found.min_ran) == (0.8, 2, "slow")
    assert (found.excess, found.slow_m, found.fast_m) == (0.25, 2, 3)
    assert not found.monotone
    assert summarize([row(1, 10.0), row(2, 9.5)])[0].monotone
    json.dumps(found.to_dict(), allow_nan=False)


def test_of_a_repeated_point_the_last_counts():
    (found,) = summarize([row(1, 50.0), row(1, 5.0), row(2, 5.0)])
    assert (found.points, found.min_speedup) == (2, 2.0)


def test_a_summary_of_failures_has_no_ratio():
    (found,) = summarize([row(1, None), row(2, None)])
    assert (found.points, found.failed, found.min_speedup, found.excess, found.monotone) == (0, 2, None, None, False)


def test_all_shapes_are_distinct_and_take_turns():
    shapes = all_shapes()
    sizes = [(shape.n, shape.k) for shape in shapes]
    assert len(set(sizes)) == len(sizes)
    assert set(sizes) == {(s.n, s.k) for name in MODELS for s in parse_shapes(name)}
    first = [shape.label.rpartition(".")[0] for shape in shapes[:4]]
    assert len(set(first)) == 4


def test_rounds_cover_every_m_once():
    first, rest = rounds(SWEEP_MS)
    assert sorted(first + rest) == sorted(SWEEP_MS)
    assert set(range(1, 65)) <= set(SWEEP_MS)
    assert len(first) < 8
    assert (first[0], first[-1]) == (1, 4096)
    assert rounds((3, 2)) == ((2, 3),)


@pytest.mark.parametrize(
    ("m", "n", "k", "expected"), [(1, 512, 2048, 16), (8192, 57344, 8192, 1), (1024, 14336, 4096, 3)], ids=str
)
def test_long_calls_are_not_repeated(m, n, k, expected):
    assert calls_per_graph(m, n, k) == expected


@pytest.mark.usefixtures("no_waiting")
def test_the_sweep_measures_every_point_variety_first():
    chosen = options()
    rows = list(run_sweep(chosen))
    assert len(rows) == points(chosen) == 2 * 4 * 2
    assert [(r.shape, r.m, r.op) for r in rows[:5]] == [
        ("64x128", 1, "int4"),
        ("64x128", 1, "int8"),
        ("64x128", 16, "int4"),
        ("64x128", 16, "int8"),
        ("128x64", 1, "int4"),
    ]
    assert all(r.us == 2.0 and r.speedup == 1.5 and r.kernel == "auto" and r.ran != "auto" for r in rows)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, []),
        ({1: 2.0, 2: 2.07, 3: 2.0}, []),
        ({1: 2.0, 2: 2.1, 3: 2.0, 4: 3.0, 5: 2.5}, [2, 3, 4, 5]),
        ({8: 9.0, 1: 9.0, 16: 8.0, 512: 8.0, 1024: 1.0}, [1, 8, 512]),
    ],
)
def test_suspects_take_longer_than_more_tokens_which_are_suspects_too(times, expected):
    assert suspects(times) == expected


def test_suspects_are_measured_again(monkeypatch):
    # By M: its time at first, and again twice.
    of_int8 = {1: [3.0, 2.0, 2.1], 2: [2.45], 3: [2.6, 2.55, 2.7], 16: [2.4, 2.5, 2.3]}

    def times(competitors, device, **effort):
        return [4.0, *(found.pop(0) for found in asked.pop(0))]

    asked = []

    def record(shape, wanted, options, deadline):
        for m, products in wanted:
            if products:
                asked.append([of_int8[m] if product.op == "int8" else [m / 4] for product in products])
        return true_run(shape, wanted, options, deadline)

    true_run = sweep._run_shape
    monkeypatch.setattr(sweep, "_run_shape", record)
    monkeypatch.setattr("lq_eval.bench.timing.times_us", times)
    chosen = options(shapes=parse_shapes("64x128"), again=True)
    rows = list(run_sweep(chosen))
    assert points(chosen) == 8
    again = [(1, 2.0), (3, 2.55), (16, 2.5), (1, 2.1), (3, 2.7), (16, 2.3)]
    medians = [(3, 2.6), (16, 2.4)]  # where another one came last
    assert [(r.op, r.m, r.us) for r in rows[8:]] == [("int8", *point) for point in again + medians]
    (of_4, of_8) = summarize(row.to_dict() for row in rows)
    assert (of_4.points, of_4.excess, of_8.points) == (4, 0, 4)
    assert (of_8.slow_m, of_8.fast_m, of_8.excess) == (3, 16, pytest.approx(2.6 / 2.4 - 1))


@pytest.mark.usefixtures("no_waiting")
def test_what_is_done_is_not_measured_again():
    before = list(run_sweep(options(ms=(1, 2), ops=("int4",))))
    chosen = options(done=frozenset(point_of(r.to_dict()) for r in before))
    rows = list(run_sweep(chosen))
    assert len(rows) == points(chosen) == 16 - 4
    assert not {point_of(r.to_dict()) for r in rows} & chosen.done


def test_only_measured_points_of_this_gpu_and_commit_are_known():
    here = {"gpu": "NVIDIA H200", "git": "0123", "date": "today"}
    records = [
        Record("sweep", {**here, "date": "yesterday"}, [row(1, 5.0), row(2, None)]),
        Record("sweep", {**here, "gpu": "NVIDIA L4"}, [row(3, 5.0)]),
        Record("sweep", {**here, "git": "4567"}, [row(4, 5.0)]),
        Record("gemm", here, [row(5, 5.0)]),
    ]
    assert [r["m"] for r in known_points(records, here).values()] == [1]
    with pytest.raises(FormatError, match="the sweep to resume: a row lacks op"):
        known_points([Record("sweep", here, [{"m": 1, "us": 5.0}])], here)
    for damaged in ({"op": ["int4"]}, {"group_size": [128]}, {"dtype": {}}, {"m": "1"}):
        with pytest.raises(FormatError, match=f"the sweep to resume: a row with {next(iter(damaged))}="):
            known_points([Record("sweep", here, [row(1, 5.0) | damaged])], here)


@pytest.mark.usefixtures("no_waiting")
def test_the_time_limit_ends_the_sweep():
    assert list(run_sweep(options(seconds=-1.0))) == []


def test_one_product_that_fails_does_not_hide_the_others(monkeypatch):
    def times(competitors, device, **effort):
        if len(competitors) > 1:
            raise RuntimeError("one of them failed")
        return [4.0]

    monkeypatch.setattr("lq_eval.bench.timing.times_us", times)
    rows = list(run_sweep(options(ms=(1,), shapes=parse_shapes("64x128"))))
    assert [(r.op, r.us, r.dense_us) for r in rows] == [("int4", 4.0, 4.0), ("int8", 4.0, 4.0)]


@pytest.mark.usefixtures("no_waiting")
def test_points_of_many_tokens_have_two_times(monkeypatch):
    def times(competitors, device, **effort):
        return [Steady(4.0 + i, 2.0 + 2 * i) for i in range(len(competitors))]

    monkeypatch.setattr("lq_eval.bench.timing.steady_times_us", times)
    rows = run_sweep(options(ms=(255, 256), ops=("int8",), shapes=parse_shapes("64x128")))
    few, many = sorted(rows, key=lambda row: row.m)
    assert (few.us, few.burst_us, few.burst_speedup) == (2.0, None, None)
    assert (many.dense_us, many.us, many.dense_burst_us, many.burst_us) == (4.0, 5.0, 2.0, 4.0)
    assert (many.speedup, many.burst_speedup) == (0.8, 0.5)
    assert not [name for name in few.to_dict() if "burst" in name]
    assert {name for name in many.to_dict() if "burst" in name} == {"burst_us", "dense_burst_us", "burst_speedup"}
    (found,) = summarize([few.to_dict(), many.to_dict()])
    assert (found.min_speedup, found.min_m, found.min_burst_speedup, found.min_burst_m) == (0.8, 256, 0.5, 256)
    (found,) = summarize([few.to_dict()])
    assert (found.min_speedup, found.min_burst_speedup, found.min_burst_m) == (1.5, None, None)


@pytest.mark.usefixtures("no_waiting")
def test_a_missing_product_says_so(monkeypatch):
    monkeypatch.delattr("lq_torch.Int4DynamicActivationConfig", raising=False)
    rows = list(run_sweep(options(ms=(1,), ops=("w4a8-fp8", "int8"))))
    assert [r.us for r in rows] == [None, 2.0, None, 2.0]
    assert "lq_torch.Int4DynamicActivationConfig" in rows[0].note


@pytest.mark.parametrize(
    "changes",
    [{"ms": (0,)}, {"replays": 0}, {"ops": ("int2",)}, {"group_size": 48}],
    ids=["M", "replays", "op", "group"],
)
def test_unknown_options_are_refused(changes):
    with pytest.raises(SpecError):
        options(**changes)


def test_sweep_records_points_and_summary_and_resumes(lq_eval, tmp_path):
    record = tmp_path / "sweep.jsonl"
    common = ("bench", "sweep", "--shapes", "64x128", "--replays", 1, "--device", "cpu", "--json", record)
    first = lq_eval(*common, "--ms", "1,2")
    assert first.exit_code == 0, first.output
    found = list(read_records(record))
    assert [(r.bench, len(r.rows)) for r in found] == [("sweep", 4), ("sweep-summary", 2)]
    again = lq_eval(*common, "--ms", "1,2,4", "--resume", record)
    assert again.exit_code == 0, again.output
    assert "2 of 2 points" in again.output
    rows, summary = list(read_records(record))[2:]
    assert [(r["op"], r["m"]) for r in rows.rows] == [("int4", 4), ("int8", 4)]
    assert [r["points"] for r in summary.rows] == [3, 3]


@pytest.mark.gpu
def test_sweep_on_a_gpu():
    rows = list(
        run_sweep(
            options(ms=(1, 16), dtype=torch.bfloat16, device=torch.device("cuda"), shapes=parse_shapes("256x256"))
        )
    )
    assert len(rows) == 4
    assert all(r.us and r.dense_us and not r.note for r in rows)

"""Tuning tables: what a file may hold, which table serves a GPU, and what a measurement changes and cannot change."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from lq_formats import FormatError, QuantSpec, SpecError
from lq_formats.errors import UnknownVersionError
from lq_kernels import Arch, Problem, cost, env, explain, plans, select
from lq_kernels.cuda import constraints, decode_a16, linear_a8, prefill_a16
from lq_kernels.tuned import lookup, table
from lq_kernels.tuned.kernels import TUNABLES, fields_of, weight
from lq_kernels.tuned.lookup import source_digests, tables, user_path
from lq_kernels.tuned.table import Point, Stamp, Table, Weight, dump, parse, read, write

BF16 = torch.bfloat16
H200 = Arch("cuda", (9, 0), "NVIDIA H200", 132)
H100 = Arch("cuda", (9, 0), "NVIDIA H100 80GB HBM3", 132)
STAMP = Stamp("NVIDIA H200", 132, "0.1.0", "2.11.0", "CUDA 13.0", "2026-11-21")
W4 = weight(4, 128, 4096, 4096)


def problem(m, arch=H200, n=4096, k=4096, group=128, op="preshuffled"):
    return Problem(op, m, n, k, QuantSpec(4, "group", group, True, BF16), BF16, arch)


def cuts(kernel, m, each=W4):
    """A kernel's cuts, as a table holds them, in the order of its model."""
    return [fields_of(config) for config in TUNABLES[kernel].ranked(each, m, 132)]


def table_of(*points, stamp=STAMP, digests=None):
    found = Table(stamp)
    for kernel, each, point in points:
        found = found.merged(stamp, kernel, (digests or source_digests())[kernel], each, point)
    return found


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Empty folders for the user's tables and for those that ship; kernels are chosen as if a compiler were there."""
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LQ_DISABLE_CACHE", raising=False)
    monkeypatch.setattr(lookup, "SHIPPED_FOLDER", tmp_path / "shipped")
    monkeypatch.setattr(constraints, "why_not_compile", lambda: None)
    lookup.forget()
    yield tmp_path
    lookup.forget()


def ship(folders, name, content):
    write(content, folders / "shipped" / f"{name}.json")
    lookup.forget()


def save(content, device="NVIDIA H200"):
    write(content, user_path(device))
    lookup.forget()


# ---- the file ----

FULL = table_of(
    ("decode_a16", W4, Point(1, 5.25, cuts("decode_a16", 1)[0])),
    ("decode_a16", W4, Point(16, 6.5, cuts("decode_a16", 16)[1])),
    ("prefill_a16", weight(4, 32, 64, 256, symmetric=False), Point(300, 7.0, (("ctas", 3), ("tokens", 64)))),
    ("linear_a8", weight(8, -1, 64, 256, activation="fp8"), Point(16, 0.5, (("multicast", 1),))),
    ("dequant_blas", W4, Point(2048, 191.125)),
)


def test_a_table_survives_its_file(tmp_path):
    write(FULL, tmp_path / "t.json")
    assert read(tmp_path / "t.json") == FULL
    assert parse(dump(Table(STAMP)).encode()) == Table(STAMP)
    assert len(dump(FULL).splitlines()) < 30, "a weight a line"


def test_points_are_merged_in_order_and_replace_older_ones():
    again = FULL.merged(STAMP, "decode_a16", "new", W4, Point(4, 5.5, cuts("decode_a16", 4)[0]))
    again = again.merged(STAMP, "decode_a16", "new", W4, Point(1, 5.0, cuts("decode_a16", 1)[2]))
    assert [(point.m, point.us) for point in again.points["decode_a16", W4]] == [(1, 5.0), (4, 5.5), (16, 6.5)]
    assert again.sources["decode_a16"] == "new"
    fresh = again.without_stale(source_digests())
    assert again.merged(STAMP, "decode_a16", "new", W4, Point(32, 9.0, (("tiles", 1),))).points["decode_a16", W4] == (
        Point(32, 9.0, (("tiles", 1),)),
    ), "cuts of other fields"
    assert ("decode_a16", W4) not in fresh.points
    assert ("dequant_blas", W4) in fresh.points


def test_points_are_made_for_the_weights_that_are_looked_up(folders, monkeypatch):
    made = []
    monkeypatch.setattr(table, "Point", lambda m, us, cut: made.append(m) or Point(m, us, cut))
    ship(folders, "h200", FULL)
    assert next(lookup.measurements("decode_a16", 9, W4, H200.name, 132)).point == FULL.points["decode_a16", W4][1]
    assert sorted(made) == [1, 16], "of FULL's five"
    next(lookup.measurements("decode_a16", 1, W4, H200.name, 132))
    assert len(made) == 2, "once"
    parsed = parse(dump(FULL).encode())
    assert parsed.points.get(("decode_a16", weight(8, -1, 64, 256))) is None
    assert dict(parsed.points) == dict(FULL.points)
    assert parsed != parse(dump(table_of(("decode_a16", W4, Point(1, 5.25)))).encode())


def broken(**changes):
    found = json.loads(dump(FULL))
    for name, value in changes.items():
        if name in found:
            found[name] = value
        else:
            found["entries"][0][name] = value
    return json.dumps(found).encode()


HOSTILE = {
    "empty": b"",
    "binary": b"\x7fELF\xff\xfe" * 10,
    "deep": b"[" * 200_000,
    "another-format": b'{"format": "gguf"}',
    "an-array": b"[]",
    "half": dump(FULL).encode()[:-40],
    "huge-integer": b'{"format": ' + b"9" * 10_000 + b"}",
    "nan": broken().replace(b"5.25", b"NaN"),
    "infinite-time": broken().replace(b"5.25", b"1e999"),
    "time-beyond-floats": broken(us=[10**400, 6.0]),
    "no-time": broken(us=[0, 1.0]),
    "text-for-time": broken(us=["5", 6.0]),
    "boolean-for-time": broken(us=[True, 6.0]),
    "too-few-times": broken(us=[5.0]),
    "descending": broken(m=[16, 1]),
    "twice-the-same": broken(m=[1, 1]),
    "zero-tokens": broken(m=[0, 1]),
    "float-tokens": broken(m=[1.0, 2]),
    "no-points": broken(m=[], us=[], cut={}),
    "unknown-kernel": broken(kernel="rm_rf"),
    "list-for-kernel": broken(kernel=["decode_a16"]),
    "object-for-kernel": broken(kernel={}),
    "negative-size": broken(n=-16),
    "odd-size": broken(n=4097),
    "huge-size": broken(k=2**40),
    "text-for-size": broken(k="4096"),
    "text-for-zero": broken(zero="no"),
    "three-bits": broken(bits=3),
    "deep-bits": broken(bits="DEEP").replace(b'"DEEP"', b"[" * 800 + b"]" * 800),
    "more-keys": broken(more=1),
    "negative-cut": broken(cut={"tokens": [-1, 1]}),
    "ragged-cut": broken(cut={"tokens": [1]}),
    "cut-of-text": broken(cut={"tokens": ["1", "2"]}),
    "no-cut": broken(cut=None),
    "no-digest": broken(sources={}),
    "digest-of-another-kind": broken(sources={"decode_a16": 5}),
    "stamp-without-keys": broken(stamp={}),
    "stamp-with-lists": broken(stamp={**dataclasses.asdict(STAMP), "device": ["NVIDIA H200"]}),
    "stamp-without-multiprocessors": broken(stamp={**dataclasses.asdict(STAMP), "sm_count": 0}),
    "long-text": broken(stamp={**dataclasses.asdict(STAMP), "date": "x" * 1000}),
    "entries-of-numbers": broken(entries=[1, 2]),
    "an-entry-twice": broken(entries=json.loads(dump(FULL))["entries"][:1] * 2),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_file_that_is_no_table_is_a_named_error_that_says_how_to_get_rid_of_it(content):
    path = user_path("NVIDIA H200")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(
        FormatError, match=r"nvidia-h200\.json is not a tuning table .*delete the file.*lq-kernels tune"
    ):
        select(problem(1))
    path.unlink()
    lookup.forget()
    assert select(problem(1)).name == "cuda-decode"


def test_sizes_are_checked_before_a_file_is_read(monkeypatch):
    path = user_path("NVIDIA H200")
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would not fit into memory
    with pytest.raises(FormatError, match="more than"):
        tables("NVIDIA H200", 132)
    monkeypatch.setattr(table, "MAX_ENTRIES", 2)
    with pytest.raises(FormatError, match="at most 2"):
        parse(dump(FULL).encode())


def test_another_version_is_named():
    with pytest.raises(UnknownVersionError, match="version '2', this release reads 1"):
        parse(dump(FULL).replace('"version": 1', '"version": 2').encode())
    with pytest.raises(SpecError, match="no weight"):
        Weight(5, 1, False, 32, "", 16, 16)


def test_a_file_is_written_in_one_step(tmp_path, monkeypatch):
    write(FULL, tmp_path / "t.json")
    monkeypatch.setattr(table.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write(Table(STAMP), tmp_path / "t.json")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["t.json"]
    assert read(tmp_path / "t.json") == FULL


# ---- which table ----


def test_without_a_table_nothing_is_measured_and_nothing_is_read_at_import(folders):
    assert tables("NVIDIA H200", 132) == ()
    assert tables("", 132) == ()
    found = explain(problem(16))
    assert found.source == "model"
    assert "by its cost model" in str(found)


def test_the_users_table_comes_before_the_one_that_ships(folders):
    mine, theirs = cuts("decode_a16", 16)[2], cuts("decode_a16", 16)[3]
    ship(
        folders, "h200", table_of(("decode_a16", W4, Point(16, 7.0, theirs)), ("decode_a16", W4, Point(8, 6.0, theirs)))
    )
    assert explain(problem(16)).source == "h200.json"
    assert fields_of(decode_a16.choice_of(problem(16)).config) == theirs
    save(table_of(("decode_a16", W4, Point(16, 6.5, mine))))
    found = explain(problem(16))
    assert (found.source, found.predicted_us) == ("nvidia-h200.json", 6.5)
    assert fields_of(decode_a16.choice_of(problem(16)).config) == mine
    assert f"clusters={dict(mine)['clusters']}" in found.cut


def test_the_cache_can_be_switched_off(monkeypatch):
    save(table_of(("decode_a16", W4, Point(16, 6.5, cuts("decode_a16", 16)[2]))))
    assert explain(problem(16)).source != "model"
    monkeypatch.setenv("LQ_DISABLE_CACHE", "1")
    lookup.forget()
    assert explain(problem(16)).source == "model"


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("~no-such-user-of-lq/cache", "home directory that cannot be found"),
        ("/" + "long" * 100, "cannot be looked for"),
    ],
)
def test_a_folder_that_cannot_be_used_costs_a_warning_and_the_users_table(folders, monkeypatch, folder, message):
    ship(folders, "h200", table_of(("decode_a16", W4, Point(16, 6.5, cuts("decode_a16", 16)[2]))))
    monkeypatch.setenv("LQ_CACHE_DIR", folder)
    monkeypatch.setattr(env, "_warned", False)
    with pytest.warns(UserWarning, match=message) as caught:
        assert explain(problem(16)).source == "h200.json"
    assert len(caught) == 1
    assert "LQ_CACHE_DIR" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(problem(1)).name == "cuda-decode"
        monkeypatch.setattr(env, "_warned", False)
        monkeypatch.setenv("LQ_DISABLE_CACHE", "1")
        lookup.forget()
        assert explain(problem(16)).source == "h200.json"


def test_a_folder_that_may_not_be_searched_costs_a_warning(monkeypatch):
    before = Path.stat

    def refused(path, **options):
        if path.name == "nvidia-h200.json":
            raise PermissionError(13, "Permission denied")
        return before(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.warns(UserWarning, match=r"cannot be looked for in .*tuned \(Permission denied\)") as caught:
        assert explain(problem(16)).source == "model"
    assert len(caught) == 1


def test_a_table_of_a_related_gpu_gives_cuts_but_no_times(folders):
    other = cuts("decode_a16", 16)[4]
    ship(folders, "h200", table_of(("decode_a16", W4, Point(16, 6.0, other)), ("dequant_blas", W4, Point(16, 0.1))))
    assert fields_of(decode_a16.choice_of(problem(16, H100)).config) == other
    assert plans.decode(problem(16, H100)).us == cost.decode_us(problem(16, H100))
    assert explain(problem(16, H100)).source == "model"
    own = dataclasses.replace(STAMP, device=H100.name)
    ship(folders, "h100", table_of(("decode_a16", W4, Point(16, 6.0, cuts("decode_a16", 16)[5])), stamp=own))
    assert explain(problem(16, H100)).source == "h100.json"


def test_another_number_of_multiprocessors_is_another_gpu(folders):
    content = table_of(("decode_a16", W4, Point(16, 6.0, cuts("decode_a16", 16)[4])))
    ship(folders, "h200", content)
    assert tables("NVIDIA H200", 132)
    assert tables("NVIDIA H100 PCIe", 114) == ()
    save(content, "NVIDIA H100 PCIe")
    with pytest.warns(UserWarning, match=r"nvidia-h100-pcie\.json was measured on NVIDIA H200 with 132"):
        assert tables("NVIDIA H100 PCIe", 114) == ()


def test_measurements_of_other_sources_are_left_out_with_one_warning(folders):
    digests = {**source_digests(), "decode_a16": "0123456789abcdef"}
    cut = cuts("prefill_a16", 16)[1]
    points = (("decode_a16", W4, Point(16, 0.1, cuts("decode_a16", 16)[4])), ("prefill_a16", W4, Point(16, 0.2, cut)))
    ship(folders, "h200", table_of(*points, digests=digests))
    with pytest.warns(UserWarning, match=r"h200\.json was measured with other sources of decode_a16 than") as caught:
        found = explain(problem(16))
    assert len(caught) == 1
    assert (found.chosen, found.predicted_us, found.source) == ("cuda-prefill", 0.2, "h200.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(problem(8))


def test_the_digest_follows_the_code_and_not_the_comments(tmp_path, monkeypatch):
    from lq_kernels.jit import compiler

    (tmp_path / "lq").mkdir()
    monkeypatch.setattr(compiler, "SOURCE_FOLDER", tmp_path)
    monkeypatch.setattr(compiler, "INCLUDE_FOLDER", tmp_path)

    def digest(source, header):
        (tmp_path / "k.cu").write_text(source)
        (tmp_path / "lq" / "h.cuh").write_text(header)
        return lookup._digest("k")

    first = digest('#include "lq/h.cuh"\nint a; // one\n', "int b;")
    assert digest('#include "lq/h.cuh"\n\n/* two\n lines */ int   a;\n', "int b;  // b") == first
    assert digest('#include "lq/h.cuh"\nint c;\n', "int b;") != first
    assert digest('#include "lq/h.cuh"\nint a;\n', "int c;") != first


# ---- what a measurement changes ----


def test_a_measured_time_decides_between_kernels(folders):
    def took(**times):
        names = {"decode": "decode_a16", "prefill": "prefill_a16"}
        return table_of(*((names[k], W4, Point(64, us, cuts(names[k], 64)[0])) for k, us in times.items()))

    ship(folders, "h200", took(decode=30.0, prefill=9.0))
    assert select(problem(64)).name == "cuda-prefill"
    ship(folders, "h200", took(decode=9.0, prefill=30.0))
    assert select(problem(64)).name == "cuda-decode"
    for op in ("int4", "preshuffled"):
        assert explain(problem(64, op=op)).predicted_us == 9.0
    slow = took(decode=30.0, prefill=30.0)
    ship(folders, "h200", slow.merged(STAMP, "dequant_blas", source_digests()["dequant_blas"], W4, Point(64, 8.0)))
    assert select(problem(64)).name == "dequant-blas"
    # Other weights, dtypes of scales and forms of zeros are other problems.
    for other in (problem(64, n=8192), problem(64, group=64), problem(64, n=4070)):
        assert explain(other).source == "model"
    assert explain(problem(64, n=4090)).predicted_us == 8.0, "padded to blocks of 16 rows"


def test_a_model_does_not_win_against_measurements(folders, monkeypatch):
    from lq_kernels.triton import constraints as triton_constraints

    monkeypatch.setattr(triton_constraints, "_installed", lambda: True)
    flattered = problem(64, n=512, op="int4")
    lookup.forget()
    by_models = explain(flattered)
    assert by_models.predicted_us < 10
    each = weight(4, 128, 512, 4096)
    ship(folders, "h200", table_of(("prefill_a16", each, Point(64, 11.0, cuts("prefill_a16", 64, each)[0]))))
    found = explain(flattered)
    assert (found.chosen, found.predicted_us) == ("cuda-prefill", 11.0)
    assert select(flattered).name == "cuda-prefill"
    assert dict(found.rejected)["triton-splitk"].startswith("not measured, predicted ")
    assert select(flattered, "triton-splitk").name == "triton-splitk"


def test_a_point_serves_fewer_tokens_that_are_more_than_half_as_many(folders):
    points = [("prefill_a16", W4, Point(m, us, cuts("prefill_a16", m)[0])) for m, us in ((64, 10.0), (512, 40.0))]
    ship(folders, "h200", table_of(*points))
    asked = {m: prefill_a16.choice_of(problem(m)).measured for m in (1, 32, 33, 64, 65, 256, 500, 511, 512, 513)}
    served = {m: found and found.point.m for m, found in asked.items()}
    assert not Point(64, 10.0).covers(32)
    assert Point(64, 10.0).covers(33)
    assert served == {1: None, 32: None, 33: 64, 64: 64, 65: None, 256: None, 500: 512, 511: 512, 512: 512, 513: None}
    assert plans.prefill(problem(512)).us == 40.0
    between = plans.prefill(problem(300))
    expected = 40.0 * cost.prefill_us(problem(300)) / cost.prefill_us(problem(512))
    assert (between.us, between.source) == (pytest.approx(expected), "h200.json")
    assert between.us <= 40.0


def test_fewer_tokens_take_no_more_than_was_measured_whatever_the_model_says(folders, monkeypatch):
    ship(folders, "h200", table_of(("prefill_a16", W4, Point(512, 40.0, cuts("prefill_a16", 512)[0]))))
    save(table_of(("decode_a16", W4, Point(32, 12.0, cuts("decode_a16", 32)[0]))))
    for m, plan in ((300, plans.prefill), (17, plans.decode)):
        assert plan(problem(m)).source != "model"  # the cut is chosen
    monkeypatch.setattr(cost, "prefill_us", lambda problem: 1000.0 - problem.m)
    monkeypatch.setattr(cost, "decode_us", lambda problem: 1000.0 - problem.m)
    assert plans.prefill(problem(300)).us == 40.0
    assert plans.decode(problem(17)).us == 12.0


def test_decode_gains_less_from_fewer_tokens_than_its_model_says(folders):
    ship(folders, "h200", table_of(("decode_a16", W4, Point(32, 12.0, cuts("decode_a16", 32)[0]))))
    share = cost.decode_us(problem(17)) / cost.decode_us(problem(32))
    assert share < 0.95
    found = plans.decode(problem(17))
    assert (found.us, found.source) == (pytest.approx(12.0 * share ** (1 / 3)), "h200.json")
    assert plans.decode(problem(32)).us == 12.0


@pytest.mark.parametrize("kernel", ["decode_a16", "prefill_a16"])
def test_what_runs_is_one_of_the_kernels_own_cuts_whatever_a_table_says(folders, kernel):
    module = {"decode_a16": decode_a16, "prefill_a16": prefill_a16}[kernel]
    for m in (1, 3, 17, 33, 64, 65, 100, 127, 128):
        for measured_at in (m, 2 * m - 1):
            for position in (0, 1, -1):
                cut = cuts(kernel, measured_at)[position]
                save(table_of((kernel, W4, Point(measured_at, 5.0, cut))))
                choice = module.choice_of(problem(m))
                found = dict(fields_of(choice.config))
                room = 0
                if kernel == "decode_a16" and choice.measured is not None:
                    # As much shared memory as when it was measured, and so much that one more CTA fits a multiprocessor where
                    # each has one: it decides how many run at once.
                    clusters = found["clusters"] * -(-m // (8 * found["token_tiles"]))
                    room = 76800 + 1024 if clusters <= {1: 132, 2: 66, 4: 30, 8: 15}[found["cluster"]] else 0
                    alike = [
                        each for each in map(dict, cuts(kernel, m)) if each | {"shared": 0} == found | {"shared": 0}
                    ]
                    least = min(each["shared"] for each in alike)
                    assert found["shared"] == max(least, dict(cut)["shared"], room)
                else:
                    assert fields_of(choice.config) in cuts(kernel, m)
                if measured_at == m:
                    shared = {"shared": max(room, dict(cut)["shared"])} if room else {}
                    assert found == {**dict(cut), **shared}
    for cut in ((), (("tokens", 77),), tuple((name, 1) for name, _ in cuts(kernel, 64)[0])):
        save(table_of((kernel, W4, Point(64, 5.0, cut))))
        choice = module.choice_of(problem(64))
        assert choice.measured is None, "its time is not that of the cut that runs"
        assert fields_of(choice.config) == cuts(kernel, 64)[0]


def test_the_order_of_tiles_is_the_table_s_as_far_as_there_are_rows(folders):
    cut = cuts("prefill_a16", 1024)[3]
    row_tiles = -(-4096 // (dict(cut)["rows"] * (1 + dict(cut)["multicast"])))
    for height, runs in ((1, 1), (7, 7), (500, row_tiles)):
        other = tuple((name, height if name == "raster" else value) for name, value in cut)
        ship(folders, "h200", table_of(("prefill_a16", W4, Point(1024, 11.0, other))))
        lookup.forget()
        for m in (1024, 1000):
            found = prefill_a16.choice_of(problem(m))
            assert found.measured is not None
            assert dict(fields_of(found.config))["raster"] == runs


def test_8_bit_tokens_have_their_own_points(folders):
    each = weight(8, -1, 4096, 4096, activation="fp8")
    spec = QuantSpec(8, "row", None, True, torch.float32)
    fp8, int8 = (
        Problem("int8_dynamic", 256, 4096, 4096, spec, BF16, H200, activation) for activation in ("fp8", "int8")
    )
    cut = cuts("linear_a8", 256, each)[3]
    ship(folders, "h200", table_of(("linear_a8", each, Point(256, 11.0, cut))))
    assert fields_of(linear_a8.choice_of(fp8).config) == cut
    found = explain(fp8)
    assert found.predicted_us == 11.0 + linear_a8.quantize_us(fp8)
    assert found.source == "h200.json"
    assert explain(int8).source == "model"
    # The order of tiles is the table's, as far as there are rows.
    for height, runs in ((1, 1), (7, 7), (500, -(-4096 // (128 * (1 + dict(cut)["multicast"]))))):
        other = tuple((name, height if name == "raster" else value) for name, value in cut)
        ship(folders, "h200", table_of(("linear_a8", each, Point(256, 11.0, other))))
        lookup.forget()
        assert dict(fields_of(linear_a8.choice_of(fp8).config)) == {**dict(cut), "raster": runs}
    # Sums that are not promoted as usual were not measured.
    assert linear_a8.choice(256, 4096, 4096, 8, "fp8", False, False, 0, 132, H200.name).measured is None


def test_looking_up_costs_nothing_once_chosen(folders, monkeypatch):
    ship(folders, "h200", FULL)
    first = decode_a16.choice_of(problem(1))
    monkeypatch.setattr(lookup, "read", None)
    monkeypatch.setattr(decode_a16, "candidates", None)
    assert decode_a16.choice_of(problem(1)) is first

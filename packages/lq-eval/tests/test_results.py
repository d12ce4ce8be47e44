import json
import math

import lq_eval.results as results
import pytest
from lq_eval.results import append_record, check_target, environment, read_records
from lq_formats import FormatError, SpecError


def test_records_round_trip(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    append_record(path, "gemm", [{"m": 1, "us": 2.5}])
    append_record(path, "gemm", [{"m": 2, "us": math.nan, "note": "é"}])
    first, second = read_records(path)
    assert first.bench == second.bench == "gemm"
    assert list(first.rows) == [{"m": 1, "us": 2.5}]
    assert list(second.rows) == [{"m": 2, "us": None, "note": "é"}]
    assert first.environment == environment()


def test_the_environment_says_where_and_with_what():
    found = environment()
    assert {"date", "gpu", "driver", "torch", "triton", "python", "git", "lq-formats", "lq-kernels"} <= set(found)
    json.dumps(dict(found), allow_nan=False)


def test_outside_of_a_checkout_there_is_no_commit(monkeypatch):
    monkeypatch.setattr(results, "_output", lambda *command: None)
    assert results.git_commit() is None
    assert results.driver_version() is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"bench": "gemm", "environment',
        b'{"bench": "gemm"}',
        b'{"bench": "a", "environment": 1, "rows": []}',
        b'{"bench": "a", "environment": {}, "rows": [{}, 3]}',
        b"[]",
        b'{"bench": "\xff"}',
        b"[" * 100_000,
        b'{"bench": "a", "environment": {}, "rows": [%s]}' % (b"[" * 100_000),
        b'{"bench": "a", "environment": {}, "rows": [{"m": %s}]}' % (b"1" * 5000),
        b'{"bench": "a", "environment": {}, "rows": [%s%s]}' % (b"[" * 900, b"]" * 900),
    ],
    ids=["cut", "keys", "types", "row", "list", "not UTF-8", "nested", "nested rows", "digits", "nested row"],
)
def test_a_damaged_line_is_named_by_number(tmp_path, line):
    path = tmp_path / "records.jsonl"
    append_record(path, "gemm", [])
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(FormatError, match="line 2"):
        list(read_records(path))


def test_the_commit_can_be_named_where_there_is_no_checkout(monkeypatch):
    monkeypatch.setattr(results, "_output", lambda *command: None)
    monkeypatch.setenv("LQ_GIT_COMMIT", "0123456789ab")
    assert results.git_commit() == "0123456789ab"
    monkeypatch.setenv("LQ_GIT_COMMIT", " ")
    assert results.git_commit() is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [(".", "it is a folder"), ("file/a/b.jsonl", "file' is no folder"), ("x" * 300, "name too long")],
    ids=["folder", "below a file", "name"],
)
def test_a_file_that_cannot_be_written_is_refused(tmp_path, name, reason):
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match=f"(?i)cannot write .*{reason}"):
        check_target(tmp_path / name)
    with pytest.raises(SpecError, match="cannot write"):
        append_record(tmp_path / name, "gemm", [])


def test_a_file_that_can_be_written_is_not_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("records.jsonl", "new/folder/records.jsonl", tmp_path / "new" / "records.jsonl"):
        check_target(path)
    assert list(tmp_path.iterdir()) == []

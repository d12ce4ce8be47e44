import sys
import types

import pytest
import torch
from lq_eval.corpus import load_text, load_wikitext2, make_windows
from lq_eval.errors import ModelLoadError, TextTooShortError
from lq_formats import LQError, MissingPackageError, SpecError


def test_windows_are_consecutive_and_drop_the_rest():
    windows = make_windows(torch.arange(23), 5)
    assert windows.tolist() == torch.arange(20).view(4, 5).tolist()


@pytest.mark.parametrize(("limit", "expected"), [(5, 1), (9, 1), (10, 2), (20, 4)])
def test_a_limit_rounds_down_to_whole_windows(limit, expected):
    assert make_windows(torch.arange(23), 5, limit).shape == (expected, 5)


@pytest.mark.parametrize(("seq_len", "limit"), [(5, 24), (24, None)], ids=["limit", "window"])
def test_a_text_that_is_too_short_is_named(seq_len, limit):
    with pytest.raises(TextTooShortError, match="23 tokens and 24"):
        make_windows(torch.arange(23), seq_len, limit)
    assert issubclass(TextTooShortError, LQError)


@pytest.mark.parametrize(("seq_len", "limit"), [(1, None), (8, 7)], ids=["seq-len", "limit"])
def test_nothing_to_predict_is_refused(seq_len, limit):
    with pytest.raises(SpecError):
        make_windows(torch.arange(23), seq_len, limit)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ModelLoadError, match="bytes"):
        load_text(tmp_path / "bytes")
    with pytest.raises(ModelLoadError, match="absent"):
        load_text(tmp_path / "absent")


ROWS = ["", " = Title = \n", "", " Some text , tokenized . \n"]


class _Datasets(types.ModuleType):
    """A stand-in for the datasets package that records what was asked for."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.calls: list[tuple[tuple, dict]] = []
        self.error = error

    def load_dataset(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        if self.error is not None:
            raise self.error
        return {"text": ROWS}


def test_wikitext2_from_the_hub_joins_rows_by_blank_lines(monkeypatch):
    fake = _Datasets()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert load_wikitext2("validation") == "\n\n".join(ROWS)
    assert fake.calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation"})]


def test_wikitext2_from_local_parquet(monkeypatch, tmp_path):
    fake = _Datasets()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    shard = tmp_path / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"
    shard.parent.mkdir()
    shard.touch()
    assert load_wikitext2("test", tmp_path) == "\n\n".join(ROWS)
    assert fake.calls == [(("parquet",), {"data_files": [str(shard)], "split": "train"})]


@pytest.mark.parametrize("name", ["wiki.test.raw", "test.txt", "wikitext-2-raw/wiki.test.raw"])
def test_wikitext2_from_local_text_needs_no_package(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(" \n = Title = \n \n Some text , tokenized . \n", encoding="utf-8")
    assert load_wikitext2("test", tmp_path) == "\n\n".join(ROWS)


def test_a_missing_datasets_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"lq-eval\[datasets\]"):
        load_wikitext2()


def test_an_unreachable_hub_is_a_named_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", _Datasets(ConnectionError("no route")))
    with pytest.raises(ModelLoadError, match="no route"):
        load_wikitext2()


def test_a_folder_without_the_split_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=r"wiki\.train\.raw"):
        load_wikitext2("train", tmp_path)
    with pytest.raises(SpecError, match="no split 'dev'"):
        load_wikitext2("dev")

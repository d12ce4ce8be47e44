"""The table of docs/quality.md is that of its record: each number is the newest measurement of its scheme, rounded.

``lq-eval ppl ... --json benchmarks/results/cpu-quality-0.1.0.jsonl`` appends a measurement; names are those of its schemes.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

RECORD = "benchmarks/results/cpu-quality-0.1.0.jsonl"
PAGE = "docs/quality.md"
MEASURED = {"text": "eval.txt", "tokens": 51200, "dtype": "float32"}
WINDOW = 256
INT4_SCALES = "bfloat16"
# What the columns behind the first are: the end of the scheme's name, and what of it.
COLUMNS = (
    *(("", what) for what in ("perplexity", "change_percent", "kl")),
    *(("-mse", what) for what in ("perplexity", "change_percent", "kl")),
    *(("-hqq", what) for what in ("change_percent", "kl")),
)


def newest(root: Path) -> dict[str, Mapping[str, Any]]:
    """The last measurement of each scheme, of those with the page's model, text, number of tokens and dtypes."""
    found: dict[str, Mapping[str, Any]] = {}
    for line in (root / RECORD).read_text(encoding="utf-8").splitlines():
        for row in json.loads(line)["rows"]:
            window = row.get("seq_len", row.get("window"))
            of_the_model = str(row.get("model")).endswith("tiny-llama")
            if of_the_model and window == WINDOW and all(row.get(key) == value for key, value in MEASURED.items()):
                scheme = scheme_of(row)
                if row.get("scale_dtype") == INT4_SCALES or not scheme.startswith("int4"):
                    found[scheme] = row
    return found


def scheme_of(row: Mapping[str, Any]) -> str:
    """The name of a row's scheme, without the ending that stands for the nearest scales; first rows have no names."""
    if "scheme" in row:
        return str(row["scheme"]).removesuffix("-rtn")
    zeros = "" if row["symmetric"] else "-asym"
    return f"int4-g{row['group_size']}{zeros}-{row['algorithm']}".removesuffix("-rtn")


def cells(page: str) -> Iterator[tuple[str, str, str]]:
    """Scheme, key of a record's row, and text of each number in the table."""
    table = page.partition("## Without data\n")[2].partition("\n\nThe float model")[0]
    for line in table.strip().splitlines()[2:]:
        label, *values = (cell.strip() for cell in line.strip("|").split("|"))
        assert len(values) == len(COLUMNS), line
        for (ending, key), value in zip(COLUMNS, values, strict=True):
            if value:
                yield base_of(label) + ending, key, value


def base_of(label: str) -> str:
    """The scheme of a row's label, for nearest scales."""
    if match := re.fullmatch(r"int4, group (\d+), (a?)symmetric", label):
        return f"int4-g{match[1]}" + ("-asym" if match[2] else "")
    return label.split()[0].rstrip(",").lower()


def agrees(shown: str, value: float) -> bool:
    """Whether a number is ``value``, rounded to its digits."""
    number = shown.rstrip("%")
    digits = len(number.partition(".")[2])
    return abs(float(number) - value) <= 0.5 * 10**-digits + 1e-9


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / PAGE).read_text(encoding="utf-8")


def test_every_number_of_the_table_is_its_records(root: Path, page: str) -> None:
    found = newest(root)
    wrong = []
    for scheme, key, shown in cells(page):
        value = found.get(scheme, {}).get(key)
        if value is None:
            wrong.append(f"{scheme}: the page says {shown} ({key}), {RECORD} has no such measurement")
        elif not agrees(shown, value):
            wrong.append(f"{scheme}: the page says {shown} ({key}), {RECORD} {value:.5g}")
    assert wrong == [], "\n".join(wrong)


def test_the_float_models_perplexity_is_its_records(root: Path, page: str) -> None:
    match = re.search(r"The float model has (\d+\.\d+)\.", page)
    assert match
    found = newest(root)
    value = found["float"]["perplexity"] if "float" in found else next(iter(found.values()))["float_perplexity"]
    assert agrees(match[1], value)


def test_the_table_is_read_whole(page: str) -> None:
    found = list(cells(page))
    groups = [f"int4-g{group}{zeros}" for zeros in ("", "-asym") for group in (256, 128, 32)]
    assert {scheme for scheme, _, _ in found} == {
        "q4_0",
        "int8",
        *(g + e for g in groups for e in ("", "-mse", "-hqq")),
    }
    assert len(found) == len(groups) * len(COLUMNS) + 2 * 3


@pytest.mark.parametrize(
    ("shown", "value", "same"),
    [
        ("+9.21%", 9.2146, True),
        ("+9.21%", 9.2151, False),
        (".118", 0.11751, True),
        (".118", 0.1174, False),
        (".0005", 0.00046, True),
        ("27.350", 27.3506, False),
    ],
)
def test_numbers_agree_within_their_rounding(shown: str, value: float, same: bool) -> None:
    assert agrees(shown, value) == same

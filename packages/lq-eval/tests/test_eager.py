import itertools

import pytest
import torch
from lq_eval.bench.eager import cpu_cost, run_eager
from lq_eval.bench.shapes import Shape
from lq_eval.results import read_records
from lq_formats import SpecError

CPU = torch.device("cpu")
CALLS = ["F.linear", "nn.Linear", "nn.Linear int4-g32", "int4_linear", "nn.Linear int8", "int8_gemm"]


def test_every_way_is_timed_against_the_dense_product():
    rows = list(run_eager(Shape("64x128", 64, 128), torch.float32, CPU, group_size=32, batches=1, calls=1))
    assert [row.call for row in rows] == CALLS
    assert rows[0].ratio == 1
    assert all(row.cpu_us and row.ratio == row.cpu_us / rows[0].cpu_us and not row.note for row in rows)


def test_what_cannot_run_says_why():
    rows = list(run_eager(Shape("64x100", 64, 100), torch.float32, CPU, group_size=32, batches=1, calls=1))
    by_call = {row.call: row for row in rows}
    assert by_call["int8_gemm"].cpu_us
    for call in ("nn.Linear int4-g32", "int4_linear"):
        assert by_call[call].cpu_us is None
        assert "32" in by_call[call].note


def test_the_cost_is_the_median_of_batches_per_call():
    """A clock that ticks at its own pace: batches of 2 calls last 4, 2 and 12 seconds."""
    ticks = itertools.accumulate(itertools.chain([0], *((length, 0) for length in (4, 2, 12))))
    seen = []
    found = cpu_cost({"a": lambda: seen.append(1)}, CPU, batches=3, calls=2, clock=lambda: next(ticks))
    assert found == {"a": 2e6}
    assert len(seen) == 3 + 3 * 2


def test_contenders_take_turns():
    seen = []
    cpu_cost({name: lambda name=name: seen.append(name) for name in "ab"}, CPU, batches=2, calls=1)
    assert "".join(seen[6:]) == "abab"


@pytest.mark.parametrize("changes", [{"m": 0}, {"batches": 0}, {"calls": 0}], ids=str)
def test_numbers_must_be_positive(changes):
    with pytest.raises(SpecError):
        list(run_eager(Shape("8x8", 8, 8), torch.float32, CPU, **changes))


def test_eager_is_recorded(lq_eval, tmp_path):
    record = tmp_path / "eager.jsonl"
    result = lq_eval(
        *("bench", "eager", "--shapes", "64x128,64x64", "--group-size", 64, "--batches", 1, "--calls", 1),
        *("--device", "cpu", "--json", record),
    )
    assert result.exit_code == 0, result.output
    assert [(found.bench, len(found.rows)) for found in read_records(record)] == [("eager", 6), ("eager", 6)]


@pytest.mark.gpu
def test_eager_on_a_gpu():
    rows = list(run_eager(Shape("256x256", 256, 256), torch.bfloat16, torch.device("cuda"), batches=3, calls=5))
    assert all(row.cpu_us and not row.note for row in rows)

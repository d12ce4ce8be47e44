import json
import math

import pytest
import torch
from lq_eval.bench.fused import _Weights, parse_models, run_fused, steps
from lq_eval.bench.shapes import MODELS, ModelDimensions
from lq_eval.results import read_records
from lq_formats import SpecError

CPU = torch.device("cpu")
TINY = ModelDimensions(128, 256, 64, layers=1)
WAYS = {
    "qkv": ["apart", "merged"],
    "o": ["apart", "fused"],
    "gate_up": ["apart", "merged", "fused"],
    "down": ["apart", "fused"],
}


@pytest.fixture
def timed(monkeypatch):
    """Competitors take 1 us, 2 us, ... in their order, after every call was made."""

    def times(competitors, device, **effort):
        for calls in competitors:
            for call in calls:
                call()
        return [float(i + 1) for i in range(len(competitors))]

    monkeypatch.setattr("lq_eval.bench.timing.times_us", times)


@pytest.mark.parametrize("op", ["dense", "int4", "int8"])
@pytest.mark.parametrize("step", steps(TINY), ids=lambda step: step.name)
def test_every_way_of_a_step_computes_the_same(op, step):
    """In float32 the ways differ by the order of sums and one rounding."""
    held = _Weights(op, step, torch.float32, CPU, 1)
    x, residual = torch.randn(3, step.k), torch.randn(3, step.rows[0])
    parts = [part.dequantize() if op != "dense" else part for part in held._parts[0]]
    exact = {"parts": [x.double() @ part.double().t() for part in parts]}
    if held._merged:  # it has values of its own
        merged = held._merged[0].dequantize() if op != "dense" else held._merged[0]
        exact["merged"] = list((x.double() @ merged.double().t()).split_with_sizes(step.rows, dim=-1))
    for way, calls in held.calls(x, residual).items():
        gates = exact["merged" if held._merged and way != "apart" else "parts"]
        if step.epilogue == "silu_mul":
            expected = [torch.nn.functional.silu(gates[0]) * gates[1]]
        else:
            expected = [gates[0] + residual] if step.epilogue == "add" else gates
        found = calls[0]()
        found = [found] if isinstance(found, torch.Tensor) else found
        for got, want in zip(found, expected, strict=True):
            assert (got.double() - want).norm() <= 2**-20 * want.norm(), (way, op, step.name)


def test_copies_of_a_way_are_separate():
    held = _Weights("int4", steps(TINY)[2], torch.float32, CPU, 100_000)
    x = torch.randn(1, 128)
    for calls in held.calls(x, torch.randn(1, 256)).values():
        assert len(calls) == math.ceil(100_000 / (2 * 256 * 128 // 2 + 2 * 256 * 4))
    pointers = [gated.packed.data_ptr() for gated in held._gated]
    assert len(set(pointers)) == len(pointers)


def test_steps_are_the_layers_of_a_block():
    for name, dimensions in MODELS.items():
        sizes = sorted((sum(step.rows), step.k) for step in steps(dimensions))
        assert sizes == sorted((shape.n, shape.k) for shape in dimensions.shapes(name, merged=True))


@pytest.mark.usefixtures("timed")
def test_rows_compare_with_layers_apart_and_the_fastest_dense_way():
    rows = list(run_fused("tiny", TINY, (1, 2), torch.float32, CPU, cold_bytes=1))
    assert len(rows) == 2 * sum(3 * len(ways) - (name == "gate_up") for name, ways in WAYS.items())
    for name, ways in WAYS.items():
        for op in ("int4", "int8"):
            mine = [row for row in rows if (row.step, row.op, row.m) == (name, op, 2)]
            assert [row.way for row in mine] == ways
            assert all(row.apart_us == mine[0].us and row.dense_us == 1.0 and not row.note for row in mine)
            assert [row.speedup for row in mine] == [1 / row.us for row in mine]
    (fused,) = [row for row in rows if (row.step, row.op, row.way, row.m) == ("gate_up", "int4", "fused", 1)]
    assert (fused.n, fused.k, fused.us, fused.gain) == (512, 128, 5.0, 3 / 5)
    json.dumps(fused.to_dict(), allow_nan=False)


def test_the_time_limit_ends_the_steps():
    assert list(run_fused("tiny", TINY, (1,), torch.float32, CPU, seconds=-math.inf)) == []


def test_models_are_names_or_sizes():
    found = parse_models("llama-3-8b, 128x256x64")
    assert found["llama-3-8b"] is MODELS["llama-3-8b"]
    assert found["128x256x64"] == TINY
    for text in ("", "llama", "128x256"):
        with pytest.raises(SpecError, match=r"llama-3-8b"):
            parse_models(text)
    with pytest.raises(SpecError, match="int2"):
        list(run_fused("tiny", TINY, (1,), torch.float32, CPU, ops=("int2",)))


def test_the_command_records_every_row(lq_eval, tmp_path):
    record = tmp_path / "fused.jsonl"
    common = ("bench", "fused", "--models", "128x256x64", "--ms", "1", "--ops", "int4", "--device", "cpu")
    result = lq_eval(*common, "--replays", 1, "--json", record)
    assert result.exit_code == 0, result.output
    assert "gate_up 512x128" in result.output
    rows = [row for found in read_records(record) for row in found.rows]
    assert len(rows) == 4 + 4 + 5 + 4
    assert all(row["us"] > 0 and row["gain"] == row["apart_us"] / row["us"] for row in rows)


@pytest.mark.gpu
def test_fused_on_a_gpu():
    rows = list(run_fused("small", ModelDimensions(512, 1024, 128, 1), (1, 16), torch.bfloat16, torch.device("cuda")))
    assert all(row.us and not row.note for row in rows)

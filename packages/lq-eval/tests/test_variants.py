import contextlib
import math

import lq_kernels
import pytest
import torch
from lq_eval.bench.shapes import Shape
from lq_eval.bench.timing import Steady
from lq_eval.bench.variants import VARIANTS, run_variants

CPU = torch.device("cpu")
SHAPE = Shape("64x512", 64, 512)


@pytest.fixture
def timed(monkeypatch):
    """Competitors take 1 us, 2 us, ... in their order, after every call was made; what was timed, point by point."""
    seen = []

    def times(competitors, device, **effort):
        for calls in competitors:
            for call in calls:
                call()
        seen.append(len(competitors))
        return [float(i + 1) for i in range(len(competitors))]

    monkeypatch.setattr("lq_eval.bench.timing.times_us", times)
    return seen


@contextlib.contextmanager
def no_mode():
    yield


def test_every_variant_is_timed_beside_the_usual_form(timed, monkeypatch):
    monkeypatch.setattr(lq_kernels, "batch_invariant", no_mode, raising=False)
    rows = list(run_variants(SHAPE, (1, 3), CPU, cold_bytes=1))
    assert timed == [9, 9, 3, 3, 2, 2]
    assert len(rows) == sum(timed)
    int4 = rows[:9]
    assert [(row.group_size, row.symmetric, row.dtype) for row in int4] == [
        (128, True, "bfloat16"),
        (128, True, "float16"),
        (32, True, "bfloat16"),
        (64, True, "bfloat16"),
        (256, True, "bfloat16"),
        (512, True, "bfloat16"),
        (32, False, "bfloat16"),
        (128, False, "bfloat16"),
        (128, True, "bfloat16"),
    ]
    assert [row.ratio for row in int4] == list(range(1, 10))
    assert int4[-1].batch_invariant
    assert [row.op for row in rows[18:]] == ["int8"] * 6 + ["dense"] * 4
    assert [(row.dtype, row.ratio, row.group_size, row.symmetric) for row in rows[-2:]] == [
        ("bfloat16", 1.0, 0, True),
        ("float16", 2.0, 0, True),
    ]


def test_with_many_tokens_every_variant_runs_by_itself(timed, monkeypatch):
    seen = []

    def steady(competitors, device, **effort):
        seen.append((len(competitors), effort["min_calls"]))
        return [Steady(float(i + 1), 0.1) for i in range(len(competitors))]

    monkeypatch.setattr("lq_eval.bench.timing.steady_times_us", steady)
    monkeypatch.setattr(lq_kernels, "batch_invariant", no_mode, raising=False)
    rows = list(run_variants(SHAPE, (255, 256), CPU, cold_bytes=1))
    assert timed == [9, 3, 2]
    assert seen == [(9, 16), (3, 16), (2, 16)]
    assert [row.us for row in rows if row.op == "int8" and row.m == 256] == [1.0, 2.0, 3.0]


@pytest.mark.usefixtures("timed")
def test_the_batch_invariant_mode_is_on_while_its_variant_runs(monkeypatch):
    inside, seen = [], []

    @contextlib.contextmanager
    def mode():
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(lq_kernels, "batch_invariant", mode, raising=False)
    monkeypatch.setattr("lq_eval.bench.operands.int8_gemm", lambda *args, **kwargs: seen.append(bool(inside)))
    list(run_variants(SHAPE, (1,), CPU, ops=("int8",), cold_bytes=1))
    assert seen == [False] * 4 + [True] * 2
    assert not inside


@pytest.mark.usefixtures("timed")
def test_what_cannot_run_says_why(monkeypatch):
    monkeypatch.delattr(lq_kernels, "batch_invariant", raising=False)
    rows = list(run_variants(Shape("64x96", 64, 96), (1,), CPU, cold_bytes=1))
    every = [(op, variant) for op, variants in VARIANTS.items() for variant in variants]
    assert [row.op for row in rows] == [op for op, _ in every]
    by_variant = dict(zip((variant for _, variant in every), rows, strict=True))
    for variant, row in by_variant.items():
        if variant.batch_invariant:
            assert "batch_invariant" in row.note or "128" in row.note
        elif variant.product and variant.product.op == "int4" and variant.product.group_size in (64, 128, 256):
            assert str(variant.product.group_size) in row.note
        else:
            assert row.us
            assert not row.note
    assert by_variant[VARIANTS["int4"][2]].ratio is None  # groups of 32 fit, the usual form does not


@pytest.mark.usefixtures("timed")
def test_the_time_limit_ends_the_variants():
    assert list(run_variants(SHAPE, (1,), CPU, seconds=-math.inf)) == []


@pytest.mark.gpu
def test_variants_on_a_gpu():
    rows = list(run_variants(Shape("256x512", 256, 512), (1, 16), torch.device("cuda"), replays=1))
    assert all(row.us and not row.note for row in rows if not row.batch_invariant)

"""The loops over columns in Triton, held against those in torch and against float64.

On a GPU, and on a CPU in Triton's interpreter. Triton reads TRITON_INTERPRET when it is imported, so for that this file is
run once more in a process of its own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from lq_formats import QuantSpec, choose_qparams
from lq_torch.calibrate import columns
from lq_torch.calibrate.moments import factor_inverse
from lq_torch.calibrate.solve import Quantized, descend, gptq_codes, output_error

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package 'triton' is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_every_device = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
)


@pytest.fixture
def use_triton(monkeypatch):
    """Return a function that says whether the loops are Triton's or torch's, wherever the tensors are."""

    def choose(wanted):
        monkeypatch.setattr(columns, "why_not_columns", lambda device, dtype: None if wanted else "torch's are wanted")

    return choose


def _halves(shape, largest, generator):
    """Return multiples of 1/2: what the loops make of these stays exact in float32 (seen in 600 draws)."""
    return torch.randint(-2 * largest, 2 * largest + 1, shape, generator=generator) / 2


def _powers(shape, lowest, highest, generator):
    return torch.exp2(torch.randint(lowest, highest + 1, shape, generator=generator).float())


def _sparse(size, share, generator):
    kept = torch.rand(size, size, generator=generator) < share
    return kept * (torch.randint(0, 2, (size, size), generator=generator) * 2.0 - 1.0)


# Less for the interpreter, which is slow.
SHAPES = pytest.mark.parametrize(("width", "rows"), [(64, 9) if INTERPRETED else (128, 13), (37, 8), (1, 1)], ids=str)


@on_every_device
@SHAPES
def test_fixed_columns_are_exact_where_float32_is(width, rows, device, use_triton):
    """Bit for bit, halves and all: every value is a small multiple of a power of two."""
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
    free = _halves((width, rows), 8, generator)
    scales, zeros = _powers((3, rows), -1, 1, generator), _halves((3, rows), 4, generator) + 4
    groups = torch.randint(0, 3, (width,), generator=generator)
    factor = _sparse(width, 0.03, generator).triu(1) + torch.diag(_powers((width,), 0, 1, generator))
    found = {}
    for triton, dtype in ((True, torch.float32), (False, torch.float64)):
        use_triton(triton)
        moved = free.to(device, dtype, copy=True)
        codes = torch.full_like(moved, -1)
        arguments = [each.to(device, dtype) for each in (scales, zeros)]
        columns.fix_columns(moved, codes, *arguments, groups.to(device), factor.to(device, dtype), 7)
        found[triton] = codes.double(), moved.double()
    assert found[False][1].abs().max() < 1 << 12  # or float32 might have rounded
    assert torch.equal(found[True][0], found[False][0])
    assert torch.equal(found[True][1], found[False][1])


@on_every_device
@SHAPES
def test_improved_columns_are_exact_where_float32_is(width, rows, device, use_triton):
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
    gradient, scale = _halves((width, rows), 8, generator), _powers((rows,), -1, 1, generator)
    codes = torch.randint(0, 16, (width, rows), generator=generator)
    upper = _sparse(width, 0.05, generator).triu(1)
    hessian = upper + upper.t() + torch.diag(_powers((width,), -1, 1, generator))
    found = {}
    for triton, dtype in ((True, torch.float32), (False, torch.float64)):
        use_triton(triton)
        change, best = gradient.to(device, dtype, copy=True), codes.to(device, dtype, copy=True)
        columns.improve_columns(change, best, scale.to(device, dtype), hessian.to(device, dtype), 15)
        found[triton] = best.double(), change.double()
    assert torch.equal(found[True][0], found[False][0])
    assert torch.equal(found[True][1], found[False][1])
    assert width == 1 or not torch.equal(found[True][0], codes.to(device).double())


def _problem(rows, width, spec):
    """Return a weight, the Hessian of correlated inputs of very different size, and where to start."""
    mixing = torch.randn(width, width) / width**0.5 + torch.eye(width)
    x = torch.randn(4 * width, width) @ mixing * torch.logspace(-1, 1, width)[torch.randperm(width)]
    w = torch.randn(rows, width)
    scale, zero = choose_qparams(w, spec)
    return w, x.t() @ x / len(x), scale, torch.full_like(scale, spec.midpoint) if zero is None else zero


CASES = [
    pytest.param(4, 32, 160, True, True, id="int4-g32-sym-act-order"),
    pytest.param(3, 64, 64, False, True, id="int3-g64-asym-act-order"),
    pytest.param(4, 128, 256, True, False, id="int4-g128-sym-in-order"),
    pytest.param(4, 144, 144, True, True, id="int4-row-sym-act-order"),
    pytest.param(8, 72, 72, False, False, id="int8-row-asym-in-order"),
]


@on_every_device
@pytest.mark.parametrize(("bits", "group", "width", "symmetric", "ordered"), CASES)
def test_codes_are_those_of_float64(bits, group, width, symmetric, ordered, device, use_triton):
    """The codes of float64 but for the few rows where rounding decides a tie, and those are no worse."""
    spec = QuantSpec(bits, "group", group, symmetric, torch.float32)
    w, hessian, scale, zero = (each.to(device) for each in _problem(5, width, spec))
    order = hessian.diagonal().argsort(descending=True) if ordered else torch.arange(width, device=device)
    upper, _ = factor_inverse(hessian[order][:, order], 0.01)
    found = []
    for triton, dtype in ((True, torch.float32), (False, torch.float64)):
        use_triton(triton)
        solved = gptq_codes(w.to(dtype), scale.to(dtype), zero.to(dtype), spec, upper.to(dtype), order)
        found.append((solved, descend(solved, w.to(dtype), hessian.to(dtype), spec, sweeps=1)))
    for ours, exact in zip(*found, strict=True):
        assert int((ours.codes != exact.codes).any(1).sum()) <= 3
        assert _error(ours, w, hessian) == pytest.approx(_error(exact, w, hessian), rel=2e-2)
    assert _error(found[0][1], w, hessian) < _error(found[0][0], w, hessian)


def _error(found: Quantized, w, hessian):
    return float(output_error(found.values().double(), w.double(), hessian.double()).sum())


@on_every_device
def test_a_weight_without_rows_stays_one(device, use_triton):
    use_triton(True)
    empty, square = torch.empty(5, 0, device=device), torch.eye(5, device=device)
    columns.improve_columns(empty, empty.clone(), torch.empty(0, device=device), square, 15)
    groups = torch.zeros(5, dtype=torch.int64, device=device)
    columns.fix_columns(empty, empty.clone(), empty[:1], empty[:1], groups, square, 15)


@pytest.mark.skipif(INTERPRETED, reason="this is what it runs")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

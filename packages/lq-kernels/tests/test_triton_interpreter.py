"""The Triton kernels' arithmetic on a CPU, in Triton's interpreter: odd shapes, tails and every kind of group.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the cases run in a process of their own, once a module, and
report their errors. bfloat16 is left to the GPU tests: the interpreter truncates where hardware rounds.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package 'triton' is not installed")

SCRIPT = """
import json, sys
import torch
import lq_formats as f
from lq_kernels import Arch
from lq_kernels.reference import int4_spec
from lq_kernels.triton import int4, int8

torch.set_num_threads(1)
splits = []
for module in (int4, int8):
    # A GPU of many multiprocessors: K is split, where it is long enough.
    module.Arch = type("FakeArch", (), {"of": staticmethod(lambda device: Arch("cuda", (9, 0), "fake", 132))})
    module.reduce_split = lambda parts, out, reduce=module.reduce_split: (splits.append(parts.shape[0]), reduce(parts, out))
op, seed = sys.argv[1], int(sys.argv[2])
generator = torch.Generator().manual_seed(seed)
errors = {}

def randn(*shape):
    return torch.randn(shape, generator=generator)

def note(case, y, reference, x):
    assert y.shape == reference.shape and y.dtype == x.dtype, case
    errors[case] = ((y.double() - reference).norm() / reference.norm()).item()

NAMES = {torch.float32: "fp32", torch.float16: "fp16"}

def run_int4(n, k, group, symmetric, dtype, tokens):
    spec = int4_spec(group, k, symmetric, dtype)
    w = randn(n, k)
    scale, zero = f.choose_qparams(w, spec)
    codes = f.quantize_affine(w, scale, zero, spec)
    qweight = f.pack_int4(codes)
    dense = f.dequantize_affine(codes, scale, zero, spec, torch.float64)
    label = f"N{n}-K{k}-g{group}-{'sym' if symmetric else 'asym'}-{NAMES[dtype]}"
    unpacked = int4.dequantize_int4(qweight, scale, zero, group, k, dtype)
    assert unpacked.dtype == dtype
    errors[f"dequantize-{label}"] = 0.0 if torch.equal(
        unpacked, f.dequantize_affine(codes, scale, zero, spec, dtype)) else float("inf")
    for m in tokens:
        x = randn(m, k).to(dtype)
        few = (int4.gemv,) if m * n < 200 else ()  # it takes as many steps here as there are products of a row
        for launcher in (*few, int4.splitk, int4.gemm, *((int4.invariant,) if m > 1 else ())):
            note(f"{launcher.__name__}-{label}-M{m}", launcher(x, qweight, scale, zero, group), x.double() @ dense.t(), x)

def run_int8(n, k, granularity, dtype, tokens):
    quantize = f.quantize_weight_per_channel if granularity == "row" else f.quantize_weight_per_tensor
    q, scale = quantize(randn(n, k))
    q[0, :2] = torch.tensor([-128, 127], dtype=torch.int8)
    dense = f.dequantize_weight_int8(q, scale, torch.float64)
    label = f"N{n}-K{k}-{granularity}-{NAMES[dtype]}"
    errors[f"dequantize-{label}"] = 0.0 if torch.equal(
        int8.dequantize_int8(q, scale, dtype), f.dequantize_weight_int8(q, scale, dtype)) else float("inf")
    for m in tokens:
        x = randn(m, k).to(dtype)
        few = (int8.gemv,) if m * n < 200 else ()
        for launcher in (*few, int8.splitk, int8.gemm, *((int8.invariant,) if m > 1 else ())):
            note(f"{launcher.__name__}-{label}-M{m}", launcher(x, q, scale), x.double() @ dense.t(), x)

if op == "int4":
    shapes = ((65, 128, 128), (33, 96, 24), (48, 96, 32), (7, 13, 13), (17, 144, 16), (9, 100, 100))
    for dtype, some in ((torch.float32, shapes), (torch.float16, shapes[1::2])):
        for n, k, group in some:
            for symmetric in (True, False):
                run_int4(n, k, group, symmetric, dtype, (1, 17) if symmetric else (3,))
    # Enough steps of K for split-K to share them.
    run_int4(5, 1056, 32, False, torch.float32, (3,))
    run_int4(5, 1040, 1040, True, torch.float16, (3,))
else:
    for dtype in (torch.float32, torch.float16):
        for n, k, granularity in ((33, 100, "row"), (65, 64, "tensor"), (1, 7, "row")):
            run_int8(n, k, granularity, dtype, (1, 17))
    run_int8(5, 1030, "row", torch.float32, (3,))
assert max(splits) >= 4, "K was never split"
print(json.dumps(errors))
"""

# Relative to the exact product: sums are fp32, results are rounded once to fp16.
TOLERANCE = {"fp32": 1e-5, "fp16": 1.5e-3}


@pytest.mark.parametrize("op", ["int4", "int8"])
def test_every_kernel_against_the_float64_product(op):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, op, "0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert {case.split("-")[0] for case in errors} == {"dequantize", "gemv", "splitk", "gemm", "invariant"}
    too_large = {
        case: error for case, error in errors.items() if not error <= TOLERANCE["fp16" if "fp16" in case else "fp32"]
    }
    assert not too_large

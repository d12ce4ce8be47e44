"""The ggml kernels' arithmetic on a CPU, in Triton's interpreter: every type, K tails, split K, and dequantization to the bit.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the cases run in a process of their own and report their errors.
bfloat16 is left to the GPU tests: the interpreter truncates where hardware rounds.
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
from lq_formats.layouts import GGML_PLANES
from lq_kernels import Arch
from lq_kernels.triton import ggml

torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[1]))
splits = []
# A GPU of many multiprocessors: K is split, where it is long enough.
ggml.Arch = type("FakeArch", (), {"of": staticmethod(lambda device: Arch("cuda", (9, 0), "fake", 132))})
ggml.reduce_split = lambda parts, out, reduce=ggml.reduce_split: (splits.append(parts.shape[0]), reduce(parts, out))
NAMES = {torch.float32: "fp32", torch.float16: "fp16"}
errors = {}

def blocks_of(layout, rows, count):
    blocks = torch.randint(0, 256, (rows, count, layout.form.type_size), dtype=torch.uint8)
    for at in layout.form.halves:
        blocks[..., at : at + 2] = (0.01 * torch.randn(rows, count, 1)).half().view(torch.uint8)
    if layout.name == "mxfp4":
        blocks[..., 0] = blocks[..., 0] % 24 + 110
    return blocks

def run(name, n, count, dtype, launches):
    layout = GGML_PLANES[name]
    blocks = blocks_of(layout, n, count)
    k = count * layout.form.block_size
    planes = layout.pack(blocks)
    dense = layout.form.dequantize(blocks)
    label = f"{name}-N{n}-K{k}-{NAMES[dtype]}"
    unpacked = ggml.dequantize_ggml(*planes, name, k, dtype)
    assert unpacked.dtype == dtype
    errors[f"dequantize-{label}"] = 0.0 if torch.equal(unpacked, dense.to(dtype)) else float("inf")
    for launcher, m, biased in launches:
        x = torch.randn(m, k).to(dtype)
        bias = 3 * torch.randn(n).to(dtype) if biased else None
        y = launcher(x, *planes, bias, name)
        reference = x.double() @ dense.double().t() + (bias.double() if biased else 0)
        assert y.shape == reference.shape and y.dtype == dtype
        errors[f"{launcher.__name__}-{label}-M{m}"] = ((y.double() - reference).norm() / reference.norm()).item()

for name, layout in GGML_PLANES.items():
    whole = layout.form.block_size == 256
    # A tail of blocks in a chunk, and rows beyond a tile.
    run(name, 5, 3 if whole else 11, torch.float16, [(ggml.gemv, 1, True), (ggml.splitk, 17, False)])
    run(name, 33, 1, torch.float32, [(ggml.splitk, 3, True)])
run("q4_1", 2, 33, torch.float32, [(ggml.gemv, 2, False), (ggml.splitk, 1, True)])
run("q6_k", 2, 5, torch.float16, [(ggml.gemv, 1, False), (ggml.splitk, 1, True), (ggml.invariant, 3, True)])
assert max(splits) >= 4, f"K was shared by {splits}"
print(json.dumps(errors))
"""

# Relative to the exact product: sums are fp32, results are rounded once to fp16.
TOLERANCE = {"fp32": 1e-6, "fp16": 5e-4}


def test_every_type_against_the_float64_product():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SCRIPT, "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert {case.split("-")[0] for case in errors} == {"dequantize", "gemv", "splitk", "invariant"}
    assert len(errors) >= 12 * 5
    too_large = {
        case: error for case, error in errors.items() if not error <= TOLERANCE["fp16" if "fp16" in case else "fp32"]
    }
    assert not too_large

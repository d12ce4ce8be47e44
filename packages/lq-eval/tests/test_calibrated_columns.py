"""The loops over columns in Triton on trained weights and the activations that enter them, against float64.

On a CPU they run in Triton's interpreter, in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from lq_formats import QuantSpec, choose_qparams
from lq_torch.calibrate.moments import factor_inverse
from lq_torch.calibrate.solve import Quantized, descend, gptq_codes, output_error

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package 'triton' is not installed")

SCRIPT = """
import sys, torch
from lq_formats import QuantSpec
from lq_torch.calibrate import columns
from lq_torch.calibrate.solve import descend, gptq_codes

torch.set_num_threads(1)
columns.why_not_columns = lambda device, dtype: None
w, hessian, scale, zero, upper, order = torch.load(sys.argv[1], weights_only=True)
spec = QuantSpec(3, "group", 32, False, torch.float32)
solved = gptq_codes(w, scale, zero, spec, upper.float(), order)
better = descend(solved, w, hessian, spec, sweeps=1)
torch.save([(each.codes, each.scale, each.zero) for each in (solved, better)], sys.argv[2])
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_codes_of_trained_weights_are_those_of_float64(device, tiny, windows, tmp_path):
    """Of an asymmetric int3 weight, by activation order: more columns than a launch takes, and few, for the interpreter."""
    spec = QuantSpec(3, "group", 32, False, torch.float32)
    layer = tiny.model.model.layers[2].mlp.down_proj
    rows, width = (5, 160) if device == "cpu" else layer.weight.shape
    seen = []
    with layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0])), torch.no_grad():
        tiny.model(windows[:4])
    x = seen[0].flatten(0, 1).to(device)
    x, w = x[:, :width], layer.weight.detach()[:rows, :width].to(device).contiguous()
    hessian = x.t() @ x
    order = hessian.diagonal().argsort(descending=True)
    upper, damping = factor_inverse(hessian[order][:, order], 0.01)
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    scale, zero = choose_qparams(w, spec)
    zero = zero.float()
    exact = gptq_codes(w.double(), scale.double(), zero.double(), spec, upper, order)
    expected = exact, descend(exact, w.double(), hessian.double(), spec, sweeps=1)
    if device == "cuda":
        solved = gptq_codes(w, scale, zero, spec, upper.float(), order)
        found = solved, descend(solved, w, hessian, spec, sweeps=1)
    else:
        found = _interpreted((w, hessian, scale, zero, upper, order), tmp_path)
    for ours, reference in zip(found, expected, strict=True):
        # A tie that rounding decides changes what follows in its row.
        assert float((ours.codes != reference.codes).any(1).float().mean()) < 0.5
        errors = [
            output_error(each.values().double(), w.double(), hessian.double()).sum() for each in (ours, reference)
        ]
        assert float(errors[0]) == pytest.approx(float(errors[1]), rel=1e-2)


def _interpreted(problem, folder):
    torch.save(problem, folder / "problem.pt")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SCRIPT, str(folder / "problem.pt"), str(folder / "found.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [Quantized(*each) for each in torch.load(folder / "found.pt", weights_only=True)]

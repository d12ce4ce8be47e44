"""Fixtures that several test files share."""

import os
import subprocess
import sys

import pytest
import torch
from lq_kernels import reads_fragments


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def fragment_device(request, monkeypatch):
    """Return a device whose ggml weights are in fragment order; a CPU is taken for one, so that all but the kernels runs."""
    torch.manual_seed(0)
    if request.param == "cpu":
        monkeypatch.setattr("lq_torch.tensors.ggml.reads_fragments", lambda device: True)
    elif not reads_fragments(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU and NVRTC")
    return request.param


@pytest.fixture
def run_script():
    """Return a function that runs a script in a Python of its own and returns what it prints."""

    def run(script, *arguments):
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def elsewhere(monkeypatch):
    """Return a function that takes a weight to a CPU, or to what holds weights as a GPU before Hopper does."""

    def take(weight, planes=False):
        with monkeypatch.context() as patch:
            patch.setattr("lq_torch.tensors.ggml.reads_fragments", lambda device: False)
            patch.setattr("lq_torch.tensors.ggml._DEVICES_OF_PLANES", ("cuda", "cpu") if planes else ("cuda",))
            return weight.to("cpu", copy=True)

    return take

"""Fixtures that several test files share."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture
def disassemble(tmp_path):
    """Return what makes SASS of a cubin, by the disassembler that Triton's wheel ships; the test is skipped without it."""
    triton = find_spec("triton")
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm" if triton and triton.origin else None

    def sass(cubin):
        if tool is None or not tool.exists():
            pytest.skip("no disassembler: Triton, or a Triton with nvdisasm, is not installed")
        path = tmp_path / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout

    return sass

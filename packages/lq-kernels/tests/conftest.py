"""Fixtures that several test files share."""

import os
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest


def _import_folder(name: str, folder: Path) -> None:
    """Import a folder that is not on the path as a package, which is what its machine.py has."""
    spec = spec_from_file_location(name, folder / "machine.py", submodule_search_locations=[str(folder)])
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


_import_folder("cuda_host", Path(__file__).parent / "host")


@pytest.fixture
def host(tmp_path_factory, monkeypatch):
    """Run launches on this machine, without a GPU; the test is skipped where it cannot. See ``host/machine.py``."""
    import cuda_host

    if (reason := cuda_host.why_not()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # what one worker compiles, others find
    machine = cuda_host.Host(folder / "cuda_host")
    machine.install(monkeypatch)
    cuda_host.forget()
    yield machine
    cuda_host.forget()


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
        return subprocess.run([tool, "-c", "-ndf", path], capture_output=True, text=True, check=True).stdout

    return sass

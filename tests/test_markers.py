"""The markers of the root's conftest: a test that cannot run here says why, and fails where it was asked for."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

SAMPLE = """
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.gpu
def test_gpu():
    pass


@pytest.mark.multi_gpu
def test_multi_gpu():
    pass


@pytest.mark.exhaustive
def test_always_exhaustive():
    pass


@pytest.mark.exhaustive(where=lambda size: size > 1)
@pytest.mark.parametrize("kind", ["a", "b"])
@pytest.mark.parametrize("size", [1, 2])
def test_sizes(kind, size):
    pass


def test_processes_keep_bytecode_elsewhere():
    folder = os.environ["PYTHONPYCACHEPREFIX"]
    Path("module.py").write_text("")
    subprocess.run([sys.executable, "-c", "import module"], check=True, env={**os.environ, "PYTHONPATH": "."})
    assert list(Path(folder).rglob("module.*.pyc"))
    assert not Path("__pycache__").exists()
    Path("folder").write_text(folder)
"""


def _outcomes(root: Path, folder: Path, *arguments: str, **environment: str) -> tuple[dict[str, str], str]:
    """Return what came of each test of SAMPLE under the root's conftest, on a machine without a GPU, and what pytest said."""
    shutil.copy(root / "conftest.py", folder)
    (folder / "test_sample.py").write_text(SAMPLE)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  multi_gpu\n  nvrtc\n  exhaustive\n")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LQ_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", "test_sample.py", *arguments],
        cwd=folder,
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return dict(re.findall(r"^test_sample\.py::(\S+) (\w+)", done.stdout, re.MULTILINE)), done.stdout


def test_what_cannot_run_is_skipped_with_a_reason(root: Path, tmp_path: Path) -> None:
    found, said = _outcomes(root, tmp_path, PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX="")
    assert found == {
        "test_gpu": "SKIPPED",
        "test_multi_gpu": "SKIPPED",
        "test_always_exhaustive": "SKIPPED",
        "test_sizes[1-a]": "PASSED",
        "test_sizes[1-b]": "PASSED",
        "test_sizes[2-a]": "SKIPPED",
        "test_sizes[2-b]": "SKIPPED",
        "test_processes_keep_bytecode_elsewhere": "PASSED",
    }
    for reason in ("needs 1 CUDA GPU, this", "needs 2 CUDA GPUs, this", "LQ_EXHAUSTIVE=1 runs all"):
        assert reason in said
    assert not Path((tmp_path / "folder").read_text()).exists(), "bytecode of the run is left behind"


def test_what_was_asked_for_fails_where_it_cannot_run(root: Path, tmp_path: Path) -> None:
    found, said = _outcomes(root, tmp_path, "-k", "not bytecode", LQ_REQUIRE_GPU="1", LQ_EXHAUSTIVE="1")
    assert {name for name, outcome in found.items() if outcome != "PASSED"} == {"test_gpu", "test_multi_gpu"}
    assert set(found.values()) == {"ERROR", "PASSED"}
    assert "needs 2 CUDA GPUs, this machine has 0 and LQ_REQUIRE_GPU=1" in said

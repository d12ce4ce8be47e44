"""Importing does no work, everything imports on a laptop, and the arrows between the packages hold."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("lq_formats", "lq_kernels", "lq_torch", "lq_eval")
# Imported on first use only: each costs seconds, needs a GPU, or is not there on every machine.
LAZY = ("triton", "cuda", "gemlite", "transformers", "gguf", "datasets", "matplotlib")

# torch itself imports some of LAZY where they are installed, so only what a package adds is counted.
PROBE = """
import json, sys
import torch
before = set(sys.modules)
__import__(sys.argv[1])
added = sorted(set(sys.modules) - before)
state = {"added": added, "cuda": torch.cuda.is_initialized(), "threads": torch.get_num_threads()}
open(sys.argv[2], "w").write(json.dumps(state))
"""

# None in sys.modules makes an import fail as if the package were not installed.
LAPTOP = """
import importlib, json, pkgutil, sys
import torch
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None
found = []
for package in json.loads(sys.argv[2]):
    module = importlib.import_module(package)
    found.append(package)
    for entry in pkgutil.walk_packages(module.__path__, package + "."):
        # The kernels in Triton's language are the one place that is nothing without Triton.
        if not entry.name.startswith("lq_kernels.triton.") and not entry.name.endswith(".__main__"):
            importlib.import_module(entry.name)
            found.append(entry.name)
assert not torch.cuda.is_initialized()
open(sys.argv[3], "w").write(json.dumps(found))
"""


def _run(code: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_quiet_and_lazy(package: str, checkout_environment: dict[str, str], tmp_path: Path) -> None:
    answer = tmp_path / "state.json"
    done = _run(PROBE, checkout_environment, package, str(answer))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    state: dict[str, Any] = json.loads(answer.read_text())
    eager = [name for name in state["added"] if any(name == lazy or name.startswith(f"{lazy}.") for lazy in LAZY)]
    assert eager == [], f"importing {package} imports {eager[:5]}"
    assert not state["cuda"], f"importing {package} initialises CUDA"
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    assert not set(above) & set(state["added"]), f"{package} imports a package above itself"


def test_every_module_imports_without_optional_packages(checkout_environment: dict[str, str], tmp_path: Path) -> None:
    answer = tmp_path / "modules.json"
    done = _run(LAPTOP, checkout_environment, json.dumps(LAZY), json.dumps(PACKAGES), str(answer))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    found = json.loads(answer.read_text())
    assert {"lq_formats.ggml.legacy", "lq_kernels.ops", "lq_torch.quantize", "lq_eval.cli"} <= set(found)


def test_import_contracts_are_kept(root: Path, checkout_environment: dict[str, str]) -> None:
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=checkout_environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout

"""Importing does no work, everything imports on a laptop, and the arrows between the packages hold."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("lq_formats", "lq_kernels", "lq_torch", "lq_eval")
# Imported on first use only: each costs seconds, needs a GPU, or is not there on every machine.
LAZY = ("triton", "cuda", "gemlite", "transformers", "gguf", "datasets", "matplotlib")

# torch itself imports some of LAZY where they are installed, so only what a package adds is counted: each is imported by a
# fork of a process that has torch.
PROBE = """
import json, os, sys
import torch
before = set(sys.modules)
for package in json.loads(sys.argv[1]):
    if os.fork() == 0:
        __import__(package)
        state = {"added": sorted(set(sys.modules) - before), "cuda": torch.cuda.is_initialized()}
        open(sys.argv[2] + "/" + package, "w").write(json.dumps(state))
        sys.exit()
    assert os.wait()[1] == 0, package
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_imports_are_quiet_and_lazy(checkout_environment: dict[str, str], tmp_path: Path) -> None:
    done = _run(PROBE, checkout_environment, json.dumps(PACKAGES), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    for number, package in enumerate(PACKAGES):
        state: dict[str, Any] = json.loads((tmp_path / package).read_text())
        assert package in state["added"]
        eager = [name for name in state["added"] if any(name == lazy or name.startswith(f"{lazy}.") for lazy in LAZY)]
        assert eager == [], f"importing {package} imports {eager[:5]}"
        assert not state["cuda"], f"importing {package} initialises CUDA"
        assert not set(PACKAGES[number + 1 :]) & set(state["added"]), f"{package} imports a package above itself"


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

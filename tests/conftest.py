"""What the tests that cross packages share."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent
_DISTRIBUTIONS = ("lq-formats", "lq-kernels", "lq-torch", "lq-eval")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return _ROOT


@pytest.fixture(scope="session")
def source_folders() -> dict[str, Path]:
    """Import name of each package and the folder that holds it, in the order of the arrows."""
    return {name.replace("-", "_"): _ROOT / "packages" / name / "src" for name in _DISTRIBUTIONS}


@pytest.fixture(scope="session")
def checkout_environment(source_folders: dict[str, Path]) -> dict[str, str]:
    """The environment of a subprocess that imports the packages from this checkout, installed or not."""
    folders = [str(folder) for folder in source_folders.values()]
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([*folders, *([inherited] if inherited else [])])}

"""Marker handling for every test of the workspace: what needs a GPU says so, and is never passed over silently.

``gpu`` and ``multi_gpu`` tests skip with a reason where the machine lacks the GPUs, and fail instead when
``LQ_REQUIRE_GPU=1``: a GPU runner that lost its GPU must not report green. So do ``nvrtc`` tests without NVRTC. Whether it is
there goes by what is installed, not by what lq finds: an lq that does not find it must fail.

Workers of pytest-xdist compute with one thread each. Were each to start as many threads as there are cores, they would wait
for each other: half a second of work then takes up to a minute (18 workers on 16 cores).

``exhaustive`` tests are cases of which others run, for example most of the forms that a kernel compiles in. They skip with a
reason, and run with ``LQ_EXHAUSTIVE=1`` (``nox -s exhaustive``). ``where`` says which cases of a test they are.

Where ``PYTHONDONTWRITEBYTECODE`` is set, each process that a test starts would compile all of torch's source, in 5 s. They keep
bytecode in a folder of the run's own instead, which goes with it.

``torch.compile`` forgets what a test compiled: many tests compile the same code for other tensors, and it refuses the ninth.
"""

import inspect
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch

_NEEDED = {"gpu": 1, "multi_gpu": 2}


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
        torch.set_num_threads(1)
    elif os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        folder = tempfile.TemporaryDirectory(prefix="lq-bytecode-")
        os.environ["PYTHONPYCACHEPREFIX"] = folder.name
        config.add_cleanup(folder.cleanup)


def _missing(item: pytest.Item) -> str | None:
    """Return what a test needs and this machine lacks."""
    if item.get_closest_marker("nvrtc") and not _has_nvrtc():
        return "needs NVRTC, which is not installed (nvidia-cuda-nvrtc)"
    needed = max((count for name, count in _NEEDED.items() if item.get_closest_marker(name)), default=0)
    available = torch.cuda.device_count() if needed else 0
    if available >= needed:
        return None
    return f"needs {needed} CUDA GPU{'s' if needed > 1 else ''}, this machine has {available}"


def _has_nvrtc() -> bool:
    if torch.version.cuda is not None:  # such builds link it
        return True
    try:
        distribution("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        return False
    return True


def _is_exhaustive(item: pytest.Item) -> bool:
    for marker in item.iter_markers("exhaustive"):
        where = marker.kwargs.get("where")
        if where is None or where(*(item.callspec.params[name] for name in inspect.signature(where).parameters)):
            return True
    return False


def pytest_runtest_setup(item: pytest.Item) -> None:
    if os.environ.get("LQ_EXHAUSTIVE") != "1" and _is_exhaustive(item):
        pytest.skip("one of many cases, of which others run: LQ_EXHAUSTIVE=1 runs all")
    reason = _missing(item)
    if reason is None:
        return
    if os.environ.get("LQ_REQUIRE_GPU") == "1":
        pytest.fail(f"{reason} and LQ_REQUIRE_GPU=1", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_teardown() -> None:
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()

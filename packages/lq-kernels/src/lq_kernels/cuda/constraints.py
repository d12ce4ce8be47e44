"""What the CUDA kernels can run: each constraint stated once. Imports no CUDA library."""

import functools
import importlib.util

from lq_kernels.problem import Problem

MIN_CAPABILITY = (8, 0)


@functools.cache
def why_not_compile() -> str | None:
    """Return why CUDA C++ cannot be compiled on this machine, or None."""
    try:
        found = importlib.util.find_spec("cuda.core") is not None
    except ModuleNotFoundError:
        found = False
    return None if found else "the package 'cuda-core' is not installed"


def why_not_q4_0(problem: Problem) -> str | None:
    """Return why the Q4_0 x Q8_1 kernel cannot run ``problem``, or None."""
    if problem.arch.kind != "cuda":
        return "needs an NVIDIA GPU"
    if problem.arch.capability < MIN_CAPABILITY:
        major, minor = problem.arch.capability
        return f"needs compute capability 8.0, this GPU has {major}.{minor}"
    return why_not_compile()

"""What the Triton kernels can run: each constraint stated once. Imports no Triton."""

import functools
import importlib.util

import torch

from lq_kernels.problem import Problem

MIN_GROUP_SIZE = 16
COLUMNS = 128  # whose codes are chosen in one launch, at most
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_not_machine(problem: Problem) -> str | None:
    if problem.arch.kind == "cpu":
        return "needs a GPU"
    if not _installed():
        return "the package 'triton' is not installed"
    if problem.arch.kind == "cuda" and problem.arch.capability < (8, 0):
        major, minor = problem.arch.capability
        return f"needs compute capability 8.0, this GPU has {major}.{minor}"
    if problem.dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, not {problem.dtype}"
    return None


def why_not_int4(problem: Problem) -> str | None:
    """Return why the W4A16 kernels cannot run ``problem``, or None."""
    reason = _why_not_machine(problem)
    if reason is None and problem.group_size < MIN_GROUP_SIZE and problem.group_size != problem.k:
        reason = f"needs groups of at least {MIN_GROUP_SIZE}, got {problem.group_size}"
    return reason


def why_not_int8(problem: Problem) -> str | None:
    """Return why the W8A16 kernels cannot run ``problem``, or None."""
    return _why_not_machine(problem)


def why_not_ggml(problem: Problem) -> str | None:
    """Return why the kernels on ggml planes cannot run ``problem``, or None."""
    return _why_not_machine(problem)


def why_not_dequantize(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the Triton dequantizers cannot write ``dtype`` on ``device``, or None."""
    if device.type != "cuda":
        return "needs a GPU"
    if not _installed():
        return "the package 'triton' is not installed"
    if dtype not in DTYPES:
        return f"writes float16, bfloat16 and float32, not {dtype}"
    return None


def why_not_columns(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the loops over columns cannot run on ``dtype`` on ``device``, or None."""
    if device.type != "cuda":
        return "needs a GPU"
    if not _installed():
        return "the package 'triton' is not installed"
    if dtype != torch.float32:
        return f"takes float32, not {dtype}"
    return None

"""What the CUDA kernels can run: each constraint stated once. Imports no CUDA library."""

import functools

import torch
from lq_formats.layouts import FRAGMENT_INT4

from lq_kernels.problem import Arch, Problem

MIN_CAPABILITY = (8, 0)


@functools.cache
def why_not_compile() -> str | None:
    """Return why CUDA C++ cannot be compiled on this machine, or None."""
    from lq_kernels.jit import nvrtc

    return nvrtc.why_not()


def why_not_q4_0(problem: Problem) -> str | None:
    """Return why the Q4_0 x Q8_1 kernel cannot run ``problem``, or None."""
    if problem.arch.kind != "cuda":
        return "needs an NVIDIA GPU"
    if problem.arch.capability < MIN_CAPABILITY:
        major, minor = problem.arch.capability
        return f"needs compute capability 8.0, this GPU has {major}.{minor}"
    return why_not_compile()


def why_not_hopper(arch: Arch) -> str | None:
    """Return why no kernel for fragment-ordered weights runs on this processor, or None."""
    if arch.kind != "cuda" or arch.capability != (9, 0):
        return "needs a Hopper GPU (compute capability 9.0)"
    return why_not_compile()


def why_not_fragment(problem: Problem) -> str | None:
    """Return why the Hopper kernels for fragment-ordered weights cannot run ``problem``, or None."""
    if (reason := why_not_hopper(problem.arch)) is not None:
        return reason
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {problem.dtype}"
    if problem.k % 8:
        return f"needs in features divisible by 8, got {problem.k}"
    size, step = problem.group_size, FRAGMENT_INT4.step
    if size != problem.k and size not in (32, 64) and size % step:
        return f"takes groups of 32, 64, multiples of {step}, or one scale a row, not groups of {size}"
    return None


def why_not_decode(problem: Problem) -> str | None:
    """Return why the decode kernel cannot run ``problem``, or None."""
    reason = why_not_fragment(problem)
    if reason is None:
        from lq_kernels.cuda.decode_a16 import choice_of

        if choice_of(problem) is None:
            reason = f"the part of x that a multiprocessor keeps does not fit its shared memory (K = {problem.k})"
    return reason


def why_not_prefill(problem: Problem) -> str | None:
    """Return why the prefill kernel cannot run ``problem``, or None."""
    reason = why_not_fragment(problem)
    grouped = problem.group_size != problem.k
    if reason is None and grouped and problem.dtype == torch.float16 and problem.spec.scale_dtype != torch.float16:
        reason = f"scales of {problem.spec.scale_dtype} may not fit float16, in which weights are scaled"
    return reason

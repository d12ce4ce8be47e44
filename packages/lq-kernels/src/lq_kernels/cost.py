"""Cost models: how long a kernel would take, from sizes alone. They order kernels; they are not promises.

A model is a roofline, ``overhead + max(bytes / bandwidth, operations / rate)``, with an efficiency for each kernel that
was fitted to measurements (H200; two cores of a server CPU) and is noted beside it.
"""

from dataclasses import dataclass

import torch

from lq_kernels.problem import Arch, Problem


@dataclass(frozen=True)
class Machine:
    """Ceilings of one processor.

    Attributes:
        bandwidth: Bytes per microsecond from memory.
        rate: Dense multiply-adds per microsecond at 16 bits, times two (FLOP per microsecond).
        launch: Microseconds that a kernel costs whatever it does.
    """

    bandwidth: float
    rate: float
    launch: float


# Measured on one H200: 4.2 TB/s streaming, 750 TFLOP/s dense bf16, 1.5 us for an empty kernel in a graph.
_H200 = Machine(4.2e6, 750e6, 1.5)
# Two cores with AVX-512 bf16: 40 GB/s, 0.9 TFLOP/s bf16.
_CPU = Machine(40e3, 0.9e6, 2.0)


def machine(arch: Arch) -> Machine:
    """Return the ceilings of ``arch``; GPUs without a measurement are scaled from the H200 by their multiprocessors."""
    if arch.kind == "cpu":
        return _CPU
    if "H200" in arch.name:
        return _H200
    share = max(arch.sm_count, 1) / 132
    generation = 1.0 if arch.capability >= (9, 0) else 0.4
    return Machine(_H200.bandwidth * share * 0.6, _H200.rate * share * generation, 2.0)


def weight_bytes(problem: Problem) -> float:
    """Return the bytes of the packed weight with its scales and zeros."""
    bits = problem.spec.bits
    if problem.op == "q4_0_q8_1":
        return problem.n * problem.k / 32 * 18
    scales = problem.n * problem.k / problem.group_size
    per_scale = problem.spec.scale_dtype.itemsize + (0 if problem.spec.symmetric else 1)
    return problem.n * problem.k * bits / 8 + scales * per_scale


def dense_us(problem: Problem) -> float:
    """Predict the vendor's dense product, weights from memory; on a GPU it starts about 3 us late."""
    limits = machine(problem.arch)
    size = problem.dtype.itemsize
    traffic = size * (problem.n * problem.k + problem.m * (problem.n + problem.k)) / limits.bandwidth
    slow = 1.0 if problem.dtype != torch.float32 else (4.0 if problem.arch.kind == "cpu" else 12.0)
    start = limits.launch + (0.0 if problem.arch.kind == "cpu" else 2.5)
    return start + max(traffic, 2 * problem.m * problem.n * problem.k / limits.rate * slow)


def dequantize_us(problem: Problem) -> float:
    """Predict unpacking the weight into a dense temporary: 0.9 of the bandwidth on a GPU, 0.17 on a CPU."""
    limits = machine(problem.arch)
    efficiency = 0.17 if problem.arch.kind == "cpu" else 0.9
    written = problem.n * problem.k * problem.dtype.itemsize
    return limits.launch + (weight_bytes(problem) + written) / (limits.bandwidth * efficiency)


def aten_cpu_us(problem: Problem) -> float:
    """Predict ATen's packed CPU products: 90 us a token for 4096x4096 in 16 bits, 13 ms in float32."""
    per_token = 13_000.0 if problem.dtype == torch.float32 else 92.0
    return 130.0 * problem.n * problem.k / 2**24 + per_token * problem.m * problem.n * problem.k / 2**24


def reference_us(problem: Problem) -> float:
    """Predict the float64 reference: anything else is faster."""
    return 1e3 + 100 * (dequantize_us(problem) + dense_us(problem))


def _slower_than_h200(problem: Problem) -> float:
    """Return how many times slower than an H200 instructions are issued here, from the ceilings."""
    return _H200.rate / machine(problem.arch).rate


def _float32(problem: Problem, factor: float) -> float:
    """Return ``factor`` for float32 activations, which multiply without tensor cores, and 1 otherwise."""
    return factor if problem.dtype == torch.float32 else 1.0


def gemv_us(problem: Problem) -> float:
    """Predict the Triton GEMV, which issues instructions for every weight and token.

    H200: 0.58 us a million int4 weights and token, 0.28 us int8, and 0.1 us for the weights themselves.
    """
    per_token = 0.28 if problem.op == "int8" else 0.58
    millions = problem.n * problem.k / 1e6 * _slower_than_h200(problem)
    return machine(problem.arch).launch + millions * (0.1 + per_token * problem.m)


def splitk_us(problem: Problem) -> float:
    """Predict the Triton split-K kernel: 4.5 us for two launches and 0.575 us a million weights on an H200.

    A tile of up to 64 tokens costs 1 to 1.3 times that, one of 128 twice (int4 unpacks on the critical path).
    """
    tiles = 1 + max(problem.m - 16, 0) / 160 if problem.m <= 64 else 2.6 * -(-problem.m // 128)
    millions = problem.n * problem.k / 1e6 * _slower_than_h200(problem)
    return machine(problem.arch).launch + 3.0 + 0.575 * millions * tiles * _float32(problem, 8.0)


def gemm_us(problem: Problem) -> float:
    """Predict the Triton GEMM: a program walks K at 6 to 17 ns an element on an H200, one or two waves at a time."""
    block_m, block_n = (min(64, max(32, problem.m)), 64) if problem.m <= 64 else (128, 128)
    step = {True: (8.0, 8.7, 13.7), False: (6.3, 8.0, 17.0)}[problem.op == "int8"]
    nanoseconds = step[0] if problem.m <= 32 else step[1] if problem.m <= 64 else step[2]
    programs = -(-problem.m // block_m) * -(-problem.n // block_n)
    waves = max(1.0, programs / max(problem.arch.sm_count, 1) * (0.9 if block_m <= 64 else 1.0))
    return machine(problem.arch).launch + nanoseconds * 1e-3 * problem.k * waves * _float32(problem, 8.0)


def q4_0_us(problem: Problem) -> float:
    """Predict the CUDA Q4_0 x Q8_1 kernel: 0.38 of the bandwidth, 0.15 of the dense rate (H200)."""
    limits = machine(problem.arch)
    stream = weight_bytes(problem) / (limits.bandwidth * 0.38)
    return limits.launch + max(stream, 2 * problem.m * problem.n * problem.k / (limits.rate * 0.15))


def decode_us(problem: Problem) -> float:
    """Predict the Hopper decode kernel: 2 us, the weight at 4.25 TB/s, more for each tile of tokens, and x itself (H200).

    Unpacking and multiplying int4 codes is what takes longer from two tiles on; int8 has half as many in a byte.
    """
    tiles, codes = -(-problem.m // 8), problem.spec.bits == 4
    two, four = (1.35, 2.0) if codes else (1.05, 1.35)
    work = 1.0 if tiles == 1 else two if tiles == 2 else four * -(-tiles // 4)
    share = _H200.bandwidth / machine(problem.arch).bandwidth
    return 2.0 + share * (weight_bytes(problem) / 4.25e6 * work + 2.2e-5 * problem.m * problem.k)


def prefill_us(problem: Problem) -> float:
    """Predict the Hopper prefill kernel from its cut (H200)."""
    from lq_kernels.cuda import prefill_a16

    return prefill_a16.predict_us(problem)

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
    bits = 8 if problem.op == "int8" else 4
    if problem.op == "q4_0_q8_1":
        return problem.n * problem.k / 32 * 18
    scales = problem.n * problem.k / problem.group_size
    per_scale = problem.spec.scale_dtype.itemsize + (0 if problem.spec.symmetric else 1)
    return problem.n * problem.k * bits / 8 + scales * per_scale


def dense_us(problem: Problem) -> float:
    """Predict the vendor's dense product, weights from memory."""
    limits = machine(problem.arch)
    size = problem.dtype.itemsize
    traffic = size * (problem.n * problem.k + problem.m * (problem.n + problem.k)) / limits.bandwidth
    slow = 1.0 if problem.dtype != torch.float32 else (4.0 if problem.arch.kind == "cpu" else 12.0)
    return limits.launch + max(traffic, 2 * problem.m * problem.n * problem.k / limits.rate * slow)


def dequantize_us(problem: Problem) -> float:
    """Predict unpacking the weight into a dense temporary: 0.8 of the bandwidth on a GPU, 0.1 on a CPU."""
    limits = machine(problem.arch)
    efficiency = 0.1 if problem.arch.kind == "cpu" else 0.8
    written = problem.n * problem.k * problem.dtype.itemsize
    return limits.launch + (weight_bytes(problem) + written) / (limits.bandwidth * efficiency)


def aten_cpu_us(problem: Problem) -> float:
    """Predict ATen's packed CPU products: 90 us a token for 4096x4096 in 16 bits, 12 ms in float32."""
    per_token = 12_000.0 if problem.dtype == torch.float32 else 92.0
    return 130.0 * problem.n * problem.k / 2**24 + per_token * problem.m * problem.n * problem.k / 2**24


def reference_us(problem: Problem) -> float:
    """Predict the float64 reference: anything else is faster."""
    return 1e3 + 100 * (dequantize_us(problem) + dense_us(problem))


def gemv_us(problem: Problem) -> float:
    """Predict the Triton GEMV: bound by instructions that unpack, about 0.35 of the bandwidth, again for each token."""
    return machine(problem.arch).launch + problem.m * weight_bytes(problem) / (machine(problem.arch).bandwidth * 0.35)


def splitk_us(problem: Problem) -> float:
    """Predict the Triton split-K kernel: 0.3 of the bandwidth for each 16 tokens' tile, and a second small launch."""
    limits = machine(problem.arch)
    tiles = -(-problem.m // 64)
    reduction = 2 * 4 * 4 * problem.m * problem.n / limits.bandwidth
    stream = weight_bytes(problem) / (limits.bandwidth * 0.3)
    return 2 * limits.launch + tiles * stream + reduction + 2 * problem.m * problem.n * problem.k / (limits.rate * 0.4)


def gemm_us(problem: Problem) -> float:
    """Predict the Triton GEMM: 0.4 of the dense rate once the grid fills the GPU."""
    limits = machine(problem.arch)
    waves = -(-(-(-problem.m // 64) * -(-problem.n // 128)) // max(problem.arch.sm_count, 1))
    per_wave = 2 * 64 * 128 * problem.k * max(problem.arch.sm_count, 1) / (limits.rate * 0.4)
    slow = 8.0 if problem.dtype == torch.float32 else 1.0
    return limits.launch + max(weight_bytes(problem) / (limits.bandwidth * 0.3), waves * per_wave * slow)


def q4_0_us(problem: Problem) -> float:
    """Predict the CUDA Q4_0 x Q8_1 kernel: 0.6 of the bandwidth, 0.25 of the dense rate."""
    limits = machine(problem.arch)
    stream = weight_bytes(problem) / (limits.bandwidth * 0.6)
    return limits.launch + max(stream, 2 * problem.m * problem.n * problem.k / (limits.rate * 0.25))

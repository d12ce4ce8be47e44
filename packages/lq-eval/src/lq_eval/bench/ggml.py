"""Q4_0 weights times Q8_1 activations: quantization, product, one after the other, both in one call; and a layer's call.

The default size (4096 out, 14336 in features, 1 to 512 tokens) is the down projection of an 8B LLaMA, for which the
documentation has llama.cpp's figures. The dense product beside it is float16.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lq_kernels import gemm_q4_0_q8_1, q4_0_linear, quantize_activation_q8_1, quantize_gemm_q4_0_q8_1
from torch import Tensor

from lq_eval.bench.operands import random_q4_0
from lq_eval.bench.shapes import check_sizes, check_tokens
from lq_eval.bench.timing import COLD_BYTES, Call, copies, time_us


@dataclass(frozen=True)
class GGMLRow:
    """One measured number of tokens.

    Attributes:
        n: Out features (ggml's M).
        k: In features.
        m: Tokens (ggml's N).
        quantize_us: Activations float16 to Q8_1.
        gemm_us: The product alone, float32 result.
        steps_us: Both, one after the other, timed together.
        total_us: Both in one call, ``quantize_gemm_q4_0_q8_1``.
        linear_us: ``q4_0_linear`` on bfloat16 activations, as a layer calls it: no visible Q8_1.
        gflops: ``2 * n * k * m`` over the total time, in 1e9 per second.
        dense_us: ``F.linear`` in float16.
    """

    n: int
    k: int
    m: int
    quantize_us: float
    gemm_us: float
    steps_us: float
    total_us: float
    linear_us: float
    gflops: float
    dense_us: float

    @property
    def speedup(self) -> float:
        """Time of the dense product over the total."""
        return self.dense_us / self.total_us

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values, with its speedup."""
        return {**asdict(self), "speedup": self.speedup}


def run_ggml(
    n: int,
    k: int,
    ms: tuple[int, ...],
    device: torch.device,
    *,
    kernel: str | None = None,
    seconds: float = math.inf,
    cold_bytes: int = COLD_BYTES,
) -> Iterator[GGMLRow]:
    """Measure one number of tokens after another, until all are done or the time is up.

    Args:
        n: Out features.
        k: In features, a multiple of 32.
        ms: Numbers of tokens.
        device: Where to run.
        kernel: Force a kernel of ``q4_0_q8_1``.
        seconds: Stop starting new points after this time.
        cold_bytes: Bytes of weights in a round.

    Raises:
        SpecError: If K is not a multiple of 32, or a size or number of tokens is not positive.
        NoKernelError: If the kernel cannot run.
    """
    check_sizes(n, k)
    check_tokens(ms)
    deadline = time.monotonic() + seconds
    packed = [random_q4_0(n, k, device) for _ in range(copies(n * k // 32 * 18, cold_bytes))]
    # float16 products on a CPU may be unbearably slow; float32 is the fair dense product there.
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    count = copies(n * k * dtype.itemsize, cold_bytes)
    dense = [torch.randn(n, k, device=device, dtype=dtype) for _ in range(count)]
    budget = 0.5 if math.isinf(seconds) else seconds / (10 * max(1, len(ms)))
    for m in ms:
        if time.monotonic() > deadline:
            return
        x = torch.randn(m, k, device=device, dtype=torch.float16)
        blocks = quantize_activation_q8_1(x)
        quantize: list[Call] = [lambda x=x: quantize_activation_q8_1(x)]  # type: ignore[misc]
        products = [_product(weight, blocks, n, m, k, kernel) for weight in packed]
        steps = [_steps(weight, x, n, m, k, kernel) for weight in packed]
        totals = [_total(weight, x, kernel) for weight in packed]
        layers = [_layer(weight, x.to(torch.bfloat16)) for weight in packed]
        xd = x.to(dtype)
        linears: list[Call] = [lambda w=w, x=xd: torch.nn.functional.linear(x, w) for w in dense]  # type: ignore[misc]
        total_us = time_us(totals, device, budget_s=budget)
        yield GGMLRow(
            n=n,
            k=k,
            m=m,
            quantize_us=time_us(quantize, device, budget_s=budget),
            gemm_us=time_us(products, device, budget_s=budget),
            steps_us=time_us(steps, device, budget_s=budget),
            total_us=total_us,
            linear_us=time_us(layers, device, budget_s=budget),
            gflops=2 * n * k * m / total_us / 1e3,
            dense_us=time_us(linears, device, budget_s=budget),
        )


def _product(weight: Tensor, blocks: Tensor, n: int, m: int, k: int, kernel: str | None) -> Call:
    return lambda: gemm_q4_0_q8_1(weight, blocks, n, m, k, kernel=kernel)


def _steps(weight: Tensor, x: Tensor, n: int, m: int, k: int, kernel: str | None) -> Call:
    return lambda: gemm_q4_0_q8_1(weight, quantize_activation_q8_1(x), n, m, k, kernel=kernel)


def _total(weight: Tensor, x: Tensor, kernel: str | None) -> Call:
    return lambda: quantize_gemm_q4_0_q8_1(weight, x, kernel=kernel)


def _layer(weight: Tensor, x: Tensor) -> Call:
    return lambda: q4_0_linear(x, weight)

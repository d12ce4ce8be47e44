"""Launch ``src/quantize_tokens.cu``: the codes of :func:`lq_kernels.quantize_tokens` in one kernel that reads x once."""

from typing import Literal

import torch
from torch import Tensor

from lq_kernels.cuda.variant import TYPES
from lq_kernels.jit.launcher import launch

MAX_FEATURES = 65536
"""In features that one CTA holds."""
CODES = {"int8": "Int8", "fp8": "Fp8"}
"""Names of the codes in the sources."""
CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

_ELEMENTS = 8  # of a vector
_MAX_THREADS = 1024
_PITCH = 16  # what a tensor map takes


def quantize_tokens(x: Tensor, activation: Literal["int8", "fp8"]) -> tuple[Tensor, Tensor]:
    """Return codes ``(M, K)``, rows starting at multiples of 16 bytes, and scales ``(M,) float32``.

    Args:
        x: ``(M, K)`` bf16 or fp16 on an NVIDIA GPU, K a multiple of 8 up to :data:`MAX_FEATURES`, M > 0.
        activation: ``"int8"`` or ``"fp8"``.
    """
    m, k = x.shape
    if x.stride(1) != 1 or x.stride(0) % _ELEMENTS or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    pitch = -(-k // _PITCH) * _PITCH
    codes = torch.empty((m, pitch), dtype=CODE_DTYPES[activation], device=x.device)
    scales = torch.empty((m,), dtype=torch.float32, device=x.device)
    threads, vectors = cut(k)
    launch(
        "quantize_tokens",
        "quantize_tokens",
        (m, 1, 1),
        threads,
        0,
        x.device,
        x,
        codes,
        scales,
        k,
        x.stride(0),
        pitch,
        dependent=True,
        defines=defines(x.dtype, activation, vectors),
    )
    return codes[:, :k], scales


def defines(dtype: torch.dtype, activation: str, vectors: int) -> tuple[str, ...]:
    """Return ``NAME=VALUE`` of the macros."""
    return (f"LQ_X={TYPES[dtype]}", f"LQ_CODES={CODES[activation]}", f"LQ_VECTORS={vectors}")


def cut(k: int) -> tuple[int, int]:
    """Return the threads of a CTA, and the vectors of a thread: four where possible, for as many loads in flight."""
    total = -(-k // _ELEMENTS)
    threads = 128
    while threads < _MAX_THREADS and total > 4 * threads:
        threads *= 2
    vectors = 1
    while threads * vectors < total:
        vectors *= 2
    return threads, vectors

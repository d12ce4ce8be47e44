"""Launch the activation quantizers of ``src/quantize_q8_1.cu``, and the way back of ``src/dequantize_q8_1.cu``."""

import torch
from torch import Tensor

from lq_kernels.jit.launcher import launch
from lq_kernels.problem import Arch

_THREADS = 256
_BLOCK = 32
_LANES = 4  # of a block


def quantize_q8_1(x: Tensor) -> Tensor:
    """Quantize activations to Q8_1 in one kernel; the bytes of :func:`lq_formats.quantize_q8_1`.

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32 on a CUDA device, K a multiple of 32, not empty.

    Returns:
        ``(..., K // 32, 36) uint8``.
    """
    out = torch.empty((*x.shape[:-1], x.shape[-1] // _BLOCK, 36), dtype=torch.uint8, device=x.device)
    _launch("quantize", x, out)
    return out


def round_q8_1(x: Tensor) -> Tensor:
    """Return what the Q8_1 blocks of activations stand for, in bf16: ``dequantize_q8_1(quantize_q8_1(x))`` in one kernel.

    Args:
        x: As for :func:`quantize_q8_1`.

    Returns:
        ``(..., K) bfloat16``, contiguous.
    """
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    _launch("round", x, out)
    return out


def _launch(what: str, x: Tensor, out: Tensor) -> None:
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    blocks = x.numel() // _BLOCK
    name = f"{what}_q8_1_{str(x.dtype).removeprefix('torch.')}"
    grid = (-(-blocks * _LANES // _THREADS), 1, 1)
    dependent = Arch.of(x.device).capability >= (9, 0)
    launch("quantize_q8_1", name, grid, _THREADS, 0, x.device, x, out, blocks, dependent=dependent)


def dequantize_q8_1(blocks: Tensor) -> Tensor:
    """Return ``(M, K) bf16`` of Q8_1 blocks ``(M, K // 32, 36) uint8``, contiguous, on a Hopper GPU, not empty."""
    if blocks.data_ptr() % 4:
        blocks = blocks.clone()
    rows, count, _ = blocks.shape
    out = torch.empty((rows, count * _BLOCK), dtype=torch.bfloat16, device=blocks.device)
    grid = (-(-rows * count * _LANES // _THREADS), 1, 1)
    launch(
        "dequantize_q8_1",
        "dequantize_q8_1",
        grid,
        _THREADS,
        0,
        blocks.device,
        blocks,
        out,
        rows * count,
        dependent=True,
    )
    return out

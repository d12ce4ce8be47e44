"""Launch the activation quantizer of ``src/quantize_q8_1.cu``."""

import torch
from torch import Tensor

from lq_kernels.jit.launcher import launch

_WARPS = 8


def quantize_q8_1(x: Tensor) -> Tensor:
    """Quantize activations to Q8_1 in one kernel; the bytes of :func:`lq_formats.quantize_q8_1`.

    Args:
        x: ``(..., K)`` fp16, bf16 or fp32 on a CUDA device, K a multiple of 32, not empty.

    Returns:
        ``(..., K // 32, 36) uint8``.
    """
    x = x.contiguous()
    blocks = x.numel() // 32
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 32, 36), dtype=torch.uint8, device=x.device)
    name = f"quantize_q8_1_{str(x.dtype).removeprefix('torch.')}"
    launch("quantize_q8_1", name, (-(-blocks // _WARPS), 1, 1), _WARPS * 32, 0, x.device, x, out, blocks)
    return out

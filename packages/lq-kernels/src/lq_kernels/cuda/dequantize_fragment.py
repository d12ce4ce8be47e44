"""Launch ``src/dequantize_fragment.cu``: the dense weight of codes in fragment order."""

import torch
from torch import Tensor

from lq_kernels.cuda.variant import TYPES, Variant
from lq_kernels.jit.launcher import launch

_WARPS = 8


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
    minimum: bool = False,
) -> Tensor:
    """Return the ``(out_features, in_features)`` weight in ``dtype``, rounded once from fp32.

    Arguments are those of :func:`lq_kernels.cuda.decode_a16.linear`.
    """
    out = torch.empty((out_features, in_features), dtype=dtype, device=packed.device)
    variant = Variant.of(dtype, scale.dtype, bits, group_size, in_features, zero is not None, minimum)
    steps, blocks = packed.shape[:2]
    defines = [define.replace("LQ_X=", "LQ_OUT=") for define in variant.defines]
    assert f"LQ_OUT={TYPES[dtype]}" in defines
    launch(
        "dequantize_fragment",
        "dequantize_fragment",
        (-(-blocks // _WARPS), steps, 1),
        _WARPS * 32,
        0,
        packed.device,
        packed,
        scale,
        0 if zero is None else zero,
        out,
        out_features,
        in_features,
        blocks,
        group_size,
        defines=tuple(defines),
    )
    return out

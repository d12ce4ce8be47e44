"""Every CUDA source of this package with its kernels: what warm-up compiles and the compile-time lint reads."""

from types import MappingProxyType

import torch

from lq_kernels.cuda.linear_a8 import A8Variant
from lq_kernels.cuda.variant import Variant

COLUMN_TILES = (1, 2, 4, 8)

SOURCES = MappingProxyType(
    {
        "gemm_q4_0_q8_1": tuple(
            f"gemm_q4_0_q8_1_c{tiles}{suffix}" for suffix in ("", "_unaligned") for tiles in COLUMN_TILES
        ),
        "quantize_q8_1": tuple(
            f"{what}_q8_1_{dtype}" for what in ("quantize", "round") for dtype in ("float32", "float16", "bfloat16")
        ),
    }
)

VARIANTS = tuple(
    Variant(x, scale, bits, groups, zero > 0, zero == 2)
    for x, scale, bits, groups, zero in (
        (torch.bfloat16, torch.bfloat16, 4, 1, 0),
        (torch.float16, torch.float16, 4, 1, 0),
        (torch.bfloat16, torch.bfloat16, 4, 1, 1),
        (torch.bfloat16, torch.bfloat16, 4, 2, 0),
        (torch.float16, torch.float32, 4, 4, 1),
        (torch.bfloat16, torch.float32, 4, 0, 1),
        (torch.bfloat16, torch.float32, 8, 0, 0),
        (torch.float16, torch.float32, 8, 0, 0),
        (torch.float16, torch.float16, 4, 2, 1),
        (torch.bfloat16, torch.float32, 4, 1, 0),
        (torch.bfloat16, torch.float16, 4, 4, 2),
        (torch.float16, torch.float16, 4, 4, 2),
        (torch.bfloat16, torch.float16, 8, 2, 0),
        (torch.float16, torch.float16, 8, 2, 0),
    )
)
"""What the lint compiles of the sources that are compiled for a weight; between them every choice is taken."""

A8_VARIANTS = tuple(
    A8Variant(bits, activation, out, scale, grouped, lowest, promote)
    for bits, activation, out, scale, grouped, lowest, promote in (
        (8, "int8", torch.bfloat16, torch.float32, False, False, False),
        (8, "fp8", torch.bfloat16, torch.float32, False, False, True),
        (8, "fp8", torch.float16, torch.bfloat16, False, False, False),
        (4, "fp8", torch.bfloat16, torch.bfloat16, True, False, True),
        (4, "fp8", torch.float16, torch.float32, True, True, True),
        (4, "fp8", torch.bfloat16, torch.float32, False, False, True),
        (4, "fp8", torch.bfloat16, torch.float16, False, True, False),
        (4, "int8", torch.bfloat16, torch.bfloat16, True, False, True),
        (4, "int8", torch.float16, torch.float16, False, False, False),
    )
)
"""The same of the source for 8-bit tokens."""

"""Every CUDA source of this package with its kernels: what warm-up compiles and the compile-time lint reads."""

from types import MappingProxyType

import torch

from lq_kernels.cuda.variant import Variant

COLUMN_TILES = (1, 2, 4, 8)

SOURCES = MappingProxyType(
    {
        "gemm_q4_0_q8_1": tuple(
            f"gemm_q4_0_q8_1_c{tiles}{suffix}" for suffix in ("", "_unaligned") for tiles in COLUMN_TILES
        ),
        "quantize_q8_1": tuple(f"quantize_q8_1_{dtype}" for dtype in ("float32", "float16", "bfloat16")),
    }
)

VARIANTS = tuple(
    Variant(x, scale, bits, groups, zero)
    for x, scale, bits, groups, zero in (
        (torch.bfloat16, torch.bfloat16, 4, 1, False),
        (torch.float16, torch.float16, 4, 1, False),
        (torch.bfloat16, torch.bfloat16, 4, 1, True),
        (torch.bfloat16, torch.bfloat16, 4, 2, False),
        (torch.float16, torch.float32, 4, 4, True),
        (torch.bfloat16, torch.float32, 4, 0, True),
        (torch.bfloat16, torch.float32, 8, 0, False),
        (torch.float16, torch.float32, 8, 0, False),
    )
)
"""What the lint compiles of the sources that are compiled for a weight; between them every choice is taken."""

"""Every CUDA source of this package with its kernels: what warm-up compiles and the compile-time lint reads."""

from types import MappingProxyType

COLUMN_TILES = (1, 2, 4, 8)

SOURCES = MappingProxyType(
    {
        "gemm_q4_0_q8_1": tuple(
            f"gemm_q4_0_q8_1_c{tiles}{suffix}" for suffix in ("", "_unaligned") for tiles in COLUMN_TILES
        ),
        "quantize_q8_1": tuple(f"quantize_q8_1_{dtype}" for dtype in ("float32", "float16", "bfloat16")),
    }
)

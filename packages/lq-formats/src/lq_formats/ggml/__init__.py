"""ggml block formats: 32 elements with their scale, byte for byte as llama.cpp reads and writes them."""

from lq_formats.ggml.legacy import (
    dequantize_q4_0,
    dequantize_q4_1,
    dequantize_q5_0,
    dequantize_q5_1,
    dequantize_q8_0,
    quantize_q4_0,
    quantize_q4_1,
    quantize_q5_0,
    quantize_q5_1,
    quantize_q8_0,
)
from lq_formats.ggml.q8_1 import dequantize_q8_1, quantize_q8_1
from lq_formats.ggml.registry import GGML_FORMATS, GGMLFormat, ggml_format

__all__ = [
    "GGML_FORMATS",
    "GGMLFormat",
    "dequantize_q4_0",
    "dequantize_q4_1",
    "dequantize_q5_0",
    "dequantize_q5_1",
    "dequantize_q8_0",
    "dequantize_q8_1",
    "ggml_format",
    "quantize_q4_0",
    "quantize_q4_1",
    "quantize_q5_0",
    "quantize_q5_1",
    "quantize_q8_0",
    "quantize_q8_1",
]

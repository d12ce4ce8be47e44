"""ggml block formats: 32 or 256 elements with their scales, byte for byte as llama.cpp reads and writes them."""

from lq_formats.ggml.iq4_nl import dequantize_iq4_nl, quantize_iq4_nl
from lq_formats.ggml.kquants import (
    dequantize_q2_k,
    dequantize_q3_k,
    dequantize_q4_k,
    dequantize_q5_k,
    dequantize_q6_k,
)
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
from lq_formats.ggml.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from lq_formats.ggml.q4_q5_k import quantize_q4_k, quantize_q5_k
from lq_formats.ggml.q6_k import quantize_q6_k
from lq_formats.ggml.q8_1 import dequantize_q8_1, quantize_q8_1
from lq_formats.ggml.registry import GGML_FORMATS, GGMLFormat, ggml_format

__all__ = [
    "GGML_FORMATS",
    "GGMLFormat",
    "dequantize_iq4_nl",
    "dequantize_mxfp4",
    "dequantize_q2_k",
    "dequantize_q3_k",
    "dequantize_q4_0",
    "dequantize_q4_1",
    "dequantize_q4_k",
    "dequantize_q5_0",
    "dequantize_q5_1",
    "dequantize_q5_k",
    "dequantize_q6_k",
    "dequantize_q8_0",
    "dequantize_q8_1",
    "ggml_format",
    "quantize_iq4_nl",
    "quantize_mxfp4",
    "quantize_q4_0",
    "quantize_q4_1",
    "quantize_q4_k",
    "quantize_q5_0",
    "quantize_q5_1",
    "quantize_q5_k",
    "quantize_q6_k",
    "quantize_q8_0",
    "quantize_q8_1",
]

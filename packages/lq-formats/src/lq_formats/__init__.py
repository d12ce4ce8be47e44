"""lq-formats: pure codecs for low-bit weights.

Floats to codes, scales and zeros; codes to packed bits; one format to another. Plain torch on any device.
"""

from lq_formats import layouts
from lq_formats.affine import choose_qparams, dequantize_affine, quantize_affine
from lq_formats.bitpack import pack_bits, packed_items, unpack_bits
from lq_formats.errors import (
    CompileError,
    DeviceError,
    DTypeError,
    FormatError,
    GroupSizeError,
    LaunchError,
    LQError,
    MissingPackageError,
    NoKernelError,
    NonFiniteError,
    OutOfRangeError,
    ShapeError,
    SizeOverflowError,
    SpecError,
    StorageError,
    UnknownVersionError,
    UnsupportedError,
)
from lq_formats.ggml import (
    GGML_FORMATS,
    GGMLFormat,
    dequantize_q4_0,
    dequantize_q4_1,
    dequantize_q5_0,
    dequantize_q5_1,
    dequantize_q8_0,
    dequantize_q8_1,
    ggml_format,
    quantize_q4_0,
    quantize_q4_1,
    quantize_q5_0,
    quantize_q5_1,
    quantize_q8_0,
    quantize_q8_1,
)
from lq_formats.int4 import dequantize_i4_pack8, pack_int4, quantize_i4_pack8, unpack_int4
from lq_formats.int8 import dequantize_weight_int8, quantize_weight_per_channel, quantize_weight_per_tensor
from lq_formats.search import search_qparams
from lq_formats.spec import QuantSpec
from lq_formats.validation import check_elements, check_finite, check_float, check_matrix

__all__ = [
    "GGML_FORMATS",
    "CompileError",
    "DTypeError",
    "DeviceError",
    "FormatError",
    "GGMLFormat",
    "GroupSizeError",
    "LQError",
    "LaunchError",
    "MissingPackageError",
    "NoKernelError",
    "NonFiniteError",
    "OutOfRangeError",
    "QuantSpec",
    "ShapeError",
    "SizeOverflowError",
    "SpecError",
    "StorageError",
    "UnknownVersionError",
    "UnsupportedError",
    "check_elements",
    "check_finite",
    "check_float",
    "check_matrix",
    "choose_qparams",
    "dequantize_affine",
    "dequantize_i4_pack8",
    "dequantize_q4_0",
    "dequantize_q4_1",
    "dequantize_q5_0",
    "dequantize_q5_1",
    "dequantize_q8_0",
    "dequantize_q8_1",
    "dequantize_weight_int8",
    "ggml_format",
    "layouts",
    "pack_bits",
    "pack_int4",
    "packed_items",
    "quantize_affine",
    "quantize_i4_pack8",
    "quantize_q4_0",
    "quantize_q4_1",
    "quantize_q5_0",
    "quantize_q5_1",
    "quantize_q8_0",
    "quantize_q8_1",
    "quantize_weight_per_channel",
    "quantize_weight_per_tensor",
    "search_qparams",
    "unpack_bits",
    "unpack_int4",
]

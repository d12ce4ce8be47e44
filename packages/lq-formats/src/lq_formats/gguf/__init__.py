"""GGUF: the file that llama.cpp keeps models in. A reader that maps the file and trusts nothing in it, and a writer.

torch and the standard library are all they need. Which tensor of a model is which is lq-torch's to know.
"""

from lq_formats.gguf.reader import GGUFFile, GGUFTensor, open_gguf
from lq_formats.gguf.types import GGML_TYPES, GGMLType, ggml_type
from lq_formats.gguf.values import GGUFValue, StringArray, ValueType
from lq_formats.gguf.writer import TensorSource, write_gguf

__all__ = [
    "GGML_TYPES",
    "GGMLType",
    "GGUFFile",
    "GGUFTensor",
    "GGUFValue",
    "StringArray",
    "TensorSource",
    "ValueType",
    "ggml_type",
    "open_gguf",
    "write_gguf",
]

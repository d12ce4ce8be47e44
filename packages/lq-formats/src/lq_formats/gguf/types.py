"""The tensor types of ggml by their number in a file: how many elements and bytes a block has.

A plain type is a torch dtype, its block one element. Of the others lq knows the size; those in
:data:`lq_formats.GGML_FORMATS` it also reads. Numbers that are missing were removed from ggml, or are not known yet.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from lq_formats.errors import FormatError, SpecError
from lq_formats.ggml import GGML_FORMATS

# ggml's own tensors have four dimensions; torch computes strides of any size, so that the elements must be countable.
MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 2**60


@dataclass(frozen=True)
class GGMLType:
    """One tensor type.

    Attributes:
        code: Its number in files.
        name: ggml's name in lower case, for example ``"q4_0"`` or ``"bf16"``.
        block_size: Elements in a block; blocks lie along the last dimension.
        type_size: Bytes in a block.
        dtype: The torch dtype of a plain type; None for blocks.
    """

    code: int
    name: str
    block_size: int
    type_size: int
    dtype: torch.dtype | None = None

    def block_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the bytes of a tensor ``(..., K)``: ``(..., K // block_size, type_size)``.

        Raises:
            FormatError: If the shape is none that a file can have, or K is not a multiple of ``block_size``.
        """
        if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) >= _MAX_ELEMENTS:
            raise FormatError(
                f"the shape {list(shape)} is none of a tensor: expected at most {MAX_DIMENSIONS} dimensions and fewer than "
                "2**60 elements"
            )
        columns = shape[-1] if shape else 1
        if columns % self.block_size:
            raise FormatError(
                f"the shape {list(shape)} does not fit {self.name}: expected the last dimension to be a multiple of "
                f"{self.block_size}"
            )
        return (*shape[:-1], columns // self.block_size, self.type_size)


_PLAIN = (
    GGMLType(0, "f32", 1, 4, torch.float32),
    GGMLType(1, "f16", 1, 2, torch.float16),
    GGMLType(24, "i8", 1, 1, torch.int8),
    GGMLType(25, "i16", 1, 2, torch.int16),
    GGMLType(26, "i32", 1, 4, torch.int32),
    GGMLType(27, "i64", 1, 8, torch.int64),
    GGMLType(28, "f64", 1, 8, torch.float64),
    GGMLType(30, "bf16", 1, 2, torch.bfloat16),
)
_CODES = {
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q8_1": 9,
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
    "iq4_nl": 20,
    "mxfp4": 39,
}
_READ = tuple(
    GGMLType(code, name, GGML_FORMATS[name].block_size, GGML_FORMATS[name].type_size) for name, code in _CODES.items()
)
# Sizes as in ggml's block structures; lq skips over such tensors and says which one it cannot read.
_SIZED = (
    GGMLType(15, "q8_k", 256, 292),
    GGMLType(16, "iq2_xxs", 256, 66),
    GGMLType(17, "iq2_xs", 256, 74),
    GGMLType(18, "iq3_xxs", 256, 98),
    GGMLType(19, "iq1_s", 256, 50),
    GGMLType(21, "iq3_s", 256, 110),
    GGMLType(22, "iq2_s", 256, 82),
    GGMLType(23, "iq4_xs", 256, 136),
    GGMLType(29, "iq1_m", 256, 56),
    GGMLType(34, "tq1_0", 256, 54),
    GGMLType(35, "tq2_0", 256, 66),
    GGMLType(40, "nvfp4", 64, 36),
    GGMLType(41, "q1_0", 128, 18),
)
_ALL = (*_PLAIN, *_READ, *_SIZED)

GGML_TYPES: Mapping[str, GGMLType] = MappingProxyType({item.name: item for item in _ALL})
TYPES_BY_CODE: Mapping[int, GGMLType] = MappingProxyType({item.code: item for item in _ALL})
TYPES_BY_DTYPE: Mapping[torch.dtype, GGMLType] = MappingProxyType(
    {item.dtype: item for item in _PLAIN if item.dtype is not None}
)


def ggml_type(name: str) -> GGMLType:
    """Return the type called ``name`` (any case).

    Raises:
        SpecError: If there is none.
    """
    found = GGML_TYPES.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise SpecError(f"unknown ggml type {name!r}: expected one of {', '.join(GGML_TYPES)}")
    return found

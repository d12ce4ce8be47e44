"""The ggml formats that lq knows, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from lq_formats.errors import SpecError
from lq_formats.ggml import legacy, q8_1
from lq_formats.ggml.blocks import BLOCK_SIZE


@dataclass(frozen=True)
class GGMLFormat:
    """One block format.

    Attributes:
        name: ggml's name in lower case, for example ``"q4_0"``.
        block_size: Elements in a block.
        type_size: Bytes in a block.
        quantize: ``(..., K)`` floats to ``(..., K // block_size, type_size) uint8``.
        dequantize: The inverse, up to rounding; takes an optional dtype.
    """

    name: str
    block_size: int
    type_size: int
    quantize: Callable[[Tensor], Tensor]
    dequantize: Callable[..., Tensor]

    @property
    def bits_per_weight(self) -> float:
        """Bits per element, scales included."""
        return self.type_size * 8 / self.block_size


_FORMATS = (
    GGMLFormat("q4_0", BLOCK_SIZE, 18, legacy.quantize_q4_0, legacy.dequantize_q4_0),
    GGMLFormat("q4_1", BLOCK_SIZE, 20, legacy.quantize_q4_1, legacy.dequantize_q4_1),
    GGMLFormat("q5_0", BLOCK_SIZE, 22, legacy.quantize_q5_0, legacy.dequantize_q5_0),
    GGMLFormat("q5_1", BLOCK_SIZE, 24, legacy.quantize_q5_1, legacy.dequantize_q5_1),
    GGMLFormat("q8_0", BLOCK_SIZE, 34, legacy.quantize_q8_0, legacy.dequantize_q8_0),
    GGMLFormat("q8_1", BLOCK_SIZE, 36, q8_1.quantize_q8_1, q8_1.dequantize_q8_1),
)
GGML_FORMATS: Mapping[str, GGMLFormat] = MappingProxyType({item.name: item for item in _FORMATS})


def ggml_format(name: str) -> GGMLFormat:
    """Return the format called ``name`` (any case).

    Raises:
        SpecError: If there is none.
    """
    found = GGML_FORMATS.get(name.lower())
    if found is None:
        raise SpecError(f"unknown ggml format {name!r}: expected one of {', '.join(GGML_FORMATS)}")
    return found

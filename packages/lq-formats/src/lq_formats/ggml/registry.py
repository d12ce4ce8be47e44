"""The ggml formats that lq knows, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from lq_formats.errors import SpecError, UnsupportedError
from lq_formats.ggml import iq4_nl, kquants, legacy, mxfp4, q4_q5_k, q6_k, q8_1
from lq_formats.ggml.blocks import BLOCK_SIZE
from lq_formats.ggml.kquants import SUPER_BLOCK


@dataclass(frozen=True)
class GGMLFormat:
    """One block format.

    Attributes:
        name: ggml's name in lower case, for example ``"q4_0"``.
        block_size: Elements in a block.
        type_size: Bytes in a block.
        dequantize: ``(..., K // block_size, type_size) uint8`` to ``(..., K)`` floats; takes an optional dtype.
        quantizer: The inverse, up to rounding; None if lq only reads the format.
        halves: Byte offsets of a block's float16 fields: scales and minima.
        weighted: Whether ``quantizer`` takes an importance (:mod:`lq_formats.ggml.importance`).
    """

    name: str
    block_size: int
    type_size: int
    dequantize: Callable[..., Tensor]
    quantizer: Callable[..., Tensor] | None = None
    halves: tuple[int, ...] = (0,)
    weighted: bool = False

    def quantize(self, x: Tensor, importance: Tensor | None = None) -> Tensor:
        """Quantize ``(..., K)`` floats to blocks ``(..., K // block_size, type_size) uint8``.

        Args:
            x: Floating point weights, K a multiple of ``block_size``.
            importance: ``(K,)``, how much an error in a column counts; for formats that search their scales.

        Raises:
            DTypeError, ShapeError, NonFiniteError: If ``x`` is not finite floats with such a K, or ``importance`` not K.
            UnsupportedError: If lq only reads the format, or it does not search.
        """
        if self.quantizer is None:
            written = ", ".join(form.name for form in _FORMATS if form.quantizer is not None)
            raise UnsupportedError(f"lq reads {self.name} but does not quantize to it; it quantizes to {written}")
        if importance is None:
            return self.quantizer(x)
        if not self.weighted:
            searched = ", ".join(form.name for form in _FORMATS if form.weighted)
            raise UnsupportedError(f"{self.name} is quantized without a search; an importance goes with {searched}")
        return self.quantizer(x, importance)

    @property
    def bits_per_weight(self) -> float:
        """Bits per element, scales included."""
        return self.type_size * 8 / self.block_size


_FORMATS = (
    GGMLFormat("q4_0", BLOCK_SIZE, 18, legacy.dequantize_q4_0, legacy.quantize_q4_0, weighted=True),
    GGMLFormat("q4_1", BLOCK_SIZE, 20, legacy.dequantize_q4_1, legacy.quantize_q4_1, halves=(0, 2)),
    GGMLFormat("q5_0", BLOCK_SIZE, 22, legacy.dequantize_q5_0, legacy.quantize_q5_0),
    GGMLFormat("q5_1", BLOCK_SIZE, 24, legacy.dequantize_q5_1, legacy.quantize_q5_1, halves=(0, 2)),
    GGMLFormat("q8_0", BLOCK_SIZE, 34, legacy.dequantize_q8_0, legacy.quantize_q8_0),
    GGMLFormat("q8_1", BLOCK_SIZE, 36, q8_1.dequantize_q8_1, q8_1.quantize_q8_1, halves=(0, 2)),
    GGMLFormat("iq4_nl", BLOCK_SIZE, 18, iq4_nl.dequantize_iq4_nl, iq4_nl.quantize_iq4_nl, weighted=True),
    GGMLFormat("mxfp4", BLOCK_SIZE, 17, mxfp4.dequantize_mxfp4, mxfp4.quantize_mxfp4, halves=()),
    GGMLFormat("q2_k", SUPER_BLOCK, 84, kquants.dequantize_q2_k, halves=(80, 82)),
    GGMLFormat("q3_k", SUPER_BLOCK, 110, kquants.dequantize_q3_k, halves=(108,)),
    GGMLFormat("q4_k", SUPER_BLOCK, 144, kquants.dequantize_q4_k, q4_q5_k.quantize_q4_k, halves=(0, 2), weighted=True),
    GGMLFormat("q5_k", SUPER_BLOCK, 176, kquants.dequantize_q5_k, q4_q5_k.quantize_q5_k, halves=(0, 2), weighted=True),
    GGMLFormat("q6_k", SUPER_BLOCK, 210, kquants.dequantize_q6_k, q6_k.quantize_q6_k, halves=(208,), weighted=True),
)
GGML_FORMATS: Mapping[str, GGMLFormat] = MappingProxyType({item.name: item for item in _FORMATS})


def ggml_format(name: str) -> GGMLFormat:
    """Return the format called ``name`` (any case).

    Raises:
        SpecError: If there is none.
    """
    found = GGML_FORMATS.get(name.lower()) if isinstance(name, str) else None
    if found is None:
        raise SpecError(f"unknown ggml format {name!r}: expected one of {', '.join(GGML_FORMATS)}")
    return found

"""lq-formats: pure codecs for low-bit weights."""

from lq_formats.spec import QuantSpec

__all__ = ["QuantSpec"]

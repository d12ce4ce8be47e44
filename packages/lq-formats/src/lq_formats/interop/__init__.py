"""Checkpoints of other libraries: what their ``quantization_config`` says, and the tensors of their layers, both ways.

A :class:`CheckpointFormat` reads the tensors of one linear layer into an :class:`lq_formats.layouts.AffineWeight` and
writes them back. Bits lie as :mod:`lq_formats.layouts` draws them; here are names, conventions and configurations.
Nothing is rounded: what a format cannot hold is an error.
"""

from lq_formats.interop.auto_round import AutoRoundFormat
from lq_formats.interop.awq import AWQFormat
from lq_formats.interop.checkpoint_format import CheckpointFormat, LayerScheme
from lq_formats.interop.compressed_tensors import CompressedTensorsFormat
from lq_formats.interop.gptq import GPTQFormat
from lq_formats.interop.hqq import HQQFormat
from lq_formats.interop.registry import EXPORTS, export_format, method_of, read_format

__all__ = [
    "EXPORTS",
    "AWQFormat",
    "AutoRoundFormat",
    "CheckpointFormat",
    "CompressedTensorsFormat",
    "GPTQFormat",
    "HQQFormat",
    "LayerScheme",
    "export_format",
    "method_of",
    "read_format",
]

"""lq-torch: low-bit Linear layers for PyTorch."""

from lq_torch.config import (
    GGMLWeightOnlyConfig,
    Int4PackingFormat,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    WeightConfig,
)
from lq_torch.quantize import dequantize_, quantize_
from lq_torch.tensors import GGMLTensor, Int4Tensor, Int4TilePackedTensor, Int8Tensor, LowBitTensor

__all__ = [
    "GGMLTensor",
    "GGMLWeightOnlyConfig",
    "Int4PackingFormat",
    "Int4Tensor",
    "Int4TilePackedTensor",
    "Int4WeightOnlyConfig",
    "Int8Tensor",
    "Int8WeightOnlyConfig",
    "LowBitTensor",
    "WeightConfig",
    "dequantize_",
    "quantize_",
]

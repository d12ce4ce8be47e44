"""Quantized weights as tensor subclasses, one a file."""

import lq_torch.tensors.embedding  # noqa: F401  (F.embedding of ggml blocks)
from lq_torch.tensors.base import LowBitTensor
from lq_torch.tensors.gated import GatedTensor, Int4GatedTensor, Int8GatedTensor
from lq_torch.tensors.gemlite_dynamic import GemliteTensor
from lq_torch.tensors.ggml import GGMLTensor
from lq_torch.tensors.int4 import Int4Tensor
from lq_torch.tensors.int4_dynamic import Int4DynamicTensor
from lq_torch.tensors.int4_gemlite import Int4GemliteTensor
from lq_torch.tensors.int4_permuted import Int4PermutedTensor
from lq_torch.tensors.int4_tile_packed import Int4TilePackedTensor
from lq_torch.tensors.int8 import Int8Tensor
from lq_torch.tensors.int8_dynamic import Int8DynamicTensor
from lq_torch.tensors.intx import IntxTensor
from lq_torch.tensors.preshuffled import Int4PreshuffledTensor, Int8PreshuffledTensor
from lq_torch.tensors.transposed import TransposedWeight

__all__ = [
    "GGMLTensor",
    "GatedTensor",
    "GemliteTensor",
    "Int4DynamicTensor",
    "Int4GatedTensor",
    "Int4GemliteTensor",
    "Int4PermutedTensor",
    "Int4PreshuffledTensor",
    "Int4Tensor",
    "Int4TilePackedTensor",
    "Int8DynamicTensor",
    "Int8GatedTensor",
    "Int8PreshuffledTensor",
    "Int8Tensor",
    "IntxTensor",
    "LowBitTensor",
    "TransposedWeight",
]

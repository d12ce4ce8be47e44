"""lq-torch: low-bit Linear layers for PyTorch."""

from lq_torch.checkpoint import load, save_pretrained
from lq_torch.config import (
    GGMLWeightOnlyConfig,
    Int4PackingFormat,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    WeightConfig,
)
from lq_torch.config_dynamic import Int4DynamicActivationConfig, Int8DynamicActivationConfig
from lq_torch.config_intx import IntxWeightOnlyConfig
from lq_torch.gemlite_config import GemliteConfig
from lq_torch.gguf import load_gguf, save_gguf
from lq_torch.integrations.gemlite import force_kernel, load_kernel_cache, save_kernel_cache
from lq_torch.interop import export_pretrained, import_pretrained
from lq_torch.linear import Int4PackedLinear, Int8Linear, QuantizedLinear, replace_linear_with_int4
from lq_torch.merge import merge_linears, unmerge_linears
from lq_torch.quantize import dequantize_, quantize_
from lq_torch.rotation import Rotation, rotate_
from lq_torch.safetensors_header import SafetensorsHeader, check_safetensors
from lq_torch.tensors import (
    GemliteTensor,
    GGMLTensor,
    Int4DynamicTensor,
    Int4GemliteTensor,
    Int4PermutedTensor,
    Int4PreshuffledTensor,
    Int4Tensor,
    Int4TilePackedTensor,
    Int8DynamicTensor,
    Int8PreshuffledTensor,
    Int8Tensor,
    IntxTensor,
    LowBitTensor,
)
from lq_torch.warmup import warmup

__all__ = [
    "GGMLTensor",
    "GGMLWeightOnlyConfig",
    "GemliteConfig",
    "GemliteTensor",
    "Int4DynamicActivationConfig",
    "Int4DynamicTensor",
    "Int4GemliteTensor",
    "Int4PackedLinear",
    "Int4PackingFormat",
    "Int4PermutedTensor",
    "Int4PreshuffledTensor",
    "Int4Tensor",
    "Int4TilePackedTensor",
    "Int4WeightOnlyConfig",
    "Int8DynamicActivationConfig",
    "Int8DynamicTensor",
    "Int8Linear",
    "Int8PreshuffledTensor",
    "Int8Tensor",
    "Int8WeightOnlyConfig",
    "IntxTensor",
    "IntxWeightOnlyConfig",
    "LowBitTensor",
    "QuantizedLinear",
    "Rotation",
    "SafetensorsHeader",
    "WeightConfig",
    "check_safetensors",
    "dequantize_",
    "export_pretrained",
    "force_kernel",
    "import_pretrained",
    "load",
    "load_gguf",
    "load_kernel_cache",
    "merge_linears",
    "quantize_",
    "replace_linear_with_int4",
    "rotate_",
    "save_gguf",
    "save_kernel_cache",
    "save_pretrained",
    "unmerge_linears",
    "warmup",
]

"""The product that a quantized layer is, as lq's kernels name it: what selection looks at, and what is compiled for it."""

import torch
from lq_formats import QuantSpec
from lq_formats.layouts import GGML_FRAGMENTS
from lq_kernels import Arch, Problem
from lq_kernels.ops import preshuffled_spec
from lq_kernels.problem import Q4_0_SPEC, Op
from lq_kernels.reference import int4_spec, int8_spec
from torch import Tensor, nn

from lq_torch.linear import Int4PackedLinear, Int8Linear
from lq_torch.tensors import (
    GatedTensor,
    GGMLTensor,
    Int4DynamicTensor,
    Int4PermutedTensor,
    Int4PreshuffledTensor,
    Int4Tensor,
    Int8DynamicTensor,
    Int8PreshuffledTensor,
    Int8Tensor,
)


def problem_of(layer: Tensor | nn.Module, m: int, dtype: torch.dtype) -> Problem | None:
    """Return the product of ``m`` tokens with a weight of :mod:`lq_torch.tensors` or a module of :mod:`lq_torch.linear`.

    Args:
        layer: The weight, or the module.
        m: Tokens.
        dtype: Of the activations.

    Returns:
        None for formats that are not compiled ahead (gemlite, tinygemm, ggml in planes and, but for Q4_0, in blocks).
    """
    if isinstance(layer, Int4PackedLinear):
        spec = int4_spec(layer.group_size, layer.in_features, True, layer.scales.dtype)
        arch = Arch.of(layer.packed.device)
        return Problem("int4", m, layer.out_features, layer.in_features, spec, dtype, arch)
    if isinstance(layer, Int8Linear):
        arch = Arch.of(layer.weight.device)
        return Problem(
            "int8",
            m,
            layer.out_features,
            layer.in_features,
            int8_spec(layer.scale),
            dtype,
            arch,
        )
    if isinstance(layer, nn.Module) or layer.dim() != 2:
        return None
    (n, k), arch = layer.shape, Arch.of(layer.device)
    if isinstance(layer, Int4Tensor | Int4PermutedTensor):
        spec = int4_spec(layer.group_size, k, layer.zero is None, layer.scale.dtype)
        return Problem("int4", m, n, k, spec, dtype, arch)
    if isinstance(layer, Int8Tensor):
        return Problem("int8", m, n, k, int8_spec(layer.scale), dtype, arch)
    fragments: Op = "preshuffled_gated" if isinstance(layer, GatedTensor) else "preshuffled"
    if isinstance(layer, Int4PreshuffledTensor):
        spec = int4_spec(layer.group_size, k, layer.zero is None, layer.scale.dtype)
        return Problem(fragments, m, n, k, spec, dtype, arch)
    if isinstance(layer, Int8PreshuffledTensor):
        return Problem(fragments, m, n, k, QuantSpec(8, "row", None, True, layer.scale.dtype), dtype, arch)
    if isinstance(layer, Int4DynamicTensor):
        spec = int4_spec(layer.group_size, k, True, layer.scale.dtype)
        return Problem("int4_dynamic", m, n, k, spec, dtype, arch, layer.activation)
    if isinstance(layer, Int8DynamicTensor):
        return Problem("int8_dynamic", m, n, k, int8_spec(layer.scale), dtype, arch, layer.activation)
    if isinstance(layer, GGMLTensor) and layer.fragments() is not None:
        symmetric, bits = layer.minima is None, GGML_FRAGMENTS[layer.ggml_type].bits
        spec = preshuffled_spec(bits, 32, k, symmetric, torch.float16)
        return Problem("preshuffled" if symmetric else "preshuffled_minima", m, n, k, spec, dtype, arch)
    if isinstance(layer, GGMLTensor) and layer.ggml_type == "q4_0":
        return Problem("q4_0", m, n, k, Q4_0_SPEC, dtype, arch)
    return None

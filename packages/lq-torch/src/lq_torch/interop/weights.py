"""One layer's weight between :class:`lq_formats.layouts.AffineWeight` and lq's tensors, bit for bit."""

import torch
from lq_formats import UnsupportedError, pack_int4, unpack_bits, unpack_int4
from lq_formats.layouts import AffineWeight

from lq_torch.tensors import LowBitTensor
from lq_torch.tensors.int4 import Int4Tensor
from lq_torch.tensors.int4_permuted import Int4PermutedTensor
from lq_torch.tensors.int8 import Int8Tensor
from lq_torch.tensors.intx import IntxTensor

# Their files hold the canonical tensors of an Int4Tensor.
_INT4 = ("int4", "int4_preshuffled", "int4_tile_packed", "int4_gemlite")


def to_tensor(weight: AffineWeight, dtype: torch.dtype) -> LowBitTensor:
    """Return the tensor that holds a weight with the best kernels there are for it.

    Args:
        weight: ``(N, K)``, 2 to 8 bits.
        dtype: The nominal dtype of the result; codes, scales and zeros keep theirs.

    Raises:
        UnsupportedError: If no tensor holds it: a ``g_idx`` with other than 4 bits, or 1 bit.
        FormatError: If its ``g_idx`` gives groups different sizes.
    """
    in_order, order = weight.sorted_by_group()
    if weight.bits == 4:
        plain = Int4Tensor.from_packed(
            pack_int4(in_order.codes),
            in_order.scale,
            in_order.zero,
            group_size=in_order.group_size,
            in_features=in_order.in_features,
            dtype=dtype,
        )
        return plain if order is None else Int4PermutedTensor.from_plain(plain, order.to(torch.int32))
    if order is not None or weight.bits == 1:
        raise UnsupportedError(
            f"{weight.bits} bits with {'a g_idx' if order is not None else 'one code'}: lq holds g_idx (desc_act) with 4 "
            "bits, and 2 to 8 bits without"
        )
    if weight.bits == 8 and weight.zero is None and weight.groups == 1:
        signed = (weight.codes ^ 128).view(torch.int8)
        return Int8Tensor({"qdata": signed, "scale": weight.scale.flatten()}, {}, weight.codes.shape, dtype)
    return IntxTensor.from_codes(weight.codes, weight.scale, weight.zero, bits=weight.bits, dtype=dtype)


def to_affine(weight: LowBitTensor) -> AffineWeight:
    """Return codes, scales and zeros of a tensor; the inverse of :func:`to_tensor`.

    Raises:
        UnsupportedError: If it is not such a weight: ggml blocks, one scale for the whole tensor, other floats.
    """
    columns, attributes = weight.shape[1], weight.attributes()
    tensors = weight.to_tensors() if weight.kind in (*_INT4, "int4_permuted", "int8", "intx") else {}
    scale, zero = tensors.get("scale"), tensors.get("zero")
    if scale is None or scale.dim() == 0 or (weight.kind == "int4_gemlite" and attributes["bits"] != 4):
        raise UnsupportedError(
            f"a {type(weight).__name__} has no form in other libraries' checkpoints: they hold integers with scales by "
            "group or row"
        )
    if weight.kind == "int8":
        return AffineWeight(tensors["qdata"].view(torch.uint8) ^ 128, scale.unsqueeze(1), None, 8)
    if weight.kind == "intx":
        bits: int = attributes["bits"]
        return AffineWeight(unpack_bits(tensors["qdata"], bits, columns), scale, zero, bits)
    codes = unpack_int4(tensors["qdata"], columns)
    if weight.kind != "int4_permuted":
        return AffineWeight(codes, scale, zero)
    position = torch.argsort(tensors["order"])
    g_idx = (position // attributes["group_size"]).to(torch.int32)
    return AffineWeight(codes[:, position].contiguous(), scale, zero, g_idx=g_idx)

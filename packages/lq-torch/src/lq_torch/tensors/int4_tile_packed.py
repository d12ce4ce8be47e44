"""Int4TilePackedTensor: ATen's tinygemm layout, ``int4_packing_format="tile_packed_to_4d"``.

The bits are those of ``torch.ops.aten._convert_weight_to_int4pack`` with ``inner_k_tiles = 8``, made here in plain torch so
that packing, unpacking and checkpoints need no GPU. The packed tensor is ``(N/8, K/128, 32, 4) int32``; the word of
8-row tile ``a``, 128-column tile ``b``, lane ``t`` and pair ``p`` holds eight codes of row ``8a + t/4``, columns
``128b + 32p + 2(t % 4) + ...``::

    bit      31   28 27   24 23   20 19   16 15   12 11    8 7     4 3     0
    column   | +25   | +17   | +9    | +1    | +24   | +16   | +8    | +0    |

The product is ``(u - 8) * scale + offset`` in bf16; an integer zero becomes ``offset = (8 - zero) * scale``, rounded to bf16.
It comes back from there exactly, because ``|8 - zero| <= 8`` and bf16 rounds by less than 1/256. So files hold canonical
codes, scales and zeros, those of an :class:`Int4Tensor` of the same weight.
"""

from collections.abc import Iterator
from typing import ClassVar, Self

import torch
from lq_formats import (
    DTypeError,
    FormatError,
    GroupSizeError,
    ShapeError,
    UnsupportedError,
    pack_int4,
    quantize_affine,
    search_qparams,
    unpack_int4,
)
from lq_kernels.derivatives import wants_gradient
from lq_kernels.validation import check_dense_dtype
from torch import Tensor

from lq_torch.tensors.base import LowBitTensor
from lq_torch.tensors.int4 import check_canonical, int4_spec
from lq_torch.tensors.saved import SavedWeight

INNER_K_TILES = 8
_GROUP_SIZES = (32, 64, 128, 256)
_CHUNK_CODES = 1 << 18


def pack_tile_4d(codes: Tensor) -> Tensor:
    """Pack 4-bit codes ``(N, K) uint8`` as ``(N/8, K/128, 32, 4) int32``; N % 8 == 0 and K % 128 == 0."""
    rows, columns = codes.shape
    lanes = codes.view(rows // 8, 8, columns // 128, 4, 32)  # row tile, row, column tile, pair, column in pair
    # Column in pair = nibble's offset + 2 * (lane % 4); offsets cover {0, 8, 16, 24} + {0, 1}.
    parts = lanes.view(rows // 8, 8, columns // 128, 4, 4, 4, 2)  # ..., offset / 8, lane % 4, odd
    order = parts.permute(0, 2, 1, 5, 3, 6, 4)  # row tile, column tile, row, lane % 4, pair, odd, offset / 8
    nibbles = order.reshape(rows // 8, columns // 128, 32, 4, 8)
    octets = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    return octets.contiguous().view(torch.int32).squeeze(-1)


def unpack_tile_4d(packed: Tensor) -> Tensor:
    """Undo :func:`pack_tile_4d`: ``(N/8, K/128, 32, 4) int32`` to ``(N, K) uint8``."""
    row_tiles, column_tiles = packed.shape[:2]
    octets = packed.contiguous().view(torch.uint8).view(row_tiles, column_tiles, 32, 4, 4, 1)
    nibbles = torch.cat((octets & 0x0F, octets >> 4), dim=-1)
    order = nibbles.reshape(row_tiles, column_tiles, 8, 4, 4, 2, 4)  # ..., row, lane % 4, pair, odd, offset / 8
    parts = order.permute(0, 2, 1, 4, 6, 3, 5)
    return parts.reshape(row_tiles * 8, column_tiles * 128)


def from_canonical(words: Tensor) -> Tensor:
    """Repack canonical codes ``(N, K/8) int32``, a few rows at a time, so that all codes are never unpacked at once."""
    rows, columns = words.shape[0], words.shape[1] * 8
    packed = torch.empty((rows // 8, columns // 128, 32, 4), dtype=torch.int32, device=words.device)
    for start, stop in _chunks(rows, columns):
        packed[start // 8 : stop // 8] = pack_tile_4d(unpack_int4(words[start:stop], columns))
    return packed


def to_canonical(packed: Tensor) -> Tensor:
    """Undo :func:`from_canonical`."""
    rows, columns = packed.shape[0] * 8, packed.shape[1] * 128
    words = torch.empty((rows, columns // 8), dtype=torch.int32, device=packed.device)
    for start, stop in _chunks(rows, columns):
        words[start:stop] = pack_int4(unpack_tile_4d(packed[start // 8 : stop // 8]))
    return words


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(_CHUNK_CODES // columns // 8 * 8, 8)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


class Int4TilePackedTensor(LowBitTensor):
    """A 4-bit weight ``(N, K)`` in ATen's tinygemm layout, bf16 only.

    On CUDA it multiplies with ``aten._weight_int4pack_mm``; elsewhere it is dequantized for each product.

    Attributes:
        qdata: ``(N/8, K/128, 32, 4) int32``.
        scale_and_zero: ``(K // group_size, N, 2) bfloat16``: scale and offset.
        group_size: 32, 64, 128 or 256.
        symmetric: Whether every zero is 8, and none is saved.
    """

    tensor_names: ClassVar = ("qdata", "scale_and_zero")
    attribute_names: ClassVar = ("group_size", "symmetric")
    saved_names: ClassVar = ("qdata", "scale", "zero")
    kind: ClassVar = "int4_tile_packed"
    qdata: Tensor
    scale_and_zero: Tensor
    group_size: int
    symmetric: bool

    @classmethod
    def from_hp(cls, w: Tensor, group_size: int = 128, *, symmetric: bool = True, algorithm: str = "rtn") -> Self:
        """Quantize a bf16 weight ``(N, K)`` with N % 8 == 0 and K % 128 == 0; zeros are integers.

        Raises:
            DTypeError: If ``w`` is not bf16.
            ShapeError, GroupSizeError: If the layout does not take these sizes.
            NonFiniteError: If ``w`` holds NaN or infinity.
        """
        cls.check_shape(w, group_size)
        spec = int4_spec(group_size, symmetric, torch.bfloat16)
        scale, zero = search_qparams(w, spec, algorithm, integer_zero=True)
        codes = quantize_affine(w, scale, zero, spec)
        tensors = {"qdata": pack_tile_4d(codes), "scale_and_zero": _with_offset(scale, zero)}
        return cls(tensors, {"group_size": group_size, "symmetric": symmetric}, w.shape, w.dtype)

    @staticmethod
    def check_shape(w: Tensor, group_size: int) -> None:
        """Raise unless ATen's layout takes this weight."""
        if w.dtype != torch.bfloat16:
            raise DTypeError(
                f"tile_packed_to_4d takes bfloat16 weights, not {w.dtype}; use int4_packing_format='plain'"
            )
        if group_size not in _GROUP_SIZES:
            raise GroupSizeError(f"tile_packed_to_4d takes groups of {_GROUP_SIZES}, not {group_size}")
        if w.dim() != 2 or w.shape[0] % 8 or w.shape[1] % 128 or w.shape[1] == 0:
            raise ShapeError(
                f"tile_packed_to_4d needs N % 8 == 0 and K % 128 == 0, got {tuple(w.shape)}; use "
                "int4_packing_format='plain'"
            )
        if w.shape[1] % group_size:
            raise GroupSizeError(f"group_size={group_size} does not divide in_features={w.shape[1]}")

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight ``(u - 8) * scale + offset`` in ``dtype`` (default: bf16)."""
        check_dense_dtype(dtype or self.dtype)
        rows, columns = self.shape
        codes = unpack_tile_4d(self.qdata).to(torch.float32).view(rows, columns // self.group_size, self.group_size)
        scale, offset = self.scale_and_zero.to(torch.float32).permute(2, 1, 0).unsqueeze(-1)
        w: Tensor = (codes - 8) * scale + offset
        return w.view(rows, columns).to(dtype or self.dtype)

    def why_not_batch_invariant(self) -> str | None:
        """Return why: kernels of another library."""
        return (
            "it is multiplied by ATen, whose results depend on the number of tokens; quantize to another packing format"
        )

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``."""
        if not _runs_tinygemm(x):
            return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm(flat, self.qdata, self.group_size, self.scale_and_zero)
        y = y.view(*x.shape[:-1], self.shape[0])
        return y if bias is None else y + bias

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors fit the shape and the group size."""
        rows, columns = saved.matrix()
        size, symmetric = saved.attributes["group_size"], saved.attributes["symmetric"]
        known = type(size) is int and size in _GROUP_SIZES and columns % size == 0
        if not known or rows % 8 or columns % 128:
            raise FormatError(f"shape {saved.shape} with group_size={size!r} is not a tinygemm weight")
        check_canonical(saved, size)
        groups = (rows, columns // size)
        saved.expect("scale", groups, torch.bfloat16)
        if type(symmetric) is not bool or symmetric is ("zero" in saved.tensors):
            raise FormatError(
                f"symmetric={symmetric!r}: expected a boolean, and a tensor 'zero' exactly where it is false"
            )
        if not symmetric:
            saved.expect("zero", groups, torch.uint8)

    @classmethod
    def from_saved(cls, saved: SavedWeight) -> Self:
        """Repack canonical bits."""
        scale_and_zero = _with_offset(saved.tensors["scale"], saved.tensors.get("zero"))
        tensors = {"qdata": from_canonical(saved.tensors["qdata"]), "scale_and_zero": scale_and_zero}
        return cls(tensors, saved.attributes, saved.shape, saved.dtype)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return canonical codes, scales and, unless symmetric, integer zeros.

        Raises:
            UnsupportedError: If an offset is none that an integer zero gives.
        """
        scale, offset = self.scale_and_zero.permute(2, 1, 0)
        tensors = {"qdata": to_canonical(self.qdata), "scale": scale.contiguous()}
        if not self.symmetric:
            wide = scale.to(torch.float32)
            steps = torch.where(wide != 0, offset.to(torch.float32) / wide, 0)
            tensors["zero"] = (8 - steps.round()).clamp(0, 255).to(torch.uint8).contiguous()
        if not torch.equal(_with_offset(scale, tensors.get("zero")), self.scale_and_zero):
            raise UnsupportedError(
                "the offsets of this tile-packed weight are not (8 - zero) * scale of integer zeros, so it has no "
                "canonical form to save; dequantize it and quantize again"
            )
        return tensors


def _with_offset(scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return ``(G, N, 2) bfloat16``: scales ``(N, G)`` and the offsets ``(8 - zero) * scale``, 0 without zeros."""
    wide = scale.to(torch.float32)
    offset = torch.zeros_like(wide) if zero is None else (8 - zero.to(torch.float32)) * wide
    return torch.stack((wide.t(), offset.t()), dim=-1).to(torch.bfloat16).contiguous()


def _runs_tinygemm(x: Tensor) -> bool:
    """Whether ``aten._weight_int4pack_mm`` takes ``x``: bf16 on compute capability 8.0, and it has no gradient."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or x.numel() == 0:
        return False
    if wants_gradient(x):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(x.device) >= (8, 0)

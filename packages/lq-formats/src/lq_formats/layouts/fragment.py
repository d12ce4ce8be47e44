"""FRAGMENT_INT4 and FRAGMENT_INT8: codes in the order in which tensor cores take them.

A warp that multiplies with ``mma.sync m16n8k16`` (or a quarter of a warpgroup with ``wgmma``) holds a 16 x 16 piece of the
weight as its A operand, eight codes a lane. Here a lane finds its codes of several such pieces in 16 consecutive bytes, so
a warp reads 512 consecutive bytes, without bank conflicts and without moving a bit between lanes; one layout serves every
Hopper kernel of lq. Nothing is rounded or dropped: ``unpack`` gives the canonical codes back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lq_formats.errors import DTypeError, ShapeError, SpecError
from lq_formats.validation import check_codes, check_elements, check_matrix

ROW_TILE = 64
"""Out features of a tile; the packed weight is padded to whole tiles."""
K_TILE = 128
"""In features that the packed weight is padded to a multiple of."""
_BLOCKS, _LANES, _WORDS = 4, 32, 4


@dataclass(frozen=True)
class FragmentLayout:
    """Codes of a weight ``(N, K)`` as ``(ceil(N / 64), Kp / kt, 4, 32, 4) int32``, Kp = K rounded up to 128.

    Dimensions: row tile of 64, K tile of ``kt`` (64 for 4 bits, 32 for 8), block of 16 rows, lane, word. Lane
    ``4 g + t`` of block ``b`` in row tile ``r`` and K tile ``i`` holds rows ``64 r + 16 b + g`` (``rh = 0``) and the one
    eight further down (``rh = 1``).

    4 bits: word ``j`` is the k16 step ``j``; its nibble ``rh + 2 kh + 4 h`` is ``k = 64 i + 16 j + 8 kh + 2 t + h``::

        bit   31   28 27   24 23   20 19   16 15   12 11    8 7     4 3     0
        rh kh h 1 1 1 | 0 1 1 | 1 0 1 | 0 0 1 | 1 1 0 | 0 1 0 | 1 0 0 | 0 0 0

    8 bits: word ``2 j + kh`` of the k16 step ``j``; its byte ``rh + 2 h`` is ``k = 32 i + 16 j + 8 kh + 2 t + h``, signed
    (the unsigned code minus 128)::

        bit   31       24 23       16 15        8 7         0
              rh=1, h=1  | rh=0, h=1 | rh=1, h=0 | rh=0, h=0

    Padding has the code of zero (8, or 128).

    Scales and zeros ``(N, G)`` are tiled alike, ``(ceil(N / 64), Gp, 64)``: the 64 rows of a tile and group are one
    piece. Padded rows and groups have scale 0 and zero 0.
    """

    bits: int
    name: str

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise SpecError(f"bits={self.bits}: fragment order exists for 4 and 8 bits")

    @property
    def k_tile(self) -> int:
        """In features of the 512 bytes that a warp reads at once."""
        return 256 // self.bits

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, int, int, int, int]:
        """Return the shape of the packed int32 tensor."""
        check_elements(out_features, in_features)
        padded = -(-in_features // K_TILE) * K_TILE
        return (-(-out_features // ROW_TILE), padded // self.k_tile, _BLOCKS, _LANES, _WORDS)

    def pack(self, codes: Tensor) -> Tensor:
        """Pack ``(N, K) uint8`` codes.

        Raises:
            ShapeError, DTypeError: If ``codes`` is not a uint8 matrix of codes of this many bits.
        """
        n, k = check_matrix(codes, "codes")
        check_codes(codes, self.bits)
        tiles, steps, *_ = self.packed_shape(n, k)
        if (tiles * ROW_TILE, steps * self.k_tile) != (n, k):
            padding = (0, steps * self.k_tile - k, 0, tiles * ROW_TILE - n)
            codes = torch.nn.functional.pad(codes, padding, value=1 << (self.bits - 1))
        # Dimensions: 0 tile, 1 block, 2 rh, 3 g, 4 K tile, 5 j, 6 kh, 7 t, 8 h
        split = codes.view(tiles, _BLOCKS, 2, 8, steps, self.k_tile // 16, 2, 4, 2)
        if self.bits == 4:
            ordered = split.permute(0, 4, 1, 3, 7, 5, 8, 6, 2).reshape(tiles, steps, _BLOCKS, _LANES, 16, 2)
            data = ordered[..., 0] | (ordered[..., 1] << 4)
        else:
            data = split.permute(0, 4, 1, 3, 7, 5, 6, 8, 2).reshape(tiles, steps, _BLOCKS, _LANES, 16) ^ 0x80
        return data.contiguous().view(torch.int32)

    def unpack(self, packed: Tensor, out_features: int, in_features: int) -> Tensor:
        """Return the ``(out_features, in_features) uint8`` codes.

        Raises:
            ShapeError, DTypeError: If ``packed`` is not the packed tensor of such a weight.
        """
        if packed.dtype != torch.int32:
            raise DTypeError(f"packed has dtype {packed.dtype}: expected int32")
        shape = self.packed_shape(out_features, in_features)
        if tuple(packed.shape) != shape:
            raise ShapeError(f"packed has shape {tuple(packed.shape)}: expected {shape}")
        tiles, steps = shape[:2]
        data = packed.contiguous().view(torch.uint8)
        if self.bits == 4:
            data = torch.stack((data & 0x0F, data >> 4), dim=-1)
            # Dimensions: 0 tile, 1 K tile, 2 block, 3 g, 4 t, 5 j, 6 h, 7 kh, 8 rh
            split = data.view(tiles, steps, _BLOCKS, 8, 4, 4, 2, 2, 2).permute(0, 2, 8, 3, 1, 5, 7, 4, 6)
        else:
            # Dimensions: 0 tile, 1 K tile, 2 block, 3 g, 4 t, 5 j, 6 kh, 7 h, 8 rh
            split = (data ^ 0x80).view(tiles, steps, _BLOCKS, 8, 4, 2, 2, 2, 2).permute(0, 2, 8, 3, 1, 5, 6, 4, 7)
        codes = split.reshape(tiles * ROW_TILE, steps * self.k_tile)
        return codes[:out_features, :in_features].contiguous()

    def tile_scales(self, values: Tensor, groups: int) -> Tensor:
        """Return scales or zeros ``(N, G)`` as ``(ceil(N / 64), groups, 64)``, padded with zeros.

        Args:
            values: ``(N, G)``, any dtype.
            groups: Groups after padding, at least G.
        """
        n, present = check_matrix(values, "values")
        tiles = -(-n // ROW_TILE)
        padded = torch.nn.functional.pad(values, (0, groups - present, 0, tiles * ROW_TILE - n))
        return padded.view(tiles, ROW_TILE, groups).transpose(1, 2).contiguous()

    def untile_scales(self, tiled: Tensor, out_features: int, groups: int) -> Tensor:
        """Return the ``(out_features, groups)`` that :meth:`tile_scales` was given.

        Raises:
            ShapeError: If ``tiled`` is not so many.
        """
        tiles = -(-out_features // ROW_TILE)
        if tiled.dim() != 3 or (tiled.shape[0], tiled.shape[2]) != (tiles, ROW_TILE) or tiled.shape[1] < groups:
            expected = (tiles, f">= {groups}", ROW_TILE)
            raise ShapeError(f"tiled has shape {tuple(tiled.shape)}: expected {expected}")
        rows = tiled.transpose(1, 2).reshape(tiles * ROW_TILE, tiled.shape[1])
        return rows[:out_features, :groups].contiguous()


FRAGMENT_INT4 = FragmentLayout(4, "fragment-int4")
FRAGMENT_INT8 = FragmentLayout(8, "fragment-int8")

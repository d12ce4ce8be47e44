"""FRAGMENT_INT4 and FRAGMENT_INT8: codes in the order in which tensor cores take them.

A warp that multiplies with ``mma.sync m16n8k16`` (or a quarter of a warpgroup with ``wgmma``) holds a 16 x 16 piece of the
weight as its A operand, eight codes a lane. Here a lane finds its codes of several such pieces in 16 consecutive bytes, so
a warp reads 512 consecutive bytes, without bank conflicts and without moving a bit between lanes; one layout serves every
Hopper kernel of lq. K is the outermost dimension: any number of neighbouring blocks of 16 rows is one contiguous piece of a
K step, so that rows can be shared among multiprocessors in units of 16. Nothing is rounded or dropped: ``unpack`` gives
the canonical codes back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lq_formats.bitpack import as_octets
from lq_formats.errors import DTypeError, GroupSizeError, ShapeError, SpecError
from lq_formats.validation import check_codes, check_elements, check_matrix

BLOCK_ROWS = 16
"""Out features of a block; the packed weight is padded to whole blocks."""
BLOCK_BYTES = 1024
"""Bytes of a block's codes in one K step."""
_HALVES, _LANES, _WORDS = 2, 32, 4


@dataclass(frozen=True)
class FragmentLayout:
    """Codes of a weight ``(N, K)`` as ``(ceil(K / step), ceil(N / 16), 2, 32, 4) int32``, step = 128 for 4 bits, 64 for 8.

    Dimensions: K step, block of 16 rows, half of the step, lane, word. Lane ``4 g + t`` of block ``b`` holds rows
    ``16 b + g`` (``rh = 0``) and ``16 b + g + 8`` (``rh = 1``) of half ``i`` of step ``s``.

    4 bits: word ``j`` is the k16 step ``j`` of the half; its nibble ``rh + 2 kh + 4 h`` is
    ``k = 128 s + 64 i + 16 j + 8 kh + 2 t + h``::

        bit   31   28 27   24 23   20 19   16 15   12 11    8 7     4 3     0
        rh kh h 1 1 1 | 0 1 1 | 1 0 1 | 0 0 1 | 1 1 0 | 0 1 0 | 1 0 0 | 0 0 0

    8 bits: word ``2 j + kh`` of the k16 step ``j`` of the half; its byte ``rh + 2 h`` is
    ``k = 64 s + 32 i + 16 j + 8 kh + 2 t + h``, signed (the unsigned code minus 128)::

        bit   31       24 23       16 15        8 7         0
              rh=1, h=1  | rh=0, h=1 | rh=1, h=0 | rh=0, h=0

    Padding has the code of zero (8, or 128).

    Scales and zeros ``(N, G)`` are arranged alike, ``(Gp, ceil(N / 16) * 16)``, and a lane's two rows are neighbours: within
    a block the order of rows is 0, 8, 1, 9, ..., 7, 15. Padding has scale 0 and zero 0. Where a K step is ``c`` whole groups, a
    block's of a step lie together, so that they too are one contiguous piece: ``(Gp / c, ceil(N / 16) * c * 16)``.
    """

    bits: int
    name: str

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise SpecError(f"bits={self.bits}: fragment order exists for 4 and 8 bits")

    @property
    def step(self) -> int:
        """In features of a K step."""
        return 512 // self.bits

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, int, int, int, int]:
        """Return the shape of the packed int32 tensor."""
        check_elements(out_features, in_features)
        return (-(-in_features // self.step), -(-out_features // BLOCK_ROWS), _HALVES, _LANES, _WORDS)

    def pack(self, codes: Tensor) -> Tensor:
        """Pack ``(N, K) uint8`` codes.

        Raises:
            ShapeError, DTypeError: If ``codes`` is not a uint8 matrix of codes of this many bits.
        """
        n, k = check_matrix(codes, "codes")
        check_codes(codes, self.bits)
        steps, blocks, *_ = self.packed_shape(n, k)
        if (blocks * BLOCK_ROWS, steps * self.step) != (n, k):
            padding = (0, steps * self.step - k, 0, blocks * BLOCK_ROWS - n)
            codes = torch.nn.functional.pad(codes, padding, value=1 << (self.bits - 1))
        # Dimensions: 0 block, 1 rh, 2 g, 3 step, 4 half, 5 j, 6 kh, 7 t, 8 h
        split = codes.view(blocks, 2, 8, steps, _HALVES, self.step // 32, 2, 4, 2)
        if self.bits == 4:
            ordered = split.permute(3, 0, 4, 2, 7, 5, 8, 6, 1).reshape(steps, blocks, _HALVES, _LANES, 16, 2)
            data = ordered[..., 0] | (ordered[..., 1] << 4)
        else:
            data = split.permute(3, 0, 4, 2, 7, 5, 6, 8, 1).reshape(steps, blocks, _HALVES, _LANES, 16) ^ 0x80
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
        steps, blocks = shape[:2]
        data = as_octets(packed)
        if self.bits == 4:
            data = torch.stack((data & 0x0F, data >> 4), dim=-1)
            # Dimensions: 0 step, 1 block, 2 half, 3 g, 4 t, 5 j, 6 h, 7 kh, 8 rh
            split = data.view(steps, blocks, _HALVES, 8, 4, 4, 2, 2, 2).permute(1, 8, 3, 0, 2, 5, 7, 4, 6)
        else:
            # Dimensions: 0 step, 1 block, 2 half, 3 g, 4 t, 5 j, 6 kh, 7 h, 8 rh
            split = (data ^ 0x80).view(steps, blocks, _HALVES, 8, 4, 2, 2, 2, 2).permute(1, 8, 3, 0, 2, 5, 6, 4, 7)
        codes = split.reshape(blocks * BLOCK_ROWS, steps * self.step)
        return codes[:out_features, :in_features].contiguous()

    def unpack_rows(self, packed: Tensor, rows: Tensor, in_features: int) -> Tensor:
        """Return the ``(R, in_features) uint8`` codes of some rows; the others are not read.

        Args:
            packed: As :meth:`pack` returns it.
            rows: ``(R,) int64`` on its device, 0 to N - 1, in any order and as often as wanted.
            in_features: K.

        Raises:
            ShapeError, DTypeError: If ``packed`` is not the packed tensor of a weight with so many in features.
        """
        if packed.dtype != torch.int32:
            raise DTypeError(f"packed has dtype {packed.dtype}: expected int32")
        blocks = packed.shape[1] if packed.dim() == 5 else 0
        shape = self.packed_shape(blocks * BLOCK_ROWS, in_features)
        if tuple(packed.shape) != shape:
            raise ShapeError(f"packed has shape {tuple(packed.shape)}: expected {shape}")
        block, g, high = _place(rows)
        lanes = packed.contiguous().view(shape[0], blocks, _HALVES, 8, 4, _WORDS)[:, block, :, g].contiguous()
        count = rows.shape[0]
        high = high.view(count, 1, 1, 1, 1, 1, 1)
        if self.bits == 4:
            # Dimensions: 0 row, 1 step, 2 half, 3 t, 4 j, 5 h, 6 kh
            data = lanes.view(torch.uint8).view(count, shape[0], _HALVES, 4, 4, 2, 2)
            codes = torch.where(high, data >> 4, data & 0x0F).permute(0, 1, 2, 4, 6, 3, 5)
        else:
            # Dimensions: 0 row, 1 step, 2 half, 3 t, 4 j, 5 kh, 6 h, 7 rh
            data = lanes.view(torch.uint8).view(count, shape[0], _HALVES, 4, 2, 2, 2, 2) ^ 0x80
            codes = torch.where(high, data[..., 1], data[..., 0]).permute(0, 1, 2, 4, 5, 3, 6)
        return codes.reshape(count, shape[0] * self.step)[:, :in_features].contiguous()

    def scale_shape(self, out_features: int, in_features: int, group_size: int) -> tuple[int, int]:
        """Return the shape of arranged scales; ``group_size`` is in features per scale, K for one scale a row.

        Raises:
            GroupSizeError: If ``group_size`` is not positive.
        """
        groups, together = self._groups(in_features, group_size)
        return groups // together, -(-out_features // BLOCK_ROWS) * together * BLOCK_ROWS

    def arrange_scales(self, values: Tensor, in_features: int, group_size: int) -> Tensor:
        """Return scales or zeros ``(N, G)``, of any dtype, in the shape of :meth:`scale_shape`, padded with zeros.

        Raises:
            ShapeError: If G is not the number of groups; in features after the last whole one may have one of their own.
            GroupSizeError: As in :meth:`scale_shape`.
        """
        n, present = check_matrix(values, "values")
        groups, together = self._groups(in_features, group_size)
        whole, all_groups = max(in_features // group_size, 1), -(-in_features // group_size)
        if present not in (whole, all_groups):
            raise ShapeError(
                f"values has shape {tuple(values.shape)}: expected (N, {all_groups}), one for each {group_size} of "
                f"{in_features} in features"
            )
        blocks = -(-n // BLOCK_ROWS)
        padded = torch.nn.functional.pad(values, (0, groups - present, 0, blocks * BLOCK_ROWS - n))
        # Dimensions: 0 block, 1 rh, 2 g, 3 step, 4 group of the step
        split = padded.view(blocks, 2, 8, groups // together, together).permute(3, 0, 4, 2, 1)
        return split.reshape(groups // together, blocks * together * BLOCK_ROWS).contiguous()

    def restore_scales(self, arranged: Tensor, out_features: int, in_features: int, group_size: int) -> Tensor:
        """Return the ``(out_features, in_features // group_size)`` that :meth:`arrange_scales` was given.

        Raises:
            ShapeError: If ``arranged`` is not so many.
        """
        shape = self.scale_shape(out_features, in_features, group_size)
        if tuple(arranged.shape) != shape:
            raise ShapeError(f"arranged has shape {tuple(arranged.shape)}: expected {shape}")
        together, rows = self._groups(in_features, group_size)[1], -(-out_features // BLOCK_ROWS) * BLOCK_ROWS
        # Dimensions: 0 step, 1 block, 2 group of the step, 3 g, 4 rh
        split = arranged.view(shape[0], rows // BLOCK_ROWS, together, 8, 2).permute(1, 4, 3, 0, 2)
        return split.reshape(rows, shape[0] * together)[:out_features, : in_features // group_size].contiguous()

    def restore_scale_rows(self, arranged: Tensor, rows: Tensor, in_features: int, group_size: int) -> Tensor:
        """Return the ``(R, in_features // group_size)`` that :meth:`arrange_scales` was given for some rows ``(R,) int64``.

        Raises:
            ShapeError: If ``arranged`` is not of so many groups.
        """
        groups, together = self._groups(in_features, group_size)
        width = together * BLOCK_ROWS
        if arranged.dim() != 2 or arranged.shape[0] != groups // together or arranged.shape[1] % width:
            expected = f"({groups // together}, a multiple of {width})"
            raise ShapeError(f"arranged has shape {tuple(arranged.shape)}: expected {expected}")
        block, g, high = _place(rows)
        # Dimensions: 0 row, 1 step, 2 group of the step: what is indexed comes first
        some = arranged.view(groups // together, -1, together, BLOCK_ROWS)[:, block, :, 2 * g + high]
        return some.reshape(rows.shape[0], groups)[:, : in_features // group_size].contiguous()

    def _groups(self, in_features: int, group_size: int) -> tuple[int, int]:
        """Return how many groups there are in whole K steps (one for one scale a row), and how many of a step lie together."""
        if group_size < 1:
            raise GroupSizeError(f"group_size={group_size}: expected at least 1, or {in_features} for one scale a row")
        if group_size == in_features:
            return 1, 1
        padded = -(-in_features // self.step) * self.step
        return -(-padded // group_size), max(1, self.step // group_size) if self.step % group_size == 0 else 1


def _place(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return block, g and whether rh is 1 of rows."""
    return rows // BLOCK_ROWS, rows % 8, rows % BLOCK_ROWS >= 8


FRAGMENT_INT4 = FragmentLayout(4, "fragment-int4")
FRAGMENT_INT8 = FragmentLayout(8, "fragment-int8")

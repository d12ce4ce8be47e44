"""FRAGMENT_A8_INT8 and FRAGMENT_A8_FP8: int4 codes in the order in which tensor cores take 8-bit operands.

A warp that multiplies 8-bit numbers (``mma.sync m16n8k32``, or a quarter of a warpgroup with ``wgmma``) holds a 16 x 32 piece
of the weight as its A operand, sixteen codes a lane: four registers of four neighbouring k. A word here is two of these
registers, rows g and g + 8, and its nibbles are such that at most three instructions unpack its eight codes to 8 bits.
Blocks, K steps, halves and lanes are those of :mod:`lq_formats.layouts.fragment`, and so are the scales. Nothing is rounded
or dropped: ``unpack`` gives the canonical codes back.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lq_formats.errors import DTypeError, ShapeError, SpecError
from lq_formats.layouts.fragment import BLOCK_ROWS, FRAGMENT_INT4
from lq_formats.validation import check_codes, check_elements, check_matrix

_HALVES, _LANES, _WORDS = 2, 32, 4


@dataclass(frozen=True)
class Fragment8Layout:
    """Codes of a weight ``(N, K)`` as ``(ceil(K / 128), ceil(N / 16), 2, 32, 4) int32``.

    Dimensions: K step of 128, block of 16 rows, half of the step, lane, word. Lane ``4 g + t`` of block ``b`` holds rows
    ``16 b + g`` (low) and ``16 b + g + 8`` (high). Word ``2 j + kh`` of half ``i`` of step ``s`` holds of both rows, in byte
    ``c``, ``k = 128 s + 64 i + 32 j + 16 kh + 4 t + c``.

    For int8 tokens a nibble is the code minus 8 in two's complement (a byte with the other nibble masked is 16 times it)::

        bit of byte c   7 6 5 4   | 3 2 1 0
                        high row  | low row

    For fp8 tokens a nibble is a sign and a magnitude modulo 8, so that a byte with bits 3 to 6 cleared is the e4m3 number
    2**-9 times the code minus 8. Rotating a word by a nibble brings the high row's into the same place: the high row's
    sign for byte ``c`` is in byte ``c + 1`` (of byte 3: in byte 0). Minus zero stands for -8::

        bit of byte c   7            | 6 5 4                | 3                         | 2 1 0
                        low row sign | high row's magnitude | high row's sign, byte c-1 | low row's magnitude

    Padding has the code of zero (8).
    """

    tokens: Literal["int8", "fp8"]
    name: str

    def __post_init__(self) -> None:
        if self.tokens not in ("int8", "fp8"):
            raise SpecError(f"tokens={self.tokens!r}: expected 'int8' or 'fp8'")

    bits = 4
    step = 128

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, int, int, int, int]:
        """Return the shape of the packed int32 tensor."""
        check_elements(out_features, in_features)
        return (-(-in_features // self.step), -(-out_features // BLOCK_ROWS), _HALVES, _LANES, _WORDS)

    def pack(self, codes: Tensor) -> Tensor:
        """Pack ``(N, K) uint8`` codes 0 to 15.

        Raises:
            ShapeError, DTypeError: If ``codes`` is not a uint8 matrix of 4-bit codes.
        """
        n, k = check_matrix(codes, "codes")
        check_codes(codes, self.bits)
        steps, blocks, *_ = self.packed_shape(n, k)
        if (blocks * BLOCK_ROWS, steps * self.step) != (n, k):
            codes = torch.nn.functional.pad(codes, (0, steps * self.step - k, 0, blocks * BLOCK_ROWS - n), value=8)
        # Dimensions: 0 block, 1 rh, 2 g, 3 step, 4 half, 5 j, 6 kh, 7 t, 8 c
        split = codes.view(blocks, 2, 8, steps, _HALVES, 2, 2, 4, 4).permute(3, 0, 4, 2, 7, 5, 6, 8, 1)
        low, high = (part.reshape(steps, blocks, _HALVES, _LANES, _WORDS, 4) for part in split.unbind(-1))
        if self.tokens == "int8":
            data = (low ^ 8) | ((high ^ 8) << 4)
        else:
            low_sign, low_magnitude = _split(low)
            high_sign, high_magnitude = _split(high)
            data = (low_sign << 7) | (high_magnitude << 4) | (high_sign.roll(1, -1) << 3) | low_magnitude
        return data.contiguous().view(torch.int32).squeeze(-1)

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
        data = packed.contiguous().unsqueeze(-1).view(torch.uint8)
        if self.tokens == "int8":
            low, high = (data & 0x0F) ^ 8, (data >> 4) ^ 8
        else:
            low = _join(data >> 7, data & 7)
            high = _join(((data >> 3) & 1).roll(-1, -1), (data >> 4) & 7)
        # Dimensions: 0 step, 1 block, 2 half, 3 g, 4 t, 5 j, 6 kh, 7 c, 8 rh
        split = torch.stack((low, high), dim=-1).view(steps, blocks, _HALVES, 8, 4, 2, 2, 4, 2)
        codes = split.permute(1, 8, 3, 0, 2, 5, 6, 4, 7).reshape(blocks * BLOCK_ROWS, steps * self.step)
        return codes[:out_features, :in_features].contiguous()

    def scale_shape(self, out_features: int, in_features: int, group_size: int) -> tuple[int, int]:
        """Return the shape of arranged scales; see :class:`FragmentLayout`, and for the next two."""
        return FRAGMENT_INT4.scale_shape(out_features, in_features, group_size)

    def arrange_scales(self, values: Tensor, in_features: int, group_size: int) -> Tensor:
        """Return scales ``(N, G)`` in the shape of :meth:`scale_shape`.

        Raises:
            ShapeError: If G is not the number of groups.
            GroupSizeError: If ``group_size`` is not positive.
        """
        return FRAGMENT_INT4.arrange_scales(values, in_features, group_size)

    def restore_scales(self, arranged: Tensor, out_features: int, in_features: int, group_size: int) -> Tensor:
        """Return the ``(out_features, in_features // group_size)`` that :meth:`arrange_scales` was given.

        Raises:
            ShapeError: If ``arranged`` is not so many.
        """
        return FRAGMENT_INT4.restore_scales(arranged, out_features, in_features, group_size)


def _split(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return sign and magnitude modulo 8 of codes minus 8."""
    negative = codes < 8
    return negative.to(torch.uint8), torch.where(negative, 8 - codes, codes) & 7


def _join(sign: Tensor, magnitude: Tensor) -> Tensor:
    """Undo :func:`_split`: minus zero is -8."""
    return torch.where(sign > 0, (8 - magnitude) & 7, magnitude + 8)


FRAGMENT_A8_INT8 = Fragment8Layout("int8", "fragment-a8-int8")
FRAGMENT_A8_FP8 = Fragment8Layout("fp8", "fragment-a8-fp8")

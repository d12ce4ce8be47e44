"""GGML_PLANES: the bits of ggml's blocks, apart by kind, as kernels read them.

Blocks of 17, 18, 34 or 210 bytes keep codes at odd addresses. A plane layout has the same bits in three tensors that are
read in whole words, row by row: codes, the upper bits of 5-bit and 6-bit codes, and scales. Nothing is decoded, so the
blocks come back byte for byte; rows stay rows and can be cut and stacked.

**Codes**, ``(N, words) int32``. With ``g`` weights a scale (``group``, 32 or 16) and ``f = 32 / bits`` fields in a word,
``g`` words hold a *chunk* of ``f g`` weights, so that field ``i`` of its words is group ``i``, and lanes that read
neighbouring words hold neighbouring weights::

    word j of chunk c, 4 bits    31..28          27..24   ...   7..4            3..0
                                 8gc + 7g + j                   8gc + g + j     8gc + j

8 bits have 4 fields, 2 bits 16. Signed bytes (Q8_0) are stored as ``q + 128``.

**Upper bits**, ``(N, words)``, uint8 where a word has 8 of them, int16 for 16: field ``i`` (of 1 or 2 bits) of lane ``j``
belongs to field ``i`` of word ``j`` above. None for codes of 2, 4 and 8 bits.

**Scales**, ``(N, words) int32``: bytes of the blocks, block after block, in this order (``.`` is a zero byte)::

    Q4_0 Q5_0 Q8_0 IQ4_NL   d:2                        Q4_K Q5_K   d:2 dmin:2 scales:12
    Q4_1 Q5_1               d:2 m:2                    Q6_K        scales:16 d:2 .:2
    MXFP4                   e:1                        Q2_K        scales:16 d:2 dmin:2
                                                       Q3_K        scales:12 d:2 .:2

Rows are padded with zero bytes to whole chunks: 256 weights, 128 for Q8_0 and Q6_K. So a weight takes as many bytes as in
blocks, but for Q6_K (212 for 210), Q3_K (112 for 110), and K that is not a multiple of the chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lq_formats.bitpack import as_octets
from lq_formats.errors import DTypeError, ShapeError
from lq_formats.ggml.registry import GGML_FORMATS, GGMLFormat, ggml_format
from lq_formats.validation import check_elements, check_tensor

_PIECE = 1 << 22  # weights that are unpacked at a time


class GGMLPlanes(NamedTuple):
    """A weight's three tensors; ``high`` is None where codes have no upper bits."""

    codes: Tensor
    high: Tensor | None
    scale: Tensor


@dataclass(frozen=True)
class Field:
    """Where codes lie in a block: runs of ``run`` bytes, the lowest ``bits`` of a whole run before the next.

    Attributes:
        offset: First byte.
        bits: Bits a code, 1 to 8.
        run: Bytes a run.
    """

    offset: int
    bits: int
    run: int

    def nbytes(self, block_size: int) -> int:
        """Return the bytes that a block's codes take."""
        return block_size * self.bits // 8

    def read(self, data: Tensor, block_size: int) -> Tensor:
        """Return the codes ``(N, blocks, block_size) uint8`` of blocks ``(N, blocks, type_size)``."""
        rows, count, _ = data.shape
        octets = data[..., self.offset : self.offset + self.nbytes(block_size)]
        runs = octets.reshape(rows, count, self.nbytes(block_size) // self.run, self.run)
        return unpack_fields(runs, self.bits).flatten(2)

    def write(self, codes: Tensor, data: Tensor) -> None:
        """Put codes ``(N, blocks, block_size)`` into blocks; the inverse of :meth:`read`."""
        rows, count, block_size = codes.shape
        nbytes = self.nbytes(block_size)
        runs = codes.reshape(rows, count, nbytes // self.run, 8 // self.bits, self.run)
        data[..., self.offset : self.offset + nbytes] = pack_fields(runs, self.bits).flatten(2)


@dataclass(frozen=True)
class GGMLPlanesLayout:
    """The plane layout of one ggml type; bit diagrams are in the module's docstring.

    Attributes:
        form: The block format.
        group: Weights that share a scale: 32 or 16.
        low: Where a block has the low bits of its codes.
        upper: Where it has the others, or None.
        fields: ``(first byte, bytes)`` of what goes into the scales, in their order.
        padding: Zero bytes after them.
        flip: What is exclusive-or-ed with the codes: 128 makes unsigned ones of signed bytes.
    """

    form: GGMLFormat
    group: int
    low: Field
    upper: Field | None
    fields: tuple[tuple[int, int], ...]
    padding: int = 0
    flip: int = 0

    @property
    def name(self) -> str:
        """The ggml type, for example ``"q4_k"``."""
        return self.form.name

    @property
    def chunk(self) -> int:
        """Weights in a chunk: a row is padded to a multiple of it."""
        return self.group * (32 // self.low.bits)

    @property
    def high_dtype(self) -> torch.dtype | None:
        """What the plane of upper bits holds, or None."""
        if self.upper is None:
            return None
        return torch.uint8 if self.upper.bits * 32 == self.low.bits * 8 else torch.int16

    @property
    def block_scale_bytes(self) -> int:
        """Bytes of scales for each block."""
        return sum(count for _, count in self.fields) + self.padding

    def packed_shape(self, out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the shapes of the codes (and of the upper bits) and of the scales.

        Raises:
            ShapeError: If K is not a positive multiple of the block size.
            SizeOverflowError: If the weight has more elements than fit 63 bits.
        """
        check_elements(out_features, in_features)
        if in_features <= 0 or in_features % self.form.block_size:
            raise ShapeError(
                f"in_features={in_features}: {self.name} needs a positive multiple of {self.form.block_size}"
            )
        padded = self._padded(in_features)
        scales = padded // self.form.block_size * self.block_scale_bytes // 4
        return (out_features, padded * self.low.bits // 32), (out_features, scales)

    def pack(self, blocks: Tensor) -> GGMLPlanes:
        """Return the planes of blocks ``(N, K // block_size, type_size) uint8``.

        Raises:
            ShapeError, DTypeError: If these are not such blocks.
        """
        size = self.form.type_size
        if blocks.dtype != torch.uint8:
            raise DTypeError(f"{self.name} blocks have dtype {blocks.dtype}: expected uint8 bytes")
        if blocks.dim() != 3 or blocks.shape[2] != size or blocks.shape[1] == 0:
            raise ShapeError(f"{self.name} blocks have shape {tuple(blocks.shape)}: expected (N, blocks, {size}) bytes")
        rows, columns = blocks.shape[0], blocks.shape[1] * self.form.block_size
        words, scales = self.packed_shape(rows, columns)
        high = None if self.high_dtype is None else blocks.new_empty(words, dtype=self.high_dtype)
        planes = GGMLPlanes(
            blocks.new_empty(words, dtype=torch.int32), high, blocks.new_empty(scales, dtype=torch.int32)
        )
        for some in _row_slices(rows, columns):
            for plane, part in zip(planes, self._pack(blocks[some]), strict=True):
                if plane is not None and part is not None:
                    plane[some] = part
        return planes

    def _pack(self, blocks: Tensor) -> GGMLPlanes:
        rows, count, block = blocks.shape[0], blocks.shape[1], self.form.block_size
        missing = self._padded(count * block) // block - count
        if missing:
            blocks = torch.nn.functional.pad(blocks, (0, 0, 0, missing))
        codes = self._words((self.low.read(blocks, block) ^ self.flip).flatten(1), self.low.bits)
        high = None if self.upper is None else self._words(self.upper.read(blocks, block).flatten(1), self.upper.bits)
        parts = [blocks[..., at : at + length] for at, length in self.fields]
        scale = torch.nn.functional.pad(torch.cat(parts, dim=-1), (0, self.padding))
        words = scale.flatten().view(torch.int32)
        return GGMLPlanes(codes, high, words.reshape(rows, blocks.shape[1] * self.block_scale_bytes // 4))

    def unpack(self, planes: GGMLPlanes, in_features: int) -> Tensor:
        """Return the blocks ``(N, in_features // block_size, type_size) uint8``; the inverse of :meth:`pack`.

        Raises:
            ShapeError, DTypeError: If the planes are not those of ``in_features`` columns.
        """
        self.check(planes, in_features)
        shape = (planes.codes.shape[0], in_features // self.form.block_size, self.form.type_size)
        blocks = planes.codes.new_empty(shape, dtype=torch.uint8)
        for some in _row_slices(shape[0], in_features):
            high = None if planes.high is None else planes.high[some]
            part = GGMLPlanes(planes.codes[some], high, planes.scale[some])
            self._unpack(part, in_features, blocks[some])
        return blocks

    def _unpack(self, planes: GGMLPlanes, in_features: int, blocks: Tensor) -> None:
        rows, count, _ = blocks.shape
        block = self.form.block_size
        low = self._codes(planes.codes, self.low.bits) ^ self.flip
        self.low.write(low[:, :in_features].reshape(rows, count, block), blocks)
        if self.upper is not None and planes.high is not None:
            high = self._codes(planes.high, self.upper.bits)
            self.upper.write(high[:, :in_features].reshape(rows, count, block), blocks)
        octets = as_octets(planes.scale)
        scale = octets[:, : count * self.block_scale_bytes].reshape(rows, count, self.block_scale_bytes)
        start = 0
        for at, length in self.fields:
            blocks[..., at : at + length] = scale[..., start : start + length]
            start += length

    def check(self, planes: GGMLPlanes, in_features: int) -> None:
        """Raise ShapeError or DTypeError unless the planes are those of a weight with ``in_features`` columns."""
        if not isinstance(planes, GGMLPlanes):
            raise DTypeError(
                f"planes are of type {type(planes).__name__}: expected GGMLPlanes, as {self.name}'s pack makes"
            )
        check_tensor(planes.codes, "codes")
        rows = planes.codes.shape[0] if planes.codes.dim() else 0
        words, scales = self.packed_shape(rows, in_features)
        wanted = (("codes", planes.codes, words, torch.int32), ("scale", planes.scale, scales, torch.int32))
        for name, tensor, shape, dtype in (*wanted, ("high", planes.high, words, self.high_dtype)):
            if (tensor is None) != (dtype is None):
                raise ShapeError(f"{self.name} has {'no' if dtype is None else 'a'} plane {name!r}")
            if tensor is None:
                continue
            check_tensor(tensor, name)
            if tensor.dtype != dtype:
                raise DTypeError(f"{name} has dtype {tensor.dtype}: {self.name} has {dtype}")
            if tuple(tensor.shape) != shape:
                raise ShapeError(
                    f"{name} has shape {tuple(tensor.shape)}: {self.name} with {in_features} in features has {shape}"
                )

    def _padded(self, in_features: int) -> int:
        return -(-in_features // self.chunk) * self.chunk

    def _words(self, codes: Tensor, bits: int) -> Tensor:
        """Return codes ``(N, padded K) uint8`` of ``bits`` bits as words: a field's group side by side."""
        rows, chunks = codes.shape[0], codes.shape[1] // self.chunk
        nbytes = 32 // self.low.bits * bits // 8
        octets = pack_fields(codes.reshape(rows, chunks, nbytes, 8 // bits, self.group), bits)
        words = octets.transpose(-1, -2).flatten().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[nbytes])
        return words.reshape(rows, chunks * self.group)

    def _codes(self, plane: Tensor, bits: int) -> Tensor:
        """Undo :meth:`_words`."""
        rows, chunks = plane.shape[0], plane.shape[1] // self.group
        octets = as_octets(plane).reshape(rows, chunks, self.group, plane.element_size())
        return unpack_fields(octets.transpose(-1, -2), bits).reshape(rows, chunks * self.chunk)


def pack_fields(codes: Tensor, bits: int) -> Tensor:
    """Return ``(..., run) uint8`` bytes of codes ``(..., 8 // bits, run)``, the first in the lowest bits."""
    octets = codes[..., 0, :]
    for number in range(1, 8 // bits):
        octets = octets | codes[..., number, :] << number * bits
    return octets


def unpack_fields(octets: Tensor, bits: int) -> Tensor:
    """Return codes ``(..., 8 // bits, run)`` of bytes ``(..., run) uint8``; the inverse of :func:`pack_fields`."""
    if bits == 8:
        return octets.unsqueeze(-2)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=octets.device).unsqueeze(-1)
    return octets.unsqueeze(-2) >> shifts & (1 << bits) - 1


def _row_slices(rows: int, columns: int) -> list[slice]:
    """Return slices of rows of some million weights: one at a time, unpacked codes take little beside a large weight."""
    step = max(1, _PIECE // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _layout(
    name: str,
    low: tuple[int, int, int],
    upper: tuple[int, int, int] | None,
    *fields: tuple[int, int],
    group: int = 32,
    padding: int = 0,
    flip: int = 0,
) -> GGMLPlanesLayout:
    high = None if upper is None else Field(*upper)
    return GGMLPlanesLayout(GGML_FORMATS[name], group, Field(*low), high, fields, padding, flip)


_LAYOUTS = (
    _layout("q4_0", (2, 4, 16), None, (0, 2)),
    _layout("q4_1", (4, 4, 16), None, (0, 4)),
    _layout("q5_0", (6, 4, 16), (2, 1, 1), (0, 2)),
    _layout("q5_1", (8, 4, 16), (4, 1, 1), (0, 4)),
    _layout("q8_0", (2, 8, 32), None, (0, 2), flip=128),
    _layout("iq4_nl", (2, 4, 16), None, (0, 2)),
    _layout("mxfp4", (1, 4, 16), None, (0, 1)),
    _layout("q2_k", (16, 2, 32), None, (0, 16), (80, 4), group=16),
    _layout("q3_k", (32, 2, 32), (0, 1, 32), (96, 14), group=16, padding=2),
    _layout("q4_k", (16, 4, 32), None, (0, 16)),
    _layout("q5_k", (48, 4, 32), (16, 1, 32), (0, 16)),
    _layout("q6_k", (0, 4, 64), (128, 2, 32), (192, 18), group=16, padding=2),
)
GGML_PLANES: Mapping[str, GGMLPlanesLayout] = MappingProxyType({layout.name: layout for layout in _LAYOUTS})


def ggml_planes(name: str) -> GGMLPlanesLayout:
    """Return the plane layout of a ggml type (any case).

    Raises:
        SpecError: If there is no such type.
        ShapeError: If it is one of activations (Q8_1).
    """
    form = ggml_format(name)
    found = GGML_PLANES.get(form.name)
    if found is None:
        raise ShapeError(f"{form.name} is ggml's format for activations: it has no plane layout")
    return found

"""GGML_FRAGMENTS: ggml's weights in groups of 32 as tensor cores take them, stored once.

Four block formats are affine in groups of 32, so the kernels for fragment order multiply them. Codes are in
:class:`~lq_formats.layouts.FragmentLayout`, scales and minima are fp16 and arranged alike::

    type   weight              codes            scale     minima         fields                   bits a weight
    Q4_0   (u - 8) scale       FRAGMENT_INT4    d         -              -                        4.5
    Q4_1   u scale + minimum   FRAGMENT_INT4    d         m              -                        5.0
    Q4_K   u scale + minimum   FRAGMENT_INT4    d s       -(dmin m)      d:2 dmin:2 scales:12     5.5 (4.5 in blocks)
    Q8_0   (u - 128) scale     FRAGMENT_INT8    d         -              -                        8.5

It is a minimum and not a zero point, since a scale may be 0 where the minimum is not. All blocks come back byte for byte.

Q4_K's ``d s`` and ``dmin m`` are rounded to fp16, 2**-11 of themselves at most: an fp16 number times an integer is a multiple
of 2**-24, the least fp16 number, so none is too small. One beyond 65504 does not fit, and such a weight is refused
(:meth:`GGMLFragmentsLayout.why_not`). Its own scales are kept beside for the way back, as the words of
:data:`~lq_formats.layouts.GGML_PLANES`; products do not read them.

Rows are padded to whole blocks of 16, in features to whole K steps, with scales and minima of 0.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lq_formats.errors import DTypeError, NonFiniteError, ShapeError
from lq_formats.ggml.blocks import read_half
from lq_formats.ggml.kquants import unpack_scale_min
from lq_formats.ggml.registry import GGMLFormat
from lq_formats.layouts.fragment import BLOCK_ROWS, FRAGMENT_INT4, FRAGMENT_INT8, FragmentLayout
from lq_formats.layouts.ggml import GGML_PLANES, GGMLPlanesLayout

GROUP: Final = 32
"""In features that share a scale."""
_PIECE = 1 << 22  # weights that are unpacked at a time


class GGMLFragments(NamedTuple):
    """A weight's tensors; ``minima`` and ``fields`` are None where the type has none."""

    codes: Tensor
    scale: Tensor
    minima: Tensor | None = None
    fields: Tensor | None = None


@dataclass(frozen=True)
class GGMLFragmentsLayout:
    """The fragment layout of one ggml type; the module's docstring has the table.

    Attributes:
        planes: Where a block has what.
        order: The order of the codes.
        has_minimum: Whether a group has a minimum.
        has_fields: Whether blocks have scales of scales, which are kept.
    """

    planes: GGMLPlanesLayout
    order: FragmentLayout
    has_minimum: bool = False
    has_fields: bool = False

    @property
    def form(self) -> GGMLFormat:
        """The block format."""
        return self.planes.form

    @property
    def bits(self) -> int:
        """Bits a code: 4 or 8."""
        return self.order.bits

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the shape of scales and of minima: one row of 32 in features has one scale, all else whole K steps."""
        return self.order.scale_shape(out_features, in_features, GROUP)

    def why_not(self, blocks: Tensor) -> str | None:
        """Return why blocks ``(N, K // block size, block bytes)`` cannot be held so, or None.

        Looks at scales where fp16 may not hold them: on a GPU, that waits for it.
        """
        if self.has_minimum and blocks.shape[1] * self.form.block_size == GROUP:
            return f"{self.form.name} with {GROUP} in features has a minimum for a whole row"
        if self.has_fields:
            for found in _products(blocks):
                if bool((found.abs() > torch.finfo(torch.float16).max).logical_and(found.isfinite()).any()):
                    return f"a scale or minimum of {self.form.name} is beyond float16"
        return None

    def pack(self, blocks: Tensor) -> GGMLFragments:
        """Return the tensors of blocks ``(N, K // block size, block bytes) uint8``.

        Raises:
            ShapeError, DTypeError: If these are not such blocks.
            NonFiniteError: If a scale or minimum is beyond float16.
        """
        size, block = self.form.type_size, self.form.block_size
        if blocks.dtype != torch.uint8:
            raise DTypeError(f"{self.form.name} blocks have dtype {blocks.dtype}: expected uint8 bytes")
        if blocks.dim() != 3 or blocks.shape[2] != size or blocks.shape[1] == 0:
            raise ShapeError(
                f"{self.form.name} blocks have shape {tuple(blocks.shape)}: expected (N, blocks, {size}) bytes"
            )
        rows, columns = blocks.shape[0], blocks.shape[1] * block
        if (reason := self.why_not(blocks)) is not None:
            error = ShapeError if columns == GROUP else NonFiniteError
            raise error(f"{reason}: keep it in planes (GGML_PLANES)")
        codes = blocks.new_empty(self.order.packed_shape(rows, columns), dtype=torch.int32)
        for some in _row_slices(rows, columns):
            part = (self.planes.low.read(blocks[some], block) ^ self.planes.flip).flatten(1)
            codes[:, some.start // BLOCK_ROWS : -(-some.stop // BLOCK_ROWS)] = self.order.pack(part)
        # As integers, so that a NaN keeps its bits.
        scale, *rest = (
            self.order.arrange_scales(bits.view(torch.int16), columns, GROUP).view(torch.float16)
            for bits in self._factors(blocks)
        )
        fields = blocks[..., :16].flatten().view(torch.int32).view(rows, columns // 64) if self.has_fields else None
        return GGMLFragments(codes, scale, rest[0] if rest else None, fields)

    def unpack(self, fragments: GGMLFragments, out_features: int, in_features: int) -> Tensor:
        """Return the blocks ``(out_features, in_features // block size, block bytes) uint8``; the inverse of :meth:`pack`.

        Raises:
            ShapeError, DTypeError: If the tensors are not those of such a weight.
        """
        self.check(fragments, out_features, in_features)
        shape = (out_features, in_features // self.form.block_size, self.form.type_size)
        blocks = fragments.codes.new_empty(shape, dtype=torch.uint8)
        every = torch.arange(out_features, device=blocks.device)
        for some in _row_slices(out_features, in_features):
            self._unpack(fragments, every[some], in_features, blocks[some])
        return blocks

    def unpack_rows(self, fragments: GGMLFragments, rows: Tensor, out_features: int, in_features: int) -> Tensor:
        """Return the blocks of some rows ``(R,) int64``, 0 to N - 1; the others are not read. Errors as :meth:`unpack`."""
        self.check(fragments, out_features, in_features)
        shape = (rows.shape[0], in_features // self.form.block_size, self.form.type_size)
        blocks = fragments.codes.new_empty(shape, dtype=torch.uint8)
        self._unpack(fragments, rows, in_features, blocks)
        return blocks

    def dequantize(
        self, fragments: GGMLFragments, out_features: int, in_features: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return the ``(out_features, in_features)`` weight: the values of its blocks, not of rounded scales."""
        self.check(fragments, out_features, in_features)
        w = fragments.codes.new_empty((out_features, in_features), dtype=dtype)
        every = torch.arange(out_features, device=w.device)
        for some in _row_slices(out_features, in_features):
            w[some] = self.form.dequantize(self.unpack_rows(fragments, every[some], out_features, in_features), dtype)
        return w

    def check(self, fragments: GGMLFragments, out_features: int, in_features: int) -> None:
        """Raise ShapeError or DTypeError unless the tensors are those of a weight ``(out_features, in_features)``."""
        name, block = self.form.name, self.form.block_size
        if in_features <= 0 or in_features % block:
            raise ShapeError(f"in_features={in_features}: {name} needs a positive multiple of {block}")
        scales = self.scale_shape(out_features, in_features)
        wanted: tuple[tuple[str, tuple[int, ...] | None, torch.dtype], ...] = (
            ("codes", self.order.packed_shape(out_features, in_features), torch.int32),
            ("scale", scales, torch.float16),
            ("minima", scales if self.has_minimum else None, torch.float16),
            ("fields", (out_features, in_features // 64) if self.has_fields else None, torch.int32),
        )
        for (what, shape, dtype), tensor in zip(wanted, fragments, strict=True):
            if (tensor is None) != (shape is None):
                raise ShapeError(f"{name} has {'no' if shape is None else 'a'} tensor {what!r}")
            if tensor is None:
                continue
            if tensor.dtype != dtype:
                raise DTypeError(f"{what} has dtype {tensor.dtype}: {name} has {dtype}")
            if tuple(tensor.shape) != shape:
                raise ShapeError(
                    f"{what} has shape {tuple(tensor.shape)}: {name} with {out_features} out and {in_features} in features "
                    f"has {shape}"
                )

    def _factors(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """Return scales, and minima if there are any, ``(N, groups)`` fp16."""
        if self.has_fields:
            scale, low = _products(blocks)
            return scale.to(torch.float16), (-low).to(torch.float16)
        count = 2 if self.has_minimum else 1
        halves = blocks[..., : 2 * count].contiguous().view(torch.float16)
        return tuple(halves[..., i].contiguous() for i in range(count))

    def _unpack(self, fragments: GGMLFragments, rows: Tensor, in_features: int, blocks: Tensor) -> None:
        count, number, _ = blocks.shape
        codes = self.order.unpack_rows(fragments.codes, rows, in_features) ^ self.planes.flip
        self.planes.low.write(codes.view(count, number, self.form.block_size), blocks)
        if fragments.fields is not None:
            blocks[..., :16] = fragments.fields[rows].view(torch.uint8).view(count, number, 16)
            return
        for i, factors in enumerate((fragments.scale, fragments.minima)):
            if factors is not None:
                bits = self.order.restore_scale_rows(factors.view(torch.int16), rows, in_features, GROUP)
                blocks[..., 2 * i : 2 * i + 2] = bits.flatten().view(torch.uint8).view(count, number, 2)


def _products(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``d s`` and ``dmin m (N, groups) float32``, exact, of Q4_K blocks."""
    scale, low = unpack_scale_min(blocks[..., 4:16])
    return (read_half(blocks, 0) * scale).flatten(1), (read_half(blocks, 2) * low).flatten(1)


def _row_slices(rows: int, columns: int) -> Iterator[slice]:
    """Return slices of whole blocks of rows, some million weights each: unpacked codes take little beside a large weight."""
    step = max(_PIECE // columns // BLOCK_ROWS, 1) * BLOCK_ROWS
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


GGML_FRAGMENTS: Mapping[str, GGMLFragmentsLayout] = MappingProxyType(
    {
        "q4_0": GGMLFragmentsLayout(GGML_PLANES["q4_0"], FRAGMENT_INT4),
        "q4_1": GGMLFragmentsLayout(GGML_PLANES["q4_1"], FRAGMENT_INT4, has_minimum=True),
        "q4_k": GGMLFragmentsLayout(GGML_PLANES["q4_k"], FRAGMENT_INT4, has_minimum=True, has_fields=True),
        "q8_0": GGMLFragmentsLayout(GGML_PLANES["q8_0"], FRAGMENT_INT8),
    }
)

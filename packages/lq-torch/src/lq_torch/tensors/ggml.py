"""GGMLTensor: weights in ggml's blocks, byte for byte what a GGUF file holds."""

from collections.abc import Callable
from typing import ClassVar, Literal, Self, TypeAlias

import torch
from lq_formats import DTypeError, FormatError, NonFiniteError, OutOfRangeError, ShapeError, SpecError, ggml_format
from lq_formats.layouts import GGML_FRAGMENTS, GGMLFragments, GGMLPlanes, ggml_planes
from lq_formats.layouts.fragment import BLOCK_ROWS
from lq_formats.layouts.ggml_fragment import GROUP
from lq_kernels import (
    ggml_dequantize,
    ggml_linear,
    minima_dequantize,
    minima_linear,
    preshuffled_dequantize,
    preshuffled_linear,
    q4_0_linear,
    reads_fragments,
)
from lq_kernels.preshuffled import start_compiler
from torch import Tensor

from lq_torch.tensors.base import LowBitTensor, check_weight
from lq_torch.tensors.saved import SavedWeight

_DEVICES_OF_PLANES = ("cuda",)
_FEW_ROWS = 64
_Form: TypeAlias = Literal["blocks", "planes", "fragments"]


class GGMLTensor(LowBitTensor):
    """A weight ``(N, K)`` of ggml blocks.

    On the CPU it holds the blocks, which may lie in a mapped file, and is dequantized for each product. On a GPU it holds the
    same bits apart by kind (:data:`lq_formats.layouts.GGML_PLANES`), once, and multiplies packed; moving it rearranges it, and
    files hold blocks.

    On a Hopper GPU weights of 16 bits of the types in :data:`lq_formats.layouts.GGML_FRAGMENTS` (Q4_0, Q4_1, Q4_K, Q8_0) are in
    fragment order instead, once, for lq's CUDA kernels. Q4_K, 4.5 bits a weight in files, takes 5.5 there, and its scales are
    rounded to fp16 in products, not in :meth:`dequantize` and :meth:`blocks`; one with scales beyond float16 stays in planes.

    Q4_0 is in fragment order whatever its dtype; float32 activations take a temporary dequantized weight. Elsewhere it stays in
    blocks, and :func:`lq_kernels.q4_0_linear` quantizes activations to Q8_1.

    Attributes:
        qdata: ``(N, K // block size, block bytes) uint8`` blocks; None where there are planes or fragments.
        codes: Of planes ``(N, words) int32``, of fragments those of :class:`lq_formats.layouts.FragmentLayout`; None where
            there are blocks, as are the following.
        high: Of planes, ``(N, words)`` uint8 or int16; None for types without upper bits, too.
        scale: Of planes ``(N, words) int32``, of fragments fp16 (their ``scale_shape``).
        minima: Of fragments, as ``scale``; None for types without minima.
        fields: Of fragments, ``(N, words) int32``: the bytes of Q4_K that scales and minima are computed from; else None.
        ggml_type: The format's name, for example ``"q4_0"``.
    """

    tensor_names: ClassVar = ("qdata", "codes", "high", "scale", "minima", "fields")
    attribute_names: ClassVar = ("ggml_type",)
    saved_names: ClassVar = ("qdata",)
    kind: ClassVar = "ggml"
    qdata: Tensor | None
    codes: Tensor | None
    high: Tensor | None
    scale: Tensor | None
    minima: Tensor | None
    fields: Tensor | None
    ggml_type: str

    @classmethod
    def from_hp(cls, w: Tensor, ggml_type: str = "q4_0", importance: Tensor | None = None) -> Self:
        """Quantize a floating point weight ``(N, K)``, K a multiple of the block size.

        Args:
            w: The weight, fp16, bf16 or fp32.
            ggml_type: A type that lq writes.
            importance: ``(K,)``, how much an error in a column counts (the mean square of what enters it), for types with a
                search: q4_0, iq4_nl, q4_k, q5_k, q6_k.

        Raises:
            ShapeError, DTypeError: If ``w`` does not fit the format.
            NonFiniteError: If ``w`` holds NaN or infinity, or a block's scale is beyond float16.
            SpecError: If there is no such format.
            UnsupportedError: If lq only reads it, or it takes no importance.
        """
        check_weight(w)
        form = ggml_format(ggml_type)
        blocks = form.quantize(w, importance)
        for at in form.halves:
            if not bool(torch.isfinite(blocks[..., at : at + 2].contiguous().view(torch.float16)).all()):
                raise NonFiniteError(
                    f"a block's scale is beyond float16, the scale dtype of {form.name}; use int4 or int8"
                )
        return cls.from_blocks(blocks, form.name, w.dtype)

    @classmethod
    def from_blocks(cls, blocks: Tensor, ggml_type: str, dtype: torch.dtype) -> Self:
        """Take blocks ``(N, K // block size, block bytes) uint8`` as they are; ``dtype`` is that of products.

        Raises:
            ShapeError: If these are not such blocks.
            SpecError: If there is no such format.
        """
        form = ggml_format(ggml_type)
        if blocks.dtype != torch.uint8 or blocks.dim() != 3 or blocks.shape[2] != form.type_size:
            raise ShapeError(
                f"{form.name} blocks are {tuple(blocks.shape)} {blocks.dtype}: expected (N, blocks, {form.type_size}) uint8"
            )
        shape = (blocks.shape[0], blocks.shape[1] * form.block_size)
        return cls({"qdata": blocks}, {"ggml_type": form.name}, shape, dtype)._arranged()

    def blocks(self) -> Tensor:
        """Return the blocks ``(N, K // block size, block bytes) uint8``, byte for byte."""
        if (fragments := self.fragments()) is not None:
            return GGML_FRAGMENTS[self.ggml_type].unpack(fragments, *self.shape)
        if (planes := self.planes()) is not None:
            return ggml_planes(self.ggml_type).unpack(planes, self.shape[1])
        assert self.qdata is not None
        return self.qdata

    def planes(self) -> GGMLPlanes | None:
        """Return the planes, or None where the weight is in blocks or fragments."""
        if self.codes is None or self.scale is None or self.codes.dim() != 2:
            return None
        return GGMLPlanes(self.codes, self.high, self.scale)

    def fragments(self) -> GGMLFragments | None:
        """Return codes, scales and the like in fragment order, or None where the weight is in blocks or planes."""
        if self.codes is None or self.scale is None or self.codes.dim() == 2:
            return None
        return GGMLFragments(self.codes, self.scale, self.minima, self.fields)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        dtype = dtype or self.dtype
        rows, columns = self.shape
        if (fragments := self.fragments()) is not None:
            return self._dequantized(fragments, rows, dtype)
        if (planes := self.planes()) is not None:
            return ggml_dequantize(planes, ggml_type=self.ggml_type, in_features=columns, dtype=dtype)
        w: Tensor = ggml_format(self.ggml_type).dequantize(self.qdata, dtype)
        return w

    def dequantize_rows(self, indices: Tensor) -> Tensor:
        """Return rows ``(*indices.shape, K)`` in this tensor's dtype; no others are dequantized.

        Args:
            indices: int32 or int64, from 0 up, as ``nn.Embedding`` takes them.

        Raises:
            DTypeError: If they are of another dtype.
            OutOfRangeError: If there is no such row; a GPU ends the process as for a dense embedding.
        """
        if indices.dtype not in (torch.int32, torch.int64):
            raise DTypeError(f"indices have dtype {indices.dtype}: an embedding takes int32 or int64")
        try:
            return self._rows(indices)
        except IndexError:
            raise OutOfRangeError(
                f"indices from {int(indices.min())} to {int(indices.max())}: this embedding has rows 0 to {self.shape[0] - 1}"
            ) from None

    def _rows(self, indices: Tensor) -> Tensor:
        rows, columns = self.shape
        flat = indices.flatten()
        # Gathered by index_select, which refuses negative indices.
        if (planes := self.planes()) is not None:
            high = None if planes.high is None else planes.high.index_select(0, flat)
            some = GGMLPlanes(planes.codes.index_select(0, flat), high, planes.scale.index_select(0, flat))
            found = ggml_dequantize(some, ggml_type=self.ggml_type, in_features=columns, dtype=self.dtype)
            return found.view(*indices.shape, columns)
        if (fragments := self.fragments()) is not None:
            # Indexing checks the indices, which padding would hide.
            flat = torch.arange(rows, device=self.device).index_select(0, flat)
            if fragments.fields is None and flat.shape[0] <= _FEW_ROWS:
                return self._few_rows(fragments, flat).view(*indices.shape, columns)
            blocks = GGML_FRAGMENTS[self.ggml_type].unpack_rows(fragments, flat, rows, columns)
            blocks = blocks.view(*indices.shape, *blocks.shape[1:])
        else:
            assert self.qdata is not None
            blocks = self.qdata.index_select(0, flat).view(*indices.shape, *self.qdata.shape[1:])
        w: Tensor = ggml_format(self.ggml_type).dequantize(blocks, self.dtype)
        return w

    def _few_rows(self, fragments: GGMLFragments, rows: Tensor) -> Tensor:
        """Return rows ``(R,)`` dequantized with the others of their blocks of 16: more work than need be, in a few launches."""
        block, count = rows // BLOCK_ROWS, rows.shape[0]
        codes, *tables = (each for each in fragments if each is not None)
        steps = fragments.scale.shape[0]
        together = GGML_FRAGMENTS[self.ggml_type].scale_shape(BLOCK_ROWS, self.shape[1])[1]  # of a block
        some = (table.view(steps, -1, together).index_select(1, block).flatten(1) for table in tables)
        parts = GGMLFragments(codes.index_select(1, block), *some)
        w = self._dequantized(parts, count * BLOCK_ROWS, self.dtype).view(count, BLOCK_ROWS, self.shape[1])
        return w[torch.arange(count, device=w.device), rows % BLOCK_ROWS]

    def _dequantized(self, fragments: GGMLFragments, rows: int, dtype: torch.dtype) -> Tensor:
        layout = GGML_FRAGMENTS[self.ggml_type]
        codes, scale, minima, fields = fragments
        columns = self.shape[1]
        if fields is not None:
            return layout.dequantize(fragments, rows, columns, dtype)
        if minima is not None:
            return minima_dequantize(
                codes, scale, minima, group_size=GROUP, out_features=rows, in_features=columns, dtype=dtype
            )
        return preshuffled_dequantize(
            codes, scale, bits=layout.bits, group_size=GROUP, out_features=rows, in_features=columns, dtype=dtype
        )

    def by_rows(self) -> Self:
        """Return this weight as rows are looked up fastest, with the same bytes; products take longer on Hopper.

        For an embedding that no head repeats. It stays so until it is moved, or changes its dtype.
        """
        return self._in("planes") if self._form == "fragments" and self.ggml_type != "q4_0" else self

    def why_not_batch_invariant(self) -> str | None:
        """Return why: blocks that no kernel takes are multiplied by torch."""
        packed = self.ggml_type == "q4_0" or self.codes is not None
        return None if packed else "it is dequantized for a dense product, whose results depend on the number of tokens"

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``."""
        if (fragments := self.fragments()) is not None:
            codes, scale, minima, _ = fragments
            rows = self.shape[0]
            if minima is not None:
                return minima_linear(x, codes, scale, minima, group_size=GROUP, out_features=rows, bias=bias)
            bits = GGML_FRAGMENTS[self.ggml_type].bits
            return preshuffled_linear(x, codes, scale, bits=bits, group_size=GROUP, out_features=rows, bias=bias)
        if (planes := self.planes()) is not None:
            return ggml_linear(x, planes, ggml_type=self.ggml_type, bias=bias)
        if self.ggml_type == "q4_0":
            assert self.qdata is not None
            return q4_0_linear(x, self.qdata, bias=bias)
        return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)

    @property
    def saved_nbytes(self) -> int:
        """Bytes of the blocks."""
        form = ggml_format(self.ggml_type)
        return self.shape[0] * (self.shape[1] // form.block_size) * form.type_size

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the blocks."""
        return {"qdata": self.blocks()}

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the blocks fit the shape and the format is known."""
        rows, columns = saved.matrix()
        try:
            form = ggml_format(str(saved.attributes["ggml_type"]))
        except SpecError as error:
            raise FormatError(str(error)) from None
        if columns % form.block_size:
            raise FormatError(
                f"a {form.name} weight has the shape (N, K) with K % {form.block_size} == 0, not {saved.shape}"
            )
        saved.expect("qdata", (rows, columns // form.block_size, form.type_size), torch.uint8)

    @classmethod
    def from_saved(cls, saved: SavedWeight) -> Self:
        """Take the blocks as they are on a CPU, and rearrange them for a GPU's kernels."""
        return super().from_saved(saved)._arranged()

    def _map(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Self:
        found = super()._map(function, dtype)
        return found._arranged(settled=(found.device, found.dtype) == (self.device, self.dtype))

    def _like(self, target: LowBitTensor) -> Self:
        if not isinstance(target, GGMLTensor) or target.ggml_type != self.ggml_type:
            return self
        return self._in(target._form)

    def _arranged(self, settled: bool = False) -> Self:
        """Return this weight as its device's kernels read it: in fragments, planes, or blocks; itself where it is.

        Args:
            settled: Whether it is where it was before; what is in planes then has a reason, or waits for a move.
        """
        if self.device.type == "meta":
            return self
        layout = GGML_FRAGMENTS.get(self.ggml_type)
        narrow = self.ggml_type == "q4_0" or self.dtype != torch.float32
        if layout is not None and narrow and reads_fragments(self.device):
            if self._form == "fragments" or (settled and self._form == "planes"):
                return self
            if layout.why_not(self.blocks()) is None:
                return self._in("fragments")
        planes = self.device.type in _DEVICES_OF_PLANES and self.ggml_type not in ("q4_0", "q8_1")
        return self._in("planes" if planes else "blocks")

    @property
    def _form(self) -> _Form:
        if self.codes is None:
            return "blocks"
        return "planes" if self.codes.dim() == 2 else "fragments"

    def _in(self, form: _Form) -> Self:
        """Return this weight in a form, itself where it is."""
        if form == self._form:
            return self
        blocks = self.blocks()
        tensors: dict[str, Tensor | None]
        if form == "blocks":
            tensors = {"qdata": blocks}
        elif form == "planes":
            tensors = ggml_planes(self.ggml_type).pack(blocks)._asdict()
        else:
            start_compiler(self.device)
            tensors = GGML_FRAGMENTS[self.ggml_type].pack(blocks)._asdict()
        return type(self)(tensors, self.attributes(), self.shape, self.dtype)

"""GGMLTensor: weights in ggml's blocks, byte for byte what a GGUF file holds."""

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from lq_formats import FormatError, NonFiniteError, ShapeError, SpecError, ggml_format
from lq_formats.layouts import GGMLPlanes, ggml_planes
from lq_kernels import (
    ggml_dequantize,
    ggml_linear,
    preshuffle_q4_0,
    preshuffled_dequantize,
    preshuffled_linear,
    q4_0_linear,
    reads_fragments,
    restore_q4_0,
)
from torch import Tensor

from lq_torch.tensors.base import LowBitTensor, check_weight
from lq_torch.tensors.saved import SavedWeight

_DEVICES_OF_PLANES = ("cuda",)


class GGMLTensor(LowBitTensor):
    """A weight ``(N, K)`` of ggml blocks.

    On the CPU it holds the blocks, which may lie in a mapped file, and is dequantized for each product. On a GPU it holds the
    same bits apart by kind (:data:`lq_formats.layouts.GGML_PLANES`), once, and multiplies packed; moving it rearranges it, and
    files hold blocks.

    Q4_0 has kernels of its own. On a Hopper GPU it is in fragment order, once (:func:`lq_kernels.preshuffle_q4_0`), and
    :func:`lq_kernels.preshuffled_linear` multiplies activations as they are, float32 ones with a temporary dequantized weight.
    Elsewhere it stays in blocks, and :func:`lq_kernels.q4_0_linear` quantizes activations to Q8_1.

    Attributes:
        qdata: ``(N, K // block size, block bytes) uint8`` blocks; None where there are planes or fragments.
        codes: ``(N, words) int32``, of Q4_0 those of :class:`lq_formats.layouts.FragmentLayout`; None where there are blocks,
            as are the following.
        high: ``(N, words)`` uint8 or int16; None for types without upper bits, too.
        scale: ``(N, words) int32``, of Q4_0 ``(groups, rows)`` fp16.
        ggml_type: The format's name, for example ``"q4_0"``.
    """

    tensor_names: ClassVar = ("qdata", "codes", "high", "scale")
    attribute_names: ClassVar = ("ggml_type",)
    saved_names: ClassVar = ("qdata",)
    kind: ClassVar = "ggml"
    qdata: Tensor | None
    codes: Tensor | None
    high: Tensor | None
    scale: Tensor | None
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
            return restore_q4_0(*fragments, out_features=self.shape[0], in_features=self.shape[1])
        if (planes := self.planes()) is not None:
            return ggml_planes(self.ggml_type).unpack(planes, self.shape[1])
        assert self.qdata is not None
        return self.qdata

    def planes(self) -> GGMLPlanes | None:
        """Return the planes, or None where the weight is in blocks or fragments."""
        if self.codes is None or self.scale is None or self.ggml_type == "q4_0":
            return None
        return GGMLPlanes(self.codes, self.high, self.scale)

    def fragments(self) -> tuple[Tensor, Tensor] | None:
        """Return codes and scales in fragment order, or None where the weight is in blocks or planes."""
        if self.codes is None or self.scale is None or self.ggml_type != "q4_0":
            return None
        return self.codes, self.scale

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        dtype = dtype or self.dtype
        rows, columns = self.shape
        if (fragments := self.fragments()) is not None:
            return preshuffled_dequantize(
                *fragments, bits=4, group_size=32, out_features=rows, in_features=columns, dtype=dtype
            )
        if (planes := self.planes()) is not None:
            return ggml_dequantize(planes, ggml_type=self.ggml_type, in_features=columns, dtype=dtype)
        w: Tensor = ggml_format(self.ggml_type).dequantize(self.qdata, dtype)
        return w

    def dequantize_rows(self, indices: Tensor) -> Tensor:
        """Return rows ``(*indices.shape, K)`` in this tensor's dtype; no others are dequantized."""
        rows, columns = self.shape
        if (planes := self.planes()) is not None:
            flat = indices.flatten()
            high = None if planes.high is None else planes.high[flat]
            some = GGMLPlanes(planes.codes[flat], high, planes.scale[flat])
            found = ggml_dequantize(some, ggml_type=self.ggml_type, in_features=columns, dtype=self.dtype)
            return found.view(*indices.shape, columns)
        if (fragments := self.fragments()) is not None:
            # Indexing checks the indices, which padding would hide.
            flat = torch.arange(rows, device=self.device)[indices.flatten()]
            blocks = restore_q4_0(*fragments, out_features=rows, in_features=columns, rows=flat)
            blocks = blocks.view(*indices.shape, *blocks.shape[1:])
        else:
            assert self.qdata is not None
            blocks = self.qdata[indices]
        w: Tensor = ggml_format(self.ggml_type).dequantize(blocks, self.dtype)
        return w

    def why_not_batch_invariant(self) -> str | None:
        """Return why: blocks that no kernel takes are multiplied by torch."""
        packed = self.ggml_type == "q4_0" or self.planes() is not None
        return None if packed else "it is dequantized for a dense product, whose results depend on the number of tokens"

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``."""
        if (fragments := self.fragments()) is not None:
            return preshuffled_linear(x, *fragments, bits=4, group_size=32, out_features=self.shape[0], bias=bias)
        if (planes := self.planes()) is not None:
            return ggml_linear(x, planes, ggml_type=self.ggml_type, bias=bias)
        if self.ggml_type == "q4_0":
            assert self.qdata is not None
            return q4_0_linear(x, self.qdata, bias=bias)
        return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)

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
        return super()._map(function, dtype)._arranged()

    def _arranged(self) -> Self:
        """Return this weight as its device's kernels read it: planes, fragments, or blocks; itself where it is."""
        if self.device.type == "meta":
            return self
        if self.ggml_type == "q4_0":
            wanted = reads_fragments(self.device)
        else:
            wanted = self.device.type in _DEVICES_OF_PLANES and self.ggml_type != "q8_1"
        if wanted == (self.codes is not None):
            return self
        blocks = self.blocks()
        tensors: dict[str, Tensor | None]
        if not wanted:
            tensors = {"qdata": blocks}
        elif self.ggml_type == "q4_0":
            codes, scale = preshuffle_q4_0(blocks)
            tensors = {"codes": codes, "scale": scale}
        else:
            tensors = ggml_planes(self.ggml_type).pack(blocks)._asdict()
        return type(self)(tensors, self.attributes(), self.shape, self.dtype)

"""GGMLTensor: weights in ggml's blocks, byte for byte what a GGUF file holds."""

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from lq_formats import FormatError, NonFiniteError, ShapeError, SpecError, ggml_format
from lq_formats.layouts import GGMLPlanes, ggml_planes
from lq_kernels import ggml_dequantize, ggml_linear, q4_0_linear
from torch import Tensor

from lq_torch.tensors.base import LowBitTensor, check_weight
from lq_torch.tensors.saved import SavedWeight

_DEVICES_OF_PLANES = ("cuda",)
_KEPT_IN_BLOCKS = ("q4_0", "q8_1")


class GGMLTensor(LowBitTensor):
    """A weight ``(N, K)`` of ggml blocks.

    On the CPU it holds the blocks, which may lie in a mapped file, and is dequantized for each product. On a GPU it holds the
    same bits apart by kind (:data:`lq_formats.layouts.GGML_PLANES`), once, and multiplies packed; moving it rearranges it, and
    files hold blocks. Q4_0 stays in blocks everywhere: it has kernels of its own (:func:`lq_kernels.q4_0_linear`).

    Attributes:
        qdata: ``(N, K // block size, block bytes) uint8`` blocks; None where there are planes.
        codes: ``(N, words) int32``; None where there are blocks, as are the following.
        high: ``(N, words)`` uint8 or int16; None for types without upper bits, too.
        scale: ``(N, words) int32``.
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
        planes = self.planes()
        if planes is None:
            assert self.qdata is not None
            return self.qdata
        return ggml_planes(self.ggml_type).unpack(planes, self.shape[1])

    def planes(self) -> GGMLPlanes | None:
        """Return the planes, or None where the weight is in blocks."""
        if self.codes is None or self.scale is None:
            return None
        return GGMLPlanes(self.codes, self.high, self.scale)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        planes = self.planes()
        if planes is not None:
            return ggml_dequantize(
                planes, ggml_type=self.ggml_type, in_features=self.shape[1], dtype=dtype or self.dtype
            )
        w: Tensor = ggml_format(self.ggml_type).dequantize(self.qdata, dtype or self.dtype)
        return w

    def dequantize_rows(self, indices: Tensor) -> Tensor:
        """Return rows ``(*indices.shape, K)`` in this tensor's dtype; no others are dequantized."""
        planes = self.planes()
        if planes is not None:
            flat = indices.flatten()
            high = None if planes.high is None else planes.high[flat]
            some = GGMLPlanes(planes.codes[flat], high, planes.scale[flat])
            rows = ggml_dequantize(some, ggml_type=self.ggml_type, in_features=self.shape[1], dtype=self.dtype)
            return rows.view(*indices.shape, self.shape[1])
        assert self.qdata is not None
        w: Tensor = ggml_format(self.ggml_type).dequantize(self.qdata[indices], self.dtype)
        return w

    def why_not_batch_invariant(self) -> str | None:
        """Return why: blocks that no kernel takes are multiplied by torch."""
        packed = self.ggml_type == "q4_0" or self.planes() is not None
        return None if packed else "it is dequantized for a dense product, whose results depend on the number of tokens"

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``."""
        planes = self.planes()
        if planes is not None:
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
        """Take the blocks as they are on a CPU, and rearrange them on a GPU."""
        return super().from_saved(saved)._arranged()

    def _map(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Self:
        return super()._map(function, dtype)._arranged()

    def _arranged(self) -> Self:
        """Return this weight in planes on a GPU and in blocks on a CPU; itself where it is."""
        wanted = self.device.type in _DEVICES_OF_PLANES and self.ggml_type not in _KEPT_IN_BLOCKS
        if wanted == (self.codes is not None) or self.device.type == "meta":
            return self
        blocks = self.blocks()
        tensors = ggml_planes(self.ggml_type).pack(blocks)._asdict() if wanted else {"qdata": blocks}
        return type(self)(tensors, self.attributes(), self.shape, self.dtype)

"""Int4GemliteTensor: 1, 2, 4 or 8-bit weights in gemlite's packing, ``int4_packing_format="gemlite"``."""

from typing import ClassVar, Self

import torch
from lq_formats import (
    DTypeError,
    FormatError,
    GroupSizeError,
    QuantSpec,
    ShapeError,
    SpecError,
    check_finite,
    pack_bits,
    quantize_affine,
    search_qparams,
)
from lq_formats.layouts import GEMLITE
from lq_kernels.derivatives import wants_gradient
from lq_kernels.validation import check_dense_dtype
from torch import Tensor

from lq_torch.integrations.gemlite import check_kernel, current_kernel, gemlite_linear
from lq_torch.tensors import gemlite_meta as meta
from lq_torch.tensors.base import SCALE_DTYPES, LowBitTensor, SharedValue
from lq_torch.tensors.saved import SavedWeight

_BITS = (1, 2, 4, 8)


class Int4GemliteTensor(LowBitTensor):
    """A weight ``(N, K)`` of unsigned codes, symmetric with a shift: ``(u - 2**(bits - 1)) * scale``.

    One bit has no integer midpoint: its codes stand for ``-scale / 2`` and ``scale / 2``.

    On a GPU ``F.linear`` runs gemlite, whose kernel depends on the number of tokens (:attr:`kernel` and
    :func:`lq_torch.force_kernel` fix it). On the CPU, and where x requires a gradient, the weight is dequantized for
    each product and multiplied in floating point. float32 products on a GPU are TF32, as gemlite computes them.

    Some of gemlite's kernels compute some weights wrongly (:mod:`lq_torch.tensors.gemlite_meta` says which): those run by
    another, so groups of 16 always by GEMV_REVSPLITK, and forcing a wrong one raises GroupSizeError.

    Files hold lq's canonical codes ``(N, K * bits / 32) int32`` (:func:`lq_formats.pack_bits`) and scales ``(N, K //
    group_size)``: for 4 bits what an :class:`Int4Tensor` of the same weight holds.

    Attributes:
        qdata: ``(K * bits / 32, N) int32`` (:data:`lq_formats.layouts.GEMLITE`); int16 or uint8 items for 1 and 2 bits
            in groups too small for two int32.
        scale: ``(K // group_size, N)`` in the weight's dtype; float32 for one scale a row, where gemlite multiplies the
            sum of the codes by it, which float16 would not hold.
        zero: The midpoint, a scalar int32; for one bit 0.5, a scalar float32, where there is one scale a row, and
            ``-scale / 2`` for groups, ``(K // group_size, N)``, as gemlite's fused multiply-add takes it.
        bits: 1, 2, 4 or 8.
        group_size: In features per scale (K: one scale a row).
        kernel: One of gemlite's kernels, or None.
    """

    tensor_names: ClassVar = ("qdata", "scale", "zero")
    attribute_names: ClassVar = ("bits", "group_size", "kernel")
    value_names: ClassVar = ("kernel",)
    saved_names: ClassVar = ("qdata", "scale")
    kind: ClassVar = "int4_gemlite"
    qdata: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int
    kernel: str | None = SharedValue()  # type: ignore[assignment]

    @classmethod
    def from_hp(cls, w: Tensor, group_size: int = 128, bits: int = 4, *, algorithm: str = "rtn") -> Self:
        """Quantize a floating point weight to the nearest codes; needs neither gemlite nor a GPU.

        Args:
            w: ``(N, K)`` fp16, bf16 or fp32, K a multiple of 32.
            group_size: A divisor of K from 16 up; -1 for one scale a row.
            bits: 1, 2, 4 or 8.
            algorithm: How scales are chosen (:func:`lq_formats.search_qparams`); one bit has a rule of its own.

        Raises:
            ShapeError, GroupSizeError, DTypeError, SpecError, NonFiniteError: If ``w`` cannot be quantized so.
        """
        cls.check_shape(w, group_size, bits)
        check_finite(w, "w")
        rows, columns = w.shape
        size = columns if group_size == -1 else group_size
        scale_dtype = torch.float32 if size == columns else w.dtype
        if bits == 1:
            groups = w.float().reshape(rows, -1, size)
            # Twice the mean magnitude minimises the squared error of -scale / 2 and scale / 2.
            scale = (groups.abs().mean(-1) * 2).to(scale_dtype)
            check_finite(scale, "the scale in w's dtype")
            codes = (groups >= 0).to(torch.uint8).reshape(rows, columns)
        else:
            spec = QuantSpec(bits, "group", size, True, scale_dtype)
            scale, _ = search_qparams(w, spec, algorithm)
            codes = quantize_affine(w, scale, None, spec)
        tensors = {"qdata": pack_bits(codes, bits, torch.int32), "scale": scale}
        attributes = {"bits": bits, "group_size": size, "kernel": None}
        return cls.from_saved(SavedWeight(tensors, attributes, (rows, columns), w.dtype))

    @staticmethod
    def check_shape(w: Tensor, group_size: int, bits: int = 4) -> None:
        """Raise the named error of the first reason why gemlite cannot take ``w``; its values are not read.

        Raises:
            SpecError: If ``bits`` is not 1, 2, 4 or 8.
            DTypeError: If ``w`` is not fp16, bf16 or fp32.
            ShapeError: If ``w`` is not a matrix with K a multiple of 32.
            GroupSizeError: If the group size is below 16 or does not divide K.
        """
        if bits not in _BITS:
            raise SpecError(f"bits={bits!r}: gemlite takes 1, 2, 4 or 8")
        if w.dtype not in SCALE_DTYPES:
            raise DTypeError(f"w has dtype {w.dtype}: expected float16, bfloat16 or float32")
        if w.dim() != 2 or 0 in w.shape:
            raise ShapeError(f"w has shape {tuple(w.shape)}: expected a non-empty matrix (out_features, in_features)")
        columns = w.shape[1]
        if columns % 32:
            raise ShapeError(f"in_features={columns} is not a multiple of 32, which gemlite needs; use 'plain'")
        if reason := meta.why_not_group(columns, columns if group_size == -1 else group_size):
            raise GroupSizeError(f"group_size={group_size!r}: {reason}; use int4_packing_format='plain'")

    def meta_args(self) -> list[int]:
        """Return gemlite's twelve integers for this weight."""
        row = self.group_size == self.shape[1]
        grouped = meta.CODE_FMA if self.bits == 1 else meta.CODE_SHIFT_SCALE
        return meta.meta_args(
            bits=self.bits,
            group_size=self.group_size,
            per_item=meta.packing_bitwidth(self.bits, self.group_size) // self.bits,
            input_dtype=meta.FLOATS[self.dtype],
            output_dtype=meta.FLOATS[self.dtype],
            meta_dtype=meta.FLOATS[self.scale.dtype],
            channel_scale_mode=meta.SCALE_WEIGHT if row else meta.SCALE_NONE,
            code_mode=meta.CODE_SHIFT if row else grouped,
            contiguous=True,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        check_dense_dtype(dtype or self.dtype)
        codes = GEMLITE.unpack(self.qdata, self.bits).float()
        midpoint = 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))
        groups = (codes - midpoint).reshape(self.shape[0], -1, self.group_size)
        w = groups * self.scale.t().float().unsqueeze(-1)
        return w.reshape(self.shape).to(dtype or self.dtype)

    def why_not_batch_invariant(self) -> str | None:
        """Return why: kernels of another library."""
        return "it is multiplied by gemlite, whose results depend on the number of tokens; quantize to another packing format"

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``; see the class for which way."""
        check_kernel(self.kernel)
        if not x.is_cuda or x.numel() == 0 or wants_gradient(x):
            return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)
        kernel = current_kernel(self.kernel)
        columns = self.shape[1]
        if self.group_size < columns:
            kernel = meta.safe_kernel(kernel, x.numel() // columns, self.bits, columns, self.group_size)
        return gemlite_linear(x, bias, (self.qdata, self.scale, self.zero), self.meta_args(), kernel)

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors fit the shape and the attributes."""
        rows, columns = saved.matrix()
        bits, size, kernel = (saved.attributes[name] for name in cls.attribute_names)
        if rows == 0 or columns % 32:
            raise FormatError(f"a gemlite weight has the shape (N, K) with K % 32 == 0, not {saved.shape}")
        if type(bits) is not int or bits not in _BITS:
            raise FormatError(f"bits={bits!r}: gemlite takes 1, 2, 4 or 8")
        if reason := meta.why_not_group(columns, size):
            raise FormatError(f"group_size={size!r}: {reason}")
        try:
            check_kernel(kernel)
        except SpecError as error:
            raise FormatError(str(error)) from None
        saved.expect("qdata", (rows, columns * bits // 32), torch.int32)
        saved.expect("scale", (rows, columns // size), *SCALE_DTYPES)

    @classmethod
    def from_saved(cls, saved: SavedWeight) -> Self:
        """Transpose for gemlite, and put its zeros beside."""
        bits, size = saved.attributes["bits"], saved.attributes["group_size"]
        scale = saved.tensors["scale"].t().contiguous()
        if bits > 1:
            zero = torch.tensor(2 ** (bits - 1), dtype=torch.int32, device=scale.device)
        else:
            zero = torch.tensor(0.5, device=scale.device) if size == saved.shape[1] else -scale / 2
        qdata = meta.from_canonical(saved.tensors["qdata"], meta.packing_bitwidth(bits, size))
        return cls({"qdata": qdata, "scale": scale, "zero": zero}, saved.attributes, saved.shape, saved.dtype)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the canonical codes and scales; the zeros follow from them."""
        return {"qdata": meta.to_canonical(self.qdata), "scale": self.scale.t().contiguous()}

"""AffineWeight: the unpacked weight of one linear layer, which every checkpoint layout packs and unpacks."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lq_formats.affine import dequantize_affine
from lq_formats.errors import DTypeError, FormatError, GroupSizeError, ShapeError, SpecError, UnsupportedError
from lq_formats.spec import MIN_GROUP_SIZE, QuantSpec
from lq_formats.validation import check_device, check_float, check_matrix

_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class AffineWeight:
    """``w: (N, K)`` as ``(codes - zero) * scale``, G groups of in features a row.

    Attributes:
        codes: ``(N, K) uint8`` in ``[0, 2**bits - 1]``.
        scale: ``(N, G)`` float16, bfloat16 or float32.
        zero: ``(N, G)`` uint8 or of the scales' dtype; None if symmetric: the zero is ``2**(bits - 1)``.
        bits: 1 to 8.
        g_idx: ``(K,) int32``: the group of each in feature, where groups are not runs of ``K / G`` consecutive in
            features (GPTQ's ``desc_act``); None where they are.

    Raises:
        ShapeError, GroupSizeError, DTypeError, DeviceError, SpecError: If the tensors do not fit each other.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int = 4
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise SpecError(f"bits={self.bits!r}: expected an integer from 1 to 8")
        rows, columns = check_matrix(self.codes, "codes")
        if self.codes.dtype != torch.uint8:
            raise DTypeError(f"codes have dtype {self.codes.dtype}: expected unsigned codes in uint8")
        check_float(self.scale, "scale")
        if self.scale.dtype not in _SCALE_DTYPES:
            raise DTypeError(f"scale has dtype {self.scale.dtype}: expected float16, bfloat16 or float32")
        if self.scale.dim() != 2 or self.scale.shape[0] != rows or self.scale.shape[1] == 0:
            raise ShapeError(f"scale has shape {tuple(self.scale.shape)}: expected ({rows}, groups)")
        if columns % self.groups:
            raise GroupSizeError(f"{self.groups} groups do not divide in_features={columns} evenly")
        if self.groups > 1 and self.group_size < MIN_GROUP_SIZE:
            raise GroupSizeError(f"groups of {self.group_size} in features: expected at least {MIN_GROUP_SIZE}")
        if self.zero is not None:
            if self.zero.dtype not in (torch.uint8, self.scale.dtype):
                raise DTypeError(f"zero has dtype {self.zero.dtype}: expected uint8 or the scales' {self.scale.dtype}")
            if self.zero.shape != self.scale.shape:
                raise ShapeError(f"zero has shape {tuple(self.zero.shape)}: expected {tuple(self.scale.shape)}")
        if self.g_idx is not None:
            if self.g_idx.dtype != torch.int32:
                raise DTypeError(f"g_idx has dtype {self.g_idx.dtype}: expected int32")
            if tuple(self.g_idx.shape) != (columns,):
                raise ShapeError(f"g_idx has shape {tuple(self.g_idx.shape)}: expected ({columns},)")
        for name in ("scale", "zero", "g_idx"):
            tensor = getattr(self, name)
            if tensor is not None:
                check_device(tensor, name, self.codes, "codes")

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.codes.shape[1]

    @property
    def groups(self) -> int:
        """G, the scales of a row."""
        return self.scale.shape[1]

    @property
    def group_size(self) -> int:
        """In features that share a scale, K / G."""
        return self.in_features // self.groups

    @property
    def spec(self) -> QuantSpec:
        """The quantization of the weight (of :meth:`sorted_by_group`'s weight if there is a ``g_idx``)."""
        if self.groups == 1:
            return QuantSpec(self.bits, "row", None, self.zero is None, self.scale.dtype)
        return QuantSpec(self.bits, "group", self.group_size, self.zero is None, self.scale.dtype)

    def stored_zero(self, layout: str) -> Tensor:
        """Return the zeros as formats store them that know integers only: ``(N, G) uint8``, the midpoint if symmetric.

        Raises:
            UnsupportedError: If a zero is not one of the codes.
        """
        if self.zero is None:
            return torch.full_like(self.scale, 1 << (self.bits - 1), dtype=torch.uint8)
        if self.zero.dtype == torch.uint8:
            return self.zero
        whole = self.zero.round().clamp(0, (1 << self.bits) - 1)
        if not torch.equal(whole, self.zero):
            raise UnsupportedError(
                f"{layout} stores integer zeros, and this weight has floating point zeros that are none: quantize it "
                "symmetrically, with integer zeros or round-to-nearest, or export it as hqq"
            )
        return whole.to(torch.uint8)

    def sorted_by_group(self) -> tuple["AffineWeight", Tensor | None]:
        """Permute the in features so that groups are consecutive: once at load time instead of at every product.

        Returns:
            The weight without ``g_idx``, and ``order: (K,) int64`` with ``sorted.codes = codes[:, order]``: a product
            with the sorted weight takes ``x[..., order]``. None where there is no ``g_idx``.

        Raises:
            FormatError: If ``g_idx`` does not give every group the same number of in features.
        """
        if self.g_idx is None:
            return self, None
        sizes = torch.bincount(self.g_idx.clamp(0, self.groups).to(torch.int64), minlength=self.groups)
        if int(self.g_idx.min()) < 0 or len(sizes) > self.groups or bool((sizes != self.group_size).any()):
            raise FormatError(
                f"g_idx puts {sizes.tolist()[:8]} ... in features in the groups: expected {self.group_size} in each of "
                f"the groups 0 to {self.groups - 1}"
            )
        order = torch.argsort(self.g_idx, stable=True)
        return replace(self, codes=self.codes[:, order].contiguous(), g_idx=None), order

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``w: (N, K)`` in ``dtype``, in the order of the in features that x has.

        Raises:
            FormatError: If ``g_idx`` does not give every group the same number of in features.
        """
        weight, order = self.sorted_by_group()
        values = dequantize_affine(weight.codes, weight.scale, weight.zero, weight.spec, dtype)
        return values if order is None else values[:, torch.argsort(order)].contiguous()

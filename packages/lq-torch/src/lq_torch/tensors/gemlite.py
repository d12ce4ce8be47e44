"""GemliteTensor: what the weights that gemlite multiplies have in common.

gemlite's operator takes a weight as four tensors (packed codes, scales, zeros, a scale of NVFP4 that is unused here) and
twelve integers. A GemliteTensor holds the four and computes the twelve, equal to what ``GemLiteLinear.pack`` and the
processors of ``gemlite.helper`` make (gemlite 0.6), in plain torch: quantizing, saving and loading need neither a GPU nor
gemlite. Only a product on a GPU imports it; on the CPU the weight is dequantized for each product.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import ClassVar, NamedTuple

import torch
from lq_formats import DTypeError, FormatError, GroupSizeError, ShapeError
from torch import Tensor, nn

from lq_torch.integrations.gemlite import check_kernel, gemlite_linear
from lq_torch.tensors.base import LowBitTensor, expect_tensor


class DTypeCode(IntEnum):
    """gemlite's numbers for dtypes, as they are stored in its checkpoints."""

    FP32 = 0
    FP16 = 1
    BF16 = 2
    FP8 = 3
    INT8 = 4
    UINT8 = 5
    INT32 = 6
    MXFP16 = 14
    MXBF16 = 15
    MXFP8 = 16
    MXFP4 = 17


DTYPE_CODES = {
    torch.float32: DTypeCode.FP32,
    torch.float16: DTypeCode.FP16,
    torch.bfloat16: DTypeCode.BF16,
    torch.uint8: DTypeCode.UINT8,
}


class MetaArgs(NamedTuple):
    """The twelve integers, in gemlite's order.

    Attributes:
        scaled_activations: 1 if gemlite quantizes x.
        bits: Bits of a code.
        group_size: In features per scale.
        unpack_mask: ``2**bits - 1``.
        elements_per_sample: Codes in an item of the packed tensor.
        input_dtype: :class:`DTypeCode` that the tensor cores multiply.
        output_dtype: :class:`DTypeCode` of y.
        acc_dtype: :class:`DTypeCode` of the sums.
        meta_dtype: :class:`DTypeCode` of the scales.
        channel_scale_mode: After the sum: 0 nothing, 1 the weight's scale, 2 x's, 3 both; 4 is microscaled x.
        group_mode: Before the sum: 0 nothing, 1 ``u - zero``, 2 ``u * scale``, 3 ``(u - zero) * scale``.
        contiguous: 1 if neighbours in the packed tensor are out features, 0 if they are in features.
    """

    scaled_activations: int
    bits: int
    group_size: int
    unpack_mask: int
    elements_per_sample: int
    input_dtype: int
    output_dtype: int
    acc_dtype: int
    meta_dtype: int
    channel_scale_mode: int
    group_mode: int
    contiguous: int


class GemliteTensor(LowBitTensor):
    """Base of the weights ``(N, K)`` that gemlite multiplies.

    Attributes:
        qdata, scale, zero, meta_scale: gemlite's four tensors; subclasses say how they are stored.
        kernel: ``"GEMV"``, ``"GEMV_REVSPLITK"``, ``"GEMV_SPLITK"``, ``"GEMM_SPLITK"`` or ``"GEMM"`` forces one of
            gemlite's kernels; None lets gemlite choose by the batch size. May be assigned at any time.
    """

    tensor_names: ClassVar = ("qdata", "scale", "zero", "meta_scale")
    qdata: Tensor
    scale: Tensor
    zero: Tensor
    meta_scale: Tensor
    kernel: str | None

    def tensor_args(self) -> list[Tensor]:
        """Return the four tensors as gemlite's operator takes them (views, nothing is copied)."""
        raise NotImplementedError

    def meta_args(self) -> MetaArgs:
        """Return the twelve integers."""
        raise NotImplementedError

    def chosen_kernel(self) -> str | None:
        """Return the kernel to force, or None."""
        return self.kernel

    def why_not(self, capability: tuple[int, int]) -> str | None:
        """Return why a GPU of this compute capability cannot multiply this weight, or None."""
        return None

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``: by gemlite on a GPU, else by dequantizing.

        gemlite has no backward pass: where x requires a gradient, the weight is dequantized as well.

        Raises:
            MissingPackageError: If gemlite is not installed.
            UnsupportedError: If this GPU or kernel cannot multiply this weight.
        """
        if x.device.type != "cuda" or x.numel() == 0 or (x.requires_grad and torch.is_grad_enabled()):
            return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)
        return gemlite_linear(x, bias, self)

    def _check_kernel(self) -> None:
        if self.kernel is not None:
            check_kernel(self.kernel)

    def _check_meta(self, columns_multiple: int) -> tuple[int, int]:
        """Check what all formats share; return ``(N, K)``."""
        if len(self.shape) != 2 or self.shape[1] == 0 or self.shape[1] % columns_multiple:
            raise FormatError(
                f"a gemlite weight has the shape (N, K) with K % {columns_multiple} == 0, not {tuple(self.shape)}"
            )
        expect_tensor(self.meta_scale, "meta_scale", (), (torch.float32,))
        if self.kernel is not None and not isinstance(self.kernel, str):
            raise FormatError(f"kernel={self.kernel!r}: expected the name of a gemlite kernel or null")
        self._check_kernel()
        return self.shape[0], self.shape[1]


@contextmanager
def forced_kernel(module: nn.Module | GemliteTensor, kernel: str | None) -> Iterator[None]:
    """Force one of gemlite's kernels for every gemlite weight of a module (or for one weight) inside a ``with``.

    Args:
        module: A module, or one weight.
        kernel: A name as for :class:`GemliteTensor`, or None for gemlite's own choice.

    Raises:
        SpecError: If gemlite has no such kernel.
    """
    if kernel is not None:
        check_kernel(kernel)
    weights = module.parameters() if isinstance(module, nn.Module) else (module,)
    targets = [weight for weight in weights if isinstance(weight, GemliteTensor)]
    before = [weight.kernel for weight in targets]
    try:
        for weight in targets:
            weight.kernel = kernel
        yield
    finally:
        for weight, old in zip(targets, before, strict=True):
            weight.kernel = old


def check_gemlite_weight(w: Tensor, group_size: int) -> tuple[int, int, int]:
    """Return ``(N, K, resolved group size)`` of a weight that gemlite's integer kernels take, or raise.

    gemlite's tiles are powers of two and take one scale per tile, so groups are powers of two from 16 up that divide K.
    One scale a row (``group_size=-1`` or K) needs K to be a power of two or at least 512: gemlite cuts its tiles to K.

    Raises:
        DTypeError: If ``w`` is not fp16, bf16 or fp32.
        ShapeError: If ``w`` is no matrix, or K is not a multiple of 32.
        GroupSizeError: If the groups do not fit.
    """
    if w.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise DTypeError(f"weight has dtype {w.dtype}: gemlite takes float16, bfloat16 and float32")
    if w.dim() != 2 or w.shape[1] == 0 or w.shape[1] % 32:
        raise ShapeError(
            f"weight has shape {tuple(w.shape)}: gemlite takes (out_features, in_features) with in_features % 32 == 0; "
            "use int4_packing_format='plain'"
        )
    rows, columns = w.shape
    size = columns if group_size == -1 else group_size
    if reason := why_not_group(columns, size):
        raise GroupSizeError(f"group_size={group_size}: {reason}; use int4_packing_format='plain'")
    return rows, columns, size


def why_not_group(columns: int, size: int) -> str | None:
    """Return why gemlite's integer kernels do not take groups of ``size`` in features, or None."""
    if size < 16:
        return "gemlite takes groups of 16 in features and up"
    if columns % size:
        return f"it does not divide in_features={columns}"
    power = size & (size - 1) == 0
    if size == columns:
        return None if power or size >= 512 else "gemlite takes one scale a row for 512 in features and up, or 2**n"
    return None if power else "gemlite computes groups other than powers of two wrongly"

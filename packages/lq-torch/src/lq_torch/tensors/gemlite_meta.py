"""gemlite's integers and its order of words, restated so that weights are packed, saved and loaded without importing gemlite.

Source: ``gemlite.dtypes.DType`` and ``GemLiteLinearTriton.get_meta_args`` (gemlite 0.6).
"""

import torch
from lq_formats import GroupSizeError
from torch import Tensor

FP32, FP16, BF16, FP8, INT8, UINT8, INT32 = 0, 1, 2, 3, 4, 5, 6
MXFP16, MXBF16, MXFP8, MXFP4 = 14, 15, 16, 17
ITEM_DTYPES = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
FLOATS = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}

# channel_scale_mode: what multiplies the sum once it is complete.
SCALE_NONE, SCALE_WEIGHT, SCALE_ACTIVATION, SCALE_BOTH, SCALE_BLOCKS = 0, 1, 2, 3, 4
# W_group_mode: what happens to a code before the product.
CODE_AS_IS, CODE_SHIFT, CODE_SCALE, CODE_SHIFT_SCALE, CODE_FMA = 0, 1, 2, 3, 4


def meta_args(
    *,
    bits: int,
    group_size: int,
    per_item: int,
    input_dtype: int,
    output_dtype: int,
    meta_dtype: int,
    channel_scale_mode: int,
    code_mode: int,
    contiguous: bool,
    scaled_activations: bool = False,
) -> list[int]:
    """Return the twelve integers in the order in which gemlite's operator takes them."""
    accumulator = INT32 if input_dtype == INT8 else FP32
    return [
        int(scaled_activations),
        bits,
        group_size,
        2**bits - 1,
        per_item,
        input_dtype,
        output_dtype,
        accumulator,
        meta_dtype,
        channel_scale_mode,
        code_mode,
        int(contiguous),
    ]


def why_not_group(columns: int, size: object) -> str | None:
    """Return why gemlite's integer kernels do not take groups of ``size`` of ``columns`` in features, or None.

    Their tiles along the in features are powers of two cut to the group, with one scale each, so other groups would
    straddle tiles and be computed wrongly. One scale a row is applied after the sum; only the cut to K matters there.
    """
    if type(size) is not int or size < 16 or columns % size:
        return f"expected a divisor of in_features={columns} from 16 up"
    if size & (size - 1) == 0 or (size == columns and size >= 512):
        return None
    return "gemlite needs a power of two, or one scale a row of at least 512"


def why_not_splitk(columns: int, size: int) -> str | None:
    """Return why gemlite's GEMM_SPLITK computes ``columns`` in features with groups of ``size`` wrongly, or None.

    Its tiles take at least 32 in features, with one scale. Where the tiles of all splits do not divide K, it reads scales
    behind the last group: any bits, and NaN times the zero of a masked x is NaN. The largest tile times splits among the
    configurations that gemlite tunes over is 256 for groups up to 64, 512 for 128 and 1024 beyond.
    """
    if size < 32:
        return f"gemlite's tensor core tiles span groups of {size}: it needs 32 and up"
    stride = max(256, 4 * min(size, 256))
    if columns % stride:
        return f"in_features={columns} is not a multiple of the {stride} that its splits take"
    return None


def safe_kernel(kernel: str | None, tokens: int, bits: int, columns: int, size: int) -> str | None:
    """Return the kernel to run instead of gemlite's own choice where that would be computed wrongly.

    Only for weights whose scales are applied by groups.

    Raises:
        GroupSizeError: If ``kernel`` is forced and computes this weight wrongly.
    """
    reason = why_not_splitk(columns, size)
    if reason is None:
        return kernel
    if kernel == "GEMM_SPLITK" or (kernel == "GEMM" and size < 32):
        raise GroupSizeError(f"kernel={kernel!r}: {reason}; force another or leave the choice to lq")
    if kernel is not None:
        return kernel
    if size < 32:
        return "GEMV_REVSPLITK"
    return "GEMM" if tokens > (4 if bits < 8 else 2) else None


def packing_bitwidth(bits: int, size: int) -> int:
    """Return the bits of a packed item: 32, gemlite's default, or 16 or 8 for 1 and 2 bits in small groups.

    GEMV_REVSPLITK reads two tiles a scale and a tile holds at least one item, so two items must fit a group.
    """
    return next((width for width in (32, 16) if 2 * width // bits <= size), 8)


def from_canonical(words: Tensor, width: int) -> Tensor:
    """Return canonical codes ``(N, words) int32`` in gemlite's order, ``(items, N)``, in items of ``width`` bits.

    Both pack along the in features, low bits first (:data:`lq_formats.layouts.GEMLITE`): the bits stay, words are cut
    into items and transposed.
    """
    return words.contiguous().view(ITEM_DTYPES[width]).t().contiguous()


def to_canonical(items: Tensor) -> Tensor:
    """Undo :func:`from_canonical`."""
    rows = items.shape[1]
    # Flat, because a wider view refuses the odd strides that a dimension of size 1 may have.
    return items.t().contiguous().view(-1).view(torch.int32).view(rows, -1)

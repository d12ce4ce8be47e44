"""gemlite's integers, restated so that weights are packed, saved and loaded without importing gemlite.

Source: ``gemlite.dtypes.DType`` and ``GemLiteLinearTriton.get_meta_args`` (gemlite 0.6).
"""

import torch

FP32, FP16, BF16, FP8, INT8, UINT8, INT32 = 0, 1, 2, 3, 4, 5, 6
MXFP16, MXBF16, MXFP8, MXFP4 = 14, 15, 16, 17
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

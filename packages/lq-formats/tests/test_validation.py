import math

import pytest
import torch
from lq_formats import (
    DeviceError,
    DTypeError,
    NonFiniteError,
    ShapeError,
    SizeOverflowError,
    SpecError,
    UnsupportedError,
    check_elements,
    check_finite,
    check_float,
    check_matrix,
    quantize_i4_pack8,
    quantize_q4_0,
    quantize_weight_per_channel,
)
from lq_formats.validation import check_codes, check_scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_named_with_their_place(dtype, value):
    w = torch.ones(3, 5, dtype=dtype)
    check_finite(w)
    w[2, 1] = value
    w[2, 4] = value
    with pytest.raises(NonFiniteError, match=r"layers\.0\.q_proj holds 2 non-finite .* at index \(2, 1\)"):
        check_finite(w, "layers.0.q_proj")


def test_the_largest_numbers_are_finite():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        info = torch.finfo(dtype)
        check_finite(torch.tensor([[info.max, info.min, info.tiny, -0.0]], dtype=dtype))
    check_finite(torch.empty(0, 4))


def test_what_has_no_values_or_strides_is_named():
    for quantize in (check_finite, lambda w: quantize_i4_pack8(w, 32), quantize_weight_per_channel, quantize_q4_0):
        with pytest.raises(DeviceError, match=r"on meta .* load the weights first"):
            quantize(torch.ones(8, 64, device="meta"))
        with pytest.raises(UnsupportedError, match=r"layout torch\.sparse_coo.*to_dense"):
            quantize(torch.ones(8, 64).to_sparse())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_integers_are_not_weights(dtype):
    with pytest.raises(DTypeError, match=r"weight has dtype torch\..*convert it"):
        check_float(torch.ones(2, 2, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 4), (4, 0)], ids=str)
def test_weights_are_matrices_with_in_features(shape):
    with pytest.raises(ShapeError, match="proj has shape"):
        check_matrix(torch.empty(shape), "proj")
    assert check_matrix(torch.empty(0, 4)) == (0, 4)


def test_sizes_stay_below_int64():
    assert check_elements(2**31, 2**31) == 2**62
    assert check_elements(2**63 - 1) == 2**63 - 1
    with pytest.raises(SizeOverflowError, match="lm_head"):
        check_elements(2**32, 2**31, name="lm_head")
    with pytest.raises(ShapeError, match="negative"):
        check_elements(4, -1)


def test_codes_fit_their_bits():
    check_codes(torch.tensor([15], dtype=torch.uint8), 4)
    check_codes(torch.tensor([255], dtype=torch.uint8), 8)
    check_codes(torch.empty(0, dtype=torch.uint8), 1)
    with pytest.raises(SpecError, match="hold 16, which does not fit 4 bits: expected 0 to 15"):
        check_codes(torch.tensor([16], dtype=torch.uint8), 4)
    with pytest.raises(DTypeError, match="int8"):
        check_codes(torch.tensor([1], dtype=torch.int8), 4)


def test_scales_can_be_divided_by():
    check_scale(torch.tensor([[1.0, -1e-38]]))
    with pytest.raises(NonFiniteError, match="zeros"):
        check_scale(torch.tensor([[1.0, 0.0]]))
    with pytest.raises(NonFiniteError, match="non-finite"):
        check_scale(torch.tensor([[1.0, math.inf]]))

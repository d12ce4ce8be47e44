"""The codecs give the same bits on a GPU as on the CPU."""

import pytest
import torch
from lq_formats import (
    QuantSpec,
    choose_qparams,
    dequantize_affine,
    dequantize_i4_pack8,
    pack_bits,
    quantize_affine,
    quantize_i4_pack8,
    quantize_weight_per_channel,
    quantize_weight_per_tensor,
    unpack_bits,
)
from lq_formats.layouts import AWQ, COMPRESSED_TENSORS, GEMLITE, GPTQ, AffineWeight

pytestmark = pytest.mark.gpu


def weights(dtype):
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    w[1] = 0
    w[2] *= 1e-6
    return w.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_affine(dtype, symmetric, bits):
    w = weights(dtype)
    spec = QuantSpec(bits, "group", 32, symmetric, torch.float16)
    scale, zero = choose_qparams(w, spec)
    codes = quantize_affine(w, scale, zero, spec)
    gpu_scale, gpu_zero = choose_qparams(w.cuda(), spec)
    gpu_codes = quantize_affine(w.cuda(), gpu_scale, gpu_zero, spec)
    assert torch.equal(gpu_scale.cpu(), scale)
    assert torch.equal(gpu_codes.cpu(), codes)
    back = dequantize_affine(gpu_codes, gpu_scale, gpu_zero, spec, dtype)
    assert torch.equal(back.cpu(), dequantize_affine(codes, scale, zero, spec, dtype))
    packed = pack_bits(gpu_codes, bits, torch.int32)
    assert torch.equal(packed.cpu(), pack_bits(codes, bits, torch.int32))
    assert torch.equal(unpack_bits(packed, bits, 256), gpu_codes)


def test_scales_are_divided_not_multiplied_by_a_reciprocal():
    w = torch.rand(4096, 8, generator=torch.Generator().manual_seed(0))
    for bits, symmetric in ((4, True), (3, True), (4, False)):
        spec = QuantSpec(bits, "row", None, symmetric)
        assert torch.equal(choose_qparams(w.cuda(), spec)[0].cpu(), choose_qparams(w, spec)[0])
    assert torch.equal(quantize_weight_per_channel(w.cuda())[1].cpu(), quantize_weight_per_channel(w)[1])


def test_int4_and_int8():
    w = weights(torch.float32)
    for ours, expected in zip(quantize_i4_pack8(w.cuda()), quantize_i4_pack8(w), strict=True):
        assert torch.equal(ours.cpu(), expected)
    packed, scales = quantize_i4_pack8(w.cuda())
    assert torch.equal(dequantize_i4_pack8(packed, scales).cpu(), dequantize_i4_pack8(packed.cpu(), scales.cpu()))
    for quantize in (quantize_weight_per_channel, quantize_weight_per_tensor):
        for ours, expected in zip(quantize(w.cuda()), quantize(w), strict=True):
            assert torch.equal(ours.cpu(), expected)


def test_layouts():
    codes = torch.randint(0, 16, (64, 256), dtype=torch.uint8)
    zero = torch.randint(0, 16, (64, 4), dtype=torch.uint8)
    weight = AffineWeight(codes, torch.rand(64, 4).half(), zero)
    on_gpu = AffineWeight(codes.cuda(), weight.scale.cuda(), zero.cuda())
    assert torch.equal(GEMLITE.pack(on_gpu.codes).cpu(), GEMLITE.pack(codes))
    for layout in (GPTQ, AWQ, COMPRESSED_TENSORS):
        tensors = layout.pack(on_gpu)
        expected = layout.pack(weight)
        assert all(torch.equal(tensors[name].cpu(), expected[name]) for name in expected)
        assert torch.equal(layout.unpack(tensors).codes, on_gpu.codes)

"""Int4 codes in the order of 8-bit tensor cores: exact both ways, the drawn bits, and what kernels make of them."""

import pytest
import torch
from lq_formats import DTypeError, ShapeError, SpecError
from lq_formats.layouts import FRAGMENT_A8_FP8, FRAGMENT_A8_INT8, Fragment8Layout

LAYOUTS = [pytest.param(layout, id=layout.name) for layout in (FRAGMENT_A8_INT8, FRAGMENT_A8_FP8)]
ALL = 0xFFFFFFFF


def codes_of(n, k, seed=0):
    return torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "k"), [(16, 128), (1, 8), (17, 130), (48, 384), (100, 1000)])
def test_unpack_undoes_pack(layout, n, k):
    codes = codes_of(n, k)
    packed = layout.pack(codes)
    assert packed.dtype == torch.int32
    assert tuple(packed.shape) == layout.packed_shape(n, k)
    assert torch.equal(layout.unpack(packed, n, k), codes)
    padded = layout.unpack(packed, packed.shape[1] * 16, packed.shape[0] * 128)
    assert bool((padded[n:] == 8).all())
    assert bool((padded[:, k:] == 8).all())


def registers(layout, words):
    """Return what the kernels unpack words to (wgmma_a8.cuh), in 64-bit integers: rows g and g + 8."""
    if layout.tokens == "int8":
        return (words << 4) & 0xF0F0F0F0, words & 0xF0F0F0F0
    rotated = ((words >> 4) | (words << 28)) & ALL
    return tuple(
        row | ((row >> 4) & ~(row + 0x07070707) & 0x08080808) for row in (words & 0x87878787, rotated & 0x87878787)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_instructions_give_the_codes_in_the_order_of_the_fragment(layout):
    n, k = 32, 256
    codes = codes_of(n, k)
    words = layout.pack(codes).to(torch.int64) & ALL
    dtype, unit = (torch.int8, 16.0) if layout.tokens == "int8" else (torch.float8_e4m3fn, 2.0**-9)
    for high, row in enumerate(registers(layout, words)):
        data = ((row.unsqueeze(-1) >> torch.tensor([0, 8, 16, 24])) & 0xFF).to(torch.uint8).view(dtype)
        values = data.float() / unit
        for step, block, half, lane, word in [(0, 0, 0, 0, 0), (1, 1, 1, 31, 3), (0, 1, 0, 17, 2), (1, 0, 1, 6, 1)]:
            g, t, j, kh = lane // 4, lane % 4, word // 2, word % 2
            first = 128 * step + 64 * half + 32 * j + 16 * kh + 4 * t
            expected = codes[16 * block + g + 8 * high, first : first + 4].float() - 8
            assert torch.equal(values[step, block, half, lane, word], expected)
        assert sorted(values.unique().tolist()) == list(range(-8, 8))


def test_codes_above_the_lowest_need_no_repair():
    codes = codes_of(16, 128).clamp(min=1)
    words = FRAGMENT_A8_FP8.pack(codes).to(torch.int64) & ALL
    assert torch.equal(registers(FRAGMENT_A8_FP8, words)[0], words & 0x87878787)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_arranged_as_for_16_bits(layout):
    scale = torch.rand(20, 3)
    arranged = layout.arrange_scales(scale, 384, 128)
    assert tuple(arranged.shape) == layout.scale_shape(20, 384, 128) == (3, 32)
    assert torch.equal(arranged[:, :4], torch.stack((scale[0], scale[8], scale[1], scale[9]), dim=1))
    assert torch.equal(layout.restore_scales(arranged, 20, 384, 128), scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors(layout):
    packed = layout.pack(codes_of(32, 128))
    with pytest.raises(ShapeError):
        layout.unpack(packed, 33, 128)
    with pytest.raises(DTypeError):
        layout.unpack(packed.view(torch.uint8), 32, 128)
    with pytest.raises(DTypeError):
        layout.pack(torch.zeros(4, 8))
    with pytest.raises(SpecError, match="tokens"):
        Fragment8Layout("bf16", "other")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_gives_the_same_bytes(layout):
    codes = codes_of(100, 1000)
    packed = layout.pack(codes.cuda())
    assert torch.equal(packed.cpu(), layout.pack(codes))
    assert torch.equal(layout.unpack(packed, 100, 1000).cpu(), codes)

"""Fragment order: exact round trips, and every code where the diagram says it is."""

import pytest
import torch
from lq_formats import DTypeError, GroupSizeError, ShapeError
from lq_formats.layouts import FRAGMENT_A8_INT8, FRAGMENT_INT4, FRAGMENT_INT8, FragmentLayout

LAYOUTS = [pytest.param(layout, id=layout.name) for layout in (FRAGMENT_INT4, FRAGMENT_INT8)]


def _codes(layout: FragmentLayout, n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << layout.bits, (n, k), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "k"), [(64, 128), (128, 384), (1, 8), (65, 136), (200, 1000)])
def test_round_trip(layout: FragmentLayout, n: int, k: int) -> None:
    codes = _codes(layout, n, k)
    packed = layout.pack(codes)
    assert packed.dtype == torch.int32
    assert tuple(packed.shape) == layout.packed_shape(n, k)
    assert packed.numel() * 4 == -(-n // 16) * 16 * -(-k // layout.step) * 512 // 8
    assert torch.equal(layout.unpack(packed, n, k), codes)


@pytest.mark.parametrize("seed", range(3))
def test_int4_bits_are_where_the_diagram_says(seed: int) -> None:
    n, k = 128, 256
    codes = _codes(FRAGMENT_INT4, n, k, seed)
    words = FRAGMENT_INT4.pack(codes).to(torch.int64) & 0xFFFFFFFF
    for row, column in torch.randint(0, 128, (64, 2)).tolist():
        block, rh, g = row // 16, row % 16 // 8, row % 8
        step, i, j, kh, t, h = (
            column // 128, column % 128 // 64, column % 64 // 16, column % 16 // 8, column % 8 // 2, column % 2,
        )  # fmt: skip
        word = int(words[step, block, i, 4 * g + t, j])
        assert word >> 4 * (rh + 2 * kh + 4 * h) & 0xF == int(codes[row, column])


@pytest.mark.parametrize("seed", range(3))
def test_int8_bytes_are_where_the_diagram_says(seed: int) -> None:
    n, k = 128, 256
    codes = _codes(FRAGMENT_INT8, n, k, seed)
    data = FRAGMENT_INT8.pack(codes).view(torch.int8)
    for row, column in torch.randint(0, 128, (64, 2)).tolist():
        block, rh, g = row // 16, row % 16 // 8, row % 8
        step, i, j, kh, t, h = (
            column // 64, column % 64 // 32, column % 32 // 16, column % 16 // 8, column % 8 // 2, column % 2,
        )  # fmt: skip
        assert int(data[step, block, i, 4 * g + t, 4 * (2 * j + kh) + rh + 2 * h]) == int(codes[row, column]) - 128


def test_padding_is_the_code_of_zero() -> None:
    packed = FRAGMENT_INT4.pack(torch.zeros(1, 8, dtype=torch.uint8))
    codes = FRAGMENT_INT4.unpack(packed, 16, 128)
    assert int(codes[0, :8].sum()) == 0
    assert int((codes == 8).sum()) == 16 * 128 - 8


def test_scales_round_trip_with_the_rows_of_a_lane_together() -> None:
    scale = torch.randn(70, 3)
    arranged = FRAGMENT_INT4.arrange_scales(scale, 500, 128)
    assert tuple(arranged.shape) == FRAGMENT_INT4.scale_shape(70, 500, 128) == (4, 80)
    assert arranged.is_contiguous()
    assert torch.equal(arranged[2, 16:22], scale[[16, 24, 17, 25, 18, 26], 2])
    assert int((arranged[3] != 0).sum()) == 0
    assert int((arranged[:3] != 0).sum()) == 210
    assert torch.equal(FRAGMENT_INT4.restore_scales(arranged, 70, 500, 128), scale)


STEPS = [(FRAGMENT_INT4, 32, 4), (FRAGMENT_INT4, 64, 2), (FRAGMENT_INT8, 32, 2)]


@pytest.mark.parametrize(("layout", "group", "together"), STEPS)
def test_a_block_s_scales_of_a_step_are_one_piece(layout: FragmentLayout, group: int, together: int) -> None:
    n, k = 70, 3 * layout.step - group  # the last step is not full
    scale = torch.randn(n, k // group)
    arranged = layout.arrange_scales(scale, k, group)
    assert tuple(arranged.shape) == layout.scale_shape(n, k, group) == (3, 80 * together)
    for step, block, some in ((0, 0, 0), (1, 3, together - 1), (2, 2, together - 2)):
        piece = arranged[step, (block * together + some) * 16 :][:4]
        assert torch.equal(piece, scale[block * 16 + torch.tensor([0, 8, 1, 9]), step * together + some])
    assert int((arranged != 0).sum()) == scale.numel()
    assert torch.equal(layout.restore_scales(arranged, n, k, group), scale)
    rows = torch.tensor([69, 0, 17, 17, 8])
    assert torch.equal(layout.restore_scale_rows(arranged, rows, k, group), scale[rows])


@pytest.mark.parametrize("group", [24, 40, 48, 96, 120, 136, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_that_end_within_a_step_have_rows_of_their_own(layout: FragmentLayout, group: int) -> None:
    n, k = 33, 3 * group
    scale = torch.randn(n, 3)
    arranged = layout.arrange_scales(scale, k, group)
    assert tuple(arranged.shape) == layout.scale_shape(n, k, group)
    assert arranged.shape[1] == 48
    assert torch.equal(layout.restore_scales(arranged, n, k, group), scale)
    rows = torch.randint(0, n, (5,))
    assert torch.equal(layout.restore_scale_rows(arranged, rows, k, group), scale[rows])


def test_one_scale_a_row_is_one_row_of_them() -> None:
    scale = torch.randn(20, 1)
    arranged = FRAGMENT_INT4.arrange_scales(scale, 32, 32)
    assert tuple(arranged.shape) == (1, 32)
    assert torch.equal(FRAGMENT_INT4.restore_scales(arranged, 20, 32, 32), scale)
    with pytest.raises(ShapeError, match=r"\(20, 2\): expected \(N, 1\), one for each 32 of 32 in features"):
        FRAGMENT_INT4.arrange_scales(torch.randn(20, 2), 32, 32)


@pytest.mark.parametrize("layout", [*LAYOUTS, FRAGMENT_A8_INT8])
def test_as_many_groups_as_there_are_and_none_of_no_size(layout) -> None:
    for present in (1, 7, 9):
        with pytest.raises(ShapeError, match=rf"\(16, {present}\): expected \(N, 8\)"):
            layout.arrange_scales(torch.ones(16, present), 256, 32)
    # The kernels take a last group that is not full.
    for present in (4, 5):
        arranged = layout.arrange_scales(torch.ones(16, present), 136, 32)
        assert int(arranged.sum()) == 16 * present
    for group in (0, -1):
        for call in (
            lambda group=group: layout.arrange_scales(torch.ones(16, 1), 256, group),
            lambda group=group: layout.scale_shape(16, 256, group),
            lambda group=group: layout.restore_scales(torch.ones(1, 16), 16, 256, group),
        ):
            with pytest.raises(GroupSizeError, match=f"group_size={group}: expected at least 1, or 256 for"):
                call()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "k"), [(64, 128), (1, 8), (65, 136), (200, 1000)])
def test_some_rows_are_those_of_all(layout: FragmentLayout, n: int, k: int) -> None:
    codes, scale = _codes(layout, n, k), torch.randn(n, k // 8)
    packed, arranged = layout.pack(codes), layout.arrange_scales(scale, k, 8)
    for count in (0, 1, 33):
        rows = torch.randint(0, n, (count,))
        assert torch.equal(layout.unpack_rows(packed, rows, k), codes[rows])
        assert torch.equal(layout.restore_scale_rows(arranged, rows, k, 8), scale[rows])
    with pytest.raises(ShapeError, match="packed has shape"):
        layout.unpack_rows(packed, rows, k + layout.step)
    with pytest.raises(DTypeError, match="int32"):
        layout.unpack_rows(packed.view(torch.float32), rows, k)
    with pytest.raises(ShapeError, match="arranged"):
        layout.restore_scale_rows(arranged, rows, k + layout.step, 8)


def test_foreign_tensors_are_refused() -> None:
    packed = FRAGMENT_INT4.pack(torch.zeros(64, 128, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="expected"):
        FRAGMENT_INT4.unpack(packed, 65, 128)
    with pytest.raises(DTypeError, match="int32"):
        FRAGMENT_INT4.unpack(packed.view(torch.float32), 64, 128)
    with pytest.raises(ShapeError, match="arranged"):
        FRAGMENT_INT4.restore_scales(torch.zeros(1, 64), 64, 256, 128)

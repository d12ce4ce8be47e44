"""Planes of ggml blocks: exact both ways, where the diagram says, as large as the blocks; and what does not fit."""

import pytest
import torch
from lq_formats import DTypeError, ShapeError, SizeOverflowError, SpecError
from lq_formats.layouts import GGML_PLANES, ggml_planes
from torch import Tensor

NAMES = tuple(GGML_PLANES)


def random_blocks(name: str, rows: int, count: int) -> Tensor:
    return torch.randint(0, 256, (rows, count, GGML_PLANES[name].form.type_size), dtype=torch.uint8)


def plain_codes(name: str, blocks: Tensor) -> Tensor:
    """Return the codes of one row of blocks, unsigned and in order, from the values that ggml gives them."""
    layout = GGML_PLANES[name]
    one = blocks.clone()
    if name in ("iq4_nl", "mxfp4"):
        nibbles = one[:, -16:]
        return torch.cat((nibbles & 15, nibbles >> 4), dim=-1).flatten()
    # Scales of one, no minima, and the zero added again: what is left is the code.
    half = torch.tensor([0x00, 0x3C], dtype=torch.uint8)
    for at in layout.form.halves:
        one[:, at : at + 2] = 0
    at = layout.form.halves[0]
    one[:, at : at + 2] = half
    match name:
        case "q2_k":
            one[:, :16] = 1
        case "q3_k":  # s = 33 in every group: low nibbles 1, upper bits 2
            one[:, 96:104], one[:, 104:108] = 0x11, 0xAA
        case "q4_k" | "q5_k":
            one[:, 4:8], one[:, 8:12], one[:, 12:16] = 1, 0, 1
        case "q6_k":
            one[:, 192:208] = 1
    zero = {"q4_0": 8, "q5_0": 16, "q8_0": 128, "q3_k": 4, "q6_k": 32}.get(name, 0)
    return (layout.form.dequantize(one).flatten() + zero).to(torch.uint8)


@pytest.mark.parametrize("count", [1, 2, 7, 8])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_come_back_byte_for_byte(name: str, count: int) -> None:
    layout, blocks = GGML_PLANES[name], random_blocks(name, 5, count)
    in_features = count * layout.form.block_size
    planes = layout.pack(blocks)
    words, scales = layout.packed_shape(5, in_features)
    assert planes.codes.shape == words
    assert planes.scale.shape == scales
    assert (planes.high is None) == (layout.high_dtype is None)
    assert all(plane is None or plane.is_contiguous() for plane in planes)
    assert torch.equal(layout.unpack(planes, in_features), blocks)


@pytest.mark.parametrize("name", NAMES)
def test_codes_lie_where_the_diagram_says(name: str) -> None:
    layout = GGML_PLANES[name]
    blocks = random_blocks(name, 1, 2 * layout.chunk // min(layout.chunk, layout.form.block_size))
    planes, codes = layout.pack(blocks), plain_codes(name, blocks[0])
    fields, bits = 32 // layout.low.bits, layout.low.bits
    above = 0 if layout.upper is None else layout.upper.bits
    for k in range(min(len(codes), 2 * layout.chunk)):
        chunk, rest = divmod(k, layout.chunk)
        field, lane = divmod(rest, layout.group)
        word = chunk * layout.group + lane
        code = int(planes.codes[0, word]) >> bits * field & (1 << bits) - 1
        if planes.high is not None:
            code |= (int(planes.high[0, word]) >> above * field & (1 << above) - 1) << bits
        assert code == int(codes[k]), f"in feature {k}"
    assert fields * layout.group == layout.chunk


@pytest.mark.parametrize("name", NAMES)
def test_planes_are_as_large_as_blocks(name: str) -> None:
    layout, blocks = GGML_PLANES[name], random_blocks(name, 3, 512 // GGML_PLANES[name].form.block_size)
    nbytes = sum(plane.numel() * plane.element_size() for plane in layout.pack(blocks) if plane is not None)
    assert nbytes * layout.form.type_size == blocks.numel() * {"q6_k": 212, "q3_k": 112}.get(
        name, layout.form.type_size
    )


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_packed_alone_and_views_as_well(name: str) -> None:
    layout, blocks = GGML_PLANES[name], random_blocks(name, 6, 3)
    whole, part = layout.pack(blocks), layout.pack(blocks[1:5:2])
    for all_rows, some in zip(whole, part, strict=True):
        assert (all_rows is None) == (some is None)
        assert some is None or torch.equal(all_rows[1:5:2], some)
    columns = torch.stack((blocks, blocks), dim=2)[:, :, 0]
    assert torch.equal(layout.pack(columns).codes, whole.codes)
    cut = type(whole)(*(None if plane is None else plane[::2] for plane in whole))
    assert torch.equal(layout.unpack(cut, 3 * layout.form.block_size), blocks[::2])


def test_large_weights_are_packed_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, blocks = GGML_PLANES["q6_k"], random_blocks("q6_k", 11, 3)
    whole = layout.pack(blocks)
    monkeypatch.setattr("lq_formats.layouts.ggml._PIECE", 2000)
    assert all(torch.equal(*pair) for pair in zip(layout.pack(blocks), whole, strict=True))
    assert torch.equal(layout.unpack(whole, 768), blocks)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name: str) -> None:
    layout = GGML_PLANES[name]
    planes = layout.pack(random_blocks(name, 0, 3))
    assert layout.unpack(planes, 3 * layout.form.block_size).shape == (0, 3, layout.form.type_size)


def test_what_does_not_fit_is_named() -> None:
    layout = GGML_PLANES["q5_0"]
    blocks = random_blocks("q5_0", 2, 4)
    with pytest.raises(DTypeError, match="uint8"):
        layout.pack(blocks.view(torch.int8))
    for wrong in (blocks[0], blocks[..., :-1], blocks[:, :0]):
        with pytest.raises(ShapeError, match=r"expected \(N, blocks, 22\)"):
            layout.pack(wrong)
    planes = layout.pack(blocks)
    with pytest.raises(ShapeError, match="multiple of 32"):
        layout.unpack(planes, 100)
    with pytest.raises(ShapeError, match=r"codes has shape \(2, 32\): q5_0 with 512 in features has \(2, 64\)"):
        layout.unpack(planes, 512)
    with pytest.raises(ShapeError, match=r"has a plane 'high'"):
        layout.unpack(planes._replace(high=None), 128)
    with pytest.raises(ShapeError, match=r"has no plane 'high'"):
        GGML_PLANES["q4_0"].check(planes, 128)
    with pytest.raises(DTypeError, match=r"high has dtype torch.int16: q5_0 has torch.uint8"):
        layout.unpack(planes._replace(high=planes.codes.to(torch.int16)), 128)
    with pytest.raises(SizeOverflowError):
        layout.packed_shape(2**40, 2**40)
    with pytest.raises(SpecError, match="q9"):
        ggml_planes("q9")
    with pytest.raises(ShapeError, match="activations"):
        ggml_planes("q8_1")
    assert ggml_planes("Q4_K") is GGML_PLANES["q4_k"]

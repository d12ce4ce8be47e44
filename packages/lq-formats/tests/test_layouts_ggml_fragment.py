"""ggml's blocks in fragment order: byte for byte both ways, with the weights of the blocks; and what does not fit."""

import pytest
import torch
from lq_formats import DTypeError, NonFiniteError, ShapeError
from lq_formats.layouts import GGML_FRAGMENTS, GGML_PLANES, ggml_fragment
from torch import Tensor

NAMES = tuple(GGML_FRAGMENTS)
BITS = {"q4_0": 4.5, "q4_1": 5.0, "q4_k": 5.5, "q8_0": 8.5}


def any_blocks(name: str, rows: int, count: int) -> Tensor:
    """Blocks of any bytes: scales are also NaN, infinite, subnormal and -0; those of Q4_K are below 2**9."""
    blocks = torch.randint(0, 256, (rows, count, GGML_PLANES[name].form.type_size), dtype=torch.uint8)
    if name == "q4_k":
        blocks[..., 1:4:2] &= 0xDF
        blocks[: rows // 3, :, :4] = torch.tensor([0x01, 0x7C, 0x00, 0xFE], dtype=torch.uint8)  # two NaN
    return blocks


def weight_of(name: str, fragments: ggml_fragment.GGMLFragments, n: int, k: int) -> Tensor:
    """Return the float64 weight that kernels see."""
    layout = GGML_FRAGMENTS[name]
    codes = layout.order.unpack(fragments.codes, n, k).double()
    scale = layout.order.restore_scales(fragments.scale, n, k, 32).double().repeat_interleave(32, 1)
    if fragments.minima is None:
        return (codes - (1 << layout.bits - 1)) * scale
    return codes * scale + layout.order.restore_scales(fragments.minima, n, k, 32).double().repeat_interleave(32, 1)


@pytest.mark.parametrize("piece", [1 << 22, 1])
@pytest.mark.parametrize("count", [2, 3, 7, 8])
@pytest.mark.parametrize("rows", [0, 1, 17, 40])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_come_back_byte_for_byte(
    name: str, rows: int, count: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml_fragment, "_PIECE", piece)  # all at once, and 16 rows at a time
    layout, blocks = GGML_FRAGMENTS[name], any_blocks(name, rows, count)
    k = count * layout.form.block_size
    fragments = layout.pack(blocks)
    layout.check(fragments, rows, k)
    assert torch.equal(layout.unpack(fragments, rows, k), blocks)
    some = torch.randint(0, max(rows, 1), (min(rows, 9),))
    assert torch.equal(layout.unpack_rows(fragments, some, rows, k), blocks[some])


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_a_row_of_one_group_has_one_scale(name: str) -> None:
    layout, blocks = GGML_FRAGMENTS[name], any_blocks(name, 20, 1)
    fragments = layout.pack(blocks)
    assert fragments.scale.shape == (1, 32)
    assert torch.equal(layout.unpack(fragments, 20, 32), blocks)


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_is_that_of_the_blocks(name: str) -> None:
    form = GGML_FRAGMENTS[name].form
    blocks = form.quantize(torch.randn(37, 768) * torch.logspace(-4, 0, 37)[:, None])
    w, found = form.dequantize(blocks, torch.float64), weight_of(name, GGML_FRAGMENTS[name].pack(blocks), 37, 768)
    assert torch.equal(GGML_FRAGMENTS[name].dequantize(GGML_FRAGMENTS[name].pack(blocks), 37, 768), w.float())
    if name != "q4_k":
        assert torch.equal(found, w)
    # fp16 scales and minima: 2**-11 of (15 d s + dmin m), of weights that lie between.
    assert float(((found - w) ** 2).mean() / (w**2).mean()) < 2e-6  # .3 to .7e-6
    rows = (found - w).norm(dim=1) / w.norm(dim=1)
    assert float(rows.max()) < 2e-3  # the largest of a draw is .8 to 1.1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_size_is_what_is_said(name: str) -> None:
    fragments = GGML_FRAGMENTS[name].pack(any_blocks(name, 32, 2048 // GGML_PLANES[name].form.block_size))
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in fragments if tensor is not None)
    assert nbytes * 8 == BITS[name] * 32 * 2048


@pytest.mark.parametrize("at", [0, 2])
def test_scales_beyond_fp16_are_refused_and_others_are_not(at: int) -> None:
    layout = GGML_FRAGMENTS["q4_k"]
    blocks = torch.zeros(3, 1, 144, dtype=torch.uint8)
    blocks[1, 0, at : at + 2] = torch.tensor([1100.0], dtype=torch.float16).view(torch.uint8)
    blocks[1, 0, 5 + 2 * at] = 59  # 64900, of s or of m
    assert layout.why_not(blocks) is None
    assert torch.equal(layout.unpack(layout.pack(blocks), 3, 256), blocks)
    blocks[1, 0, 5 + 2 * at] = 60  # 66000
    assert "beyond float16" in (layout.why_not(blocks) or "")
    with pytest.raises(NonFiniteError, match="keep it in planes"):
        layout.pack(blocks)


def test_what_does_not_fit_is_named() -> None:
    layout = GGML_FRAGMENTS["q4_1"]
    with pytest.raises(DTypeError, match="expected uint8"):
        layout.pack(torch.zeros(2, 2, 20))
    with pytest.raises(ShapeError, match=r"\(2, 2, 18\): expected \(N, blocks, 20\)"):
        layout.pack(torch.zeros(2, 2, 18, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="minimum for a whole row"):
        layout.pack(torch.zeros(2, 1, 20, dtype=torch.uint8))
    fragments = layout.pack(any_blocks("q4_1", 16, 4))
    with pytest.raises(ShapeError, match="in_features=120"):
        layout.unpack(fragments, 16, 120)
    with pytest.raises(ShapeError, match="codes has shape"):
        layout.unpack(fragments, 17, 128)
    with pytest.raises(ShapeError, match="a tensor 'minima'"):
        layout.unpack(fragments._replace(minima=None), 16, 128)
    with pytest.raises(ShapeError, match="no tensor 'minima'"):
        GGML_FRAGMENTS["q4_0"].unpack(fragments, 16, 128)
    with pytest.raises(DTypeError, match="scale has dtype"):
        layout.unpack(fragments._replace(scale=fragments.scale.float()), 16, 128)
    with pytest.raises(ShapeError, match="scale has shape"):
        layout.unpack(fragments._replace(scale=fragments.scale[:, :32]), 16, 128)

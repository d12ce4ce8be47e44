"""Searched scales of ggml blocks: the least weighted error, against exhaustive search in float64; and bad importances."""

import math

import pytest
import torch
from lq_formats import (
    GGML_FORMATS,
    DTypeError,
    GGMLFormat,
    NonFiniteError,
    ShapeError,
    SpecError,
    UnsupportedError,
    dequantize_q4_0,
    quantize_q4_0,
)
from lq_formats.ggml import importance as search
from lq_formats.ggml.kquants import pack_scale_min, unpack_scale_min
from torch import Tensor

SEARCHED = tuple(name for name, form in GGML_FORMATS.items() if form.weighted)
# Weighted squared error with an importance over that without; seen: .68 .70 .62 .63 .68.
SHARES = {"q4_0": 0.75, "iq4_nl": 0.78, "q4_k": 0.70, "q5_k": 0.70, "q6_k": 0.75}


def error(form: GGMLFormat, data: Tensor, x: Tensor, weight: Tensor) -> float:
    difference = form.dequantize(data, torch.float64) - x.double()
    return float((difference * difference * weight.double()).sum())


def heavy_tailed(seed: int, rows: int = 48, columns: int = 512) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x, (1.5 * torch.randn(columns, generator=generator)).exp()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_weighted_error(name: str, seed: int) -> None:
    form = GGML_FORMATS[name]
    x, importance = heavy_tailed(seed)
    plain, weighted = form.quantize(x), form.quantize(x, importance)
    assert error(form, weighted, x, importance) < SHARES[name] * error(form, plain, x, importance)


def test_an_even_importance_beats_the_reference_of_q4_0() -> None:
    x, _ = heavy_tailed(3)
    form, even = GGML_FORMATS["q4_0"], torch.ones(x.shape[1])
    assert error(form, quantize_q4_0(x, even), x, even) < 0.92 * error(form, quantize_q4_0(x), x, even)


def test_q4_k_beats_q4_0_and_iq4_nl_at_the_same_size() -> None:
    x, _ = heavy_tailed(4)
    even = torch.ones(x.shape[1])
    errors = {name: error(form, form.quantize(x), x, even) for name, form in GGML_FORMATS.items() if name in SEARCHED}
    assert errors["q6_k"] < 0.27 * errors["q5_k"] < 0.27**2 * errors["q4_k"]
    assert errors["q4_k"] < 0.98 * errors["iq4_nl"] < 0.75 * errors["q4_0"]


@pytest.mark.parametrize("name", ["iq4_nl", "q4_k", "q5_k", "q6_k"])
@pytest.mark.parametrize("counted", [False, True])
def test_small_weights_are_not_lost_where_scales_are_below_fp16s(name: str, counted: bool) -> None:
    form, x = GGML_FORMATS[name], torch.randn(16, 512, generator=torch.Generator().manual_seed(7))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(8)) if counted else None
    for size, least in ((3e-5, 0.1), (3e-6, 0.12), (1e-6, 0.3), (1e-8, 1.0), (1e-12, 1.0)):
        small = x * size
        off = (form.dequantize(form.quantize(small, importance)) - small) * (
            1.0 if importance is None else importance.sqrt()
        )
        assert off.norm() <= least * (small * (1.0 if importance is None else importance.sqrt())).norm(), size


def test_q4_0_is_within_a_percent_of_the_best_scale() -> None:
    """Every fp16 scale within a factor of two of the extreme's, in float64: no search can do better."""
    x, importance = heavy_tailed(5, 1, 256)
    blocks, weight = x.double().reshape(8, 1, 32), importance.double().reshape(8, 1, 32)
    exponents = torch.linspace(-1, 1, 1024, dtype=torch.float64).exp2()
    d = blocks.abs().amax(-1, keepdim=True) / 8 * torch.cat((exponents, -exponents)).unsqueeze(-1)
    d = d.half().double()
    best = (((blocks / d).round().clamp(-8, 7) * d - blocks) ** 2 * weight).sum(-1).amin(-1)
    found = (dequantize_q4_0(quantize_q4_0(x, importance)).double().reshape(8, 32) - blocks[:, 0]) ** 2 * weight[:, 0]
    assert found.sum() <= 1.01 * best.sum()


def test_a_column_that_does_not_count_is_ignored() -> None:
    x, importance = heavy_tailed(6)
    outliers, ignored = x.clone(), importance.clone()
    ignored[::32] = 0
    outliers[:, ::32] *= 20
    for name in SEARCHED:
        form = GGML_FORMATS[name]
        with_outliers = form.quantize(outliers, ignored)
        # Far below what the outliers do to an unweighted block (factor 400 in squared steps).
        assert error(form, with_outliers, outliers, ignored) < 2 * error(form, form.quantize(x, ignored), x, ignored)


@pytest.mark.parametrize("name", SEARCHED)
def test_only_ratios_of_the_importance_matter(name: str) -> None:
    form = GGML_FORMATS[name]
    x, importance = heavy_tailed(7)
    expected = form.quantize(x, importance)
    for factor in (2.0**-60, 2.0**60):
        assert torch.equal(form.quantize(x, importance * factor), expected)
    assert torch.equal(form.quantize(x, importance.double()), expected)


@pytest.mark.parametrize("name", SEARCHED)
def test_rows_do_not_depend_on_each_other_nor_on_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = GGML_FORMATS[name]
    x, importance = heavy_tailed(8)
    expected = form.quantize(x, importance)
    assert torch.equal(form.quantize(x[5], importance), expected[5])
    monkeypatch.setattr(search, "_CHUNK", {"cpu": 2000})
    assert torch.equal(form.quantize(x, importance), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1e3])
@pytest.mark.parametrize("name", SEARCHED)
def test_any_magnitude_stays_finite(name: str, scale: float) -> None:
    form = GGML_FORMATS[name]
    x, importance = heavy_tailed(9)
    values = form.dequantize(form.quantize(x * scale, importance))
    assert torch.isfinite(values).all()
    assert values.abs().amax() <= 2 * (x * scale).abs().amax()
    if scale >= 1e-3:  # below, scales are subnormal or zero in fp16
        assert (values - x * scale).norm() < 0.12 * (x * scale).norm()


@pytest.mark.parametrize("name", SEARCHED)
def test_no_importance_anywhere_gives_finite_blocks(name: str) -> None:
    form = GGML_FORMATS[name]
    x, _ = heavy_tailed(10)
    assert torch.isfinite(form.dequantize(form.quantize(x, torch.zeros(x.shape[1])))).all()


@pytest.mark.parametrize("name", SEARCHED)
def test_bad_importances_are_named(name: str) -> None:
    form = GGML_FORMATS[name]
    x = torch.randn(3, 256)
    with pytest.raises(ShapeError, match=r"importance has shape \(255,\): expected \(256,\)"):
        form.quantize(x, torch.ones(255))
    with pytest.raises(ShapeError, match="one a column"):
        form.quantize(x, torch.ones(3, 256))
    with pytest.raises(DTypeError, match="importance"):
        form.quantize(x, torch.ones(256, dtype=torch.int64))
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="importance"):
            form.quantize(x, torch.full((256,), bad))
    with pytest.raises(SpecError, match="negative"):
        form.quantize(x, torch.linspace(-1, 1, 256))


def test_formats_without_a_search_refuse_an_importance() -> None:
    for name in ("q4_1", "q5_0", "q8_0", "q8_1", "mxfp4"):
        with pytest.raises(
            UnsupportedError, match=rf"{name} is quantized without a search.*q4_0, iq4_nl, q4_k, q5_k, q6_k"
        ):
            GGML_FORMATS[name].quantize(torch.randn(2, 64), torch.ones(64))


def test_scale_bytes_of_q4_k_round_trip() -> None:
    codes = torch.randint(0, 64, (500, 16), dtype=torch.uint8)
    packed = pack_scale_min(codes[:, :8], codes[:, 8:])
    assert packed.shape == (500, 12)
    assert torch.equal(torch.cat(unpack_scale_min(packed), dim=-1), codes)


def test_a_weight_on_the_grid_of_q4_k_is_kept() -> None:
    """Blocks that Q4_K can hold exactly, every code in use, are found again to the rounding of their factors."""
    generator = torch.Generator().manual_seed(11)
    scale = torch.randint(32, 64, (16, 8, 1), generator=generator).double() / 63
    scale[:, 0] = 1
    codes = torch.stack([torch.randperm(32, generator=generator) % 16 for _ in range(128)]).reshape(16, 8, 32)
    x = (scale * (codes - 8.0)).float().reshape(16, 256)
    form = GGML_FORMATS["q4_k"]
    assert (form.dequantize(form.quantize(x)) - x).norm() < 0.02 * x.norm()


@pytest.mark.parametrize(("name", "most"), [("q4_k", 1.003), ("q5_k", 1.008)])
def test_factors_of_k_blocks_fit_their_codes(name: str, most: float) -> None:
    """Least squares in float64: with these codes no ``d`` and ``dmin`` leave much less error."""
    x, importance = heavy_tailed(0)
    form = GGML_FORMATS[name]
    data = form.quantize(x, importance)
    d, dmin = data[..., :4].contiguous().view(torch.float16).double().unbind(-1)
    scale, minimum = (each.double() for each in unpack_scale_min(data[..., 4:16]))
    values, weight = (
        x.double().view(-1, 256, 1),
        importance.double().view(1, 2, 256).expand(48, 2, 256).reshape(-1, 256, 1),
    )
    against = minimum.repeat_interleave(32, -1).view(-1, 256)
    dense = form.dequantize(data, torch.float64).view(-1, 256)
    along = (dense + dmin.view(-1, 1) * against) / d.view(-1, 1)
    assert torch.equal(along.round() % scale.repeat_interleave(32, -1).view(-1, 256), torch.zeros_like(along))
    factors = torch.stack((along, -against), -1)
    best = torch.linalg.lstsq(factors * weight.sqrt(), values * weight.sqrt()).solution
    least = ((factors @ best - values).square() * weight).sum()
    assert ((dense.unsqueeze(-1) - values).square() * weight).sum() < most * least


@pytest.mark.gpu
@pytest.mark.parametrize("name", SEARCHED)
def test_cuda_searches_find_the_same_bytes(name: str) -> None:
    form = GGML_FORMATS[name]
    x, importance = heavy_tailed(12)
    assert torch.equal(form.quantize(x.cuda(), importance.cuda()).cpu(), form.quantize(x, importance))

"""Searched scales and zeros: never worse than round-to-nearest by their own measure, exact where a scale is exact."""

import math

import pytest
import torch
from lq_formats import (
    DeviceError,
    DTypeError,
    GroupSizeError,
    NonFiniteError,
    QuantSpec,
    ShapeError,
    SpecError,
    choose_qparams,
    dequantize_affine,
    quantize_affine,
    search_qparams,
)
from lq_formats.search import ALGORITHMS

SPECS = {
    "g32-sym": QuantSpec(4, "group", 32, True, torch.float16),
    "g128-asym": QuantSpec(4, "group", 128, False, torch.bfloat16),
    "row-sym": QuantSpec(4, "row", None, True, torch.float32),
    "row-asym": QuantSpec(4, "row", None, False, torch.float32),
    "tensor-sym": QuantSpec(4, "tensor", None, True, torch.float32),
    "tensor-asym": QuantSpec(4, "tensor", None, False, torch.float32),
    "2bit-asym": QuantSpec(2, "group", 64, False, torch.bfloat16),
    "3bit-sym": QuantSpec(3, "group", 64, True, torch.bfloat16),
    "8bit-sym": QuantSpec(8, "row", None, True, torch.float32),
}
SEARCHES = tuple(name for name in ALGORITHMS if name != "rtn")


def weights(rows=48, columns=256, seed=0, dtype=torch.float32):
    """Normal, with a few outliers and a shifted row: what a range search is for."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w[torch.rand(rows, columns, generator=generator) < 0.01] *= 6
    w[3::16] += 2
    return (w * 0.02).to(dtype)


def power(algorithm, spec, w):
    """Return the exponent of an error: 2 for 32 weights a scale, half more each time they double, at most 4."""
    size = {"tensor": w.numel(), "row": w.shape[1], "group": spec.group_size}[spec.granularity]
    return 0.7 if algorithm == "hqq" else min(2 + math.log2(size / 32) / 2, 4)


def restore(w, scale, zero, spec):
    return dequantize_affine(quantize_affine(w, scale, zero, spec), scale, zero, spec)


def error(w, scale, zero, spec, exponent, importance=1.0):
    return float(((restore(w, scale, zero, spec) - w.float()).abs().double().pow(exponent) * importance).sum())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("algorithm", SEARCHES)
def test_never_worse_than_round_to_nearest(algorithm, spec):
    for seed in range(3):
        w = weights(seed=seed)
        scale, zero = search_qparams(w, spec, algorithm)
        nearest = choose_qparams(w, spec)
        assert scale.shape == nearest[0].shape
        assert scale.dtype == spec.scale_dtype
        assert (zero is None) == spec.symmetric
        assert zero is None or (zero.dtype, zero.shape) == (spec.scale_dtype, scale.shape)
        assert bool(torch.isfinite(scale).all())
        assert bool((scale != 0).all())
        found, plain = (error(w, *pair, spec, power(algorithm, spec, w)) for pair in ((scale, zero), nearest))
        assert found <= plain * 1.001
        if algorithm == "mse" and spec.bits <= 4:
            assert found < plain * 0.97


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_rtn_is_choose_qparams(spec):
    w = weights()
    scale, zero = search_qparams(w, spec, "rtn")
    expected_scale, expected_zero = choose_qparams(w, spec)
    assert torch.equal(scale, expected_scale)
    assert zero is expected_zero or torch.equal(zero, expected_zero)


def test_the_clip_of_one_group_is_the_best_of_the_grid():
    spec = QuantSpec(4, "row", None, True, torch.float32)
    w = weights(1, 64, seed=5)
    most = float(w.abs().max())
    shares = [*torch.linspace(0.6, 1, 30), *torch.linspace(1, 8 / 7, 13)[1:]]
    grid = [most / 7] + [sign * most * float(share) / 8 for share in shares for sign in (1, -1)]
    errors = [error(w, torch.tensor([[scale]]), None, spec, power("mse", spec, w)) for scale in grid]
    scale, _ = search_qparams(w, spec, "mse")
    assert error(w, scale, None, spec, power("mse", spec, w)) == pytest.approx(min(errors), rel=1e-5)


@pytest.mark.parametrize(("size", "exponent"), [(8, 2), (32, 2), (64, 2.5), (128, 3), (256, 3.5), (512, 4), (2048, 4)])
def test_an_error_counts_by_the_power_that_its_group_s_size_says(size, exponent):
    """In float64, of every row: nothing on the grid is better by this power, though much is by others."""
    spec = QuantSpec(4, "row", None, True, torch.float32)
    w = weights(64, size, seed=size)
    most = w.abs().amax(1, keepdim=True)
    shares = torch.cat((torch.linspace(0.6, 1, 30), torch.linspace(1, 8 / 7, 13)[1:])) / 8
    grid = most * torch.cat((torch.tensor([1 / 7]), shares, -shares))
    scale, _ = search_qparams(w, spec, "mse")

    def errors(scales, power):
        wide = scales.double().unsqueeze(-1)
        values = w.double().unsqueeze(1)
        return ((values / wide).round().clamp(-8, 7) * wide - values).abs().pow(power).sum(-1)

    assert bool((errors(scale, exponent)[:, 0] <= errors(grid, exponent).amin(1) * (1 + 1e-4)).all())
    for other in (exponent - 0.25, exponent + 0.25):
        assert bool((errors(scale, other)[:, 0] > errors(grid, other).amin(1) * (1 + 1e-4)).any())


def test_a_scale_may_be_negative_where_the_far_end_is_above():
    w = torch.tensor([[8.0, -1, 2, 3, -4, 5, 6, -7]])
    spec = QuantSpec(4, "row", None, True, torch.float32)
    scale, _ = search_qparams(w, spec, "mse")
    assert float(scale) == -1.0  # -8 codes exist, +8 codes do not
    assert torch.equal(restore(w, scale, None, spec), w)


def test_a_float_zero_needs_not_move_the_range():
    w = torch.linspace(3, 4.5, 16)[None]
    spec = QuantSpec(4, "row", None, False, torch.float32)
    scale, zero = search_qparams(w, spec, "mse")
    assert float((restore(w, scale, zero, spec) - w).abs().max()) < 1e-5
    assert float(zero) == pytest.approx(-30, rel=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_integer_zeros_are_codes(algorithm):
    spec = SPECS["g128-asym"]
    scale, zero = search_qparams(weights(), spec, algorithm, integer_zero=True)
    assert zero.dtype == torch.uint8
    assert int(zero.max()) <= 15
    assert error(weights(), scale, zero, spec, 3.0) < 2 * error(weights(), *choose_qparams(weights(), spec), spec, 3.0)


@pytest.mark.parametrize("algorithm", SEARCHES)
@pytest.mark.parametrize(
    "spec", [SPECS["g32-sym"], SPECS["g128-asym"], SPECS["tensor-asym"]], ids=lambda s: str(s.bits)
)
def test_what_counts_more_is_closer(algorithm, spec):
    w = weights()
    importance = torch.ones(256)
    importance[::4] = 50.0
    weighted = search_qparams(w, spec, algorithm, importance)
    plain = search_qparams(w, spec, algorithm)
    assert error(w, *weighted, spec, power(algorithm, spec, w), importance) <= error(
        w, *plain, spec, power(algorithm, spec, w), importance
    )
    same = search_qparams(w, spec, algorithm, torch.full((256,), 2.0))
    assert torch.equal(same[0], plain[0])


@pytest.mark.parametrize("algorithm", SEARCHES)
@pytest.mark.parametrize("spec", [SPECS["g32-sym"], SPECS["g128-asym"]], ids=["sym", "asym"])
def test_special_groups(algorithm, spec):
    w = torch.zeros(6, 128)
    w[1] = 0.5  # all equal
    w[2, 0] = 1e-30  # underflows fp16
    w[3] = -3.0
    w[4, ::2] = 1e4
    scale, zero = search_qparams(w, spec, algorithm)
    assert bool(torch.isfinite(scale).all())
    assert bool((scale != 0).all())
    back = restore(w, scale, zero, spec)
    assert not back[0].any()
    torch.testing.assert_close(back[[1, 3]], w[[1, 3]], rtol=0.02, atol=0)
    assert float((back[2] - w[2]).abs().max()) < 1e-6
    assert bool(torch.isfinite(back).all())


@pytest.mark.parametrize("algorithm", SEARCHES)
def test_chunks_do_not_matter(algorithm, monkeypatch):
    from lq_formats import search

    spec = SPECS["g128-asym"]
    whole = search_qparams(weights(), spec, algorithm)
    monkeypatch.setattr(search, "_CHUNK", {"cpu": 600})
    for one, other in zip(search_qparams(weights(), spec, algorithm), whole, strict=True):
        assert torch.equal(one, other)


def test_mistakes_are_named():
    spec, w = SPECS["g32-sym"], weights()
    with pytest.raises(SpecError, match="rtn, mse, hqq"):
        search_qparams(w, spec, "gptq")
    with pytest.raises(SpecError, match="column_weight"):
        search_qparams(w, spec, "rtn", torch.ones(256))
    with pytest.raises(SpecError, match="negative"):
        search_qparams(w, spec, "mse", -torch.ones(256))
    with pytest.raises(ShapeError, match="one a column"):
        search_qparams(w, spec, "mse", torch.ones(255))
    with pytest.raises(NonFiniteError, match="column_weight"):
        search_qparams(w, spec, "mse", torch.full((256,), torch.nan))
    with pytest.raises(DeviceError):
        search_qparams(w, spec, "mse", torch.ones(256, device="meta"))
    with pytest.raises(GroupSizeError):
        search_qparams(w[:, :100], spec, "mse")
    with pytest.raises(DTypeError):
        search_qparams(w.to(torch.int8), spec, "mse")
    with pytest.raises(NonFiniteError):
        search_qparams(torch.full((4, 32), torch.inf), spec, "mse")
    with pytest.raises(NonFiniteError, match="larger range"):
        search_qparams(torch.full((4, 32), 1e9), spec, "mse")
    for algorithm in ALGORITHMS:
        scale, zero = search_qparams(w[:0], spec, algorithm)
        assert (tuple(scale.shape), zero) == ((0, 8), None)


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", SEARCHES)
@pytest.mark.parametrize("spec", [SPECS["g32-sym"], SPECS["g128-asym"]], ids=["sym", "asym"])
def test_a_gpu_finds_as_good_parameters(algorithm, spec):
    w = weights(256, 1024)
    here = error(w, *search_qparams(w, spec, algorithm), spec, power(algorithm, spec, w))
    scale, zero = search_qparams(w.cuda(), spec, algorithm)
    assert scale.device.type == "cuda"
    there = error(w, scale.cpu(), None if zero is None else zero.cpu(), spec, power(algorithm, spec, w))
    assert there == pytest.approx(here, rel=1e-3)

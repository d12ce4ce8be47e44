"""Codes chosen for a layer's outputs, held against float64 and against what no search may miss."""

import itertools

import pytest
import torch
from lq_formats import NonFiniteError, QuantSpec, choose_qparams, quantize_affine
from lq_torch.calibrate.layers import quantize_together
from lq_torch.calibrate.moments import Moments, factor_inverse
from lq_torch.calibrate.options import GPTQOptions
from lq_torch.calibrate.solve import Quantized, descend, gptq_codes, nearest_codes, output_error
from lq_torch.calibrate.target import target_of
from lq_torch.config import Int4WeightOnlyConfig
from lq_torch.config_intx import IntxWeightOnlyConfig

SYM = QuantSpec(4, "group", 32, True, torch.float32)
ASYM = QuantSpec(3, "group", 32, False, torch.float32)
SPECS = [pytest.param(SYM, id="int4-g32-sym"), pytest.param(ASYM, id="int3-g32-asym")]


def _inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs of very different size, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return torch.randn(tokens, columns, generator=generator) @ (mixing + torch.eye(columns)) * size


def _weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _hessian(x: torch.Tensor) -> torch.Tensor:
    return x.t() @ x / x.shape[0]


def _start(w: torch.Tensor, spec: QuantSpec) -> Quantized:
    scale, zero = choose_qparams(w, spec)
    middle = torch.full_like(scale, spec.midpoint) if zero is None else zero
    return nearest_codes(w, scale.to(w.dtype), middle.to(w.dtype), spec)


def _slow_gptq(
    w: torch.Tensor, start: Quantized, spec: QuantSpec, hessian: torch.Tensor, order: list[int]
) -> torch.Tensor:
    """Optimal brain quantization in a given order: the inverse Hessian of the free columns is made anew for each column."""
    w = w.clone()
    codes = torch.zeros_like(w)
    size = w.shape[1] // start.scale.shape[1]
    for position, column in enumerate(order):
        free = order[position:]
        inverse = torch.linalg.inv(hessian[free][:, free])
        s, z = start.scale[:, column // size], start.zero[:, column // size]
        codes[:, column] = (w[:, column] / s + z).round().clamp(0, spec.max_code)
        error = w[:, column] - (codes[:, column] - z) * s
        w[:, free] -= torch.outer(error / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize("columns", [5, 64])
def test_the_factor_is_that_of_the_inverse(columns):
    hessian = _hessian(_inputs(200, columns).double())
    upper, used = factor_inverse(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(columns).double()
    assert used == 0.01
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.t() @ upper, torch.linalg.inv(damped), rtol=1e-9, atol=1e-12)


def test_damping_is_raised_tenfold_until_there_is_a_factor():
    """Eigenvalues 2, 2, -0.1 and a mean diagonal of 1.3: a share of 0.01 is too little and 0.1 is enough."""
    rotation = torch.linalg.qr(_weight(3, 3).double())[0]
    hessian = rotation @ torch.diag(torch.tensor([2.0, 2.0, -0.1]).double()) @ rotation.t()
    _, used = factor_inverse(hessian, 0.01)
    assert used == pytest.approx(0.1)
    assert factor_inverse(torch.diag(torch.tensor([1.0, 1.0, -50.0])), 0.01) is None


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("ordered", [True, False], ids=["act-order", "in-order"])
def test_gptq_equals_the_slow_algorithm(spec, ordered):
    """In float64, over more columns than a block of updates, in any order."""
    w = _weight(6, 160).double()
    hessian = _hessian(_inputs(400, 160)).double()
    order = hessian.diagonal().argsort(descending=True) if ordered else torch.arange(160)
    upper, used = factor_inverse(hessian[order][:, order], 0.01)
    damped = hessian + used * hessian.diagonal().mean() * torch.eye(160).double()
    start = _start(w, spec)
    found = gptq_codes(w, start.scale, start.zero, spec, upper, order)
    assert torch.equal(found.codes, _slow_gptq(w, start, spec, damped, order.tolist()))


@pytest.mark.parametrize("spec", SPECS)
def test_every_sweep_lowers_the_output_error(spec):
    w, hessian = _weight(40, 96), _hessian(_inputs(300, 96))
    found = _start(w, spec)
    errors = [output_error(found.values().double(), w.double(), hessian.double())]
    for _ in range(4):
        found = descend(found, w, hessian, spec, sweeps=1)
        errors.append(output_error(found.values().double(), w.double(), hessian.double()))
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert float(errors[-1].sum()) < 0.7 * float(errors[0].sum())


@pytest.mark.parametrize(("rows", "columns"), [(5, 32), (1, 96)], ids=str)
def test_descent_leaves_alone_what_it_starts_from(rows, columns):
    """One group a row or a single row: transposed, these are contiguous already."""
    w, hessian = _weight(rows, columns), _hessian(_inputs(300, columns))
    start = _start(w, ASYM)
    before = [each.clone() for each in (start.codes, start.scale, start.zero)]
    found = descend(start, w, hessian, ASYM, sweeps=1)
    assert all(map(torch.equal, before, (start.codes, start.scale, start.zero)))
    assert not torch.equal(found.codes, start.codes)


@pytest.mark.parametrize("spec", SPECS)
def test_after_descent_no_single_code_is_better(spec):
    w, hessian = _weight(3, 32).double(), _hessian(_inputs(200, 32)).double()
    found = descend(_start(w, spec), w, hessian, spec, sweeps=60)
    best = output_error(found.values(), w, hessian)
    for column in range(32):
        for step in (-1, 1):
            codes = found.codes.clone()
            codes[:, column] = (codes[:, column] + step).clamp(0, spec.max_code)
            other = output_error(Quantized(codes, found.scale, found.zero).values(), w, hessian)
            assert bool((other >= best * (1 - 1e-5)).all())


@pytest.mark.parametrize("spec", SPECS)
def test_scales_and_zeros_are_the_least_squares_solution_for_their_codes(spec):
    """For one group, against a dense solver in float64 on the inputs themselves."""
    x = _inputs(200, 32).double()
    w = _weight(4, 32).double()
    found = descend(_start(w, spec), w, _hessian(x), spec, sweeps=60)
    for row in range(4):
        features = (found.codes[row] - spec.midpoint).unsqueeze(1)
        if not spec.symmetric:
            features = torch.cat([found.codes[row].unsqueeze(1), torch.ones(32, 1).double()], dim=1)
        solved = torch.linalg.lstsq(x @ features, (x @ w[row]).unsqueeze(1)).solution.squeeze(1)
        assert float(found.scale[row, 0]) == pytest.approx(float(solved[0]), rel=1e-4)
        if not spec.symmetric:
            assert float(-found.zero[row, 0] * found.scale[row, 0]) == pytest.approx(
                float(solved[1]), rel=1e-3, abs=1e-5
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    "config",
    [Int4WeightOnlyConfig(32, symmetric=False), IntxWeightOnlyConfig(3, 32, symmetric=False)],
    ids=["int4", "int3"],
)
def test_the_stored_weight_has_the_error_that_is_reported(dtype, config):
    """Nothing is rounded after the error was measured; two layers share one Hessian and are told apart."""
    x = _inputs(300, 64)
    moments = Moments(members=["q", "k"])
    moments.add(x)
    weights = {"q": _weight(24, 64).to(dtype), "k": _weight(8, 64, seed=5).to(dtype)}
    outcomes = quantize_together(weights, moments, target_of(config, dtype), GPTQOptions())
    assert outcomes is not None
    for path, outcome in outcomes.items():
        exact = weights[path].double()
        y = x.double() @ exact.t()
        change = x.double() @ (outcome.weight.dequantize(torch.float32).double() - exact).t()
        assert outcome.error == pytest.approx(float(change.square().sum() / y.square().sum()), rel=1e-3)
        assert outcome.weight.dtype == dtype
        assert type(outcome.weight) is type(config.quantize(weights[path]))


def test_outputs_are_far_nearer_than_with_nearest_codes():
    x, w = _inputs(400, 128), _weight(64, 128)
    moments = Moments(members=["w"])
    moments.add(x)
    target = target_of(Int4WeightOnlyConfig(32), torch.float32)
    errors = {}
    for options in (None, GPTQOptions(sweeps=0), GPTQOptions()):
        found = quantize_together({"w": w}, moments, target, options)
        assert found is not None
        errors[options] = found["w"].error
    scale, zero = choose_qparams(w, target.spec)
    nearest = (quantize_affine(w, scale, zero, target.spec).float() - 8) * scale.repeat_interleave(32, 1)
    rtn = float((x @ (nearest - w).t()).square().sum() / (x @ w.t()).square().sum())
    searched, solved, descended = errors.values()
    assert descended < solved < searched < rtn
    assert descended < 0.4 * rtn


def test_what_the_float_model_would_see_is_made_up_for():
    """Inputs that the blocks before have halved: with a full share, the weight doubles them."""
    x = _inputs(400, 64)
    moments = Moments(members=["w"])
    moments.add(x / 2, x)
    w = _weight(16, 64)
    target = target_of(IntxWeightOnlyConfig(8, 32), torch.float32)
    found = quantize_together({"w": w}, moments, target, GPTQOptions(damping=1e-4, correct_inputs=1.0))
    assert found is not None
    assert float((found["w"].weight.dequantize() / w).median()) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("options", [GPTQOptions(), None], ids=["gptq", "searched"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_inputs_that_are_always_zero_lose_their_weights_and_are_reported(symmetric, options):
    """Zero is certain to be a value of symmetric groups only."""
    x, w = _inputs(300, 64), _weight(8, 64)
    x[:, [3, 40]] = 0
    moments = Moments(members=["w"])
    moments.add(x)
    config = Int4WeightOnlyConfig(32, symmetric=symmetric)
    found = quantize_together({"w": w}, moments, target_of(config, torch.float32), options)
    assert found is not None
    assert found["w"].note == "2 of 64 inputs are always 0: their weights were taken for 0"
    stored = found["w"].weight.dequantize()
    if symmetric:
        assert bool((stored[:, [3, 40]] == 0).all())
    # Nothing is multiplied by them, so the error is that of the others.
    y, wanted = x.double() @ stored.double().t(), x.double() @ w.double().t()
    assert found["w"].error == pytest.approx(float((y - wanted).square().sum() / wanted.square().sum()), rel=1e-3)


def test_columns_with_the_largest_inputs_come_first_where_that_is_asked_for():
    """Where they are first already, nothing changes; where they are last, codes do."""
    x = _inputs(400, 64)
    rising = x[:, x.square().sum(0).argsort()]
    codes = {}
    for case, inputs in (("rising", rising), ("falling", rising.flip(1))):
        moments = Moments(members=["w"])
        moments.add(inputs)
        for ordered in (True, False):
            options = GPTQOptions(activation_order=ordered, sweeps=0)
            found = quantize_together(
                {"w": _weight(16, 64)}, moments, target_of(Int4WeightOnlyConfig(32), torch.float32), options
            )
            assert found is not None
            codes[case, ordered] = found["w"].weight.to_tensors()["qdata"]
    assert torch.equal(codes["falling", True], codes["falling", False])
    assert not torch.equal(codes["rising", True], codes["rising", False])


def test_drift_is_of_all_tokens_or_there_is_none():
    """Of part of the tokens it would be taken for that of all."""
    x, x_float = _inputs(20, 16), _inputs(20, 16, seed=1)
    whole = Moments()
    for part, part_float in zip(x.split(10), x_float.split(10), strict=True):
        whole.add(part, part_float)
    expected = (x_float - x).double().t() @ x.double()
    torch.testing.assert_close(whole.drift, expected.float(), rtol=1e-5, atol=1e-3)
    for case in ([x_float, None], [None, x_float], [None, x_float, x_float], [x_float, None, x_float], [x_float[:3]]):
        moments = Moments()
        for each in case:
            moments.add(x, each)
        assert moments.drift is None
        assert moments.tokens == 20 * len(case)


def test_moments_add_up_and_name_what_is_not_finite():
    x = _inputs(60, 16)
    moments = Moments(members=["up", "gate"])
    for part in x.view(3, 4, 5, 16):
        moments.add(part)
    assert moments.tokens == 60
    torch.testing.assert_close(moments.hessian, (x.double().t() @ x.double()).float(), rtol=1e-5, atol=1e-4)
    moments.add(torch.full((1, 16), float("nan")))
    with pytest.raises(NonFiniteError, match="up, gate"):
        moments.check_finite()

"""Cost models: positive, finite, never falling with the work, and free of any device."""

import itertools
import math

import pytest
import torch
from lq_formats import QuantSpec
from lq_kernels import Arch, Problem, cost
from lq_kernels.catalog import KERNELS
from lq_kernels.tuned import lookup

ARCHITECTURES = {
    "cpu": Arch("cpu"),
    "h200": Arch("cuda", (9, 0), "NVIDIA H200", 132),
    "h100": Arch("cuda", (9, 0), "NVIDIA H100 80GB HBM3", 132),
    "l4": Arch("cuda", (8, 9), "NVIDIA L4", 58),
    "sm75": Arch("cuda", (7, 5), "Tesla T4", 40),
    "rocm": Arch("rocm", (0, 0), "AMD Instinct MI300X", 304),
    "nameless": Arch("cuda", (9, 0), "", 0),
}
TOKENS = (1, 2, 16, 17, 65, 256, 8192)
SIZES = ((1, 32), (33, 96), (4096, 4096), (11008, 4096), (4096, 14336), (128256, 16384))


@pytest.fixture(autouse=True)
def _models_alone(monkeypatch):
    monkeypatch.setattr(lookup, "_loaded", lambda device, sm_count: ())
    lookup.forget()
    yield
    lookup.forget()


def specs(op):
    if op == "int8":
        return [QuantSpec(8, "row"), QuantSpec(8, "tensor")]
    if op == "q4_0_q8_1":
        return [QuantSpec(4, "group", 32, True, torch.float16)]
    return [QuantSpec(4, "group", 32, symmetric, torch.bfloat16) for symmetric in (True, False)] + [QuantSpec(4, "row")]


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.op}-{kernel.name}")
def test_predictions_are_positive_and_finite(kernel, arch):
    for spec in specs(kernel.op):
        for (n, k), dtype in zip(SIZES, 2 * (torch.bfloat16, torch.float16, torch.float32), strict=True):
            for m in TOKENS:
                predicted = kernel.predict_us(Problem(kernel.op, m, n, k, spec, dtype, arch))
                assert isinstance(predicted, float)
                assert math.isfinite(predicted)
                assert predicted > 0


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.op}-{kernel.name}")
def test_twice_the_out_features_are_never_cheaper(kernel, arch):
    (spec, *_) = specs(kernel.op)
    for m in TOKENS:
        times = [
            kernel.predict_us(Problem(kernel.op, m, n, 4096, spec, torch.bfloat16, arch))
            for n in (256, 512, 4096, 8192)
        ]
        # Another cut may be predicted to be a little faster than the only one that a small weight has.
        assert all(twice > 0.9 * once for once, twice in itertools.pairwise(times))


@pytest.mark.parametrize("op", ["int4", "int8", "q4_0_q8_1"])
@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_the_float64_reference_is_never_the_cheapest(op, arch):
    (spec, *_) = specs(op)
    by_name = {kernel.name: kernel for kernel in KERNELS if kernel.op == op}
    for m in TOKENS:
        for n, k in SIZES:
            problem = Problem(op, m, n, k, spec, torch.bfloat16, arch)
            assert by_name["dequant-blas"].why_not(problem) is None
            assert by_name["dequant-blas"].predict_us(problem) < by_name["reference"].predict_us(problem)


def test_weight_bytes_count_codes_scales_and_zeros():
    arch = ARCHITECTURES["h200"]

    def count(op, spec):
        return cost.weight_bytes(Problem(op, 1, 64, 256, spec, torch.bfloat16, arch))

    codes = 64 * 256 / 2
    assert count("int4", QuantSpec(4, "group", 32, True, torch.bfloat16)) == codes + 64 * 8 * 2
    assert count("int4", QuantSpec(4, "group", 32, False, torch.bfloat16)) == codes + 64 * 8 * 3
    assert count("int4", QuantSpec(4, "row", None, True, torch.float32)) == codes + 64 * 4
    assert count("int8", QuantSpec(8, "row", None, True, torch.float32)) == 2 * codes + 64 * 4
    assert count("q4_0_q8_1", QuantSpec(4, "group", 32, True, torch.float16)) == 64 * 8 * 18

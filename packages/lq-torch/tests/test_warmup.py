"""warmup: every kind of quantized layer, each distinct product once, in the dtype that the layer takes."""

import copy

import pytest
import torch
from lq_formats import DTypeError, SpecError
from lq_torch import (
    Int4PackedLinear,
    Int4WeightOnlyConfig,
    Int8Linear,
    QuantizedLinear,
    quantize_,
    replace_linear_with_int4,
    warmup,
)
from torch import nn


@pytest.fixture
def calls(monkeypatch):
    """(name, tokens, in features, dtype) of each product that a module runs."""
    seen = []
    for cls in (Int8Linear, Int4PackedLinear):

        def forward(self, x, cls=cls, original=cls.forward):
            assert not torch.is_grad_enabled()
            seen.append((cls.__name__, *x.shape, x.dtype))
            return original(self, x)

        monkeypatch.setattr(cls, "forward", forward)
    return seen


def test_modules_are_run_once_for_each_shape(calls):
    model = nn.Sequential(
        QuantizedLinear.from_linear(nn.Linear(64, 32)),
        Int8Linear(64, 32),
        Int8Linear(64, 48),
        Int4PackedLinear(64, 32, group_size=32),
        Int4PackedLinear(64, 32, group_size=64),
        nn.Linear(64, 32),
    )
    seen = []
    assert warmup(model, [8, 1], lambda *progress: seen.append(progress)) == 8
    expected = [("Int8Linear", 64)] * 4 + [("Int4PackedLinear", 64)] * 4
    assert [(name, k) for name, _, k, _ in calls] == expected
    assert [m for _, m, _, _ in calls] == [1, 8] * 4
    assert [what for _, _, what in seen][::2] == ["0 x 1", "2 x 1", "3 x 1", "4 x 1"]


def test_tensors_and_modules_of_one_model_are_both_run(calls):
    model = nn.Sequential(nn.Linear(64, 64), QuantizedLinear.from_linear(nn.Linear(64, 32)))
    quantize_(model, Int4WeightOnlyConfig(32), lambda module, path: path == "0")
    assert warmup(model, [1, 2]) == 4
    assert len(calls) == 2
    layer = replace_linear_with_int4(nn.Linear(64, 32), 64)
    seen = []
    assert warmup(layer, [3], lambda *progress: seen.append(progress)) == 1
    assert seen == [(0, 1, "Int4PackedLinear x 3")]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_activations_have_the_dtype_of_the_bias_or_of_the_model(calls, bias):
    model = nn.Sequential(nn.Embedding(4, 64), QuantizedLinear.from_linear(nn.Linear(64, 32, bias=bias))).bfloat16()
    warmup(model, [1])
    assert calls.pop()[-1] == torch.bfloat16
    warmup(copy.deepcopy(model), [1], dtype=torch.float16)
    assert calls.pop()[-1] == (torch.bfloat16 if bias else torch.float16)
    warmup(Int8Linear(64, 32, bias=False), [1])
    assert calls.pop()[-1] == torch.get_default_dtype()


def test_what_is_no_size_or_dtype_is_named():
    for sizes in ([0], [-1], [1.0], [True], ["1"]):
        with pytest.raises(SpecError, match="batch_sizes"):
            warmup(nn.Linear(8, 8), sizes)
    with pytest.raises(DTypeError, match="float64"):
        warmup(nn.Linear(8, 8), [1], dtype=torch.float64)
    assert warmup(nn.Linear(8, 8), [1]) == 0

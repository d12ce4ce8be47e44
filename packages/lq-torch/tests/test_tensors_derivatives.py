"""Derivatives of layers with quantized weights beyond backward: forward mode, and the transforms of torch.func."""

import pytest
import torch
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4DynamicActivationConfig,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torch import nn
from torch.autograd import forward_ad

CONFIGS = {
    "int4": Int4WeightOnlyConfig(32),
    "int4-gemlite": Int4WeightOnlyConfig(32, int4_packing_format="gemlite"),
    "int8-preshuffled": Int8WeightOnlyConfig(int8_packing_format="preshuffled"),
    "int4-dynamic": Int4DynamicActivationConfig("int8", 32),
    "intx": IntxWeightOnlyConfig(3, 32, symmetric=False),
    "q4_0": GGMLWeightOnlyConfig("q4_0"),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_layers_have_derivatives_in_every_mode(config):
    layer, x, tangent = nn.Linear(64, 16), torch.randn(3, 64), torch.randn(3, 64)
    quantize_(layer, config)
    w = layer.weight.dequantize(torch.float64)
    expected = tangent.double() @ w.t()
    value = layer(x)
    found, of_layer = torch.func.jvp(layer, (x,), (tangent,))
    assert torch.equal(found, value)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        by_hand = forward_ad.unpack_dual(layer(dual)).tangent
        transposed = forward_ad.unpack_dual(torch.addmm(layer.bias, dual, layer.weight.t())).tangent
    for each in (of_layer, by_hand):
        assert (each.double() - expected).abs().max() < 1e-5 * expected.abs().max()
    # An operator of torch's, whose rule multiplies the tangent as it does x: rounded to 8 bits, where x is.
    assert (transposed.double() - expected).abs().max() < 0.05 * expected.abs().max()
    gradient = torch.func.grad(lambda x: layer(x).sum())(x)
    assert (gradient.double() - w.sum(0)).abs().max() < 1e-5 * w.sum(0).abs().max()
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        assert (jacobian(layer)(x[0]).double() - w).abs().max() < 1e-5 * w.abs().max()

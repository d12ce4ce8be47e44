"""Layers in lq's batch-invariant mode: rows that do not depend on the batch, or a refusal; never silently other bits."""

import pytest
import torch
from lq_formats import NoKernelError
from lq_kernels import batch_invariant
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4DynamicActivationConfig,
    Int4PackedLinear,
    Int4WeightOnlyConfig,
    Int8DynamicActivationConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    QuantizedLinear,
    quantize_,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIGS = {
    "int4-g128": Int4WeightOnlyConfig(group_size=128),
    "int4-g32-asym": Int4WeightOnlyConfig(group_size=32, symmetric=False),
    "int4-preshuffled": Int4WeightOnlyConfig(group_size=128, int4_packing_format="preshuffled"),
    "int8": Int8WeightOnlyConfig(),
    "int8-preshuffled": Int8WeightOnlyConfig(int8_packing_format="preshuffled"),
    "q4_0": GGMLWeightOnlyConfig("q4_0"),
    "int4-fp8": Int4DynamicActivationConfig(activation="fp8"),
    "int8-int8": Int8DynamicActivationConfig(),
}
REFUSED = {
    "int3": IntxWeightOnlyConfig(bits=3),
    "int4-tile": Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"),
    "int4-gemlite": Int4WeightOnlyConfig(group_size=128),
    "q4_k-blocks": GGMLWeightOnlyConfig("q4_k"),
}
LAYERS = {"QuantizedLinear": QuantizedLinear.from_linear, "Int4PackedLinear": Int4PackedLinear.from_linear}


def check(model, x):
    with batch_invariant(), torch.no_grad():
        alone = torch.cat([model(token) for token in x.split(1)])
        for m in (2, 3, 16, 17, 33, len(x)):
            assert torch.equal(model(x[:m]), alone[:m]), f"M={m}"
        assert torch.equal(model(x.view(2, -1, x.shape[-1])).view_as(alone), alone)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_rows_of_quantized_models(config, dtype, device):
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 48, bias=False)).to(device, dtype)
    quantize_(model, config)
    check(model, torch.randn(64, 512, device=device).to(dtype))


@pytest.mark.parametrize(
    ("ggml_type", "dtype"),
    [("q4_0", torch.float32), *((name, torch.bfloat16) for name in ("q4_0", "q4_1", "q4_k", "q8_0"))],
)
def test_rows_of_ggml_as_hopper_holds_it(ggml_type, dtype, monkeypatch):
    monkeypatch.setattr("lq_torch.tensors.ggml.reads_fragments", lambda device: True)
    model = nn.Sequential(nn.Linear(512, 48)).to(dtype)
    quantize_(model, GGMLWeightOnlyConfig(ggml_type))
    assert model[0].weight.fragments() is not None
    check(model, torch.randn(64, 512, dtype=dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_rows_of_layers(make, device):
    layer = make(nn.Linear(512, 48).to(torch.bfloat16)).to(device)
    check(layer, torch.randn(64, 512, device=device, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", REFUSED)
def test_products_of_other_libraries_are_refused(kind):
    if kind == "int4-gemlite":
        from lq_torch import Int4GemliteTensor

        weight = Int4GemliteTensor.from_hp(torch.randn(64, 256), 128)
    else:
        weight = REFUSED[kind].quantize(torch.randn(64, 256, dtype=torch.bfloat16))
    x = torch.randn(2, 256, dtype=weight.dtype)
    nn.functional.linear(x, weight)
    with batch_invariant(), pytest.raises(NoKernelError, match=r"batch-invariant.*\n.*depend on the number of tokens"):
        nn.functional.linear(x, weight)


def test_a_compiled_layer_follows_the_mode():
    layer = nn.Linear(2048, 48, bias=False)
    quantize_(layer, Int8WeightOnlyConfig())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(64, 2048)
    with torch.no_grad():
        usual = compiled(x)
        with batch_invariant():
            alone = torch.cat([layer(token) for token in x.split(1)])
            assert torch.equal(compiled(x), alone)
        assert torch.equal(compiled(x), usual)
    assert counter.frame_count == 2, "a CUDA graph of the one would be replayed for the other"
    assert not torch.equal(usual, alone), "the two modes have the same bits here, so this shows nothing"

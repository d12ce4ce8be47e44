"""Weights for activations of 8 bits: quantize_, the saved bits, tensor protocols, and a trained model's loss."""

import copy

import pytest
import torch
from lq_formats import FormatError, GroupSizeError, NonFiniteError, SpecError, UnsupportedError
from lq_kernels import quantize_tokens
from lq_torch import (
    Int4DynamicActivationConfig,
    Int4DynamicTensor,
    Int4Tensor,
    Int8DynamicActivationConfig,
    Int8DynamicTensor,
    Int8Tensor,
    WeightConfig,
    load,
    quantize_,
    save_pretrained,
)
from lq_torch.merge.rows import cat_rows, slice_rows
from lq_torch.tensors import LowBitTensor
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIGS = {
    "w4a8-fp8": Int4DynamicActivationConfig(),
    "w4a8-int8-row": Int4DynamicActivationConfig("int8", -1, torch.float32),
    "w4a8-fp8-g64": Int4DynamicActivationConfig("fp8", 64),
    "w8a8-int8": Int8DynamicActivationConfig(),
    "w8a8-fp8": Int8DynamicActivationConfig("fp8"),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def dense(n=48, k=256, dtype=torch.bfloat16, device="cpu"):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(dtype).to(device)


def relative(y, exact):
    return float(((y.double() - exact).norm() / exact.norm()).detach())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_that_of_the_dequantized_operands(config, dtype, device):
    layer = nn.Linear(256, 48, dtype=dtype, device=device)
    with torch.no_grad():
        layer.weight.copy_(dense(dtype=dtype))
    quantize_(layer, config, lambda module, path: True)
    w = layer.weight.dequantize(torch.float64)
    for m in (1, 5, 300):
        x = dense(m, 256, dtype, device)
        codes, scale = quantize_tokens(x, config.activation)
        exact = codes.double() * scale.double()[:, None] @ w.t() + layer.bias.double()
        assert relative(layer(x), exact) < (8e-3 if dtype == torch.bfloat16 else 4e-3)
        unquantized = x.double() @ w.t() + layer.bias.double()
        assert relative(layer(x), unquantized) < (0.015 if config.activation == "int8" else 0.05)


def test_weights_are_the_nearest():
    w = dense()
    assert torch.equal(Int8DynamicTensor.from_hp(w).qdata, Int8Tensor.from_hp(w).qdata)
    assert torch.equal(Int8DynamicTensor.from_hp(w).dequantize(), Int8Tensor.from_hp(w).dequantize())
    fp8 = Int8DynamicTensor.from_hp(w, "fp8")
    assert fp8.qdata.dtype == torch.float8_e4m3fn
    # Three bits after the first.
    assert bool(((fp8.dequantize(torch.float32) - w).abs() <= w.abs() / 16 * 1.001 + fp8.scale[:, None] * 2**-10).all())
    plain = Int4Tensor.from_hp(w)
    for activation in ("int8", "fp8"):
        four = Int4DynamicTensor.from_hp(w, activation=activation)
        assert four.packed_nbytes == plain.packed_nbytes
        assert torch.equal(four.dequantize(), plain.dequantize())
        assert all(torch.equal(four.to_tensors()[name], tensor) for name, tensor in plain.to_tensors().items())


def test_saved_bits_come_back(config, tmp_path):
    model = nn.Sequential(nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 256)).bfloat16()
    fresh = copy.deepcopy(model)
    quantize_(model, config, lambda module, path: path == "0")
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path, fresh)
    weight, back = model[0].weight.data, loaded[0].weight.data
    assert type(back) is type(weight)
    assert back.attributes() == weight.attributes()
    for name, tensor in weight.inner_tensors().items():
        assert torch.equal(getattr(back, name).view(torch.uint8), tensor.view(torch.uint8)), name
    x = dense(3)
    assert torch.equal(loaded(x), model(x))


def test_whether_the_lowest_code_occurs_is_looked_up():
    plain = Int4Tensor.from_hp(dense())
    plain.qdata[0, 0] = 0  # eight codes of -8
    weight = Int4DynamicTensor.from_plain(plain, "fp8")
    assert weight.lowest
    assert not Int4DynamicTensor.from_hp(dense()).lowest
    tensors, spec = weight.to_tensors(), weight.spec_json()
    spec["attributes"]["lowest"] = False
    back = LowBitTensor.from_tensors(tensors, spec)
    assert back.lowest
    assert torch.equal(back.dequantize(), plain.dequantize())


def test_files_that_do_not_fit_are_refused():
    weight = Int4DynamicTensor.from_hp(dense())
    tensors, spec = weight.to_tensors(), weight.spec_json()
    for name, value in (("activation", "int4"), ("activation", 8), ("lowest", 1), ("group_size", 100)):
        wrong = {**spec, "attributes": {**spec["attributes"], name: value}}
        with pytest.raises(FormatError, match=name):
            LowBitTensor.from_tensors(tensors, wrong)
    with pytest.raises(FormatError, match="tensors"):
        LowBitTensor.from_tensors({**tensors, "zero": tensors["scale"]}, spec)
    weight = Int8DynamicTensor.from_hp(dense(), "fp8")
    tensors, spec = weight.to_tensors(), weight.spec_json()
    with pytest.raises(FormatError, match="qdata"):
        LowBitTensor.from_tensors(tensors, {**spec, "attributes": {"activation": "int8"}})
    with pytest.raises(FormatError, match="scale"):
        LowBitTensor.from_tensors({**tensors, "scale": tensors["scale"][:1]}, spec)


def test_tensor_protocols(config):
    weight = config.quantize(dense(dtype=torch.float32))
    x = dense(2, dtype=torch.float32)
    expected = nn.functional.linear(x, weight)
    for other in (weight.detach(), weight.clone(), copy.deepcopy(weight), weight.to("cpu")):
        assert torch.equal(nn.functional.linear(x, other), expected)
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    compiled = torch.compile(lambda x: nn.functional.linear(x, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    x.requires_grad_()
    nn.functional.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(2, -1))


@pytest.mark.parametrize("activation", ["int8", "fp8"])
def test_8_bit_weights_merge_row_by_row(activation):
    parts = [Int8DynamicTensor.from_hp(dense(n), activation) for n in (48, 16)]
    merged = cat_rows(parts)
    x = dense(3)
    assert torch.equal(merged.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert torch.equal(slice_rows(merged, 48, 64).dequantize(), parts[1].dequantize())
    separate = torch.cat([nn.functional.linear(x, part) for part in parts], dim=-1)
    torch.testing.assert_close(nn.functional.linear(x, merged), separate, rtol=1e-2, atol=1e-1)


def test_configurations(config):
    assert WeightConfig.from_json(config.to_json()) == config
    with pytest.raises(SpecError, match="activation"):
        type(config)("bf16")


def test_errors():
    with pytest.raises(NonFiniteError):
        Int8DynamicTensor.from_hp(torch.tensor([[1.0, torch.nan]]), "fp8")
    with pytest.raises(SpecError, match="activation"):
        Int8DynamicTensor.from_hp(dense(), "int4")
    with pytest.raises(UnsupportedError, match="zero points"):
        Int4DynamicTensor.from_plain(Int4Tensor.from_hp(dense(), symmetric=False))
    model = nn.Sequential(nn.Linear(100, 48))
    with pytest.raises(GroupSizeError):
        quantize_(model, Int4DynamicActivationConfig())
    assert type(model[0].weight.data) is torch.Tensor


@pytest.mark.gpu
def test_a_weight_quantized_on_a_gpu_has_the_bits_of_the_cpu(config):
    here, there = config.quantize(dense()), config.quantize(dense(device="cuda"))
    assert here.attributes() == there.attributes()
    for name, tensor in here.inner_tensors().items():
        assert torch.equal(getattr(there, name).cpu().view(torch.uint8), tensor.view(torch.uint8)), name

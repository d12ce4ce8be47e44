"""The plain modules: buffers, strict state dicts through safetensors, and errors."""

import pytest
import torch
from lq_formats import DeviceError, DTypeError, GroupSizeError, NonFiniteError, ShapeError
from lq_torch import Int4PackedLinear, Int8Linear, QuantizedLinear, replace_linear_with_int4
from safetensors.torch import load_file, save_file
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def relative_error(y, reference):
    y, reference = y.detach().double(), reference.detach().double()
    return float((y - reference).norm() / reference.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("make", [QuantizedLinear.from_linear, Int4PackedLinear.from_linear], ids=["int8", "int4"])
def test_from_linear_computes_with_the_dequantized_weight(make, bias, device):
    linear = nn.Linear(512, 72, bias=bias, device=device, dtype=torch.bfloat16)
    layer = make(linear)
    x = torch.randn(2, 3, 512, device=device).bfloat16()
    expected = x.double() @ layer.dequantize(torch.float64).t()
    if bias:
        expected += linear.bias.double()
    assert relative_error(layer(x), expected) < 8e-3
    assert relative_error(layer.dequantize(), linear.weight) < (0.02 if make == QuantizedLinear.from_linear else 0.2)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_new_module_loads_a_state_dict_strictly(kind, tmp_path):
    linear = nn.Linear(256, 40)
    layer = QuantizedLinear.from_linear(linear) if kind == "int8" else Int4PackedLinear.from_linear(linear, 64)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = Int8Linear(256, 40) if kind == "int8" else Int4PackedLinear(256, 40, group_size=64)
    assert torch.equal(fresh(torch.randn(2, 256)), torch.zeros(2, 40))
    assert set(fresh.state_dict()) == set(layer.state_dict())
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
    x = torch.randn(3, 256)
    assert torch.equal(fresh(x), layer(x))


def test_quantize_weights_fills_a_layer_and_checks_its_shape():
    layer = Int8Linear(64, 16, bias=False)
    w = torch.randn(16, 64)
    assert layer.quantize_weights(w) is layer
    assert relative_error(layer.dequantize(), w) < 0.02
    with pytest.raises(ShapeError, match=r"expected \(16, 64\)"):
        layer.quantize_weights(w.t())
    with pytest.raises(DTypeError):
        layer.quantize_weights(w.int())
    with pytest.raises(NonFiniteError):
        layer.quantize_weights(w * float("nan"))
    assert relative_error(layer.dequantize(), w) < 0.02


def test_conversion_keeps_the_scales_in_float32():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 16)).half()
    assert layer.scale.dtype == torch.float32
    assert layer.bias.dtype == torch.float16
    packed = Int4PackedLinear.from_linear(nn.Linear(64, 16), 32).bfloat16()
    assert packed.scales.dtype == torch.float32
    assert packed(torch.randn(1, 64).bfloat16()).dtype == torch.bfloat16


def test_replace_linear_with_int4_replaces_all_or_nothing():
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Sequential(nn.Linear(256, 8)))
    x = torch.randn(4, 512)
    before = model(x)
    assert replace_linear_with_int4(model) is model
    assert isinstance(model[0], Int4PackedLinear)
    assert isinstance(model[2][0], Int4PackedLinear)
    assert relative_error(model(x), before) < 0.3
    odd = nn.Sequential(nn.Linear(512, 100), nn.Linear(100, 8))
    with pytest.raises(GroupSizeError, match=r"1\.weight"):
        replace_linear_with_int4(odd)
    assert type(odd[0]) is nn.Linear
    assert isinstance(replace_linear_with_int4(nn.Linear(256, 8)), Int4PackedLinear)


def test_sizes_are_checked():
    with pytest.raises(ShapeError):
        Int8Linear(0, 4)
    with pytest.raises(ShapeError, match="8 codes"):
        Int4PackedLinear(20, 4)
    with pytest.raises(GroupSizeError):
        Int4PackedLinear(64, 4, group_size=48)
    assert "group_size=64" in repr(Int4PackedLinear(64, 4, group_size=-1))
    for sizes in (("a", 3), (8.0, 3), (8, None), (True, 3)):
        for layer in (Int8Linear, Int4PackedLinear):
            with pytest.raises(ShapeError, match="expected positive integers"):
                layer(*sizes)


@pytest.mark.parametrize("make", [QuantizedLinear.from_linear, Int4PackedLinear.from_linear], ids=["int8", "int4"])
def test_a_layer_on_meta_has_nothing_to_quantize(make):
    with pytest.raises(DeviceError, match="weight is on meta"):
        make(nn.Linear(256, 8, device="meta"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("make", [QuantizedLinear.from_linear, Int4PackedLinear.from_linear], ids=["int8", "int4"])
def test_autocast_casts_x_and_bias_as_for_a_dense_layer(make, bias, device):
    dense = nn.Linear(256, 8, bias=bias, device=device)
    layer = make(dense)
    for x in (torch.randn(3, 256, device=device), torch.randn(3, 256, device=device).bfloat16()):
        expected = nn.functional.linear(
            x.double(), layer.dequantize(torch.float64), dense.bias.double() if bias else None
        )
        with torch.autocast(device, dtype=torch.bfloat16):
            y = layer(x)
            assert y.dtype == dense(x).dtype == torch.bfloat16
        assert relative_error(y, expected) < 1e-2

"""The plain modules: buffers, strict state dicts through safetensors, and errors."""

import pytest
import torch
from lq_formats import DeviceError, DTypeError, GroupSizeError, NonFiniteError, ShapeError, SpecError, UnsupportedError
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
    with pytest.raises(DeviceError, match="weight is on the meta device"):
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


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def hooked(layer):
    layer.register_forward_hook(lambda module, arguments, result: result + 100)
    return layer


def patched(layer):
    layer.forward = lambda x: x
    return layer


def buffered(layer):
    layer.register_buffer("shift", torch.ones(1))
    return layer


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Scaled(64, 64), r"1 is a .*Scaled, not an nn\.Linear"),
        (hooked(nn.Linear(64, 64)), "1 has hooks"),
        (patched(nn.Linear(64, 64)), "1 has a forward that was replaced"),
        (buffered(nn.Linear(64, 64)), "1 holds more than a weight and a bias"),
        (nn.MultiheadAttention(64, 4), r"1\.out_proj is a .*NonDynamicallyQuantizableLinear"),
    ],
    ids=["subclass", "hooks", "forward", "buffer", "attention"],
)
def test_replace_linear_with_int4_refuses_what_would_be_lost(layer, why):
    model = nn.Sequential(nn.Linear(64, 64), layer)
    before = dict(model.named_modules())
    with pytest.raises(UnsupportedError, match=rf"{why}.*quantize_ keeps the layer"):
        replace_linear_with_int4(model, 32)
    assert dict(model.named_modules()) == before
    assert type(replace_linear_with_int4(model, 32, lambda module, path: path == "0")[0]) is Int4PackedLinear


@pytest.mark.parametrize("cls", [QuantizedLinear, Int4PackedLinear], ids=lambda cls: cls.__name__)
def test_from_linear_takes_linears_with_a_weight_of_activations_dtypes(cls):
    with pytest.raises(DTypeError, match=r"weight has dtype torch\.float64"):
        cls.from_linear(nn.Linear(256, 8).double())
    with pytest.raises(ShapeError, match="weight has no shape yet"):
        cls.from_linear(nn.LazyLinear(8))
    with pytest.raises(UnsupportedError, match="weight is computed"):
        cls.from_linear(torch.nn.utils.parametrizations.weight_norm(nn.Linear(256, 8)))
    for other in (None, nn.Embedding(4, 256)):
        with pytest.raises(SpecError, match=f"linear is of type {type(other).__name__}: expected an nn.Linear"):
            cls.from_linear(other)

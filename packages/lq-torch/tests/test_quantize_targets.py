"""Which layers are quantized, which cannot be, and that one that cannot leaves all others as they were."""

import io
import itertools
import warnings

import pytest
import torch
from lq_formats import (
    DeviceError,
    DTypeError,
    GroupSizeError,
    NonFiniteError,
    ShapeError,
    SpecError,
    UnsupportedError,
)
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4PackedLinear,
    Int4WeightOnlyConfig,
    Int8Linear,
    Int8WeightOnlyConfig,
    LowBitTensor,
    QuantizedLinear,
    WeightConfig,
    dequantize_,
    quantize,
    quantize_,
    replace_linear_with_int4,
)
from torch import nn


def layers(*sizes, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]).to(dtype)


def quantized(model):
    return [path for path, parameter in model.named_parameters() if isinstance(parameter, LowBitTensor)]


SPOILED = {
    "parametrized": (
        lambda m: nn.utils.parametrizations.weight_norm(m[1]),
        UnsupportedError,
        r"1\.weight is computed from other parameters",
    ),
    "lazy": (lambda m: m.append(nn.LazyLinear(8)), ShapeError, r"2\.weight has no shape yet"),
    "meta": (lambda m: m[1].to("meta"), DeviceError, r"1\.weight is on the meta device"),
    "int": (
        lambda m: setattr(m[1], "weight", nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)),
        DTypeError,
        r"1\.weight has dtype torch\.int8",
    ),
    "rank": (lambda m: setattr(m[1], "weight", nn.Parameter(torch.ones(4, 4, 4))), ShapeError, r"1\.weight has shape"),
    "nan": (lambda m: m[1].weight.data[5, 3].fill_(float("nan")), NonFiniteError, r"1\.weight.*\(5, 3\)"),
}


@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize(
    "change",
    [lambda m: quantize_(m, Int8WeightOnlyConfig()), lambda m: replace_linear_with_int4(m, 32)],
    ids=["quantize_", "replace_linear_with_int4"],
)
def test_a_layer_that_cannot_be_quantized_is_named_and_nothing_is_changed(name, change):
    spoil, error, message = SPOILED[name]
    model = layers(64, 64, 64)
    spoil(model)
    before = list(model)
    with pytest.raises(error, match=message):
        change(model)
    assert quantized(model) == []
    assert list(model) == before


@pytest.mark.parametrize(
    ("config", "value"),
    [
        (GGMLWeightOnlyConfig("q4_0"), 1e30),
        (GGMLWeightOnlyConfig("q5_1"), 1e6),
        (GGMLWeightOnlyConfig("q8_0"), 1e8),
        (Int4WeightOnlyConfig(32, scale_dtype=torch.float16), 1e8),
        (Int4WeightOnlyConfig(32, symmetric=False, scale_dtype=torch.float16), 1e8),
    ],
    ids=["q4_0", "q5_1", "q8_0", "int4-sym", "int4-asym"],
)
def test_a_scale_beyond_its_dtype_is_found_before_the_first_layer_changes(config, value):
    model = layers(64, 64, 64)
    model[1].weight.data.fill_(value)
    with pytest.raises(NonFiniteError, match=r"^1: "):
        quantize_(model, config)
    assert quantized(model) == []


@pytest.mark.parametrize("value", [6e4, 1e-7, 0.0], ids=["largest", "tiny", "zero"])
def test_extreme_fp16_weights_stay_finite(value):
    for config in (Int4WeightOnlyConfig(32), Int8WeightOnlyConfig(), GGMLWeightOnlyConfig("q8_0")):
        model = layers(64, 64, dtype=torch.float16)
        model[0].weight.data.fill_(value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fp16 scales that keep little of 1e-7
            quantize_(model, config)
        dense = model[0].weight.dequantize(torch.float32)
        assert torch.isfinite(dense).all()
        assert (dense - value).abs().max() <= max(0.01 * value, 2e-7)


def test_warnings_say_why_nothing_was_quantized():
    with pytest.warns(UserWarning, match="ReLU has no nn.Linear"):
        quantize_(nn.ReLU(), Int8WeightOnlyConfig())
    model = layers(64, 64, 64)
    with pytest.warns(UserWarning, match=r"filter_fn took none of 2, among them '0', '1'"):
        quantize_(model, Int8WeightOnlyConfig(), lambda module, path: path == "attention")
    with pytest.warns(UserWarning, match="filter_fn took none"):
        assert replace_linear_with_int4(model, 32, lambda module, path: False) is model
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.warns(UserWarning, match="all 2 are quantized already"):
        quantize_(model, Int8WeightOnlyConfig())
    with_head = nn.ModuleDict({"body": nn.Linear(64, 64), "lm_head": nn.Linear(64, 64)})
    quantize_(with_head, Int8WeightOnlyConfig())
    with pytest.warns(
        UserWarning, match=r"1 are quantized already, and output heads and .* left as they are, here 'lm_head'"
    ):
        quantize_(with_head, Int8WeightOnlyConfig())


def test_dequantize_says_what_it_leaves():
    with pytest.warns(UserWarning, match="dequantize_ found no quantized weight in Linear"):
        dequantize_(nn.Linear(3, 3))
    model = replace_linear_with_int4(layers(64, 64, 64), 32)
    with pytest.warns(UserWarning, match=r"dequantize_ left 2 modules that hold packed weights.*'0', '1'.*nn\.Linear"):
        dequantize_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = layers(64, 64)
        quantize_(plain, Int8WeightOnlyConfig())
        dequantize_(plain)
    assert type(plain[0].weight.data) is torch.Tensor


class Experts(nn.Module):
    """As many models hold their experts: stacked, without an nn.Linear."""

    def __init__(self, count):
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, 64, 32))
        self.down = nn.Parameter(torch.randn(count, 32, 64))
        self.again = self.up


def said(model, filter_fn=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_(model, Int8WeightOnlyConfig(), filter_fn)
    return [(str(warning.message), warning.filename) for warning in caught]


def test_stacked_experts_that_stay_dense_are_named_with_their_share():
    model = nn.ModuleDict({"attn": nn.Linear(64, 64, bias=False), "a": Experts(2), "b": Experts(1)})
    stacked = {name: value.clone() for name, value in model.named_parameters() if "attn" not in name}
    # 3 * 2 * 64 * 32 of the weights are stacked, and 64 * 64 are not.
    message = (
        "quantize_ quantizes nn.Linear layers only: 75% of the weights stay dense, in parameters of 3 or more dimensions such "
        "as 'a.up', 'a.down', 'b.up'"
    )
    assert said(model) == [(message, __file__)]
    assert quantized(model) == ["attn.weight"]
    for name, value in stacked.items():
        assert torch.equal(model.get_parameter(name), value)


@pytest.mark.parametrize(
    "other",
    [
        lambda: Experts(1),
        lambda: nn.ModuleList([nn.Conv1d(64, 64, 9), nn.Bilinear(32, 32, 32)]),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(64, 64, 3)),
        lambda: type("Convolution", (nn.Conv1d,), {})(64, 64, 9),
        lambda: nn.LazyConv2d(64, 3),
        lambda: nn.ParameterList([torch.randn(256, 64)]),
    ],
    ids=["little", "conv", "parametrized", "subclass", "lazy", "matrices"],
)
def test_other_parameters_that_stay_dense_are_not_spoken_of(other):
    model = nn.ModuleDict({"mlp": nn.Linear(256, 64), "other": other()})
    assert said(model) == []
    assert quantized(model) == ["mlp.weight"]


def test_a_list_of_stacked_parameters_is_named():
    model = nn.ModuleDict({"mlp": nn.Linear(64, 64), "experts": nn.ParameterList([torch.randn(4, 64, 64)])})
    ((message, _),) = said(model)
    assert "80% of the weights stay dense" in message
    assert message.endswith("such as 'experts.0'")


def test_a_filter_chose_what_stays_dense():
    model = nn.ModuleDict({"attn": nn.Linear(64, 64), "experts": Experts(8)})
    assert said(model, lambda module, path: True) == []
    assert quantized(model) == ["attn.weight"]


def test_a_second_pass_quantizes_the_rest():
    model = layers(64, 64, 64)
    quantize_(model, Int4WeightOnlyConfig(32), lambda module, path: path == "1")
    first = model[1].weight
    quantize_(model, Int8WeightOnlyConfig())
    assert quantized(model) == ["0.weight", "1.weight"]
    assert model[1].weight is first
    dequantize_(model)
    assert quantized(model) == []


def test_a_linear_itself_and_its_bias():
    layer = nn.Linear(64, 64)
    bias = layer.bias
    quantize_(layer, Int4WeightOnlyConfig(32))
    assert isinstance(layer.weight, LowBitTensor)
    assert layer.bias is bias
    assert not layer.weight.requires_grad
    with pytest.raises(GroupSizeError, match=r"^group_size=48"):
        quantize_(nn.Linear(64, 64), Int4WeightOnlyConfig(48))


def test_the_filter_sees_modules_and_paths():
    model = nn.ModuleDict({"attn": layers(64, 64), "mlp": layers(64, 64, 64)})
    seen = []
    quantize_(
        model, Int8WeightOnlyConfig(), lambda module, path: bool(seen.append((type(module), path))) or "mlp" in path
    )
    assert seen == [(nn.Linear, path) for path in ("attn.0", "mlp.0", "mlp.1")]
    assert quantized(model) == ["mlp.0.weight", "mlp.1.weight"]


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_goes_to_standard_error_and_only_where_it_is_wanted(progress, capsys):
    quantize_(layers(64, 64, 64), Int8WeightOnlyConfig(), progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("2/2" in err) == (progress is True)


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    quantize_(layers(64, 64, 64), Int8WeightOnlyConfig())
    assert "quantizing" in screen.getvalue()


def test_weights_are_freed_layer_by_layer(monkeypatch):
    import weakref

    model = layers(64, 64, 64, 64)
    refs = [weakref.ref(layer.weight) for layer in model]
    alive = []
    real = Int8WeightOnlyConfig.quantize

    def watch(self, w):
        alive.append(sum(ref() is not None for ref in refs))
        return real(self, w)

    monkeypatch.setattr(Int8WeightOnlyConfig, "quantize", watch)
    quantize_(model, Int8WeightOnlyConfig())
    assert alive == [3, 2, 1]


def test_a_module_at_two_places_is_replaced_at_both():
    model = nn.Module()
    model.a = nn.Linear(64, 64)
    model.inner = nn.Sequential(model.a, nn.ReLU())
    replace_linear_with_int4(model, 32)
    assert isinstance(model.a, Int4PackedLinear)
    assert model.inner[0] is model.a


@pytest.mark.parametrize("group_size", [0, 4, -2, 48, 2.0, True])
def test_replacing_checks_the_group_size_before_it_changes_anything(group_size):
    model = layers(64, 64)
    with pytest.raises(GroupSizeError, match=r"^0\.weight: "):
        replace_linear_with_int4(model, group_size)
    assert type(model[0]) is nn.Linear


def test_modules_do_not_take_a_weight_that_is_quantized():
    layer = nn.Linear(64, 64)
    quantize_(layer, Int8WeightOnlyConfig())
    with pytest.raises(UnsupportedError, match="Int8Tensor, quantized already"):
        QuantizedLinear.from_linear(layer)
    with pytest.raises(UnsupportedError, match=r"dequantize\(\)"):
        Int4PackedLinear(64, 64, group_size=32).quantize_weights(layer.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    "make", [Int8Linear, lambda *a, **k: Int4PackedLinear(*a, group_size=32, **k)], ids=["int8", "int4"]
)
def test_modules_are_made_where_and_as_asked(make, dtype):
    layer = make(64, 16, dtype=dtype, device="meta")
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    assert layer.bias.dtype == dtype
    assert [name for name, _ in layer.named_parameters()] == []
    layer = make(64, 16, dtype=dtype).quantize_weights(torch.randn(16, 64))
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert (y.shape, y.dtype) == ((2, 3, 16), dtype)
    y.sum().backward()
    expected = layer.dequantize(torch.float64).sum(0).expand(2, 3, 64)
    assert float((x.grad.double() - expected).norm() / expected.norm()) < 1e-2
    assert layer(torch.empty(0, 64, dtype=dtype)).shape == (0, 16)
    with pytest.raises(DTypeError, match="bias"):
        layer(torch.randn(2, 64, dtype=torch.float16 if dtype != torch.float16 else torch.float32))


def test_modules_compile_into_one_graph():
    for layer in (QuantizedLinear.from_linear(nn.Linear(64, 16)), Int4PackedLinear.from_linear(nn.Linear(64, 16), 32)):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, 64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"name": ["int4_weight_only"]}',
        '{"name": "int4_weight_only", "scale_dtype": ["float16"]}',
        '{"name": "int4_weight_only", "scale_dtype": "int8"}',
        '{"name": "int4_weight_only", "group_size": "128"}',
        '{"name": "int4_weight_only", "int4_packing_format": 4}',
        '{"name": "int8_weight_only", "granularity": "column"}',
        '{"name": "int8_weight_only", "bits": 8}',
        '{"name": "ggml_weight_only", "ggml_type": "q8_1"}',
    ],
)
def test_json_that_is_not_a_configuration_is_refused(text):
    with pytest.raises(SpecError):
        WeightConfig.from_json(text)


def test_select_linears_is_what_quantize_changes():
    model = nn.ModuleDict({"body": layers(64, 64), "lm_head": nn.Linear(64, 64)})
    assert [path for path, _ in quantize.select_linears(model)] == ["body.0"]


@pytest.mark.parametrize("filter_fn", ["attention", ["0"], 0])
def test_what_cannot_be_called_chooses_no_layers(filter_fn):
    model = layers(64, 64)
    with pytest.raises(SpecError, match="expected a function of a module and its path"):
        quantize_(model, Int8WeightOnlyConfig(), filter_fn)
    assert type(model[0].weight) is nn.Parameter

"""quantize_ on small models: every configuration, on the CPU and (marked) on a GPU; bad input changes nothing."""

import copy
import warnings

import pytest
import torch
from lq_formats import (
    DTypeError,
    GroupSizeError,
    NonFiniteError,
    ShapeError,
    SpecError,
    UnsupportedError,
)
from lq_torch import (
    GemliteConfig,
    GGMLTensor,
    GGMLWeightOnlyConfig,
    Int4DynamicActivationConfig,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    LowBitTensor,
    WeightConfig,
    dequantize_,
    load,
    quantize_,
    rotate_,
    save_pretrained,
)
from lq_torch.quantize import select_linears
from torch import nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIGS = {
    "int4-g32": Int4WeightOnlyConfig(group_size=32),
    "int4-g128-asym": Int4WeightOnlyConfig(symmetric=False),
    "int4-row-fp32scale": Int4WeightOnlyConfig(group_size=-1, scale_dtype=torch.float32),
    "int4-tile": Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d", symmetric=False),
    "int8-row": Int8WeightOnlyConfig(),
    "int8-tensor": Int8WeightOnlyConfig("tensor"),
    "q4_0": GGMLWeightOnlyConfig(),
    "q5_1": GGMLWeightOnlyConfig("q5_1"),
    "q8_0": GGMLWeightOnlyConfig("q8_0"),
}


def model(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 72, bias=False))
    return layers.to(device=device, dtype=dtype).requires_grad_(False)


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference.double()).norm() / reference.double().norm())


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


@pytest.mark.parametrize("device", DEVICES)
def test_the_layer_computes_with_its_dequantized_weight(config, device):
    quantized = model(device=device)
    quantize_(quantized, config)
    exact = copy.deepcopy(quantized)
    dequantize_(exact, torch.float32)
    exact = exact.float()
    # Q4_0 rounds activations to 8 bits; everything else is one bf16 rounding.
    bound = 2e-2 if config == GGMLWeightOnlyConfig() else 8e-3
    for shape in ((1, 256), (3, 5, 256), (17, 256)):
        x = torch.randn(shape, device=device).bfloat16()
        assert relative_error(quantized[0](x), exact[0](x.float())) < bound
    assert quantized(torch.empty(0, 256, device=device, dtype=torch.bfloat16)).shape == (0, 72)


@pytest.mark.parametrize("device", DEVICES)
def test_copies_moves_and_state_dicts(config, device):
    quantized = model(device=device)
    quantize_(quantized, config)
    weight = quantized[0].weight
    assert isinstance(weight, LowBitTensor)
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device.type) == ((128, 256), torch.bfloat16, device)
    x = torch.randn(4, 256, device=device).bfloat16()
    y = quantized(x)
    twin = copy.deepcopy(quantized)
    assert torch.equal(twin(x), y)
    assert twin[0].weight.to_tensors().popitem()[1].data_ptr() != weight.to_tensors().popitem()[1].data_ptr()
    twin.load_state_dict(quantized.state_dict())
    assert torch.equal(twin(x), y)
    rebuilt = LowBitTensor.from_tensors(weight.to_tensors(), weight.spec_json())
    assert torch.equal(rebuilt.dequantize(), weight.dequantize())
    assert torch.equal(weight.cpu().dequantize(), weight.dequantize().cpu())
    assert weight.packed_nbytes < 0.6 * 128 * 256 * 2
    if config != CONFIGS["int4-tile"]:
        half = twin.half()
        assert half[0].weight.dtype == torch.float16
        assert half(x.half()).dtype == torch.float16


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_reach_the_input(config, device):
    quantized = model(torch.bfloat16, device)
    quantize_(quantized, config)
    dense = copy.deepcopy(quantized)
    dequantize_(dense)
    x = torch.randn(6, 256, device=device).bfloat16()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    quantized[0](a).sum().backward()
    dense[0](b).sum().backward()
    assert relative_error(a.grad, b.grad) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(config, device):
    quantized = model(device=device)
    quantize_(quantized, config)
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    for tokens in (2, 3, 5):
        x = torch.randn(tokens, 256, device=device).bfloat16()
        with torch.no_grad():
            assert relative_error(compiled(x), quantized(x)) < 1e-2


@pytest.mark.gpu
def test_tile_packing_is_atens_bit_for_bit():
    from lq_torch.tensors.int4_tile_packed import pack_tile_4d

    codes = torch.randint(0, 16, (72, 384), dtype=torch.uint8)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).cuda()
    assert torch.equal(pack_tile_4d(codes), torch.ops.aten._convert_weight_to_int4pack(pairs, 8).cpu())


def test_tile_packing_round_trips():
    from lq_torch.tensors.int4_tile_packed import pack_tile_4d, unpack_tile_4d

    codes = torch.randint(0, 16, (24, 256), dtype=torch.uint8)
    assert pack_tile_4d(codes).shape == (3, 2, 32, 4)
    assert torch.equal(unpack_tile_4d(pack_tile_4d(codes)), codes)


def test_configurations_round_trip_through_json(config):
    assert WeightConfig.from_json(config.to_json()) == config


def test_default_filter_leaves_heads_and_tied_weights():
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(64, 32)
            self.body = nn.Linear(32, 32)
            self.tied = nn.Linear(32, 64, bias=False)
            self.tied.weight = self.embed.weight
            self.lm_head = nn.Linear(32, 64)

    tiny = Tiny()
    quantize_(tiny, Int4WeightOnlyConfig(group_size=32))
    kinds = [isinstance(layer.weight, LowBitTensor) for layer in (tiny.body, tiny.tied, tiny.lm_head)]
    assert kinds == [True, False, False]
    quantize_(tiny, Int8WeightOnlyConfig(), lambda module, path: path == "lm_head")
    assert isinstance(tiny.lm_head.weight, LowBitTensor)
    with pytest.raises(UnsupportedError, match=r"tied\.weight is shared"):
        quantize_(tiny, Int8WeightOnlyConfig(), lambda module, path: path == "tied")


def test_a_layer_named_output_is_the_head_where_blocks_have_none():
    def block():
        return nn.ModuleDict({"qkv": nn.Linear(32, 96), "output": nn.Linear(32, 32)})

    blocks = nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "output": nn.Linear(32, 64)})
    paths = [path for path, _ in select_linears(blocks)]
    assert paths == ["layers.0.qkv", "layers.0.output", "layers.1.qkv", "layers.1.output"]
    wrapped = nn.Sequential(nn.ModuleDict({"body": nn.Linear(32, 32), "output": nn.Linear(32, 64)}))
    assert [path for path, _ in select_linears(wrapped)] == ["0.body"]


@pytest.mark.parametrize("kept", [False, True], ids=["lost", "kept"])
def test_weights_that_scales_are_too_small_for_are_named(kept):
    net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)).requires_grad_(False)
    net[0].weight.mul_(1e-7)
    config = Int4WeightOnlyConfig(32, scale_dtype=torch.float32 if kept else torch.float16)
    if kept:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantize_(net, config)
    else:
        with pytest.warns(UserWarning, match=r"lost most of the weights of 1 layers, among them '0'"):
            quantize_(net, config)


def test_widths_are_symmetric_unless_asked_otherwise():
    assert (
        IntxWeightOnlyConfig().symmetric == Int4WeightOnlyConfig().symmetric == IntxWeightOnlyConfig(bits=5).symmetric
    )
    assert IntxWeightOnlyConfig().symmetric


@pytest.mark.parametrize(
    ("spoil", "config", "error", "message"),
    [
        (lambda m: m[2].weight[3, 4].fill_(float("nan")), CONFIGS["int8-row"], NonFiniteError, r"2\.weight.*\(3, 4\)"),
        (lambda m: m[2].weight[0, 0].fill_(float("inf")), CONFIGS["q4_0"], NonFiniteError, r"2\.weight"),
        (lambda m: None, Int4WeightOnlyConfig(group_size=96), GroupSizeError, r"0: group_size=96"),
        (lambda m: m[2].to(torch.float64), CONFIGS["int4-g32"], DTypeError, r"2\.weight has dtype torch\.float64"),
        (lambda m: m[0].half(), CONFIGS["int4-tile"], DTypeError, r"0: tile_packed_to_4d takes bfloat16"),
        (lambda m: setattr(m, "2", nn.Linear(100, 8)), CONFIGS["q4_0"], ShapeError, r"2: in_features=100"),
    ],
    ids=["nan", "inf", "group", "dtype", "tile", "ggml"],
)
def test_bad_input_is_named_and_changes_nothing(spoil, config, error, message):
    broken = model()
    spoil(broken)
    with pytest.raises(error, match=message):
        quantize_(broken, config)
    assert not any(isinstance(parameter, LowBitTensor) for parameter in broken.parameters())


def test_mistakes_in_configurations_are_named():
    with pytest.raises(SpecError, match="expected one of plain"):
        Int4WeightOnlyConfig(int4_packing_format="plane")
    with pytest.raises(GroupSizeError):
        Int4WeightOnlyConfig(group_size=4)
    with pytest.raises(SpecError, match="q4_9"):
        GGMLWeightOnlyConfig("q4_9")
    with pytest.raises(SpecError, match="unknown configuration"):
        WeightConfig.from_json('{"name": "int5"}')
    with pytest.raises(SpecError, match="expected a configuration"):
        quantize_(model(), "int4")
    with pytest.warns(UserWarning, match="found no Linear"):
        quantize_(nn.Sequential(nn.ReLU()), CONFIGS["int8-row"])
    for task in (lambda: quantize_(None, CONFIGS["int8-row"]), lambda: dequantize_({}), lambda: rotate_(None)):
        with pytest.raises(SpecError, match=r"expected a torch\.nn\.Module"):
            task()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GGMLWeightOnlyConfig(4), "ggml format 4"),
        (lambda: GGMLWeightOnlyConfig(None), "ggml format None"),
        (lambda: WeightConfig.from_json('{"name": "ggml_weight_only", "ggml_type": 4}'), "ggml format 4"),
        (lambda: WeightConfig.from_json('{"name": "gemlite", "weight": ["int4"]}'), r"weight=\['int4'\]"),
        (lambda: GemliteConfig("int8", {}), "activation={}"),
        (lambda: GemliteConfig(group_size=32.0), r"group_size=32\.0"),
        (lambda: WeightConfig.from_dict([1]), "not a list"),
        (lambda: WeightConfig.from_json(None), "not a JSON configuration"),
        (lambda: WeightConfig.from_dict({"name": "int8_weight_only", 1: 2}), "has no 1"),
        (lambda: Int4WeightOnlyConfig(symmetric="false"), "symmetric='false'"),
        (lambda: IntxWeightOnlyConfig(symmetric="false"), "symmetric='false'"),
        (lambda: WeightConfig.from_json('{"name": "intx_weight_only", "symmetric": "false"}'), "symmetric='false'"),
        (lambda: Int4WeightOnlyConfig(-1.0), r"group_size=-1\.0"),
        (lambda: IntxWeightOnlyConfig(3, -1.0), r"group_size=-1\.0"),
        (lambda: Int4DynamicActivationConfig(group_size=-1.0), r"group_size=-1\.0"),
        (lambda: Int4WeightOnlyConfig(True), "group_size=True"),
        (lambda: Int4WeightOnlyConfig(scale_dtype=[16]), r"scale_dtype=\[16\]"),
    ],
)
def test_values_of_another_type_are_named(make, named):
    with pytest.raises(SpecError, match=named):
        make()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn, "float16"])
def test_dequantizing_to_what_is_no_dtype_of_weights_changes_nothing(dtype):
    quantized = model()
    quantize_(quantized, CONFIGS["int8-row"])
    before = list(quantized.parameters())
    with pytest.raises(DTypeError, match="expected float16, bfloat16 or float32"):
        dequantize_(quantized, dtype)
    assert [id(parameter) for parameter in quantized.parameters()] == [id(parameter) for parameter in before]


def test_dequantized_weights_stay_tied():
    packed = nn.Parameter(GGMLTensor.from_hp(torch.randn(64, 32), "q8_0"), requires_grad=False)
    other = nn.Parameter(GGMLTensor.from_hp(torch.randn(48, 32), "q8_0"), requires_grad=False)
    tied = nn.ModuleDict(
        {
            "embedding": nn.Embedding(64, 32),
            "head": nn.Linear(32, 64, bias=False),
            "one": nn.Linear(32, 48),
            "two": nn.Linear(32, 48),
        }
    )
    tied["embedding"].weight = tied["head"].weight = packed
    tied["one"].weight = tied["two"].weight = other
    values = packed.dequantize(torch.float32), other.dequantize(torch.float32)
    dequantize_(tied)
    for (one, two), value in zip((("embedding", "head"), ("one", "two")), values, strict=True):
        assert tied[one].weight is tied[two].weight
        assert type(tied[one].weight) is nn.Parameter
        assert torch.equal(tied[one].weight, value)
    assert not any(isinstance(parameter, LowBitTensor) for parameter in tied.parameters())


def test_operators_without_a_meaning_do_not_densify():
    quantized = model()
    quantize_(quantized, CONFIGS["int4-g32"])
    with pytest.raises(UnsupportedError, match="dequantize"):
        quantized[0].weight + 1
    with pytest.raises(DTypeError, match="float32"):
        quantized(torch.randn(2, 256))
    with pytest.raises(ShapeError, match="needs"):
        quantized(torch.randn(2, 255).bfloat16())
    with pytest.raises(DTypeError, match="cannot become"):
        quantized[0].weight.to(torch.float64)


def test_quantizing_twice_leaves_quantized_layers_alone():
    quantized = model()
    quantize_(quantized, CONFIGS["int4-g32"])
    before = quantized[0].weight
    with pytest.warns(UserWarning, match="found no Linear"):
        quantize_(quantized, CONFIGS["int8-row"])
    assert quantized[0].weight is before


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("columns", [4, 8, 12])
def test_a_scale_a_row_of_few_columns_multiplies_and_comes_back(columns, symmetric, tmp_path):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(columns, 16), nn.Linear(16, columns)).requires_grad_(False)
    quantize_(layers, IntxWeightOnlyConfig(3, -1, symmetric))
    weight = layers[0].weight
    assert weight.group_size == columns
    x = torch.randn(3, columns)
    assert relative_error(layers[0](x), x @ weight.dequantize().T + layers[0].bias) < 1e-5
    save_pretrained(layers, tmp_path)
    loaded = load(tmp_path, nn.Sequential(nn.Linear(columns, 16), nn.Linear(16, columns)))
    assert torch.equal(loaded(x), layers(x))
    dequantize_(layers)
    assert torch.equal(layers[0].weight, weight.dequantize())

"""Quantized weights as tensors: products through every door, copies, memory, serialization, and honest refusals."""

import copy
import io
import json
import pickle

import pytest
import torch
from lq_formats import DeviceError, DTypeError, FormatError, NonFiniteError, ShapeError, UnsupportedError
from lq_torch import (
    GGMLTensor,
    GGMLWeightOnlyConfig,
    Int4Tensor,
    Int4TilePackedTensor,
    Int4WeightOnlyConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    LowBitTensor,
    load,
    quantize_,
    save_pretrained,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F  # noqa: N812

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIGS = {
    "int4-g32-sym": Int4WeightOnlyConfig(group_size=32),
    "int4-row-asym": Int4WeightOnlyConfig(group_size=-1, symmetric=False),
    "int4-tile-g64": Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"),
    "int8-row": Int8WeightOnlyConfig(),
    "int8-tensor": Int8WeightOnlyConfig("tensor"),
    "q4_0": GGMLWeightOnlyConfig("q4_0"),
    "q4_1": GGMLWeightOnlyConfig("q4_1"),
    "q5_0": GGMLWeightOnlyConfig("q5_0"),
    "q8_0": GGMLWeightOnlyConfig("q8_0"),
}


def dense(n=72, k=256, dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(n * 1000 + k)
    return torch.randn(n, k, generator=generator).to(device, dtype)


def relative_error(y, reference):
    return float((y.detach().double() - reference.detach().double()).norm() / reference.detach().double().norm())


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def weight(config, device):
    return config.quantize(dense(device=device))


def test_the_quantized_weight_is_near_the_weight(weight, config, device):
    bits = 8 if "int8" in config.name or getattr(config, "ggml_type", "") == "q8_0" else 4
    assert relative_error(weight.dequantize(torch.float32), dense(device=device)) < (0.02 if bits == 8 else 0.17)
    assert weight.dequantize().dtype == torch.bfloat16
    assert weight.dequantize(torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    "x",
    [
        lambda: torch.randn(256),
        lambda: torch.randn(1, 256),
        lambda: torch.randn(2, 3, 4, 256),
        lambda: torch.randn(256, 5).t(),
        lambda: torch.randn(6, 512)[:, ::2],
        lambda: torch.randn(2, 7, 300)[..., 11:267],
        lambda: torch.randn(1, 256).expand(4, 256),
        lambda: torch.randn(0, 256),
        lambda: torch.randn(3, 0, 256),
    ],
    ids=["vector", "M1", "4d", "transposed", "strided", "sliced", "expanded", "M0", "M3x0"],
)
def test_linear_takes_any_leading_shape_and_stride(weight, x, device):
    x = x().bfloat16().to(device)
    bias = torch.randn(72, device=device).bfloat16()
    y = F.linear(x, weight, bias)
    expected = F.linear(x.double(), weight.dequantize(torch.float64), bias.double())
    assert (y.shape, y.dtype) == (expected.shape, torch.bfloat16)
    assert y.numel() == 0 or relative_error(y, expected) < 2e-2


def test_every_way_to_write_the_product_agrees(weight, device):
    x, bias = torch.randn(5, 256, device=device).bfloat16(), torch.randn(72, device=device).bfloat16()
    y = F.linear(x, weight)
    for product in (x @ weight.t(), x @ weight.T, x @ weight.mT, torch.mm(x, weight.t()), (weight @ x.t()).t()):
        assert torch.equal(product, y)
    assert torch.equal(torch.addmm(bias, x, weight.t()), F.linear(x, weight, bias))
    assert relative_error(torch.addmm(bias, x, weight.t(), beta=2, alpha=3), 2 * bias + 3 * y) < 1e-2
    nothing = torch.full((5, 72), torch.nan, device=device).bfloat16()
    assert torch.equal(torch.addmm(nothing, x, weight.t(), beta=0), y)
    assert relative_error(torch.addmm(nothing[0], x, weight.t(), beta=0, alpha=3), 3 * y) < 1e-2
    assert torch.equal(weight.t().t().dequantize(), weight.dequantize())
    assert weight.t().shape == (256, 72)
    back = torch.randn(4, 72, device=device).bfloat16()
    assert relative_error(back @ weight, back.double() @ weight.dequantize(torch.float64)) < 1e-2
    with pytest.raises(UnsupportedError, match="view"):
        weight.t().spec_json()


def test_gradients_flow_through_a_transposed_weight(weight, device):
    x = torch.randn(5, 256, device=device).bfloat16().requires_grad_()
    g = torch.randn(5, 72, device=device).bfloat16()
    (x @ weight.t()).backward(g)
    assert relative_error(x.grad, g.double() @ weight.dequantize(torch.float64)) < 1e-2


def test_attention_and_encoder_layers_run_with_quantized_weights():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 64)
    before = layer(x)
    quantize_(layer, Int8WeightOnlyConfig())
    assert isinstance(layer.self_attn.out_proj.weight, LowBitTensor)
    with torch.no_grad():
        assert relative_error(layer(x), before.detach()) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_activations_as_for_a_dense_layer(dtype, device, config):
    layer = nn.Linear(256, 72, device=device)
    if "tile" in str(config.to_dict().get("int4_packing_format")):
        layer = layer.bfloat16()
    quantize_(layer, config)
    x = torch.randn(4, 256, device=device)
    with torch.autocast(device, dtype):
        y = layer(x)
    assert y.dtype == dtype
    expected = x.double() @ layer.weight.dequantize(torch.float64).t() + layer.bias.double()
    assert relative_error(y, expected) < 2e-2


def test_inference_mode_before_and_after(config, device):
    layer = nn.Linear(256, 72, device=device, dtype=torch.bfloat16)
    x = torch.randn(4, 256, device=device).bfloat16()
    with torch.inference_mode():
        quantize_(layer, config)
        inside = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), inside)


def test_inference_mode_takes_operators_that_are_made_of_others(config, device, tmp_path):
    """In that mode they reach the weight whole."""
    layer = nn.Linear(256, 72, device=device, dtype=torch.bfloat16)
    quantize_(layer, config)
    save_pretrained(nn.Sequential(layer), tmp_path)
    x = torch.randn(4, 256, device=device).bfloat16()
    attention = nn.MultiheadAttention(64, 4, batch_first=True, device=device).eval()
    quantize_(attention, Int4WeightOnlyConfig(group_size=32))
    tokens = torch.randn(2, 5, 64, device=device)
    with torch.no_grad():
        expected = x @ layer.weight.t(), attention(tokens, tokens, tokens)[0]
    with torch.inference_mode():
        for y, each in zip((x @ layer.weight.t(), attention(tokens, tokens, tokens)[0]), expected, strict=True):
            assert torch.equal(y, each)
        assert layer.weight.cpu().device.type == "cpu"
        assert layer.weight.to("meta").is_meta
        loaded = load(tmp_path, nn.Sequential(nn.Linear(256, 72)), dtype=torch.float16)
        layer.half()
        for half in (loaded[0], layer):
            assert (type(half.weight), half.weight.dtype) == (type(layer.weight), torch.float16)
        for refused in (lambda: layer.weight + 1, lambda: torch.einsum("mk,nk->mn", x, layer.weight)):
            with pytest.raises(UnsupportedError, match="is not defined for a quantized weight"):
                refused()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_a_change_of_dtype_keeps_the_bits(weight, dtype, device):
    changed = weight.to(dtype)
    assert (changed.dtype, type(changed)) == (dtype, type(weight))
    for name, tensor in weight.to_tensors().items():
        assert torch.equal(changed.to_tensors()[name], tensor)
    x = torch.randn(3, 256, device=device, dtype=dtype)
    y = F.linear(x, changed)
    assert y.dtype == dtype
    assert relative_error(y, x.double() @ weight.dequantize(torch.float64).t()) < 2e-2
    for same in (weight.to(torch.bfloat16), weight.to(weight.device)):
        assert same is weight


def test_memory_is_shared_copied_and_emptied_by_its_parts(weight):
    detached, cloned = weight.detach(), weight.clone()
    for name, tensor in weight.inner_tensors().items():
        assert detached.inner_tensors()[name].data_ptr() == tensor.data_ptr()
        assert cloned.inner_tensors()[name].data_ptr() != tensor.data_ptr()
    empty = torch.empty_like(weight)
    assert (type(empty), empty.shape, empty.spec_json()) == (type(weight), weight.shape, weight.spec_json())
    meta = weight.to("meta")
    assert (meta.device.type, meta.spec_json()) == ("meta", weight.spec_json())
    if weight.device.type == "cpu":
        assert weight.share_memory_() is weight
        assert weight.is_shared()
        assert all(tensor.is_shared() for tensor in weight.inner_tensors().values())


def test_a_module_moves_to_meta_and_is_emptied():
    layer = nn.Linear(256, 72)
    quantize_(layer, CONFIGS["int4-g32-sym"])
    filled = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    x = torch.randn(2, 256)
    assert torch.equal(filled(x), layer(x))


def test_serialization_round_trips_without_trusting_code(weight):
    rebuilt = LowBitTensor.from_tensors(weight.to_tensors(), json.loads(json.dumps(weight.spec_json())))
    buffer = io.BytesIO()
    torch.save({"w": weight}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)["w"]
    for twin in (rebuilt, loaded, pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight)):
        assert type(twin) is type(weight)
        assert twin.spec_json() == weight.spec_json()
        assert torch.equal(twin.dequantize(), weight.dequantize())


@pytest.mark.parametrize("rows", [8, 136, 4104], ids=["one-tile", "one-chunk", "chunks"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_tinygemm_weights_are_saved_as_the_plain_format_and_come_back(rows, symmetric):
    w = dense(rows, 1024) * torch.logspace(-38, 30, rows).unsqueeze(1)
    w[0] = w[0].abs()
    w[1] = -w[1].abs()
    weight = Int4TilePackedTensor.from_hp(w.bfloat16(), 64, symmetric=symmetric)
    plain, saved = Int4Tensor.from_hp(w.bfloat16(), 64, symmetric=symmetric), weight.to_tensors()
    assert saved.keys() == plain.to_tensors().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in plain.to_tensors().items())
    back = LowBitTensor.from_tensors(saved, weight.spec_json())
    assert torch.equal(back.qdata, weight.qdata)
    assert torch.equal(back.scale_and_zero, weight.scale_and_zero)


def test_tinygemm_offsets_that_no_integer_zero_gives_are_not_saved():
    weight = Int4TilePackedTensor.from_hp(dense(), 64, symmetric=False)
    weight.scale_and_zero[0, 0, 1] = weight.scale_and_zero[0, 0, 0] * 0.5
    with pytest.raises(UnsupportedError, match="integer zeros"):
        weight.to_tensors()


def test_flattening_names_every_inner_tensor(weight):
    names, context = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name) for name in names}
    twin = type(weight).__tensor_unflatten__(inner, context, weight.shape, weight.stride())
    assert twin.spec_json() == weight.spec_json()
    assert sum(t.numel() * t.element_size() for t in inner.values()) == weight.packed_nbytes


def test_copy_takes_an_equally_quantized_weight_only(weight, device):
    other = type(weight).from_tensors(
        {name: torch.zeros_like(tensor) for name, tensor in weight.to_tensors().items()}, weight.spec_json()
    )
    other.copy_(weight)
    assert torch.equal(other.dequantize(), weight.dequantize())
    with pytest.raises(UnsupportedError, match="cannot copy"):
        other.copy_(dense(device=device))
    wrong = CONFIGS["int8-row" if not isinstance(weight, Int8Tensor) else "q8_0"].quantize(dense(device=device))
    with pytest.raises(UnsupportedError, match="cannot copy"):
        other.copy_(wrong)


@pytest.mark.parametrize(
    "operate",
    [
        lambda w: w + 1,
        lambda w: w[0],
        lambda w: w.sum(),
        lambda w: w.view(-1),
        lambda w: w.zero_(),
        lambda w: torch.zeros_like(w),
        lambda w: nn.init.normal_(w),
        lambda w: F.embedding(torch.zeros(1, dtype=torch.long, device=w.device), w),
        lambda w: torch.cat((w, w)),
        lambda w: F.linear(w, w),
    ],
    ids=["add", "index", "sum", "view", "zero", "zeros-like", "init", "embedding", "cat", "as-input"],
)
def test_other_operators_are_refused_and_nothing_becomes_dense(weight, operate, request):
    if isinstance(weight, GGMLTensor) and "embedding" in request.node.callspec.id:
        pytest.skip("rows of ggml blocks are looked up: test_gguf.py")
    before = weight.dequantize()
    with pytest.raises(UnsupportedError):
        operate(weight)
    assert torch.equal(weight.dequantize(), before)


def test_operands_that_do_not_fit_are_named(weight, device):
    x = torch.randn(2, 256, device=device).bfloat16()
    with pytest.raises(DTypeError, match=r"float32.*bfloat16"):
        F.linear(x.float(), weight)
    with pytest.raises(DTypeError, match="bias has dtype"):
        F.linear(x, weight, torch.zeros(72, device=device))
    with pytest.raises(ShapeError, match=r"bias has shape \(3,\)"):
        F.linear(x, weight, torch.zeros(3, device=device).bfloat16())
    with pytest.raises(ShapeError, match=r"\(2, 255\)"):
        F.linear(x[:, 1:], weight)
    with pytest.raises(ShapeError, match="256"):
        F.linear(torch.zeros((), device=device).bfloat16(), weight)
    with pytest.raises(DeviceError, match="meta"):
        F.linear(x.to("meta"), weight)
    with pytest.raises(DeviceError, match="bias"):
        F.linear(x, weight, torch.zeros(72, device="meta").bfloat16())


def test_compiling_sees_the_number_of_tokens_as_dynamic(config):
    layer = nn.Linear(256, 72, dtype=torch.bfloat16)
    quantize_(layer, config)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for tokens in (2, 3, 17, 40):
            x = torch.randn(tokens, 256).bfloat16()
            assert relative_error(compiled(x), layer(x)) < 1e-2
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["int4-g32-sym", "int8-row", "q4_0"])
def test_export_autocast_and_training_graphs_agree_with_eager(name):
    layer = nn.Linear(256, 72)
    quantize_(layer, CONFIGS[name])
    x = torch.randn(3, 256, requires_grad=True)
    exported = torch.export.export(layer, (x.detach(),)).module()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(exported(x), layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(x), layer(x))
    gradients = [torch.autograd.grad(function(x).square().sum(), x)[0] for function in (compiled, layer)]
    torch.testing.assert_close(*gradients)


@pytest.mark.gpu
def test_a_model_compiles_with_inductor_on_a_gpu(config):
    layers = nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 72)).cuda().bfloat16()
    quantize_(layers, config)
    compiled = torch.compile(layers, fullgraph=True)
    with torch.no_grad():
        for tokens in (1, 4, 33):
            x = torch.randn(tokens, 256, device="cuda").bfloat16()
            assert relative_error(compiled(x), layers(x)) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
def test_tinygemm_against_float64(group_size, symmetric, tokens):
    weight = Int4TilePackedTensor.from_hp(dense(136, 1280, device="cuda"), group_size, symmetric=symmetric)
    x = torch.randn(tokens, 2560, device="cuda").bfloat16()[:, ::2]
    assert relative_error(F.linear(x, weight), x.double() @ weight.dequantize(torch.float64).t()) < 1e-2


@pytest.mark.gpu
def test_a_weight_quantized_on_a_gpu_has_the_bits_of_the_cpu(config):
    here, there = config.quantize(dense()), config.quantize(dense(device="cuda")).to("cpu")
    for name, tensor in here.inner_tensors().items():
        assert torch.equal(there.inner_tensors()[name], tensor)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Int4TilePackedTensor.from_hp(dense(72, 384), 256), ShapeError, "does not divide"),
        (lambda: Int4TilePackedTensor.from_hp(dense(70, 256)), ShapeError, "N % 8"),
        (lambda: Int4TilePackedTensor.from_hp(dense(72, 256, torch.float16)), DTypeError, "bfloat16"),
        (lambda: Int4Tensor.from_hp(dense(8, 100), 32), ShapeError, "does not divide"),
        (lambda: Int4Tensor.from_hp(dense().unsqueeze(0)), ShapeError, "2 dimensions"),
        (lambda: Int4Tensor.from_hp(dense().int()), DTypeError, "int32"),
        (lambda: GGMLTensor.from_hp(dense(8, 100)), ShapeError, "32"),
        (lambda: GGMLTensor.from_hp(dense() * 1e30, "q4_0"), NonFiniteError, "float16"),
        (lambda: GGMLTensor.from_hp(dense() * 1e-3 + 1e6, "q4_1"), NonFiniteError, "float16"),
        (lambda: Int8Tensor.from_hp(dense() * float("inf")), NonFiniteError, "non-finite"),
    ],
    ids=["tile-group", "tile-rows", "tile-dtype", "group", "rank", "dtype", "blocks", "scale", "minimum", "inf"],
)
def test_weights_that_do_not_fit_a_format_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("int4-g32-sym", {"shape": [72, 255]}),
        ("int4-g32-sym", {"shape": [2**40, 2**40]}),
        ("int4-g32-sym", {"shape": [72, 256, 1]}),
        ("int4-g32-sym", {"shape": "72x256"}),
        ("int4-g32-sym", {"attributes": {"group_size": 32.0}}),
        ("int4-g32-sym", {"attributes": {"group_size": True}}),
        ("int4-g32-sym", {"attributes": {"group_size": 0}}),
        ("int4-g32-sym", {"attributes": [32]}),
        ("int4-g32-sym", {"dtype": ["float16"]}),
        ("int4-g32-sym", {"kind": {}}),
        ("int4-g32-sym", {"kind": ""}),
        ("int4-g32-sym", {"kind": "int8", "attributes": {}}),
        ("int4-tile-g64", {"attributes": {"group_size": 48, "symmetric": True}}),
        ("int4-tile-g64", {"attributes": {"group_size": [64], "symmetric": True}}),
        ("int4-tile-g64", {"attributes": {"group_size": 64, "symmetric": False}}),
        ("int4-tile-g64", {"attributes": {"group_size": 64, "symmetric": 1}}),
        ("int4-tile-g64", {"attributes": {"group_size": 64}}),
        ("int4-tile-g64", {"shape": [64, 256]}),
        ("int8-row", {"shape": [256, 72]}),
        ("q4_0", {"attributes": {"ggml_type": "q9"}}),
        ("q4_0", {"attributes": {"ggml_type": "q8_0"}}),
        ("q4_0", {"attributes": {"ggml_type": None}}),
        ("q4_0", {"shape": [72, 0]}),
    ],
)
def test_specs_that_lie_are_refused(name, change):
    weight = CONFIGS[name].quantize(dense())
    with pytest.raises(FormatError):
        LowBitTensor.from_tensors(weight.to_tensors(), weight.spec_json() | change)
    meta = {name: tensor.to("meta") for name, tensor in weight.to_tensors().items()}
    with pytest.raises(FormatError):
        LowBitTensor.check_tensors(meta, weight.spec_json() | change)
    assert LowBitTensor.check_tensors(meta, weight.spec_json()) == weight.shape

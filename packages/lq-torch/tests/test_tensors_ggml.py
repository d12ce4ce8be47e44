"""GGMLTensor of every type: blocks on the CPU, planes where kernels read them, and the same bytes through every door."""

import copy

import pytest
import torch
from lq_formats import (
    GGML_FORMATS,
    DTypeError,
    FormatError,
    OutOfRangeError,
    ShapeError,
    SpecError,
    UnsupportedError,
    ggml_format,
)
from lq_torch import GGMLTensor, GGMLWeightOnlyConfig, LowBitTensor, WeightConfig, load, quantize_, save_pretrained
from lq_torch.merge.rows import cat_rows, slice_rows
from torch import nn
from torch.nn import functional as F  # noqa: N812

TYPES = tuple(name for name in GGML_FORMATS if name not in ("q4_0", "q8_1"))
WRITTEN = ("q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "q4_k", "q5_k", "q6_k")
K = 512


def random_blocks(ggml_type, rows=24):
    form = ggml_format(ggml_type)
    blocks = torch.randint(0, 256, (rows, K // form.block_size, form.type_size), dtype=torch.uint8)
    for at in form.halves:
        blocks[..., at : at + 2] = (0.01 * torch.randn(*blocks.shape[:2], 1)).half().view(torch.uint8)
    if ggml_type == "mxfp4":
        blocks[..., 0] = blocks[..., 0] % 16 + 112
    return blocks


@pytest.fixture(params=["blocks", "planes", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Return a device; with "planes" a CPU holds weights as a GPU does."""
    if request.param == "planes":
        monkeypatch.setattr("lq_torch.tensors.ggml._DEVICES_OF_PLANES", ("cpu", "cuda"))
    torch.manual_seed(0)
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.mark.parametrize("ggml_type", TYPES)
def test_products_rows_and_values_are_those_of_the_blocks(device, ggml_type):
    blocks = random_blocks(ggml_type).to(device)
    weight = GGMLTensor.from_blocks(blocks, ggml_type, torch.float32)
    dense = ggml_format(ggml_type).dequantize(blocks)
    assert weight.shape == dense.shape
    assert torch.equal(weight.dequantize(), dense)
    assert torch.equal(weight.blocks(), blocks)
    x, bias = torch.randn(2, 3, K, device=device), torch.randn(24, device=device)
    expected = x.double() @ dense.double().t() + bias.double()
    y = F.linear(x, weight, bias)
    assert (y.double() - expected).norm() <= 2e-6 * expected.norm()
    indices = torch.tensor([[3, 0], [23, 3]], device=device)
    assert torch.equal(F.embedding(indices, weight), dense[indices])
    assert torch.equal(F.embedding(indices.int(), weight), dense[indices])
    assert F.embedding(indices[:0], weight).shape == (0, 2, K)


def test_indices_are_those_that_a_dense_embedding_takes(device):
    weight = GGMLTensor.from_blocks(random_blocks("q8_0").to(device), "q8_0", torch.float32)
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.float32):
        with pytest.raises(DTypeError, match=f"indices have dtype {dtype}"):
            F.embedding(torch.ones(2, dtype=dtype, device=device), weight)
    if device != "cpu":
        return  # a GPU ends the process
    for index in (-1, -24, 24):
        with pytest.raises(OutOfRangeError, match=r"rows 0 to 23"):
            F.embedding(torch.tensor([[3], [index]]), weight)


def test_a_weight_is_held_once(device):
    weight = GGMLTensor.from_blocks(random_blocks("q5_k").to(device), "q5_k", torch.float32)
    assert (weight.qdata is None) == (weight.codes is not None)
    assert weight.packed_nbytes == 24 * K // 256 * 176
    held = set(weight.inner_tensors())
    F.linear(torch.randn(1, K, device=device), weight)
    assert set(weight.inner_tensors()) == held


@pytest.mark.parametrize("ggml_type", ["q5_0", "q8_0", "q4_k", "q6_k"])
def test_copies_keep_the_bytes(device, ggml_type, tmp_path):
    blocks = random_blocks(ggml_type).to(device)
    weight = GGMLTensor.from_blocks(blocks, ggml_type, torch.bfloat16)
    half = weight.to(torch.float16)
    assert half.dtype == torch.float16
    for other in (weight.detach(), weight.clone(), copy.deepcopy(weight), half, weight.to("cpu").to(device)):
        assert (other.codes is None) == (weight.codes is None)
        assert torch.equal(other.blocks(), blocks)
    back = LowBitTensor.from_tensors(weight.to_tensors(), weight.spec_json())
    assert torch.equal(back.blocks(), blocks)
    target = GGMLTensor.from_blocks(torch.zeros_like(blocks), ggml_type, torch.bfloat16)
    target.copy_(weight.to("cpu"))
    assert torch.equal(target.blocks(), blocks)
    torch.save(weight, tmp_path / "weight.pt")
    loaded = torch.load(tmp_path / "weight.pt", weights_only=True)
    assert torch.equal(loaded.blocks(), blocks)


@pytest.mark.parametrize("ggml_type", ["q5_1", "q6_k"])
def test_rows_are_stacked_and_cut(device, ggml_type):
    blocks = random_blocks(ggml_type).to(device)
    parts = [GGMLTensor.from_blocks(part, ggml_type, torch.float32) for part in (blocks[:5], blocks[5:])]
    whole = cat_rows(parts)
    assert torch.equal(whole.blocks(), blocks)
    part = slice_rows(whole, 5, 24)
    assert torch.equal(part.blocks(), blocks[5:])
    storages = {tensor.untyped_storage().data_ptr() for tensor in whole.inner_tensors().values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in part.inner_tensors().values()} == storages
    x = torch.randn(2, K, device=device)
    torch.testing.assert_close(F.linear(x, part), x @ part.dequantize().t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ggml_type", ["q5_0", "q4_k"])
def test_gradients_and_compilation(device, ggml_type):
    weight = GGMLTensor.from_blocks(random_blocks(ggml_type).to(device), ggml_type, torch.float32)
    layer = nn.Linear(K, 24, device=device)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(3, K, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, K), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("ggml_type", WRITTEN)
def test_models_are_quantized_saved_and_loaded(device, ggml_type, tmp_path):
    config = GGMLWeightOnlyConfig(ggml_type)
    assert WeightConfig.from_json(config.to_json()) == config
    model = nn.Sequential(nn.Linear(K, 24), nn.ReLU(), nn.Linear(24, 2)).to(device)
    dense = model[0].weight.detach().clone()
    quantize_(model, config, filter_fn=lambda module, name: name == "0")
    weight = model[0].weight.data
    assert torch.equal(weight.blocks().to(device), ggml_format(ggml_type).quantize(dense))
    # Of uniform weights; the coarsest, MXFP4, leaves .11 of the norm.
    assert (weight.dequantize() - dense).norm() < 0.13 * dense.norm()
    save_pretrained(model, tmp_path)
    empty = nn.Sequential(nn.Linear(K, 24), nn.ReLU(), nn.Linear(24, 2)).to(device)
    loaded = load(tmp_path, empty, device=device)
    assert torch.equal(loaded[0].weight.data.blocks(), weight.blocks())
    x = torch.randn(3, K, device=device)
    assert torch.equal(loaded(x), model(x))


def test_an_importance_steers_the_search():
    w, importance = torch.randn(16, K), torch.randn(K).mul(1.5).exp()

    def error(weight):
        return float(((weight.dequantize() - w) ** 2 * importance).sum())

    for ggml_type in ("q4_0", "q4_k", "q6_k", "iq4_nl"):
        assert error(GGMLTensor.from_hp(w, ggml_type, importance)) < 0.9 * error(GGMLTensor.from_hp(w, ggml_type))
    with pytest.raises(UnsupportedError, match="without a search"):
        GGMLTensor.from_hp(w, "q8_0", importance)


def test_what_does_not_fit_is_named():
    with pytest.raises(ShapeError, match=r"expected \(N, blocks, 144\)"):
        GGMLTensor.from_blocks(torch.zeros(2, 2, 18, dtype=torch.uint8), "q4_k", torch.float32)
    with pytest.raises(SpecError, match="q9"):
        GGMLTensor.from_blocks(torch.zeros(2, 2, 18, dtype=torch.uint8), "q9", torch.float32)
    with pytest.raises(UnsupportedError, match=r"reads q2_k.*q6_k"):
        GGMLWeightOnlyConfig("q2_k")
    with pytest.raises(ShapeError, match="256 elements of a q4_k block"):
        quantize_(nn.Sequential(nn.Linear(96, 4)), GGMLWeightOnlyConfig("q4_k"))
    weight = GGMLTensor.from_blocks(random_blocks("q4_k"), "q4_k", torch.float32)
    with pytest.raises(FormatError, match="K % 256 == 0"):
        LowBitTensor.from_tensors(weight.to_tensors(), {**weight.spec_json(), "shape": [24, 96]})


@pytest.mark.gpu
def test_moving_rearranges():
    blocks = random_blocks("q6_k")
    weight = GGMLTensor.from_blocks(blocks, "q6_k", torch.bfloat16)
    there = weight.to("cuda")
    assert there.qdata is None
    assert there.codes.is_cuda
    assert torch.equal(there.to("cpu").qdata, blocks)

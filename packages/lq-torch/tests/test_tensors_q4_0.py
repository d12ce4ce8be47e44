"""Q4_0 as a GPU of Hopper's kind holds it, in fragment order: stored once, and the same bytes through every door.

On a CPU the predicate is made true, so that everything but the kernels runs here.
"""

import copy
import io

import pytest
import torch
from lq_formats import dequantize_q4_0, quantize_q4_0
from lq_kernels import reads_fragments
from lq_torch import GGMLTensor, GGMLWeightOnlyConfig, LowBitTensor, load, quantize_, save_pretrained, warmup
from lq_torch.merge.rows import cat_rows, slice_rows
from torch import nn
from torch.nn import functional as F  # noqa: N812

SHAPES = [(0, 64), (1, 32), (17, 32), (40, 160), (24, 512), (33, 1056)]
BOUNDS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def device(fragment_device):
    return fragment_device


def any_bytes(n=40, k=160, device="cpu"):
    """Blocks of any bytes: scales are also NaN, infinite and -0."""
    blocks = torch.randint(0, 256, (n, k // 32, 18), dtype=torch.uint8)
    blocks[: n // 4, :, :2] = torch.tensor([0x01, 0x7C], dtype=torch.uint8)  # a signalling NaN
    blocks[n // 4 : n // 2] = quantize_q4_0(torch.zeros(1, k))  # -0
    return blocks.to(device)


def weight_of(blocks, dtype=torch.float32):
    weight = GGMLTensor.from_blocks(blocks, "q4_0", dtype)
    assert weight.qdata is None
    assert weight.fragments() is not None
    return weight


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_bytes_come_back(n, k, device, elsewhere):
    blocks = any_bytes(n, k, device)
    weight = weight_of(blocks)
    assert torch.equal(weight.blocks(), blocks)
    there = elsewhere(weight)
    assert there.codes is None
    assert torch.equal(there.qdata, blocks.cpu())
    back = there.to(device, copy=True)
    assert back.fragments() is not None
    assert torch.equal(back.blocks(), blocks)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_and_values_are_those_of_the_blocks(n, k, dtype, device):
    blocks = quantize_q4_0(torch.randn(n, k)).to(device)
    weight, w = weight_of(blocks, dtype), dequantize_q4_0(blocks, torch.float64)
    assert torch.equal(weight.dequantize(), dequantize_q4_0(blocks, dtype))
    bias = torch.randn(n, device=device).to(dtype)
    for m in (1, 3, 64):
        x = torch.randn(m, k, device=device).to(dtype)
        expected = x.double() @ w.t() + bias.double()
        y = F.linear(x, weight, bias)
        assert y.dtype == dtype
        assert (y.double() - expected).norm() <= BOUNDS[dtype] * expected.norm()


def test_a_weight_is_held_once(device):
    blocks = any_bytes(48, 512, device)
    weight = weight_of(blocks, torch.bfloat16)
    assert weight.packed_nbytes == blocks.numel()
    if device == "cuda":
        F.linear(torch.randn(1, 512, device=device, dtype=torch.bfloat16), weight)  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        F.linear(torch.randn(1, 512, device=device, dtype=torch.bfloat16), weight)
        assert torch.cuda.memory_allocated() == before


def test_rows_are_looked_up(device):
    blocks = quantize_q4_0(torch.randn(37, 160)).to(device)
    weight, dense = weight_of(blocks), dequantize_q4_0(blocks)
    indices = torch.randint(0, 37, (4, 9), device=device)
    assert torch.equal(F.embedding(indices, weight), dense[indices])
    assert F.embedding(indices[:0], weight).shape == (0, 9, 160)
    if device == "cpu":  # a GPU stops at such an index
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([37]), weight)


def test_copies_keep_the_bytes(device, elsewhere):
    blocks = any_bytes(device=device)
    weight = weight_of(blocks, torch.bfloat16)
    half = weight.to(torch.float16)
    assert half.dtype == torch.float16
    for other in (weight.detach(), weight.clone(), copy.deepcopy(weight), half):
        assert other.fragments() is not None
        assert torch.equal(other.blocks(), blocks)
    for source in (weight, elsewhere(weight)):
        target = weight_of(torch.zeros_like(blocks), torch.bfloat16)
        target.copy_(source)
        assert torch.equal(target.blocks(), blocks)
    assert torch.empty_like(weight).fragments() is not None


def test_files_hold_blocks(device, elsewhere, tmp_path):
    blocks = any_bytes(device=device)
    weight = weight_of(blocks, torch.bfloat16)
    tensors = weight.to_tensors()
    assert torch.equal(tensors["qdata"], blocks)
    assert torch.equal(LowBitTensor.from_tensors(tensors, weight.spec_json()).blocks(), blocks)
    model, other = nn.Linear(512, 40).to(device), nn.Linear(512, 40).to(device)
    quantize_(model, GGMLWeightOnlyConfig("q4_0"))
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path, other, device=device)
    assert loaded.weight.data.fragments() is not None
    assert torch.equal(loaded.weight.data.blocks(), model.weight.data.blocks())
    x = torch.randn(3, 512, device=device)
    assert torch.equal(loaded(x), model(x))


def test_a_state_dict_goes_from_form_to_form(device, monkeypatch):
    model = nn.Linear(96, 40).to(device)
    quantize_(model, GGMLWeightOnlyConfig("q4_0"))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    monkeypatch.setattr("lq_torch.tensors.ggml.reads_fragments", lambda device: device.type == "cuda")
    state = torch.load(buffer, map_location="cpu", weights_only=True)
    there = nn.Linear(96, 40)
    quantize_(there, GGMLWeightOnlyConfig("q4_0"))
    there.load_state_dict(state)
    assert there.weight.data.codes is None
    assert torch.equal(there.weight.data.qdata, model.weight.data.blocks().cpu())
    assert torch.equal(F.linear(torch.eye(96), state["weight"]), state["weight"].dequantize().t())


def test_rows_are_stacked_and_cut(device):
    blocks = any_bytes(device=device)
    whole = cat_rows([weight_of(part) for part in (blocks[:5], blocks[5:])])
    assert whole.fragments() is not None
    assert torch.equal(whole.blocks(), blocks)
    part = slice_rows(whole, 5, 23)
    assert part.fragments() is not None
    assert torch.equal(part.blocks(), blocks[5:23])


def test_gradients_and_compilation(device):
    weight = weight_of(quantize_q4_0(torch.randn(40, 160)).to(device))
    layer = nn.Linear(160, 40, device=device)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(3, 160, device=device, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 160), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_a_trained_model_says_the_same(device, monkeypatch):
    transformers, data = pytest.importorskip("transformers"), pytest.importorskip("lq_eval.data")
    model = transformers.AutoModelForCausalLM.from_pretrained(data.tiny_llama_path(), dtype=torch.float32).eval()
    tokens = torch.randint(0, model.config.vocab_size, (1, 32))
    dense = copy.deepcopy(model)
    for layer in dense.model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = dequantize_q4_0(quantize_q4_0(layer.weight.data))
    model.to(device)
    quantize_(model, GGMLWeightOnlyConfig("q4_0"))
    weights = [p.data for p in model.parameters() if isinstance(p.data, GGMLTensor)]
    assert weights
    assert all(weight.fragments() is not None for weight in weights)
    warmup(model)
    with torch.no_grad():
        expected = dense(tokens).logits
        found = model(tokens.to(device)).logits.cpu()
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.gpu
def test_a_gpu_holds_what_its_kernels_read():
    weight = GGMLTensor.from_hp(torch.randn(8, 256, device="cuda"), "q4_0")
    assert (weight.fragments() is not None) == reads_fragments(weight.device)
    assert weight.to("cpu").codes is None


@pytest.mark.parametrize("scale", [1e30, 1e4, 1.0, 1e-4, 1e-6, 1e-30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_of_any_magnitude_are_multiplied_alike(scale, dtype):
    """Blocks of Q8_1 have scales and sums in fp16, which such tokens, all of one sign, are beyond."""
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(1024, 48, bias=False, dtype=dtype)
    quantize_(layer, GGMLWeightOnlyConfig("q4_0"))
    weight = layer.weight.dequantize(torch.float64)
    x = (torch.rand(4, 1024, generator=generator) * scale).to(dtype)
    x[3] = 0
    exact = x.double() @ weight.t()
    assert float((layer(x).double() - exact).norm() / exact.norm()) < 0.01
    assert not layer(x)[3].any()

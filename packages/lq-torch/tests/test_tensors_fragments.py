"""Q4_1, Q4_K and Q8_0 as a Hopper GPU holds them, in fragment order: stored once, and the same bytes through every door.

On a CPU the predicate is made true, so that everything but the kernels runs here, by the same way.
"""

import copy
import io

import pytest
import torch
from lq_formats import NonFiniteError, ggml_format
from lq_kernels import reads_fragments
from lq_torch import GGMLTensor, GGMLWeightOnlyConfig, LowBitTensor, load, quantize_, save_pretrained, warmup
from lq_torch.merge.rows import cat_rows, slice_rows
from torch import nn
from torch.nn import functional as F  # noqa: N812

TYPES = ("q4_1", "q4_k", "q8_0")
BOUNDS = {torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
BITS = {"q4_1": 5.0, "q4_k": 5.5, "q8_0": 8.5}


@pytest.fixture
def device(fragment_device):
    return fragment_device


def any_bytes(ggml_type, n=40, k=512, device="cpu"):
    """Blocks of any bytes: scales are also NaN, infinite and -0; those of Q4_K are below 2**9."""
    form = ggml_format(ggml_type)
    blocks = torch.randint(0, 256, (n, k // form.block_size, form.type_size), dtype=torch.uint8)
    if ggml_type == "q4_k":
        blocks[..., 1:4:2] &= 0xDF
    blocks[: n // 4, :, :2] = torch.tensor([0x01, 0x7C], dtype=torch.uint8)  # a signalling NaN
    blocks[n // 4 : n // 2, :, :2] = torch.tensor([0x00, 0x80], dtype=torch.uint8)  # -0
    return blocks.to(device)


def random_blocks(ggml_type, n, k, device="cpu"):
    w = torch.randn(n, k) * 0.05
    w[: n // 3, :256] = 0.25  # constant groups: scales of 0 with minima that are not
    return ggml_format(ggml_type).quantize(w).to(device)


def weight_of(blocks, ggml_type, dtype=torch.bfloat16):
    weight = GGMLTensor.from_blocks(blocks, ggml_type, dtype)
    assert weight.qdata is None
    assert weight.fragments() is not None
    assert weight.planes() is None
    return weight


@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.parametrize("n", [0, 17, 40])
def test_the_bytes_come_back(n, ggml_type, device, elsewhere):
    blocks = any_bytes(ggml_type, n, 512, device)
    weight = weight_of(blocks, ggml_type)
    assert torch.equal(weight.blocks(), blocks)
    assert torch.equal(weight.to_tensors()["qdata"], blocks)
    there = elsewhere(weight)
    assert there.codes is None
    assert torch.equal(there.qdata, blocks.cpu())
    back = there.to(device, copy=True)
    assert back.fragments() is not None
    assert torch.equal(back.blocks(), blocks)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("ggml_type", TYPES)
def test_products_and_values_are_those_of_the_blocks(ggml_type, dtype, device):
    for n, k in ((17, 512), (40, 768), (33, 512)) if ggml_type == "q4_k" else ((17, 96), (40, 160), (33, 1056)):
        blocks = random_blocks(ggml_type, n, k, device)
        weight, form = weight_of(blocks, ggml_type, dtype), ggml_format(ggml_type)
        for other in (dtype, torch.float32):
            assert torch.equal(weight.dequantize(other), form.dequantize(blocks, other))
        w, bias = form.dequantize(blocks, torch.float64), torch.randn(n, device=device).to(dtype)
        for m in (1, 3, 20, 64, 300):
            x = torch.randn(m, k, device=device).to(dtype)
            expected = x.double() @ w.t() + bias.double()
            y = F.linear(x, weight, bias)
            assert y.dtype == dtype
            found = float((y.double() - expected).norm() / expected.norm())
            assert found < BOUNDS[dtype], (n, k, m)
            assert found**2 < 5e-5


@pytest.mark.parametrize("ggml_type", TYPES)
def test_a_weight_is_held_once(ggml_type, device):
    weight = weight_of(any_bytes(ggml_type, 48, 2048, device), ggml_type)
    assert weight.packed_nbytes * 8 == BITS[ggml_type] * 48 * 2048
    assert weight.saved_nbytes == weight.blocks().numel()
    held = weight.inner_tensors()
    x = torch.randn(1, 2048, device=device, dtype=torch.bfloat16)
    F.linear(x, weight)  # compiles
    assert all(weight.inner_tensors()[name] is tensor for name, tensor in held.items())
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        F.linear(x, weight)
        assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("ggml_type", TYPES)
def test_a_gpu_before_hopper_gets_planes_and_float32_does_not_get_fragments(ggml_type, device, elsewhere):
    blocks = random_blocks(ggml_type, 24, 512, device)
    weight = weight_of(blocks, ggml_type)
    there = elsewhere(weight, planes=True)
    assert there.planes() is not None
    assert torch.equal(there.blocks(), blocks.cpu())
    x = torch.randn(2, 512).to(torch.bfloat16)
    assert (F.linear(x, there) - F.linear(x.to(device), weight).cpu()).float().norm() < 0.02 * F.linear(x, there).norm()
    wide = weight.to(torch.float32)
    assert wide.fragments() is None
    assert torch.equal(wide.blocks(), blocks)
    assert wide.to(torch.float16).fragments() is not None


def test_a_row_of_one_group_and_scales_beyond_fp16_stay_in_planes(device, monkeypatch):
    monkeypatch.setattr("lq_torch.tensors.ggml._DEVICES_OF_PLANES", ("cuda", "cpu"))
    one = GGMLTensor.from_blocks(random_blocks("q4_1", 8, 32, device), "q4_1", torch.bfloat16)
    large = torch.zeros(4, 1, 144, dtype=torch.uint8)
    large[2, 0, :2] = torch.tensor([1e4], dtype=torch.float16).view(torch.uint8)
    large[2, 0, 4:] = 63  # 630000 times 3 or 15
    beyond = GGMLTensor.from_blocks(large.to(device), "q4_k", torch.bfloat16)
    for weight, k in ((one, 32), (beyond, 256)):
        assert weight.planes() is not None
        assert weight.detach().planes() is not None
        x, w = torch.randn(3, k, device=device).to(torch.bfloat16), weight.dequantize(torch.float64)
        expected = x.double() @ w.t()
        assert bool(expected.isfinite().all())
        assert (F.linear(x, weight).double() - expected).norm() <= 8e-3 * expected.norm()
    target = weight_of(torch.zeros_like(large).to(device), "q4_k")
    with pytest.raises(NonFiniteError, match="beyond float16"):
        target.copy_(beyond)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_rows_are_looked_up(ggml_type, device):
    blocks = random_blocks(ggml_type, 37, 512, device)
    weight, dense = weight_of(blocks, ggml_type), ggml_format(ggml_type).dequantize(blocks, torch.bfloat16)
    indices = torch.randint(0, 37, (4, 9), device=device)
    assert torch.equal(F.embedding(indices, weight), dense[indices])
    assert F.embedding(indices[:0], weight).shape == (0, 9, 512)
    many = torch.randint(0, 37, (100,), device=device)
    assert torch.equal(F.embedding(many, weight), dense[many])
    if device == "cpu":  # a GPU stops at such an index
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([37]), weight)


@pytest.mark.parametrize("ggml_type", TYPES)
def test_an_embedding_may_stay_in_rows(ggml_type, device):
    blocks = random_blocks(ggml_type, 37, 512, device)
    weight = weight_of(blocks, ggml_type).by_rows()
    assert weight.planes() is not None
    indices, dense = (
        torch.randint(0, 37, (5,), device=device),
        ggml_format(ggml_type).dequantize(blocks, torch.bfloat16),
    )
    for held in (weight, nn.Parameter(weight, requires_grad=False).data, weight.detach(), weight.to(device)):
        assert held.planes() is not None
        assert torch.equal(held.blocks(), blocks)
        assert torch.equal(F.embedding(indices, held), dense[indices])
    assert weight.to(torch.float16).fragments() is not None


@pytest.mark.parametrize("ggml_type", TYPES)
def test_copies_keep_the_bytes(ggml_type, device, elsewhere):
    blocks = any_bytes(ggml_type, device=device)
    weight = weight_of(blocks, ggml_type)
    half = weight.to(torch.float16)
    assert half.dtype == torch.float16
    for other in (weight.detach(), weight.clone(), copy.deepcopy(weight), half):
        assert other.fragments() is not None
        assert torch.equal(other.blocks(), blocks)
    for source in (weight, elsewhere(weight), elsewhere(weight, planes=True), weight.to(torch.float32)):
        target = weight_of(torch.zeros_like(blocks), ggml_type)
        target.copy_(source)
        assert torch.equal(target.blocks(), blocks)
    assert torch.empty_like(weight).fragments() is not None


@pytest.mark.parametrize("ggml_type", TYPES)
def test_files_hold_blocks(ggml_type, device, tmp_path):
    blocks = any_bytes(ggml_type, device=device)
    weight = weight_of(blocks, ggml_type)
    assert torch.equal(LowBitTensor.from_tensors(weight.to_tensors(), weight.spec_json()).blocks(), blocks)
    model, other = (nn.Linear(512, 40, dtype=torch.bfloat16).to(device) for _ in range(2))
    quantize_(model, GGMLWeightOnlyConfig(ggml_type))
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path, other, device=device)
    assert loaded.weight.data.fragments() is not None
    assert torch.equal(loaded.weight.data.blocks(), model.weight.data.blocks())
    x = torch.randn(3, 512, device=device).to(torch.bfloat16)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("ggml_type", TYPES)
def test_a_state_dict_goes_from_form_to_form(ggml_type, device, monkeypatch):
    model = nn.Linear(256, 40, dtype=torch.bfloat16).to(device)
    quantize_(model, GGMLWeightOnlyConfig(ggml_type))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    monkeypatch.setattr("lq_torch.tensors.ggml.reads_fragments", lambda device: device.type == "cuda")
    state = torch.load(buffer, map_location="cpu", weights_only=True)
    there = nn.Linear(256, 40, dtype=torch.bfloat16)
    quantize_(there, GGMLWeightOnlyConfig(ggml_type))
    there.load_state_dict(state)
    assert there.weight.data.codes is None
    assert torch.equal(there.weight.data.qdata, model.weight.data.blocks().cpu())


@pytest.mark.parametrize("ggml_type", TYPES)
def test_rows_are_stacked_and_cut(ggml_type, device):
    blocks = any_bytes(ggml_type, device=device)
    whole = cat_rows([weight_of(part, ggml_type) for part in (blocks[:5], blocks[5:])])
    assert whole.fragments() is not None
    assert torch.equal(whole.blocks(), blocks)
    part = slice_rows(whole, 5, 23)
    assert part.fragments() is not None
    assert torch.equal(part.blocks(), blocks[5:23])


@pytest.mark.parametrize("ggml_type", TYPES)
def test_gradients_and_compilation(ggml_type, device):
    weight = weight_of(random_blocks(ggml_type, 40, 512, device), ggml_type)
    layer = nn.Linear(512, 40, device=device, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(3, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    expected = weight.dequantize(torch.float32).sum(0).expand(3, 512)
    assert (x.grad.float() - expected).norm() <= 0.02 * expected.norm()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("ggml_type", TYPES)
def test_a_trained_model_says_the_same(ggml_type, device):
    transformers, data = pytest.importorskip("transformers"), pytest.importorskip("lq_eval.data")
    model = transformers.AutoModelForCausalLM.from_pretrained(data.tiny_llama_path(), dtype=torch.float16).eval()
    tokens = torch.randint(0, model.config.vocab_size, (1, 32))
    form = ggml_format(ggml_type)
    fits = [
        module
        for module in model.model.modules()
        if isinstance(module, nn.Linear) and module.in_features % form.block_size == 0
    ]
    if not fits:
        pytest.skip("the tiny model has no layer of whole blocks")
    dense = copy.deepcopy(model).float()
    names = {name for name, module in model.named_modules() if any(module is each for each in fits)}
    for name in names:
        layer = dense.get_submodule(name)
        layer.weight.data = form.dequantize(form.quantize(layer.weight.data))
    model.to(device)
    quantize_(model, GGMLWeightOnlyConfig(ggml_type), filter_fn=lambda module, name: name in names)
    weights = [p.data for p in model.parameters() if isinstance(p.data, GGMLTensor)]
    assert len(weights) == len(names)
    assert all(weight.fragments() is not None for weight in weights)
    warmup(model)
    with torch.no_grad():
        expected = dense(tokens).logits
        found = model(tokens.to(device)).logits.cpu().float()
    assert (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("ggml_type", TYPES)
def test_a_gpu_holds_what_its_kernels_read(ggml_type):
    weight = GGMLTensor.from_hp(torch.randn(8, 512, device="cuda", dtype=torch.bfloat16), ggml_type)
    assert (weight.fragments() is not None) == reads_fragments(weight.device)
    assert weight.to("cpu").codes is None

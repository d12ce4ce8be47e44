"""Calibration into ggml blocks: what steers the search, what is reported, interruptions and bad input."""

import copy
import json

import pytest
import torch
from lq_formats import ShapeError, UnsupportedError
from lq_torch import GGMLTensor, GGMLWeightOnlyConfig, Int4WeightOnlyConfig, load, quantize_, save_pretrained
from lq_torch.calibrate import gptq, imatrix
from torch import nn

transformers = pytest.importorskip("transformers")

VOCABULARY = 61
Q4_0 = GGMLWeightOnlyConfig("q4_0")


def make(**changes):
    """A random LLaMA, the channels of whose residual stream differ as in trained models."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCABULARY, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    config = transformers.LlamaConfig(
        **{**sizes, **heads, "initializer_range": 0.2, "max_position_embeddings": 64, **changes}
    )
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.model.embed_tokens.weight.data *= torch.randn(config.hidden_size, generator=generator).exp()
    return model


@pytest.fixture
def tokens():
    return torch.randint(1, VOCABULARY, (10, 24))


def entering(model, path, tokens):
    """Return ``(tokens, K)``: what enters a layer."""
    rows = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return torch.cat(rows).double()


def packed(model):
    found = {name: weight.data for name, weight in model.named_parameters() if isinstance(weight, GGMLTensor)}
    return {name: weight.blocks() for name, weight in found.items()}


def output_error(x, weight, exact):
    """Return the squared change of a layer's outputs, as a share."""
    y, wanted = (x @ w.double().t() for w in (weight, exact))
    return float((y - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(
    ("ggml_type", "sizes"),
    [("q4_0", {}), ("iq4_nl", {}), ("q4_k", {"hidden_size": 256, "intermediate_size": 256})],
    ids=["q4_0", "iq4_nl", "q4_k"],
)
def test_the_mean_square_of_what_enters_steers_the_search(ggml_type, sizes, tokens):
    """Layers that see the embedding's channels; bytes up to ties that the rounding of a sum of squares decides."""
    exact = make(**sizes)
    model, nearest = copy.deepcopy(exact), copy.deepcopy(exact)
    report = imatrix(model, tokens, GGMLWeightOnlyConfig(ggml_type), batch_size=3)
    quantize_(nearest, GGMLWeightOnlyConfig(ggml_type))
    assert report.fallbacks == ()
    assert {(layer.algorithm, layer.tokens) for layer in report.layers} == {("imatrix", tokens.numel())}
    assert {f"{layer.path}.weight" for layer in report.layers} == packed(nearest).keys() == packed(model).keys()
    by_path = {layer.path: layer for layer in report.layers}
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        x, w = entering(model, path, tokens), exact.get_submodule(path).weight.detach()
        expected = GGMLTensor.from_hp(w, ggml_type, x.square().mean(0).float()).blocks()
        assert (packed(model)[f"{path}.weight"] == expected).float().mean() > 0.99
        error = output_error(x, model.get_submodule(path).weight.dequantize(), w)
        assert by_path[path].error == pytest.approx(error, rel=1e-3)
        assert error < output_error(x, nearest.get_submodule(path).weight.dequantize(), w)


def test_a_report_is_json_and_layers_have_types_of_their_own(tokens, tmp_path):
    model = make()
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
    configs = {path: GGMLWeightOnlyConfig(("q4_0", "iq4_nl")[number % 2]) for number, path in enumerate(paths)}
    report = imatrix(model, tokens, configs)
    assert {path: model.get_submodule(path).weight.ggml_type for path in paths} == {
        path: config.ggml_type for path, config in configs.items()
    }
    assert {layer["bits_per_weight"] for layer in json.loads(report.to_json())["layers"]} == {4.5}
    assert "14 layers" in str(report)
    save_pretrained(model, tmp_path)
    assert torch.equal(load(tmp_path)(tokens).logits, model(tokens).logits)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tokens, tmp_path):
    whole, cut, resumed = make(), make(), make()
    imatrix(whole, tokens, Q4_0)

    def interrupt(done, total, layer):
        if done == 9:  # in the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imatrix(cut, tokens, Q4_0, resume=tmp_path, progress=interrupt)
    report = imatrix(resumed, tokens, Q4_0, resume=tmp_path)
    assert (report.resumed_blocks, len(report.layers)) == (1, 14)
    assert packed(resumed).keys() == packed(whole).keys()
    assert all(torch.equal(blocks, packed(whole)[name]) for name, blocks in packed(resumed).items())


class Gate(nn.Module):
    """Of two layers, one is never called."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return x + self.used(x)


class Gates(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.project = nn.Embedding(VOCABULARY, 64), nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Gate() for _ in range(2))

    def forward(self, ids):
        x = self.project(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        return x


def test_what_no_token_reaches_is_quantized_without_an_importance_and_named(tokens):
    model = Gates()
    nearest = copy.deepcopy(model)
    report = imatrix(model, tokens, Q4_0)
    quantize_(nearest, Q4_0)
    reasons = {layer.path: layer.note for layer in report.fallbacks}
    assert set(reasons) == {"project", "blocks.0.idle", "blocks.1.idle"}
    assert "no calibration token reaches it: quantized without data" in str(report)
    for path in reasons:
        assert torch.equal(packed(model)[f"{path}.weight"], packed(nearest)[f"{path}.weight"])


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        (GGMLWeightOnlyConfig("q8_0"), UnsupportedError, "model.layers.0.self_attn.q_proj: .* not q8_0"),
        (Int4WeightOnlyConfig(), UnsupportedError, "q4_0, iq4_nl, q4_k, q5_k, q6_k, not Int4WeightOnlyConfig"),
        (GGMLWeightOnlyConfig("q4_k"), ShapeError, "in_features=64"),
    ],
    ids=["no-search", "int4", "blocks"],
)
def test_what_takes_no_importance_is_refused_and_the_model_is_as_it_was(config, error, match, tokens):
    model = make()
    with pytest.raises(error, match=match):
        imatrix(model, tokens, config)
    assert packed(model) == {}
    with pytest.raises(UnsupportedError, match="imatrix for ggml types"):
        gptq(model, tokens, Q4_0)


@pytest.mark.gpu
@pytest.mark.parametrize("ggml_type", ["q4_0", "q4_k"])
def test_blocks_compute_on_a_gpu(ggml_type, tokens):
    """From host memory, one block at a time, and on the GPU throughout: the error of the host's run."""
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    config = GGMLWeightOnlyConfig(ggml_type)
    host, offloaded, device = make(**sizes), make(**sizes), make(**sizes).cuda()
    expected = imatrix(host, tokens, config)
    for model, options in ((offloaded, {"device": "cuda", "offload": True}), (device, {})):
        for layer, other in zip(imatrix(model, tokens, config, **options).layers, expected.layers, strict=True):
            assert layer.error == pytest.approx(other.error, rel=0.05)

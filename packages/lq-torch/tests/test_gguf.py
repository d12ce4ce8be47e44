"""GGUF files and transformers models: the same function from the same bits, and a named error for a file of another model.

One long file: every test goes from the same small trained models through the same files and back.
"""

import copy
import math
import os
import secrets
import struct
import textwrap
from pathlib import Path

import numpy
import pytest
import torch
from lq_formats import (
    GGML_FORMATS,
    DTypeError,
    FormatError,
    LQError,
    ShapeError,
    SpecError,
    UnsupportedError,
)
from lq_formats.gguf import GGUFValue, TensorSource, ValueType, open_gguf, write_gguf
from lq_torch import (
    GGMLTensor,
    GGMLWeightOnlyConfig,
    Int4WeightOnlyConfig,
    LowBitTensor,
    dequantize_,
    load,
    load_gguf,
    merge_linears,
    quantize_,
    save_gguf,
    save_pretrained,
)
from torch import nn

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

KINDS = ["llama", "mistral", "qwen2", "qwen3", "llama-bias", "llama-3.1", "llama-linear", "llama-untied"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
OPTIONS = {
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "llama-3.1": {"rope_parameters": LLAMA3},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}},
    "llama-untied": {"tie_word_embeddings": False},
}
PACKED = [name for name in GGML_FORMATS if name != "q8_1"]
TOKENS = torch.arange(30).view(2, 15) * 7 % 48


def build(kind="llama", dtype=torch.float32, seed=None, **options):
    """A small model with fresh weights; its heads are 32 wide, two of them share a key, and its width is not heads times 32."""
    values = {
        "vocab_size": 48,
        "hidden_size": 256,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64 if kind == "qwen2" else 32,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    } | OPTIONS.get(kind, {})
    torch.manual_seed(secrets.randbits(48) if seed is None else seed)
    config = transformers.AutoConfig.for_model(kind.partition("-")[0], **values | options)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms of 1 and biases of 0 would hide a wrong name
            nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def packed(model):
    return [name for name, value in model.named_parameters() if isinstance(value.data, LowBitTensor)]


def rewritten(path, metadata=None, tensors=None, drop=()):
    """Write a file anew with some values and tensors changed."""
    file = open_gguf(path)
    values = {key: value for key, value in file.metadata.items() if key not in drop} | (metadata or {})
    items = {
        name: TensorSource(info.type, info.shape, lambda name=name: file.blocks(name))
        if info.type.dtype is None
        else file.tensor(name)
        for name, info in file.tensors.items()
        if name not in drop
    } | (tensors or {})
    write_gguf(path.with_name("changed.gguf"), values, items)
    return path.with_name("changed.gguf")


@pytest.fixture
def saved(tmp_path):
    """A file of a quantized model, and that model."""
    model = build()
    quantize_(model, GGMLWeightOnlyConfig("q4_0"))
    save_gguf(model, tmp_path / "model.gguf")
    return tmp_path / "model.gguf", model


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_to_the_bit(kind, tmp_path):
    model = build(kind)
    quantize_(model, GGMLWeightOnlyConfig("q4_0"))
    save_gguf(model, tmp_path / "x.gguf")
    other = build(kind)
    assert load_gguf(tmp_path / "x.gguf", other) is other
    assert packed(other) == packed(model) != []
    assert torch.equal(logits(other), logits(model))
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == (kind != "llama-untied")
    save_gguf(other, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mistral"])
def test_a_model_is_built_from_the_file_alone(kind, tmp_path):
    model = build(kind)
    quantize_(model, GGMLWeightOnlyConfig("q8_0"))
    save_gguf(model, tmp_path / "x.gguf")
    other = load_gguf(tmp_path / "x.gguf", dtype=torch.float32)
    assert not other.training
    assert torch.equal(logits(other), logits(model))
    assert load_gguf(tmp_path / "x.gguf").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama-bias"])
def test_transformers_reads_the_same_weights(kind, tmp_path):
    """An oracle of names, permutation and metadata: the reader in transformers, which dequantizes and knows no biases."""
    model = build(kind, head_dim=128) if kind == "qwen3" else build(kind)  # it takes qwen3's usual head
    quantize_(model, GGMLWeightOnlyConfig("q8_0"))
    save_gguf(model, tmp_path / "x.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    dequantize_(model)
    ours, found = model.state_dict(), theirs.state_dict()
    assert ours.keys() == found.keys()
    for name, value in ours.items():
        assert torch.equal(value, found[name]), name
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(theirs.config, name) == getattr(model.config, name)


def test_gguf_py_reads_the_same_bytes(saved):
    path, _ = saved
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert len(theirs.tensors) == len(ours.tensors) == 20
    for tensor in theirs.tensors:
        assert tensor.data.tobytes() == ours.blocks(tensor.name).numpy().tobytes()
        assert tensor.tensor_type.name.lower() == ours.tensors[tensor.name].type.name
    assert theirs.fields["general.architecture"].contents() == "llama"
    assert theirs.fields["llama.attention.head_count_kv"].contents() == 2
    assert {t.name for t in theirs.tensors if t.tensor_type.name == "F32" and t.data.ndim == 1} == {
        "output_norm.weight",
        *(f"blk.{layer}.{name}_norm.weight" for layer in (0, 1) for name in ("attn", "ffn")),
    }


def interleave(w, heads):
    """llama.cpp's order of the rows of q and k, one row at a time."""
    size = len(w) // heads
    result = numpy.empty_like(w)
    for head in range(heads):
        for half in range(2):
            for pair in range(size // 2):
                result[head * size + 2 * pair + half] = w[head * size + half * size // 2 + pair]
    return result


@pytest.mark.parametrize("name", ["q4_0", "q5_1", "q8_0"])
def test_a_file_of_gguf_py_is_loaded(name, tmp_path):
    model = build()
    kind = gguf.GGMLQuantizationType[name.upper()]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(16384)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list([f"<{token}>" for token in range(48)])
    writer.add_bos_token_id(3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for path, value in model.state_dict().items():
        if path == "lm_head.weight":
            continue
        w = value.numpy()
        w = interleave(w, 4) if ".q_proj." in path else interleave(w, 2) if ".k_proj." in path else w
        place = names.get_name(path, try_suffixes=(".weight",))
        if w.ndim == 1:
            writer.add_tensor(place, w)
        elif "embed" in path:
            writer.add_tensor(place, w.astype(numpy.float16))
        else:
            writer.add_tensor(place, gguf.quants.quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    other = load_gguf(tmp_path / "x.gguf", build())
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.half().float()
    quantize_(model, GGMLWeightOnlyConfig(name))  # bytes as gguf-py's
    assert torch.equal(logits(other), logits(model))
    assert load_gguf(tmp_path / "x.gguf").config.bos_token_id == 3


def random_weight(name, rows, columns):
    """Blocks of any bytes, whose scales are small numbers."""
    form = GGML_FORMATS[name]
    blocks = torch.randint(0, 256, (rows, columns // form.block_size, form.type_size), dtype=torch.uint8)
    for offset in form.halves:
        blocks[..., offset : offset + 2] = (torch.rand(*blocks.shape[:-1], 1) * 1e-4).half().view(torch.uint8)
    if name == "mxfp4":
        blocks[..., 0] = 112
    return GGMLTensor({"qdata": blocks}, {"ggml_type": name}, (rows, columns), torch.float32)


@pytest.mark.parametrize("name", PACKED)
def test_blocks_of_every_type_stay_packed(name, tmp_path):
    options = {"intermediate_size": 256, "num_attention_heads": 8}
    model = build(**options)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            module.weight = nn.Parameter(random_weight(name, *module.weight.shape), requires_grad=False)
    embedding = nn.Parameter(random_weight(name, 48, 256), requires_grad=False)
    model.model.embed_tokens.weight = model.lm_head.weight = embedding
    save_gguf(model, tmp_path / "x.gguf")
    other = load_gguf(tmp_path / "x.gguf", build(**options))
    expected, found = dict(model.named_parameters()), dict(other.named_parameters())
    assert packed(other) == packed(model)
    assert len(packed(other)) == 15
    for path in packed(model):
        assert torch.equal(found[path].qdata, expected[path].qdata)
    assert torch.isfinite(logits(model)).all()
    assert torch.equal(logits(other), logits(model))
    dense = load_gguf(tmp_path / "x.gguf", build(**options), dequantize=(name,))
    for path, value in dense.named_parameters():
        assert torch.equal(value, expected[path].dequantize() if path in packed(model) else expected[path])
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    weight = gguf.quants.dequantize(theirs["blk.1.ffn_up.weight"].data, theirs["blk.1.ffn_up.weight"].tensor_type)
    assert torch.equal(torch.from_numpy(weight), expected["model.layers.1.mlp.up_proj.weight"].dequantize())


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_a_quantized_embedding_stays_packed_and_tied(name, tmp_path):
    model = build()
    quantize_(model, GGMLWeightOnlyConfig("q4_0"))
    embedding = GGMLTensor.from_hp(model.model.embed_tokens.weight.data, name)
    model.model.embed_tokens.weight = model.lm_head.weight = nn.Parameter(embedding, requires_grad=False)
    dense = copy.deepcopy(model)
    dense.model.embed_tokens.weight = nn.Parameter(embedding.dequantize())
    dense.lm_head.weight = model.lm_head.weight
    assert torch.equal(model.model.embed_tokens(TOKENS), embedding.dequantize()[TOKENS])
    assert torch.equal(logits(model), logits(dense))
    save_gguf(model, tmp_path / "x.gguf")
    other = load_gguf(tmp_path / "x.gguf", build())
    assert isinstance(other.model.embed_tokens.weight.data, GGMLTensor)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(logits(other), logits(model))
    save_pretrained(other, tmp_path / "folder")
    assert torch.equal(logits(load(tmp_path / "folder")), logits(model))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["q4_k", "q8_0"])
def test_on_hopper_only_what_is_multiplied_is_in_fragment_order(name, tied, tmp_path, monkeypatch):
    model = build(tie_word_embeddings=tied)
    quantize_(model, GGMLWeightOnlyConfig("q8_0"))
    embedding = nn.Parameter(GGMLTensor.from_hp(model.model.embed_tokens.weight.data, name), requires_grad=False)
    model.model.embed_tokens.weight = embedding
    if tied:
        model.lm_head.weight = embedding
    save_gguf(model, tmp_path / "x.gguf")
    monkeypatch.setattr("lq_torch.tensors.ggml.reads_fragments", lambda device: True)
    monkeypatch.setattr("lq_torch.tensors.ggml._DEVICES_OF_PLANES", ("cpu",))
    other = load_gguf(tmp_path / "x.gguf", dtype=torch.bfloat16)
    found = other.model.embed_tokens.weight
    assert (found.planes() is None) == tied
    assert torch.equal(found.blocks(), embedding.qdata)
    assert other.model.layers[0].mlp.up_proj.weight.fragments() is not None
    expected, wanted = logits(model), logits(other).float()
    assert (wanted - expected).norm() < 0.05 * expected.norm()


@pytest.mark.gpu
def test_a_model_goes_to_the_gpu_packed(tmp_path):
    model = build()
    quantize_(model, GGMLWeightOnlyConfig("q4_0"))
    embedding = GGMLTensor.from_hp(model.model.embed_tokens.weight.data, "q8_0")
    model.model.embed_tokens.weight = model.lm_head.weight = nn.Parameter(embedding, requires_grad=False)
    save_gguf(model, tmp_path / "x.gguf")
    other = load_gguf(tmp_path / "x.gguf", device="cuda", dtype=torch.float32)
    assert {value.device.type for value in (*other.parameters(), *other.buffers())} == {"cuda"}
    assert packed(other) == packed(model)
    expected, found = dict(model.named_parameters()), dict(other.named_parameters())
    for name in packed(model):
        assert torch.equal(found[name].to_tensors()["qdata"].cpu(), expected[name].qdata)
    assert torch.equal(other.model.embed_tokens(TOKENS.cuda()).cpu(), model.model.embed_tokens(TOKENS))
    with torch.no_grad():
        difference = other(TOKENS.cuda()).logits.cpu() - logits(model)
    assert difference.square().sum() < 1e-3 * logits(model).square().sum()  # activations may round to another code


def test_only_ggml_blocks_are_looked_up():
    model = build()
    layer = nn.Linear(256, 48, bias=False)
    quantize_(nn.Sequential(layer), Int4WeightOnlyConfig(128), lambda module, path: path == "0")
    model.model.embed_tokens.weight = layer.weight
    with pytest.raises(UnsupportedError, match="Int4Tensor"):
        logits(model)


def test_weights_lie_in_the_mapped_file(saved):
    path, model = saved
    other = load_gguf(path, build())
    if os.path.exists("/proc/self/maps"):
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
        for layer in other.model.layers:
            address = layer.mlp.down_proj.weight.qdata.data_ptr()
            assert any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)
    # The file may be replaced: the model keeps the old one.
    save_gguf(build(), path)
    assert torch.equal(logits(other), logits(model))


def test_dtype_and_buffers(saved):
    path, model = saved
    other = load_gguf(path, build(), dtype=torch.bfloat16)
    assert {value.dtype for value in other.parameters()} == {torch.bfloat16}
    weight, expected = other.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(weight.qdata, expected.qdata)
    assert torch.equal(other.model.norm.weight, model.model.norm.weight.bfloat16())
    with pytest.raises(DTypeError, match="float64"):
        load_gguf(path, build(), dtype=torch.float64)
    with torch.device("meta"):
        bare = transformers.AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(UnsupportedError, match=r"buffer.*on meta"):
        load_gguf(path, bare)


def test_types_that_cannot_stay_packed_are_dense_on_request_only(saved):
    path, model = saved
    norm = torch.randn(256)
    changed = rewritten(
        path, tensors={"output_norm.weight": TensorSource.packed("q8_0", GGML_FORMATS["q8_0"].quantize(norm))}
    )
    refused(changed, UnsupportedError, r"output_norm.weight is q8_0 and cannot stay packed.*dequantize=\('q8_0',\)")
    other = load_gguf(changed, build(), dequantize=["Q8_0"])
    form = GGML_FORMATS["q8_0"]
    assert torch.equal(other.model.norm.weight, form.dequantize(form.quantize(norm)))
    assert len(packed(other)) == 14
    assert packed(load_gguf(changed, build(), dequantize=("q8_0", "q4_0"))) == []
    with pytest.raises(SpecError, match=r"dequantize='q4_0': expected names in a collection, \('q4_0',\)"):
        load_gguf(path, build(), dequantize="q4_0")
    dense = load_gguf(path, build(), dequantize=("q4_0",))
    dequantize_(model)
    assert torch.equal(logits(dense), logits(model))
    with pytest.raises(SpecError, match="q9_9"):
        load_gguf(path, build(), dequantize=("q9_9",))


def test_a_type_that_lq_cannot_read(saved):
    path, _ = saved
    blocks = TensorSource.packed("iq2_xxs", torch.zeros(96, 1, 66, dtype=torch.uint8))
    refused(rewritten(path, tensors={"blk.0.ffn_up.weight": blocks}), UnsupportedError, "iq2_xxs, which lq cannot read")
    integers = torch.zeros(96, 256, dtype=torch.int8)
    refused(rewritten(path, tensors={"blk.0.ffn_up.weight": integers}), FormatError, "is i8")


def merged_model():
    model = build(num_attention_heads=2, num_key_value_heads=1, intermediate_size=64)
    quantize_(model, GGMLWeightOnlyConfig("q4_0"))
    merge_linears(model)
    return model


def refused(path, error, message, model=None):
    """Load into a model, which must raise and leave the model as it was."""
    model = build() if model is None else model
    before = {name: id(value) for name, value in model.named_parameters()}
    expected = logits(model)
    with pytest.raises(error, match=message):
        load_gguf(path, model)
    assert {name: id(value) for name, value in model.named_parameters()} == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 3),
        ("embedding_length", 128),
        ("feed_forward_length", 128),
        ("attention.head_count", 8),
        ("attention.head_count_kv", 4),
        ("attention.head_count_kv", [2, 2]),
        ("attention.key_length", 64),
        ("attention.value_length", 64),
        ("attention.layer_norm_rms_epsilon", 1e-5),
        ("rope.dimension_count", 16),
        ("rope.freq_base", 20000.0),
        ("rope.freq_base", "10000"),
        ("rope.scaling.factor", 4.0),
        ("rope.scale_linear", 4.0),
        ("attention.sliding_window", 64),
    ],
)
def test_other_hyperparameters_are_refused(key, value, saved):
    path, _ = saved
    stated = "rope.scaling.(type|factor)" if key in ("rope.scale_linear", "rope.scaling.factor") else key
    refused(rewritten(path, {f"llama.{key}": value}), FormatError, f"llama.{stated} = .*compute something else")


def test_parts_and_experts_are_refused(saved):
    path, _ = saved
    part = rewritten(path, {"split.count": GGUFValue(ValueType.UINT16, 3), "split.no": GGUFValue(ValueType.UINT16, 0)})
    refused(part, UnsupportedError, r"one of 3 files.*--merge")
    refused(rewritten(path, {"llama.expert_count": 8}), UnsupportedError, "mixture of experts")
    assert logits(load_gguf(rewritten(path, {"llama.expert_count": 0, "split.count": 1}))).shape == (2, 15, 48)


def test_yarn_is_refused(saved):
    path, _ = saved
    changed = rewritten(path, {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0})
    refused(changed, FormatError, "scaling.type = 'yarn'")
    with pytest.raises(UnsupportedError, match="'yarn'"):
        load_gguf(changed)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
    refused(path, UnsupportedError, "rope_type='yarn'", build(rope_parameters=yarn))


def test_defaults_of_metadata_that_is_left_out(tmp_path):
    model = build(num_attention_heads=8, num_key_value_heads=8)  # the width is now heads times size
    save_gguf(model, tmp_path / "x.gguf")
    optional = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count")
    drop = [f"llama.{key}" for key in (*optional, "rope.freq_base", "vocab_size", "context_length")]
    other = load_gguf(rewritten(tmp_path / "x.gguf", drop=drop), build(num_attention_heads=8, num_key_value_heads=8))
    assert torch.equal(logits(other), logits(model))
    for key in ("block_count", "attention.layer_norm_rms_epsilon"):
        refused(rewritten(tmp_path / "x.gguf", drop=[f"llama.{key}"]), FormatError, f"lacks the metadata llama.{key}")


def test_scaled_frequencies_must_agree(saved, tmp_path):
    path, _ = saved
    unscaled = {"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}
    refused(path, FormatError, "has no tensor 'rope_freqs", build(**unscaled))
    scaled = tmp_path / "scaled.gguf"
    save_gguf(build("llama-3.1"), scaled)
    factors = open_gguf(scaled).tensor("rope_freqs.weight").clone()
    base = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    inverse = build("llama-3.1").model.rotary_emb.inv_freq
    torch.testing.assert_close(base / factors, inverse, rtol=1e-5, atol=0)
    assert factors[0] == 1
    assert factors[-1] == 8
    refused(scaled, FormatError, r"rope\.freq_base", build(**unscaled))
    other = {"rope_parameters": LLAMA3 | {"factor": 32.0}}
    refused(scaled, FormatError, "divides rotary frequency", build(**other))
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    refused(scaled, FormatError, "has a tensor 'rope_freqs", build(**plain))
    factors[3] = float("nan")
    changed = rewritten(scaled, tensors={"rope_freqs.weight": factors})
    refused(changed, FormatError, "frequency 3 by nan", build("llama-3.1"))
    with pytest.raises(UnsupportedError, match="otherwise than Llama 3"):
        load_gguf(changed)
    refused(rewritten(scaled, tensors={"rope_freqs.weight": factors[:5]}), FormatError, "expected", build("llama-3.1"))


def test_tensors_must_be_the_models(saved):
    path, _ = saved
    refused(rewritten(path, drop=["blk.1.attn_v.weight"]), FormatError, r"lacks 1 tensors.*blk\.1\.attn_v\.weight")
    refused(rewritten(path, tensors={"blk.0.x.weight": torch.zeros(4)}), FormatError, r"lacks.*blk\.0\.x\.weight")
    refused(rewritten(path, tensors={"blk.0.attn_q.bias": torch.zeros(128)}), FormatError, r"attn_q\.bias")
    refused(rewritten(path, tensors={"output_norm.weight": torch.zeros(128)}), ShapeError, r"\(256,\).*\(128,\)")
    refused(rewritten(path, tensors={"token_embd.weight": torch.zeros(256, 48)}), ShapeError, "token_embd")
    refused(path, FormatError, "output is its embedding.*set tie_word_embeddings", build("llama-untied"))
    changed = rewritten(path, tensors={"output.weight": torch.zeros(48, 256)})
    refused(changed, FormatError, "output is not its embedding: clear tie_word_embeddings")


def test_models_must_be_the_files(saved):
    path, _ = saved
    refused(path, FormatError, "'llama', and qwen2 is 'qwen2'", build("qwen2"))
    refused(rewritten(path, drop=["general.architecture"]), FormatError, "architecture None")
    with pytest.raises(UnsupportedError, match="Sequential is of model type None"):
        load_gguf(path, nn.Sequential(nn.Linear(4, 4)))
    refused(path, UnsupportedError, "hidden_act='gelu'", build(hidden_act="gelu"))
    merged = merged_model()
    with pytest.raises(UnsupportedError, match="merged"):
        load_gguf(path, merged)
    wrapped = build()
    wrapped.model.adapter = nn.Linear(2, 2)
    refused(path, UnsupportedError, "model.adapter.weight' has no place", wrapped)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, FormatError, "truncated")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"general.architecture": "mamba"}, UnsupportedError, "architecture 'mamba'"),
        ({"llama.block_count": 2**31}, FormatError, "lacks the tensor blk.2147483647"),
        ({"llama.block_count": 0}, FormatError, "block_count = 0"),
        ({"llama.block_count": "2"}, FormatError, "block_count = '2'"),
        ({"llama.embedding_length": 2**31}, FormatError, "token_embd.weight has shape"),
        ({"llama.feed_forward_length": 2**31}, FormatError, "ffn_up.weight has shape"),
        ({"llama.attention.head_count": 2**31}, FormatError, "attn_q.weight has shape"),
        ({"llama.attention.head_count_kv": [2, 2]}, FormatError, "head_count_kv = array"),
        ({"llama.attention.key_length": 2**31}, FormatError, "attn_q.weight has shape"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, FormatError, "epsilon = nan"),
        ({"llama.rope.freq_base": 0.0}, FormatError, "freq_base = 0.0"),
        ({"llama.attention.layer_norm_rms_epsilon": True}, FormatError, "epsilon = True"),
        (
            {"llama.context_length": GGUFValue(ValueType.UINT64, 2**63)},
            FormatError,
            "context_length = 9223372036854775808",
        ),
    ],
)
def test_a_model_of_lies_is_not_built(changes, error, message, saved):
    path, _ = saved
    with pytest.raises(error, match=message):
        load_gguf(rewritten(path, changes))


WEIRD = (0, -1, 7, 2**31, 2**63 - 1, 0.0, -1.0, 1e300, math.nan, math.inf, "", "linear", True, [1, 2], [0.5], ["a"])


def test_any_value_of_any_key_is_an_error_or_a_model(saved):
    """Transformers is asked for no model that the tensors do not bear out: that would be slow, or an error without a name."""
    path, _ = saved
    keys = [key for key in open_gguf(path).metadata if not key.startswith("tokenizer.")]
    target, refusals = build(), 0
    for key in [*keys, "llama.rope.scaling.type", "llama.rope.scaling.factor", "split.count", "llama.expert_count"]:
        for value in WEIRD:
            typed = GGUFValue(ValueType.FLOAT64, value) if isinstance(value, float) else value
            changed = rewritten(path, {key: typed})
            for place in (None, target):
                try:
                    load_gguf(changed, place)
                except LQError:
                    refusals += 1
    assert refusals > 300


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "x.gguf"
    model = build()
    quantize_(model, Int4WeightOnlyConfig(32))
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight is quantized as Int4Tensor.*GGMLWeightOnlyConfig"):
        save_gguf(model, path)
    model = build()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(GGMLTensor.from_hp(layer.weight.data, "q8_1"), requires_grad=False)
    with pytest.raises(UnsupportedError, match="quantized as q8_1"):
        save_gguf(model, path)
    with pytest.raises(DTypeError, match="float64"):
        save_gguf(build(dtype=torch.float64), path)
    with pytest.raises(UnsupportedError, match="meta"):
        save_gguf(build().to("meta"), path)
    with pytest.raises(UnsupportedError, match="model type None"):
        save_gguf(nn.Linear(4, 4), path)
    with pytest.raises(UnsupportedError, match="merged"):
        save_gguf(merged_model(), path)
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_the_user(tmp_path):
    path = tmp_path / "x.gguf"
    model = build()
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"], "general.name": "mine"}
    save_gguf(model, path, tokens | {"llama.block_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-6})
    file = open_gguf(path)
    assert file.get("tokenizer.ggml.model") == "gpt2"
    assert list(file.get("tokenizer.ggml.tokens")) == ["a", "b"]
    assert file.get("general.name") == "mine"
    save_gguf(model, tmp_path / "again.gguf", file.metadata)
    assert open_gguf(tmp_path / "again.gguf").metadata.keys() == file.metadata.keys()
    with pytest.raises(SpecError, match=r"llama\.block_count = 3, and the model 2"):
        save_gguf(model, path, {"llama.block_count": 3})
    save_gguf(model, path)
    assert open_gguf(path).get("tokenizer.ggml.model") == "none"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_dense_weights_keep_their_dtype_and_vectors_become_float32(dtype, tmp_path):
    model = build(dtype=dtype)
    save_gguf(model, tmp_path / "x.gguf")
    infos = open_gguf(tmp_path / "x.gguf").tensors.values()
    assert {info.type.dtype for info in infos if len(info.shape) == 2} == {dtype}
    assert {info.type.dtype for info in infos if len(info.shape) == 1} == {torch.float32}
    assert torch.equal(logits(load_gguf(tmp_path / "x.gguf", build(dtype=dtype))), logits(model))


def test_float32_is_read_as_written(saved):
    path, _ = saved
    assert (
        open_gguf(path).get("llama.attention.layer_norm_rms_epsilon") == struct.unpack("f", struct.pack("f", 1e-6))[0]
    )
    assert load_gguf(path).config.rms_norm_eps == 1e-6


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
def test_loading_peaks_below_1_15_of_the_file(tmp_path, run_script):
    """Load, then touch every weight: q and k are copied, norms and an F16 embedding converted, all else stays in the file."""

    def save(path, width, layers):
        tensors = {"token_embd.weight": torch.ones(4096, width).half(), "output_norm.weight": torch.ones(width)}
        blocks = torch.randint(1, 64, (2 * width, width // 32, 18), dtype=torch.uint8)
        for layer in range(layers):
            for name in ("attn_norm", "ffn_norm"):
                tensors[f"blk.{layer}.{name}.weight"] = torch.ones(width)
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                tensors[f"blk.{layer}.{name}.weight"] = TensorSource.packed("q4_0", blocks[:width])
            for name in ("ffn_gate", "ffn_up"):
                tensors[f"blk.{layer}.{name}.weight"] = TensorSource.packed("q4_0", blocks)
            tensors[f"blk.{layer}.ffn_down.weight"] = TensorSource.packed("q4_0", blocks.view(width, -1, 18))
        values = {
            "block_count": layers,
            "embedding_length": width,
            "feed_forward_length": 2 * width,
            "attention.head_count": width // 64,
            "attention.layer_norm_rms_epsilon": 1e-5,
        }
        metadata = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in values.items()}}
        write_gguf(path, metadata, tensors)

    save(tmp_path / "large", 2048, 5)
    save(tmp_path / "small", 256, 1)
    script = textwrap.dedent("""
        import os, sys, torch
        from lq_torch import LowBitTensor, load_gguf
        def touch(model):
            for value in model.parameters():
                parts = value.inner_tensors().values() if isinstance(value.data, LowBitTensor) else [value]
                assert all(float(part.detach().view(torch.uint8).max()) > 0 for part in parts)
        def peak():
            return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
        touch(load_gguf(sys.argv[1] + "/small"))  # imports what loading needs, once a process
        before = peak()
        model = load_gguf(sys.argv[1] + "/large")
        loaded = peak()
        touch(model)
        size = os.path.getsize(sys.argv[1] + "/large")
        print(size, (loaded - before) / size, (peak() - before) / size)
    """)
    size, loaded, touched = map(float, run_script(script, tmp_path).split())
    assert size > 100e6
    assert loaded < 0.6  # most of the file has not been looked at
    assert 0.9 < touched < 1.15


def test_a_dequantized_tied_model_is_saved_as_a_tied_one(saved, tmp_path):
    file, _ = saved
    model = load_gguf(file)
    model.model.embed_tokens.weight = nn.Parameter(
        GGMLTensor.from_hp(torch.randn(48, 256), "q8_0"), requires_grad=False
    )
    model.lm_head.weight = model.model.embed_tokens.weight
    dequantize_(model, torch.float32)
    assert packed(model) == []
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_gguf(model, tmp_path / "dense.gguf")
    assert "output.weight" not in open_gguf(tmp_path / "dense.gguf").tensors
    again = load_gguf(tmp_path / "dense.gguf", dtype=torch.float32)
    assert again.config.tie_word_embeddings
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("window", [4, 4096])
def test_the_sliding_window_of_mistral_is_read_back(window, tmp_path):
    model = build("mistral", sliding_window=window)
    save_gguf(model, tmp_path / "model.gguf")
    back = load_gguf(tmp_path / "model.gguf", dtype=torch.float32)
    assert type(back) is type(model)
    assert back.config.sliding_window == window
    assert torch.equal(logits(back), logits(model))
    wider = build("mistral", sliding_window=None)
    with pytest.raises(FormatError, match="sliding_window"):
        load_gguf(tmp_path / "model.gguf", wider)
    assert torch.equal(logits(load_gguf(tmp_path / "model.gguf", dtype=torch.float32)), logits(model))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_the_sliding_window_of_qwen_needs_the_model(kind, tmp_path):
    """Files do not say from which layer on, so the configuration has to come from elsewhere."""
    model = build(kind, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    save_gguf(model, tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="sliding_window = 4"):
        load_gguf(tmp_path / "model.gguf")
    assert torch.equal(logits(load_gguf(tmp_path / "model.gguf", copy.deepcopy(model))), logits(model))

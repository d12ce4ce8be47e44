"""Hugging Face models: built without weights from what was saved, right to the bit, tied and rotary parts included."""

import copy
import json
import sys

import pytest
import torch
from lq_formats import FormatError, MissingPackageError, StorageError
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    LowBitTensor,
    dequantize_,
    export_pretrained,
    import_pretrained,
    load,
    quantize_,
    save_pretrained,
)

transformers = pytest.importorskip("transformers")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def tiny(kind="LlamaForCausalLM", dtype=torch.float32, **changes):
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **changes,
    )
    torch.manual_seed(0)
    return getattr(transformers, kind)._from_config(config, dtype=dtype).eval()


TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model):
    return model(TOKENS.to(model.device))[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        Int4WeightOnlyConfig(32),
        Int4WeightOnlyConfig(-1, symmetric=False),
        Int8WeightOnlyConfig(),
        GGMLWeightOnlyConfig(),
    ],
    ids=["int4-g32-sym", "int4-row-asym", "int8-row", "q4_0"],
)
def test_a_model_saved_and_built_anew_is_the_same_function(config, dtype, device, tmp_path):
    model = tiny(dtype=dtype).to(device)
    quantize_(model, config)
    assert sum(isinstance(p, LowBitTensor) for p in model.parameters()) == 14
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path, device=device)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert {value.device.type for value in (*loaded.parameters(), *loaded.buffers())} == {device}
    assert torch.equal(outputs(loaded), outputs(model))
    again = loaded.generate(TOKENS.to(device), max_new_tokens=5, do_sample=False)
    assert torch.equal(again, model.generate(TOKENS.to(device), max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize(
    "kind", ["LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification"]
)
def test_the_class_that_was_saved_is_built(kind, tmp_path):
    model = tiny(kind)
    architectures = copy.copy(model.config.architectures)
    quantize_(model, Int8WeightOnlyConfig())
    save_pretrained(model, tmp_path)
    assert model.config.architectures == architectures
    loaded = load(tmp_path)
    assert type(loaded).__name__ == kind
    assert torch.equal(outputs(loaded), outputs(model))


def test_rotary_frequencies_are_those_of_the_model(tmp_path):
    model = tiny(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0})
    quantize_(model, Int4WeightOnlyConfig(32))
    save_pretrained(model, tmp_path)
    saved, built = dict(model.named_buffers()), dict(load(tmp_path).named_buffers())
    assert saved.keys() == built.keys()
    assert any("inv_freq" in name for name in saved)
    for name, buffer in saved.items():
        assert torch.equal(built[name], buffer)


def test_a_quantized_model_compiles_into_one_graph():
    model = tiny()
    quantize_(model, Int4WeightOnlyConfig(32))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, model(TOKENS).logits)


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path):
    model = tiny(tie_word_embeddings=True)
    quantize_(model, Int8WeightOnlyConfig())
    assert not isinstance(model.lm_head.weight, LowBitTensor)
    save_pretrained(model, tmp_path)
    index = json.loads((tmp_path / "lq.json").read_text())
    assert index["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(outputs(loaded), outputs(model))


def test_generation_settings_come_back(tmp_path):
    model = tiny()
    model.generation_config.max_new_tokens = 3
    quantize_(model, Int8WeightOnlyConfig())
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path)
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.generate(TOKENS, do_sample=False).shape == (2, 12)


def test_building_allocates_no_parameters(tmp_path):
    from lq_torch.integrations.transformers import build_model

    save_pretrained(tiny(), tmp_path)
    model = build_model(tmp_path)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    assert isinstance(torch.nn.Linear(2, 2).weight, torch.nn.Parameter)
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["pipeline"]},
        {"architectures": ["BertModel"]},
        {"architectures": [7]},
        {"architectures": None},
    ],
    ids=["function", "other-model", "number", "none"],
)
def test_only_a_model_class_of_the_config_is_called(change, tmp_path):
    model = tiny()
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        loaded = load(tmp_path)
    except FormatError:  # transformers may refuse the value itself
        return
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": "no-such-model"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_config_that_builds_nothing_is_refused(text, tmp_path):
    save_pretrained(tiny(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match="config"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FormatError, match="no config"):
        load(tmp_path)


def test_a_config_of_other_sizes_is_refused(tmp_path):
    save_pretrained(tiny(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(FormatError, match=r"lacks 9 tensors of the model, among them \['model\.layers\.2"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(FormatError, match="has 9 tensors that the model lacks"):
        load(tmp_path)


def test_without_transformers_the_error_says_what_to_install(tmp_path, monkeypatch):
    save_pretrained(tiny(), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"lq-torch\[hf\]"):
        load(tmp_path)


def test_importing_lq_torch_imports_no_optional_package(run_script):
    script = "import sys, lq_torch; print([m for m in ('transformers', 'gemlite', 'gguf', 'accelerate') if m in sys.modules])"
    assert run_script(script).strip() == "[]"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_the_dtype_is_saved_and_comes_back(dtype, tmp_path):
    model = tiny(dtype=dtype)
    said = model.config.dtype = torch.float32 if dtype == torch.float16 else None  # wrong, or nothing
    quantize_(model, Int4WeightOnlyConfig(32, scale_dtype=torch.float16))
    export_pretrained(model, tmp_path / "gptq")
    save_pretrained(model, tmp_path / "lq")
    assert model.config.dtype == said
    for folder, back in (("gptq", import_pretrained), ("lq", load)):
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        loaded = back(tmp_path / folder)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert loaded.config.dtype == dtype
        assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    "config",
    [Int4WeightOnlyConfig(32), Int8WeightOnlyConfig(), GGMLWeightOnlyConfig("q4_0")],
    ids=["int4", "int8", "q4_0"],
)
def test_who_writes_blocks_of_memory_is_told_what_saves_quantized_weights(config, tmp_path):
    model = tiny()
    quantize_(model, config)
    safetensors = pytest.importorskip("safetensors.torch")
    for save in (
        lambda: model.save_pretrained(tmp_path),
        lambda: safetensors.save_file(dict(model.state_dict()), tmp_path / "x.safetensors"),
        lambda: safetensors.save_model(model, tmp_path / "x.safetensors"),
        lambda: model.model.layers[0].mlp.up_proj.weight.storage(),
    ):
        with pytest.raises(StorageError, match=r"lq_torch\.save_pretrained\(model, folder\)"):
            save()
    assert not list(tmp_path.glob("*.safetensors"))


def test_hugging_face_saves_what_is_dense_again(tmp_path):
    model = tiny(tie_word_embeddings=True)
    quantize_(model, Int4WeightOnlyConfig(32))
    dequantize_(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    "config",
    [Int4WeightOnlyConfig(32), Int8WeightOnlyConfig(), GGMLWeightOnlyConfig("q8_0")],
    ids=["int4", "int8", "q8_0"],
)
def test_accelerate_offloads_quantized_weights(config):
    """It moves parameters to meta and back, and makes each of its class: ``type(parameter)(value, requires_grad=...)``."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny()
    quantize_(model, config)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        accelerate.cpu_offload(model, execution_device="cpu")
        weight = model.model.layers[0].mlp.up_proj.weight
        assert isinstance(weight, LowBitTensor)
        assert isinstance(weight, torch.nn.Parameter)
        assert weight.is_meta
        assert torch.equal(model(ids).logits, expected)

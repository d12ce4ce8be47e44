import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from lq_eval.data import tiny_llama_path
from lq_eval.errors import ModelLoadError
from lq_eval.evaluate import quantized_copy
from lq_eval.models import context_length, default_device, default_dtype, load_model, model_size, read_weight
from lq_eval.schemes import parse_scheme
from lq_formats import DTypeError, SpecError
from lq_torch import export_pretrained

NAME = "model.layers.0.mlp.up_proj.weight"


def test_size_counts_what_is_saved(tiny):
    dense = model_size(tiny.model)
    assert dense.total_bytes == 2 * sum(parameter.numel() for parameter in tiny.model.parameters())
    assert dense.linear_weights == 0
    packed = model_size(quantized_copy(tiny.model, parse_scheme("int4-g128", torch.float16)))
    assert packed.bits_per_weight == 4.125
    assert packed.total_bytes == dense.total_bytes - 2 * packed.linear_weights + packed.linear_bytes


def test_size_counts_buffers_that_are_saved_once():
    """Integers as they are, floats as those of parameters."""
    model = torch.nn.ModuleList([torch.nn.Linear(4, 2, bias=False), torch.nn.Identity()])
    shared = torch.zeros(16)
    for module in model:
        module.register_buffer("shared", shared)
        module.register_buffer("absent", None)
    model[1].register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    model[1].register_buffer("cache", torch.zeros(100), persistent=False)
    model[1].register_parameter("weight", model[0].weight)
    for dense_bytes in (2, 4):
        assert model_size(model, dense_bytes).total_bytes == (8 + 16) * dense_bytes + 3 * 8


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (None, None),
        ({}, None),
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": None, "n_positions": 512}, 512),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": "long"}, None),
        ({"text_config": SimpleNamespace(max_position_embeddings=64)}, 64),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default"}}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 16384),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
    ],
)
def test_the_context_is_what_the_configuration_says(config, length):
    model = torch.nn.Linear(2, 2)
    if config is not None:
        model.config = SimpleNamespace(**config)
    assert context_length(model) == length


def test_quantizing_a_copy_leaves_the_model_alone(tiny):
    before = tiny.model.model.layers[0].mlp.up_proj.weight
    quantized_copy(tiny.model, parse_scheme("int8"))
    assert tiny.model.model.layers[0].mlp.up_proj.weight is before


def test_one_weight_is_read_without_the_model():
    w = read_weight(tiny_llama_path(), NAME)
    assert tuple(w.shape) == (768, 256)
    with pytest.raises(ModelLoadError, match=r"up_proj"):
        read_weight(tiny_llama_path(), "layers.9.up_proj.weight")
    with pytest.raises(ModelLoadError, match="safetensors"):
        read_weight(tiny_llama_path().parent, NAME)


@pytest.mark.parametrize("source", ["/no/such/folder", "./absent"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(source):
    with pytest.raises(ModelLoadError, match="there is no folder"):
        load_model(source, device=torch.device("cpu"), dtype=torch.float32)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=r"cannot load the folder .* it has no config.json"):
        load_model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def foreign_weights(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 5000)


def other_sizes(folder):
    change_config(folder, intermediate_size=1536)


def more_layers(folder):
    change_config(folder, num_hidden_layers=5)


def no_sizes(folder):
    change_config(folder, hidden_size="wide")


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (cut_weights, "incomplete metadata"),
        (foreign_weights, "header too large"),
        (
            other_sizes,
            r"down_proj.weight is 256x768 in the files and 256x1536 by config.json \(11 more weights differ\)",
        ),
        (more_layers, "the files lack model.layers.4.input_layernorm.weight and 8 more"),
        (no_sizes, "hidden_size"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_model_is_named(tmp_path, damage, match):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama_path(), folder)
    damage(folder)
    with pytest.raises(ModelLoadError, match=f"cannot load the folder .*{match}"):
        load_model(folder, device=torch.device("cpu"), dtype=torch.float32)


def test_a_folder_of_another_library_is_read(tiny, tmp_path):
    model = quantized_copy(tiny.model, parse_scheme("int4-g128", torch.float16))
    export_pretrained(model, tmp_path, "awq")
    tiny.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    assert loaded.quantized
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens).logits, model.float()(tokens).logits, rtol=1e-4, atol=1e-4)


def test_device_and_dtype_defaults():
    assert default_device("cpu") == torch.device("cpu")
    assert default_dtype(None, torch.device("cpu")) is torch.float32
    assert default_dtype(None, torch.device("cuda")) is torch.bfloat16
    with pytest.raises(SpecError, match="unknown device"):
        default_device("tpu?")
    with pytest.raises(SpecError, match="CUDA GPUs"):
        default_device("cuda:99")
    for other in ("mps", "xpu", "meta", "meta:0"):
        with pytest.raises(SpecError, match=f"device '{other}': lq-eval measures on cpu and cuda only"):
            default_device(other)
    with pytest.raises(DTypeError, match="int3"):
        default_dtype("int3", torch.device("cpu"))

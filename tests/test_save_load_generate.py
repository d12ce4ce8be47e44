"""Float model -> quantize_ -> save_pretrained -> load -> the same logits and the same tokens, across all packages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    LowBitTensor,
    load,
    quantize_,
    save_pretrained,
)
from lq_torch.config import WeightConfig
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

HIDDEN, INTERMEDIATE, VOCABULARY = 64, 96, 61
CONFIGS: dict[str, WeightConfig] = {
    "int4-g32-sym": Int4WeightOnlyConfig(group_size=32),
    "int4-row-asym": Int4WeightOnlyConfig(group_size=-1, symmetric=False),
    "int8-row": Int8WeightOnlyConfig(),
    "int8-tensor": Int8WeightOnlyConfig(granularity="tensor"),
    "q4_0": GGMLWeightOnlyConfig("q4_0"),
    "q5_1": GGMLWeightOnlyConfig("q5_1"),
    "q8_0": GGMLWeightOnlyConfig("q8_0"),
}
LINEARS = 2 * 7  # q, k, v, o, gate, up, down of two layers; the head stays as it is


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Return a maker of random two-layer LLaMAs of 0.3 MB."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            # Wide enough that the logits of a random model differ, and greedy decoding has no near ties.
            initializer_range=0.2,
        )
        torch.manual_seed(seed)
        # Not .to(dtype): it would round the rotary frequencies too, which no checkpoint holds.
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return make


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def _logits(model: Any, prompt: Tensor) -> Tensor:
    result: Tensor = model(input_ids=prompt).logits
    return result


@torch.inference_mode()
def _greedy(model: Any, prompt: Tensor) -> list[list[int]]:
    mask = torch.ones_like(prompt)
    tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=True)
    result: list[list[int]] = tokens.tolist()
    return result


def _low_bit(model: nn.Module) -> dict[str, LowBitTensor]:
    weights = {path: module.weight for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {path: weight for path, weight in weights.items() if isinstance(weight, LowBitTensor)}


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", CONFIGS)
def test_loaded_model_equals_the_saved_one(
    name: str, tiny_llama: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    model = tiny_llama()
    quantize_(model, CONFIGS[name])
    assert len(_low_bit(model)) == LINEARS
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path)
    assert {path: type(weight) for path, weight in _low_bit(loaded).items()} == {
        path: type(weight) for path, weight in _low_bit(model).items()
    }
    assert torch.equal(_logits(loaded, prompt), _logits(model, prompt))
    assert _greedy(loaded, prompt) == _greedy(model, prompt)


@pytest.mark.parametrize("name", ["int4-g32-sym", "int8-row", "q4_0"])
def test_load_into_a_given_model_replaces_its_values(
    name: str, tiny_llama: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    model = tiny_llama()
    quantize_(model, CONFIGS[name])
    save_pretrained(model, tmp_path)
    other = tiny_llama(seed=1)
    assert not torch.equal(_logits(other, prompt), _logits(model, prompt))
    loaded = load(tmp_path, model=other)
    assert torch.equal(_logits(loaded, prompt), _logits(model, prompt))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_models_keep_their_dtype(
    dtype: torch.dtype, tiny_llama: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    model = tiny_llama(dtype=dtype)
    quantize_(model, CONFIGS["int4-g32-sym"])
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(_logits(loaded, prompt), _logits(model, prompt))


def test_tied_embeddings_stay_tied_and_dense(tiny_llama: Callable[..., Any], prompt: Tensor, tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    quantize_(model, CONFIGS["int8-row"])
    save_pretrained(model, tmp_path)
    loaded: Any = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(_logits(loaded, prompt), _logits(model, prompt))


@pytest.mark.parametrize("name", ["int4-g32-sym", "q4_0"])
def test_four_bits_are_near_the_float_model_and_smaller_on_disk(
    name: str, tiny_llama: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    model = tiny_llama()
    dense = sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
    rest = sum(p.numel() * p.element_size() for p in model.parameters()) - dense
    before = _logits(model, prompt)
    quantize_(model, CONFIGS[name])
    after = _logits(model, prompt)
    assert torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.8
    save_pretrained(model, tmp_path)
    # 4.5 or 5 bits of 32, and headers.
    assert _folder_bytes(tmp_path) < rest + 0.17 * dense + 16_384


def test_saved_files_are_data_only(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    quantize_(model, CONFIGS["int4-g32-sym"])
    save_pretrained(model, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json"}
    assert "config.json" in names
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4-g32-sym", "int8-row", "q4_0"])
def test_model_saved_on_the_gpu_loads_anywhere(
    name: str, tiny_llama: Callable[..., Any], prompt: Tensor, tmp_path: Path
) -> None:
    model = tiny_llama(dtype=torch.bfloat16).cuda()
    quantize_(model, CONFIGS[name])
    save_pretrained(model, tmp_path)
    there = load(tmp_path, device="cuda")
    assert torch.equal(_logits(there, prompt.cuda()), _logits(model, prompt.cuda()))
    assert _greedy(there, prompt.cuda()) == _greedy(model, prompt.cuda())
    here = load(tmp_path)
    for path, weight in _low_bit(here).items():
        assert torch.equal(weight.dequantize(), _low_bit(model)[path].dequantize().cpu())

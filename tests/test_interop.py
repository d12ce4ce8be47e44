"""A trained model -> quantize_ -> another library's files -> import_pretrained -> the same logits, across all packages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lq_eval.data import tiny_llama_path
from lq_torch import Int4WeightOnlyConfig, export_pretrained, import_pretrained, load, quantize_, save_pretrained

transformers = pytest.importorskip("transformers")

SYMMETRIC = Int4WeightOnlyConfig(128)
INTEGER_ZEROS = Int4WeightOnlyConfig(128, symmetric=False, int4_choose_qparams_algorithm="rtn")
FLOAT_ZEROS = Int4WeightOnlyConfig(32, symmetric=False)


@pytest.fixture(scope="module")
def trained() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_path(), dtype=torch.bfloat16).eval()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gptq", SYMMETRIC),
        ("gptq_v2", INTEGER_ZEROS),
        ("awq", INTEGER_ZEROS),
        ("compressed-tensors", SYMMETRIC),
        ("hqq", FLOAT_ZEROS),
        ("auto-round", SYMMETRIC),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trained_model_comes_back_to_the_bit(name: str, config: Any, trained: Any, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_path(), dtype=torch.bfloat16).eval()
    quantize_(model, config)
    export_pretrained(model, tmp_path / "theirs", name)
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == name.removesuffix("_v2")
    back = import_pretrained(tmp_path / "theirs")
    save_pretrained(back, tmp_path / "ours")
    again = load(tmp_path / "ours")
    tokens = torch.arange(3, 67)[None]
    with torch.inference_mode():
        logits = model(tokens).logits
        assert torch.equal(back(tokens).logits, logits)
        assert torch.equal(again(tokens).logits, logits)
        float_logits = trained(tokens).logits
    # Quantized, and still the model that was trained.
    difference = torch.nn.functional.kl_div(
        logits.float().log_softmax(-1), float_logits.float().log_softmax(-1), log_target=True, reduction="sum"
    )
    assert 0 < float(difference) / 64 < 0.5

"""A trained model -> quantize_ -> a GGUF file -> load_gguf -> the same logits and the same file, across all packages."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lq_eval.data import eval_text_path, tiny_llama_path
from lq_formats.gguf import open_gguf
from lq_torch import GGMLTensor, GGMLWeightOnlyConfig, load, load_gguf, quantize_, save_gguf, save_pretrained
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")


def trained() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_path(), dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_path())
    ids: Tensor = tokenizer(eval_text_path().read_text()[:2000], return_tensors="pt")["input_ids"][:, :256]
    return ids


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


@pytest.mark.exhaustive(where=lambda name: name == "iq4_nl")
@pytest.mark.parametrize("name", ["q4_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "q4_k"])
def test_a_trained_model_comes_back_to_the_bit(name: str, tokens: Tensor, tmp_path: Path) -> None:
    model = trained()
    quantize_(model, GGMLWeightOnlyConfig(name))
    save_gguf(model, tmp_path / "model.gguf")
    expected = logits(model, tokens)
    filled, built = load_gguf(tmp_path / "model.gguf", trained()), load_gguf(tmp_path / "model.gguf")
    for other in (filled, built):
        assert torch.equal(logits(other, tokens), expected)
        save_gguf(other, tmp_path / "again.gguf")
        assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    save_pretrained(filled, tmp_path / "folder")
    assert torch.equal(logits(load(tmp_path / "folder"), tokens), expected)


def test_the_oracle_reads_the_file(tokens: Tensor, tmp_path: Path) -> None:
    """gguf-py finds the bytes, and transformers, which dequantizes with it, the weights."""
    model = trained().float()
    quantize_(model, GGMLWeightOnlyConfig("q8_0"))
    save_gguf(model, tmp_path / "model.gguf")
    ours, theirs = open_gguf(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        assert tensor.data.tobytes() == ours.blocks(tensor.name).numpy().tobytes()
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    loaded = load_gguf(tmp_path / "model.gguf", dtype=torch.float32)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    for name, value in dense.state_dict().items():
        ours_value = loaded.state_dict()[name]
        ours_value = ours_value.dequantize() if isinstance(ours_value, GGMLTensor) else ours_value
        assert torch.equal(value, ours_value), name


def test_a_mixture_as_in_the_files_of_llama_cpp(tokens: Tensor, tmp_path: Path) -> None:
    """Q4_K, with Q6_K for what suffers most and for the embedding, which is the head."""
    model = trained()
    quantize_(model, GGMLWeightOnlyConfig("q6_k"), lambda module, path: path.endswith(("v_proj", "down_proj")))
    quantize_(model, GGMLWeightOnlyConfig("q4_k"))
    blocks = GGMLTensor.from_hp(model.lm_head.weight.data, "q6_k")
    model.lm_head.weight = model.model.embed_tokens.weight = nn.Parameter(blocks, requires_grad=False)
    save_gguf(model, tmp_path / "model.gguf")
    kinds = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors)
    assert kinds == {"Q4_K": 20, "Q6_K": 9, "F32": 9}
    assert torch.equal(logits(load_gguf(tmp_path / "model.gguf"), tokens), logits(model, tokens))


def test_a_tied_embedding_is_one_packed_tensor(tokens: Tensor, tmp_path: Path) -> None:
    model = trained()
    quantize_(model, GGMLWeightOnlyConfig("q4_0"))
    blocks = GGMLTensor.from_hp(model.lm_head.weight.data, "q8_0")
    model.lm_head.weight = model.model.embed_tokens.weight = nn.Parameter(blocks, requires_grad=False)
    save_gguf(model, tmp_path / "model.gguf")
    names = open_gguf(tmp_path / "model.gguf").tensors
    assert names["token_embd.weight"].type.name == "q8_0"
    assert "output.weight" not in names
    loaded: Any = load_gguf(tmp_path / "model.gguf")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    with torch.no_grad():
        generated = loaded.generate(tokens[:, :32], max_new_tokens=8, do_sample=False)
        assert torch.equal(generated, model.generate(tokens[:, :32], max_new_tokens=8, do_sample=False))

"""The transformers configuration of the model in a GGUF file, from its metadata and tensors."""

import math
from typing import Any

import torch
from lq_formats import FormatError, UnsupportedError
from lq_formats.gguf import GGUFFile

from lq_torch.gguf.architecture import ARCHITECTURES, ROPE_FREQS
from lq_torch.gguf.hyperparameters import float32, llama3_factors, said, shown

# Those of Llama 3.1 to 3.3; they differ in the factor, which is the largest in a file.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_REAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor")
_LARGEST = 1 << 40


def configuration(file: GGUFFile, dtype: torch.dtype) -> dict[str, Any]:
    """Return the values of a configuration, of which every size has been found in the file's tensors.

    Raises:
        FormatError: If the metadata is incomplete or contradicts the tensors.
        UnsupportedError: If the file's architecture or rotary frequencies are none that lq knows.
    """
    architecture = file.get("general.architecture")
    found = next((item for item in ARCHITECTURES if item.name == architecture), None)
    if found is None:
        raise UnsupportedError(
            f"{file.name} holds a model of architecture {shown(architecture)}: expected "
            f"{' or '.join(item.name for item in ARCHITECTURES)}"
        )
    values = said(file, found.name + ".")
    heads, kv_heads, size = (
        values[key] for key in ("attention.head_count", "attention.head_count_kv", "attention.key_length")
    )
    width, inner, layers = (values[key] for key in ("embedding_length", "feed_forward_length", "block_count"))
    context = file.get(f"{found.name}.context_length", 2048)
    for key, number in (*values.items(), ("context_length", context)):
        if not _plausible(key, number):
            raise FormatError(
                f"{file.name} has {found.name}.{key} = {shown(number)}, which no model has: it is damaged"
            )
    _expect(file, "token_embd.weight", (None, width))
    _expect(file, "blk.0.attn_q.weight", (heads * size, width))
    _expect(file, "blk.0.attn_k.weight", (kv_heads * size, width))
    _expect(file, "blk.0.ffn_up.weight", (inner, width))
    _expect(file, f"blk.{layers - 1}.ffn_up.weight", (inner, width))
    if layers > len(file.tensors):
        raise FormatError(f"{file.name} claims {layers} layers and has {len(file.tensors)} tensors: it is incomplete")
    window = values.get("attention.sliding_window")
    # transformers' llama attends to everything; its mistral is the same model with a window.
    windowed = {} if window is None or found.name != "llama" else {"model_type": "mistral", "sliding_window": window}
    return {
        "model_type": found.model_types[0],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "max_position_embeddings": context,
        "rms_norm_eps": _decimal(values["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": _rope(file, values, size),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": _token(file, "bos"),
        "eos_token_id": _token(file, "eos"),
    } | windowed


def _plausible(key: str, value: Any) -> bool:
    """Say whether a value has its key's type and could be a model's."""
    if key == "rope.scaling.type":
        return isinstance(value, str)
    if key in _REAL:
        return type(value) in (int, float) and 0 < float32(value) < math.inf
    return type(value) is int and 0 < value < _LARGEST


def _expect(file: GGUFFile, name: str, shape: tuple[int | None, ...]) -> None:
    info = file.tensors.get(name)
    if info is None:
        raise FormatError(f"{file.name} lacks the tensor {name}: it is incomplete")
    if len(info.shape) != len(shape) or any(w not in (None, s) for w, s in zip(shape, info.shape, strict=True)):
        raise FormatError(
            f"{file.name}: {name} has shape {info.shape}, and the metadata says {shape}: the file is damaged"
        )


def _token(file: GGUFFile, name: str) -> int | None:
    """Return a special token of the file's vocabulary; None if it has none."""
    found = file.get(f"tokenizer.ggml.{name}_token_id")
    return found if type(found) is int and 0 <= found < file.tensors["token_embd.weight"].shape[0] else None


def _rope(file: GGUFFile, values: dict[str, Any], size: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": _decimal(values["rope.freq_base"]), "rope_type": "default"}
    kind, factor = values["rope.scaling.type"], values["rope.scaling.factor"]
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": _decimal(factor)}
    if kind != "none":
        raise UnsupportedError(f"{file.name} scales rotary frequencies by {shown(kind)}: lq knows none and linear")
    if ROPE_FREQS not in file.tensors:
        return rope
    factors = file.dequantize(ROPE_FREQS)
    rope |= _LLAMA3 | {"rope_type": "llama3", "factor": _decimal(float(factors.max()) if factors.numel() else 0.0)}
    expected = llama3_factors(rope, size) if rope["factor"] > 0 else torch.empty(0)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4, atol=0):
        raise UnsupportedError(
            f"{file.name} scales rotary frequencies otherwise than Llama 3 does ({ROPE_FREQS}): pass the model, built from its "
            "own configuration"
        )
    return rope


def _decimal(number: float) -> float:
    """Return the short decimal that a file's float32 came from, such as 1e-05 for 9.999999747378752e-06."""
    short = float(f"{number:.7g}")
    return short if float32(short) == number else float(number)

"""save_gguf: a transformers model as a GGUF file that llama.cpp reads."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lq_formats import DTypeError, SpecError, UnsupportedError
from lq_formats.gguf import GGUFValue, TensorSource, ggml_type, write_gguf
from torch import Tensor, nn

from lq_torch.gguf.architecture import ROPE_FREQS, architecture_of, check_heads, pair_rows
from lq_torch.gguf.hyperparameters import agrees, describe, rope_factors, shown
from lq_torch.merge import refuse_merged
from lq_torch.tensors import GGMLTensor, LowBitTensor
from lq_torch.tensors.base import SCALE_DTYPES

_QUANTIZATION_VERSION = 2  # of ggml's blocks as they are since May 2023


def save_gguf(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model's weights to a GGUF file: ggml blocks byte for byte, other tensors in their dtype, vectors in float32.

    The file holds no vocabulary unless ``metadata`` brings one, for example that of the file a model came from::

        save_gguf(model, "new.gguf", {k: v for k, v in open_gguf("old.gguf").metadata.items() if k.startswith("tokenizer.")})

    Args:
        model: A causal language model of transformers, of type llama, mistral, qwen2 or qwen3. Weights quantized by lq are ggml
            blocks (:class:`lq_torch.GGMLWeightOnlyConfig`).
        path: Of the file; one of that name is replaced when the new one is whole.
        metadata: More values by key; those that follow from the model's configuration may not contradict it.

    Raises:
        UnsupportedError: If the model is of another type, holds merged layers or tensors that the format has no name for, or
            weights quantized otherwise; the message says which.
        DTypeError: If a tensor is not fp16, bf16 or fp32.
        SpecError: If ``metadata`` contradicts the model, or GGUF cannot hold it.
    """
    architecture = architecture_of(model)
    refuse_merged(model, "save_gguf")
    config = model.config
    tensors: dict[str, TensorSource] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen:  # the head that repeats the embedding
            continue
        seen.add(id(value))
        heads = architecture.heads(name, config)
        if heads is not None:
            check_heads(name, value.shape[0], heads)
        tensors[architecture.file_name(name)] = _source(name, value, heads)
    factors = rope_factors(config)
    if factors is not None:
        tensors[ROPE_FREQS] = TensorSource.plain(factors)
    write_gguf(path, _metadata(architecture.name, describe(architecture, config), metadata or {}), tensors)


def _source(path: str, value: Tensor, heads: int | None) -> TensorSource:
    """Return what is written of one tensor, read when its turn comes."""
    if value.device.type == "meta":
        raise UnsupportedError(f"{path} is on the meta device and has no values to save")
    if isinstance(value, GGMLTensor) and value.ggml_type != "q8_1":
        return TensorSource(ggml_type(value.ggml_type), tuple(value.shape), partial(_blocks, value, heads))
    if isinstance(value, LowBitTensor):
        kind = value.ggml_type if isinstance(value, GGMLTensor) else type(value).__name__
        raise UnsupportedError(
            f"{path} is quantized as {kind}, which GGUF files do not hold as a weight: quantize_ the dense model with "
            "GGMLWeightOnlyConfig, or dequantize_ it"
        )
    if value.dtype not in SCALE_DTYPES:
        raise DTypeError(f"{path} has dtype {value.dtype}: expected float16, bfloat16 or float32")
    # llama.cpp's norms and biases are float32.
    dtype = torch.float32 if value.dim() < 2 else value.dtype
    kind = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    return TensorSource(ggml_type(kind), tuple(value.shape), partial(_plain, value, heads, dtype))


def _blocks(value: GGMLTensor, heads: int | None) -> Tensor:
    blocks = value.to_tensors()["qdata"]
    return blocks if heads is None else pair_rows(blocks, heads)


def _plain(value: Tensor, heads: int | None, dtype: torch.dtype) -> Tensor:
    value = value.detach()
    return (value if heads is None else pair_rows(value, heads)).to(dtype)


def _metadata(architecture: str, derived: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    ours: dict[str, Any] = {"general.architecture": architecture, **derived}
    for key, value in given.items():
        plain = GGUFValue.of(value).value
        if key in ours and not agrees(plain, ours[key]):
            raise SpecError(f"metadata has {key} = {shown(plain)}, and the model {ours[key]!r}: leave the key out")
    defaults = {"general.type": "model", "general.quantization_version": _QUANTIZATION_VERSION}
    # llama.cpp opens a file without a vocabulary if it says so.
    defaults |= {} if any(key.startswith("tokenizer.") for key in given) else {"tokenizer.ggml.model": "none"}
    return ours | {key: value for key, value in (defaults | dict(given)).items() if key not in ours}

"""What a GGUF file says of a model beside its tensors, and what of it must agree with transformers' configuration.

Sizes show in the tensors as well; the norm's epsilon, the number of heads and the rotary frequencies do not, and a model with
others computes something else from the same weights.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from lq_formats import FormatError, SpecError, UnsupportedError
from lq_formats.gguf import GGUFFile
from torch import Tensor

from lq_torch.gguf.architecture import ROPE_FREQS, Architecture

# Factors are computed in float32 by both, in another order.
_FACTOR_TOLERANCE = 1e-4
_ROPE_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def describe(architecture: Architecture, config: Any) -> dict[str, Any]:
    """Return the metadata of a model, by key, from its configuration.

    Raises:
        UnsupportedError: If the configuration has what llama.cpp's architecture has not: another activation, or a scaling of
            rotary frequencies other than ``linear`` and ``llama3``.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedError(f"hidden_act={config.hidden_act!r}: the architecture {architecture.name} has silu")
    rope = _rope(config)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": _head_dim(config),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] == "linear" and rope["factor"] != 1:
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if getattr(config, "sliding_window", None) is not None:
        values["attention.sliding_window"] = config.sliding_window
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def rope_factors(config: Any) -> Tensor | None:
    """Return what each rotary frequency is divided by, ``(head_dim // 2,) float32``; None where a file has no such tensor.

    ``llama3``: wavelengths above ``original / low_freq_factor`` are stretched by ``factor``, those below ``original /
    high_freq_factor`` not at all, and frequencies between are interpolated.
    """
    rope = _rope(config)
    return llama3_factors(rope, _head_dim(config)) if rope["rope_type"] == "llama3" else None


def llama3_factors(rope: Mapping[str, Any], size: int) -> Tensor:
    """Return the factors ``(size // 2,) float32`` of rope parameters of type ``llama3`` for heads of ``size``."""
    exponent = torch.arange(0, size, 2, dtype=torch.float64) / size
    turns = rope["original_max_position_embeddings"] * torch.pow(float(rope["rope_theta"]), -exponent) / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - kept) / rope["factor"] + kept)
    return factors.to(torch.float32)


def check_hyperparameters(file: GGUFFile, architecture: Architecture, config: Any) -> None:
    """Hold a file against a model's configuration.

    Raises:
        FormatError: If the file is of another architecture, lacks a required value, or has another one.
        UnsupportedError: As :func:`describe` and :func:`said`.
    """
    found = file.get("general.architecture")
    if found != architecture.name:
        raise FormatError(
            f"{file.name} holds a model of architecture {shown(found)}, and {config.model_type} is {architecture.name!r}: "
            "expected a model of the same architecture"
        )
    prefix = architecture.name + "."
    expected = _UNSCALED | {key.removeprefix(prefix): value for key, value in describe(architecture, config).items()}
    for key, value in said(file, prefix).items():
        wanted = expected.get(key)
        if not agrees(value, wanted):
            raise FormatError(
                f"{file.name} has {prefix}{key} = {shown(value)} and the model's configuration {wanted!r}: the model would "
                "compute something else; build it from the configuration that belongs to the file"
            )
    _check_factors(file, rope_factors(config))


_UNSCALED = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0}
_REQUIRED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)


def said(file: GGUFFile, prefix: str) -> dict[str, Any]:
    """Return what a file says, without the prefix, with what llama.cpp takes for keys that it leaves out.

    Raises:
        FormatError: If it lacks one that has no default.
        UnsupportedError: If it is one of several files of a model, or a mixture of experts.
    """
    parts = file.get("split.count", 1)
    if parts not in (0, 1):
        raise UnsupportedError(
            f"{file.name} is one of {shown(parts)} files of a model: join them first (llama.cpp's llama-gguf-split --merge)"
        )
    if file.get(prefix + "expert_count", 0) != 0:
        raise UnsupportedError(f"{file.name} holds a mixture of experts, which lq does not read from GGUF files")
    if lost := [prefix + key for key in _REQUIRED if prefix + key not in file.metadata]:
        raise FormatError(f"{file.name} lacks the metadata {', '.join(lost)}: it is incomplete")
    values = {key: file.get(prefix + key) for key in _REQUIRED}
    heads, width = values["attention.head_count"], values["embedding_length"]
    size = width // heads if type(heads) is int and type(width) is int and heads > 0 else None
    size = file.get(prefix + "attention.key_length", size)
    defaults = {
        "attention.head_count_kv": heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        "rope.freq_base": 10000.0,
    }
    values |= {key: file.get(prefix + key, default) for key, default in defaults.items()}
    values |= _said_scaling(file, prefix)
    # Converters leave it out for Mistral, and llama.cpp does without: only what is said is compared.
    window = prefix + "attention.sliding_window"
    return values | ({"attention.sliding_window": file.get(window)} if window in file.metadata else {})


def _said_scaling(file: GGUFFile, prefix: str) -> dict[str, Any]:
    """Return how a file scales rotary frequencies: linearly if it does not say how, and not at all by 0 or 1."""
    kind = file.get(prefix + "rope.scaling.type", "linear")
    factor = file.get(prefix + "rope.scaling.factor", file.get(prefix + "rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return _UNSCALED
    return {"rope.scaling.type": kind, "rope.scaling.factor": factor}


def float32(number: float) -> float:
    """Return a number as files hold it."""
    return torch.tensor(float(number), dtype=torch.float64).to(torch.float32).item()


def shown(value: Any) -> str:
    """Return a value of a file as messages show it: of what is long, the beginning."""
    return reprlib.repr(value)


def agrees(found: Any, wanted: Any) -> bool:
    """Return whether a value of a file is the one wanted, as far as float32 tells."""
    if isinstance(wanted, float) and isinstance(found, float | int) and not isinstance(found, bool):
        return float32(found) == float32(wanted)
    return type(found) is type(wanted) and bool(found == wanted)


def _check_factors(file: GGUFFile, wanted: Tensor | None) -> None:
    info = file.tensors.get(ROPE_FREQS)
    if (info is None) != (wanted is None):
        state = "has no" if info is None else "has a"
        kind = "scales" if info is None else "does not scale"
        raise FormatError(
            f"{file.name} {state} tensor {ROPE_FREQS!r} and the model's configuration {kind} its rotary frequencies "
            "(rope_type llama3): build the model from the configuration that belongs to the file"
        )
    if info is None or wanted is None:
        return
    if info.shape != tuple(wanted.shape) or info.type.name != "f32":
        raise FormatError(
            f"{file.name}: {ROPE_FREQS} is {info.shape} {info.type.name}: expected {tuple(wanted.shape)} f32"
        )
    found = file.tensor(ROPE_FREQS)
    if not torch.allclose(found, wanted, rtol=_FACTOR_TOLERANCE, atol=0):
        worst = int((found / wanted - 1).abs().nan_to_num(math.inf).argmax())
        raise FormatError(
            f"{file.name} divides rotary frequency {worst} by {float(found[worst])}, the model's configuration by "
            f"{float(wanted[worst])}: build the model from the configuration that belongs to the file"
        )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Any]:
    rope = {"rope_theta": 10000.0, "rope_type": "default"} | dict(getattr(config, "rope_parameters", None) or {})
    if rope["rope_type"] not in _ROPE_PARAMETERS:
        raise UnsupportedError(
            f"rope_type={rope['rope_type']!r}: lq reads and writes GGUF files of rope types {', '.join(_ROPE_PARAMETERS)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(
            f"partial_rotary_factor={rope['partial_rotary_factor']}: the architectures that lq knows rotate whole heads"
        )
    if lost := [name for name in _ROPE_PARAMETERS[rope["rope_type"]] if name not in rope]:
        raise SpecError(f"the model's rope_parameters lack {', '.join(lost)} for rope_type {rope['rope_type']!r}")
    return rope

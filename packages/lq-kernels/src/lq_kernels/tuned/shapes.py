"""Which weights to tune: sizes, well-known models, or a transformers configuration, read without transformers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from lq_formats import FormatError, SpecError

Shape: TypeAlias = tuple[int, int]
"""Out features, in features."""

_MAX_BYTES = 4 << 20
_MAX_SIZE = 1 << 24


def _dimensions(hidden: int, inner: int, heads: int, kv: int, width: int = 128) -> Mapping[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": width,
    }


MODELS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-3.2-1b": _dimensions(2048, 8192, 32, 8, 64),
        "llama-3-8b": _dimensions(4096, 14336, 32, 8),
        "llama-3-70b": _dimensions(8192, 28672, 64, 8),
        "qwen3-8b": _dimensions(4096, 12288, 32, 8),
        "qwen3-32b": _dimensions(5120, 25600, 64, 8),
        "mixtral-8x7b": _dimensions(4096, 14336, 32, 8),
    }
)
"""The keys of a transformers configuration that determine the linear layers."""


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Read a comma-separated list of sizes ``NxK`` (out x in features) and names of :data:`MODELS`.

    Raises:
        SpecError: If an item is neither.
    """
    found: list[Shape] = []
    for item in filter(None, (part.strip().lower() for part in text.split(","))):
        sizes = item.split("x")
        if item in MODELS:
            found += linear_shapes(MODELS[item])
        elif len(sizes) == 2 and all(size.isdecimal() and 0 < int(size) <= _MAX_SIZE for size in sizes):
            found.append((int(sizes[0]), int(sizes[1])))
        else:
            known = ", ".join(MODELS)
            raise SpecError(f"unknown shape {item!r}: expected NxK (out x in features) or one of {known}")
    return tuple(dict.fromkeys(found))


def model_shapes(path: Path) -> tuple[Shape, ...]:
    """Return the shapes of a model's linear layers, from its ``config.json`` or the folder that holds one.

    Raises:
        FormatError: If the file is not a configuration of a decoder model.
        SpecError: If there is no such file.
    """
    if os.path.isdir(path):
        path = path / "config.json"
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and os.path.isdir(path.parent) and path.name == "config.json":
            raise SpecError(
                f"the folder {str(path.parent)!r} has no config.json: expected a model's folder, or its config.json"
            ) from None
        raise SpecError(
            f"{str(path)!r} cannot be read ({error.strerror}): expected a model's folder, or its config.json"
        ) from None
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        config = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{str(path)!r} is not a model's configuration: {error}") from None
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    if not isinstance(config, dict):
        raise FormatError(f"{str(path)!r} is not a model's configuration: expected a JSON object")
    return linear_shapes(config)


def linear_shapes(config: Mapping[str, Any]) -> tuple[Shape, ...]:
    """Return the distinct shapes of a decoder's linear layers: as they are, then q/k/v and gate/up merged.

    Args:
        config: Of transformers; of a mixture, the experts' and the shared expert's layers too.

    Raises:
        FormatError: If a size is missing or not a positive integer.
    """
    hidden = _size(config, "hidden_size", "n_embd", "d_model")
    heads = _size(config, "num_attention_heads", "n_head", "num_heads")
    kv_heads = _size(config, "num_key_value_heads", default=heads)
    width = _size(config, "head_dim", default=max(1, hidden // heads))
    q, kv = heads * width, kv_heads * width
    inner = [_size(config, "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)]
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if config.get(name):
            inner.append(_size(config, name))
    separate = [(q, hidden), (kv, hidden), (hidden, q), *(s for i in inner for s in ((i, hidden), (hidden, i)))]
    merged = [(q + 2 * kv, hidden), *((2 * i, hidden) for i in inner)]
    return tuple(dict.fromkeys(separate + merged))


def _size(config: Mapping[str, Any], *names: str, default: int = 0) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if type(value) is not int or not 0 < value <= _MAX_SIZE:
        raise FormatError(
            f"{names[0]}={str(value)[:40]} of the configuration: expected an integer from 1 to {_MAX_SIZE}"
        )
    return value


def parse_counts(text: str, what: str, *, or_row: bool = False) -> tuple[int, ...]:
    """Read a comma-separated list of positive integers, in its order, without repetition.

    Args:
        text: The list.
        what: The option that it was given for.
        or_row: Whether -1 is allowed too, which is a whole row among group sizes.

    Raises:
        SpecError: If an item is something else.
    """
    items = [part.strip() for part in text.split(",") if part.strip()]
    counts = [item for item in items if not (or_row and item == "-1")]
    if not items or not all(item.isdecimal() and 0 < int(item) <= _MAX_SIZE for item in counts):
        expected = "positive integers or -1" if or_row else "positive integers"
        raise SpecError(f"{what}={text!r}: expected {expected}, separated by commas")
    return tuple(dict.fromkeys(int(item) for item in items))

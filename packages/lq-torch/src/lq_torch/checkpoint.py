"""Save and load quantized models: canonical bits in safetensors with a JSON spec, never pickle.

A checkpoint is a folder::

    config.json, generation_config.json   of the Hugging Face model, if it is one
    lq.json                               {"format_version": 1, "weights": {path: spec}, "files": {tensor: file}}
    model-00001-of-00002.safetensors ...  plain tensors; a quantized weight's are named "path:inner"

Loading quantizes nothing. Files are checked before anything is allocated, tensors are taken one file at a time, and the
model is built without weights first, so the peak stays near the size of the quantized model.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lq_formats import FormatError, ShapeError, UnknownVersionError, UnsupportedError
from safetensors.torch import save_file
from torch import Tensor, nn

from lq_torch.safetensors_header import SafetensorsHeader, check_safetensors, read_tensor
from lq_torch.tensors import LowBitTensor

FORMAT_VERSION = 1
INDEX_NAME = "lq.json"
MAX_INDEX_BYTES = 256 << 20
MAX_SHARD_BYTES = 4 << 30
_SEPARATOR = ":"


def save_pretrained(
    model: nn.Module, directory: str | os.PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a quantized model to a folder.

    Args:
        model: Any module with quantized (or plain) weights. Its Hugging Face configuration is saved beside them.
        directory: Made if needed; files of an earlier checkpoint in it are replaced.
        max_shard_bytes: Start a new safetensors file beyond this size.

    Raises:
        UnsupportedError: If a tensor name holds a colon.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, weights, aliases = _collect(model)
    shards = _shards(tensors, max_shard_bytes)
    files = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        chunk = {name: tensors[name].detach().contiguous().cpu() for name in names}
        save_file(chunk, folder / file, metadata={"format": "pt", "lq_format_version": str(FORMAT_VERSION)})
        files.update(dict.fromkeys(names, file))
    for stale in folder.glob("model-*-of-*.safetensors"):
        if stale.name not in files.values():
            stale.unlink()
    index = {"format_version": FORMAT_VERSION, "weights": weights, "aliases": aliases, "files": files}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for name in ("config", "generation_config"):
        config = getattr(model, name, None)
        if config is not None and hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load what :func:`save_pretrained` wrote.

    Args:
        directory: The folder.
        model: A module of the same structure, quantized or not, on any device including ``meta``: its weights are
            replaced. None builds the Hugging Face model of the folder's config.json.
        device: Where the weights go.

    Returns:
        The model, in evaluation mode if it was built here.

    Raises:
        FormatError: If a file is truncated, oversized, foreign or inconsistent, or the tensors are not the model's.
        UnknownVersionError: If the folder was written by a newer format version.
        MissingPackageError: If a Hugging Face model is to be built and transformers is not installed.
    """
    folder = Path(directory)
    index = read_index(folder)
    headers = {file: check_safetensors(folder / file) for file in sorted(set(index["files"].values()))}
    for name, file in index["files"].items():
        if name not in headers[file].tensors:
            raise FormatError(f"{folder / file} lacks the tensor {name!r} that {INDEX_NAME} places there")
    built = model is None
    if model is None:
        from lq_torch.integrations.transformers import build_model

        model = build_model(folder)
    _check_names(model, index)
    for path, tensor in _stream(folder, index, headers, torch.device(device)):
        _assign(model, path, tensor)
    for path, target in index["aliases"].items():
        _assign(model, path, _resolve(model, target))
    _materialize(model, torch.device(device))
    return model.eval() if built else model


def read_index(folder: Path) -> dict[str, Any]:
    """Read and check ``lq.json``.

    Raises:
        FormatError, UnknownVersionError: If it is not an index of a known version.
        FileNotFoundError: If the folder has none.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not an lq checkpoint: it has no {INDEX_NAME}")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise FormatError(f"{path} has {path.stat().st_size} bytes: more than any model needs")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(index, dict) or "format_version" not in index:
        raise FormatError(f"{path} is not an lq index")
    if index["format_version"] != FORMAT_VERSION:
        raise UnknownVersionError(
            f"{path} has format version {index['format_version']!r}; this release reads {FORMAT_VERSION}: upgrade lq-torch"
        )
    for key in ("weights", "aliases", "files"):
        if not isinstance(index.get(key), dict):
            raise FormatError(f"{path} has no map {key!r}")
    for file in index["files"].values():
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise FormatError(f"{path} names the file {file!r}: expected a safetensors file in the same folder")
        if not (folder / file).is_file():
            raise FormatError(f"{path} names {file!r}, which is missing")
    return index


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Return plain tensors by name, specs of quantized weights by path, and tied names by the name they repeat."""
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    for path, value in model.state_dict(keep_vars=True).items():
        if _SEPARATOR in path:
            raise UnsupportedError(f"the tensor name {path!r} holds {_SEPARATOR!r}, which lq's checkpoints reserve")
        if id(value) in seen:
            aliases[path] = seen[id(value)]
            continue
        seen[id(value)] = path
        if isinstance(value, LowBitTensor):
            weights[path] = value.spec_json()
            tensors.update({path + _SEPARATOR + name: tensor for name, tensor in value.to_tensors().items()})
        else:
            tensors[path] = value
    for path, buffer in model.named_buffers():
        # Not in the state dict, yet part of the function: a model converted to bf16 has bf16 rotary frequencies.
        if path not in tensors and path not in aliases and buffer.is_floating_point():
            tensors[path] = buffer
    return tensors, weights, aliases


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _stream(
    folder: Path, index: dict[str, Any], headers: dict[str, SafetensorsHeader], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield whole weights by path, holding no more than one file's unfinished weights."""
    waiting: dict[str, dict[str, Tensor]] = {}
    by_file: dict[str, list[str]] = {}
    for name, file in index["files"].items():
        by_file.setdefault(file, []).append(name)
    for file, names in sorted(by_file.items()):
        with (folder / file).open("rb") as handle:
            for name in names:
                tensor = read_tensor(handle, headers[file].tensors[name]).to(device)
                path, separator, inner = name.partition(_SEPARATOR)
                if not separator:
                    yield path, tensor
                    continue
                spec = index["weights"].get(path)
                if not isinstance(spec, dict):
                    raise FormatError(f"{folder}: {name!r} belongs to a quantized weight without a spec")
                parts = waiting.setdefault(path, {})
                parts[inner] = tensor
                if sorted(parts) == spec.get("tensors"):
                    yield path, LowBitTensor.from_tensors(waiting.pop(path), spec)
    if waiting:
        raise FormatError(f"{folder} lacks tensors of {', '.join(sorted(waiting))}")


def _check_names(model: nn.Module, index: dict[str, Any]) -> None:
    expected = set(model.state_dict(keep_vars=True))
    came = {name.partition(_SEPARATOR)[0] for name in index["files"]} | set(index["aliases"])
    if missing := sorted(expected - came):
        raise FormatError(f"the checkpoint lacks {len(missing)} tensors of the model, among them {missing[:3]}")
    if unexpected := sorted(came - expected - {path for path, _ in model.named_buffers()}):
        raise FormatError(
            f"the checkpoint has {len(unexpected)} tensors that the model lacks, among them {unexpected[:3]}"
        )
    for alias, target in index["aliases"].items():
        if target not in came or target in index["aliases"]:
            raise FormatError(f"{alias!r} is said to repeat {target!r}, which the checkpoint lacks")


def _resolve(model: nn.Module, path: str) -> Tensor:
    parent, _, name = path.rpartition(".")
    value: Tensor = getattr(model.get_submodule(parent), name)
    return value


def _assign(model: nn.Module, path: str, value: Tensor) -> None:
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, name)
    if tuple(old.shape) != tuple(value.shape):
        raise ShapeError(f"{path} has shape {tuple(value.shape)} in the checkpoint and {tuple(old.shape)} in the model")
    if name in module._parameters:
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        module._parameters[name] = parameter
    else:
        module._buffers[name] = value


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Move what is not in a checkpoint (non-persistent buffers) to the device; none may be left on ``meta``."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.device.type == "meta":
                raise UnsupportedError(f"the buffer {path}.{name} is not saved in checkpoints and has no values")
            module._buffers[name] = buffer.to(device)

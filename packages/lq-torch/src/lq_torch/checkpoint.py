"""Save and load quantized models: canonical bits in safetensors with a JSON spec, never pickle.

A checkpoint is a folder::

    config.json, generation_config.json   of the Hugging Face model, if it is one
    lq.json                               {"format_version": 2, "weights": {path: spec}, "files": {tensor: file}}
    model-00001-of-00002.safetensors ...  plain tensors; a quantized weight's are named "path:inner"

Loading quantizes nothing. Files are checked before anything is allocated, tensors are taken one file at a time, and the
model is built without weights first, so the peak stays near the size of the quantized model.
"""

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lq_formats import DTypeError, SpecError, UnsupportedError
from safetensors.torch import save_file
from torch import Tensor, nn

from lq_torch.arguments import check_module, parse_device
from lq_torch.checkpoint_index import FORMAT_VERSION, INDEX_NAME, SEPARATOR, VERSION_KEY, CheckpointIndex, read_index
from lq_torch.merge import refuse_merged
from lq_torch.safetensors_header import DTYPES, read_tensor
from lq_torch.staging import check_folder, refuse_holding, replacing
from lq_torch.tensors import LowBitTensor
from lq_torch.tensors.base import SCALE_DTYPES

MAX_SHARD_BYTES = 4 << 30
# What Hugging Face's folders have, and lq's have not.
FOREIGN_NAMES = ("model.safetensors", "model.safetensors.index.json")
_SHARDS = "model-*-of-*.safetensors"
REPORT_NAME = "calibration.json"
"""What ``lq quantize`` writes of a calibrated model, which says nothing of the next one in its folder."""


def save_pretrained(
    model: nn.Module, directory: str | os.PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a quantized model to a folder.

    New files are written beside those of an earlier checkpoint and replace them when all are whole. After a failure the folder
    holds the earlier model still, or, if it came while files were replaced, is refused by :func:`load`.

    Args:
        model: Any module with quantized (or plain) weights. Its Hugging Face configuration is saved beside them.
        directory: Made if needed; files of an earlier checkpoint in it are replaced.
        max_shard_bytes: Start a new safetensors file beyond this size; a weight is never split.

    Raises:
        SpecError: If the folder holds a checkpoint of another library, or ``model`` is no module.
        UnsupportedError: If a tensor name holds a colon, a tensor is on ``meta``, or the state dict holds other things
            than tensors.
    """
    check_module(model, "save_pretrained")
    folder = Path(directory)
    check_target(folder)
    values, aliases = _collect(model)
    shards = split_shards(values, max_shard_bytes)
    files: dict[str, str] = {}
    weights: dict[str, Any] = {}
    with replacing(folder, INDEX_NAME, [REPORT_NAME, _SHARDS]) as partial:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            # Canonical copies of weights in a kernel's own order live for one file.
            tensors = _canonical(shard, weights)
            metadata = {"format": "pt", VERSION_KEY: str(FORMAT_VERSION)}
            save_file(separate_storage(tensors), partial / file, metadata=metadata)
            files.update(dict.fromkeys(tensors, file))
        save_configs(model, partial)
        index = {"format_version": FORMAT_VERSION, "weights": weights, "aliases": aliases, "files": files}
        (partial / INDEX_NAME).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check_target(folder: Path) -> None:
    """Raise SpecError unless :func:`save_pretrained` may write to a folder."""
    check_folder(folder)
    refuse_holding(folder, FOREIGN_NAMES, "a checkpoint that lq_torch.save_pretrained did not write")


def save_configs(model: nn.Module, folder: Path, quantization: Mapping[str, Any] | None = None) -> bool:
    """Write a model's Hugging Face configurations to a folder; return whether it has one.

    ``config.json`` says what is saved, whatever the model's own configuration says: its class, and the dtype of most of its
    parameters' values.

    Args:
        model: Any module.
        folder: Where to.
        quantization: What ``config.json`` says under ``quantization_config``; None for what it says already.
    """
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "save_pretrained"):
        copy.deepcopy(generation).save_pretrained(folder)
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if not hasattr(config, "save_pretrained"):
        return False
    if quantization is not None:
        config.quantization_config = quantization
    if hasattr(config, "architectures"):
        config.architectures = [type(model).__name__]  # what load builds
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    if sizes and hasattr(config, "dtype"):
        config.dtype = sizes.most_common(1)[0][0]
    config.save_pretrained(folder)
    return True


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load what :func:`save_pretrained` wrote. On an error in the files, ``model`` is as it was.

    Args:
        directory: The folder.
        model: A module of the same structure, quantized or not, on any device including ``meta``: its weights are
            replaced, and plain ones train as they did. None builds the Hugging Face model of the folder's config.json, in which
            nothing trains.
        device: Where the weights go.
        dtype: Compute in this dtype: plain weights are converted, quantized ones keep their bits. None keeps the saved.

    Returns:
        The model, in evaluation mode if it was built here.

    Raises:
        FormatError: If a file is truncated, oversized, foreign or inconsistent, or the tensors are not the model's.
        ShapeError: If a weight has another shape in the model.
        UnsupportedError: If the model holds merged layers; load first, then merge.
        UnknownVersionError: If the folder was written by a newer format version.
        SpecError, DTypeError, DeviceError: If ``model`` is no module, ``dtype`` is not fp16, bf16 or fp32, or there is no such
            device.
        MissingPackageError: If a Hugging Face model is to be built and transformers is not installed.
    """
    folder = Path(directory)
    index = read_index(folder)
    if dtype is not None and dtype not in SCALE_DTYPES:
        raise DTypeError(f"dtype={dtype}: expected float16, bfloat16 or float32")
    where = parse_device(device)
    built = model is None
    if model is None:
        from lq_torch.integrations.transformers import build_model

        model = build_model(folder)
    check_module(model, "load")
    refuse_merged(model, "load")
    index.check_model(model)
    for path, tensor in _stream(folder, index, where):
        assign_tensor(model, path, tensor, dtype)
    for path, target in index.aliases.items():
        assign_tensor(model, path, resolve_tensor(model, target))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(where)
        if dtype is not None:
            _convert_buffers(module, dtype)
    return model.eval() if built else model


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what is saved by name, and tied names by the name they repeat."""
    result: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    values = dict(model.state_dict(keep_vars=True))
    for path, buffer in model.named_buffers():
        # Not in the state dict, yet part of the function: a model converted to bf16 has bf16 rotary frequencies.
        if buffer.is_floating_point() or buffer.is_complex():
            values.setdefault(path, buffer)
    for path, value in values.items():
        if SEPARATOR in path:
            raise UnsupportedError(f"the tensor name {path!r} holds {SEPARATOR!r}, which lq's checkpoints reserve")
        if not isinstance(value, Tensor):
            raise UnsupportedError(f"{path!r} of the state dict is a {type(value).__name__}: only tensors are saved")
        if value.device.type == "meta":
            raise UnsupportedError(f"{path!r} is on the meta device and has no values to save")
        if value.dtype not in DTYPES.values():
            raise UnsupportedError(f"{path!r} has dtype {value.dtype}, which safetensors files do not hold; convert it")
        if id(value) in seen:
            aliases[path] = seen[id(value)]
        else:
            seen[id(value)] = path
            result[path] = value
    return result, aliases


def _canonical(values: Mapping[str, Tensor], weights: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that a file holds of some values, and add the specs of quantized ones to ``weights``."""
    tensors: dict[str, Tensor] = {}
    for path, value in values.items():
        if isinstance(value, LowBitTensor):
            parts = value.to_tensors()
            weights[path] = {**value.spec_json(), "tensors": sorted(parts)}
            tensors.update({path + SEPARATOR + name: part for name, part in parts.items()})
        else:
            tensors[path] = value
    return tensors


def separate_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU, no two of which share memory: safetensors stores each by itself."""
    result = {}
    seen = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        storage = here.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != here.numel() * here.element_size():
            here = here.clone()
        seen.add(storage.data_ptr())
        result[name] = here
    return result


def split_shards(values: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Return values by name in parts of at most ``limit`` bytes; a value that is larger is a part of its own.

    Raises:
        SpecError: If ``limit`` is not a positive number.
    """
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        raise SpecError(
            f"max_shard_bytes={limit!r}: expected a positive number of bytes, for example {MAX_SHARD_BYTES}"
        )
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in values.items():
        nbytes = value.packed_nbytes if isinstance(value, LowBitTensor) else value.numel() * value.element_size()
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += nbytes
    return shards


def _stream(folder: Path, index: CheckpointIndex, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield whole weights by path, holding no more than the unfinished ones."""
    waiting: dict[str, dict[str, Tensor]] = {}
    by_file: dict[str, list[str]] = {}
    for name, file in index.files.items():
        by_file.setdefault(file, []).append(name)
    for file, names in sorted(by_file.items()):
        with (folder / file).open("rb") as handle:
            for name in names:
                path, separator, inner = name.partition(SEPARATOR)
                entry = index.headers[file].tensors[name]
                if not separator:
                    yield path, read_tensor(handle, entry).to(device)
                    continue
                # No local name may hold a part: it would outlive the repacking, and the peak would grow by a weight.
                waiting.setdefault(path, {})[inner] = read_tensor(handle, entry).to(device)
                if sorted(waiting[path]) == index.weights[path]["tensors"]:
                    yield path, LowBitTensor.from_tensors(waiting.pop(path), index.weights[path])


def resolve_tensor(model: nn.Module, path: str) -> Tensor:
    """Return a parameter or buffer by its name."""
    parent, _, name = path.rpartition(".")
    value: Tensor = getattr(model.get_submodule(parent), name)
    return value


def assign_tensor(model: nn.Module, path: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
    """Put a value in the place of a parameter or buffer, floating point parameters converted to ``dtype``.

    A dense value trains if the parameter that it replaces does; a quantized one never does.
    """
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    if name not in module._parameters:
        module._buffers[name] = value
    elif isinstance(value, nn.Parameter):
        module._parameters[name] = value
    else:
        converted = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        replaced = module._parameters[name]
        trains = replaced is not None and replaced.requires_grad and not isinstance(converted, LowBitTensor)
        module._parameters[name] = nn.Parameter(converted, requires_grad=trains)


def _convert_buffers(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert a module's own persistent floating point buffers as ``module.to(dtype)`` would.

    Those outside the state dict (rotary frequencies) keep the precision they were saved with.
    """
    transient = module._non_persistent_buffers_set
    own = {id(buffer) for name, buffer in module._buffers.items() if buffer is not None and name not in transient}
    if own:
        module._apply(
            lambda t: t.to(dtype) if id(t) in own and t.is_floating_point() else t,  # type: ignore[no-untyped-call]
            recurse=False,
        )

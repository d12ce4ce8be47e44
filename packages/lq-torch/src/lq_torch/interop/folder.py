"""A folder of another library: its configuration, the headers of its files, which tensors make up which layer.

As with lq's own checkpoints, everything is read and held against the model before a tensor is.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lq_formats import FormatError, ShapeError, UnsupportedError
from lq_formats.interop import CheckpointFormat, method_of, read_format
from torch import nn

from lq_torch.checkpoint_index import INDEX_NAME, MAX_INDEX_BYTES
from lq_torch.quantize import named
from lq_torch.safetensors_header import DTYPES, SafetensorsHeader, TensorEntry, check_safetensors

_INDEX = "model.safetensors.index.json"
# AutoGPTQ's and AutoAWQ's own files, from before config.json had a quantization_config.
OLD_CONFIGS = ("quantize_config.json", "quant_config.json")
# Buffers that old checkpoints have and models compute.
_COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class ForeignFolder:
    """A checked folder.

    Attributes:
        path: The folder.
        form: The format of its quantized layers.
        headers: The checked header of each file, by name.
        files: File of each tensor.
        layers: Names of the tensors of each quantized layer, without its path, by path.
    """

    path: Path
    form: CheckpointFormat
    headers: dict[str, SafetensorsHeader]
    files: dict[str, str]
    layers: dict[str, frozenset[str]]

    def entry(self, name: str) -> TensorEntry:
        """Return what the header says of a tensor."""
        return self.headers[self.files[name]].tensors[name]

    def dense(self) -> list[str]:
        """Return the names of all tensors that belong to no quantized layer."""
        return [name for name in self.files if self.layer_of(name) is None]

    def layer_of(self, name: str) -> str | None:
        """Return the path of the quantized layer that a tensor belongs to, or None."""
        path, _, last = name.rpartition(".")
        return path if last in self.layers.get(path, ()) else None

    def check_model(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        """Hold the folder against a model.

        Returns:
            The names of dense tensors that the model has a place for, and the names of the model's tied tensors that the
            folder leaves out, each by the name it repeats. Biases that the model's layers lack are in neither: they are
            accepted if they are zero, which the caller must check (:meth:`extra_biases`).

        Raises:
            FormatError: If tensors are missing or unexpected, or of another kind of dtype.
            ShapeError: If a tensor has another shape in the model.
            UnsupportedError: If a quantized layer is no ``nn.Linear``.
        """
        own: dict[str, Any] = dict(model.state_dict(keep_vars=True))
        for path, names in self.layers.items():
            weight = own.pop(f"{path}.weight", None)
            if weight is None:
                raise FormatError(f"the checkpoint has the quantized layer {path!r}, which the model lacks")
            if not isinstance(model.get_submodule(path), nn.Linear):
                raise UnsupportedError(f"{path} is a {type(model.get_submodule(path)).__name__}: expected an nn.Linear")
            with named(path):
                shapes = {name: self.entry(f"{path}.{name}").shape for name in names}
                self.form.check_shapes(weight.shape[0], weight.shape[1], shapes)
        places = own | dict(model.named_buffers(remove_duplicate=False))
        known = [name for name in self.dense() if name in places]
        for name in known:
            self._check_entry(name, places[name])
        first = {id(own[name]): name for name in reversed(known) if name in own}
        missing = sorted(set(own) - set(known))
        aliases = {name: first[id(own[name])] for name in missing if id(own[name]) in first}
        if lost := [name for name in missing if name not in aliases]:
            raise FormatError(f"the checkpoint lacks {len(lost)} tensors of the model, among them {lost[:3]}")
        accepted = {*known, *self.extra_biases(model)}
        if unexpected := [n for n in self.dense() if n not in accepted and not n.endswith(_COMPUTED)]:
            raise FormatError(
                f"the checkpoint has {len(unexpected)} tensors that the model lacks, among them {sorted(unexpected)[:3]}"
            )
        return known, aliases

    def extra_biases(self, model: nn.Module) -> list[str]:
        """Return the biases of quantized layers that have none in the model (old GPTQ writers saved zeros)."""
        paths = [path for path in self.layers if f"{path}.bias" in self.files]
        return [f"{path}.bias" for path in paths if getattr(model.get_submodule(path), "bias", None) is None]

    def _check_entry(self, name: str, place: Any) -> None:
        entry = self.entry(name)
        if entry.shape != tuple(place.shape):
            raise ShapeError(f"{name} has shape {entry.shape} in the checkpoint and {tuple(place.shape)} in the model")
        if DTYPES[entry.dtype].is_floating_point != place.is_floating_point():
            raise FormatError(f"{name} is {entry.dtype} in the checkpoint and {place.dtype} in the model")


def read_folder(folder: Path) -> ForeignFolder:
    """Read and check the configuration and the headers of a folder.

    Raises:
        FormatError: If the folder holds no quantized checkpoint in safetensors, or is damaged.
        UnsupportedError: If it is of a kind that this release does not read.
        FileNotFoundError: If there is no such folder.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is not a folder with a config.json")
    if (folder / INDEX_NAME).is_file():
        raise FormatError(f"{folder} is a checkpoint of lq: lq_torch.load reads it")
    form = read_format(_configuration(folder))
    headers: dict[str, SafetensorsHeader] = {}
    files: dict[str, str] = {}
    for file in _files(folder):
        headers[file] = check_safetensors(folder / file)
        for name in headers[file].tensors:
            if name in files:
                raise FormatError(f"{folder} has the tensor {name!r} twice, in {files[name]!r} and {file!r}")
            files[name] = file
    paths = {name.rpartition(".")[0] for name in files if name.rpartition(".")[2] == form.marker}
    layers: dict[str, set[str]] = {path: set() for path in sorted(paths)}
    for name in files:
        path, _, last = name.rpartition(".")
        if path in layers and last in form.tensor_names:
            layers[path].add(last)
    if not layers:
        raise FormatError(
            f"{folder} has no quantized layer: no tensor is named .{form.marker}, as {form.name} names them"
        )
    return ForeignFolder(folder, form, headers, files, {path: frozenset(names) for path, names in layers.items()})


def is_foreign(folder: Path) -> bool:
    """Say whether a folder's configuration is of a method that :func:`read_folder` reads; files are not looked at."""
    try:
        return method_of(_configuration(folder)) is not None
    except FormatError:
        return False


def _configuration(folder: Path) -> Mapping[str, Any]:
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            found = config[key]
            if not isinstance(found, dict):
                raise FormatError(f"{folder / 'config.json'} has a {key} that is a {type(found).__name__}, not a map")
            return found
    for name in OLD_CONFIGS:
        if (folder / name).is_file():
            return _json(folder / name)
    raise FormatError(f"{folder} says nothing of quantization: its config.json has no quantization_config")


def _files(folder: Path) -> list[str]:
    """Return the safetensors files of a folder: those of its index, or all."""
    if not (folder / _INDEX).is_file():
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        if not found:
            raise FormatError(f"{folder} has no safetensors files; lq reads no pickles: save it again as safetensors")
        return found
    names = _json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise FormatError(f"{folder / _INDEX} has no map weight_map")
    found = sorted({str(file) for file in names.values()})
    for file in found:
        if file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise FormatError(f"{_INDEX} names the file {file!r}: expected a safetensors file in the same folder")
        if not (folder / file).is_file():
            raise FormatError(f"{_INDEX} names {file!r}, which is missing")
    return found


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise FormatError(f"{path} has {path.stat().st_size} bytes: more than any model needs")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path} is a {type(data).__name__}: expected a map")
    return data

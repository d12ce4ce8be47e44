"""``lq.json``: what a checkpoint says of its weights, checked whole before a tensor is read.

A folder from anywhere may lie. Its index, the headers of its files and the model to load into are held against each other
first, with tensors on ``meta`` standing for those of the files; only then does loading touch the model.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lq_formats import FormatError, ShapeError, UnknownVersionError, UnsupportedError
from torch import nn

from lq_torch.safetensors_header import DTYPES, SafetensorsHeader, check_safetensors
from lq_torch.tensors import LowBitTensor

FORMAT_VERSION = 2
INDEX_NAME = "lq.json"
MAX_INDEX_BYTES = 256 << 20
SEPARATOR = ":"
VERSION_KEY = "lq_format_version"


@dataclass(frozen=True)
class CheckpointIndex:
    """A checked ``lq.json`` and the checked headers of the files it names.

    Attributes:
        weights: Spec of each quantized weight by path: :meth:`LowBitTensor.spec_json` and the names of its ``tensors``.
        aliases: Tied names, each by the name it repeats.
        files: File of each stored tensor; those of a quantized weight are named ``path:inner``.
        headers: Header of each file.
    """

    weights: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    files: dict[str, str]
    headers: dict[str, SafetensorsHeader]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight by path, aliases included.

        Raises:
            FormatError: If the stored tensors do not fit the specs.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, file in self.files.items():
            path, separator, inner = name.partition(SEPARATOR)
            entry = self.headers[file].tensors[name]
            if separator:
                stand_in = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
                parts.setdefault(path, {})[inner] = stand_in
            else:
                shapes[path] = entry.shape
        for path, tensors in parts.items():
            spec = self.weights.get(path)
            if spec is None:
                raise FormatError(f"{path!r} is stored as a quantized weight without a spec")
            if path in shapes:
                raise FormatError(f"{path!r} is stored both quantized and dense")
            if sorted(tensors) != spec.get("tensors"):
                raise FormatError(f"{path!r} has the tensors {sorted(tensors)}, its spec says {spec.get('tensors')}")
            try:
                shapes[path] = LowBitTensor.check_tensors(tensors, spec)
            except FormatError as error:
                raise FormatError(f"{path!r}: {error}") from None
        if lost := sorted(set(self.weights) - set(parts)):
            raise FormatError(f"{len(lost)} specs belong to no stored tensor, among them {lost[:3]}")
        for alias, target in self.aliases.items():
            if target not in shapes:
                raise FormatError(f"{alias!r} is said to repeat {target!r}, which the checkpoint lacks")
        return shapes | {alias: shapes[target] for alias, target in self.aliases.items()}

    def check_model(self, model: nn.Module) -> None:
        """Raise unless the checkpoint's weights are the model's, by name and by shape.

        Raises:
            FormatError: If names are missing or unexpected, or stored tensors do not fit their specs.
            ShapeError: If a weight has another shape in the model.
            UnsupportedError: If the model has a buffer on ``meta`` that the checkpoint does not fill.
        """
        shapes = self.shapes()
        own: Mapping[str, Any] = model.state_dict(keep_vars=True)
        if missing := sorted(set(own) - set(shapes)):
            raise FormatError(f"the checkpoint lacks {len(missing)} tensors of the model, among them {missing[:3]}")
        # Floating point buffers that are not persistent are stored too; a model without them is another model.
        buffers = dict(model.named_buffers(remove_duplicate=False))
        own = buffers | dict(own)
        if unexpected := sorted(set(shapes) - set(own)):
            raise FormatError(
                f"the checkpoint has {len(unexpected)} tensors that the model lacks, among them {unexpected[:3]}"
            )
        for path, buffer in buffers.items():
            if path not in shapes and buffer.device.type == "meta":
                raise UnsupportedError(
                    f"the buffer {path!r} of the model is on meta and not in the checkpoint: build the model with its "
                    "buffers"
                )
        for path, file in self.files.items():
            dtype = self.headers[file].tensors[path].dtype
            if path in own and DTYPES[dtype].is_floating_point != own[path].is_floating_point():
                raise FormatError(f"{path} is {dtype} in the checkpoint and {own[path].dtype} in the model")
        for path, shape in shapes.items():
            if tuple(own[path].shape) != shape:
                raise ShapeError(
                    f"{path} has shape {shape} in the checkpoint and {tuple(own[path].shape)} in the model"
                )


def read_index(folder: Path) -> CheckpointIndex:
    """Read and check ``lq.json`` and the headers of the files it names; no tensor is read.

    Raises:
        FormatError: If the folder is not an lq checkpoint, or is damaged.
        UnknownVersionError: If it was written in another format version.
        FileNotFoundError: If there is no such folder.
    """
    path = folder / INDEX_NAME
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is not a folder with an {INDEX_NAME}")
    if not path.is_file():
        raise FormatError(
            f"{folder} is not an lq checkpoint: it has no {INDEX_NAME}, or writing it was interrupted "
            "(lq_torch.import_pretrained reads GPTQ, AWQ and others)"
        )
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise FormatError(f"{path} has {path.stat().st_size} bytes: more than any model needs")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(index, dict) or "format_version" not in index:
        raise FormatError(f"{path} is not an lq index")
    _check_version(path, index["format_version"])
    for key, kind in (("weights", dict), ("aliases", str), ("files", str)):
        entries = index.get(key)
        if not isinstance(entries, dict) or not all(isinstance(value, kind) for value in entries.values()):
            raise FormatError(f"{path} has no map {key!r} of names")
    headers: dict[str, SafetensorsHeader] = {}
    for name, file in index["files"].items():
        if file not in headers:
            headers[file] = _read_header(folder, file)
        if name not in headers[file].tensors:
            raise FormatError(f"{folder / file} lacks the tensor {name!r} that {INDEX_NAME} places there")
    return CheckpointIndex(index["weights"], index["aliases"], index["files"], headers)


def _read_header(folder: Path, file: str) -> SafetensorsHeader:
    if file != os.path.basename(file) or not file.endswith(".safetensors"):
        raise FormatError(f"{INDEX_NAME} names the file {file!r}: expected a safetensors file in the same folder")
    path = folder / file
    if not path.is_file():
        raise FormatError(f"{INDEX_NAME} names {file!r}, which is missing")
    header = check_safetensors(path)
    version = header.metadata.get(VERSION_KEY)
    if version is None:
        raise FormatError(f"{path} was not written by lq: its metadata has no {VERSION_KEY}")
    _check_version(path, int(version) if version.isdecimal() and len(version) < 9 else version)
    return header


def _check_version(path: Path, version: object) -> None:
    if type(version) is not int or version != FORMAT_VERSION:
        old = type(version) is int and version < FORMAT_VERSION
        advice = "save the model again with this release" if old else "upgrade lq-torch"
        raise UnknownVersionError(
            f"{path} has format version {version!r}; this release reads {FORMAT_VERSION}: {advice}"
        )

"""import_pretrained: a model with lq's weights from a folder that another library wrote."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from lq_formats import DTypeError, FormatError
from torch import Tensor, nn

from lq_torch.arguments import check_module, parse_device
from lq_torch.checkpoint import assign_tensor, resolve_tensor
from lq_torch.interop.folder import ForeignFolder, read_folder
from lq_torch.interop.weights import to_tensor
from lq_torch.merge import refuse_merged
from lq_torch.quantize import named
from lq_torch.safetensors_header import read_tensor
from lq_torch.tensors import LowBitTensor
from lq_torch.tensors.base import SCALE_DTYPES


def import_pretrained(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a checkpoint of GPTQ, AWQ, compressed-tensors, HQQ or AutoRound; nothing is quantized or rounded.

    4-bit layers become :class:`lq_torch.Int4Tensor` (with ``desc_act``, :class:`lq_torch.Int4PermutedTensor`), 8-bit ones
    with a scale a row :class:`lq_torch.Int8Tensor`, others :class:`lq_torch.IntxTensor`. Headers and configuration are
    checked before anything of their size is allocated, and layers are converted one at a time on ``device``.

    Args:
        directory: A folder with config.json and safetensors files.
        model: A module of the same structure, on any device including ``meta``: its weights are replaced. None builds
            the Hugging Face model of the folder's config.json.
        device: Where the weights go.
        dtype: Compute in this dtype; None keeps that of the model's parameters (of config.json). Scales keep theirs.

    Returns:
        The model, in evaluation mode if it was built here.

    Raises:
        FormatError: If the folder is damaged, not quantized, or its tensors are not the model's; ``model`` is as it was,
            unless a layer's values contradict its configuration, which shows when it is read.
        ShapeError: If a weight has another shape in the model.
        UnsupportedError: If the kind of checkpoint, or one layer, is none that lq holds; the message says which.
        SpecError, DTypeError, DeviceError: If ``model`` is no module, ``dtype`` is not fp16, bf16 or fp32, or there is no such
            device.
        MissingPackageError: If a Hugging Face model is to be built and transformers is not installed.
    """
    folder = read_folder(Path(directory))
    if dtype is not None and dtype not in SCALE_DTYPES:
        raise DTypeError(f"dtype={dtype}: expected float16, bfloat16 or float32")
    target = parse_device(device)
    built = model is None
    if model is None:
        from lq_torch.integrations.transformers import build_model

        model = build_model(folder.path)
        if hasattr(model, "config") and hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # what it says is not how the model is saved from now on
    check_module(model, "import_pretrained")
    refuse_merged(model, "import_pretrained")
    known, aliases = folder.check_model(model)
    _check_biases(folder, folder.extra_biases(model))
    dtypes = {name: value.dtype for name, value in model.state_dict(keep_vars=True).items()}
    wanted = set(known) | {f"{path}.{name}" for path, names in folder.layers.items() for name in names}
    for name, value in _stream(folder, wanted, target, dtype, dtypes):
        assign_tensor(model, name, value)
    for name, repeated in aliases.items():
        assign_tensor(model, name, resolve_tensor(model, repeated))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(target)
    return model.eval() if built else model


def _stream(
    folder: ForeignFolder,
    wanted: set[str],
    device: torch.device,
    dtype: torch.dtype | None,
    dtypes: dict[str, torch.dtype],
) -> Iterator[tuple[str, Tensor]]:
    """Yield whole weights by name, holding no more than the unfinished ones."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for file, header in folder.headers.items():
        with (folder.path / file).open("rb") as handle:
            for name, entry in header.tensors.items():
                if name not in wanted:
                    continue
                value = read_tensor(handle, entry).to(device)
                path = folder.layer_of(name)
                if path is None:
                    here = dtype or dtypes.get(name, value.dtype)
                    yield name, value.to(here) if value.is_floating_point() else value
                    continue
                waiting.setdefault(path, {})[name.rpartition(".")[2]] = value
                del value
                if waiting[path].keys() == folder.layers[path]:
                    weight = f"{path}.weight"
                    yield weight, _convert(folder, path, waiting.pop(path), dtype or dtypes[weight])


def _convert(folder: ForeignFolder, path: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> LowBitTensor:
    with named(path):
        return to_tensor(folder.form.unpack(tensors), dtype)


def _check_biases(folder: ForeignFolder, names: list[str]) -> None:
    """Raise FormatError unless the biases that the model has no place for are zero."""
    for name in names:
        with (folder.path / folder.files[name]).open("rb") as handle:
            if bool(read_tensor(handle, folder.entry(name)).any()):
                raise FormatError(f"the checkpoint has {name!r}, and the model's layer has no bias")

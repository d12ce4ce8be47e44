"""export_pretrained: a model with lq's weights as a folder that other libraries read."""

import json
import os
from pathlib import Path

from lq_formats import UnsupportedError
from lq_formats.interop import LayerScheme, export_format
from safetensors.torch import save_file
from torch import Tensor, nn

from lq_torch.arguments import check_module
from lq_torch.checkpoint import FOREIGN_NAMES, MAX_SHARD_BYTES, save_configs, separate_storage, split_shards
from lq_torch.checkpoint_index import INDEX_NAME
from lq_torch.interop.folder import OLD_CONFIGS
from lq_torch.interop.weights import to_affine
from lq_torch.merge import refuse_merged
from lq_torch.quantize import named
from lq_torch.staging import check_folder, refuse_holding, replacing
from lq_torch.tensors import LowBitTensor

# Of an earlier checkpoint: readers would take its configuration for that of the new files, or its index.
_STALE = (*OLD_CONFIGS, *FOREIGN_NAMES, "model-*-of-*.safetensors")


def export_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    format: str = "gptq",  # noqa: A002
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a quantized model in another library's format; codes, scales and zeros stay what they are, bit for bit.

    Args:
        model: A module whose quantized weights belong to ``nn.Linear`` layers.
        directory: Made if needed. A checkpoint of Hugging Face's or another library's in it is replaced when the new files are
            whole, config.json last: a folder without it is an interrupted export.
        format: ``"gptq"``, ``"gptq_v2"``, ``"awq"``, ``"compressed-tensors"``, ``"hqq"`` or ``"auto-round"``.
        max_shard_bytes: Start a new safetensors file beyond this size; a weight is never split.

    Raises:
        SpecError: If there is no such format, the folder holds a checkpoint of lq, or ``model`` is no module.
        UnsupportedError: If the format cannot hold a layer (named) exactly: floating point zeros in most formats, other
            than 4 bits in awq, layers that differ where a format has one scheme for all, merged layers.
        ShapeError, DTypeError: If a layer does not fill the format's words, or has float32 scales where it stores half.
    """
    check_module(model, "export_pretrained")
    form = export_format(format)
    refuse_merged(model, "export_pretrained")
    folder = Path(directory)
    check_folder(folder)
    refuse_holding(folder, [INDEX_NAME], "a checkpoint of lq, which lq_torch.load would go on reading")
    values = _values(model)
    parts = split_shards(values, max_shard_bytes)
    schemes: dict[str, LayerScheme] = {}
    files: dict[str, str] = {}
    total = 0
    with replacing(folder, "config.json", _STALE) as partial:
        for number, part in enumerate(parts, 1):
            file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for name, value in part.items():
                if not isinstance(value, LowBitTensor):
                    tensors[name] = value
                    continue
                path = name.removesuffix(".weight")
                with named(path):
                    weight = to_affine(value)
                    tensors |= {f"{path}.{inner}": tensor for inner, tensor in form.pack(weight).items()}
                schemes[path] = LayerScheme.of(weight)
            save_file(separate_storage(tensors), partial / file, metadata={"format": "pt"})
            files |= dict.fromkeys(tensors, file)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        if len(parts) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": files}
            _write(partial / "model.safetensors.index.json", index)
        quantization = form.to_config(schemes, [path for path in linears if path not in schemes])
        if not save_configs(model, partial, quantization):
            _write(partial / "config.json", {"quantization_config": quantization})


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Return what is saved by name; of tied tensors the first.

    Raises:
        UnsupportedError: If nothing is quantized, something quantized is no Linear's weight, or the model is on ``meta``.
    """
    result: dict[str, Tensor] = {}
    seen = set()
    linears = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.device.type == "meta":
            raise UnsupportedError(f"{name!r} has no values to export: expected tensors that are not on meta")
        if isinstance(value, LowBitTensor) and name not in linears:
            raise UnsupportedError(f"{name!r} is quantized and not the weight of an nn.Linear: formats know no other")
        if id(value) not in seen:
            seen.add(id(value))
            result[name] = value
    if not any(isinstance(value, LowBitTensor) for value in result.values()):
        raise UnsupportedError("the model has no quantized layer to export; quantize_ it first")
    return result


def _write(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")

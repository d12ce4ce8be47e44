"""export_pretrained: a model with lq's weights as a folder that other libraries read."""

import copy
import json
import os
from pathlib import Path

from lq_formats import UnsupportedError
from lq_formats.interop import LayerScheme, export_format
from safetensors.torch import save_file
from torch import Tensor, nn

from lq_torch.checkpoint import MAX_SHARD_BYTES, separate_storage, split_shards
from lq_torch.interop.weights import to_affine
from lq_torch.merge import refuse_merged
from lq_torch.quantize import named
from lq_torch.tensors import LowBitTensor


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
        directory: Made if needed. config.json is written last: a folder without it is an interrupted export.
        format: ``"gptq"``, ``"gptq_v2"``, ``"awq"``, ``"compressed-tensors"``, ``"hqq"`` or ``"auto-round"``.
        max_shard_bytes: Start a new safetensors file beyond this size; a weight is never split.

    Raises:
        SpecError: If there is no such format.
        UnsupportedError: If the format cannot hold a layer (named) exactly: floating point zeros in most formats, other
            than 4 bits in awq, layers that differ where a format has one scheme for all, merged layers.
        ShapeError, DTypeError: If a layer does not fill the format's words, or has float32 scales where it stores half.
    """
    form = export_format(format)
    refuse_merged(model, "export_pretrained")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    values = _values(model)
    parts = split_shards(values, max_shard_bytes)
    schemes: dict[str, LayerScheme] = {}
    files: dict[str, str] = {}
    total = 0
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
        save_file(separate_storage(tensors), folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    dense = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in schemes]
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        _write(folder / "model.safetensors.index.json", index)
    quantization = form.to_config(schemes, dense)
    config = copy.deepcopy(getattr(model, "config", None))
    if config is None or not hasattr(config, "save_pretrained"):
        _write(folder / "config.json", {"quantization_config": quantization})
        return
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    config.quantization_config = quantization
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


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

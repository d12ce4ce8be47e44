"""load_gguf: the weights of a GGUF file in a transformers model, packed and where they lie in the mapped file."""

import os
from collections.abc import Collection
from dataclasses import dataclass

import torch
from lq_formats import GGML_FORMATS, DTypeError, FormatError, LQError, ShapeError, SpecError, UnsupportedError
from lq_formats.gguf import GGMLType, GGUFFile, GGUFTensor, ggml_type, open_gguf
from torch import Tensor, nn

from lq_torch.arguments import check_module, parse_device
from lq_torch.checkpoint import assign_tensor, resolve_tensor
from lq_torch.gguf.architecture import ROPE_FREQS, architecture_of, check_heads, split_rows
from lq_torch.gguf.configuration import configuration
from lq_torch.gguf.hyperparameters import check_hyperparameters
from lq_torch.merge import refuse_merged
from lq_torch.tensors import GGMLTensor, LowBitTensor
from lq_torch.tensors.base import SCALE_DTYPES

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def load_gguf(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    dequantize: Collection[str] = (),
) -> nn.Module:
    """Fill a transformers model with the weights of a GGUF file; nothing is quantized or rounded again.

    Quantized weights of Linear layers and of the embedding become :class:`lq_torch.GGMLTensor`, with the file's bytes. On the
    CPU they are views of the mapped file, so that memory is taken as they are used; the file may be replaced, not changed,
    while the model lives. Everything is checked first: on any error the model is as it was. The tokenizer is transformers'
    affair.

    Args:
        path: A file of architecture ``llama``, ``qwen2`` or ``qwen3``.
        model: A causal language model of transformers, of type llama, mistral, qwen2 or qwen3, on any device including ``meta``
            (its buffers elsewhere): its weights are replaced. None builds the one that the file describes, in bf16.
        device: Where the weights go.
        dtype: Compute in this dtype: that of packed weights' products, and plain tensors (norms, biases) are converted to it.
            None keeps each parameter's.
        dequantize: Names of ggml types whose tensors become dense weights of ``dtype``, for example ``("q2_k",)``. A type that
            lq reads and cannot keep packed is an error unless it is named here.

    Returns:
        The model, in evaluation mode if it was built here.

    Raises:
        FormatError: If the file is damaged, of another architecture, has other hyperparameters than the model, or its tensors
            are not the model's.
        ShapeError: If a tensor has another shape in the model.
        UnsupportedError: If the model or the type of a tensor is none that lq knows, or the model holds merged layers.
        SpecError, DTypeError, DeviceError: If ``dequantize`` names no type, ``model`` is no module, ``dtype`` is not fp16, bf16
            or fp32, or there is no such device.
        MissingPackageError: If a model is to be built and transformers is not installed.
    """
    if dtype is not None and dtype not in SCALE_DTYPES:
        raise DTypeError(f"dtype={dtype}: expected float16, bfloat16 or float32")
    if isinstance(dequantize, str):
        raise SpecError(f"dequantize={dequantize!r}: expected names in a collection, ({dequantize!r},)")
    dense = {ggml_type(name).name for name in dequantize}
    target = parse_device(device)
    file = open_gguf(path)
    built = model is None
    if model is None:
        from lq_torch.integrations.transformers import build_causal_lm

        model = build_causal_lm(configuration(file, dtype or torch.bfloat16))
    check_module(model, "load_gguf")
    refuse_merged(model, "load_gguf")
    plan, tied = _plan(file, model, dtype, dense)
    for step in plan:
        value = _read(file, step, target)
        if step.path == _EMBEDDING and not tied and isinstance(value, GGMLTensor):
            value = value.by_rows()
        assign_tensor(model, step.path, value)
    if tied:
        assign_tensor(model, _HEAD, resolve_tensor(model, _EMBEDDING))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(target)
    return model.eval() if built else model


@dataclass(frozen=True)
class _Step:
    """One tensor on its way: its place in the model, its name in the file, and what becomes of it."""

    path: str
    name: str
    dtype: torch.dtype
    packed: bool
    heads: int | None


def _plan(
    file: GGUFFile, model: nn.Module, dtype: torch.dtype | None, dense: Collection[str]
) -> tuple[list[_Step], bool]:
    """Hold a file against a model; return what to read and whether the head repeats the embedding."""
    architecture = architecture_of(model)
    config = model.config
    check_hyperparameters(file, architecture, config)
    own: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    for path, buffer in model.named_buffers():
        if buffer.device.type == "meta":
            raise UnsupportedError(f"the buffer {path!r} of the model is on meta: build the model with its buffers")
    tied = _HEAD in own and own[_HEAD] is own.get(_EMBEDDING)
    names = {path: architecture.file_name(path) for path in own if not (tied and path == _HEAD)}
    if missing := sorted(set(names.values()) - set(file.tensors)):
        raise FormatError(
            f"{file.name} lacks {len(missing)} tensors of the model, among them {missing[:3]}{_untie(missing)}"
        )
    if extra := sorted(set(file.tensors) - set(names.values()) - {ROPE_FREQS}):
        raise FormatError(
            f"{file.name} has {len(extra)} tensors that the model lacks, among them {extra[:3]}{_tie(extra)}"
        )
    plan = []
    for path, name in names.items():
        info = file.tensors[name]
        if info.shape != tuple(own[path].shape):
            raise ShapeError(
                f"{path} has shape {tuple(own[path].shape)} in the model, and {name} in {file.name} has {info.shape}"
            )
        heads = architecture.heads(path, config)
        if heads is not None:
            check_heads(path, info.shape[0], heads)
        wanted = dtype or own[path].dtype
        plan.append(_Step(path, name, wanted, _stays_packed(model, path, info, wanted, dense), heads))
    return plan, tied


def _untie(missing: list[str]) -> str:
    tied = missing == ["output.weight"]
    return "; its output is its embedding: set tie_word_embeddings in the model's configuration" if tied else ""


def _tie(extra: list[str]) -> str:
    untied = extra == ["output.weight"]
    return "; its output is not its embedding: clear tie_word_embeddings in the model's configuration" if untied else ""


def _stays_packed(model: nn.Module, path: str, info: GGUFTensor, dtype: torch.dtype, dense: Collection[str]) -> bool:
    """Say whether a tensor is kept in blocks.

    Raises:
        FormatError: If it holds integers.
        UnsupportedError: If it cannot be, and nobody asked for a dense one, or lq does not read its type.
    """
    kind = info.type
    if kind.dtype is not None:
        if not kind.dtype.is_floating_point:
            raise FormatError(f"{info.name} is {kind.name}: expected floating point values or quantized blocks")
        return False
    if kind.name not in GGML_FORMATS:
        raise UnsupportedError(
            f"{info.name} is {kind.name}, which lq cannot read: convert the file to one of {', '.join(GGML_FORMATS)}"
        )
    if kind.name in dense:
        return False
    reason = _why_not_packed(model, path, info, dtype)
    if reason is None:
        return True
    raise UnsupportedError(
        f"{info.name} is {kind.name} and cannot stay packed: {reason}; load_gguf(..., dequantize=({kind.name!r},)) makes "
        "tensors of this type dense"
    )


def _why_not_packed(model: nn.Module, path: str, info: GGUFTensor, dtype: torch.dtype) -> str | None:
    module = model.get_submodule(path.rpartition(".")[0])
    if not isinstance(module, nn.Linear | nn.Embedding) or not path.endswith(".weight"):
        return f"{path} is neither the weight of a Linear layer nor of an embedding"
    try:
        blocks = torch.empty(info.type.block_shape(info.shape), dtype=torch.uint8, device="meta")
        LowBitTensor.check_tensors({"qdata": blocks}, _spec(info.type, info.shape, dtype))
    except LQError as error:
        return str(error)
    return None


def _spec(kind: GGMLType, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, object]:
    return {
        "kind": GGMLTensor.kind,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "attributes": {"ggml_type": kind.name},
    }


def _read(file: GGUFFile, step: _Step, device: torch.device) -> Tensor:
    """Return one weight; what of the file was copied need not stay in memory."""
    info = file.tensors[step.name]
    source = file.blocks(step.name) if info.type.dtype is None else file.tensor(step.name)
    value = source if step.heads is None else split_rows(source, step.heads)
    held = value = value.to(device)
    if step.packed:
        result: Tensor = LowBitTensor.from_tensors({"qdata": value}, _spec(info.type, info.shape, step.dtype))
    elif info.type.dtype is None:
        result = held = GGML_FORMATS[info.type.name].dequantize(value, step.dtype)
    else:
        result = held = value.to(step.dtype)
    if held.data_ptr() != source.data_ptr():
        file.release(step.name)
    return result

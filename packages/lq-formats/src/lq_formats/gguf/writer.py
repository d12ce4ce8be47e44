"""Write a GGUF file tensor by tensor: the table first, then each tensor when its turn comes, and the name at the end."""

import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from struct import pack
from typing import Any

import torch
from torch import Tensor

from lq_formats.errors import DTypeError, FormatError, ShapeError, SpecError, UnsupportedError
from lq_formats.folders import why_not_place
from lq_formats.gguf.reader import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC
from lq_formats.gguf.types import TYPES_BY_DTYPE, GGMLType, ggml_type
from lq_formats.gguf.values import MAX_KEY, GGUFValue, ValueType, encode_string

_VERSION = 3
# ggml keeps names in 64 bytes, the last of them zero.
_MAX_NAME = 63


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write, of which only the size is known until its turn comes.

    Attributes:
        type: Its ggml type.
        shape: In torch's order; the last dimension is a multiple of the type's block size.
        read: Returns its values in the type's dtype and this shape, or its blocks ``(..., K // block_size, type_size) uint8``.
    """

    type: GGMLType
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def plain(cls, tensor: Tensor) -> "TensorSource":
        """Return a tensor as it is, in its own dtype.

        Raises:
            DTypeError: If GGUF has no such type, or this is no tensor.
            UnsupportedError: If it has no values (``meta``), or is sparse.
        """
        if not isinstance(tensor, Tensor):
            raise DTypeError(f"{type(tensor).__name__}: expected a torch.Tensor or a TensorSource")
        if tensor.layout is not torch.strided or tensor.is_meta:
            found = "on the device 'meta', without values" if tensor.is_meta else f"of layout {tensor.layout}"
            raise UnsupportedError(f"a tensor {found}: expected values to write; load it, or call to_dense()")
        kind = TYPES_BY_DTYPE.get(tensor.dtype)
        if kind is None:
            raise DTypeError(
                f"GGUF has no type for {tensor.dtype}: expected one of {', '.join(map(str, TYPES_BY_DTYPE))}"
            )
        return cls(kind, tuple(tensor.shape), lambda: tensor)

    @classmethod
    def packed(cls, type_name: str, blocks: Tensor) -> "TensorSource":
        """Return ggml blocks ``(..., K // block_size, type_size) uint8`` as a tensor ``(..., K)``.

        Raises:
            SpecError: If there is no type of that name.
            ShapeError, DTypeError: If the blocks are not of that type.
        """
        kind = ggml_type(type_name)
        if blocks.dtype != torch.uint8:
            raise DTypeError(f"blocks have dtype {blocks.dtype}: expected uint8")
        if blocks.dim() < 2 or blocks.shape[-1] != kind.type_size:
            raise ShapeError(
                f"{kind.name} blocks have shape {tuple(blocks.shape)}: expected (..., K // {kind.block_size}, {kind.type_size})"
            )
        return cls(kind, (*blocks.shape[:-2], blocks.shape[-2] * kind.block_size), lambda: blocks)


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor | TensorSource],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Write a GGUF file, version 3. It appears under its name when it is whole; a file of that name is replaced then.

    Args:
        path: Of the file; its folder exists.
        metadata: Values by key: :class:`GGUFValue`, or Python values that :meth:`GGUFValue.of` understands. The alignment is
            added where it is not 32.
        tensors: By name, in the order in which they are written; one is held at a time.
        alignment: Of the tensors' bytes in the file: a power of two, 8 or more.

    Raises:
        SpecError: If a key, a value, a name or the alignment is none that GGUF has, or no file can be made at ``path``.
        DTypeError, ShapeError: If a tensor is of no such type or shape, or reads as another than announced.
        UnsupportedError: If a tensor has no values (``meta``), or is sparse.
    """
    if type(alignment) is not int or not 8 <= alignment < 1 << 32 or alignment & alignment - 1:
        raise SpecError(f"alignment={alignment!r:.80}: expected a power of two of at least 8, in 32 bits")
    target = Path(path)
    _check_target(target)
    sources = {name: source_of(tensor) for name, tensor in tensors.items()}
    header = _header(metadata, sources, alignment)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(header)
            _pad(file, alignment)
            for name, source in sources.items():
                _write_tensor(file, name, source)
                _pad(file, alignment)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise


def _check_target(target: Path) -> None:
    """Raise SpecError unless a file can take this name: before tensors are read, not after it."""
    reason = why_not_place(target)
    if not reason and not target.parent.exists():
        reason = f"the folder {str(target.parent)!r} is missing"
    if reason:
        raise SpecError(f"cannot write {str(target)!r}: {reason}; give the name of a file in a folder that is there")


def source_of(tensor: Tensor | TensorSource) -> TensorSource:
    """Return a tensor as a source; sources as they are."""
    return tensor if isinstance(tensor, TensorSource) else TensorSource.plain(tensor)


def _header(metadata: Mapping[str, Any], sources: Mapping[str, TensorSource], alignment: int) -> bytes:
    values = {key: GGUFValue.of(value) for key, value in metadata.items() if key != ALIGNMENT_KEY}
    if alignment != DEFAULT_ALIGNMENT:
        values[ALIGNMENT_KEY] = GGUFValue(ValueType.UINT32, alignment)
    parts = [MAGIC, pack("<IQQ", _VERSION, len(sources), len(values))]
    for key, value in values.items():
        parts += [_encode_name(key, "metadata key", MAX_KEY), value.encode()]
    offset = 0
    for name, source in sources.items():
        nbytes = _nbytes(name, source)
        parts += [_encode_name(name, "tensor name", _MAX_NAME), _encode_info(source.shape, source.type.code, offset)]
        offset += nbytes + -nbytes % alignment
    return b"".join(parts)


def _encode_name(name: str, what: str, limit: int) -> bytes:
    if not isinstance(name, str):
        raise SpecError(f"the {what} {name!r:.80} is no text: expected a str")
    try:
        octets = encode_string(name)
    except UnicodeEncodeError as error:
        raise SpecError(
            f"the {what} {name!r:.80} is not UTF-8 ({error.reason}): expected text without surrogates"
        ) from None
    if not 0 < len(octets) - 8 <= limit:
        raise SpecError(f"the {what} {name!r:.80} has {len(octets) - 8} bytes: expected 1 to {limit}")
    return octets


def _encode_info(shape: Sequence[int], code: int, offset: int) -> bytes:
    return pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), code, offset)


def _nbytes(name: str, source: TensorSource) -> int:
    try:
        return math.prod(source.type.block_shape(source.shape))
    except FormatError as error:
        raise ShapeError(f"{name!r}: {error}") from None


def _write_tensor(file: BufferedWriter, name: str, source: TensorSource) -> None:
    values = source.read().detach()
    blocks = source.type.block_shape(source.shape)
    dtype, shape = (torch.uint8, blocks) if source.type.dtype is None else (source.type.dtype, source.shape)
    if values.dtype != dtype or tuple(values.shape) != shape:
        raise ShapeError(
            f"{name!r} reads as {tuple(values.shape)} {values.dtype}: expected {shape} {dtype}, as announced"
        )
    octets = values.resolve_neg().cpu().contiguous().view(-1).view(torch.uint8)
    file.write(memoryview(octets.numpy()))  # type: ignore[arg-type]


def _pad(file: BufferedWriter, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))

"""Read a GGUF file: metadata, a table of tensors, and their bytes where they lie in the mapped file.

::

    "GGUF" | u32 version | u64 tensors | u64 values | values | tensors' infos | padding | bytes of tensors
    value   key string | typed value                         (:mod:`lq_formats.gguf.values`)
    info    name string | u32 dimensions | u64 sizes, innermost first | u32 ggml type | u64 offset, aligned

A file from anywhere may lie about every number in it. All of them are checked before a tensor is made or memory is taken for
what they claim: counts and lengths against the bytes left, types and shapes against the block sizes, ranges of bytes against
each other and against the file's end.
"""

import math
import mmap
import os
import reprlib
import stat
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lq_formats.errors import DTypeError, FormatError, SpecError, UnknownVersionError, UnsupportedError
from lq_formats.ggml import GGML_FORMATS
from lq_formats.gguf.types import MAX_DIMENSIONS, TYPES_BY_CODE, GGMLType
from lq_formats.gguf.values import MAX_KEY, Cursor, GGUFValue, ValueType, quote

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
# Far above any model (the largest have tens of thousands of tensors): what a hostile table may cost in Python objects.
MAX_TENSORS = 1 << 20
MAX_VALUES = 1 << 16
_SMALLEST_INFO = 8 + 4 + 4 + 8
_SMALLEST_VALUE = 8 + 4 + 1
_SIZES = tuple(struct.Struct(f"<{count}Q") for count in range(MAX_DIMENSIONS + 1))


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """What a file says of one tensor.

    Attributes:
        name: Of the tensor.
        shape: In torch's order, outermost first: the reverse of the file's.
        type: Its ggml type.
        offset: Where its bytes begin in the file.
        nbytes: How many they are.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int


class GGUFFile:
    """A checked GGUF file. Tensors are views of its bytes: reading one copies nothing.

    Args:
        buffer: The whole file, writable (a ``bytearray``, a private map); see :func:`open_gguf`.
        name: Of the file, for messages.

    Attributes:
        name: As given.
        version: 2 or 3.
        alignment: Of the tensors' offsets, in bytes.
        metadata: Typed values by key; :meth:`get` returns them plainly.
        tensors: What there is, by name, in the file's order.

    Raises:
        FormatError: If the bytes are not a GGUF file, or one that is truncated, damaged or inconsistent.
        UnknownVersionError: If its version is not 2 or 3.
        UnsupportedError: If it is big endian or holds arrays of arrays.
        DTypeError: If the buffer is read-only.
    """

    version: int
    alignment: int
    metadata: Mapping[str, GGUFValue]
    tensors: Mapping[str, GGUFTensor]

    def __init__(self, buffer: Any, name: str = "the GGUF file") -> None:
        self.name = name
        self._buffer = memoryview(buffer).cast("B")
        if self._buffer.readonly:
            raise DTypeError(f"the buffer of {name} is read-only: expected a bytearray or a private map (open_gguf)")
        cursor = Cursor(self._buffer, name)
        self.version, tensors = _read_start(cursor)
        self.metadata = MappingProxyType(_read_values(cursor))
        self.alignment = _alignment(cursor, self.metadata)
        self.tensors = MappingProxyType(_read_tensors(cursor, tensors, self.alignment))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the plain value of a metadata key, or ``default``."""
        found = self.metadata.get(key)
        return default if found is None else found.value

    def blocks(self, name: str) -> Tensor:
        """Return a tensor's bytes as blocks ``(..., K // block_size, type_size) uint8``: a view of the file.

        Writing to it changes this process's private copy of the page, never the file.

        Raises:
            SpecError: If there is no such tensor.
        """
        info = self._find(name)
        shape = info.type.block_shape(info.shape)
        return self._view(info, torch.uint8, math.prod(shape)).view(shape)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of a plain type (F32, F16, BF16, F64, I8 to I64) in its dtype: a view of the file.

        Raises:
            SpecError: If there is no such tensor.
            UnsupportedError: If it consists of blocks: :meth:`blocks` gives them, :meth:`dequantize` their values.
        """
        info = self._find(name)
        if info.type.dtype is None:
            raise UnsupportedError(
                f"{self.name}: {name!r} consists of {info.type.name} blocks; blocks() gives them, dequantize() their values"
            )
        return self._view(info, info.type.dtype, math.prod(info.shape)).view(info.shape)

    def dequantize(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of any type that lq reads in a floating dtype, in memory of its own.

        Raises:
            SpecError: If there is no such tensor.
            UnsupportedError: If lq does not read its type.
            DTypeError: If ``dtype`` is no floating dtype.
        """
        info = self._find(name)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise DTypeError(f"dtype={dtype}: expected a floating dtype; weights are not dequantized to integers")
        if info.type.dtype is not None:
            return self.tensor(name).to(dtype, copy=True)
        form = GGML_FORMATS.get(info.type.name)
        if form is None:
            raise UnsupportedError(
                f"{self.name}: {name!r} is {info.type.name}, which lq cannot read; it reads {', '.join(GGML_FORMATS)}; "
                "convert the model to one of them"
            )
        return form.dequantize(self.blocks(name), dtype)

    def release(self, name: str) -> None:
        """Let go of the memory of a tensor that has been copied, where the system can; its next use reads the file anew.

        What was written to the tensor in this process is lost.

        Raises:
            SpecError: If there is no such tensor.
        """
        info = self._find(name)
        source = self._buffer.obj
        if not isinstance(source, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
            return
        # Whole pages of this tensor only: a page at its ends has bytes of others.
        begin = info.offset + -info.offset % mmap.PAGESIZE
        end = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            source.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _find(self, name: str) -> GGUFTensor:
        found = self.tensors.get(name) if isinstance(name, str) else None
        if found is None:
            raise SpecError(f"{self.name} has no tensor {name!r}; it has {len(self.tensors)}: {list(self.tensors)[:3]}")
        return found

    def _view(self, info: GGUFTensor, dtype: torch.dtype, count: int) -> Tensor:
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if sys.byteorder == "big" and dtype.itemsize > 1:
            raise UnsupportedError("GGUF files are little endian: their tensors are not read on a big-endian machine")
        # A storage of its own size for each tensor: copies and torch.save take no more than it.
        return torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=info.offset)

    def __repr__(self) -> str:
        return f"GGUFFile({self.name!r}, {len(self.metadata)} values, {len(self.tensors)} tensors)"


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Map a GGUF file and check it; only its header is read.

    The map is private (what is written to a tensor stays in this process) and lives as long as a tensor of it. The file must
    not be shortened meanwhile: the operating system ends processes that read what is gone. :func:`write_gguf` never shortens
    a file, it replaces it.

    Raises:
        FormatError, UnknownVersionError, UnsupportedError: As :class:`GGUFFile`.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        raise FormatError(f"{path} is empty or no regular file: expected a GGUF file")
    with path.open("rb") as file:
        return GGUFFile(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), str(path))


def _read_start(cursor: Cursor) -> tuple[int, int]:
    """Read up to the number of tensors; return version and number."""
    begin = cursor.advance(4, "the magic number")
    magic = bytes(cursor.buffer[begin : cursor.position])
    if magic != MAGIC:
        raise FormatError(f"{cursor.name} begins with {magic!r}: expected {MAGIC!r}; it is not a GGUF file")
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        raise UnsupportedError(f"{cursor.name} is big endian, which lq does not read; convert it to little endian")
    if version not in VERSIONS:
        advice = "convert the model again" if version < min(VERSIONS) else "upgrade lq-formats"
        raise UnknownVersionError(f"{cursor.name} has GGUF version {version}; lq reads 2 and 3: {advice}")
    return version, cursor.count("tensors", _SMALLEST_INFO, MAX_TENSORS)


def _read_values(cursor: Cursor) -> dict[str, GGUFValue]:
    values: dict[str, GGUFValue] = {}
    for _ in range(cursor.count("metadata values", _SMALLEST_VALUE, MAX_VALUES)):
        key = cursor.text("a metadata key", MAX_KEY)
        if key in values:
            raise cursor.error(f"the metadata key {quote(key)} appears twice: the file is damaged")
        values[key] = cursor.value(quote(key))
    return values


def _alignment(cursor: Cursor, metadata: Mapping[str, GGUFValue]) -> int:
    found = metadata.get(ALIGNMENT_KEY)
    if found is None:
        return DEFAULT_ALIGNMENT
    alignment = found.value
    if found.type is not ValueType.UINT32 or alignment < 8 or alignment & alignment - 1:
        raise FormatError(
            f"{cursor.name}: {ALIGNMENT_KEY} is {reprlib.repr(alignment)} of type {found.type.name}: expected a power "
            "of two of at least 8, UINT32; the file is damaged"
        )
    return int(alignment)


def _read_tensors(cursor: Cursor, number: int, alignment: int) -> dict[str, GGUFTensor]:
    """Read the table, and check that every tensor's bytes are in the file and are its own."""
    table: dict[str, tuple[tuple[int, ...], GGMLType, int, int]] = {}
    for _ in range(number):
        name = cursor.text("a tensor's name", MAX_KEY)
        if name in table:
            raise cursor.error(f"the tensor {quote(name)} appears twice: the file is damaged")
        table[name] = _read_info(cursor, quote(name), alignment)
    start = cursor.position + -cursor.position % alignment
    left = len(cursor.buffer) - start
    position, previous = 0, ""
    for offset, nbytes, name in sorted((row[2], row[3], name) for name, row in table.items()):
        if nbytes > left - offset:
            raise FormatError(
                f"{cursor.name}: {quote(name)} has {nbytes} bytes from {offset} on, and the file {max(left, 0)} bytes of "
                "tensors: truncated or damaged; fetch it again"
            )
        if nbytes and offset < position:
            raise FormatError(
                f"{cursor.name}: the bytes of {quote(name)} begin at {offset}, those of {quote(previous)} end at {position}: "
                "tensors overlap, the file is damaged"
            )
        if offset + nbytes > position:  # an empty one may lie inside another
            position, previous = offset + nbytes, name
    return {
        name: GGUFTensor(name, shape, kind, start + offset, nbytes)
        for name, (shape, kind, offset, nbytes) in table.items()
    }


def _read_info(cursor: Cursor, name: str, alignment: int) -> tuple[tuple[int, ...], GGMLType, int, int]:
    """Read the info of one tensor after its (quoted) name: shape, type, offset and bytes."""
    count = cursor.u32(f"the number of dimensions of {name}")
    if count > MAX_DIMENSIONS:
        raise cursor.error(f"{name} has {count} dimensions: expected at most {MAX_DIMENSIONS}; the file is damaged")
    sizes = _SIZES[count].unpack_from(cursor.buffer, cursor.advance(8 * count, f"the shape of {name}"))
    shape = sizes[::-1]
    code = cursor.u32(f"the type of {name}")
    kind = TYPES_BY_CODE.get(code)
    if kind is None:
        raise cursor.error(
            f"{name} has ggml type {code}, which was removed from ggml or is unknown to this release: convert the model "
            "again, or upgrade lq-formats"
        )
    offset = cursor.u64(f"the offset of {name}")
    if offset % alignment:
        raise cursor.error(f"{name} begins at {offset}: expected a multiple of {alignment}; the file is damaged")
    try:
        return shape, kind, offset, math.prod(kind.block_shape(shape))
    except FormatError as error:
        raise cursor.error(f"{name}: {error}; the file is damaged") from None

"""Check a safetensors file before anything of its size is allocated or mapped.

The file is ``u64 header length | JSON header | tensor bytes``. A file from anywhere may lie about every number in it, so each
is checked against the size of the file: the header's length, every tensor's dtype, shape and byte range, that ranges
neither overlap nor leave gaps, and that the file ends where the last one does.
"""

import json
import math
import mmap
import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from lq_formats import FormatError
from torch import Tensor

MAX_HEADER_BYTES = 100 << 20
_MAX_DIMENSIONS = 32
_OWN_PAGES = 1 << 20
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: safetensors dtype name, shape, bytes, and where in the file they start."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a checked file says of itself: its metadata and tensors."""

    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]


def check_safetensors(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        FormatError: If the file is truncated, oversized, inconsistent or not safetensors.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise FormatError(f"{path} has {size} bytes: too short for a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise FormatError(f"{path} claims a header of {length} bytes in a file of {size}: not a safetensors file")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} has no readable safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path} has a {type(header).__name__} for a header: not a safetensors file")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path} has metadata that is not a map of strings")
    tensors = {}
    ranges = []
    for name, entry in header.items():
        tensors[name], begin, end = _entry(path, name, entry, 8 + length)
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise FormatError(f"{path}: the bytes of {name!r} start at {begin}, expected {position} (overlap or gap)")
        position = end
    if position != size - 8 - length:
        raise FormatError(
            f"{path} holds {size - 8 - length} bytes of tensors and declares {position}: truncated or oversized"
        )
    return SafetensorsHeader(metadata, tensors)


def _entry(path: Path, name: str, entry: Any, start: int) -> tuple[TensorEntry, int, int]:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where} has the unknown dtype {dtype!r}")
    sizes = isinstance(shape, list) and all(type(item) is int and item >= 0 for item in shape)
    # Torch computes strides even of an empty tensor: the other sizes must not overflow.
    if not sizes or len(shape) > _MAX_DIMENSIONS or math.prod(max(item, 1) for item in shape) >= 2**60:
        raise FormatError(f"{where} has the shape {shape!r}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(item) is int and item >= 0 for item in offsets)
    ):
        raise FormatError(f"{where} has the byte range {offsets!r}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    begin, end = offsets
    if end - begin != nbytes:
        raise FormatError(f"{where} of shape {shape} and dtype {dtype} has {nbytes} bytes, its range {end - begin}")
    return TensorEntry(dtype, tuple(shape), nbytes, start + begin), begin, end


def read_tensor(file: BufferedReader, entry: TensorEntry) -> Tensor:
    """Read one tensor of a checked file straight into its own memory.

    A map of the file would count every page twice in the peak, once mapped and once in the tensor, and crash where the
    file is cut off meanwhile. Large tensors have an anonymous map each: one that is repacked or moved to a GPU gives its
    pages back, where malloc keeps holes between the weights that stay (measured: 1.8 times the size of the model).

    Raises:
        FormatError: If the file has become shorter since it was checked.
    """
    if entry.nbytes >= _OWN_PAGES:
        data = torch.frombuffer(mmap.mmap(-1, entry.nbytes), dtype=torch.uint8)
    else:
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
    if entry.nbytes:
        file.seek(entry.offset)
        if file.readinto(memoryview(data.numpy())) != entry.nbytes:  # type: ignore[arg-type]
            raise FormatError(f"{file.name} was truncated while it was read")
    return data.view(DTYPES[entry.dtype]).view(entry.shape)

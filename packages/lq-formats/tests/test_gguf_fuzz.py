"""Mutated GGUF files: a named error or a file that can be read, never anything else, and never memory for what it claims.

``LQ_GGUF_MUTATIONS`` sets how many (default 20,000; ``nox -s fuzz`` runs 200,000), ``LQ_GGUF_SEED`` repeats a failure.
"""

import os
import random
import secrets
import struct
import tracemalloc

import pytest
import torch
from lq_formats import GGML_FORMATS, LQError
from lq_formats.gguf import GGUFFile, GGUFValue, TensorSource, ValueType, write_gguf

MUTATIONS = int(os.environ.get("LQ_GGUF_MUTATIONS", "20000"))
# The parser's Python objects and its message. Beside these, a decoded string has up to four bytes for each of the file's.
OBJECTS = 16 << 10
PATTERNS = (
    0,
    1,
    2,
    3,
    8,
    9,
    12,
    31,
    32,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def valid_files(folder):
    """Three files that have everything a file can have; their tensors are larger than what parsing a header takes."""
    blocks = {name: torch.zeros(4, 8, form.type_size, dtype=torch.uint8) for name, form in GGML_FORMATS.items()}
    values = {
        "general.architecture": "llama",
        "numbers": [1, 2, 3],
        "strings": ["", "a", "bc", "ü"],
        "flag": True,
        "double": GGUFValue(ValueType.FLOAT64, 0.5),
        "byte": GGUFValue(ValueType.UINT8, 7),
        "flags": [True, False],
    }
    tensors = {
        "token_embd.weight": TensorSource.packed("q4_0", blocks["q4_0"]),
        "norm": torch.ones(256),
        "scalar": torch.tensor(1.0),
        "w": TensorSource.packed("q6_k", blocks["q6_k"]),
        "i": torch.arange(2048, dtype=torch.int64),
    }
    large = {"w": torch.zeros(64, 128)}
    cases = (
        (values, tensors, 32),
        ({"general.alignment": 64}, large, 64),
        ({}, {"a": torch.zeros(4096), "b": large["w"]}, 8),
    )
    result = []
    for number, (metadata, items, alignment) in enumerate(cases):
        path = folder / f"{number}.gguf"
        write_gguf(path, metadata, items, alignment=alignment)
        data = path.read_bytes()
        file = GGUFFile(bytearray(data))
        result.append((data, min(info.offset for info in file.tensors.values())))
    return result


def mutate(data, header, draw):
    """Change a copy of ``data`` in one to three places, most of them in its header."""
    mutated = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(min(header, len(mutated)) or 1)
        kind = draw.randrange(8)
        if kind <= 1:
            mutated[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            mutated[place : place + 1] = bytes([mutated[place] ^ 1 << draw.randrange(8)]) if mutated else b""
        elif kind == 3:
            mutated[place : place + 8] = struct.pack("<Q", draw.choice(PATTERNS))
        elif kind == 4:
            mutated[place : place + 4] = struct.pack("<I", draw.choice(PATTERNS) & 0xFFFFFFFF)
        elif kind == 5:
            del mutated[place : place + draw.randint(1, 16)]
        elif kind == 6:
            start = draw.randrange(header)
            mutated[place:place] = data[start : start + draw.randint(1, 40)]
        else:
            del mutated[draw.randrange(len(mutated) + 1) :]
    return mutated


def read_everything(file, size):
    """Read what a file that was accepted says, as a user would; every tensor lies in it and is its own."""
    for key, value in file.metadata.items():
        assert isinstance(key, str)
        value.encode()
    end = 0
    for name, info in sorted(file.tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        assert info.nbytes == 0 or end <= info.offset <= info.offset + info.nbytes <= size
        end = max(end, info.offset + info.nbytes)
        blocks = file.blocks(name)
        assert blocks.numel() == info.nbytes
        if info.type.dtype is not None:
            assert tuple(file.tensor(name).shape) == info.shape


def outcome(data):
    """Parse bytes: return the file or the error, and how much memory that took at its peak."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        result = GGUFFile(data)
    except Exception as error:  # judged by the caller
        result = error
    return result, tracemalloc.get_traced_memory()[1] - before


def test_mutated_files(tmp_path):
    seed = int(os.environ.get("LQ_GGUF_SEED") or secrets.randbits(48))
    draw = random.Random(seed)
    files = valid_files(tmp_path)
    accepted = 0
    tracemalloc.start()
    try:
        for number in range(MUTATIONS):
            original, header = files[number % len(files)]
            data = mutate(original, header, draw)
            where = f"mutation {number} of LQ_GGUF_SEED={seed}"
            result, peak = outcome(data)
            assert peak < 4 * len(original) + OBJECTS, f"{where}: {peak} bytes"
            if isinstance(result, GGUFFile):
                accepted += 1
                try:
                    read_everything(result, len(data))
                except Exception as error:
                    pytest.fail(f"{where}: accepted, and then {error!r}")
            else:
                assert isinstance(result, LQError), f"{where}: {result!r}"
                assert str(result).startswith("the GGUF file"), f"{where}: {result!r}"
    finally:
        tracemalloc.stop()
    assert MUTATIONS / 50 < accepted < MUTATIONS * 0.9

"""GGUF files that lie: each lie is a named error that says what came, and nothing is allocated for it."""

import os
import struct
import tracemalloc

import pytest
import torch
from lq_formats import FormatError, LQError, UnknownVersionError, UnsupportedError
from lq_formats.gguf import GGUFFile, open_gguf

HUGE = 2**63
ALLOWED = 256 << 10  # for Python's own objects, error and traceback


def message_of(value):
    """Name a test after the message that it expects."""
    return value if isinstance(value, str) else ""


def string(text):
    octets = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(octets)) + octets


def value(key, kind, payload):
    return string(key) + struct.pack("<I", kind) + payload


def info(name="w", sizes=(64, 2), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def build(values=(), infos=(), data=b"", version=3, tensors=None, count=None, magic=b"GGUF", alignment=32):
    tensors = len(infos) if tensors is None else tensors
    count = len(values) if count is None else count
    header = magic + struct.pack("<IQQ", version, tensors, count) + b"".join(values) + b"".join(infos)
    return bytearray(header + b"\0" * (-len(header) % alignment) + data)


def refused(data, message, error=FormatError):
    """Parse bytes, which must raise the named error without memory for what they claim."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=message) as caught:
            GGUFFile(data, "hostile.gguf")
        assert tracemalloc.get_traced_memory()[1] < ALLOWED + len(data)
    finally:
        tracemalloc.stop()
    assert isinstance(caught.value, LQError)
    assert "hostile.gguf" in str(caught.value)


GOOD = {"values": [value("k", 4, struct.pack("<I", 1))], "infos": [info()], "data": bytes(512)}


def test_the_unchanged_file_is_read():
    file = GGUFFile(build(**GOOD))
    assert file.get("k") == 1
    assert file.tensor("w").shape == (2, 64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytearray(), "magic number has 4 bytes and the file only 0"),
        (bytearray(b"GG"), "only 2 more"),
        (build(magic=b"GGML"), r"begins with b'GGML'.*not a GGUF file"),
        (build(magic=b"ggjt"), "not a GGUF file"),
        (bytearray(b"PK\3\4" + bytes(100)), "not a GGUF file"),
        (bytearray(b"GGUF\3\0\0\0"), "number of tensors has 8 bytes"),
    ],
    ids=["empty", "short", "ggml", "ggjt", "zip", "no-counts"],
)
def test_what_is_no_gguf_file(data, message):
    refused(data, message)


@pytest.mark.parametrize(("version", "advice"), [(0, "convert"), (1, "convert"), (4, "upgrade"), (65535, "upgrade")])
def test_a_version_that_lq_does_not_know(version, advice):
    refused(build(**GOOD, version=version), f"version {version}; lq reads 2 and 3: {advice}", UnknownVersionError)


def test_big_endian():
    refused(build(version=0x03000000), "big endian", UnsupportedError)


@pytest.mark.parametrize("count", [1, 1000, 1 << 21, 2**32, HUGE, 2**64 - 1])
def test_counts_beyond_the_file(count):
    refused(build(tensors=count), f"claims {count} tensors in the")
    refused(build(count=count), f"claims {count} metadata values in the")


def test_more_tensors_than_any_model_has():
    # Bytes for them there are: 24 a tensor.
    refused(build(tensors=(1 << 20) + 1, data=bytes(26 << 20)), "expected at most 1048576")


@pytest.mark.parametrize("length", [100, 2**32, HUGE - 1, HUGE, 2**64 - 1])
def test_lengths_beyond_the_file(length):
    long = struct.pack("<Q", length)
    refused(build([long + b"k"], count=1, data=bytes(16)), f"metadata key has {length} bytes")
    refused(build([string("k") + struct.pack("<I", 8) + long + b"v"]), f"value of 'k' has {length} bytes")
    refused(build(infos=[long + b"name"], tensors=1, data=bytes(32)), f"tensor's name has {length} bytes")
    strings = value("k", 9, struct.pack("<IQ", 8, 2) + string("a") + long)
    refused(build([strings], data=bytes(8)), f"a string of 'k' has {length} bytes")


@pytest.mark.parametrize("element", [0, 4, 6, 7, 8, 11, 12])
@pytest.mark.parametrize("count", [1000, 2**32, 2**61, HUGE, 2**64 - 1])
def test_arrays_beyond_the_file(element, count):
    refused(build([value("k", 9, struct.pack("<IQ", element, count))]), f"claims {count} elements of 'k'")


def test_a_string_longer_than_any():
    size = (64 << 20) + 1
    data = build([value("k", 8, struct.pack("<Q", size) + bytes(size))])
    refused(data, "expected at most 67108864")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (value("k", 13, bytes(8)), "value type 13"),
        (value("k", 2**32 - 1, bytes(8)), "value type 4294967295"),
        (value("k", 9, struct.pack("<IQ", 13, 1) + bytes(8)), "element type 13"),
        (value("k", 7, b"\2"), "boolean 2"),
        (value("k", 9, struct.pack("<IQ", 7, 3) + b"\0\1\2"), "boolean 2"),
        (value("k", 8, string(b"\xff\xfe")), "value of 'k' is not UTF-8"),
        (value("k", 8, string(b"\xed\xa0\x80")), "not UTF-8"),
        (value("k", 8, string(b"\xc0\x80")), "not UTF-8"),
        (value("k", 9, struct.pack("<IQ", 8, 1) + string(b"\xff")), "string of 'k' is not UTF-8"),
        (string(b"k\xff") + struct.pack("<II", 4, 1), "metadata key is not UTF-8"),
        (string("k" * 65536) + struct.pack("<II", 4, 1), "key has 65536 bytes: expected at most 65535"),
    ],
    ids=message_of,
)
def test_values_that_are_none(entry, message):
    refused(build([entry], data=bytes(64)), message)


def test_arrays_of_arrays():
    nested = struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 1) + struct.pack("<I", 5)
    refused(build([value("k", 9, nested)]), "array of arrays", UnsupportedError)
    deep = struct.pack("<IQ", 9, 1) * 10_000
    refused(build([value("k", 9, deep)]), "array of arrays", UnsupportedError)


def test_names_that_appear_twice():
    entry = value("k", 4, struct.pack("<I", 1))
    refused(build([entry, entry]), "key 'k' appears twice")
    refused(build(infos=[info(), info(offset=512)], data=bytes(2048)), "tensor 'w' appears twice")


@pytest.mark.parametrize(
    ("kind", "payload"),
    [(4, struct.pack("<I", n)) for n in (0, 1, 4, 24, 33, 2**32 - 1)]
    + [(10, struct.pack("<Q", 32)), (5, struct.pack("<i", -32)), (8, string("32")), (6, struct.pack("<f", 32.0))],
)
def test_alignments_that_are_none(kind, payload):
    refused(build([value("general.alignment", kind, payload)], infos=[info()], data=bytes(512)), "alignment is")


def test_an_alignment_beyond_the_file():
    large = value("general.alignment", 4, struct.pack("<I", 1 << 31))
    refused(build([large], [info()], bytes(512)), "the file 0 bytes of tensors")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (info(sizes=(1,) * 5), "5 dimensions"),
        (string("w") + struct.pack("<I", 2**32 - 1) + bytes(64), "4294967295 dimensions"),
        (info(sizes=(2**63, 2)), "fewer than 2\\*\\*60 elements"),
        (info(sizes=(2**32, 2**32)), "fewer than 2\\*\\*60 elements"),
        (info(sizes=(2**64 - 1,) * 4), "fewer than 2\\*\\*60 elements"),
        (info(sizes=(0, 2**40, 2**40)), "fewer than 2\\*\\*60 elements"),
        (info(sizes=(2**59,)), "has 2305843009213693952 bytes"),
        (info(kind=4), "ggml type 4, which was removed"),
        (info(kind=31), "ggml type 31"),
        (info(kind=99), "ggml type 99"),
        (info(kind=2**32 - 1), "ggml type 4294967295"),
        (info(sizes=(48, 2), kind=2), "multiple of 32"),
        (info(sizes=(128, 2), kind=12), "q4_k: expected the last dimension to be a multiple of 256"),
        (info(sizes=(2, 64), kind=8), "multiple of 32"),
        (info(sizes=(), kind=8), "multiple of 32"),
        (info(sizes=(32 << 20, 2), kind=2), "37748736 bytes"),
        (info(offset=1), "begins at 1: expected a multiple of 32"),
        (info(offset=16), "begins at 16: expected a multiple of 32"),
        (info(offset=32), "512 bytes from 32 on, and the file 512"),
        (info(offset=1 << 40), "from 1099511627776 on"),
        (info(offset=2**64 - 32), "from 18446744073709551584 on"),
        (info(name=b"\xff"), "name is not UTF-8"),
    ],
    ids=message_of,
)
def test_tables_that_lie(entry, message):
    refused(build(infos=[entry], data=bytes(512)), message)


@pytest.mark.parametrize(
    "offsets", [(0, 0), (0, 480), (32, 0), (512, 32)], ids=["same", "last-block", "reversed", "middle"]
)
def test_tensors_that_overlap(offsets):
    infos = [info("a", offset=offsets[0]), info("b", offset=offsets[1])]
    refused(build(infos=infos, data=bytes(1024)), "tensors overlap")


def test_a_small_tensor_inside_a_large_one():
    infos = [info("large", (512,), offset=0), info("gap", (8,), offset=2048), info("inside", (8,), offset=1024)]
    refused(build(infos=infos, data=bytes(4096)), "'inside' begin at 1024, those of 'large' end at 2048")


def test_an_empty_tensor_inside_a_large_one_hides_no_overlap():
    infos = [info("large", (512,), offset=0), info("empty", (0,), offset=512), info("inside", (8,), offset=1024)]
    refused(build(infos=infos, data=bytes(4096)), "'inside' begin at 1024, those of 'large' end at 2048")


def test_empty_tensors_overlap_nothing():
    infos = [info("a", (64, 2)), info("b", (64, 0)), info("c", (0,), offset=32)]
    file = GGUFFile(build(infos=infos, data=bytes(512)))
    assert file.tensor("b").shape == (0, 64)
    assert file.tensor("c").numel() == 0


@pytest.mark.parametrize("cut", [1, 31, 32, 511, 512, 600])
def test_a_truncated_file(cut):
    refused(build(**GOOD)[:-cut], "truncated")


def test_every_prefix_is_refused():
    data = build(**GOOD)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            GGUFFile(data[:length])


def test_large_arrays_take_no_more_memory_than_the_file():
    numbers = value("n", 9, struct.pack("<IQ", 0, 1 << 20) + bytes(1 << 20))
    strings = value("s", 9, struct.pack("<IQ", 8, 1 << 16) + string("ü") * (1 << 16))
    data = build([numbers, strings])
    tracemalloc.start()
    try:
        file = GGUFFile(data)
        assert tracemalloc.get_traced_memory()[1] < len(data) + ALLOWED
    finally:
        tracemalloc.stop()
    assert len(file.get("n")) == 1 << 20
    assert file.get("s")[-1] == "ü"


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(FormatError, match="no regular file"):
        open_gguf(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(FormatError, match="empty"):
        open_gguf(tmp_path / "empty.gguf")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")
        with pytest.raises(FormatError, match="no regular file"):  # and does not wait for a writer
            open_gguf(tmp_path / "pipe.gguf")
    (tmp_path / "bad.gguf").write_bytes(build(**GOOD)[:-1])
    with pytest.raises(FormatError, match=r"bad\.gguf"):
        open_gguf(tmp_path / "bad.gguf")


def test_a_sparse_file_is_checked_without_reading_it(tmp_path):
    path = tmp_path / "sparse.gguf"
    data = build(infos=[info("w", (1 << 30, 4), kind=24)])
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + (4 << 30))
    tracemalloc.start()
    try:
        opened = open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < ALLOWED
    finally:
        tracemalloc.stop()
    assert opened.tensor("w").shape == (4, 1 << 30)
    assert opened.tensor("w")[3, -1].item() == 0
    assert opened.tensor("w").dtype == torch.int8

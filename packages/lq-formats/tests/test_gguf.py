"""GGUF files: what is written is read back, by lq and by the ``gguf`` package, and what that writes lq reads."""

import math
import os
import secrets
import struct
import sys
import weakref
from array import array

import numpy
import pytest
import torch
from lq_formats import GGML_FORMATS, DTypeError, ShapeError, SpecError, UnsupportedError
from lq_formats.gguf import (
    GGML_TYPES,
    GGUFFile,
    GGUFValue,
    TensorSource,
    ValueType,
    ggml_type,
    open_gguf,
    write_gguf,
)

gguf = pytest.importorskip("gguf")

PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64)
METADATA = {
    "general.architecture": "llama",
    "general.name": "Größe 模型",
    "a.bool": True,
    "a.float": 0.1,
    "a.double": GGUFValue(ValueType.FLOAT64, 0.1),
    "a.u8": GGUFValue(ValueType.UINT8, 255),
    "a.i8": GGUFValue(ValueType.INT8, -128),
    "a.u16": GGUFValue(ValueType.UINT16, 65535),
    "a.i16": GGUFValue(ValueType.INT16, -32768),
    "a.u32": 2**32 - 1,
    "a.i32": -(2**31),
    "a.u64": 2**64 - 1,
    "a.i64": -(2**63),
    "a.empty": "",
    "a.strings": ["", "a", "ü", "<s>"],
    "a.bools": [True, False, True],
    "a.floats": [1.5, -2.0],
    "a.numbers": [0, 1, 2**31],
    "a.negative": [-1, 1],
    "a.large": [0, 2**63],
    "a.bytes": array("B", range(256)),
    "a.none": GGUFValue(ValueType.ARRAY, [], ValueType.STRING),
}


@pytest.fixture
def generator():
    seed = secrets.randbits(48)
    sys.stdout.write(f"seed {seed}")  # pytest shows it with a failure
    return torch.Generator().manual_seed(seed)


def random_blocks(name, rows, blocks, generator):
    """Blocks with finite scales: any bytes, but no fp16 whose exponent bits are all set."""
    form = GGML_FORMATS[name]
    data = torch.randint(0, 256, (rows, blocks, form.type_size), dtype=torch.uint8, generator=generator)
    for offset in form.halves:
        high = data[..., offset + 1]
        high[high & 0x7C == 0x7C] &= 0xFB
    return data


def random_tensors(generator):
    tensors = {f"plain.{str(dtype)[6:]}": (torch.randn(3, 5, generator=generator) * 50).to(dtype) for dtype in PLAIN}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["vector"] = torch.randn(7, generator=generator)
    tensors["cube"] = torch.randn(2, 3, 4, generator=generator)
    tensors["strided"] = torch.randn(6, 4, generator=generator).t()
    tensors["no.rows"] = torch.empty(0, 8)
    for name in GGML_FORMATS:
        if name != "q8_1":
            tensors[f"packed.{name}"] = TensorSource.packed(name, random_blocks(name, 4, 3, generator))
    return tensors


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_what_is_written_is_read_back(tmp_path, generator, alignment):
    tensors = random_tensors(generator)
    path = tmp_path / "all.gguf"
    write_gguf(path, METADATA, tensors, alignment=alignment)
    file = open_gguf(path)
    assert file.version == 3
    assert file.alignment == alignment
    assert list(file.tensors) == list(tensors)
    for name, tensor in tensors.items():
        info = file.tensors[name]
        assert info.offset % alignment == 0
        if isinstance(tensor, TensorSource):
            assert (info.type, info.shape) == (tensor.type, tensor.shape)
            assert torch.equal(file.blocks(name), tensor.read())
            form = GGML_FORMATS[info.type.name]
            assert torch.equal(file.dequantize(name), form.dequantize(tensor.read()))
            with pytest.raises(UnsupportedError, match="blocks"):
                file.tensor(name)
        else:
            assert file.tensor(name).dtype == tensor.dtype
            assert torch.equal(file.tensor(name), tensor)
            assert torch.equal(file.dequantize(name, torch.float64), tensor.double())
    for key, value in METADATA.items():
        found, typed = file.metadata[key], GGUFValue.of(value)
        assert (found.type, found.element) == (typed.type, typed.element)
        assert found.encode() == typed.encode()
    assert file.get("a.float") == struct.unpack("f", struct.pack("f", 0.1))[0]
    assert file.get("a.i64") == -(2**63)
    assert list(file.get("a.strings")) == METADATA["a.strings"]
    assert file.get("a.strings")[-1] == "<s>"
    assert file.get("a.strings")[1:3] == ["a", "ü"]
    assert file.get("no.such.key", 7) == 7


def test_gguf_py_reads_the_same_bytes(tmp_path, generator):
    tensors = {name: tensor for name, tensor in random_tensors(generator).items() if name != "scalar"}
    path = tmp_path / "all.gguf"
    metadata = {key: value for key, value in METADATA.items() if key != "a.none"}
    write_gguf(path, metadata, tensors)
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert [tensor.name for tensor in theirs.tensors] == list(tensors)
    for tensor in theirs.tensors:
        assert tensor.tensor_type.name.lower() == ours.tensors[tensor.name].type.name
        assert tuple(int(size) for size in reversed(tensor.shape)) == ours.tensors[tensor.name].shape
        assert tensor.data_offset == ours.tensors[tensor.name].offset
        assert tensor.data.tobytes() == ours.blocks(tensor.name).numpy().tobytes()
    for key in metadata:
        contents, value = theirs.fields[key].contents(), ours.get(key)
        assert contents == (list(value) if isinstance(contents, list) else value)


def test_what_gguf_py_writes_is_read(tmp_path, generator):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_custom_alignment(64)
    writer.add_uint32("qwen2.block_count", 3)
    writer.add_float64("x.double", 1e300)
    writer.add_bool("x.no", False)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "b", "é"])
    writer.add_array("x.scores", [0.5, -1.0])
    dense = torch.randn(4, 6, generator=generator)
    blocks = random_blocks("q5_k", 8, 2, generator)
    writer.add_tensor("dense", dense.numpy())
    writer.add_tensor("half", dense.half().numpy())
    writer.add_tensor("packed", blocks.reshape(8, -1).numpy(), raw_dtype=gguf.GGMLQuantizationType.Q5_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert file.alignment == 64
    assert file.get("general.architecture") == "qwen2"
    assert file.get("qwen2.block_count") == 3
    assert file.get("x.double") == 1e300
    assert file.get("x.no") is False
    assert list(file.get("tokenizer.ggml.tokens")) == ["<s>", "b", "é"]
    assert list(file.get("x.scores")) == [0.5, -1.0]
    assert torch.equal(file.tensor("dense"), dense)
    assert torch.equal(file.tensor("half"), dense.half())
    assert file.tensors["packed"].shape == (8, 512)
    assert torch.equal(file.blocks("packed"), blocks)
    expected = gguf.quants.dequantize(blocks.reshape(8, -1).numpy(), gguf.GGMLQuantizationType.Q5_K)
    numpy.testing.assert_array_equal(file.dequantize("packed").numpy(), expected)


def test_every_type_has_the_size_of_gguf_py():
    for kind in gguf.GGMLQuantizationType:
        ours = GGML_TYPES[kind.name.lower()]
        expected = (32, 36) if kind.name == "Q8_1" else gguf.GGML_QUANT_SIZES[kind]  # its table adds 4 to ggml's 36
        assert (ours.code, ours.block_size, ours.type_size) == (kind.value, *expected)
    assert len(GGML_TYPES) == len(gguf.GGMLQuantizationType)
    for name, form in GGML_FORMATS.items():
        assert (GGML_TYPES[name].block_size, GGML_TYPES[name].type_size) == (form.block_size, form.type_size)


def test_version_2_is_read(tmp_path):
    write_gguf(tmp_path / "x.gguf", {"k": 1}, {"t": torch.arange(4.0)})
    data = bytearray((tmp_path / "x.gguf").read_bytes())
    data[4:8] = struct.pack("<I", 2)
    file = GGUFFile(data)
    assert file.version == 2
    assert torch.equal(file.tensor("t"), torch.arange(4.0))


def test_tensors_are_views_of_a_private_map(tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path, {}, {"a": torch.zeros(4), "b": torch.ones(4)})
    before = path.read_bytes()
    file = open_gguf(path)
    a = file.tensor("a")
    assert file.tensor("a").data_ptr() == a.data_ptr() == file.blocks("a").data_ptr()
    assert a.untyped_storage().nbytes() == 16
    a.fill_(7)
    assert torch.equal(file.tensor("a"), torch.full((4,), 7.0))
    del file
    assert torch.equal(a, torch.full((4,), 7.0))  # the map lives as long as a tensor of it
    assert path.read_bytes() == before
    assert torch.equal(open_gguf(path).tensor("a"), torch.zeros(4))


def test_writing_replaces_a_file_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path, {}, {"a": torch.zeros(4)})
    old = open_gguf(path).tensor("a")
    before = path.read_bytes()

    def fail():
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_gguf(path, {}, {"a": torch.ones(4), "b": TensorSource(ggml_type("f32"), (4,), fail)})
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["x.gguf"]
    write_gguf(path, {}, {"a": torch.ones(4)})
    assert torch.equal(open_gguf(path).tensor("a"), torch.ones(4))
    assert torch.equal(old, torch.zeros(4))  # of the file that was replaced


def test_a_name_that_no_file_can_have_is_refused_before_a_tensor_is_read(tmp_path, monkeypatch):
    def unread():
        pytest.fail("a tensor was read")

    sources = {"t": TensorSource(ggml_type("f32"), (4,), unread)}
    (tmp_path / "file").write_text("not a folder")
    for path, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "x.gguf", "the folder .*no' is missing"),
        (tmp_path / "file" / "x.gguf", "is no folder"),
        (tmp_path / ("long" * 100) / "x.gguf", ""),
    ):
        with pytest.raises(SpecError, match=f"cannot write '.*': .*{message}; give the name of a file"):
            write_gguf(path, {}, sources)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SpecError, match="may not be written; give"):
        write_gguf(tmp_path / "x.gguf", {}, sources)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_view_that_negates_is_written_as_its_values(tmp_path):
    write_gguf(tmp_path / "x.gguf", {}, {"t": torch._neg_view(torch.arange(4.0))})
    assert open_gguf(tmp_path / "x.gguf").tensor("t").tolist() == [0, -1, -2, -3]


def test_one_tensor_is_held_at_a_time(tmp_path):
    read = []

    def values(index):
        assert all(reference() is None for reference in read)
        tensor = torch.full((64,), float(index))
        read.append(weakref.ref(tensor))
        return tensor

    sources = {f"t{i}": TensorSource(ggml_type("f32"), (64,), lambda i=i: values(i)) for i in range(3)}
    write_gguf(tmp_path / "x.gguf", {}, sources)
    file = open_gguf(tmp_path / "x.gguf")
    assert [file.tensor(f"t{i}")[0].item() for i in range(3)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"": 1}, "metadata key"),
        ({"k" * 65536: 1}, "65536 bytes"),
        ({"k": None}, "None"),
        ({"k": []}, "not empty"),
        ({"k": b"bytes"}, "bytes"),
        ({"k": [1, "a"]}, "mixes"),
        ({"k": [True, 2]}, "mixes"),
        ({"k": 2**64}, "64 bits"),
        ({"k": [-1, 2**63]}, "64 bits"),
        ({"k": GGUFValue(ValueType.UINT8, 256)}, "UINT8"),
        ({"k": GGUFValue(ValueType.FLOAT32, 1e300)}, "FLOAT32"),
        ({"k": 1e300}, "FLOAT32"),
        ({"k": [0.0, -1e300]}, "ARRAY of FLOAT32"),
        ({"k": GGUFValue(ValueType.ARRAY, array("i", [-1]), ValueType.UINT32)}, "ARRAY of UINT32"),
        ({"k": GGUFValue(ValueType.STRING, 3)}, "STRING"),
        ({"k": GGUFValue(ValueType.ARRAY, [300], ValueType.UINT8)}, "ARRAY of UINT8"),
        ({"k": GGUFValue(ValueType.ARRAY, [[1]], ValueType.ARRAY)}, "ARRAY"),
        ({"k": array("u", "x")}, "type code"),
        ({3: "k"}, "metadata key 3 is no text"),
        ({"\ud800": 1}, r"metadata key '\\ud800' is not UTF-8 \(surrogates not allowed\)"),
        ({"k": "\ud800"}, "STRING"),
        ({"k": GGUFValue(ValueType.BOOL, 5)}, "5 is not a GGUF value of type BOOL: 5 is no boolean"),
        ({"k": GGUFValue(ValueType.BOOL, 1.0)}, "BOOL: .*float"),
        ({"k": GGUFValue(ValueType.BOOL, "")}, "BOOL"),
        ({"k": GGUFValue(ValueType.ARRAY, [0, 2], ValueType.BOOL)}, "ARRAY of BOOL: 2 is no boolean"),
        ({"k": GGUFValue(ValueType.ARRAY, array("B", [1, 255]), ValueType.BOOL)}, "ARRAY of BOOL: 255 is no boolean"),
    ],
)
def test_metadata_that_gguf_cannot_hold_is_refused(tmp_path, metadata, message):
    with pytest.raises(SpecError, match=message):
        write_gguf(tmp_path / "x.gguf", metadata, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"x" * 64: torch.zeros(1)}, SpecError, "64 bytes: expected 1 to 63"),
        ({"": torch.zeros(1)}, SpecError, "tensor name"),
        ({b"x": torch.zeros(1)}, SpecError, "tensor name b'x' is no text"),
        ({"\udfff": torch.zeros(1)}, SpecError, r"tensor name '\\udfff' is not UTF-8"),
        ({"x": torch.zeros(1, dtype=torch.complex64)}, DTypeError, "complex64"),
        ({"x": [1.0]}, DTypeError, "list: expected a torch.Tensor"),
        ({"x": torch.zeros(1, device="meta")}, UnsupportedError, "meta"),
        ({"x": torch.eye(2).to_sparse()}, UnsupportedError, "sparse_coo"),
        ({"x": torch.zeros(1, 1, 1, 1, 1)}, ShapeError, "at most 4 dimensions"),
        ({"x": TensorSource(ggml_type("q4_k"), (2, 128), lambda: torch.zeros(0))}, ShapeError, "multiple of 256"),
        ({"x": TensorSource(ggml_type("f32"), (2,), lambda: torch.zeros(3))}, ShapeError, "announced"),
        ({"x": TensorSource(ggml_type("f32"), (2,), lambda: torch.zeros(2).half())}, ShapeError, "float16"),
        ({"x": TensorSource(ggml_type("q8_0"), (32,), lambda: torch.zeros(34).byte())}, ShapeError, r"\(1, 34\)"),
    ],
)
def test_tensors_that_gguf_cannot_hold_are_refused(tmp_path, tensors, error, message):
    with pytest.raises(error, match=message):
        write_gguf(tmp_path / "x.gguf", {}, tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alignment", [0, 1, 4, 24, -32, "a", 32.0, None, True, 2**32])
def test_an_alignment_that_is_none_is_refused(tmp_path, alignment):
    with pytest.raises(SpecError, match="power of two"):
        write_gguf(tmp_path / "x.gguf", {}, {}, alignment=alignment)


def test_blocks_that_are_none_are_refused():
    with pytest.raises(SpecError, match="q9_9"):
        TensorSource.packed("q9_9", torch.zeros(1, 18, dtype=torch.uint8))
    with pytest.raises(DTypeError, match="uint8"):
        TensorSource.packed("q4_0", torch.zeros(1, 18))
    with pytest.raises(ShapeError, match="18"):
        TensorSource.packed("q4_0", torch.zeros(1, 17, dtype=torch.uint8))


def test_asking_for_what_is_not_there(tmp_path):
    write_gguf(
        tmp_path / "x.gguf",
        {},
        {"w": TensorSource(ggml_type("iq2_xxs"), (1, 256), lambda: torch.zeros(1, 1, 66).byte())},
    )
    file = open_gguf(tmp_path / "x.gguf")
    with pytest.raises(SpecError, match="no tensor 'v'"):
        file.tensor("v")
    with pytest.raises(SpecError, match=r"no tensor \['w'\]"):
        file.blocks(["w"])
    with pytest.raises(DTypeError, match="dtype=float: expected a floating dtype"):
        file.dequantize("w", "float")
    with pytest.raises(UnsupportedError, match="iq2_xxs, which lq cannot read"):
        file.dequantize("w")
    assert file.blocks("w").shape == (1, 1, 66)
    with pytest.raises(DTypeError, match="read-only"):
        GGUFFile((tmp_path / "x.gguf").read_bytes())
    assert math.prod(file.tensors["w"].shape) == 256

"""Checkpoints that lie, whole models at a time: a named error, before memory is taken and with the model as it was."""

import copy
import json
import random
import struct

import pytest
import torch
from lq_formats import DTypeError, FormatError, LQError, ShapeError, UnknownVersionError, UnsupportedError
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4PackedLinear,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    QuantizedLinear,
    check_safetensors,
    load,
    quantize_,
    save_pretrained,
)
from safetensors.torch import save_file
from torch import nn

FILE = "model-00001-of-00001.safetensors"


def build(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 8), nn.BatchNorm1d(8)).eval()
    quantize_(model, Int4WeightOnlyConfig(32, symmetric=False), lambda module, path: path == "0")
    quantize_(model, Int8WeightOnlyConfig(), lambda module, path: path == "1")
    quantize_(model, GGMLWeightOnlyConfig("q5_1"), lambda module, path: path == "2")
    return model


@pytest.fixture
def saved(tmp_path):
    save_pretrained(build(), tmp_path)
    return tmp_path


def header_and_data(folder):
    data = (folder / FILE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(folder, header, data):
    text = json.dumps(header).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_index(folder, change):
    index = json.loads((folder / "lq.json").read_text())
    change(index)
    (folder / "lq.json").write_text(json.dumps(index))


def refused(folder, error=FormatError, message=None):
    """Load into a model of other values, which must raise and leave them."""
    model = build(seed=1)
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        load(folder, model)
    x = torch.randn(3, 64)
    assert torch.equal(model(x), before(x))
    assert {name: id(value) for name, value in model.named_parameters()}.keys() == dict(
        before.named_parameters()
    ).keys()


def test_the_unchanged_checkpoint_loads(saved):
    x = torch.randn(3, 64)
    assert torch.equal(load(saved, build(seed=1))(x), build()(x))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("0.weight:qdata", {"dtype": "F32"}, "qdata.*int32"),
        ("0.weight:qdata", {"shape": [64, 4]}, r"0\.weight.*qdata"),
        ("0.weight:qdata", {"shape": [128]}, "qdata"),
        ("0.weight:qdata", {"shape": [32, 2, 2]}, "qdata"),
        ("0.weight:zero", {"dtype": "I8"}, "zero"),
        ("1.weight:qdata", {"dtype": "U8"}, "qdata"),
        ("1.weight:scale", {"dtype": "I32"}, "scale"),
        ("2.weight:qdata", {"dtype": "I8"}, "qdata"),
        ("2.weight:qdata", {"shape": [8, 48]}, "qdata"),
        ("0.bias", {"shape": [16, 2]}, r"0\.bias"),
        ("0.bias", {"dtype": "I32"}, r"0\.bias.*I32"),
        ("3.num_batches_tracked", {"dtype": "F64"}, "num_batches_tracked"),
        ("0.bias", {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, "shape"),
        ("0.bias", {"shape": [1] * 1000 + [32]}, "shape"),
        ("0.bias", {"dtype": "F4"}, "dtype"),
        ("0.bias", {"dtype": ["F32"]}, "dtype"),
        ("0.bias", {"data_offsets": [0, 10**30]}, "range"),
        ("0.bias", {"data_offsets": [True, 128]}, "range"),
    ],
)
def test_a_header_that_disagrees_with_the_spec_is_refused(saved, name, change, message):
    header, data = header_and_data(saved)
    header[name].update(change)
    write(saved, header, data)
    refused(saved, (FormatError, ShapeError), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "header"),
        (b'{"x": ' + b"9" * 5000 + b"}", "header"),
        (b'{"x": NaN}', "dtype"),
        (b'{"__metadata__": {"a": 1}}', "metadata"),
        (b"\xff\xfe{}", "header"),
        (b"null", "header"),
    ],
    ids=["deep", "digits", "nan", "metadata", "not-utf8", "null"],
)
def test_text_that_breaks_parsers_is_refused(saved, text, message):
    (saved / FILE).write_bytes(struct.pack("<Q", len(text)) + text)
    refused(saved, message=message)
    (saved / "lq.json").write_bytes(text)
    refused(saved, message="lq")


def test_files_of_others_are_refused(saved):
    header, data = header_and_data(saved)
    write(saved, {**header, "__metadata__": {"format": "pt"}}, data)
    refused(saved, message="not written by lq")
    write(saved, {**header, "__metadata__": {"lq_format_version": "3"}}, data)
    refused(saved, UnknownVersionError, "upgrade")
    write(saved, {**header, "__metadata__": {"lq_format_version": "9" * 9000}}, data)
    refused(saved, UnknownVersionError)
    (saved / "lq.json").unlink()
    refused(saved, message="no lq.json")
    save_file({"0.weight": torch.zeros(32, 64)}, saved / "foreign.safetensors")
    assert check_safetensors(saved / "foreign.safetensors").metadata == {}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda index: index.update(format_version="2"), UnknownVersionError),
        (lambda index: index.update(format_version=True), UnknownVersionError),
        (lambda index: index.update(format_version=None), UnknownVersionError),
        (lambda index: index.update(files=[]), FormatError),
        (lambda index: index.update(files={"0.bias": 3}), FormatError),
        (lambda index: index.update(files={"0.bias": "/etc/passwd"}), FormatError),
        (lambda index: index.update(files={"0.bias": "..\\x.safetensors"}), FormatError),
        (lambda index: index.update(aliases={"0.bias": ["1.bias"]}), FormatError),
        (lambda index: index.update(aliases={"3.num_batches_tracked": "0.bias"}), ShapeError),
        (lambda index: index.update(weights={"0.weight": "int4"}), FormatError),
        (lambda index: index["weights"].update({"9.weight": index["weights"]["0.weight"]}), FormatError),
        (lambda index: index["weights"]["0.weight"].update(tensors=["qdata", "scale"]), FormatError),
        (lambda index: index["weights"]["0.weight"].pop("tensors"), FormatError),
        (lambda index: index["weights"]["0.weight"].update(shape=[64, 32]), FormatError),
        (lambda index: index["weights"]["0.weight"].update(shape=[2**62, 2**62]), FormatError),
        (lambda index: index["weights"]["0.weight"].update(attributes={"group_size": 0}), FormatError),
        (lambda index: index["weights"]["2.weight"]["attributes"].update(ggml_type="q8_0"), FormatError),
        (lambda index: index["weights"]["2.weight"]["attributes"].update(ggml_type=7), FormatError),
        (lambda index: index["files"].update({"0.weight": index["files"].pop("0.bias")}), FormatError),
        (lambda index: index["files"].pop("0.weight:scale"), FormatError),
        (lambda index: index["files"].pop("3.running_mean"), FormatError),
    ],
)
def test_an_index_that_lies_changes_nothing(saved, change, error):
    change_index(saved, change)
    refused(saved, error)


def _mutations(value, generator):
    """Yield copies of a JSON value, each with one leaf or branch replaced by something else."""
    junk = [None, True, -1, 0, 3, 2**31, 2**70, 0.5, "", "x", "F32", "int8", [], [1], {}, {"a": 1}]
    paths = []

    def walk(node, path):
        paths.append(path)
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            walk(node[key], [*path, key])

    walk(value, [])
    while True:
        twin = copy.deepcopy(value)
        path = generator.choice(paths[1:])
        parent = twin
        for key in path[:-1]:
            parent = parent[key]
        if generator.random() < 0.2:
            del parent[path[-1]]
        else:
            parent[path[-1]] = generator.choice(junk)
        yield twin


def test_mutated_checkpoints_load_or_are_refused_by_name(saved):
    generator = random.Random(1)
    header, data = header_and_data(saved)
    index = json.loads((saved / "lq.json").read_text())
    outcomes = {True: 0, False: 0}
    indices, headers = _mutations(index, generator), _mutations(header, generator)
    for number in range(250):
        (saved / "lq.json").write_text(json.dumps(next(indices) if number % 2 else index))
        write(saved, header if number % 2 else next(headers), data)
        try:
            load(saved, build(seed=1))
            outcomes[True] += 1
        except LQError:
            outcomes[False] += 1
    assert outcomes[False] > 175


def test_a_file_truncated_after_its_check_is_named(saved, monkeypatch):
    from lq_torch import checkpoint

    real = checkpoint.read_index

    def truncate(folder):
        index = real(folder)
        with (folder / FILE).open("r+b") as file:
            file.truncate((folder / FILE).stat().st_size - 300)
        return index

    monkeypatch.setattr(checkpoint, "read_index", truncate)
    with pytest.raises(FormatError, match="truncated"):
        load(saved, build(seed=1))


def test_what_cannot_be_saved_is_named(tmp_path):
    with torch.device("meta"):
        empty = nn.Linear(4, 4)
    with pytest.raises(UnsupportedError, match=r"'weight' is on the meta device"):
        save_pretrained(empty, tmp_path)
    named = nn.Module()
    named._parameters["a:b"] = nn.Parameter(torch.zeros(2))
    with pytest.raises(UnsupportedError, match="'a:b'"):
        save_pretrained(named, tmp_path)

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"step": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(UnsupportedError, match="dict"):
        save_pretrained(Extra(4, 4), tmp_path)


def test_a_model_with_an_empty_buffer_is_refused_before_it_is_changed(saved):
    model = build(seed=1)
    model.register_buffer("positions", torch.arange(4, device="meta"), persistent=False)
    before = model[0].weight
    with pytest.raises(UnsupportedError, match="positions"):
        load(saved, model)
    assert model[0].weight is before


def test_tensors_that_share_memory_without_being_tied_are_saved_apart(tmp_path):
    model = nn.Module()
    whole = torch.arange(12.0)
    model.a, model.b = nn.Parameter(whole[:6]), nn.Parameter(whole[6:])
    model.c, model.d = nn.Parameter(whole), nn.Parameter(whole.view(3, 4).t())
    save_pretrained(model, tmp_path)
    other = nn.Module()
    for name, parameter in model.named_parameters():
        setattr(other, name, nn.Parameter(torch.zeros_like(parameter)))
    load(tmp_path, other)
    for name, parameter in model.named_parameters():
        assert torch.equal(getattr(other, name), parameter)


def test_loading_in_a_dtype_keeps_codes_and_format_scales(tmp_path):
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Linear(64, 32), QuantizedLinear.from_linear(nn.Linear(32, 64)), nn.LayerNorm(64)
    )
    model.append(Int4PackedLinear.from_linear(nn.Linear(64, 8), 32))
    model.register_buffer("inverse_frequencies", torch.rand(4), persistent=False)
    quantize_(model, Int4WeightOnlyConfig(32), lambda module, path: path == "0")
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path, copy.deepcopy(model), dtype=torch.bfloat16)
    assert (loaded[0].weight.dtype, loaded[0].weight.scale.dtype) == (torch.bfloat16, torch.float32)
    assert {loaded[1].weight.dtype, loaded[3].weight.dtype, loaded[2].bias.dtype} == {torch.bfloat16}
    assert {loaded[2].scale.dtype, loaded[4].scales.dtype} == {torch.float32}
    assert torch.equal(loaded.inverse_frequencies, model.inverse_frequencies)
    x = torch.randn(5, 64)
    with torch.no_grad():
        y, expected = loaded(x.bfloat16()), model(x)
    assert y.dtype == torch.bfloat16
    assert float((y.float() - expected).norm() / expected.norm()) < 0.03
    with pytest.raises(DTypeError, match="float64"):
        load(tmp_path, copy.deepcopy(model), dtype=torch.float64)

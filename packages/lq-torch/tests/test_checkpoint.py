"""Checkpoints: what is saved is what is loaded, hostile files are refused, and memory stays near the quantized size."""

import copy
import json
import os
import random
import struct
import textwrap

import pytest
import torch
from lq_formats import DeviceError, FormatError, LQError, ShapeError, SpecError, UnknownVersionError, UnsupportedError
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    LowBitTensor,
    QuantizedLinear,
    check_safetensors,
    export_pretrained,
    load,
    quantize_,
    save_pretrained,
)
from lq_torch.safetensors_header import DTYPES
from safetensors.torch import load_file
from torch import nn


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.int8 = QuantizedLinear.from_linear(nn.Linear(64, 64))
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(64.0), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.int8(self.down(self.up(self.embed(tokens))) + self.table))


CONFIGS = [Int4WeightOnlyConfig(group_size=32, symmetric=False), Int8WeightOnlyConfig(), GGMLWeightOnlyConfig()]


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    quantize_(model, CONFIGS[0])
    save_pretrained(model, tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("config", CONFIGS, ids=["int4", "int8", "q4_0"])
@pytest.mark.parametrize("shard", [1 << 30, 2000], ids=["one-file", "many-files"])
def test_round_trip(config, shard, tmp_path):
    model = Tied()
    quantize_(model, config)
    save_pretrained(model, tmp_path, max_shard_bytes=shard)
    other = load(tmp_path, Tied())
    tokens = torch.arange(40)
    assert torch.equal(other(tokens), model(tokens))
    assert other.head.weight is other.embed.weight
    assert isinstance(other.up.weight, LowBitTensor)
    for name, tensor in model.up.weight.to_tensors().items():
        assert torch.equal(getattr(other.up.weight, name), tensor)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_files_hold_the_same_canonical_bits_for_every_library(symmetric, tmp_path):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(256, 72)).bfloat16()
    files = {}
    for packing in ("plain", "tile_packed_to_4d", "gemlite")[: 3 if symmetric else 2]:
        model = copy.deepcopy(dense)
        config = Int4WeightOnlyConfig(32, packing, symmetric=symmetric, int4_choose_qparams_algorithm="rtn")
        quantize_(model, config, lambda module, path: True)
        save_pretrained(model, tmp_path / packing)
        files[packing] = load_file(tmp_path / packing / "model-00001-of-00001.safetensors")
        loaded = load(tmp_path / packing, copy.deepcopy(dense))[0].weight
        assert type(loaded.data) is type(model[0].weight.data)
        for name, tensor in model[0].weight.inner_tensors().items():
            assert torch.equal(getattr(loaded, name), tensor)
            assert getattr(loaded, name).stride() == tensor.stride()
    plain = files.pop("plain")
    assert sorted(plain) == ["0.bias", "0.weight:qdata", "0.weight:scale"] + ["0.weight:zero"] * (not symmetric)
    for other in files.values():
        assert other.keys() == plain.keys()
        assert all(
            torch.equal(other[name], tensor) and other[name].dtype == tensor.dtype for name, tensor in plain.items()
        )


@pytest.mark.parametrize("persistent", [True, False])
def test_every_dtype_that_is_saved_is_loaded(persistent, tmp_path):
    def made() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64))
        turns = torch.polar(torch.ones(4), torch.arange(4.0))
        model.register_buffer("freqs_cis", turns, persistent=persistent)
        for number, dtype in enumerate(DTYPES.values()):
            if not dtype.is_complex:
                model.register_buffer(f"of_{number}", torch.arange(3).to(dtype))
        return model

    model, other = made(), made()
    quantize_(model, Int8WeightOnlyConfig())
    save_pretrained(model, tmp_path)
    other.freqs_cis.zero_()
    load(tmp_path, other)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer.view(torch.uint8), other.get_buffer(name).view(torch.uint8)), name
        assert buffer.dtype == other.get_buffer(name).dtype
    model.register_buffer("wide", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(
        UnsupportedError, match=r"'wide' has dtype torch\.complex128, which safetensors files do not hold"
    ):
        save_pretrained(model, tmp_path)
    load(tmp_path, made())


def test_saving_again_leaves_no_stale_files(saved):
    model, folder = saved
    save_pretrained(model, folder, max_shard_bytes=2000)
    save_pretrained(model, folder)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    assert load(folder, Tied()) is not None


def test_dense_weights_train_as_they_did_in_the_model(saved):
    _, folder = saved
    model = Tied()
    model.down.requires_grad_(False)
    model.up.bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert before["embed.weight"]
    load(folder, model)
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert after == before | {"up.weight": False}
    assert model.head.weight is model.embed.weight
    model(torch.arange(40)).sum().backward()
    assert model.embed.weight.grad is not None


@pytest.mark.parametrize("device", ["foo", "cuda:99", 1.5])
def test_a_device_that_is_none_is_named_and_changes_nothing(saved, device):
    _, folder = saved
    model = Tied()
    before = list(model.parameters())
    with pytest.raises(DeviceError, match=f"device={device!r}"):
        load(folder, model, device=device)
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))


def test_what_is_no_module_or_size_is_named(saved):
    model, folder = saved
    for save in (save_pretrained, export_pretrained):
        with pytest.raises(SpecError, match="max_shard_bytes='4GB'"):
            save(model, folder / "new", max_shard_bytes="4GB")
        for size in (0, -1, float("nan"), True):
            with pytest.raises(SpecError, match="expected a positive number of bytes"):
                save(model, folder / "new", max_shard_bytes=size)
    for task in (
        lambda: save_pretrained(None, folder),
        lambda: load(folder, "model"),
        lambda: export_pretrained(1, folder),
    ):
        with pytest.raises(SpecError, match=r"expected a torch\.nn\.Module"):
            task()


def index_of(folder):
    return json.loads((folder / "lq.json").read_text())


def write_index(folder, index):
    (folder / "lq.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda index: index.update(format_version=3), UnknownVersionError, "upgrade"),
        (lambda index: index.update(format_version=1), UnknownVersionError, "save the model again"),
        (lambda index: index.pop("weights"), FormatError, "weights"),
        (lambda index: index["files"].update({"up.bias": "../other.safetensors"}), FormatError, "same folder"),
        (lambda index: index["files"].update({"up.bias": "other.safetensors"}), FormatError, "missing"),
        (lambda index: index["files"].pop("up.bias"), FormatError, "lacks 1 tensors"),
        (lambda index: index["files"].update({"more": index["files"]["up.bias"]}), FormatError, "lacks the tensor"),
        (lambda index: index["weights"]["up.weight"].update(kind="int5"), FormatError, "unknown kind"),
        (lambda index: index["weights"]["up.weight"].update(shape=[128, 96]), FormatError, "qdata"),
        (lambda index: index["weights"]["up.weight"].update(shape=[-1, 64]), FormatError, "sizes"),
        (lambda index: index["weights"]["up.weight"].update(dtype="int8"), FormatError, "float16"),
        (lambda index: index["weights"]["up.weight"].update(attributes={}), FormatError, "group_size"),
        (lambda index: index["weights"]["up.weight"].update(attributes={"group_size": 24}), FormatError, "divide"),
        (lambda index: index["weights"].pop("up.weight"), FormatError, "without a spec"),
        (lambda index: index["aliases"].update({"head.weight": "nowhere"}), FormatError, "nowhere"),
    ],
)
def test_an_index_that_lies_is_refused(saved, change, error, message):
    _, folder = saved
    index = index_of(folder)
    change(index)
    write_index(folder, index)
    with pytest.raises(error, match=message):
        load(folder, Tied())


def test_foreign_folders_and_other_models_are_refused(saved, tmp_path):
    _, folder = saved
    with pytest.raises(FileNotFoundError, match=r"lq\.json"):
        load(folder / "nowhere")
    (folder / "lq.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        load(folder, Tied())
    (folder / "lq.json").write_text("[]")
    with pytest.raises(FormatError, match="not an lq index"):
        load(folder, Tied())


def test_a_model_of_other_sizes_is_refused(saved):
    _, folder = saved
    other = Tied()
    other.up.bias = nn.Parameter(torch.zeros(64))
    with pytest.raises(ShapeError, match=r"up\.bias"):
        load(folder, other)


def test_headers_are_checked_before_anything_is_read(saved, tmp_path):
    _, folder = saved
    path = folder / "model-00001-of-00001.safetensors"
    data = path.read_bytes()
    header = check_safetensors(path)
    assert header.metadata["lq_format_version"] == "2"
    assert header.tensors["up.weight:qdata"].dtype == "I32"
    bad = tmp_path / "bad.safetensors"
    for content in (b"", data[:7], data[:100], data[:-1], data + b"\0", b"\xff" * 8 + data[8:], b"PK\x03\x04" + data):
        bad.write_bytes(content)
        with pytest.raises(FormatError):
            check_safetensors(bad)
    for entry in (
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "X", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**63]},
        {"dtype": "F32", "shape": [1]},
        [],
    ):
        text = json.dumps({"x": entry}).encode()
        bad.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
        with pytest.raises(FormatError):
            check_safetensors(bad)


def test_mutated_headers_load_or_are_refused_by_name(saved, tmp_path):
    _, folder = saved
    data = bytearray((folder / "model-00001-of-00001.safetensors").read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    generator = random.Random(0)
    bad = tmp_path / "mutated.safetensors"
    refused = 0
    for _ in range(2000):
        mutated = bytearray(data)
        for _ in range(generator.randint(1, 3)):
            mutated[generator.randrange(8 + length)] = generator.randrange(256)
        bad.write_bytes(mutated)
        try:
            check_safetensors(bad)
        except LQError:
            refused += 1
    assert refused > 1000


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
@pytest.mark.exhaustive(where=lambda config: getattr(config, "int4_packing_format", "") == "gemlite")
@pytest.mark.parametrize(
    "config",
    [
        Int8WeightOnlyConfig(),
        *(
            Int4WeightOnlyConfig(128, name, int4_choose_qparams_algorithm="rtn")
            for name in ("tile_packed_to_4d", "gemlite")
        ),
    ],
    ids=["int8", "int4-tile", "int4-gemlite"],
)
def test_loading_peaks_below_1_15_of_the_quantized_size(config, tmp_path, run_script):
    for folder, layers, size in (("large", 24, 4096), ("small", 1, 256)):
        layer = nn.Sequential(nn.Linear(size // 2, size, bias=False).bfloat16())
        quantize_(layer, config)
        save_pretrained(nn.Sequential(*[copy.deepcopy(layer[0]) for _ in range(layers)]), tmp_path / folder)
    script = textwrap.dedent("""
        import sys, torch
        from torch import nn
        from lq_torch import load
        def build(layers, size):
            with torch.device("meta"):
                return nn.Sequential(*[nn.Linear(size // 2, size, bias=False) for _ in range(layers)])
        def peak():
            return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
        small, large = build(1, 256), build(24, 4096)
        load(sys.argv[1] + "/small", small)  # imports what loading needs, once a process
        before = peak()
        model = load(sys.argv[1] + "/large", large)
        after = peak()
        size = sum(layer.weight.packed_nbytes for layer in model)
        assert all(bool(t.any()) for layer in model for t in layer.weight.inner_tensors().values())
        print((after - before) / size)
    """)
    assert 0.9 < float(run_script(script, tmp_path)) < 1.15

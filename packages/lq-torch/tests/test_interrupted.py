"""Saving over an earlier model: wherever it fails, a folder holds the old model, the new one, or is refused; never a mix."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from lq_formats import FormatError, LQError, SpecError
from lq_torch import (
    GGMLWeightOnlyConfig,
    Int4WeightOnlyConfig,
    LowBitTensor,
    checkpoint,
    export_pretrained,
    import_pretrained,
    load,
    quantize_,
    save_pretrained,
)
from lq_torch.interop import exporting
from torch import nn


class Config:
    """Stands for a Hugging Face configuration."""

    def __init__(self, number):
        self.number = number

    def save_pretrained(self, folder):
        values = {"number": self.number} | {key: getattr(self, key) for key in vars(self) if key.startswith("quant")}
        (Path(folder) / "config.json").write_text(json.dumps(values))


class Net(nn.Module):
    def __init__(self, seed, dtype=torch.float16):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))
        self.to(dtype)
        self.config = Config(seed)


def quantized(seed):
    model = Net(seed)
    quantize_(model, Int4WeightOnlyConfig(32, int4_choose_qparams_algorithm="rtn"))
    return model


def values(model):
    return {
        name: value.dequantize() if isinstance(value, LowBitTensor) else value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
    }


def same(one, other):
    one, other = values(one), values(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Failing:
    """Makes the n-th of all changes to files fail."""

    def __init__(self, patch, number):
        self.left = number
        self.failed = False
        patch.setattr(checkpoint, "save_file", self.wrap(checkpoint.save_file, half=True))
        patch.setattr(exporting, "save_file", self.wrap(exporting.save_file, half=True))
        for owner, name in (
            (Path, "write_text"),
            (Path, "replace"),
            (Path, "mkdir"),
            (Path, "unlink"),
            (os, "fsync"),
            (checkpoint, "_canonical"),
            (exporting, "to_affine"),
        ):
            patch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function, half=False):
        def change(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                self.failed = True
                if half:
                    Path(args[1]).write_bytes(b"half")
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return change


SAVE = {"lq": save_pretrained, "gptq": export_pretrained}
LOAD = {"lq": load, "gptq": import_pretrained}


@pytest.mark.parametrize("shards", [(3000, 3000), (3000, 1 << 30), (1 << 30, 3000)], ids=["many", "to-one", "from-one"])
@pytest.mark.parametrize("kind", ["lq", "gptq"])
def test_a_failure_at_any_write_leaves_no_mix_of_two_models(kind, shards, tmp_path, monkeypatch):
    old, new = quantized(1), quantized(2)
    SAVE[kind](old, tmp_path / "old", max_shard_bytes=shards[0])
    outcomes = []
    for number in range(1, 100):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "old", folder)
        with monkeypatch.context() as patch:
            failing = Failing(patch, number)
            try:
                SAVE[kind](new, folder, max_shard_bytes=shards[1])
            except OSError:
                assert failing.failed
        if not failing.failed:
            break
        assert not [path for path in folder.iterdir() if path.is_dir()], "leftovers"
        try:
            loaded = LOAD[kind](folder, Net(3))
        except LQError:
            outcomes.append("refused")
        else:
            assert same(loaded, old)
            assert json.loads((folder / "config.json").read_text())["number"] == 1
            outcomes.append("old")
        # Saving again mends it.
        SAVE[kind](new, folder, max_shard_bytes=shards[1])
        assert same(LOAD[kind](folder, Net(3)), new)
    assert same(LOAD[kind](folder, Net(3)), new)
    assert json.loads((folder / "config.json").read_text())["number"] == 2
    # Refused only while files are replaced, after all are whole.
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {"old", "refused"}


def test_what_a_killed_process_left_is_removed(tmp_path):
    save_pretrained(quantized(1), tmp_path)
    (tmp_path / ".lq-partial").mkdir()
    (tmp_path / ".lq-partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    assert same(load(tmp_path, Net(3)), quantized(1))
    save_pretrained(quantized(2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "lq.json",
        "model-00001-of-00001.safetensors",
    ]


@pytest.mark.parametrize(("first", "second"), [(3000, 1 << 30), (1 << 30, 3000), (3000, 9000)])
def test_an_export_leaves_nothing_of_the_one_before(first, second, tmp_path):
    export_pretrained(quantized(1), tmp_path, max_shard_bytes=first)
    (tmp_path / "quantize_config.json").write_text('{"bits": 8}')
    (tmp_path / "tokenizer.json").write_text("{}")
    export_pretrained(quantized(2), tmp_path, max_shard_bytes=second)
    export_pretrained(quantized(2), tmp_path / "fresh", max_shard_bytes=second)
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {path.name for path in (tmp_path / "fresh").iterdir()} | {"tokenizer.json"}
    assert same(import_pretrained(tmp_path, Net(3)), quantized(2))


def test_folders_of_the_other_kind_are_refused(tmp_path):
    save_pretrained(quantized(1), tmp_path / "lq")
    with pytest.raises(SpecError, match=r"lq\.json"):
        export_pretrained(quantized(2), tmp_path / "lq")
    assert same(load(tmp_path / "lq", Net(3)), quantized(1))
    for shard in (3000, 1 << 30):
        export_pretrained(quantized(1), tmp_path / str(shard), max_shard_bytes=shard)
        with pytest.raises(SpecError, match=r"model\.safetensors"):
            save_pretrained(quantized(2), tmp_path / str(shard))
        assert same(import_pretrained(tmp_path / str(shard), Net(3)), quantized(1))


def test_an_export_that_is_refused_midway_writes_nothing(tmp_path):
    model = quantized(1)
    model.c = nn.Linear(64, 64)
    quantize_(model, GGMLWeightOnlyConfig())
    with pytest.raises(LQError):
        export_pretrained(model, tmp_path, max_shard_bytes=3000)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FormatError):
        import_pretrained(tmp_path, Net(3))

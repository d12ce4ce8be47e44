"""What the tuner is asked to measure: presets, sizes, models' configurations, and the list of it all."""

import json
import os
import re
import subprocess
import sys

import pytest
from lq_formats import FormatError, SpecError
from lq_kernels.tuned import run, shapes
from lq_kernels.tuned.kernels import weight


def test_the_preset_begins_with_what_counts_most():
    tasks = run.device_preset()
    first = tasks[: len(run.SHAPES) * len(run.TOKENS)]
    assert {m for _, m in first} == set(run.TOKENS)
    assert list(dict.fromkeys((each.n, each.k) for each, _ in first)) == list(run.SHAPES)
    assert {(each.bits, each.groups, each.zero, each.activation) for each, _ in first} == {(4, 1, False, "")}
    assert len(set(tasks)) == len(tasks)


# ---- shapes ----


def test_shapes_of_models_and_sizes():
    assert shapes.parse_shapes("4096x11008, 128X64,") == ((4096, 11008), (128, 64))
    llama = shapes.parse_shapes("llama-3-8b")
    assert set(llama) == {(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (28672, 4096)}
    assert (8192, 5120) in shapes.parse_shapes("qwen3-32b")  # q has more features than the residual stream
    for text in ("4096", "0x5", "axb", "1x2x3", "llama", "4096x99999999"):
        with pytest.raises(SpecError, match="unknown shape"):
            shapes.parse_shapes(text)
    for text in ("", "1,x", "0", "-2"):
        with pytest.raises(SpecError, match="positive integers"):
            shapes.parse_counts(text, "--tokens")
    assert shapes.parse_counts("-1, 128", "--group-size", or_row=True) == (-1, 128)
    with pytest.raises(SpecError, match="positive integers, separated"):
        shapes.parse_counts("-1", "--tokens")
    with pytest.raises(SpecError, match="positive integers or -1"):
        shapes.parse_counts("-2", "--group-size", or_row=True)


def test_shapes_of_a_transformers_configuration(tmp_path):
    llama = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **llama}))
    found = shapes.model_shapes(tmp_path)
    assert found == shapes.model_shapes(tmp_path / "config.json")
    assert found == ((256, 256), (128, 256), (768, 256), (256, 768), (512, 256), (1536, 256))
    (tmp_path / "config.json").write_text(json.dumps({**llama, "head_dim": 128}))
    assert (1024, 256) in shapes.model_shapes(tmp_path), "q, k and v of wider heads"
    moe = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": moe}))
    assert {(32, 64), (64, 32), (96, 64), (192, 64)} <= set(shapes.model_shapes(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"hidden_size": "64"}', '{"hidden_size": -1}', '{"hidden_size": true}', "[" * 100_000, "\xff"],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match="configuration"):
        shapes.model_shapes(path)


def test_what_cannot_be_read_is_named_with_its_folder(tmp_path):
    for missing in ("missing.json", "no/model", "x" * 300):
        with pytest.raises(SpecError, match=re.escape(f"{str(tmp_path / missing)!r} cannot be read (")):
            shapes.model_shapes(tmp_path / missing)
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(SpecError, match=re.escape(f"the folder {str(tmp_path)!r} has no config.json: expected")):
            shapes.model_shapes(path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match=re.escape(str(tmp_path / "config.json"))):
        shapes.model_shapes(tmp_path)


def test_forms_without_a_kernel_are_refused():
    for form in (
        {"bits": 3, "group_size": 128},
        {"bits": 4, "group_size": 16},
        {"bits": 4, "group_size": 96},
        {"bits": 4, "group_size": 64, "activation": "int8"},
        {"bits": 8, "group_size": -1, "symmetric": False},
    ):
        with pytest.raises(SpecError, match="no kernel to tune"):
            weight(n=4096, k=4096, **form)
    with pytest.raises(SpecError, match="no kernel to tune"):
        weight(4, -1, 64, 4097)


def test_a_reader_that_has_seen_enough_ends_the_list_quietly():
    """As ``| head`` does: nobody reads the other end of the pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    command = "from lq_kernels.cli import main; main(['tune', '--device-preset', 'h200', '--list'])"
    try:
        done = subprocess.run(
            [sys.executable, "-c", command],
            stdout=writer,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            timeout=120,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (128 + 13, b"")

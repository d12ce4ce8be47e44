"""``lq-eval`` as a command; ``ppl`` has a file of its own."""

import json

import pytest
from lq_eval.bench.commands import _STEPS, bench_app
from lq_eval.data import tiny_llama_path
from lq_eval.errors import BenchError
from lq_eval.plots import panels
from lq_eval.results import append_record, read_records


def test_help_names_every_command(lq_eval):
    result = lq_eval("--help")
    assert result.exit_code == 0
    for command in ("demo", "schemes", "ppl", "bench", "doctor"):
        assert command in result.output


def test_demo_prints_one_row_a_scheme(lq_eval, tmp_path):
    record = tmp_path / "demo.jsonl"
    result = lq_eval("demo", "--tokens", 512, "--device", "cpu", "--json", record)
    assert result.exit_code == 0, result.output
    (found,) = read_records(record)
    rows = {row["scheme"]: row for row in found.rows}
    assert len(rows) == 13
    for scheme, row in rows.items():
        assert scheme in result.output
        assert row["perplexity"] > 15
        assert row["prefill_tokens_per_second"] > 0
        assert row["decode_tokens_per_second"] > 0
    assert rows["float"]["bits_per_weight"] == 16
    assert rows["int4-g128"]["bits_per_weight"] == 4.125
    assert rows["int4-g128"]["kl"] > rows["int4-g128-mse"]["kl"] > rows["int8"]["kl"] > 0
    assert rows["int8"]["total_bytes"] < rows["float"]["total_bytes"]


def test_schemes_of_a_random_matrix(lq_eval, tmp_path):
    record = tmp_path / "schemes.jsonl"
    result = lq_eval("schemes", "--rows", 64, "--columns", 256, "--schemes", "int4-g128,q4_0", "--json", record)
    assert result.exit_code == 0, result.output
    (found,) = read_records(record)
    assert [(row["scheme"], row["scale_dtype"]) for row in found.rows] == [
        ("int4-g128", "float32"),
        ("int4-g128", "float16"),
        ("q4_0", "float16"),
    ]


def test_schemes_of_the_largest_seed(lq_eval):
    result = lq_eval("schemes", "--rows", 1, "--columns", 64, "--schemes", "int8", "--seed", 2**64 - 1)
    assert result.exit_code == 0, result.output


def test_schemes_of_a_weight(lq_eval):
    weight = "model.layers.1.mlp.up_proj.weight"
    result = lq_eval("schemes", "--model", tiny_llama_path(), "--weight", weight, "--schemes", "int4-g128")
    assert result.exit_code == 0, result.output
    assert "768x256" in result.output


def test_doctor_explains_kernels(lq_eval):
    result = lq_eval("doctor", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for expected in ("torch", "kernel cache", "lq-torch[gemlite]", "dequant-blas", "triton-gemv", "needs a GPU"):
        assert expected in result.output


def test_doctor_says_that_the_cache_cannot_be_read(lq_eval, monkeypatch, tmp_path):
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path / ("x" * 300)))
    result = lq_eval("doctor", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "cannot be read (File name too long)" in " ".join(result.output.split())


def test_doctor_says_what_a_missing_package_is_for(lq_eval, monkeypatch):
    """Files are read and written without gguf: it is transformers that takes a tokenizer from one by it."""
    monkeypatch.setattr("lq_eval.doctor.version", lambda package: None)
    output = lq_eval("doctor", "--device", "cpu").output
    assert "missing; it is for transformers' tokenizer from a GGUF file" in output
    assert "lq-torch[gguf]" in output


def test_bench_gemm_records_every_point(lq_eval, tmp_path):
    record, plot = tmp_path / "gemm.jsonl", tmp_path / "gemm.png"
    result = lq_eval(
        *("bench", "gemm", "--shapes", "64x64", "--ms", "1,2", "--ops", "int8", "--device", "cpu"),
        *("--seconds", 5, "--json", record, "--plot", plot),
    )
    assert result.exit_code == 0, result.output
    rows = [row for found in read_records(record) for row in found.rows]
    assert [row["m"] for row in rows] == [1, 2]
    assert plot.stat().st_size > 0
    again = lq_eval("bench", "plot", record, tmp_path / "again.png")
    assert again.exit_code == 0, again.output


def test_bench_ggml_records_every_point(lq_eval, tmp_path):
    record = tmp_path / "ggml.jsonl"
    result = lq_eval(
        "bench", "ggml", "--n", 32, "--k", 64, "--ms", 1, "--device", "cpu", "--seconds", 1, "--json", record
    )
    assert result.exit_code == 0, result.output
    assert json.loads(record.read_text())["rows"][0]["m"] == 1


def test_bench_ggml_records_layers_of_every_type(lq_eval, tmp_path):
    record, figure = tmp_path / "ggml.jsonl", tmp_path / "ggml.svg"
    common = ("bench", "ggml", "--n", 32, "--k", 256, "--ms", "1,2", "--device", "cpu")
    result = lq_eval(*common, "--types", "q4_0,Q4_K", "--json", record)
    assert result.exit_code == 0, result.output
    assert "over dequantize" in result.output
    rows = [row for found in read_records(record) for row in found.rows]
    assert [(row["op"], row["m"], row["note"]) for row in rows] == [
        ("q4_0", 1, ""),
        ("q4_0", 2, ""),
        ("q4_k", 1, ""),
        ("q4_k", 2, ""),
    ]
    assert all(row["us"] > 0 and row["speedup"] == row["dense_us"] / row["us"] for row in rows)
    assert lq_eval("bench", "plot", record, figure, "--times", "--ops", "q4_k").exit_code == 0
    assert "32x256, q4_k" in figure.read_text()
    refused = lq_eval(*common, "--types", "q8_1")
    assert refused.exit_code == 1
    assert "SpecError" in refused.output


@pytest.mark.parametrize(
    "command",
    [
        ("gemm", "--shapes", "128x128", "--ops", "int8"),
        ("variants", "--shapes", "128x128"),
        ("fused", "--models", "128x128x128"),
        ("ggml", "--n", 32, "--k", 64),
        ("ggml", "--n", 32, "--k", 64, "--types", "q8_0"),
    ],
    ids=["gemm", "variants", "fused", "ggml", "ggml-types"],
)
def test_a_table_without_rows_says_that_the_time_was_up(lq_eval, command):
    common = ("bench", *command, "--ms", 1, "--device", "cpu", "--seconds")
    note = "(the time was up; give --seconds for more)"
    nothing = lq_eval(*common, 0)
    assert nothing.exit_code == 0, nothing.output
    assert note in " ".join(nothing.output.split())
    everything = lq_eval(*common, 600)
    assert everything.exit_code == 0, everything.output
    assert note not in " ".join(everything.output.split())


def test_bench_record_runs_every_step(lq_eval, tmp_path, monkeypatch):
    """Without the fresh processes of ``cold``, which its own test starts."""

    def broken(options, **limits):
        raise BenchError("no process today")

    monkeypatch.setattr("lq_eval.bench.cold.run_cold", broken)
    steps = ("eager", "variants", "fused", "sweep", "gemm")
    common = ("bench", "record", tmp_path, "--shapes", "128x128", "--device", "cpu", "--seconds", 60)
    result = lq_eval(*common, "--peers", "humming")
    assert result.exit_code == 1
    assert "BenchError: cold failed" in result.stderr
    assert "no process today" in result.output
    recorded = {name: list(read_records(tmp_path / f"{name}.jsonl")) for name in steps}
    for name, records in recorded.items():
        assert {record.bench for record in records} <= {name, f"{name}-summary"}
    assert {row["way"] for record in recorded["fused"] for row in record.rows} >= {"apart", "merged"}
    assert [record.bench for record in recorded["sweep"]] == ["sweep", "sweep-summary"]
    notes = {row["kernel"]: row["note"] for record in recorded["gemm"] for row in record.rows}
    assert notes["auto"] == ""
    assert "CUDA GPU" in notes["humming"]
    assert "lq" in (tmp_path / "speedup.svg").read_text(encoding="utf-8")
    again = lq_eval(*common, "--steps", "sweep")
    assert again.exit_code == 0, again.output
    assert "0 of 0 points" in again.output


def test_bench_record_draws_the_sweeps_points_beside_the_peers(lq_eval, tmp_path, monkeypatch):
    drawn = []

    def draw(rows, path, *arguments, **options):
        drawn.append(panels(rows, options["ops"], options["sizes"]))
        return path

    def point(m, speedup, kernel="auto", n=64):
        return {"op": "int4", "n": n, "k": 64, "m": m, "kernel": kernel, "speedup": speedup}

    monkeypatch.setattr("lq_eval.plots.plot_speedup", draw)
    append_record(tmp_path / "gemm.jsonl", "gemm", [point(1, 2.0), point(4, 2.5), point(1, 1.5, "humming")])
    command = ("bench", "record", tmp_path, "--steps", "plot", "--shapes", "64x64", "--device", "cpu")
    assert lq_eval(*command).exit_code == 0
    append_record(tmp_path / "sweep.jsonl", "sweep", [point(1, 3.0), point(2, 3.5), point(1, 9.0, n=128)])
    append_record(tmp_path / "sweep.jsonl", "sweep-summary", [{"op": "int4"}])
    assert lq_eval(*command).exit_code == 0
    found = [{series.label: series.values for panel in figure for series in panel.series} for figure in drawn]
    assert found == [
        {"lq": {1: 2.0, 4: 2.5}, "humming": {1: 1.5}},
        {"lq": {1: 3.0, 2: 3.5, 4: 2.5}, "humming": {1: 1.5}},
    ]
    (tmp_path / "gemm.jsonl").unlink()
    assert lq_eval(*command).exit_code == 0
    assert [series.values for panel in drawn[-1] for series in panel.series] == [{1: 3.0, 2: 3.5}]


def test_bench_record_has_a_step_for_every_benchmark_but_ggml():
    commands = {command.name for command in bench_app.registered_commands}
    assert set(_STEPS) == commands - {"ggml", "record"}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("demo", "--tokens", "99999999"), "TextTooShortError"),
        (("demo", "--schemes", "int5"), "SpecError"),
        (("schemes", "--model", "x"), "SpecError"),
        (("schemes", "--rows", "0"), "SpecError"),
        (("schemes", "--seed", "99999999999999999999999"), "SpecError"),
        (("schemes", "--seed", "-1"), "SpecError"),
        (("ppl", "/no/such/folder", "--tokens", "256"), "ModelLoadError"),
        (("ppl", "x", "--dataset", "c4"), "SpecError"),
        (("ppl", "x", "--dataset", "wikitext2", "--text", "y"), "SpecError"),
        (("ppl", "x", "--dataset-dir", "y"), "SpecError"),
        (("ppl", "x", "--split", "train"), "SpecError"),
        (("ppl", "x", "--protocol", "sliding"), "SpecError"),
        (("ppl", "x", "--baseline", "y", "--scheme", "int8"), "SpecError"),
        (("ppl", "x", "--scale-dtype", "int4"), "SpecError"),
        (("ppl", "x", "--decode-tokens", "1"), "SpecError"),
        (("ppl", "x", "--decode-tokens", "-4"), "SpecError"),
        (("ppl", "x", "--device", "cuda:99"), "SpecError"),
        (("ppl", "x", "--device", "mps"), "SpecError"),
        (("bench", "ggml", "--device", "meta"), "SpecError"),
        (("doctor", "--device", "xpu"), "SpecError"),
        (("bench", "gemm", "--shapes", "big"), "SpecError"),
        (("bench", "gemm", "--ms", "one"), "SpecError"),
        (("bench", "plot", "/no/such/file", "x.png"), "ModelLoadError"),
        (("bench", "sweep", "--resume", "/no/such/file"), "ModelLoadError"),
        (("bench", "record", "x", "--steps", "everything"), "SpecError"),
        (("bench", "eager", "--calls", "0"), "SpecError"),
        (("bench", "variants", "--ops", "q4_0"), "SpecError"),
        (("bench", "variants", "--replays", "0"), "SpecError"),
        (("schemes", "--schemes", ","), "SpecError"),
        (("schemes", "--scale-dtypes", " , "), "SpecError"),
        (("schemes", "--scale-dtypes", ""), "SpecError"),
        (("bench", "gemm", "--ops", ","), "SpecError"),
        (("bench", "gemm", "--dtypes", ","), "SpecError"),
        (("bench", "gemm", "--kernels", ","), "SpecError"),
        (("bench", "gemm", "--ms", ","), "SpecError"),
        (("bench", "gemm", "--kernels", ",", "--peers", "tinygemm", "--ops", "int8"), "SpecError"),
        (("bench", "sweep", "--ops", ","), "SpecError"),
        (("bench", "variants", "--ops", ","), "SpecError"),
        (("bench", "variants", "--ms", "0"), "SpecError"),
        (("bench", "fused", "--ops", ","), "SpecError"),
        (("bench", "fused", "--ms", "4,-1"), "SpecError"),
        (("bench", "cold", "--batch-sizes", ","), "SpecError"),
        (("bench", "ggml", "--ms", "0"), "SpecError"),
        (("bench", "ggml", "--n", "0"), "SpecError"),
        (("bench", "ggml", "--k", "-32"), "SpecError"),
        (("bench", "ggml", "--types", ","), "SpecError"),
        (("bench", "ggml", "--types", "q8_0", "--n", "0"), "SpecError"),
        (("bench", "record", "x", "--steps", ","), "SpecError"),
        (("bench", "fused", "--replays", "0"), "SpecError"),
        (("bench", "sweep", "--replays", "-1"), "SpecError"),
        (("demo", "--seconds", "nan"), "SpecError"),
        (("bench", "gemm", "--seconds", "-1"), "SpecError"),
        (("demo", "--json", "-"), "SpecError"),
        (("bench", "sweep", "--json", "-"), "SpecError"),
        (("ppl", "x" * 300, "--tokens", "256"), "ModelLoadError"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_a_named_error_is_one_line_and_status_1(lq_eval, arguments, error):
    result = lq_eval(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"lq-eval: {error}: ")
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize(
    "command",
    [
        ("demo", "--json"),
        ("schemes", "--json"),
        ("ppl", tiny_llama_path(), "--json"),
        *(("bench", name, "--json") for name in ("gemm", "sweep", "variants", "fused", "eager", "cold", "ggml")),
        ("bench", "record"),
    ],
    ids=lambda command: "-".join(command[:2]) if command[0] == "bench" else command[0],
)
def test_a_record_that_cannot_be_written_is_refused_before_the_measurement(lq_eval, tmp_path, monkeypatch, command):
    """Nothing is looked for on the machine, not even its device."""
    monkeypatch.setattr("lq_eval.models.default_device", None)
    below = tmp_path / "file"
    below.touch()
    for target in (below / "records.jsonl", *(() if command[-1] == "record" else (tmp_path,))):
        result = lq_eval(*command, target)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"lq-eval: SpecError: cannot write '{target}")


def test_debug_raises(lq_eval):
    result = lq_eval("--debug", "demo", "--schemes", "int5")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "SpecError"

import itertools

import pytest
import torch
from lq_eval.bench.gemm import GemmOptions, points, run_gemm
from lq_eval.bench.ggml import run_ggml
from lq_eval.bench.ggml_linear import run_ggml_linear
from lq_eval.bench.model import decode_tokens_per_second
from lq_eval.bench.operands import random_blocks, random_q4_0
from lq_eval.bench.shapes import MODELS, parse_shapes
from lq_eval.bench.timing import (
    _rounds,
    copies,
    cpu_us,
    steady_or_reasons,
    steady_times_us,
    steady_us,
    time_us,
    times_or_reasons,
    times_us,
)
from lq_formats import SpecError, dequantize_q4_0, ggml_format
from lq_formats.layouts import GGML_PLANES

CPU = torch.device("cpu")


@pytest.fixture
def no_waiting(monkeypatch):
    """Every call is made once; nothing is timed."""
    for module in ("gemm", "ggml"):
        monkeypatch.setattr(
            f"lq_eval.bench.{module}.time_us", lambda calls, device, **options: calls[0]() is None or 2.0
        )


def options(**changes):
    values = {"shapes": parse_shapes("64x128"), "ms": (1, 3), "dtypes": (torch.float32,), "cold_bytes": 1}
    return GemmOptions(**(values | changes))


@pytest.mark.parametrize(
    ("nbytes", "expected"), [(192 << 20, 2), (8 << 20, 24), (1, 128), (1 << 40, 2)], ids=["L2", "8MB", "tiny", "huge"]
)
def test_copies_make_a_round_cold(nbytes, expected):
    assert copies(nbytes) == expected


def test_cpu_timing_touches_every_copy():
    seen = []
    assert cpu_us([lambda i=i: seen.append(i) for i in range(3)], 0.0, min_samples=4) >= 0
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    assert time_us([lambda: None], "cpu", budget_s=0) >= 0


def test_of_several_competitors_the_broken_one_is_named():
    def broken():
        raise RuntimeError("first line\nno such kernel")

    found = times_or_reasons({"a": [lambda: None], "b": [broken], "c": [lambda: None]}, CPU, replays=1)
    assert list(found) == ["a", "b", "c"]
    assert found["b"] == "no such kernel"
    assert all(isinstance(found[name], float) for name in "ac")
    assert times_or_reasons({}, CPU) == {}


def test_graphs_hold_about_as_many_calls():
    def counts(*copies, least):
        return [each * n for each, n in zip(copies, _rounds([[None] * each for each in copies], least), strict=True)]

    assert counts(24, 96, 48, least=16) == [96, 96, 96]
    assert counts(2, 7, 4, least=1) == [8, 7, 8]
    assert counts(96, 128, least=16) == [96, 128]
    assert counts(2, 2, least=15) == [16, 16]
    assert counts(3, least=1) == [3]


def test_the_beginning_and_the_end_of_a_long_run_count():
    # 100 calls a replay: the first ends after 3 ms, the next take 1 ms up to 30, then 2 ms.
    ends = [3.0 + i for i in range(28)] + [32.0 + 2 * i for i in range(76)]
    us, burst = steady_us(ends, 100)
    assert (us, burst) == (pytest.approx(20.0), pytest.approx(10.0))
    ends[-3:] = [end + 40.0 for end in ends[-3:]]  # the processor was late
    assert steady_us(ends, 100) == (pytest.approx(20.0), pytest.approx(10.0))
    # Replays that take longer than either part, and so few that every part is the same.
    assert steady_us([40.0, 90.0, 190.0], 1) == (pytest.approx(100e3), pytest.approx(50e3))
    assert steady_us([5.0, 400.0], 10) == (pytest.approx(39.5e3), pytest.approx(39.5e3))


def test_on_a_cpu_a_steady_time_is_that_of_a_call():
    found = steady_or_reasons({"a": [lambda: None]}, CPU)
    assert found["a"].us >= 0
    assert found["a"].burst_us is None
    with pytest.raises(SpecError, match="replays=0: expected at least 1"):
        steady_times_us([[lambda: None]], CPU, rounds=0)


def test_a_median_needs_a_replay():
    for time in (lambda: times_us([[lambda: None]], CPU, replays=0), lambda: times_or_reasons({}, CPU, replays=0)):
        with pytest.raises(SpecError, match="replays=0: expected at least 1"):
            time()
    with pytest.raises(SpecError, match="replays"):
        next(run_ggml_linear(("q8_0",), 32, 64, (1,), torch.float32, CPU, replays=-1, cold_bytes=1))


def test_layers_of_the_llama_models():
    shapes = {shape.label: (shape.n, shape.k) for shape in parse_shapes("llama-3-8b")}
    assert shapes["llama-3-8b.q"] == (4096, 4096)
    assert shapes["llama-3-8b.k"] == (1024, 4096)
    assert shapes["llama-3-8b.gate"] == (14336, 4096)
    assert shapes["llama-3-8b.down"] == (4096, 14336)
    assert shapes["llama-3-8b.qkv"] == (6144, 4096)
    assert shapes["llama-3-8b.gate_up"] == (28672, 4096)
    assert {(s.n, s.k) for s in parse_shapes("llama-3.2-1b.qkv,llama-3-70b.down")} == {(3072, 2048), (8192, 28672)}
    assert len(parse_shapes("llama-3-70b.merged")) == 4


def test_heads_need_not_add_up_to_the_hidden_size():
    shapes = {shape.label: (shape.n, shape.k) for shape in parse_shapes("qwen3-32b")}
    assert shapes["qwen3-32b.q"] == (8192, 5120)
    assert shapes["qwen3-32b.o"] == (5120, 8192)
    assert shapes["qwen3-32b.qkv"] == (10240, 5120)


def test_layers_of_one_expert():
    shapes = {
        shape.label: (shape.n, shape.k) for shape in parse_shapes("mixtral-8x7b.w1,mixtral-8x7b.w2,mixtral-8x7b.w13")
    }
    assert shapes == {
        "mixtral-8x7b.w1": (14336, 4096),
        "mixtral-8x7b.w2": (4096, 14336),
        "mixtral-8x7b.w13": (28672, 4096),
    }


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.2-1b", 0.973),
        ("llama-3-8b", 6.979),
        ("llama-3-70b", 68.45),
        ("qwen3-8b", 6.946),
        ("qwen3-32b", 31.21),
        ("mixtral-8x7b", 46.44),
    ],
)
def test_the_layers_add_up_to_the_model(name, billions):
    """Parameters of all linear layers, from the models' configurations."""
    model = MODELS[name]
    for merged in (False, True):
        block = sum(
            shape.n * shape.k * (model.experts if ".w" in shape.label else 1)
            for shape in model.shapes(name, merged=merged)
        )
        assert block * model.layers / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("text", ["", "4096", "0x4", "4x", "llama-9", "llama-3-8b.lm"])
def test_unknown_shapes_are_refused(text):
    with pytest.raises(SpecError):
        parse_shapes(text)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, -1], ids=["g32", "row"])
def test_gemm_measures_every_point(symmetric, group_size):
    chosen = options(symmetric=symmetric, group_size=group_size)
    rows = list(run_gemm(chosen))
    assert len(rows) == points(chosen) == 3 * 2
    assert {(row.op, row.m) for row in rows} == set(itertools.product(("int4", "int8", "q4_0"), (1, 3)))
    assert all(row.us == row.dense_us == 2.0 and row.speedup == 1 and row.ran for row in rows)


@pytest.mark.usefixtures("no_waiting")
def test_kernels_can_be_forced_and_say_why_they_cannot():
    rows = list(run_gemm(options(ops=("int4",), ms=(1,), kernels=("dequant-blas", "triton-gemv"))))
    assert [(row.kernel, row.us is None) for row in rows] == [("dequant-blas", False), ("triton-gemv", True)]
    assert "GPU" in rows[1].note
    every = [row.kernel for row in run_gemm(options(ops=("int4",), ms=(1,), kernels=("all",), group_size=32))]
    assert every == ["auto", "aten-cpu", "dequant-blas"]


@pytest.mark.usefixtures("no_waiting")
def test_peers_without_a_gpu_say_so():
    chosen = options(ops=("int4", "int8"), ms=(1,), kernels=(), peers=("tinygemm", "humming"))
    rows = list(run_gemm(chosen))
    assert len(rows) == points(chosen) == 3  # tinygemm has no int8
    assert all("CUDA GPU" in row.note for row in rows)


@pytest.mark.usefixtures("no_waiting")
def test_a_product_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delattr("lq_torch.Int8DynamicActivationConfig", raising=False)
    chosen = options(ops=("w8a8-int8",), ms=(1, 2))
    rows = list(run_gemm(chosen))
    assert [row.us for row in rows] == [None, None]
    assert all("lq_torch.Int8DynamicActivationConfig" in row.note for row in rows)


@pytest.mark.usefixtures("no_waiting")
def test_the_time_limit_ends_a_benchmark():
    assert list(run_gemm(options(seconds=-1.0))) == []
    assert list(run_ggml(32, 64, (1, 2), CPU, seconds=-1.0)) == []
    assert list(run_ggml_linear(("q8_0",), 32, 64, (1, 2), torch.float32, CPU, seconds=-1.0, cold_bytes=1)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"ops": ("int2",)},
        {"kernels": ("fast",)},
        {"peers": ("marlin",)},
        {"ms": (0,)},
        {"ms": ()},
        {"kernels": ()},
        {"group_size": 100},
        {"shapes": parse_shapes("8x40"), "ops": ("q4_0",)},
    ],
    ids=["op", "kernel", "peer", "M", "no M", "no kernel", "group", "blocks"],
)
def test_unknown_options_are_refused(changes):
    with pytest.raises(SpecError):
        options(**changes)


def test_random_blocks_are_finite():
    assert torch.isfinite(dequantize_q4_0(random_q4_0(16, 64, CPU))).all()
    with pytest.raises(SpecError, match="K=48"):
        random_q4_0(16, 48, CPU)


@pytest.mark.usefixtures("no_waiting")
def test_ggml_rows_hold_every_step():
    rows = list(run_ggml(32, 64, (1, 4), CPU, cold_bytes=1))
    assert [row.m for row in rows] == [1, 4]
    assert rows[1].gflops == pytest.approx(2 * 32 * 64 * 4 / 2.0 / 1e3)
    assert rows[0].to_dict()["speedup"] == 1
    assert rows[0].steps_us == rows[0].total_us == 2.0


@pytest.mark.parametrize("ggml_type", GGML_PLANES)
def test_random_blocks_of_every_type_are_finite(ggml_type):
    blocks = random_blocks(ggml_type, 8, 512, CPU)
    w = ggml_format(ggml_type).dequantize(blocks, torch.float32)
    assert w.shape == (8, 512)
    assert torch.isfinite(w).all()
    assert w.abs().amax(dim=1).min() > 0


@pytest.fixture
def products(monkeypatch):
    """Of ggml layers every call is made once, and takes as many microseconds as it is the how-manieth way to multiply.

    Holds the results of all calls, by way, of one point after another.
    """
    seen = []

    def times(competitors, device, **options):
        seen.append({name: [call() for call in calls] for name, calls in competitors.items()})
        return {name: float(number) for number, name in enumerate(competitors, start=1)}

    monkeypatch.setattr("lq_eval.bench.ggml_linear.times_or_reasons", times)
    return seen


def test_ggml_layers_are_measured_in_every_form(products):
    types = ("q4_0", "q8_0", "q4_k")
    rows = list(run_ggml_linear(types, 16, 256, (1, 3), torch.float32, CPU, cold_bytes=1))
    assert [(row.op, row.m) for row in rows] == list(itertools.product(types, (1, 3)))
    assert {(row.us, row.layer_us, row.dequantize_us, row.dense_us) for row in rows} == {(1.0, 2.0, 3.0, 4.0)}
    assert {(row.speedup, row.over_dequantize, row.kernel, row.note) for row in rows} == {(4.0, 3.0, "auto", "")}
    assert {row.ran for row in rows} == {"dequant-blas"}
    assert rows[0].to_dict()["over_dequantize"] == 3.0


@pytest.mark.parametrize("ggml_type", ["q4_0", "q4_1", "q5_0", "q8_0", "q4_k", "q6_k"])
def test_every_form_of_a_ggml_layer_is_the_same_product(products, ggml_type):
    """All copies, too; Q4_0 may quantize activations to 8 bits, which is the bound."""
    list(run_ggml_linear((ggml_type,), 16, 256, (3,), torch.float32, CPU, cold_bytes=1))
    (found,) = products
    assert found["dense"][0].shape == (3, 16)
    same = [y for name in ("packed", "layer", "dequantize") for y in found[name]]
    assert len(same) == 6
    reference = found["dequantize"][0].double()
    assert reference.norm() > 0
    assert all((y - reference).norm() <= 0.01 * reference.norm() for y in same)


def test_a_kernel_that_no_layer_can_run_says_why():
    rows = list(
        run_ggml_linear(
            ("q4_0", "q8_0"), 16, 64, (1,), torch.float32, CPU, kernel="triton-gemv", replays=1, cold_bytes=1
        )
    )
    assert [(row.us, row.ran, row.kernel) for row in rows] == [(None, "", "triton-gemv")] * 2
    assert "there is no such kernel" in rows[0].note
    assert "packed: triton-gemv: needs a GPU" in rows[1].note
    assert all(row.speedup is None and row.dequantize_us > 0 and row.dense_us > 0 for row in rows)


@pytest.mark.parametrize(
    ("ggml_type", "match"),
    [("q8_1", "activations"), ("q9", "unknown ggml format"), ("q4_k", "K=64 is no multiple of the 256")],
    ids=["activations", "unknown", "blocks"],
)
def test_ggml_types_that_fit_no_layer_are_refused(ggml_type, match):
    with pytest.raises(SpecError, match=match):
        next(run_ggml_linear((ggml_type,), 16, 64, (1,), torch.float32, CPU))


def test_decoding_runs_token_by_token(tiny, windows):
    assert decode_tokens_per_second(tiny.model, windows[:1, :8], 2) > 0
    with pytest.raises(SpecError):
        decode_tokens_per_second(tiny.model, windows[:1, :8], 1)


@pytest.mark.gpu
def test_graph_timing_on_a_gpu():
    x = torch.randn(64, 64, device="cuda")
    assert time_us([lambda: x @ x], "cuda") > 0


@pytest.mark.gpu
def test_steady_times_on_a_gpu():
    x = torch.randn(64, 64, device="cuda")
    found = steady_times_us([[lambda: x @ x], [lambda: x + x] * 20], "cuda", rounds=1)
    assert all(each.us > 0 and each.burst_us > 0 for each in found)


@pytest.mark.gpu
def test_gemm_on_a_gpu():
    rows = list(
        run_gemm(options(shapes=parse_shapes("256x256"), dtypes=(torch.bfloat16,), device=torch.device("cuda")))
    )
    assert len(rows) == 6
    assert all(row.us and not row.note for row in rows)


@pytest.mark.gpu
def test_ggml_layers_on_a_gpu():
    types = ("q4_0", "q4_1", "q5_0", "q8_0", "q4_k", "q6_k")
    rows = list(run_ggml_linear(types, 256, 512, (1, 64), torch.bfloat16, torch.device("cuda"), cold_bytes=1))
    assert len(rows) == 12
    assert all(row.us and row.layer_us and row.dequantize_us and row.dense_us and not row.note for row in rows)

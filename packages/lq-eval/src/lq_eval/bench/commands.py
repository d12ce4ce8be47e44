"""The commands ``lq-eval bench gemm``, ``sweep``, ``variants``, ``fused``, ``eager``, ``cold``, ``ggml``, ``plot``, ..."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from lq_formats import LQError, SpecError

from lq_eval.errors import BenchError, ModelLoadError
from lq_eval.results import Record, check_target, environment, read_records
from lq_eval.terminal import (
    Device,
    Figure,
    Json,
    Plot,
    Seconds,
    console,
    device_name,
    listed,
    progress_bar,
    save,
    split,
    token_counts,
)

# A record repeats the environment, so rows of a sweep share one; a run that is killed loses at most these.
_ROWS_A_RECORD = 64
_STEPS = ("eager", "cold", "variants", "fused", "sweep", "gemm", "plot")
_FIGURE = "speedup.svg"
_VARIANTS_SHARE, _FUSED_SHARE, _SWEEP_SHARE = 0.1, 0.15, 0.65
_FIGURE_MS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"

bench_app = typer.Typer(help="Time kernels; results go to a table, a JSONL file and a plot.", no_args_is_help=True)


@bench_app.command("gemm")
def bench_gemm(
    shapes: Annotated[
        str | None, typer.Option(help="NxK, or a model[.layer|.merged]: llama-3-8b, qwen3-32b, mixtral-8x7b.w1, ...")
    ] = None,
    ms: Annotated[str | None, typer.Option(help="Numbers of tokens.")] = None,
    dtypes: Annotated[str | None, typer.Option(help="dtypes of x.")] = None,
    ops: Annotated[
        str, typer.Option(help="int4, int8, q4_0, w4a8-fp8, w4a8-int8, w8a8-int8, w8a8-fp8.")
    ] = "int4,int8,q4_0",
    kernels: Annotated[str, typer.Option(help="auto, all, or names of kernels to force.")] = "auto",
    peers: Annotated[str, typer.Option(help="gemlite, humming, tinygemm (GPU only).")] = "",
    group_size: Annotated[int, typer.Option(help="Group size of int4; -1: per row.")] = 128,
    symmetric: Annotated[bool, typer.Option(help="Symmetric int4.")] = True,
    device: Device = None,
    seconds: Seconds = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Lq's kernels against the vendor's dense product (cuBLAS), over M and the layers of LLaMA, Qwen and Mixtral models."""
    from lq_eval.bench.gemm import GemmOptions, points, run_gemm
    from lq_eval.bench.shapes import parse_shapes
    from lq_eval.bench.timing import COLD_BYTES
    from lq_eval.models import default_device, default_dtype
    from lq_eval.tables import gemm_table

    where = default_device(device)
    gpu = where.type == "cuda"
    options = GemmOptions(
        shapes=parse_shapes(shapes or ("llama-3.2-1b,llama-3-8b,llama-3-70b" if gpu else "2048x2048,8192x2048")),
        ms=token_counts(ms or ("1,4,16,64,256,1024,4096" if gpu else "1,16,64")),
        dtypes=tuple(
            default_dtype(name, where) for name in listed(dtypes or ("bfloat16" if gpu else "float32"), "dtype")
        ),
        ops=listed(ops, "op"),
        kernels=split(kernels),
        peers=split(peers),
        group_size=group_size,
        symmetric=symmetric,
        device=where,
        seconds=seconds if seconds is not None else (500.0 if gpu else 60.0),
        cold_bytes=COLD_BYTES if gpu else COLD_BYTES // 3,
    )
    found = []
    started = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task("timing", total=points(options))
        for row in run_gemm(options):
            found.append(row)
            save(json, "gemm", [row.to_dict()])
            bar.advance(task)
    done = f"{len(found)} points in {time.monotonic() - started:.0f} s{_cut(started + options.seconds)}"
    console().print(gemm_table(found, f"{device_name(where)}, int4 groups of {group_size}: {done}"))
    if plot is not None:
        from lq_eval.plots import plot_speedup

        plot_speedup([row.to_dict() for row in found], plot, device_name(where))


@bench_app.command("sweep")
def bench_sweep(
    shapes: Annotated[
        str | None, typer.Option(help="As for gemm; default on a GPU: every layer of every model.")
    ] = None,
    ms: Annotated[str | None, typer.Option(help="Numbers of tokens; default on a GPU: 1 to 64 and on to 8192.")] = None,
    ops: Annotated[str, typer.Option(help="int4, int8, ...; see gemm.")] = "int4,int8",
    dtype: Annotated[str | None, typer.Option(help="dtype of x.")] = None,
    group_size: Annotated[int, typer.Option(help="Group size of int4; -1: per row.")] = 128,
    replays: Annotated[int, typer.Option(help="Replays of each graph; the median counts.")] = 5,
    resume: Annotated[Path | None, typer.Option(help="Leave out the points that this file has.")] = None,
    device: Device = None,
    seconds: Seconds = None,
    json: Json = None,
) -> None:
    """The registry's choice against the dense product at every M: the worst ratio and the worst jump of each layer."""
    from lq_eval.bench.shapes import parse_shapes
    from lq_eval.bench.sweep import (
        SWEEP_MS,
        SweepOptions,
        all_shapes,
        known_points,
        point_of,
        points,
        run_sweep,
        summarize,
    )
    from lq_eval.bench.timing import COLD_BYTES
    from lq_eval.models import default_device, default_dtype
    from lq_eval.tables import sweep_table

    where = default_device(device)
    gpu = where.type == "cuda"
    chosen = parse_shapes(shapes) if shapes else all_shapes() if gpu else parse_shapes("2048x2048")
    known = known_points(_records(resume), environment()) if resume is not None else {}
    options = SweepOptions(
        shapes=chosen,
        ms=token_counts(ms) if ms else SWEEP_MS if gpu else (1, 2, 4, 16, 64),
        ops=listed(ops, "op"),
        dtype=default_dtype(dtype or ("bfloat16" if gpu else "float32"), where),
        group_size=group_size,
        device=where,
        seconds=seconds if seconds is not None else (600.0 if gpu else 60.0),
        replays=replays,
        cold_bytes=COLD_BYTES if gpu else COLD_BYTES // 3,
        done=frozenset(known),
        again=gpu,
    )
    rows: list[dict[str, Any]] = []
    saved = 0
    started = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task("timing", total=points(options))
        try:
            for row in run_sweep(options):
                rows.append(row.to_dict())
                bar.advance(task)
                if len(rows) - saved >= _ROWS_A_RECORD:
                    save(json, "sweep", rows[saved:])
                    saved = len(rows)
        finally:
            if len(rows) > saved:
                save(json, "sweep", rows[saved:])
    found = summarize([*known.values(), *rows])
    save(json, "sweep-summary", [summary.to_dict() for summary in found])
    measured = {point_of(row) for row in rows}
    done = f"{len(measured)} of {points(options)} points in {time.monotonic() - started:.0f} s"
    if known:
        done += f", {len(known)} from {resume}"
    console().print(sweep_table(found, f"{device_name(where)}: {done}"))


@bench_app.command("variants")
def bench_variants(
    shapes: Annotated[str | None, typer.Option(help="As for gemm.")] = None,
    ms: Annotated[str | None, typer.Option(help="Numbers of tokens.")] = None,
    ops: Annotated[str, typer.Option(help="int4, int8, dense.")] = "int4,int8,dense",
    replays: Annotated[int, typer.Option(help="Replays of each graph; the median counts.")] = 7,
    device: Device = None,
    seconds: Seconds = None,
    json: Json = None,
) -> None:
    """Other dtypes, group sizes and zeros, and the batch-invariant mode, each beside the usual form of int4 and int8.

    Dense products too, as fp16 takes the GPU more power than bf16.
    """
    from lq_eval.bench.shapes import parse_shapes
    from lq_eval.bench.timing import COLD_BYTES
    from lq_eval.bench.variants import VARIANTS, run_variants
    from lq_eval.models import default_device
    from lq_eval.tables import variants_table

    where = default_device(device)
    gpu = where.type == "cuda"
    formats = listed(ops, "op")
    for op in formats:
        if op not in VARIANTS:
            raise SpecError(f"unknown op {op!r}: expected one of {', '.join(VARIANTS)}")
    deadline = time.monotonic() + (seconds if seconds is not None else 300.0)
    found = []
    for shape in parse_shapes(shapes or ("4096x4096,14336x4096" if gpu else "256x256")):
        rows = list(
            run_variants(
                shape,
                token_counts(ms or ("1,16,64,256,1024,4096" if gpu else "1,16")),
                where,
                ops=formats,
                replays=replays,
                seconds=deadline - time.monotonic(),
                cold_bytes=COLD_BYTES if gpu else COLD_BYTES // 3,
            )
        )
        save(json, "variants", [row.to_dict() for row in rows])
        found += rows
    console().print(variants_table(found, f"{device_name(where)}{_cut(deadline)}"))


@bench_app.command("fused")
def bench_fused(
    models: Annotated[str | None, typer.Option(help="llama-3-8b, qwen3-32b, ... or HIDDENxINTERMEDIATExKV.")] = None,
    ms: Annotated[str, typer.Option(help="Numbers of tokens.")] = "1,4,16,64",
    ops: Annotated[str, typer.Option(help="int4, int8.")] = "int4,int8",
    dtype: Annotated[str | None, typer.Option(help="dtype of x and of the dense weights.")] = None,
    replays: Annotated[int, typer.Option(help="Replays of each graph; the median counts.")] = 7,
    device: Device = None,
    seconds: Seconds = None,
    json: Json = None,
) -> None:
    """Layers of a block apart, merged, and with silu * up or the residual in the kernel, beside the same with dense weights."""
    from lq_eval.bench.fused import parse_models, run_fused
    from lq_eval.bench.timing import COLD_BYTES
    from lq_eval.models import default_device, default_dtype
    from lq_eval.tables import fused_table

    where = default_device(device)
    gpu = where.type == "cuda"
    precision = default_dtype(dtype or ("bfloat16" if gpu else "float32"), where)
    formats = listed(ops, "op")
    deadline = time.monotonic() + (seconds if seconds is not None else 120.0)
    for name, dimensions in parse_models(models or ("llama-3-8b,llama-3.2-1b" if gpu else "256x512x128")).items():
        found = []
        for row in run_fused(
            name,
            dimensions,
            token_counts(ms),
            precision,
            where,
            ops=formats,
            replays=replays,
            seconds=deadline - time.monotonic(),
            cold_bytes=COLD_BYTES if gpu else COLD_BYTES // 64,
        ):
            found.append(row)
            save(json, "fused", [row.to_dict()])
        console().print(fused_table(found, f"A block of {name}, {device_name(where)}{_cut(deadline)}"))


@bench_app.command("eager")
def bench_eager(
    shapes: Annotated[str | None, typer.Option(help="As for gemm.")] = None,
    m: Annotated[int, typer.Option("--m", help="Tokens.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="dtype of x.")] = None,
    group_size: Annotated[int, typer.Option(help="Group size of int4; -1: per row.")] = 128,
    batches: Annotated[int, typer.Option(help="Batches of calls; the median counts.")] = 41,
    calls: Annotated[int, typer.Option(help="Calls in a batch, launched back to back.")] = 50,
    device: Device = None,
    json: Json = None,
) -> None:
    """What an eager call costs the CPU: a dense layer, layers with int4 and int8 weights, lq's functions."""
    from lq_eval.bench.eager import run_eager
    from lq_eval.bench.shapes import parse_shapes
    from lq_eval.models import default_device, default_dtype
    from lq_eval.tables import eager_table

    where = default_device(device)
    gpu = where.type == "cuda"
    precision = default_dtype(dtype or ("bfloat16" if gpu else "float32"), where)
    found = []
    for shape in parse_shapes(shapes or ("4096x4096" if gpu else "256x256")):
        rows = list(run_eager(shape, precision, where, m=m, group_size=group_size, batches=batches, calls=calls))
        save(json, "eager", [row.to_dict() for row in rows])
        found += rows
    console().print(eager_table(found, f"CPU time of an eager call, {device_name(where)}"))


@bench_app.command("cold")
def bench_cold(
    shapes: Annotated[str | None, typer.Option(help="Layers of the model, as for gemm.")] = None,
    schemes: Annotated[str, typer.Option(help="How they are quantized, one start after another.")] = "int4-g128,int8",
    batch_sizes: Annotated[str, typer.Option(help="Numbers of tokens given to warmup.")] = "1,16,64,256,2048",
    new_ms: Annotated[str | None, typer.Option(help="Numbers of tokens of the calls after it.")] = None,
    dtype: Annotated[str | None, typer.Option(help="dtype of x.")] = None,
    device: Device = None,
    json: Json = None,
) -> None:
    """Seconds until a model's kernels are there, in fresh processes: with empty caches, with full ones, and without warmup."""
    from lq_eval.bench.cold import NEW_MS, STATES, ColdOptions, run_cold
    from lq_eval.bench.shapes import parse_shapes
    from lq_eval.models import default_device, default_dtype
    from lq_eval.schemes import parse_schemes
    from lq_eval.tables import cold_table

    where = default_device(device)
    gpu = where.type == "cuda"
    chosen = shapes or ("llama-3-8b" if gpu else "256x256")
    parse_shapes(chosen)
    precision = str(default_dtype(dtype or ("bfloat16" if gpu else "float32"), where)).removeprefix("torch.")
    found = []
    with progress_bar() as bar:
        names = tuple(parse_schemes(schemes))
        task = bar.add_task("starting", total=len(STATES) * len(names))
        for scheme in names:
            tokens = token_counts(new_ms) if new_ms else NEW_MS
            options = ColdOptions(chosen, scheme, precision, str(where), token_counts(batch_sizes), tokens)
            for row in run_cold(options):
                found.append(row)
                save(json, "cold", [row.to_dict()])
                bar.advance(task)
    console().print(cold_table(found, f"Cold start, {device_name(where)}"))


@bench_app.command("ggml")
def bench_ggml(
    n: Annotated[int, typer.Option("--n", help="Out features.")] = 4096,
    k: Annotated[int, typer.Option("--k", help="In features.")] = 14336,
    ms: Annotated[str | None, typer.Option(help="Numbers of tokens.")] = None,
    types: Annotated[
        str | None,
        typer.Option(help="Instead, layers with weights of these types: q4_0, q4_1, q5_0, q8_0, q4_k, q6_k, ..."),
    ] = None,
    kernel: Annotated[str | None, typer.Option(help="Force a kernel: cuda-mma, triton-splitk, reference, ...")] = None,
    device: Device = None,
    seconds: Seconds = None,
    json: Json = None,
) -> None:
    """Q4_0 weights times Q8_1 activations, with the time of quantizing the activations; or layers of any ggml types."""
    from lq_eval.bench.ggml import run_ggml
    from lq_eval.bench.ggml_linear import run_ggml_linear
    from lq_eval.bench.timing import COLD_BYTES
    from lq_eval.models import default_device
    from lq_eval.tables import ggml_linear_table, ggml_table

    where = default_device(device)
    gpu = where.type == "cuda"
    names = listed(types.lower(), "type") if types else ()
    tokens = token_counts(ms or ("1,2,4,8,16,32,64,128,256,512" if gpu else "1,8"))
    limit = seconds if seconds is not None else (math.inf if gpu else 60.0)
    cold = COLD_BYTES if gpu else COLD_BYTES // 3
    rows: Iterator[Any]
    if names:
        dtype = torch.bfloat16 if gpu else torch.float32
        rows = run_ggml_linear(names, n, k, tokens, dtype, where, kernel=kernel, seconds=limit, cold_bytes=cold)
    else:
        rows = run_ggml(n, k, tokens, where, kernel=kernel, seconds=limit, cold_bytes=cold)
    found: list[Any] = []
    deadline = time.monotonic() + limit
    with progress_bar() as bar:
        task = bar.add_task("timing", total=len(tokens) * max(1, len(names)))
        for row in rows:
            found.append(row)
            save(json, "ggml", [row.to_dict()])
            bar.advance(task)
    done = f"{device_name(where)}{_cut(deadline)}"
    if names:
        table = ggml_linear_table(found, f"Layers {n}x{k} of ggml types on {done}")
    else:
        table = ggml_table(found, f"Q4_0 {n}x{k} x Q8_1 on {done}")
    console().print(table)


@bench_app.command("plot")
def bench_plot(
    records: Annotated[list[Path], typer.Argument(help="JSONL files that benchmarks wrote.")],
    output: Figure,
    ops: Annotated[str, typer.Option(help="Draw these products; default: all that were recorded.")] = "",
    shapes: Annotated[str | None, typer.Option(help="Draw these weights, as for gemm; default: all.")] = None,
    times: Annotated[bool, typer.Option("--times", help="Draw microseconds, of the dense product too.")] = False,
) -> None:
    """Draw the speedups (or times) of recorded gemm, sweep or ggml benchmarks, one panel a weight and product."""
    from lq_eval.bench.shapes import parse_shapes
    from lq_eval.plots import plot_speedup, plot_times
    from lq_eval.points import check_points

    found: list[Record] = []
    for path in records:
        drawn = [record for record in _records(path) if record.bench in ("gemm", "sweep", "ggml")]
        for record in drawn:
            check_points(record.rows, str(path))
        found += drawn
    gpus = dict.fromkeys(str(record.environment.get("gpu") or "CPU") for record in found)
    sizes = {(shape.n, shape.k) for shape in parse_shapes(shapes)} if shapes else set()
    rows = [row for record in found for row in record.rows]
    baseline = "cuBLAS" if all("NVIDIA" in gpu for gpu in gpus) else "dense"
    draw = plot_times if times else plot_speedup
    target = draw(rows, output, ", ".join(gpus), ops=split(ops), sizes=sizes, baseline=baseline)
    console().print(f"wrote {target}")


@bench_app.command("record")
def bench_record(
    folder: Annotated[Path, typer.Argument(help="Where the records and the figure go; a second run adds to them.")],
    steps: Annotated[str, typer.Option(help="Which of them, in this order.")] = ",".join(_STEPS),
    peers: Annotated[
        str, typer.Option(help="Other libraries; those that are not installed say so.")
    ] = "humming,gemlite",
    shapes: Annotated[str | None, typer.Option(help="Weights of the figure.")] = None,
    device: Device = None,
    seconds: Annotated[
        float, typer.Option(help="For all steps together; the figure's peers get what is left.")
    ] = 900.0,
) -> None:
    """Everything but ggml, by one command: eager, cold, variants, fused, sweep, gemm beside peers, and their figure."""
    from lq_eval.models import default_device

    names = listed(steps, "step")
    for name in names:
        if name not in _STEPS:
            raise SpecError(f"unknown step {name!r}: expected one of {', '.join(_STEPS)}")
    files = {name: folder / (_FIGURE if name == "plot" else f"{name}.jsonl") for name in _STEPS}
    for name in names:
        check_target(files[name])
    gpu = default_device(device).type == "cuda"
    chosen = shapes or ("4096x4096,14336x4096,4096x14336,8192x8192" if gpu else "256x256")
    deadline = time.monotonic() + seconds

    def left() -> float:
        return max(0.0, deadline - time.monotonic())

    def sweep() -> None:
        # Without a GPU the sweep of one small weight shows that it works.
        bench_sweep(
            shapes=None if gpu else chosen,
            ms=None if gpu else "1,2,16",
            resume=files["sweep"] if files["sweep"].exists() else None,
            device=device,
            seconds=_SWEEP_SHARE * left(),
            json=files["sweep"],
        )

    def gemm() -> None:
        bench_gemm(
            shapes=chosen,
            ms=_FIGURE_MS if gpu else "1,16",
            ops="int4,int8,w4a8-fp8,w8a8-int8" if gpu else "int4,int8",
            peers=peers,
            device=device,
            seconds=left(),
            json=files["gemm"],
        )

    def plot() -> None:
        # Of a point that both have, the last one is drawn: the sweep's, which has as many numbers of tokens as there are.
        drawn = [files[name] for name in ("gemm", "sweep") if files[name].exists()]
        bench_plot(drawn or [files["gemm"]], files["plot"], ops="int4,int8", shapes=chosen)

    actions: dict[str, Callable[[], None]] = {
        "eager": lambda: bench_eager(device=device, json=files["eager"]),
        "cold": lambda: bench_cold(device=device, json=files["cold"]),
        "variants": lambda: bench_variants(device=device, json=files["variants"], seconds=_VARIANTS_SHARE * left()),
        "fused": lambda: bench_fused(device=device, json=files["fused"], seconds=_FUSED_SHARE * left()),
        "sweep": sweep,
        "gemm": gemm,
        "plot": plot,
    }
    failed: dict[str, Exception] = {}
    for name in names:
        try:
            actions[name]()
        except (LQError, RuntimeError, ImportError) as error:  # the other steps are worth recording all the same
            failed[name] = error
            console().print(f"{name} failed: {type(error).__name__}: {error}", style="red", markup=False)
    if failed:
        raise BenchError(f"{', '.join(failed)} failed; the records of the other steps are in {str(folder)!r}")


def _cut(deadline: float) -> str:
    """Return what a table's title says if its points may have been cut short."""
    return " (the time was up; give --seconds for more)" if time.monotonic() > deadline else ""


def _records(path: Path) -> list[Record]:
    try:
        return list(read_records(path))
    except OSError as error:
        raise ModelLoadError(f"cannot read {str(path)!r}: {error}") from error

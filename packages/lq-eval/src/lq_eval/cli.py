"""The ``lq-eval`` command.

A named error of lq ends it with one line on standard error and exit status 1; ``lq-eval --debug`` shows the traceback
instead. Tables and nothing else go to standard output, progress bars to standard error.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from lq_formats import LQError, SpecError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup


class _Group(TyperGroup):
    """Turns named errors into one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LQError as error:
            if ctx.params.get("debug") or ctx.parent is not None:  # nested groups leave it to the outermost
                raise
            typer.secho(f"lq-eval: {type(error).__name__}: {error}", err=True, fg="red")
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    name="lq-eval",
    help="Measure what low-bit weights cost and gain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench_app = typer.Typer(help="Time kernels; results go to a table, a JSONL file and a plot.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU where there is one.")]
Json = Annotated[Path | None, typer.Option("--json", help="Append a record of the result to this JSONL file.")]
Seconds = Annotated[float | None, typer.Option(help="Stop starting new points after this time.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks of named errors.")] = False,
) -> None:
    pass


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(help="Tokens of the bundled text to evaluate on.")] = 25600,
    schemes: Annotated[str | None, typer.Option(help="Comma-separated; default: all that the demo knows.")] = None,
    device: Device = None,
    json: Json = None,
) -> None:
    """Quantize the bundled tiny LLaMA by every scheme; print size, perplexity and speed. Needs no network and no GPU."""
    import torch

    from lq_eval.corpus import load_text, make_windows, tokenize
    from lq_eval.data import eval_text_path, tiny_llama_path
    from lq_eval.evaluate import Settings, dtype_name, evaluate_together, window_passes
    from lq_eval.models import default_device, default_dtype, load_model
    from lq_eval.schemes import DEMO_SCHEMES, parse_schemes
    from lq_eval.tables import evaluation_table

    started = time.perf_counter()
    where = default_device(device)
    dtype = default_dtype(None, where)
    scale_dtype = torch.float16 if where.type == "cpu" else dtype
    configs = parse_schemes(schemes or ",".join(DEMO_SCHEMES), scale_dtype)
    loaded = load_model(tiny_llama_path(), device=where, dtype=dtype)
    windows = make_windows(tokenize(loaded.tokenizer, load_text(eval_text_path())), 256, tokens)
    settings = Settings(decode_tokens=16)
    with _progress() as bar:
        task = bar.add_task("evaluating", total=window_passes(windows, len(configs), together=True))
        rows = evaluate_together(loaded.model, configs, windows, settings, lambda n: bar.advance(task, n))
    caption = (
        f"{windows.numel():,} tokens of the Python reference in windows of 256, {dtype_name(dtype)} on {where.type}, "
        f"int4 scales in {dtype_name(scale_dtype)}; "
        f"{rows[0].perplexity.stderr:.2f} standard error of the float perplexity. Model MB counts what is not quantized "
        "(embeddings, norms) at 16 bits. Prefill: 4 windows at once; decode: one token at a time. "
        f"{time.perf_counter() - started:.0f} s in all."
    )
    _console().print(evaluation_table(rows, "tiny-llama (4.2M parameters) by scheme", caption))
    _save(json, "demo", [row.row() for row in rows])


@app.command()
def schemes(
    rows: Annotated[int, typer.Option(help="Out features of the random matrix.")] = 2048,
    columns: Annotated[int, typer.Option(help="In features of the random matrix.")] = 8192,
    model: Annotated[Path | None, typer.Option(help="Take a weight of this model folder instead.")] = None,
    weight: Annotated[str | None, typer.Option(help="Its name, for example model.layers.0.mlp.up_proj.weight.")] = None,
    names: Annotated[str | None, typer.Option("--schemes", help="Comma-separated; default: all.")] = None,
    scale_dtypes: Annotated[str, typer.Option(help="dtypes of int4 scales, comma-separated.")] = "float32,float16",
    seed: Annotated[int, typer.Option(help="Seed of the random matrix.")] = 0,
    json: Json = None,
) -> None:
    """Error and memory reduction of every scheme on one matrix: N(0, 1) values, or a weight of a model."""
    import torch

    from lq_eval.models import read_weight
    from lq_eval.schemes import MATRIX_SCHEMES, measure_matrix
    from lq_eval.tables import matrix_table

    if (model is None) != (weight is None):
        raise SpecError("--model and --weight go together: the folder of a model and the name of one of its weights")
    if model is not None and weight is not None:
        w = read_weight(model, weight)
        title = f"{weight} of {model}, {w.shape[0]}x{w.shape[-1]}"
    else:
        if rows < 1 or columns < 1:
            raise SpecError(f"a matrix of {rows}x{columns}: expected positive sizes")
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        title = f"{rows}x{columns} of N(0, 1)"
    chosen = _split(names) if names else MATRIX_SCHEMES
    found = []
    with _progress() as bar:
        for row in bar.track(measure_matrix(w, chosen, _split(scale_dtypes)), description="measuring"):
            found.append(row)
    _console().print(matrix_table(found, title))
    _save(json, "schemes", [{"rows": w.shape[0], "columns": w.shape[1], **asdict(row)} for row in found])


@app.command()
def ppl(
    model: Annotated[str, typer.Argument(help="A model folder (Hugging Face or lq layout) or a hub name.")],
    scheme: Annotated[str, typer.Option(help="Comma-separated schemes, see lq-eval schemes.")] = "int4-g128",
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file to evaluate on.")] = None,
    dataset: Annotated[str | None, typer.Option(help="wikitext2 instead of a text; default: the bundled text.")] = None,
    dataset_dir: Annotated[Path | None, typer.Option(help="A local copy of the dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "test",
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 4,
    tokens: Annotated[int | None, typer.Option(help="Use the first TOKENS tokens; default: all.")] = None,
    protocol: Annotated[str, typer.Option(help="windows or windows-bos.")] = "windows",
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")] = None,
    scale_dtype: Annotated[str | None, typer.Option(help="dtype of int4 scales; default: the weights'.")] = None,
    kl: Annotated[bool, typer.Option(help="Also KL divergence; keeps the float model in memory.")] = True,
    decode_tokens: Annotated[int, typer.Option(help="Time this many decoding steps; 0: none.")] = 0,
    json: Json = None,
) -> None:
    """Perplexity and tokens per second of a model, float and quantized."""
    from lq_eval.corpus import load_text, load_wikitext2, make_windows, tokenize
    from lq_eval.data import eval_text_path
    from lq_eval.evaluate import Settings, dtype_name, evaluate_in_turn, evaluate_one, window_passes
    from lq_eval.models import default_device, default_dtype, load_model
    from lq_eval.perplexity import protocol as find_protocol
    from lq_eval.schemes import SCALE_DTYPES, parse_schemes
    from lq_eval.tables import evaluation_table

    if dataset not in (None, "wikitext2"):
        raise SpecError(f"unknown dataset {dataset!r}: expected wikitext2")
    if dataset is not None and text is not None:
        raise SpecError("--text and --dataset exclude each other")
    if scale_dtype is not None and scale_dtype not in SCALE_DTYPES:
        raise SpecError(f"unknown scale dtype {scale_dtype!r}: expected one of {', '.join(SCALE_DTYPES)}")
    configs = parse_schemes(scheme, SCALE_DTYPES[scale_dtype] if scale_dtype else None)
    rules = find_protocol(protocol)
    where = default_device(device)
    precision = default_dtype(dtype, where)
    if dataset is not None:
        content, source = load_wikitext2(split, dataset_dir), f"wikitext2 ({split})"
    else:
        path = text or eval_text_path()
        content, source = load_text(path), path.name

    loaded = load_model(model, device=where, dtype=precision)
    windows = make_windows(tokenize(loaded.tokenizer, content), seq_len, tokens)
    bos = getattr(loaded.tokenizer, "bos_token_id", None)
    settings = Settings(batch_size, rules, bos, decode_tokens, precision.itemsize)
    with _progress() as bar:
        total = (
            windows.shape[0]
            if loaded.quantized
            else window_passes(windows, len(configs), together=False, divergence=kl)
        )
        task = bar.add_task("evaluating", total=total)
        if loaded.quantized:
            found = [evaluate_one(loaded.model, "as saved", windows, settings, lambda n: bar.advance(task, n))]
        else:
            found = evaluate_in_turn(
                loaded.model, configs, windows, settings, divergence=kl, progress=lambda n: bar.advance(task, n)
            )
    caption = (
        f"{source}: {windows.numel():,} tokens, protocol {rules.name}, windows of {seq_len}, batches of {batch_size}; "
        f"perplexity +- {found[0].perplexity.stderr:.2f}; {dtype_name(precision)} on {where}"
    )
    _console().print(evaluation_table(found, loaded.name, caption))
    details = {"model": loaded.name, "text": source, "protocol": rules.name, "seq_len": seq_len}
    details |= {"batch_size": batch_size, "dtype": dtype_name(precision), "device": str(where)}
    _save(json, "ppl", [{**details, **row.row()} for row in found])


@app.command()
def doctor(device: Device = None) -> None:
    """Versions, GPUs, caches, optional packages; which kernel serves which problem, and why not the others."""
    from lq_eval.doctor import explanations, machine_facts
    from lq_eval.models import default_device
    from lq_eval.tables import facts_table, kernel_table

    where = default_device(device)
    console = _console()
    console.print(facts_table(machine_facts()))
    console.print(kernel_table(explanations(where)))


@bench_app.command("gemm")
def bench_gemm(
    shapes: Annotated[
        str | None, typer.Option(help="NxK, llama-3.2-1b, llama-3-8b, llama-3-70b[.layer|.merged].")
    ] = None,
    ms: Annotated[str | None, typer.Option(help="Numbers of tokens.")] = None,
    dtypes: Annotated[str | None, typer.Option(help="dtypes of x.")] = None,
    ops: Annotated[str, typer.Option(help="int4, int8, q4_0.")] = "int4,int8,q4_0",
    kernels: Annotated[str, typer.Option(help="auto, all, or names of kernels to force.")] = "auto",
    peers: Annotated[str, typer.Option(help="gemlite, tinygemm (GPU only).")] = "",
    group_size: Annotated[int, typer.Option(help="Group size of int4; -1: per row.")] = 128,
    symmetric: Annotated[bool, typer.Option(help="Symmetric int4.")] = True,
    device: Device = None,
    seconds: Seconds = None,
    json: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the speedup to this file (png, svg, pdf).")] = None,
) -> None:
    """Lq's kernels against the vendor's dense product (cuBLAS), over M and the layers of LLaMA models."""
    from lq_eval.bench.gemm import GemmOptions, points, run_gemm
    from lq_eval.bench.shapes import parse_shapes
    from lq_eval.bench.timing import COLD_BYTES
    from lq_eval.models import default_device, default_dtype
    from lq_eval.tables import gemm_table

    where = default_device(device)
    gpu = where.type == "cuda"
    options = GemmOptions(
        shapes=parse_shapes(shapes or ("llama-3.2-1b,llama-3-8b,llama-3-70b" if gpu else "2048x2048,8192x2048")),
        ms=_integers(ms or ("1,4,16,64,256,1024,4096" if gpu else "1,16,64")),
        dtypes=tuple(default_dtype(name, where) for name in _split(dtypes or ("bfloat16" if gpu else "float32"))),
        ops=_split(ops),
        kernels=_split(kernels),
        peers=_split(peers),
        group_size=group_size,
        symmetric=symmetric,
        device=where,
        seconds=seconds if seconds is not None else (500.0 if gpu else 60.0),
        cold_bytes=COLD_BYTES if gpu else COLD_BYTES // 3,
    )
    found = []
    started = time.monotonic()
    with _progress() as bar:
        task = bar.add_task("timing", total=points(options))
        for row in run_gemm(options):
            found.append(row)
            _save(json, "gemm", [row.to_dict()])
            bar.advance(task)
    done = f"{len(found)} points in {time.monotonic() - started:.0f} s"
    if time.monotonic() - started > options.seconds:
        done += " (the time was up; give --seconds for more)"
    _console().print(gemm_table(found, f"{_device_name(where)}, int4 groups of {group_size}: {done}"))
    if plot is not None:
        from lq_eval.plots import plot_speedup

        plot_speedup([row.to_dict() for row in found], plot, _device_name(where))


@bench_app.command("ggml")
def bench_ggml(
    n: Annotated[int, typer.Option("--n", help="Out features.")] = 4096,
    k: Annotated[int, typer.Option("--k", help="In features.")] = 14336,
    ms: Annotated[str | None, typer.Option(help="Numbers of tokens.")] = None,
    kernel: Annotated[str | None, typer.Option(help="Force a kernel: cuda-mma, reference.")] = None,
    device: Device = None,
    seconds: Seconds = None,
    json: Json = None,
) -> None:
    """Q4_0 weights times Q8_1 activations, with the time of quantizing the activations."""
    from lq_eval.bench.ggml import run_ggml
    from lq_eval.bench.timing import COLD_BYTES
    from lq_eval.models import default_device
    from lq_eval.tables import ggml_table

    where = default_device(device)
    gpu = where.type == "cuda"
    tokens = _integers(ms or ("1,2,4,8,16,32,64,128,256,512" if gpu else "1,8"))
    found = []
    with _progress() as bar:
        task = bar.add_task("timing", total=len(tokens))
        limit = seconds if seconds is not None else (math.inf if gpu else 60.0)
        for row in run_ggml(
            n, k, tokens, where, kernel=kernel, seconds=limit, cold_bytes=COLD_BYTES if gpu else COLD_BYTES // 3
        ):
            found.append(row)
            _save(json, "ggml", [row.to_dict()])
            bar.advance(task)
    _console().print(ggml_table(found, f"Q4_0 {n}x{k} x Q8_1 on {_device_name(where)}"))


@bench_app.command("plot")
def bench_plot(
    records: Annotated[Path, typer.Argument(help="A JSONL file that a benchmark wrote.")],
    output: Annotated[Path, typer.Argument(help="The figure to write (png, svg, pdf).")],
) -> None:
    """Draw the speedups of recorded gemm or ggml benchmarks."""
    from lq_eval.errors import ModelLoadError
    from lq_eval.plots import plot_speedup
    from lq_eval.results import read_records

    try:
        found = list(read_records(records))
    except OSError as error:
        raise ModelLoadError(f"cannot read {str(records)!r}: {error}") from error
    gpus = dict.fromkeys(str(record.environment.get("gpu") or "CPU") for record in found)
    target = plot_speedup([row for record in found for row in record.rows], output, ", ".join(gpus))
    _console().print(f"wrote {target}")


def main() -> None:
    """Run the command."""
    app()


def _console() -> Console:
    console = Console()
    # A pipe or a CI log has no width; 80 columns would fold every table.
    return console if console.is_terminal else Console(width=160)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _save(path: Path | None, bench: str, rows: Sequence[dict[str, Any]]) -> None:
    if path is not None:
        from lq_eval.results import append_record

        append_record(path, bench, rows)


def _split(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _split(text))
    except ValueError:
        raise SpecError(f"{text!r}: expected integers separated by commas") from None


def _device_name(device: Any) -> str:
    if device.type != "cuda":
        return str(device.type).upper()
    import torch

    return torch.cuda.get_device_name(device)

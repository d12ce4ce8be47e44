"""The ``lq-eval`` command.

A named error of lq ends it with one line on standard error and exit status 1; ``lq-eval --debug`` shows the traceback
instead. Tables and nothing else go to standard output, progress bars to standard error.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from lq_formats import LQError, SpecError
from typer.core import TyperGroup

from lq_eval.bench.commands import bench_app
from lq_eval.terminal import (
    STDOUT,
    BareJsonCommand,
    DemoSeconds,
    Device,
    Json,
    PrintJson,
    console,
    listed,
    progress_bar,
    save,
)

if TYPE_CHECKING:
    from lq_eval.models import LoadedModel
    from lq_eval.perplexity import Protocol


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
app.add_typer(bench_app, name="bench")


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks of named errors.")] = False,
) -> None:
    pass


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(help="Tokens of the bundled text to evaluate on.")] = 25600,
    schemes: Annotated[str | None, typer.Option(help="Comma-separated; default: all that the demo knows.")] = None,
    seconds: DemoSeconds = 60.0,
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
    settings = Settings(decode_tokens=16, seconds=seconds)
    with progress_bar() as bar:
        task = bar.add_task("evaluating", total=window_passes(windows, len(configs), together=True))
        rows = evaluate_together(loaded.model, configs, windows, settings, lambda n: bar.advance(task, n))
    done = rows[0].perplexity.tokens
    cut = "" if done == windows.numel() else f" ({windows.numel():,} were asked for, --seconds {seconds:g} was up)"
    caption = (
        f"{done:,} tokens{cut} of the Python reference in windows of 256, {dtype_name(dtype)} on {where.type}, "
        f"int4 scales in {dtype_name(scale_dtype)}; "
        f"{rows[0].perplexity.stderr:.2f} standard error of the float perplexity. Model MB counts what is not quantized "
        "(embeddings, norms) at 16 bits. Prefill: 4 windows at once; decode: one token at a time. "
        f"{time.perf_counter() - started:.0f} s in all."
    )
    console().print(evaluation_table(rows, "tiny-llama (4.2M parameters) by scheme", caption))
    save(json, "demo", [row.row() for row in rows])


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
        if not 0 <= seed < 2**64:
            raise SpecError(f"--seed {seed}: expected 0 to 2**64 - 1")
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        title = f"{rows}x{columns} of N(0, 1)"
    chosen = listed(names, "scheme") if names else MATRIX_SCHEMES
    dtypes = listed(scale_dtypes, "scale dtype")
    found = []
    with progress_bar() as bar:
        for row in bar.track(measure_matrix(w, chosen, dtypes), description="measuring"):
            found.append(row)
    console().print(matrix_table(found, title))
    save(json, "schemes", [{"rows": w.shape[0], "columns": w.shape[1], **asdict(row)} for row in found])


@app.command(cls=BareJsonCommand)
def ppl(
    model: Annotated[
        str, typer.Argument(help="A model folder (Hugging Face or lq layout), a GGUF file or a hub name.")
    ],
    scheme: Annotated[
        str | None, typer.Option(help="Comma-separated schemes, see lq-eval schemes; default: int4-g128.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The float model that MODEL was made of: evaluate MODEL as it is, beside it.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file to evaluate on.")] = None,
    dataset: Annotated[str | None, typer.Option(help="wikitext2 instead of a text; default: the bundled text.")] = None,
    dataset_dir: Annotated[Path | None, typer.Option(help="A local copy of the dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the dataset; default: test.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 4,
    tokens: Annotated[int | None, typer.Option(help="Use the first TOKENS tokens; default: all.")] = None,
    protocol: Annotated[str, typer.Option(help="windows or windows-bos.")] = "windows",
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")] = None,
    scale_dtype: Annotated[str | None, typer.Option(help="dtype of int4 scales; default: the weights'.")] = None,
    kl: Annotated[bool, typer.Option(help="Also KL divergence; keeps the float model in memory.")] = True,
    decode_tokens: Annotated[int, typer.Option(help="Time this many decoding steps, at least 2; 0: none.")] = 0,
    json: PrintJson = None,
) -> None:
    """Perplexity and tokens per second of a model, float and quantized.

    A dense MODEL is evaluated and quantized by every scheme in turn; one that lq saved is evaluated as it is.
    """
    from json import dumps

    import torch

    from lq_eval.corpus import load_text, load_wikitext2, make_windows, tokenize
    from lq_eval.data import eval_text_path
    from lq_eval.evaluate import (
        Settings,
        document,
        dtype_name,
        evaluate_against,
        evaluate_in_turn,
        evaluate_one,
        window_passes,
    )
    from lq_eval.models import default_device, default_dtype, load_model, saved_quantized
    from lq_eval.perplexity import protocol as find_protocol
    from lq_eval.schemes import SCALE_DTYPES, parse_schemes
    from lq_eval.tables import evaluation_table

    if dataset not in (None, "wikitext2"):
        raise SpecError(f"unknown dataset {dataset!r}: expected wikitext2")
    if dataset is not None and text is not None:
        raise SpecError("--text and --dataset exclude each other")
    if dataset is None and (dataset_dir is not None or split is not None):
        option = "--split" if dataset_dir is None else "--dataset-dir"
        raise SpecError(f"{option} says where a dataset is read from: give --dataset wikitext2 with it, or neither")
    if scale_dtype is not None and scale_dtype not in SCALE_DTYPES:
        raise SpecError(f"unknown scale dtype {scale_dtype!r}: expected one of {', '.join(SCALE_DTYPES)}")
    if decode_tokens < 0 or decode_tokens == 1:
        raise SpecError(f"--decode-tokens {decode_tokens}: expected at least 2, whose median counts, or 0 for none")
    if baseline is not None and scheme is not None:
        raise SpecError("--scheme quantizes MODEL and --baseline takes it as it is: give one of them")
    if baseline is not None or saved_quantized(model):
        reason = "--baseline takes MODEL as it is" if baseline is not None else f"{model!r} is quantized already"
        for option, given in (("--scheme", scheme), ("--scale-dtype", scale_dtype), ("--no-kl", None if kl else True)):
            if given is not None:
                raise SpecError(f"{option} is for schemes that MODEL is quantized by, and {reason}: leave it out")
    if baseline is not None and saved_quantized(baseline):
        raise SpecError(f"--baseline {baseline!r} is quantized: expected the float model that MODEL was made of")
    configs = parse_schemes(scheme or "int4-g128", SCALE_DTYPES[scale_dtype] if scale_dtype else None)
    rules = find_protocol(protocol)
    where = default_device(device)
    precision = default_dtype(dtype, where)
    if dataset is not None:
        part = split or "test"
        content, source = load_wikitext2(part, dataset_dir), f"wikitext2 ({part})"
    else:
        path = text or eval_text_path()
        content, source = load_text(path), path.name

    loaded = load_model(model, device=where, dtype=precision, float_model=baseline)
    reference = None if baseline is None else load_model(baseline, device=where, dtype=precision)
    for one in (loaded, *(() if reference is None else (reference,))):
        _check_context(one, seq_len, rules, decode_tokens)
    ids = tokenize(loaded.tokenizer, content)
    if reference is not None and not torch.equal(ids, tokenize(reference.tokenizer, content)):
        raise SpecError(
            f"{model!r} and --baseline {baseline!r} cut the text into other tokens: expected one vocabulary"
        )
    windows = make_windows(ids, seq_len, tokens)
    bos = getattr(loaded.tokenizer, "bos_token_id", None)
    settings = Settings(batch_size, rules, bos, decode_tokens, precision.itemsize)
    with progress_bar() as bar:
        if reference is not None:
            total = 2 * windows.shape[0]
        elif loaded.quantized:
            total = windows.shape[0]
        else:
            total = window_passes(windows, len(configs), together=False, divergence=kl)
        task = bar.add_task("evaluating", total=total)

        def advance(done: int) -> None:
            bar.advance(task, done)

        if reference is not None:
            found = evaluate_against(loaded.model, "as saved", reference.model, windows, settings, advance)
        elif loaded.quantized:
            found = [evaluate_one(loaded.model, "as saved", windows, settings, advance)]
        else:
            found = evaluate_in_turn(loaded.model, configs, windows, settings, divergence=kl, progress=advance)
    caption = (
        f"{source}: {windows.numel():,} tokens, protocol {rules.name}, windows of {seq_len}, batches of {batch_size}; "
        f"perplexity +- {found[0].perplexity.stderr:.2f}; {dtype_name(precision)} on {where}"
    )
    console().print(evaluation_table(found, loaded.name, caption))
    details = {"model": loaded.name, "text": source, "protocol": rules.name, "seq_len": seq_len}
    details |= {"batch_size": batch_size, "dtype": dtype_name(precision), "device": str(where)}
    if json == STDOUT:
        typer.echo(dumps({**details, **document(found)}, allow_nan=False))
    else:
        # Scales of int8 and ggml have a dtype of their own.
        scales = {name: scale_dtype or dtype_name(precision) for name in configs if name.startswith("int4")}
        save(json, "ppl", [{**details, "scale_dtype": scales.get(row.scheme), **row.row()} for row in found])


def _check_context(loaded: "LoadedModel", seq_len: int, rules: "Protocol", decode_tokens: int) -> None:
    """Raise SpecError if a model would read more tokens at once than it was made for."""
    from lq_eval.evaluate import DECODE_PROMPT
    from lq_eval.models import context_length

    context = context_length(loaded.model)
    if context is None:
        return
    knows = f"the model {loaded.name!r} reads at most {context} tokens at once by its configuration"
    if seq_len + rules.bos > context:
        also = f" and the BOS token of {rules.name!r}" if rules.bos else ""
        raise SpecError(f"--seq-len {seq_len}{also}: {knows}; give --seq-len {context - rules.bos} or less")
    prompt = min(DECODE_PROMPT, seq_len)
    if decode_tokens and prompt + decode_tokens + 1 > context:  # the first step is not timed
        raise SpecError(
            f"--decode-tokens {decode_tokens}, one more and a prompt of {prompt}: {knows}; give fewer, or a shorter --seq-len"
        )


@app.command()
def doctor(device: Device = None) -> None:
    """Versions, GPUs, caches, optional packages; which kernel serves which problem, and why not the others."""
    from lq_eval.doctor import explanations, machine_facts
    from lq_eval.models import default_device
    from lq_eval.tables import facts_table, kernel_table

    where = default_device(device)
    out = console()
    out.print(facts_table(machine_facts()))
    out.print(kernel_table(explanations(where)))


def main() -> None:
    """Run the command."""
    app()

"""The ``lq`` command: ``lq quantize MODEL OUT`` makes an lq checkpoint of a Hugging Face model.

A named error ends it with one line on standard error and exit status 1. Results go to standard output, progress to
standard error.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lq_formats import LQError, SpecError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lq_torch.calibrate import AWQOptions, CalibrationReport, GPTQOptions
from lq_torch.calibrate.sequential import calibrate
from lq_torch.checkpoint import save_pretrained
from lq_torch.config import Int4WeightOnlyConfig, Int8WeightOnlyConfig, WeightConfig
from lq_torch.config_intx import IntxWeightOnlyConfig
from lq_torch.quantize import FilterFn, quantize_, select_linears
from lq_torch.tensors import LowBitTensor

DATA_FREE = ("rtn", "mse", "hqq")
CALIBRATED = ("gptq", "awq", "awq+gptq")
SCHEMES = ("int2", "int3", "int4", "int5", "int6", "int7", "int8")
REPORT_NAME = "calibration.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with status 1 on a named error and 2 on wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        _quantize(options)
    except LQError as error:
        if options.debug:
            raise
        sys.stderr.write(f"lq: {type(error).__name__}: {error}\n")
        raise SystemExit(1) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lq", description="Low-bit weights for PyTorch language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    quantize = commands.add_parser(
        "quantize",
        help="quantize a Hugging Face model into a folder",
        description="Quantize every Linear layer of a Hugging Face model but its output head, and save it.",
    )
    add = quantize.add_argument
    add("model", metavar="MODEL", help="a model's folder, or its name on the hub")
    add("out", metavar="OUT", type=Path, help="the folder to write")
    add("--scheme", choices=SCHEMES, default="int4", help="bits of a weight; int8 has one scale a row (default: int4)")
    add("--group-size", type=int, default=128, help="in features per scale; -1: one scale a row (default: 128)")
    add("--asymmetric", action="store_true", help="with zero points")
    add("--algorithm", choices=(*DATA_FREE, *CALIBRATED), help="what chooses the codes (default: mse)")
    add("--calibration", type=Path, metavar="FILE", help="a UTF-8 text like what the model will read: for gptq and awq")
    add("--windows", type=int, metavar="N", help="calibration windows (default: 128, or as many as the text has)")
    add("--window-length", type=int, metavar="T", help="tokens in each (default: 2048, or the model's context)")
    add("--batch-size", type=int, default=8, metavar="N", help="windows at a time (default: 8)")
    add("--exclude", metavar="REGEX", help="leave out layers whose path has a match")
    add("--scale-dtype", choices=tuple(_DTYPES), help="of scales and zeros (default: the weights')")
    add("--dtype", choices=tuple(_DTYPES), help="load and compute in this dtype (default: the one it was saved in)")
    add("--device", help="where to compute (default: the GPU where there is one)")
    add("--offload", action="store_true", help="keep activations in host memory while calibrating")
    add("--resume", type=Path, metavar="FOLDER", help="keep finished blocks here, and go on from them")
    add("--debug", action="store_true", help="show tracebacks of named errors")
    return parser


def _quantize(options: argparse.Namespace) -> None:
    from lq_torch.integrations.causal_lm import load_dense

    config = _config(options)
    device = _device(options.device)
    exclude = _pattern(options.exclude)
    text = _text(options)
    if options.out.exists() and Path(options.model).exists() and options.out.samefile(options.model):
        raise SpecError(f"{options.out} is the model itself; name another folder to write")
    model, tokenizer = load_dense(options.model, _DTYPES.get(options.dtype))
    chosen = _filter(model, exclude)
    report = None
    if text is None:
        model.to(device)
        quantize_(model, config, chosen)
    else:
        tokens = _windows(tokenizer, text, model, options)
        report = _calibrated(model, tokens, config, chosen, device, options)
    save_pretrained(model, options.out)
    tokenizer.save_pretrained(options.out)
    if report is not None:
        (options.out / REPORT_NAME).write_text(report.to_json() + "\n", encoding="utf-8")
        sys.stdout.write(f"{report}\n")
    sys.stdout.write(f"{_summary(model)}; saved in {options.out}\n")


def _config(options: argparse.Namespace) -> WeightConfig:
    bits = int(options.scheme.removeprefix("int"))
    algorithm: Any = options.algorithm if options.algorithm in DATA_FREE else "mse"
    common: dict[str, Any] = {
        "group_size": options.group_size,
        "symmetric": not options.asymmetric,
        "scale_dtype": _DTYPES.get(options.scale_dtype),
    }
    if bits == 4:
        return Int4WeightOnlyConfig(**common, int4_choose_qparams_algorithm=algorithm)
    if bits == 8:
        if options.algorithm not in (None, "rtn") or options.asymmetric:
            raise SpecError("--scheme int8 is symmetric and rounds to nearest: there is no --algorithm but rtn for it")
        return Int8WeightOnlyConfig()
    return IntxWeightOnlyConfig(bits=bits, **common, choose_qparams_algorithm=algorithm)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise SpecError(f"--device {name}: expected for example cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpecError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA GPUs here")
    return device


def _pattern(exclude: str | None) -> re.Pattern[str] | None:
    try:
        return None if exclude is None else re.compile(exclude)
    except re.error as error:
        raise SpecError(f"--exclude {exclude!r} is no regular expression: {error}") from None


def _filter(model: nn.Module, exclude: re.Pattern[str] | None) -> FilterFn:
    """Return the default choice of layers, without those that the pattern finds."""
    paths = {path for path, _ in select_linears(model)}
    kept = {path for path in paths if exclude is None or not exclude.search(path)}
    if exclude is not None and kept == paths:
        raise SpecError(f"--exclude {exclude.pattern!r} matches none of {len(paths)} layers, such as {min(paths)!r}")
    return lambda _, path: path in kept


def _text(options: argparse.Namespace) -> str | None:
    """Return the calibration text, or None for an algorithm that uses none."""
    if options.algorithm not in CALIBRATED:
        if options.calibration is not None:
            sys.stderr.write(f"lq: --calibration is not used: {options.algorithm or 'this scheme'} needs no data\n")
        return None
    if options.calibration is None:
        raise SpecError(
            f"--algorithm {options.algorithm} needs --calibration FILE, a text like what the model will read"
        )
    try:
        return str(options.calibration.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the calibration text as UTF-8: {error}") from None


def _windows(tokenizer: Any, text: str, model: nn.Module, options: argparse.Namespace) -> Tensor:
    from lq_torch.integrations.causal_lm import token_windows

    context = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 2048
    length = min(2048, context) if options.window_length is None else options.window_length
    if length < 1 or (options.windows is not None and options.windows < 1):
        raise SpecError(f"--windows {options.windows} of {length} tokens: expected positive numbers")
    return token_windows(tokenizer, text, options.windows, length)


def _calibrated(
    model: nn.Module,
    tokens: Tensor,
    config: WeightConfig,
    chosen: FilterFn,
    device: torch.device,
    options: argparse.Namespace,
) -> CalibrationReport:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=None)
        return calibrate(
            model,
            tokens,
            config,
            gptq=GPTQOptions() if "gptq" in options.algorithm else None,
            awq=AWQOptions() if "awq" in options.algorithm else None,
            filter_fn=chosen,
            batch_size=options.batch_size,
            device=device,
            offload=options.offload,
            resume=options.resume,
            progress=lambda done, total, layer: bar.update(task, completed=done, total=total, description=layer.path),
        )


def _summary(model: nn.Module) -> str:
    weights = [p for p in model.parameters() if isinstance(p, LowBitTensor)]
    bits = sum(w.packed_nbytes for w in weights) * 8 / max(sum(w.numel() for w in weights), 1)
    return f"{len(weights)} layers of {sum(w.numel() for w in weights):,} weights in {bits:.3f} bits each"

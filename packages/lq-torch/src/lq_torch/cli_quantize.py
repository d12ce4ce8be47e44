"""What ``lq quantize`` does: load, choose, quantize, save, say what was done."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lq_formats import GGML_FORMATS, SpecError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lq_torch.calibrate import AWQOptions, CalibrationReport, GPTQOptions, mixed_precision
from lq_torch.calibrate.sequential import calibrate
from lq_torch.checkpoint import REPORT_NAME, check_target, save_pretrained
from lq_torch.config import GGMLWeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, WeightConfig
from lq_torch.config_intx import IntxWeightOnlyConfig
from lq_torch.integrations.causal_lm import load_dense, token_windows
from lq_torch.quantize import quantize_, select_linears
from lq_torch.rotation import rotate_
from lq_torch.staging import check_folder
from lq_torch.tensors import LowBitTensor

DATA_FREE = ("rtn", "mse", "hqq")
CALIBRATED = ("gptq", "awq", "awq+gptq")
ALGORITHMS = (*DATA_FREE, *CALIBRATED)
GGML_TYPES = tuple(name for name, form in GGML_FORMATS.items() if form.quantizer is not None and name != "q8_1")
SCHEMES = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", *GGML_TYPES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BATCH_SIZE = 8
_OF_CALIBRATION = ("calibration", "windows", "window_length", "batch_size", "offload", "resume")
"""Options that say nothing where there is none."""


def quantize(options: argparse.Namespace) -> None:
    """Run ``lq quantize`` with the options of :mod:`lq_torch.cli`.

    Raises:
        LQError: The named error of whatever is wrong; nothing has been written then.
    """
    config = None if options.target_bits is not None else _config(options)
    device = _device(options.device)
    exclude = _pattern(options.exclude)
    text = _text(options)
    check_folder(options.out)
    if os.path.exists(options.out) and os.path.exists(options.model) and options.out.samefile(options.model):
        raise SpecError(f"{options.out} is the model itself; name another folder to write")
    check_target(options.out)
    model, tokenizer = load_dense(options.model, DTYPES.get(options.dtype))
    chosen = _chosen(model, exclude)
    tokens = None if text is None else _windows(tokenizer, text, model, options)
    said = []
    if options.rotate is not None:
        said.append(_rotated(model, device, options))
    if config is not None:
        configs = dict.fromkeys(chosen, config)
    else:
        configs = _mixed(model, tokens, chosen, device, options)
        said += [f"{path}: {_described(one)}" for path, one in configs.items()]
    report = None
    if options.algorithm in CALIBRATED or _weighted(options):
        assert tokens is not None
        report = _calibrated(model, tokens, configs, device, options)
    else:
        model.to(device)
        for one in dict.fromkeys(configs.values()):
            quantize_(model, one, lambda _, path, one=one: configs.get(path) == one)  # type: ignore[misc]
    save_pretrained(model, options.out)
    tokenizer.save_pretrained(options.out)
    if report is not None:
        (options.out / REPORT_NAME).write_text(report.to_json() + "\n", encoding="utf-8")
        said.append(str(report))
    sys.stdout.write("\n".join([*said, f"{_summary(model)}; saved in {options.out}\n"]))


def _weighted(options: argparse.Namespace) -> bool:
    """Return whether the text gives an importance to the search of a ggml type."""
    return options.calibration is not None and options.scheme in GGML_TYPES and GGML_FORMATS[options.scheme].weighted


def _config(options: argparse.Namespace) -> WeightConfig:
    if options.scheme in GGML_TYPES:
        given = (options.group_size, options.algorithm, options.scale_dtype)
        if options.asymmetric or any(value is not None for value in given):
            raise SpecError(
                f"--scheme {options.scheme} fixes groups, zero points and scales: leave out --group-size, --asymmetric, "
                "--scale-dtype and --algorithm"
            )
        return GGMLWeightOnlyConfig(options.scheme)
    bits = int((options.scheme or "int4").removeprefix("int"))
    algorithm: Any = options.algorithm if options.algorithm in DATA_FREE else "mse"
    common: dict[str, Any] = {
        "group_size": 128 if options.group_size is None else options.group_size,
        "symmetric": not options.asymmetric,
        "scale_dtype": DTYPES.get(options.scale_dtype),
    }
    if bits == 4:
        return Int4WeightOnlyConfig(**common, int4_choose_qparams_algorithm=algorithm)
    if bits == 8:
        if options.algorithm not in (None, "rtn") or options.asymmetric:
            raise SpecError("--scheme int8 is symmetric and rounds to nearest: there is no --algorithm but rtn for it")
        if options.group_size not in (None, -1) or options.scale_dtype is not None:
            raise SpecError("--scheme int8 has one scale a row, in float32: leave out --group-size and --scale-dtype")
        return Int8WeightOnlyConfig()
    return IntxWeightOnlyConfig(bits=bits, **common, choose_qparams_algorithm=algorithm)


def _rotated(model: nn.Module, device: torch.device, options: argparse.Namespace) -> str:
    """Rotate the model, giving a tied output head its own weight, and say so."""
    home = next(model.parameters()).device
    model.to(device)
    done = rotate_(model, heads=options.rotate == "heads", untie=True)
    model.to(home)
    heads = f" and the heads of {len(done.heads)} blocks" if done.heads else ""
    untied = "; the output head has a weight of its own now" if done.untied else ""
    return f"rotated a residual stream of {done.width}{heads}{untied}"


def _mixed(
    model: nn.Module, tokens: Tensor | None, chosen: set[str], device: torch.device, options: argparse.Namespace
) -> dict[str, WeightConfig]:
    if options.scheme is not None or options.group_size is not None or options.algorithm in ("rtn", "hqq"):
        raise SpecError(
            "--target-bits chooses bits and groups: it goes with mse, gptq and awq, without --scheme and --group-size"
        )
    assert tokens is not None
    home = next(model.parameters()).device
    model.to(device)
    with _progress("measuring") as advance:
        configs = mixed_precision(
            model,
            tokens,
            options.target_bits,
            gptq=GPTQOptions() if "gptq" in (options.algorithm or "") else None,
            symmetric=not options.asymmetric,
            scale_dtype=DTYPES.get(options.scale_dtype),
            filter_fn=lambda _, path: path in chosen,
            batch_size=_batch_size(options),
            resume=options.resume,
            progress=lambda done, total: advance(done, total, ""),
        )
    model.to(home)
    return configs


def _described(config: WeightConfig) -> str:
    assert isinstance(config, Int4WeightOnlyConfig | IntxWeightOnlyConfig)
    bits = config.bits if isinstance(config, IntxWeightOnlyConfig) else 4
    return f"{bits} bits, groups of {config.group_size}"


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


def _chosen(model: nn.Module, exclude: re.Pattern[str] | None) -> set[str]:
    """Return the layers that quantize_ takes by default, without those that the pattern finds."""
    paths = {path for path, _ in select_linears(model)}
    kept = {path for path in paths if exclude is None or not exclude.search(path)}
    if exclude is not None and kept == paths:
        raise SpecError(f"--exclude {exclude.pattern!r} matches none of {len(paths)} layers, such as {min(paths)!r}")
    if not kept:
        raise SpecError("there is no Linear layer to quantize: the model has none, or --exclude takes them all")
    return kept


def _text(options: argparse.Namespace) -> str | None:
    """Return the calibration text, or None where none is used."""
    if options.algorithm not in CALIBRATED and options.target_bits is None and not _weighted(options):
        given = [f"--{name.replace('_', '-')}" for name in _OF_CALIBRATION if not _is_absent(getattr(options, name))]
        if given:
            user = options.algorithm or options.scheme or "this scheme"
            sys.stderr.write(
                f"lq: {', '.join(given)} {'is' if len(given) == 1 else 'are'} not used: {user} needs no data\n"
            )
        return None
    if options.calibration is None:
        user = "--target-bits" if options.target_bits is not None else f"--algorithm {options.algorithm}"
        raise SpecError(f"{user} needs --calibration FILE, a text like what the model will read")
    try:
        return str(options.calibration.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the calibration text as UTF-8: {error}") from None


def _is_absent(value: Any) -> bool:
    return value is None or value is False  # 0 was given


def _batch_size(options: argparse.Namespace) -> int:
    return _BATCH_SIZE if options.batch_size is None else int(options.batch_size)


def _windows(tokenizer: Any, text: str, model: nn.Module, options: argparse.Namespace) -> Tensor:
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = min(2048, context or 2048) if options.window_length is None else options.window_length
    if length < 1 or (options.windows is not None and options.windows < 1):
        raise SpecError(f"--windows {options.windows} of {length} tokens: expected positive numbers")
    if context is not None and length > context:
        raise SpecError(f"--window-length {length}: the model reads at most {context} tokens (max_position_embeddings)")
    return token_windows(tokenizer, text, options.windows, length)


def _calibrated(
    model: nn.Module,
    tokens: Tensor,
    configs: Mapping[str, WeightConfig],
    device: torch.device,
    options: argparse.Namespace,
) -> CalibrationReport:
    with _progress("calibrating") as advance:
        return calibrate(
            model,
            tokens,
            configs,
            gptq=GPTQOptions() if "gptq" in (options.algorithm or "") else None,
            awq=AWQOptions() if "awq" in (options.algorithm or "") else None,
            batch_size=_batch_size(options),
            device=device,
            offload=options.offload,
            resume=options.resume,
            progress=lambda done, total, layer: advance(done, total, layer.path),
        )


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on a terminal; yields what is called with layers done, layers in all, and a layer."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total, layer: bar.update(
            task, completed=done, total=total, description=f"{label} {layer}".rstrip()
        )


def _summary(model: nn.Module) -> str:
    weights = [p for p in model.parameters() if isinstance(p, LowBitTensor)]
    count, total = sum(w.numel() for w in weights), sum(p.numel() for p in model.parameters())
    bits = sum(w.saved_nbytes for w in weights) * 8 / max(count, 1)
    dense = f", {1 - count / total:.0%} of the model's as they were" if total >= 2 * count else ""
    return f"{len(weights)} layers of {count:,} weights in {bits:.3f} bits each{dense}"

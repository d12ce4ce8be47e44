"""quantize_ and dequantize_: change the Linear layers of a model in place."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lq_formats import DTypeError, LQError, ShapeError, SpecError, UnsupportedError, check_finite
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from lq_torch.config import WeightConfig
from lq_torch.tensors import LowBitTensor

FilterFn = Callable[[nn.Module, str], bool]

_HEADS = ("lm_head", "output", "embed_out")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantize_(
    model: nn.Module,
    config: WeightConfig,
    filter_fn: FilterFn | None = None,
    *,
    progress: bool | None = None,
) -> None:
    """Replace the weights of a model's Linear layers by quantized ones, in place, layer by layer.

    Everything is validated first: on any error the model is as it was. Layers that are already quantized are left alone.

    Args:
        model: Any module. Weights are quantized on the device they are on.
        config: What to quantize to.
        filter_fn: ``(module, path) -> bool``; which ``nn.Linear`` layers to quantize. Default: all but the output head
            (``lm_head``, ``output``, ``embed_out``) and weights tied to another module, such as the embedding.
        progress: Show a progress bar on standard error; None shows it on a terminal.

    Raises:
        LQError: The named error of the first layer that cannot be quantized, with its path: NonFiniteError for NaN or
            infinity, GroupSizeError where the group size does not divide the in features, DTypeError for weights that
            are not fp16, bf16 or fp32, UnsupportedError for a tied weight that was asked for explicitly.
        SpecError: If ``config`` is not a configuration.
    """
    if not isinstance(config, WeightConfig):
        raise SpecError(f"config is a {type(config).__name__}: expected a configuration such as Int4WeightOnlyConfig()")
    targets = select_linears(model, filter_fn)
    if not targets:
        warnings.warn("quantize_ found no Linear layer to quantize; check the model and filter_fn", stacklevel=2)
        return
    for path, layer in targets:
        _validate(path, layer, config)
    with _bar(progress) as bar:
        task = bar.add_task("quantizing", total=len(targets))
        for path, layer in targets:
            with _named(path):
                quantized = config.quantize(layer.weight.detach())
            layer.weight = nn.Parameter(quantized, requires_grad=False)
            bar.advance(task)


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every quantized Linear weight of a model by its dense values, in place.

    Args:
        model: A model that :func:`quantize_` changed.
        dtype: dtype of the dense weights; None for each weight's own.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, LowBitTensor):
            module.weight = nn.Parameter(module.weight.dequantize(dtype), requires_grad=False)


def select_linears(model: nn.Module, filter_fn: FilterFn | None = None) -> list[tuple[str, nn.Linear]]:
    """Return the ``(path, layer)`` pairs that :func:`quantize_` would change, in the model's order.

    Raises:
        UnsupportedError: If ``filter_fn`` picks a layer whose weight is tied to another module.
    """
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or isinstance(module.weight, LowBitTensor):
            continue
        tied = owners[id(module.weight)] > 1
        if filter_fn is None:
            if tied or path.rpartition(".")[2] in _HEADS:
                continue
        elif not filter_fn(module, path):
            continue
        elif tied:
            raise UnsupportedError(
                f"{path}.weight is shared with another module, which would lose it; untie it first or leave it out"
            )
        found.append((path, module))
    return found


def _validate(path: str, layer: nn.Linear, config: WeightConfig) -> None:
    w = layer.weight
    name = f"{path}.weight" if path else "weight"
    if w.dtype not in _DTYPES:
        raise DTypeError(f"{name} has dtype {w.dtype}: expected float16, bfloat16 or float32")
    if w.device.type == "meta":
        raise ShapeError(f"{name} is on the meta device and has no values; load the weights first")
    with _named(path):
        config.validate(w)
    check_finite(w, name)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Put the layer's path in front of the errors raised inside."""
    try:
        yield
    except LQError as error:
        if path and error.args and isinstance(error.args[0], str):
            error.args = (f"{path}: {error.args[0]}", *error.args[1:])
        raise


def _bar(progress: bool | None) -> Progress:
    shown = sys.stderr.isatty() if progress is None else progress
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True)

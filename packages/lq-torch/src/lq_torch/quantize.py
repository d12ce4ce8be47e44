"""quantize_ and dequantize_: change the Linear layers of a model in place."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from lq_formats import DeviceError, DTypeError, LQError, ShapeError, SpecError, UnsupportedError, check_finite
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lq_torch.arguments import check_module
from lq_torch.config import WeightConfig
from lq_torch.tensors import LowBitTensor

FilterFn = Callable[[nn.Module, str], bool]

_HEADS = ("lm_head", "output", "embed_out")
_AMBIGUOUS = "output"  # of which many models have one in every block
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FP16_MAX = torch.finfo(torch.float16).max
_MUCH = 0.25  # of a model's weights, to warn where they stay dense
_SMALL, _LOST = 2.0**-10, 0.5  # the largest weight for which scales may be too small for fp16, and the error to warn of


def quantize_(
    model: nn.Module,
    config: WeightConfig,
    filter_fn: FilterFn | None = None,
    *,
    progress: bool | None = None,
) -> None:
    """Replace the weights of a model's Linear layers by quantized ones, in place, layer by layer.

    Everything is validated first: on any error the model is as it was. Layers that are already quantized are left
    alone. Where there is nothing to quantize, a warning says why. Another one says what stays dense without being asked to,
    if it is a quarter of the weights or more: parameters of three dimensions, such as the experts of many models. A third
    one names layers whose weights are so small that scales of fp16 lose them.

    Args:
        model: Any module. Weights are quantized on the device they are on.
        config: What to quantize to.
        filter_fn: ``(module, path) -> bool``; which ``nn.Linear`` layers to quantize. Default: all but the output head
            (``lm_head``, ``embed_out``, or ``output`` where it is no layer of repeated blocks) and weights tied to another
            module, such as the embedding.
        progress: Show a progress bar on standard error; None shows it on a terminal, and clears it at the end.

    Raises:
        LQError: The named error of the first layer that cannot be quantized, with its path: NonFiniteError for NaN or
            infinity, GroupSizeError where the group size does not divide the in features, DTypeError for weights that
            are not fp16, bf16 or fp32, UnsupportedError for a parametrized weight and for a tied weight that was asked
            for explicitly.
        SpecError: If ``config`` is not a configuration, ``model`` no module, or ``filter_fn`` cannot be called.
    """
    check_module(model, "quantize_")
    if not isinstance(config, WeightConfig):
        raise SpecError(f"config is a {type(config).__name__}: expected a configuration such as Int4WeightOnlyConfig()")
    targets = select_linears(model, filter_fn)
    if not targets:
        warnings.warn(f"quantize_ found no Linear layer to quantize: {why_none(model, filter_fn)}", stacklevel=2)
        return
    small: set[str] = set()
    for path, layer in targets:
        check_linear(path, layer)
        with named(path):
            config.validate(layer.weight)
            largest = _largest(layer.weight)
            # Scales of larger weights may not fit their dtype. Find out while nothing has been changed.
            if largest > _FP16_MAX:
                config.quantize(layer.weight.detach())
        if 0 < largest < _SMALL:
            small.add(path)
    lost = []
    with _bar(progress) as bar:
        task = bar.add_task("quantizing", total=len(targets))
        for path, layer in targets:
            with named(path):
                quantized = config.quantize(layer.weight.detach())
            if path in small and _relative_error(layer.weight.detach(), quantized) > _LOST:
                lost.append(path)
            layer.weight = nn.Parameter(quantized, requires_grad=False)
            bar.advance(task)
    if lost:
        warnings.warn(
            f"quantize_ lost most of the weights of {len(lost)} layers, among them {_some(lost)}: their scales are too small "
            "for their dtype; leave these layers out, or take a scheme with scales in bfloat16 or float32",
            stacklevel=2,
        )
    if filter_fn is None and (left := what_stayed(model)):
        warnings.warn(f"quantize_ quantizes nn.Linear layers only: {left}", stacklevel=2)


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace every quantized weight of a model's Linear layers and embeddings by its dense values, in place.

    A weight that several modules share is dequantized once, and they share it afterwards.

    Args:
        model: A model that :func:`quantize_` changed.
        dtype: dtype of the dense weights; None for each weight's own.

    Raises:
        DTypeError: If ``dtype`` is not fp16, bf16 or fp32; the model is then as it was.
        SpecError: If ``model`` is no module.

    Warns:
        UserWarning: Where there is nothing to replace, or modules that hold packed weights of their own are left.
    """
    check_module(model, "dequantize_")
    if dtype is not None and dtype not in _DTYPES:
        raise DTypeError(f"dtype={dtype}: expected float16, bfloat16 or float32")
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and isinstance(module.weight, LowBitTensor):
            holders.setdefault(id(module.weight), []).append(module)
    for modules in holders.values():
        weight = modules[0].weight
        assert isinstance(weight, LowBitTensor)
        dense = nn.Parameter(weight.dequantize(dtype), requires_grad=False)
        for module in modules:
            module.weight = dense
    from lq_torch.linear import Int4PackedLinear, Int8Linear  # which imports this module

    packed = [
        path or type(module).__name__
        for path, module in model.named_modules()
        if isinstance(module, Int4PackedLinear | Int8Linear)
    ]
    if packed:
        warnings.warn(
            f"dequantize_ left {len(packed)} modules that hold packed weights of their own, among them {_some(packed)}: put "
            "nn.Linear layers with what their dequantize() returns in their places",
            stacklevel=2,
        )
    elif not holders:
        warnings.warn(f"dequantize_ found no quantized weight in {type(model).__name__}", stacklevel=2)


def select_linears(model: nn.Module, filter_fn: FilterFn | None = None) -> list[tuple[str, nn.Linear]]:
    """Return the ``(path, layer)`` pairs that :func:`quantize_` would change, in the model's order.

    Raises:
        SpecError: If ``filter_fn`` cannot be called.
        UnsupportedError: If ``filter_fn`` picks a layer whose weight is tied to another module.
    """
    if filter_fn is not None and not callable(filter_fn):
        raise SpecError(f"filter_fn={filter_fn!r}: expected a function of a module and its path, which returns a bool")
    owners = Counter(id(item) for module in model.modules() for item in module._parameters.values() if item is not None)
    heads = _heads(path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or isinstance(module.weight, LowBitTensor):
            continue
        tied = owners[id(module._parameters.get("weight"))] > 1
        if filter_fn is None:
            if tied or path in heads:
                continue
        elif not filter_fn(module, path):
            continue
        elif tied:
            raise UnsupportedError(
                f"{path}.weight is shared with another module, which would lose it; untie it first or leave it out"
            )
        found.append((path, module))
    return found


def _heads(paths: Iterable[str]) -> set[str]:
    """Return which Linear layers are output heads, by their names."""
    named = [path for path in paths if path.rpartition(".")[2] in _HEADS]
    ambiguous = [path for path in named if path.rpartition(".")[2] == _AMBIGUOUS]
    repeated = {path for path in ambiguous if any(part.isdigit() for part in path.split("."))}
    return set(named) - (repeated if len(repeated) > 1 else set())


def check_linear(path: str, layer: nn.Linear) -> None:
    """Raise a named error unless a layer's weight is a plain floating point matrix of finite values, here.

    Raises:
        UnsupportedError: If the weight is computed (a parametrization or weight norm) or a tensor subclass.
        ShapeError: If a lazy layer has not been initialised or the weight is not a matrix.
        DTypeError: If the weight is not fp16, bf16 or fp32.
        DeviceError: If it is on ``meta``.
        NonFiniteError: If it holds NaN or infinity.
    """
    name = f"{path}.weight" if path else "weight"
    w = layer._parameters.get("weight")
    if w is None:
        raise UnsupportedError(
            f"{name} is computed from other parameters (a parametrization); make it permanent first, with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if isinstance(w, UninitializedParameter):
        raise ShapeError(f"{name} has no shape yet; run the model once on an example before it is quantized")
    if type(w.data) is not Tensor:
        raise UnsupportedError(f"{name} is a {type(w.data).__name__}: expected an ordinary tensor")
    if w.dtype not in _DTYPES:
        raise DTypeError(f"{name} has dtype {w.dtype}: expected float16, bfloat16 or float32")
    if w.dim() != 2 or w.shape[1] == 0:
        raise ShapeError(f"{name} has shape {tuple(w.shape)}: expected (out_features, in_features)")
    if w.device.type == "meta":
        raise DeviceError(f"{name} is on the meta device and has no values; load the weights first")
    check_finite(w, name)


def why_none(model: nn.Module, filter_fn: FilterFn | None) -> str:
    """Say why :func:`select_linears` found nothing with these arguments."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        return f"{type(model).__name__} has no nn.Linear"
    dense = [path for path, module in linears.items() if not isinstance(module.weight, LowBitTensor)]
    if not dense:
        return f"all {len(linears)} are quantized already"
    some = _some(dense)
    if filter_fn is not None:
        return f"filter_fn took none of {len(dense)}, among them {some}"
    quantized = f"{len(linears) - len(dense)} are quantized already, and " if len(dense) < len(linears) else ""
    return f"{quantized}output heads and tied weights are left as they are, here {some}; a filter_fn takes untied heads"


def what_stayed(model: nn.Module) -> str | None:
    """Say which parameters of three or more dimensions are dense and a quarter of the weights or more, or return None.

    Those of torch.nn's own modules (convolutions) are what they are; others are often a Linear layer for each expert.
    """
    total = 0
    seen: set[int] = set()
    stacked: dict[str, int] = {}
    for path, module in model.named_modules():
        for name, value in module.named_parameters(path, recurse=False):
            if id(value) in seen or isinstance(value, UninitializedParameter) or not value.is_floating_point():
                continue
            seen.add(id(value))
            total += value.numel()
            if value.dim() > 2 and not isinstance(value, LowBitTensor) and not _is_of_torch(module):
                stacked[name] = value.numel()
    dense = sum(stacked.values())
    if dense == 0 or dense < _MUCH * total:
        return None
    some = _some(list(stacked))
    return f"{dense / total:.0%} of the weights stay dense, in parameters of 3 or more dimensions such as {some}"


def _some(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths[:3]))


def _is_of_torch(module: nn.Module) -> bool:
    """Return whether a module is one of torch.nn's, or derived from one; containers do not count."""
    classes = [cls.__module__ for cls in type(module).__mro__ if cls is not nn.Module]
    return any(name.startswith("torch.nn.") and name != "torch.nn.modules.container" for name in classes)


def _largest(w: Tensor) -> float:
    if w.numel() == 0:
        return 0.0
    low, high = torch.aminmax(w.detach())
    return max(-float(low), float(high))


def _relative_error(w: Tensor, quantized: LowBitTensor) -> float:
    exact = w.double()
    return float((quantized.dequantize(torch.float32).double() - exact).norm() / exact.norm())


@contextmanager
def named(path: str) -> Iterator[None]:
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
    return Progress(*columns, console=Console(stderr=True), disable=not shown, transient=progress is None)

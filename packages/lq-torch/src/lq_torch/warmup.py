"""warmup: compile, tune and unpack everything that a model's products need, before the first request."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from lq_formats import DTypeError, SpecError
from lq_kernels.prepare import compiling, onto_gpu, representatives, units
from torch import Tensor, nn

from lq_torch.arguments import check_module
from lq_torch.linear import Int4PackedLinear, Int8Linear
from lq_torch.problems import problem_of
from lq_torch.tensors import Int4DynamicTensor, LowBitTensor
from lq_torch.tensors.base import SCALE_DTYPES
from lq_torch.tensors.gated import GatedTensor, gated_linear


class _Product(NamedTuple):
    """A layer's product: ``key`` is equal where kernels are shared, ``run`` takes ``x: (M, in_features)``."""

    layer: Tensor | nn.Module
    path: str
    key: str
    run: Callable[[Tensor], Tensor]
    in_features: int
    dtype: torch.dtype
    device: torch.device


def warmup(
    model: nn.Module,
    batch_sizes: Iterable[int] = (1,),
    progress: Callable[[int, int, str], None] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> int:
    """Prepare a model for any number of tokens: afterwards no call waits for a compiler.

    Every CUDA kernel that the model's weights may ask for, at whatever number of tokens, is compiled and loaded, in parallel:
    with eight processors or more two Python processes without torch help, which end with it.
    Meanwhile each layer on a GPU is run once, for what kernels derive from its own weight. Then every distinct quantized
    Linear is run once at each of ``batch_sizes`` and, on a GPU, at one number of tokens for every other kernel that the
    registry would choose, without gradients: that compiles what is written in Triton, and lets gemlite tune, which takes it
    seconds for each shape and batch size. Layers of the same shape, dtype, format and device share the result.

    Args:
        model: A model that :func:`lq_torch.quantize_` changed, or with :class:`Int8Linear`, :class:`QuantizedLinear` or
            :class:`Int4PackedLinear` layers.
        batch_sizes: Numbers of tokens (rows of x), each at least 1; all that gemlite is to tune.
        progress: Called with how many are done, how many there are, and what that is: after each compilation, then before
            each run.
        dtype: Of the activations of layers that take any, those modules without a bias; None for the dtype of the
            model's first floating point parameter, or PyTorch's default where there is none.

    Returns:
        The number of products run.

    Raises:
        CompileError: If a kernel does not compile.
        SpecError: If a batch size is not a positive integer, or ``model`` no module.
        DTypeError: If ``dtype`` is not fp16, bf16 or fp32.
    """
    check_module(model, "warmup")
    given = list(batch_sizes) if isinstance(batch_sizes, Iterable) else None
    if given is None or any(type(size) is not int or size < 1 for size in given):
        shown = batch_sizes if given is None else given
        raise SpecError(f"batch_sizes={shown!r}: expected positive integers, for example (1, 16)")
    sizes = sorted(set(given))
    if dtype is not None and dtype not in SCALE_DTYPES:
        raise DTypeError(f"dtype={dtype}: expected float16, bfloat16 or float32")
    distinct: dict[str, _Product] = {}
    alike: list[tuple[str, _Product]] = []
    for product in _products(model, dtype or _model_dtype(model)):
        key = f"{product.key} {product.dtype} {product.device}"
        if distinct.setdefault(key, product) is not product:
            alike.append((key, product))
    problems = {key: problem_of(product.layer, 1, product.dtype) for key, product in distinct.items()}
    on_gpu = {key: problem for key, problem in problems.items() if problem is not None and problem.arch.kind != "cpu"}
    with contextlib.ExitStack() as stack, torch.no_grad():
        waits = []
        for device in {distinct[key].device for key in on_gpu}:
            mine = [(distinct[key], problem) for key, problem in on_gpu.items() if distinct[key].device == device]
            wanted = [unit for product, problem in mine for unit in units(problem, lowest=_lowest(product.layer))]
            waits.append(stack.enter_context(compiling(wanted, onto_gpu(device))))
        tokens = {key: sorted({*sizes, *representatives(problem)}) for key, problem in on_gpu.items()}
        # While kernels compile, every weight on a GPU is unpacked and what PyTorch needs for that loaded.
        first = [(distinct[key], each[0]) for key, each in tokens.items()]
        first += [(product, 1) for key, product in alike if key in on_gpu]
        rest = [(distinct[key], size) for key, each in tokens.items() for size in each[1:]]
        rest += [(product, size) for key, product in distinct.items() if key not in on_gpu for size in sizes]
        total = len(first) + len(rest)
        _run(first, 0, total, progress)
        for wait in waits:
            wait(progress)
        _run(rest, len(first), total, progress)
    for device in {product.device for product in distinct.values() if product.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return total


def _run(
    runs: list[tuple[_Product, int]], done: int, total: int, progress: Callable[[int, int, str], None] | None
) -> None:
    for at, (product, size) in enumerate(runs, done):
        if progress is not None:
            progress(at, total, f"{product.path} x {size}")
        product.run(torch.zeros(size, product.in_features, dtype=product.dtype, device=product.device))


def _lowest(layer: Tensor | nn.Module) -> bool:
    return layer.lowest if isinstance(layer, Int4DynamicTensor) else True


def _products(model: nn.Module, dtype: torch.dtype) -> Iterator[_Product]:
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, LowBitTensor) and weight.dim() == 2:
                run = partial(torch.nn.functional.linear, weight=weight)
                if isinstance(weight, GatedTensor):
                    run = partial(gated_linear, weight=weight)
                where = f"{path}.{name}" if path else name
                key = weight._stable_hash_for_caching()
                yield _Product(weight, where, key, run, weight.shape[1], weight.dtype, weight.device)
        if isinstance(module, Int8Linear | Int4PackedLinear):
            buffers = {name: b for name, b in module.named_buffers(recurse=False) if name != "bias"}
            # All int8 layers share kernels, whatever their class.
            kind = "int4" if isinstance(module, Int4PackedLinear) else "int8"
            key = f"{kind} {[(name, tuple(b.shape), b.dtype) for name, b in buffers.items()]}"
            device = next(iter(buffers.values())).device
            inputs = dtype if module.bias is None else module.bias.dtype
            yield _Product(
                module, path or type(module).__name__, key, module.forward, module.in_features, inputs, device
            )


def _model_dtype(model: nn.Module) -> torch.dtype:
    dtypes = (parameter.dtype for parameter in model.parameters())
    return next((dtype for dtype in dtypes if dtype in SCALE_DTYPES), torch.get_default_dtype())

"""warmup: run every distinct quantized product once, so that tuning and compilation happen before the first request."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from lq_formats import DTypeError, SpecError
from torch import Tensor, nn

from lq_torch.linear import Int4PackedLinear, Int8Linear
from lq_torch.tensors import LowBitTensor
from lq_torch.tensors.base import SCALE_DTYPES


class _Product(NamedTuple):
    """A layer's product: ``key`` is equal where kernels are shared, ``run`` takes ``x: (M, in_features)``."""

    path: str
    key: str
    run: Callable[[Tensor], Tensor]
    in_features: int
    dtype: torch.dtype
    device: torch.device


def warmup(
    model: nn.Module,
    batch_sizes: Iterable[int],
    progress: Callable[[int, int, str], None] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> int:
    """Run every distinct quantized Linear of a model once at each number of tokens, without gradients.

    gemlite tunes a shape on its first call, for seconds; lq's kernels are compiled on theirs. Layers of the same shape,
    dtype, format and device share the result, so one of each is run.

    Args:
        model: A model that :func:`lq_torch.quantize_` changed, or with :class:`Int8Linear`, :class:`QuantizedLinear` or
            :class:`Int4PackedLinear` layers.
        batch_sizes: Numbers of tokens (rows of x), each at least 1.
        progress: Called before each run with how many are done, how many there are, and what is next.
        dtype: Of the activations of layers that take any, those modules without a bias; None for the dtype of the
            model's first floating point parameter, or PyTorch's default where there is none.

    Returns:
        The number of products run.

    Raises:
        SpecError: If a batch size is not a positive integer.
        DTypeError: If ``dtype`` is not fp16, bf16 or fp32.
    """
    sizes = sorted(set(batch_sizes))
    if any(type(size) is not int or size < 1 for size in sizes):
        raise SpecError(f"batch_sizes={sizes}: expected positive integers")
    if dtype is not None and dtype not in SCALE_DTYPES:
        raise DTypeError(f"dtype={dtype}: expected float16, bfloat16 or float32")
    distinct: dict[str, _Product] = {}
    for product in _products(model, dtype or _model_dtype(model)):
        distinct.setdefault(f"{product.key} {product.dtype} {product.device}", product)
    total, done = len(distinct) * len(sizes), 0
    with torch.no_grad():
        for product in distinct.values():
            for size in sizes:
                if progress is not None:
                    progress(done, total, f"{product.path} x {size}")
                product.run(torch.zeros(size, product.in_features, dtype=product.dtype, device=product.device))
                done += 1
            if product.device.type == "cuda":
                torch.cuda.synchronize(product.device)
    return done


def _products(model: nn.Module, dtype: torch.dtype) -> Iterator[_Product]:
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, LowBitTensor) and weight.dim() == 2:
                run = partial(torch.nn.functional.linear, weight=weight)
                where = f"{path}.{name}" if path else name
                key = weight._stable_hash_for_caching()
                yield _Product(where, key, run, weight.shape[1], weight.dtype, weight.device)
        if isinstance(module, Int8Linear | Int4PackedLinear):
            buffers = {name: b for name, b in module.named_buffers(recurse=False) if name != "bias"}
            # All int8 layers share kernels, whatever their class.
            kind = "int4" if isinstance(module, Int4PackedLinear) else "int8"
            key = f"{kind} {[(name, tuple(b.shape), b.dtype) for name, b in buffers.items()]}"
            device = next(iter(buffers.values())).device
            inputs = dtype if module.bias is None else module.bias.dtype
            yield _Product(path or type(module).__name__, key, module.forward, module.in_features, inputs, device)


def _model_dtype(model: nn.Module) -> torch.dtype:
    dtypes = (parameter.dtype for parameter in model.parameters())
    return next((dtype for dtype in dtypes if dtype in SCALE_DTYPES), torch.get_default_dtype())

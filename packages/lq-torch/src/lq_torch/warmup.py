"""warmup: run every distinct quantized product once, so that tuning and compilation happen before the first request."""

from collections.abc import Callable, Iterable

import torch
from lq_formats import SpecError
from torch import nn

from lq_torch.tensors import LowBitTensor


def warmup(
    model: nn.Module, batch_sizes: Iterable[int], progress: Callable[[int, int, str], None] | None = None
) -> int:
    """Run every distinct quantized Linear of a model once at each number of tokens, without gradients.

    gemlite tunes a shape on its first call, for seconds; lq's kernels are compiled on theirs. Layers of the same shape,
    dtype, format and device share the result, so one of each is run.

    Args:
        model: A model that :func:`lq_torch.quantize_` changed.
        batch_sizes: Numbers of tokens (rows of x), each at least 1.
        progress: Called before each run with how many are done, how many there are, and what is next.

    Returns:
        The number of products run.

    Raises:
        SpecError: If a batch size is not a positive integer.
    """
    sizes = sorted(set(batch_sizes))
    if any(type(size) is not int or size < 1 for size in sizes):
        raise SpecError(f"batch_sizes={sizes}: expected positive integers")
    distinct: dict[str, tuple[str, LowBitTensor]] = {}
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, LowBitTensor) and weight.dim() == 2:
                key = f"{weight._stable_hash_for_caching()} {weight.device}"
                distinct.setdefault(key, (f"{path}.{name}" if path else name, weight))
    total, done = len(distinct) * len(sizes), 0
    with torch.no_grad():
        for path, weight in distinct.values():
            for size in sizes:
                if progress is not None:
                    progress(done, total, f"{path} x {size}")
                x = torch.zeros(size, weight.shape[1], dtype=weight.dtype, device=weight.device)
                torch.nn.functional.linear(x, weight)
                done += 1
            if weight.device.type == "cuda":
                torch.cuda.synchronize(weight.device)
    return done

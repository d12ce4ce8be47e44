"""Division by a constant that gives the same bits on every device."""

import torch
from torch import Tensor


def divide(x: Tensor, divisor: int) -> Tensor:
    """Return ``x / divisor``, correctly rounded.

    On CUDA, torch replaces division by a Python number with multiplication by its reciprocal, which is one unit in the
    last place off for one in several x: scales would depend on the device that quantized. Division by a tensor is
    exact there.
    """
    return x / torch.full_like(x, divisor)

"""Scales of ggml blocks by search: how much an error counts, and the best of several scales, block by block.

An ``importance`` ("imatrix" in llama.cpp) is the mean square of what enters each column of a weight: the error that a layer
makes is, but for correlations, the sum of squared weight errors times that. Without one every column counts the same.

A scale ``d`` for levels ``q`` minimises ``sum w (x - d q)^2`` where ``d = sum(w x q) / sum(w q^2)``, and is worth
``sum(w x q)^2 / sum(w q^2)``: each candidate rounds the block at some scale, and the levels that are worth most win.

Sums over a block are added in one fixed order (:func:`ordered_sum`), so the bytes are the same on every device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lq_formats.errors import NonFiniteError, ShapeError, SpecError
from lq_formats.ggml.blocks import reciprocal, signed_extreme
from lq_formats.validation import check_device, check_float

_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}  # weights at once: a search has a dozen temporaries of their size


def split_importance(importance: Tensor, x: Tensor, block_size: int) -> Tensor:
    """Return ``importance: (K,)`` as float32 blocks ``(K // block_size, block_size)`` that broadcast over ``x: (..., K)``.

    A block of which nothing counts is quantized as if all of it did.

    Raises:
        DTypeError, ShapeError, DeviceError: If it does not fit ``x``.
        NonFiniteError, SpecError: If it holds NaN, infinity or negative numbers.
    """
    check_float(importance, "importance")
    check_device(importance, "importance", x, "weight")
    if tuple(importance.shape) != (x.shape[-1],):
        raise ShapeError(f"importance has shape {tuple(importance.shape)}: expected ({x.shape[-1]},), one a column")
    values = importance.detach().to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("importance holds NaN or infinity")
    if bool((values < 0).any()):
        raise SpecError("importance holds negative numbers: it says how much an error counts")
    # Only ratios matter; squares of large activations must not overflow the sums.
    values = values / values.amax().clamp_min(torch.finfo(torch.float32).tiny)
    blocks = values.reshape(-1, block_size)
    return torch.where(blocks.amax(dim=-1, keepdim=True) > 0, blocks, 1.0)


def by_chunks(search: Callable[[Tensor, Tensor | None], Tensor], blocks: Tensor, importance: Tensor | None) -> Tensor:
    """Return ``search(blocks, importance)`` for ``blocks: (..., blocks, size)``, some rows at a time."""
    rows = blocks.reshape(-1, *blocks.shape[-2:]).contiguous()
    count = max(1, _CHUNK.get(blocks.device.type, _CHUNK["cpu"]) // max(blocks.shape[-1] * blocks.shape[-2], 1))
    found = torch.cat([search(chunk, importance) for chunk in torch.split(rows, count)])
    return found.reshape(*blocks.shape[:-1], found.shape[-1])


def ordered_sum(values: Tensor) -> Tensor:
    """Return the sum over the last dimension, a power of two, halves added to halves: ``(..., 1)``.

    torch's own reductions add in an order of their device, and a scale found by least squares would show it.
    """
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values


def counted(blocks: Tensor, importance: Tensor | None) -> Tensor:
    """Return ``blocks`` with 0 where an error does not count: these must not set a scale."""
    return blocks if importance is None else torch.where(importance > 0, blocks, 0.0)


def finite_reciprocal(x: Tensor) -> Tensor:
    """Return ``1 / x``, and 0 where that is not finite."""
    inverse = reciprocal(x)
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


def search_scale(
    blocks: Tensor, importance: Tensor | None, shares: Sequence[float], to_levels: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the float32 scale ``(..., 1)`` of each block whose levels leave the least squared error.

    Args:
        blocks: ``(..., size) float32``.
        importance: What squared errors count, broadcastable to ``blocks``; None for the same each.
        shares: Each is the level that a candidate gives to the block's (signed) extreme.
        to_levels: Rounds ``x / d`` to levels, clamped.
    """
    extreme = signed_extreme(counted(blocks, importance))
    # In units of the extreme squares neither overflow nor vanish. Only what does not count is beyond 1.
    unit = (blocks * finite_reciprocal(extreme)).clamp_(-2, 2)
    weighted = unit if importance is None else unit * importance
    best_d, best_worth = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for share in shares:
        levels = to_levels(unit * share)
        along = ordered_sum(weighted * levels)
        squares = ordered_sum(levels * levels if importance is None else levels * levels * importance)
        d = along * reciprocal(squares)
        worth = along * d
        better = worth > best_worth
        best_d, best_worth = torch.where(better, d, best_d), torch.where(better, worth, best_worth)
    return best_d * extreme

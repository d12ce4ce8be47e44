"""Quantizing to Q4_K and Q5_K: a scale and a minimum for each group by least squares, both in 6 bits. Layout: :mod:`.kquants`.

A group of 32 weights is ``x = s q - m`` with codes 0..15 (0..31) and ``m >= 0``. For each of several steps around its range,
codes are rounded, and the ``s`` and ``m`` that fit them best are kept where they leave the least error. The 256 weights of a
block share ``d`` and ``dmin``, of which ``s`` and ``m`` become the multiples 0..63: a few of each are tried, refitted to the
codes.

An error counts as ``importance`` says, or without one as its weight's magnitude plus the group's root mean square, as in
ggml's search without data. Bytes differ from llama.cpp's: its search visits other steps, and the order of its sums is its own.
"""

from functools import partial
from itertools import product

import torch
from torch import Tensor

from lq_formats.ggml.blocks import half_bytes, pack_nibbles, reciprocal, split_blocks, stored_half
from lq_formats.ggml.importance import by_chunks, counted, finite_reciprocal, ordered_sum, split_importance
from lq_formats.ggml.kquants import SUPER_BLOCK, pack_scale_min

_GROUP = 32
# Codes that a group's range is cut into, by the largest code.
_STEPS = {15: tuple(11 + 0.25 * step for step in range(25)), 31: tuple(27 + 0.25 * step for step in range(25))}
_LARGEST = (63, 60, 57)  # the 6-bit code of the largest scale (minimum) of a block


def quantize_q4_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """Quantize ``(..., K)`` floats to Q4_K blocks ``(..., K // 256, 144) uint8``.

    Args:
        x: Floating point weights, K a multiple of 256.
        importance: ``(K,)``, how much an error in a column counts; see :mod:`lq_formats.ggml.importance`.

    Raises:
        DTypeError, ShapeError, NonFiniteError: If ``x`` is not finite floats with K a multiple of 256.
        SpecError: If ``importance`` holds negative numbers.
    """
    return _quantize(x, importance, "quantize_q4_k", 15)


def quantize_q5_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """Quantize to Q5_K blocks ``(..., K // 256, 176) uint8``; arguments and errors as :func:`quantize_q4_k`."""
    return _quantize(x, importance, "quantize_q5_k", 31)


def _quantize(x: Tensor, importance: Tensor | None, name: str, max_code: int) -> Tensor:
    blocks = split_blocks(x, name, block_size=SUPER_BLOCK)
    counts = None if importance is None else split_importance(importance, x, SUPER_BLOCK)
    return by_chunks(partial(_search, max_code=max_code), blocks, counts)


def _search(blocks: Tensor, importance: Tensor | None, max_code: int) -> Tensor:
    # In units of the block's largest weight: squares neither overflow nor vanish.
    unit = counted(blocks, importance).abs().amax(dim=-1, keepdim=True)
    groups = _groups((blocks * finite_reciprocal(unit)).clamp_(-2, 2))  # only what does not count is beyond 1
    if importance is None:
        weight = (ordered_sum(groups * groups) / torch.full_like(groups[..., :1], _GROUP)).sqrt() + groups.abs()
    else:
        weight = _groups(importance).expand_as(groups)
    scale, low = _fit_groups(counted(groups, weight), weight, max_code)
    best: tuple[Tensor, ...] | None = None
    for largest in product(_LARGEST, _LARGEST):
        found = _fit_block(groups, weight, unit.unsqueeze(-1), scale, low, largest, max_code)
        best = found if best is None else _better(best, found)
    assert best is not None
    # Weights far below the least fp16 number are nearer to 0 than to any other offset.
    none = ordered_sum(_error(groups, weight, torch.zeros_like(groups)).transpose(-1, -2))
    _, codes, d, dmin, s6, m6 = _better(best, (none, *map(torch.zeros_like, best[1:])))
    codes = codes.to(torch.uint8)
    packed = pack_scale_min(s6.squeeze(-1).to(torch.uint8), m6.squeeze(-1).to(torch.uint8))
    parts = [half_bytes(d.flatten(-2)), half_bytes(dmin.flatten(-2)), packed]
    if max_code > 15:  # byte j, bit b: the fifth bit of weight 32 b + j
        places = torch.arange(8, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
        parts.append((codes >> 4 << places).sum(dim=-2, dtype=torch.uint8))
    nibbles = pack_nibbles((codes & 15).reshape(*codes.shape[:-2], 4, 64)).flatten(-2)
    return torch.cat((*parts, nibbles), dim=-1)


def _groups(values: Tensor) -> Tensor:
    """Return ``(..., 256)`` as ``(..., 8, 32)``."""
    return values.reshape(*values.shape[:-1], SUPER_BLOCK // _GROUP, _GROUP)


def _fit_groups(groups: Tensor, weight: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """Return ``s`` and ``m``, neither negative, of each group: ``(..., groups, 1)``."""
    least = groups.amin(dim=-1, keepdim=True).clamp_max(0)
    inverse = finite_reciprocal(groups.amax(dim=-1, keepdim=True) - least)
    weighted = weight * groups
    sum_w, sum_x = ordered_sum(weight), ordered_sum(weighted)
    best: tuple[Tensor, ...] = (torch.full_like(least, torch.inf), torch.zeros_like(least), torch.zeros_like(least))
    for steps in _STEPS[max_code]:
        codes = ((groups - least) * (inverse * steps)).round_().clamp_(0, max_code)
        along = weight * codes
        sum_q, sum_qq, sum_qx = ordered_sum(along), ordered_sum(along * codes), ordered_sum(weighted * codes)
        determinant = finite_reciprocal(sum_w * sum_qq - sum_q * sum_q)
        low = (sum_q * sum_qx - sum_qq * sum_x) * determinant
        # m < 0 cannot be stored, and equal codes have no slope: the best s with m = 0.
        alone = (low < 0) | (determinant == 0)
        scale = torch.where(alone, sum_qx * reciprocal(sum_qq), (sum_w * sum_qx - sum_q * sum_x) * determinant)
        low = torch.where(alone, 0.0, low)
        scale = scale.clamp_min(0)
        best = _better(best, (_error(groups, weight, codes * scale - low), scale, low))
    return best[1], best[2]


def _fit_block(
    groups: Tensor, weight: Tensor, unit: Tensor, scale: Tensor, low: Tensor, largest: tuple[int, int], max_code: int
) -> tuple[Tensor, ...]:
    """Return the error, codes and what is stored of each block, with ``d`` and ``dmin`` refitted where that is better.

    Shapes: error, ``d``, ``dmin`` ``(..., 1, 1)``; 6-bit codes ``(..., groups, 1)``; codes ``(..., groups, 32)``.
    """
    per_unit = finite_reciprocal(unit)
    d, dmin = (_stored(v.amax(dim=-2, keepdim=True) / n * unit) for v, n in zip((scale, low), largest, strict=True))
    s6, m6 = (_codes(v * finite_reciprocal(f * per_unit), 63) for v, f in ((scale, d), (low, dmin)))

    def offer(d: Tensor, dmin: Tensor) -> tuple[Tensor, ...]:
        slope, offset = d * per_unit * s6, dmin * per_unit * m6
        codes = _codes((groups + offset) * finite_reciprocal(slope), max_code)
        error = ordered_sum(_error(groups, weight, codes * slope - offset).transpose(-1, -2))
        return error, codes, d, dmin, s6, m6

    first = offer(d, dmin)
    along, against = (s6 * first[1]).flatten(-2), m6.expand_as(groups).flatten(-2)
    x, w = groups.flatten(-2), weight.flatten(-2)
    aa, ab, bb = (ordered_sum(w * u * v) for u, v in ((along, along), (along, against), (against, against)))
    ax, bx = ordered_sum(w * along * x), ordered_sum(w * against * x)
    determinant = finite_reciprocal(ab * ab - aa * bb)
    refitted = _stored(((bx * ab - ax * bb) * determinant).unsqueeze(-1) * unit)
    refitted_min = _stored(((bx * aa - ax * ab) * determinant).unsqueeze(-1) * unit)
    usable = (determinant.unsqueeze(-1) != 0) & (refitted > 0) & (refitted_min >= 0)
    return _better(first, offer(torch.where(usable, refitted, d), torch.where(usable, refitted_min, dmin)))


def _error(groups: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """Return the weighted squared error of each group ``(..., groups, 1)``."""
    error = values - groups
    return ordered_sum(error * error * weight)


def _better(best: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return, block by block, whichever has the smaller first tensor (the error); the first of equals."""
    better = found[0] < best[0]
    return tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))


def _stored(factor: Tensor) -> Tensor:
    """Round as it is stored; what is negative, which is not, to 0 where it is small."""
    return torch.where(factor < 0, factor.to(torch.float16).to(torch.float32), stored_half(factor))


def _codes(x: Tensor, max_code: int) -> Tensor:
    return x.round().nan_to_num_(0.0, max_code, 0.0).clamp_(0, max_code)

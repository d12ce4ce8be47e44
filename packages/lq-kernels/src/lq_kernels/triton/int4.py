"""W4A16 in Triton: GEMV, split-K and GEMM over the canonical packing, and the dequantizer.

The weight is the left operand (out features by in features) and tokens are the columns, so a small batch wastes no tensor
core rows and dequantized weights go to the tensor cores from registers.

Accuracy. Where a K block lies inside one group (groups divisible by 32, or one scale a row), the tensor cores multiply
exact integers ``u - zero`` and the fp32 partial sum is scaled: no weight is rounded. For other groups the weight
``(u - zero) * scale`` is rounded once to x's dtype. Sums are fp32 (float32 activations multiply in IEEE fp32).

Determinism: every kernel adds in a fixed order; split-K partial sums go through an fp32 workspace and are added in the
order of K. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lq_kernels.problem import Arch
from lq_kernels.triton.config import INVARIANT_TOKENS, block_k, dot_config, gemv_config, shares_scale
from lq_kernels.triton.launch import in_chunks, reduce_split, same_device, triton_dtype
from lq_kernels.triton.unpack import int4_values


@triton.jit
def _int4_tile(
    qweight, scale, zero, rows, word, n, k, words, groups, group_size,
    dtype: tl.constexpr, shared: tl.constexpr, has_zero: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Load and unpack BN x BK weights of ``dtype``; scaled unless the block shares one scale."""
    columns = word + tl.arange(0, BK // 8)
    row_ok = rows < n
    packed = tl.load(
        qweight + rows.to(tl.int64)[:, None] * words + columns[None, :],
        mask=row_ok[:, None] & (columns < words)[None, :],
        other=0,
    )
    values = tl.reshape(int4_values(packed), (BN, BK))
    if not shared:
        ks = word * 8 + tl.arange(0, BK)
        at = rows.to(tl.int64)[:, None] * groups + (ks // group_size)[None, :]
        mask = row_ok[:, None] & (ks < k)[None, :]
        if has_zero:
            values -= tl.load(zero + at, mask=mask, other=8).to(tl.float32) - 8.0
        values *= tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
    return values.to(dtype)


@triton.jit(do_not_specialize=["m"])
def _dot_kernel(
    x, qweight, scale, zero, out, m, n, k, words, groups, group_size, steps_per_split,
    dtype: tl.constexpr, shared: tl.constexpr, has_zero: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One BN x BM tile of ``w @ x.T`` over a share of K. ``out`` is y, or the workspace (SPLIT, m, n)."""
    pid_n, pid_m, pid_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = pid_n * BN + tl.arange(0, BN)
    tokens = pid_m * BM + tl.arange(0, BM)
    row_ok, token_ok = rows < n, tokens < m
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    first = pid_k * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(k, BK))
    for step in range(first, last):
        ks = step * BK + tl.arange(0, BK)
        a = tl.load(
            x + tokens.to(tl.int64)[:, None] * k + ks[None, :], mask=token_ok[:, None] & (ks < k)[None, :], other=0.0
        )
        w = _int4_tile(
            qweight, scale, zero, rows, step * (BK // 8), n, k, words, groups, group_size,
            dtype, shared, has_zero, BN, BK,
        )  # fmt: skip
        part = tl.dot(w, tl.trans(a), input_precision="ieee")
        if shared:
            group = (step * BK) // group_size
            s = tl.load(scale + rows.to(tl.int64) * groups + group, mask=row_ok, other=0.0).to(tl.float32)
            if has_zero:
                z = tl.load(zero + rows.to(tl.int64) * groups + group, mask=row_ok, other=8).to(tl.float32) - 8.0
                part -= z[:, None] * tl.sum(a.to(tl.float32), axis=1)[None, :]
            acc += part * s[:, None]
        else:
            acc += part
    at = (pid_k.to(tl.int64) * m + tokens.to(tl.int64))[:, None] * n + rows[None, :]
    tl.store(out + at, tl.trans(acc).to(out.dtype.element_ty), mask=token_ok[:, None] & row_ok[None, :])


@triton.jit(do_not_specialize=["m"])
def _gemv_kernel(
    x, qweight, scale, zero, out, m, n, k, words, groups, group_size,
    has_zero: tl.constexpr, per_word: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BN rows of ``w @ x[token]`` with fp32 multiply-adds; no tensor cores."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1).to(tl.int64)
    row_ok = rows < n
    lanes = tl.arange(0, 8)
    acc = tl.zeros((BN, BW, 8), dtype=tl.float32)
    for word in range(0, words, BW):
        columns = word + tl.arange(0, BW)
        mask = row_ok[:, None] & (columns < words)[None, :]
        packed = tl.load(qweight + rows.to(tl.int64)[:, None] * words + columns[None, :], mask=mask, other=0)
        values = int4_values(packed)
        ks = columns[:, None] * 8 + lanes[None, :]
        a = tl.load(x + token * k + ks, mask=ks < k, other=0.0).to(tl.float32)
        if per_word:
            at = rows.to(tl.int64)[:, None] * groups + (columns * 8 // group_size)[None, :]
            s = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)[:, :, None]
            if has_zero:
                values -= (tl.load(zero + at, mask=mask, other=8).to(tl.float32) - 8.0)[:, :, None]
        else:
            at = rows.to(tl.int64)[:, None, None] * groups + (ks // group_size)[None, :, :]
            each = row_ok[:, None, None] & (ks < k)[None, :, :]
            s = tl.load(scale + at, mask=each, other=0.0).to(tl.float32)
            if has_zero:
                values -= tl.load(zero + at, mask=each, other=8).to(tl.float32) - 8.0
        acc += values * s * a[None, :, :]
    y = tl.sum(tl.sum(acc, axis=2), axis=1)
    tl.store(out + token * n + rows, y.to(out.dtype.element_ty), mask=row_ok)


@triton.jit
def _dequantize_kernel(
    qweight, scale, zero, out, n, k, words, groups, group_size,
    has_zero: tl.constexpr, per_word: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """A BN x 8 BW tile of the dense weight, rounded once from fp32."""
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    columns = tl.program_id(0) * BW + tl.arange(0, BW)
    mask = (rows < n)[:, None] & (columns < words)[None, :]
    packed = tl.load(qweight + rows.to(tl.int64)[:, None] * words + columns[None, :], mask=mask, other=0)
    values = int4_values(packed)
    if per_word:
        at = rows.to(tl.int64)[:, None] * groups + (columns * 8 // group_size)[None, :]
        s = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)[:, :, None]
        if has_zero:
            values -= (tl.load(zero + at, mask=mask, other=8).to(tl.float32) - 8.0)[:, :, None]
    else:
        each = columns[:, None] * 8 + tl.arange(0, 8)[None, :]
        at3 = rows.to(tl.int64)[:, None, None] * groups + (each // group_size)[None, :, :]
        mask3 = (rows < n)[:, None, None] & (each < k)[None, :, :]
        s = tl.load(scale + at3, mask=mask3, other=0.0).to(tl.float32)
        if has_zero:
            values -= tl.load(zero + at3, mask=mask3, other=8).to(tl.float32) - 8.0
    w = tl.reshape(values * s, (BN, BW * 8)).to(out.dtype.element_ty)
    ks = tl.program_id(0) * (BW * 8) + tl.arange(0, BW * 8)
    tl.store(out + rows.to(tl.int64)[:, None] * k + ks[None, :], w, mask=(rows < n)[:, None] & (ks < k)[None, :])


def gemv(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """Return ``x (M, K) @ w.T`` without tensor cores: best for one or two tokens, right for any number."""
    m, k, n, words, groups = _sizes(x, qweight, scale)
    config = gemv_config(n, k, Arch.of(x.device).sm_count)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    with same_device(x):
        _gemv_kernel[(triton.cdiv(n, config.block_n), m)](
            x.contiguous(), qweight, scale, scale if zero is None else zero, out, m, n, k, words, groups, group_size,
            zero is not None, group_size % 8 == 0 or group_size == k, config.block_n, config.block_k // 8,
            num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def splitk(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """Return ``x (M, K) @ w.T`` with K shared among programs: best for a few tokens, right for any number."""
    return _dot(x, qweight, scale, zero, group_size, split=True)


def gemm(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """Return ``x (M, K) @ w.T``, one program a tile: for many tokens, right for any number."""
    return _dot(x, qweight, scale, zero, group_size, split=False)


def invariant(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """Return ``x (M, K) @ w.T`` by one split-K configuration for any number of tokens: no row depends on the others."""
    return in_chunks(x, lambda part: _dot(part, qweight, scale, zero, group_size, True, INVARIANT_TOKENS))


def _dot(
    x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, split: bool, tokens: int = 0
) -> Tensor:
    m, k, n, words, groups = _sizes(x, qweight, scale)
    config = dot_config(tokens or m, n, k, block_k(group_size, k), x.element_size(), Arch.of(x.device).sm_count, split)
    step = config.block_k
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    parts = out if config.split_k == 1 else torch.empty((config.split_k, m, n), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), config.split_k)
    with same_device(x):
        _dot_kernel[grid](
            x.contiguous(), qweight, scale, scale if zero is None else zero, parts, m, n, k, words, groups, group_size,
            triton.cdiv(triton.cdiv(k, step), config.split_k),
            triton_dtype(x.dtype), shares_scale(group_size, k), zero is not None,
            config.block_m, config.block_n, step, config.split_k,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        if parts is not out:
            reduce_split(parts, out)
    return out


def dequantize_int4(
    qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Return the dense ``(N, in_features)`` weight in ``dtype``, rounded once from fp32."""
    n, words = qweight.shape
    out = torch.empty((n, in_features), dtype=dtype, device=qweight.device)
    if n == 0:
        return out
    with same_device(qweight):
        _dequantize_kernel[(triton.cdiv(words, 32), triton.cdiv(n, 16))](
            qweight.contiguous(), scale.contiguous(), scale if zero is None else zero.contiguous(), out,
            n, in_features, words, scale.shape[1], group_size,
            zero is not None, group_size % 8 == 0 or group_size == in_features, 16, 32, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _sizes(x: Tensor, qweight: Tensor, scale: Tensor) -> tuple[int, int, int, int, int]:
    m, k = x.shape
    n, words = qweight.shape
    return m, k, n, words, scale.shape[1]

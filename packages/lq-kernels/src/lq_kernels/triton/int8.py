"""W8A16 in Triton: GEMV, split-K and GEMM over int8 weights with one scale a row or one in all, and the dequantizer.

Accuracy: the tensor cores multiply exact integers, sums are fp32, and the scale multiplies the finished sum once.
Determinism and operand order as in :mod:`lq_kernels.triton.int4`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lq_kernels.problem import Arch
from lq_kernels.triton.config import INVARIANT_TOKENS, dot_config, gemv_config
from lq_kernels.triton.launch import in_chunks, reduce_split, same_device, triton_dtype
from lq_kernels.triton.unpack import int8_values

_STEP = 64


@triton.jit
def _row_scale(scale, rows, row_ok, per_row: tl.constexpr):
    if per_row:
        s = tl.load(scale + rows, mask=row_ok, other=0.0).to(tl.float32)
    else:
        s = tl.load(scale + tl.zeros_like(rows)).to(tl.float32)
    return s


@triton.jit(do_not_specialize=["m"])
def _dot_kernel(
    x, qweight, scale, out, m, n, k, steps_per_split,
    dtype: tl.constexpr, per_row: tl.constexpr,
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
        q = tl.load(
            qweight + rows.to(tl.int64)[:, None] * k + ks[None, :], mask=row_ok[:, None] & (ks < k)[None, :], other=0
        )
        acc += tl.dot(int8_values(q).to(dtype), tl.trans(a), input_precision="ieee")
    acc *= _row_scale(scale, rows, row_ok, per_row)[:, None]
    at = (pid_k.to(tl.int64) * m + tokens.to(tl.int64))[:, None] * n + rows[None, :]
    tl.store(out + at, tl.trans(acc).to(out.dtype.element_ty), mask=token_ok[:, None] & row_ok[None, :])


@triton.jit(do_not_specialize=["m"])
def _gemv_kernel(
    x, qweight, scale, out, m, n, k, per_row: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """BN rows of ``w @ x[token]`` with fp32 multiply-adds; no tensor cores."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1).to(tl.int64)
    row_ok = rows < n
    acc = tl.zeros((BN, BK), dtype=tl.float32)
    for start in range(0, k, BK):
        ks = start + tl.arange(0, BK)
        q = tl.load(
            qweight + rows.to(tl.int64)[:, None] * k + ks[None, :], mask=row_ok[:, None] & (ks < k)[None, :], other=0
        )
        a = tl.load(x + token * k + ks, mask=ks < k, other=0.0).to(tl.float32)
        acc += int8_values(q) * a[None, :]
    y = tl.sum(acc, axis=1) * _row_scale(scale, rows, row_ok, per_row)
    tl.store(out + token * n + rows, y.to(out.dtype.element_ty), mask=row_ok)


@triton.jit
def _dequantize_kernel(qweight, scale, out, n, k, per_row: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A BN x BK tile of the dense weight, rounded once from fp32."""
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    ks = tl.program_id(0) * BK + tl.arange(0, BK)
    row_ok = rows < n
    mask = row_ok[:, None] & (ks < k)[None, :]
    at = rows.to(tl.int64)[:, None] * k + ks[None, :]
    values = int8_values(tl.load(qweight + at, mask=mask, other=0))
    values *= _row_scale(scale, rows, row_ok, per_row)[:, None]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)


def gemv(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """Return ``x (M, K) @ (q * scale).T`` without tensor cores: best for one or two tokens, right for any number."""
    m, k = x.shape
    n = qweight.shape[0]
    config = gemv_config(n, k, Arch.of(x.device).sm_count)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    with same_device(x):
        _gemv_kernel[(triton.cdiv(n, config.block_n), m)](
            x.contiguous(), qweight.contiguous(), scale, out, m, n, k, scale.dim() == 1, config.block_n, config.block_k,
            num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def splitk(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """Return ``x (M, K) @ (q * scale).T`` with K shared among programs: best for a few tokens."""
    return _dot(x, qweight, scale, split=True)


def gemm(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """Return ``x (M, K) @ (q * scale).T``, one program a tile: for many tokens."""
    return _dot(x, qweight, scale, split=False)


def invariant(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """Return ``x (M, K) @ (q * scale).T`` by one configuration for any number of tokens: no row depends on the others."""
    return in_chunks(x, lambda part: _dot(part, qweight, scale, True, INVARIANT_TOKENS))


def _dot(x: Tensor, qweight: Tensor, scale: Tensor, split: bool, tokens: int = 0) -> Tensor:
    m, k = x.shape
    n = qweight.shape[0]
    config = dot_config(tokens or m, n, k, _STEP, x.element_size(), Arch.of(x.device).sm_count, split)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    parts = out if config.split_k == 1 else torch.empty((config.split_k, m, n), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), config.split_k)
    with same_device(x):
        _dot_kernel[grid](
            x.contiguous(), qweight.contiguous(), scale, parts, m, n, k,
            triton.cdiv(triton.cdiv(k, config.block_k), config.split_k),
            triton_dtype(x.dtype), scale.dim() == 1,
            config.block_m, config.block_n, config.block_k, config.split_k,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        if parts is not out:
            reduce_split(parts, out)
    return out


def dequantize_int8(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the dense ``(N, K)`` weight in ``dtype``, rounded once from fp32."""
    n, k = qweight.shape
    out = torch.empty((n, k), dtype=dtype, device=qweight.device)
    if n == 0:
        return out
    with same_device(qweight):
        _dequantize_kernel[(triton.cdiv(k, 256), triton.cdiv(n, 16))](
            qweight.contiguous(), scale, out, n, k, scale.dim() == 1, 16, 256, num_warps=4, enable_fp_fusion=True
        )
    return out

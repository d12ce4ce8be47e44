"""Choosing codes column by column, up to 128 columns in one launch: the inner loops of GPTQ and of descent on codes.

A column of a weight depends on the columns before it, a row on no other. A program therefore holds all columns of a few rows in
registers and does to them what a loop in torch does in memory, in the same order: true divisions, rounding half to even, one
multiply-add for every column behind.

All tensors are float32 with columns of the weight as rows, ``(columns, N)`` and contiguous. Nothing is specialized on sizes or
addresses: a GPU compiles each kernel once.

Accuracy: results are torch's bit for bit where every product is exact. Elsewhere one of the two may fuse a product with a sum
where the other rounds in between; a code differs only where that decides a tie.

Determinism: no atomics, no sums between programs. A column is taken out of registers by a sum over zeros and itself, which is
exact. One warp a program: what is overwritten in place was loaded before by an earlier instruction of the same warp.
"""

import triton
import triton.language as tl
from torch import Tensor

from lq_kernels.triton.constraints import COLUMNS
from lq_kernels.triton.launch import same_device

_ROWS = 8  # of a program; a warp then holds 32 columns of one row in each thread


@triton.jit
def _round(x):
    """Round half to even, exactly, where ``|x| < 2**22``: the sum has no bits below the units."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _tile(rows, columns, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Return a program's columns and rows, the rows' offsets and which of them there are."""
    column = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = column[:, None] * rows.to(tl.int64) + row[None, :]
    return column, row, at, (column < columns)[:, None] & (row < rows)[None, :]


@triton.jit
def _ahead(corner, i, column, columns):
    """Return row ``i`` of the corner behind its diagonal, zeros elsewhere."""
    return tl.load(corner + i * columns + column, mask=(column > i) & (column < columns), other=0.0)


@triton.jit(do_not_specialize=[0, 1, 2, 3, 4, 5, 6, 7, 8])
def _fix_kernel(
    free, codes, scales, zeros, groups, factor, rows, columns, max_code, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column, row, at, mask = _tile(rows, columns, BLOCK, ROWS)
    present = row < rows
    state = tl.load(free + at, mask=mask, other=0.0)
    for i in range(columns):
        group = tl.load(groups + i) * rows  # int64
        s = tl.load(scales + group + row, mask=present, other=1.0)
        z = tl.load(zeros + group + row, mask=present, other=0.0)
        x = tl.sum(tl.where((column == i)[:, None], state, 0.0), axis=0)
        code = _round(tl.minimum(tl.maximum(z + tl.div_rn(x, s), 0.0), max_code))
        moved = tl.div_rn(x - (code - z) * s, tl.load(factor + i * (columns + 1)) + tl.zeros_like(x))
        state -= _ahead(factor, i, column, columns)[:, None] * moved[None, :]
        to = i * rows.to(tl.int64) + row
        tl.store(codes + to, code, mask=present)
        tl.store(free + to, moved, mask=present)


@triton.jit(do_not_specialize=[0, 1, 2, 3, 4, 5, 6])
def _improve_kernel(
    gradient, codes, scale, hessian, rows, columns, max_code, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column, row, at, mask = _tile(rows, columns, BLOCK, ROWS)
    present = row < rows
    state = tl.load(gradient + at, mask=mask, other=0.0)
    s = tl.load(scale + row, mask=present, other=1.0)
    for i in range(columns):
        to = i * rows.to(tl.int64) + row
        code = tl.load(codes + to, mask=present, other=0.0)
        x = tl.sum(tl.where((column == i)[:, None], state, 0.0), axis=0)
        step = tl.div_rn(tl.full([1], -1.0, tl.float32), tl.load(hessian + i * (columns + 1)))
        best = _round(tl.minimum(tl.maximum(code + step * tl.div_rn(x, s), 0.0), max_code))
        change = (best - code) * s
        state += _ahead(hessian, i, column, columns)[:, None] * change[None, :]
        tl.store(codes + to, best, mask=present)
        tl.store(gradient + to, change, mask=present)


def fix_columns(
    free: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, factor: Tensor, max_code: int
) -> None:
    """Round ``free`` column by column and move each error on to the columns behind.

    Args:
        free: ``(columns, N)``, at most ``COLUMNS`` of them; becomes the errors over the factor's diagonal, what all later
            columns must make up for.
        codes: ``(columns, N)``, written.
        scales: ``(G, N)``.
        zeros: ``(G, N)``.
        groups: ``(columns,) int64``, the group of each column.
        factor: ``(columns, columns)``, upper triangular.
        max_code: The largest code.
    """
    columns, rows = free.shape
    with same_device(free):
        _fix_kernel[(triton.cdiv(rows, _ROWS),)](
            free, codes, scales, zeros, groups, factor.contiguous(), rows, columns, float(max_code), COLUMNS, _ROWS,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip


def improve_columns(gradient: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor, max_code: int) -> None:
    """Make each code in turn the best one for all others.

    Args:
        gradient: ``(columns, N)``, at most ``COLUMNS`` of them: half the slope of the output error; becomes the change of the
            values.
        codes: ``(columns, N)``, changed in place.
        scale: ``(N,)``.
        hessian: ``(columns, columns)``, symmetric.
        max_code: The largest code.
    """
    columns, rows = gradient.shape
    with same_device(gradient):
        _improve_kernel[(triton.cdiv(rows, _ROWS),)](
            gradient, codes, scale, hessian.contiguous(), rows, columns, float(max_code), COLUMNS, _ROWS,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip

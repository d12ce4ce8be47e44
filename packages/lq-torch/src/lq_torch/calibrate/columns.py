"""The loops over columns in which codes are chosen: in torch, and on GPUs one launch of Triton for up to 128 columns."""

import torch
from lq_kernels.triton.constraints import why_not_columns
from torch import Tensor


def fix_columns(
    free: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, factor: Tensor, max_code: int
) -> None:
    """Round ``free`` column by column and move each error on to the columns behind.

    Arguments are those of :func:`lq_kernels.triton.columns.fix_columns`, of any device and floating dtype.
    """
    if why_not_columns(free.device, free.dtype) is None:
        from lq_kernels.triton import columns as triton_columns

        triton_columns.fix_columns(free, codes, scales, zeros, groups, factor, max_code)
        return
    diagonal = factor.diagonal().tolist()  # numbers for kernels' arguments; one wait for the device, not one a column
    for i, (group, d) in enumerate(zip(groups.tolist(), diagonal, strict=True)):
        s, z = scales[group], zeros[group]
        code = torch.addcdiv(z, free[i], s, out=codes[i]).round_().clamp_(0, max_code)
        free[i].addcmul_(code - z, s, value=-1).div_(d)
        free[i + 1 :].addr_(factor[i, i + 1 :], free[i], alpha=-1)


def improve_columns(gradient: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor, max_code: int) -> None:
    """Make each code in turn the best one for all others.

    Arguments are those of :func:`lq_kernels.triton.columns.improve_columns`, of any device and floating dtype.
    """
    if why_not_columns(gradient.device, gradient.dtype) is None:
        from lq_kernels.triton import columns as triton_columns

        triton_columns.improve_columns(gradient, codes, scale, hessian, max_code)
        return
    for i, curvature in enumerate(hessian.diagonal().tolist()):
        best = torch.addcdiv(codes[i], gradient[i], scale, value=-1 / curvature).round_().clamp_(0, max_code)
        torch.sub(best, codes[i], out=gradient[i]).mul_(scale)
        gradient[i + 1 :].addr_(hessian[i, i + 1 :], gradient[i])
        codes[i] = best

"""What the Triton launchers share: dtypes, the device guard, and the ordered reduction of split-K."""

import contextlib
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lq_kernels.triton.config import INVARIANT_CHUNK

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of a torch dtype."""
    return _DTYPES[dtype]


def same_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Make the tensor's GPU current while a kernel is launched (Triton launches on the current one)."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[None] = torch.cuda.device(tensor.device)
    return guard


def in_chunks(x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``multiply(x)``, some tokens at a time, contiguous and at multiples of 16 bytes.

    For the batch-invariant mode: at other addresses Triton compiles another kernel.
    """
    parts = x.split(INVARIANT_CHUNK) if x.shape[0] > INVARIANT_CHUNK else (x,)
    found = [multiply(part if part.data_ptr() % 16 == 0 else part.clone()) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


@triton.jit
def _reduce_kernel(parts, out, count, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Add SPLIT partial results in the order of K."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.load(parts + at, mask=mask, other=0.0)
    for part in range(1, SPLIT):
        total += tl.load(parts + part * count.to(tl.int64) + at, mask=mask, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def reduce_split(parts: Tensor, out: Tensor) -> None:
    """Add ``parts: (split, M, N) float32`` into ``out: (M, N)``, in order."""
    count = out.numel()
    _reduce_kernel[(triton.cdiv(count, 1024),)](
        parts, out, count, parts.shape[0], 1024, num_warps=4, enable_fp_fusion=True
    )

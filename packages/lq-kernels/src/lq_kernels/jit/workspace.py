"""Scratch memory for kernels whose CTAs hand sums to each other: partial sums, and counters that are zero between launches.

Kernels of one stream run one after the other, so they share one workspace; kernels of two streams may run at once and do
not. A CUDA graph has a workspace of its own for every stream it was captured on, in the graph's own memory pool: it may
be replayed on any stream. Its counters are cleared by the graph, so memory that graphs share is no hazard.
"""

import threading
from typing import NamedTuple

import torch
from lq_formats import DeviceError
from torch import Tensor

_MIN_COUNTERS = 4096
_MIN_BYTES = 8 << 20


class Workspace(NamedTuple):
    """Scratch memory.

    Attributes:
        partials: fp32, at least as many as were asked for; contents are undefined.
        counters: int32, zero; a kernel leaves them so.
    """

    partials: Tensor
    counters: Tensor


_lock = threading.Lock()
_eager: dict[tuple[int, int], Workspace] = {}
_captured: dict[tuple[int, int], tuple[int, Workspace]] = {}


def workspace(device: torch.device, partials: int, counters: int) -> Workspace:
    """Return the workspace of the current stream of ``device``, grown if need be.

    Args:
        device: A GPU.
        partials: Numbers (fp32) wanted.
        counters: Counters wanted.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    key = (index, stream)
    if torch.cuda.is_current_stream_capturing():
        capture = _capture_id(stream)
        with _lock:
            found = _captured.get(key)
        if found is not None and found[0] == capture and _fits(found[1], partials, counters):
            return found[1]
        fresh = _allocate(device, partials, counters)
        with _lock:
            _captured[key] = (capture, fresh)
        return fresh
    current = _eager.get(key)
    if current is None or not _fits(current, partials, counters):
        current = _allocate(device, partials, counters)
        with _lock:
            _eager[key] = current
    return current


def _fits(found: Workspace, partials: int, counters: int) -> bool:
    return found.partials.numel() >= partials and found.counters.numel() >= counters


def _allocate(device: torch.device, partials: int, counters: int) -> Workspace:
    return Workspace(
        torch.empty(max(partials, _MIN_BYTES // 4), dtype=torch.float32, device=device),
        torch.zeros(max(counters, _MIN_COUNTERS), dtype=torch.int32, device=device),
    )


def _capture_id(stream: int) -> int:
    """Return the number of the capture that is under way on a stream; no two of a process have the same."""
    from cuda.bindings import driver

    status, _, capture, *_ = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"the driver does not say which CUDA graph is being captured: {status}")
    return int(capture)

"""The Hopper kernels as the registry runs them, on weights in fragment order and on canonical ones.

A canonical weight is repacked on first use and the result kept beside it (:mod:`lq_kernels.derived`), so it is stored twice;
a weight that is kept in fragment order (:mod:`lq_kernels.preshuffled`) is stored once.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from lq_formats import DeviceError, unpack_int4
from lq_formats.layouts import FRAGMENT_INT4, FRAGMENT_INT8, INT8
from torch import Tensor

from lq_kernels.derived import derived, has_derived


class _Launcher(Protocol):
    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        out_features: int,
        group_size: int,
        bits: int,
    ) -> Tensor: ...


def decode(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
) -> Tensor:
    """Run the decode kernel; see :func:`lq_kernels.cuda.decode_a16.linear`."""
    from lq_kernels.cuda import decode_a16

    y: Tensor = decode_a16.linear(x, packed, scale, zero, bias, out_features, group_size, bits)
    return y


def prefill(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
) -> Tensor:
    """Run the prefill kernel; see :func:`lq_kernels.cuda.prefill_a16.linear`."""
    from lq_kernels.cuda import prefill_a16

    y: Tensor = prefill_a16.linear(x, packed, scale, zero, bias, out_features, group_size, bits)
    return y


def on_canonical_int4(launcher: _Launcher) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]:
    """Return a launcher for canonical int4 weights."""

    def run(x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
        from lq_kernels.preshuffled import arranged_groups

        k = x.shape[1]
        groups = arranged_groups(k, group_size)
        packed = _once(qweight, f"fragment-int4-{k}", lambda: FRAGMENT_INT4.pack(unpack_int4(qweight, k)))
        scales = _once(scale, f"fragment-scale-{groups}", lambda: FRAGMENT_INT4.arrange_scales(scale, groups))
        zeros = None
        if zero is not None:
            wide = scale.dtype
            zeros = _once(
                zero, f"fragment-zero-{groups}-{wide}", lambda: FRAGMENT_INT4.arrange_scales(zero.to(wide), groups)
            )
        return launcher(x, packed, scales, zeros, None, qweight.shape[0], group_size, 4)

    return run


def on_canonical_int8(launcher: _Launcher) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a launcher for int8 weights ``(N, K)``."""

    def run(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
        n, k = qweight.shape
        packed = _once(qweight, "fragment-int8", lambda: FRAGMENT_INT8.pack(INT8.unpack(qweight)))
        scales = _once(
            scale, f"fragment-scale-{n}", lambda: FRAGMENT_INT8.arrange_scales(scale.expand(n)[:, None].contiguous(), 1)
        )
        return launcher(x, packed, scales, None, None, n, k, 8)

    return run


def _once(weight: Tensor, key: str, make: Callable[[], Tensor]) -> Tensor:
    if not has_derived(weight, key) and torch.cuda.is_current_stream_capturing():
        # What is made during a capture would exist only in the graph's replays.
        raise DeviceError(
            "a weight is used for the first time while a CUDA graph is captured; run the model once before (see "
            "lq_torch.warmup), so that lq can repack it"
        )
    return derived(weight, key, make)

"""The Hopper kernels as the registry runs them, on weights in fragment order and on canonical ones.

A canonical weight is repacked on first use and the result kept beside it (:mod:`lq_kernels.derived`), so it is stored twice;
a weight that is kept in fragment order (:mod:`lq_kernels.preshuffled`) is stored once.
"""

import functools
import importlib
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


class OnFragments:
    """A launcher for weights in fragment order."""

    def __init__(self, module: str, function: str = "linear", *, gated: bool = False) -> None:
        """Name the function of a module of :mod:`lq_kernels.cuda` that runs; it is imported then.

        Args:
            module: The module.
            function: The function.
            gated: Whether the weights are those of gated products (:mod:`lq_kernels.gated`).
        """
        self._module, self._function = module, function
        self._epilogue = {"gated": True} if gated else {}
        self._launcher: Callable[..., Tensor] | None = None

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
        residual: Tensor | None = None,
    ) -> Tensor:
        """Run the kernel; see :func:`lq_kernels.cuda.decode_a16.linear`."""
        if self._launcher is None:
            launcher = getattr(importlib.import_module(f"lq_kernels.cuda.{self._module}"), self._function)
            self._launcher = functools.partial(launcher, **self._epilogue) if self._epilogue else launcher
        if residual is None:
            return self._launcher(x, packed, scale, zero, bias, out_features, group_size, bits)
        return self._launcher(x, packed, scale, zero, bias, out_features, group_size, bits, residual=residual)


class OnMinima:
    """A launcher for int4 weights in fragment order that have minima, not zeros."""

    def __init__(self, module: str, function: str = "linear") -> None:
        """Name the function of a module of :mod:`lq_kernels.cuda` that runs; it is imported then."""
        self._module, self._function = module, function
        self._launcher: Callable[..., Tensor] | None = None

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        minimum: Tensor,
        bias: Tensor | None,
        out_features: int,
        group_size: int,
    ) -> Tensor:
        """Run the kernel; see :func:`lq_kernels.cuda.decode_a16.linear`."""
        if self._launcher is None:
            launcher = getattr(importlib.import_module(f"lq_kernels.cuda.{self._module}"), self._function)
            self._launcher = functools.partial(launcher, minimum=True)
        return self._launcher(x, packed, scale, minimum, bias, out_features, group_size, 4)


decode = OnFragments("decode_a16")
prefill = OnFragments("prefill_a16")
invariant_prefill = OnFragments("invariant", "prefill")
minima_decode = OnMinima("decode_a16")
minima_prefill = OnMinima("prefill_a16")
minima_invariant_prefill = OnMinima("invariant", "prefill")
gated_decode = OnFragments("decode_a16", gated=True)
gated_prefill = OnFragments("prefill_a16", gated=True)
gated_invariant_prefill = OnFragments("invariant", "prefill", gated=True)


class OnCanonicalInt4:
    """A launcher for canonical int4 weights."""

    def __init__(self, launcher: _Launcher) -> None:
        self._launcher = launcher

    def __call__(self, x: Tensor, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
        """Repack the weight if need be, and multiply; see :func:`lq_kernels.int4_linear`."""
        return self.bind(x.shape[1], qweight, scale, zero, group_size)(x)

    def bind(
        self, k: int, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int
    ) -> Callable[[Tensor], Tensor]:
        """Return the product with this weight of ``k`` in features, as it is now: later changes are not seen."""
        packed, scales, zeros = int4_fragments(k, qweight, scale, zero, group_size)
        launcher, n = self._launcher, qweight.shape[0]
        return lambda x: launcher(x, packed, scales, zeros, None, n, group_size, 4)


class OnCanonicalInt8:
    """A launcher for int8 weights ``(N, K)``."""

    def __init__(self, launcher: _Launcher) -> None:
        self._launcher = launcher

    def __call__(self, x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
        """Repack the weight if need be, and multiply; see :func:`lq_kernels.int8_gemm`."""
        return self.bind(x.shape[1], qweight, scale)(x)

    def bind(self, k: int, qweight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the product with this weight of ``k`` in features, as it is now: later changes are not seen."""
        n = qweight.shape[0]
        packed, scales = int8_fragments(qweight, scale)
        launcher = self._launcher
        return lambda x: launcher(x, packed, scales, None, None, n, k, 8)


def int4_fragments(
    k: int, qweight: Tensor, scale: Tensor, zero: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a canonical int4 weight's codes, scales and zeros in fragment order, made once a weight."""
    sizes = k, group_size
    packed = once(qweight, f"fragment-int4-{k}", lambda: FRAGMENT_INT4.pack(unpack_int4(qweight, k)))
    scales = once(scale, f"fragment-scale-{sizes}", lambda: FRAGMENT_INT4.arrange_scales(scale, *sizes))
    if zero is None:
        return packed, scales, None
    wide = scale.dtype
    zeros = once(zero, f"fragment-zero-{sizes}-{wide}", lambda: FRAGMENT_INT4.arrange_scales(zero.to(wide), *sizes))
    return packed, scales, zeros


def int8_fragments(qweight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return an int8 weight's codes and scales, one a row, in fragment order, made once a weight."""
    n, k = qweight.shape
    packed = once(qweight, "fragment-int8", lambda: FRAGMENT_INT8.pack(INT8.unpack(qweight)))
    scales = once(
        scale, f"fragment-scale-{n}", lambda: FRAGMENT_INT8.arrange_scales(scale.expand(n)[:, None].contiguous(), k, k)
    )
    return packed, scales


def once(weight: Tensor, key: str, make: Callable[[], Tensor]) -> Tensor:
    """Return :func:`lq_kernels.derived.derived`; while a CUDA graph is captured, only what has been made before.

    Raises:
        DeviceError: If it would have to be made during a capture.
    """
    if not has_derived(weight, key) and torch.cuda.is_current_stream_capturing():
        # What is made during a capture would exist only in the graph's replays.
        raise DeviceError(
            "a weight is used for the first time while a CUDA graph is captured; run the model once before (see "
            "lq_torch.warmup), so that lq can repack it"
        )
    return derived(weight, key, make)

"""Layers with weights of ggml's types: the packed product beside dequantization with a dense product, and the dense product.

The packed product is :func:`lq_kernels.ggml_linear` on planes, and :func:`lq_kernels.q4_0_linear` on blocks of Q4_0, with
the registry's choice of a kernel: what a GPU must be faster with than by making the weight dense again for each product.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from lq_formats import LQError, ShapeError, SpecError
from lq_formats.layouts import GGMLPlanes, ggml_planes
from lq_kernels import Arch, Problem, ggml_linear, q4_0_linear, select
from lq_kernels.ggml_kernels import make_problem
from lq_kernels.problem import Q4_0_SPEC
from lq_torch import GGMLTensor
from torch import Tensor

from lq_eval.bench.operands import random_blocks
from lq_eval.bench.shapes import check_sizes, check_tokens
from lq_eval.bench.timing import COLD_BYTES, Call, check_replays, copies, times_or_reasons

DEQUANTIZE = "dequant-blas"
_T = TypeVar("_T")


@dataclass(frozen=True)
class GGMLLinearRow:
    """One measured type and number of tokens.

    Attributes:
        op: The ggml type.
        n: Out features.
        k: In features.
        m: Tokens.
        dtype: dtype of x and of the dense weight.
        kernel: What was asked for: ``"auto"`` or a kernel's name.
        ran: The kernel that ran.
        us: The packed product; None if it cannot run, as are the following.
        layer_us: ``F.linear`` with a ``GGMLTensor``, as a model calls it, the weight as it is stored on this device.
        dequantize_us: The weight dequantized, then the dense product: kernel ``"dequant-blas"`` on planes.
        dense_us: ``F.linear`` with a dense weight.
        note: Why something could not run, else empty.
    """

    op: str
    n: int
    k: int
    m: int
    dtype: str
    kernel: str
    ran: str
    us: float | None
    layer_us: float | None
    dequantize_us: float | None
    dense_us: float | None
    note: str = ""

    @property
    def speedup(self) -> float | None:
        """Time of the dense product over that of the packed one."""
        return _ratio(self.dense_us, self.us)

    @property
    def over_dequantize(self) -> float | None:
        """Time of dequantization and dense product over that of the packed one."""
        return _ratio(self.dequantize_us, self.us)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values, with both ratios."""
        return {**asdict(self), "speedup": self.speedup, "over_dequantize": self.over_dequantize}


def run_ggml_linear(
    types: tuple[str, ...],
    n: int,
    k: int,
    ms: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    kernel: str | None = None,
    seconds: float = math.inf,
    replays: int = 7,
    cold_bytes: int = COLD_BYTES,
) -> Iterator[GGMLLinearRow]:
    """Measure one type after another, at one number of tokens after another, until all are done or the time is up.

    The graphs of one point are replayed in turn, so that ratios are of neighbours in time.

    Args:
        types: ggml types, for example ``"q4_k"``.
        n: Out features.
        k: In features.
        ms: Numbers of tokens.
        dtype: Of x and of the dense weight.
        device: Where to run.
        kernel: Force a kernel of ``ggml`` (of ``q4_0`` for that type); a type that it cannot run says why.
        seconds: Stop starting new points after this time.
        replays: Replays of each graph; the median counts.
        cold_bytes: Bytes of weights in a round.

    Raises:
        SpecError: If there is no such type, K is no whole number of its blocks, there are no replays, or a size or number of
            tokens is not positive.
    """
    check_replays(replays)
    check_sizes(n, k)
    check_tokens(ms)
    for name in types:
        check_type(name, k)
    deadline = time.monotonic() + seconds
    dense = [torch.randn(n, k, device=device, dtype=dtype) for _ in range(copies(n * k * dtype.itemsize, cold_bytes))]
    for name in types:
        if time.monotonic() > deadline:
            return
        weights = _Weights(name, n, k, dtype, device, cold_bytes)
        for m in ms:
            if time.monotonic() > deadline:
                return
            x = torch.randn(m, k, device=device, dtype=dtype)
            calls = {**weights.calls(x, kernel), "dense": _linears(x, dense)}
            found = times_or_reasons(calls, device, replays=replays)
            times = {what: value for what, value in found.items() if isinstance(value, float)}
            yield GGMLLinearRow(
                op=name,
                n=n,
                k=k,
                m=m,
                dtype=str(dtype).removeprefix("torch."),
                kernel=kernel or "auto",
                ran=_ran(_problem(name, m, n, k, dtype, device), kernel),
                us=times.get("packed"),
                layer_us=times.get("layer"),
                dequantize_us=times.get("dequantize"),
                dense_us=times.get("dense"),
                note="; ".join(f"{what}: {value}" for what, value in found.items() if isinstance(value, str)),
            )


def check_type(name: str, k: int) -> None:
    """Raise SpecError unless a weight with ``k`` in features may be of a type."""
    try:
        block = ggml_planes(name).form.block_size
    except ShapeError as error:
        raise SpecError(str(error)) from None
    if k % block:
        raise SpecError(f"K={k} is no multiple of the {block} elements of a {name} block; leave it out of --types")


class _Weights:
    """Copies of one weight, in each form that is timed."""

    def __init__(self, name: str, n: int, k: int, dtype: torch.dtype, device: torch.device, cold_bytes: int) -> None:
        self._name = name
        blocks = random_blocks(name, n, k, device)
        count = copies(blocks.numel(), cold_bytes)
        layer: Tensor = GGMLTensor.from_blocks(blocks, name, dtype)
        planes = ggml_planes(name).pack(blocks)
        self._blocks = _clones(blocks, count, Tensor.clone) if name == "q4_0" else []
        self._planes = _clones(planes, count, _clone_planes)
        self._layers = _clones(layer, count, Tensor.clone)

    def calls(self, x: Tensor, kernel: str | None) -> dict[str, list[Call]]:
        """Return the calls of each way to multiply ``x: (M, K)``, one a copy."""

        def product(planes: GGMLPlanes, kernel: str | None = DEQUANTIZE) -> Tensor:
            return ggml_linear(x, planes, ggml_type=self._name, kernel=kernel)

        if self._name == "q4_0":
            packed = _over(self._blocks, lambda blocks: q4_0_linear(x, blocks, kernel=kernel))
        else:
            packed = _over(self._planes, lambda planes: product(planes, kernel))
        return {
            "packed": packed,
            "layer": _linears(x, self._layers),
            "dequantize": _over(self._planes, product),
        }


def _linears(x: Tensor, weights: Sequence[Tensor]) -> list[Call]:
    return _over(weights, lambda weight: torch.nn.functional.linear(x, weight))


def _over(items: Sequence[_T], function: Callable[[_T], object]) -> list[Call]:
    return [lambda item=item: function(item) for item in items]  # type: ignore[misc]


def _clones(first: _T, count: int, clone: Callable[[_T], _T]) -> list[_T]:
    return [first, *(clone(first) for _ in range(count - 1))]


def _clone_planes(planes: GGMLPlanes) -> GGMLPlanes:
    return GGMLPlanes(*(None if plane is None else plane.clone() for plane in planes))  # type: ignore[arg-type]


def _problem(name: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Problem:
    if name == "q4_0":
        return Problem("q4_0", m, n, k, Q4_0_SPEC, dtype, Arch.of(device))
    return make_problem(m, n, k, name, dtype, Arch.of(device))


def _ran(problem: Problem, kernel: str | None) -> str:
    try:
        return select(problem, kernel or "").name
    except LQError:
        return ""


def _ratio(slow: float | None, fast: float | None) -> float | None:
    return slow / fast if slow is not None and fast else None

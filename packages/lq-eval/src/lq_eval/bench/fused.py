"""What a block of a decoder gains by fewer launches: layers merged into one product, and epilogues in the product's kernel.

::

    step      apart                          merged                     fused
    qkv       q(x), k(x), v(x)               qkv(x)
    gate_up   silu(gate(x)) * up(x)          gate_up(x), silu, *        lq: one launch; dense: none
    o, down   y + o(x)                                                  lq: one launch; dense: torch.addmm

Each way is timed for dense weights (``F.linear``: cuBLAS on an NVIDIA GPU) and for lq's in fragment order, silu, product and
sum outside a kernel by PyTorch's operators, the graphs of one point replayed in turn. Weights are cold: a round goes over
copies of all weights of a step.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from lq_formats import SpecError
from lq_kernels import preshuffled_linear
from lq_torch import Int4PreshuffledTensor, Int8PreshuffledTensor
from lq_torch.tensors.gated import gated_form, gated_linear
from torch import Tensor
from torch.nn import functional

from lq_eval.bench.shapes import MODELS, ModelDimensions, check_tokens
from lq_eval.bench.timing import COLD_BYTES, Call, check_replays, copies, times_or_reasons
from lq_eval.schemes import weight_nbytes

DENSE = "dense"
GROUP = 128
OPS = (DENSE, "int4", "int8")


@dataclass(frozen=True)
class Step:
    """Layers of a block that read the same activations, and what follows them.

    Attributes:
        name: ``"qkv"``, ``"o"``, ``"gate_up"`` or ``"down"``.
        rows: Out features of each layer.
        k: In features.
        epilogue: ``"silu_mul"``, ``"add"`` (a residual) or ``""``.
    """

    name: str
    rows: tuple[int, ...]
    k: int
    epilogue: str = ""


@dataclass(frozen=True)
class FusedRow:
    """One way to compute a step at one number of tokens.

    Attributes:
        model: Whose block.
        step: Which layers, see :class:`Step`.
        op: ``"dense"``, ``"int4"`` (groups of 128) or ``"int8"``.
        way: ``"apart"``, ``"merged"`` or ``"fused"``.
        n: Out features, of all layers together.
        k: In features.
        m: Tokens.
        dtype: dtype of x.
        us: Median microseconds; None if it could not run.
        apart_us: Those of the same weights with the layers apart.
        dense_us: Those of the fastest way with dense weights.
        note: Why it could not run.
    """

    model: str
    step: str
    op: str
    way: str
    n: int
    k: int
    m: int
    dtype: str
    us: float | None
    apart_us: float | None
    dense_us: float | None
    note: str = ""

    @property
    def gain(self) -> float | None:
        """Time of the layers apart over this time."""
        return self.apart_us / self.us if self.us and self.apart_us else None

    @property
    def speedup(self) -> float | None:
        """Time of the fastest dense way over this time."""
        return self.dense_us / self.us if self.us and self.dense_us else None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values, with both ratios."""
        return {**asdict(self), "gain": self.gain, "speedup": self.speedup}


def parse_models(text: str) -> Mapping[str, ModelDimensions]:
    """Read a comma-separated list of models: names of ``MODELS``, or sizes ``HIDDENxINTERMEDIATExKV``.

    Raises:
        SpecError: If an item is neither.
    """
    found: dict[str, ModelDimensions] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        sizes = item.lower().split("x")
        if item in MODELS:
            found[item] = MODELS[item]
        elif len(sizes) == 3 and all(size.isdecimal() and int(size) > 0 for size in sizes):
            hidden, intermediate, kv = map(int, sizes)
            found[item] = ModelDimensions(hidden, intermediate, kv, layers=1)
        else:
            raise SpecError(f"unknown model {item!r}: expected HIDDENxINTERMEDIATExKV or one of {', '.join(MODELS)}")
    if not found:
        raise SpecError(f"no model in {text!r}: expected for example 'llama-3-8b' or '4096x14336x1024'")
    return MappingProxyType(found)


def steps(dimensions: ModelDimensions) -> tuple[Step, ...]:
    """Return the steps of one block."""
    hidden, inner, kv = dimensions.hidden, dimensions.intermediate, dimensions.kv
    q = dimensions.q or hidden
    return (
        Step("qkv", (q, kv, kv), hidden),
        Step("o", (hidden,), q, "add"),
        Step("gate_up", (inner, inner), hidden, "silu_mul"),
        Step("down", (hidden,), inner, "add"),
    )


def run_fused(
    model: str,
    dimensions: ModelDimensions,
    ms: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    ops: Sequence[str] = OPS[1:],
    replays: int = 7,
    seconds: float = math.inf,
    cold_bytes: int = COLD_BYTES,
) -> Iterator[FusedRow]:
    """Measure every way of every step of a block, until the time is up.

    Args:
        model: Its name in the rows.
        dimensions: Its sizes.
        ms: Numbers of tokens.
        dtype: Of x and of the dense weights.
        device: Where to run.
        ops: Formats beside the dense weights, of ``OPS``.
        replays: Replays of each graph; the median counts.
        seconds: Stop starting new points after this time.
        cold_bytes: Bytes of weights in a round.

    Raises:
        SpecError: If there is no such format, it does not take such a weight, there are no replays, or a number of tokens
            is not positive.
    """
    check_replays(replays)
    check_tokens(ms)
    for op in ops:
        if op not in OPS:
            raise SpecError(f"unknown op {op!r}: expected one of {', '.join(OPS)}")
    deadline = time.monotonic() + seconds
    for step in steps(dimensions):
        if time.monotonic() > deadline:
            return
        weights = {op: _Weights(op, step, dtype, device, cold_bytes) for op in dict.fromkeys((DENSE, *ops))}
        for m in ms:
            if time.monotonic() > deadline:
                return
            x = torch.randn(m, step.k, device=device, dtype=dtype)
            residual = torch.randn(m, step.rows[0], device=device, dtype=dtype)
            calls = {(op, way): each for op, held in weights.items() for way, each in held.calls(x, residual).items()}
            yield from _rows(model, step, m, dtype, times_or_reasons(calls, device, replays=replays))


def _rows(
    model: str, step: Step, m: int, dtype: torch.dtype, found: Mapping[tuple[str, str], float | str]
) -> Iterator[FusedRow]:
    times = {key: value for key, value in found.items() if isinstance(value, float)}
    dense_us = min((us for (op, _), us in times.items() if op == DENSE), default=None)
    for (op, way), value in found.items():
        yield FusedRow(
            model=model,
            step=step.name,
            op=op,
            way=way,
            n=sum(step.rows),
            k=step.k,
            m=m,
            dtype=str(dtype).removeprefix("torch."),
            us=times.get((op, way)),
            apart_us=times.get((op, "apart")),
            dense_us=dense_us,
            note=value if isinstance(value, str) else "",
        )


class _Weights:
    """Copies of the weights of a step in one format, apart and merged."""

    def __init__(self, op: str, step: Step, dtype: torch.dtype, device: torch.device, cold_bytes: int) -> None:
        self._op, self._step = op, step

        def weight(rows: int) -> Tensor:
            w = torch.randn(rows, step.k, device=device, dtype=dtype)
            if op == DENSE:
                return w
            if op == "int4":
                return Int4PreshuffledTensor.from_hp(w, GROUP, algorithm="rtn")
            return Int8PreshuffledTensor.from_hp(w)

        parts = [weight(rows) for rows in step.rows]
        count = copies(sum(map(weight_nbytes, parts)), cold_bytes)
        self._parts = [parts, *([part.clone() for part in parts] for _ in range(count - 1))]
        self._merged: list[Tensor] = []
        self._gated: list[Any] = []
        if len(parts) > 1:
            merged: Any = weight(sum(step.rows))
            self._merged = [merged, *(merged.clone() for _ in range(count - 1))]
            if step.epilogue == "silu_mul" and op != DENSE:
                gated = gated_form(merged)
                self._gated = [gated, *(gated.clone() for _ in range(count - 1))]

    def calls(self, x: Tensor, residual: Tensor) -> dict[str, list[Call]]:
        """Return the calls of each way for ``x: (M, K)`` and ``residual: (M, N)``, one a copy."""
        found = {"apart": _over(self._parts, lambda parts: self._apart(x, parts, residual))}
        if self._merged:
            found["merged"] = _over(self._merged, lambda w: self._split(functional.linear(x, w)))
        if self._gated:
            found["fused"] = _over(self._gated, lambda w: gated_linear(x, w))
        if self._step.epilogue == "add":
            found["fused"] = _over(self._parts, lambda parts: self._added(x, parts[0], residual))
        return found

    def _apart(self, x: Tensor, parts: Sequence[Tensor], residual: Tensor) -> object:
        products = [functional.linear(x, w) for w in parts]
        if self._step.epilogue == "silu_mul":
            return functional.silu(products[0]) * products[1]
        return products[0] + residual if self._step.epilogue == "add" else products

    def _split(self, y: Tensor) -> object:
        parts = y.split_with_sizes(self._step.rows, dim=-1)
        return functional.silu(parts[0]) * parts[1] if self._step.epilogue == "silu_mul" else parts

    def _added(self, x: Tensor, w: Any, residual: Tensor) -> Tensor:
        if self._op == DENSE:
            return torch.addmm(residual, x, w.t())
        bits, group = (4, w.group_size) if self._op == "int4" else (8, self._step.k)
        return preshuffled_linear(
            x, w.packed, w.scale, bits=bits, group_size=group, out_features=w.shape[0], residual=residual
        )


def _over(items: Sequence[Any], function: Callable[[Any], object]) -> list[Call]:
    return [lambda item=item: function(item) for item in items]  # type: ignore[misc]

"""Variants of one format beside its usual form: other dtypes, groups and zeros, and results that do not depend on the batch.

All variants of a weight are replayed in turn at each M, so that a ratio compares like with like; with many tokens, where a GPU
is at the limit of its power, each runs by itself, as in the sweep. The usual form is bf16, symmetric, groups of 128 (int4) or
one scale a row (int8). The dense product in fp16, beside bf16, says how much of what fp16 costs is the GPU's: it multiplies 11
bits instead of 8, which takes more power.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import lq_kernels
import torch
from lq_formats import LQError, UnsupportedError
from torch import Tensor

from lq_eval.bench.gemm import dense_calls
from lq_eval.bench.products import Product
from lq_eval.bench.shapes import Shape, check_tokens
from lq_eval.bench.sweep import calls_per_graph
from lq_eval.bench.timing import COLD_BYTES, Call, check_replays, settled_or_reasons
from lq_eval.errors import last_line


@dataclass(frozen=True)
class Variant:
    """One form of a format.

    Attributes:
        product: What is multiplied; None for a dense weight.
        dtype: dtype of x.
        batch_invariant: Whether under ``lq_kernels.batch_invariant()``.
    """

    product: Product | None
    dtype: torch.dtype = torch.bfloat16
    batch_invariant: bool = False

    def calls(self, shape: Shape, device: torch.device, cold_bytes: int) -> Callable[[Tensor], Sequence[Call]]:
        """Return a function from x ``(M, K)`` to products with enough copies of a weight.

        Raises:
            LQError: If this lq has no such product, or a weight of this shape cannot be quantized so.
        """
        _mode(self)
        if self.product is None:
            return dense_calls(shape, self.dtype, device, cold_bytes)
        self.product.check(shape)
        operand = self.product.operand(shape, self.dtype, device, cold_bytes)
        return lambda x: [functools.partial(_run, self, call) for call in operand.calls(x, "")]


_INT4, _INT8 = Product("int4"), Product("int8")
VARIANTS = MappingProxyType(
    {
        "int4": (
            Variant(_INT4),
            Variant(_INT4, torch.float16),
            *(Variant(Product("int4", group)) for group in (32, 64, 256, -1)),
            *(Variant(Product("int4", group, symmetric=False)) for group in (32, 128)),
            Variant(_INT4, batch_invariant=True),
        ),
        "int8": (Variant(_INT8), Variant(_INT8, torch.float16), Variant(_INT8, batch_invariant=True)),
        "dense": (Variant(None), Variant(None, torch.float16)),
    }
)
"""By format, the usual form first."""


@dataclass(frozen=True)
class VariantRow:
    """One variant at one number of tokens.

    Attributes:
        op: The product, or ``"dense"``.
        shape: Label of the weight.
        n: Out features.
        k: In features.
        m: Tokens.
        dtype: dtype of x.
        group_size: In features per scale; 0 for per row int8 and dense weights.
        symmetric: Whether there are no zeros.
        batch_invariant: Whether in the batch-invariant mode.
        us: Median microseconds, with many tokens when the clock has settled; None if it could not run.
        usual_us: Those of the usual form.
        ratio: ``us`` over ``usual_us``.
        note: Why it could not run.
    """

    op: str
    shape: str
    n: int
    k: int
    m: int
    dtype: str
    group_size: int
    symmetric: bool
    batch_invariant: bool
    us: float | None
    usual_us: float | None
    ratio: float | None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return asdict(self)


def run_variants(
    shape: Shape,
    ms: Sequence[int],
    device: torch.device,
    *,
    ops: Sequence[str] = tuple(VARIANTS),
    replays: int = 7,
    seconds: float = math.inf,
    cold_bytes: int = COLD_BYTES,
) -> Iterator[VariantRow]:
    """Measure every variant of every format at every number of tokens, until the time is up.

    Args:
        shape: The weight.
        ms: Numbers of tokens.
        device: Where to run.
        ops: Formats, of ``VARIANTS``.
        replays: Replays of each graph, of which the median counts, with fewer than ``timing.STEADY_FROM`` tokens.
        seconds: Stop starting new points after this time.
        cold_bytes: Bytes of weights in a round.

    Raises:
        SpecError: If there are no replays, or a number of tokens is not positive.
    """
    check_replays(replays)
    check_tokens(ms)
    deadline = time.monotonic() + seconds
    for op in ops:
        reasons: dict[Variant, float | str] = {}
        products = {}
        for variant in VARIANTS[op]:
            try:
                products[variant] = variant.calls(shape, device, cold_bytes)
            except (LQError, RuntimeError, ImportError) as error:
                reasons[variant] = last_line(error)
        for m in ms:
            if time.monotonic() > deadline:
                return
            x = torch.randn(m, shape.k, device=device)
            calls = {variant: product(x.to(variant.dtype)) for variant, product in products.items()}
            repeat = calls_per_graph(m, shape.n, shape.k)
            times = settled_or_reasons(calls, device, m, replays=replays, min_calls=repeat)
            found = reasons | {variant: each if isinstance(each, str) else each.us for variant, each in times.items()}
            usual = found[VARIANTS[op][0]]
            for variant in VARIANTS[op]:
                yield _row(op, variant, shape, m, found[variant], usual)


def _row(op: str, variant: Variant, shape: Shape, m: int, found: float | str, usual: float | str) -> VariantRow:
    us, usual_us = (value if isinstance(value, float) else None for value in (found, usual))
    return VariantRow(
        op=op,
        shape=shape.label,
        n=shape.n,
        k=shape.k,
        m=m,
        dtype=str(variant.dtype).removeprefix("torch."),
        group_size=0 if variant.product is None else variant.product.group(shape),
        symmetric=variant.product is None or variant.product.symmetric,
        batch_invariant=variant.batch_invariant,
        us=us,
        usual_us=usual_us,
        ratio=us / usual_us if us and usual_us else None,
        note=found if isinstance(found, str) else "",
    )


def _run(variant: Variant, call: Call) -> object:
    with _mode(variant):
        return call()


def _mode(variant: Variant) -> contextlib.AbstractContextManager[object]:
    if not variant.batch_invariant:
        return contextlib.nullcontext()
    mode = getattr(lq_kernels, "batch_invariant", None)
    if mode is None:
        raise UnsupportedError("this lq_kernels has no batch_invariant()")
    found: contextlib.AbstractContextManager[object] = mode()
    return found

"""ggml's Q4_0 weights times activations: the Hopper kernels on raw blocks, and what runs elsewhere.

A Q4_0 block is 32 codes with an fp16 scale, so the weight is a symmetric int4 weight in groups of 32 and Hopper's int4
kernels multiply it with activations of 16 bits, which need no quantization. Blocks are repacked on first use and the
result kept beside them (:mod:`lq_kernels.derived`), so they are stored twice; a layer that stores its weight once holds the
fragments instead (:func:`lq_kernels.preshuffle_q4_0`).

Elsewhere activations are quantized to Q8_1 first, as llama.cpp does, and blocks multiplied as integers.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from lq_formats import QuantSpec
from lq_formats.layouts import FRAGMENT_INT4
from torch import Tensor

from lq_kernels.hopper import once
from lq_kernels.plans import MODEL, Plan
from lq_kernels.problem import Q4_0_SPEC, Problem
from lq_kernels.tuned.table import Q8_1

BLOCK = 32
_QUANTIZE_US = 1.5
_CHUNK = 2**24  # elements that are repacked at a time, a byte each and a few copies


def spec(in_features: int) -> QuantSpec:
    """Return how a Q4_0 weight is quantized, in the terms of int4."""
    if in_features == BLOCK:
        return QuantSpec(4, "row", None, True, torch.float16)
    return Q4_0_SPEC


class OnQ4_0:  # noqa: N801
    """The Hopper kernels on Q4_0 blocks, with activations of 16 bits."""

    def __init__(
        self,
        module: str,
        plan: Callable[[Problem], Plan],
        why_not: Callable[[Problem], str | None],
        function: str = "linear",
        *,
        multiplies_int8: bool = False,
    ) -> None:
        """Take the function of a module of :mod:`lq_kernels.cuda` that runs, and what is known of its int4 kernel.

        Args:
            module: The module.
            plan: The kernel's plan for an int4 problem.
            why_not: Why it cannot run one, or None.
            function: The function.
            multiplies_int8: Whether the module has a ``linear_q8_1`` too, which multiplies the integers of Q8_1.
        """
        self._module, self._function, self._plan, self._why_not = module, function, plan, why_not
        self._multiplies_int8 = multiplies_int8

    def __call__(self, x: Tensor, weight_q: Tensor) -> Tensor:
        """Return ``x (M, K) @ w.T``, ``(M, N)`` in x's dtype."""
        return self.bind(x.shape[1], weight_q)(x)

    def bind(self, k: int, weight_q: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the product with this weight as it is now: later changes are not seen."""
        packed, scales = fragments(weight_q)
        linear, n = self._linear(), weight_q.shape[0]
        return lambda x: linear(x, packed, scales, None, None, n, BLOCK, 4)

    def of_q8_1(self, weight_q: Tensor, activation: Tensor) -> Tensor:
        """Return the ``(N, M) float32`` product with Q8_1 blocks, or with activations quantized like theirs.

        Decode multiplies integers, which is exact but for the sums of groups; prefill what they stand for, rounded to bf16.
        """
        from lq_kernels.cuda.quantize_q8_1 import dequantize_q8_1, round_q8_1

        (packed, scales), n, blocks = fragments(weight_q), weight_q.shape[0], holds_blocks(activation)
        y: Tensor
        if self._multiplies_int8 and weight_q.shape[1] > 1:  # a single block's scale is that of a row
            y = self._imported().linear_q8_1(activation, packed, scales, n)
        else:
            x = dequantize_q8_1(activation) if blocks else round_q8_1(activation)
            y = self._linear()(x, packed, scales, None, None, n, BLOCK, 4, transposed=True)
        return y

    def why_not(self, problem: Problem) -> str | None:
        """Return why it cannot run a problem of either kind."""
        return self._why_not(_int4(problem))

    def plan(self, problem: Problem) -> Plan:
        """Return its plan for activations of 16 bits."""
        return self._plan(_int4(problem))

    def plan_of_blocks(self, problem: Problem) -> Plan:
        """Return its plan for Q8_1 blocks, and for activations to quantize; times of a table are taken as they are.

        They have the launch that quantizes, where the table holds such products.
        """
        found = self.plan(problem)
        return replace(found, us=found.us + _QUANTIZE_US) if found.source == MODEL else found

    def _imported(self) -> Any:
        return importlib.import_module(f"lq_kernels.cuda.{self._module}")

    def _linear(self) -> Any:
        return getattr(self._imported(), self._function)


def fragments(weight_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales of Q4_0 blocks ``(N, B, 18)`` in fragment order, made once a weight."""
    return (
        once(weight_q, "fragment-q4_0", lambda: pack_codes(weight_q)),
        once(weight_q, "fragment-q4_0-scale", lambda: pack_scales(weight_q)),
    )


def pack_codes(weight_q: Tensor) -> Tensor:
    """Return the codes of Q4_0 blocks ``(N, B, 18)`` in fragment order."""
    n, count, _ = weight_q.shape
    packed = weight_q.new_empty(FRAGMENT_INT4.packed_shape(n, count * BLOCK), dtype=torch.int32)
    for rows in row_slices(n, count * BLOCK):
        octets = weight_q[rows, :, 2:]
        codes = torch.cat((octets & 0x0F, octets >> 4), dim=-1).flatten(1)
        packed[:, rows.start // 16 : -(-rows.stop // 16)] = FRAGMENT_INT4.pack(codes)
    return packed


def pack_scales(weight_q: Tensor) -> Tensor:
    """Return the scales of Q4_0 blocks ``(N, B, 18)``, fp16, arranged alike."""
    k = weight_q.shape[1] * BLOCK
    # As integers, so that a NaN keeps its bits.
    bits = weight_q[..., :2].contiguous().view(torch.int16)[..., 0]
    return FRAGMENT_INT4.arrange_scales(bits, k, BLOCK).view(torch.float16)


def unpack_rows(packed: Tensor, scale: Tensor, rows: Tensor, in_features: int) -> Tensor:
    """Return some rows ``(R,) int64`` as Q4_0 blocks ``(R, in_features // 32, 18)``."""
    count = in_features // BLOCK
    codes = FRAGMENT_INT4.unpack_rows(packed, rows, in_features).view(-1, count, 2, BLOCK // 2)
    bits = FRAGMENT_INT4.restore_scale_rows(scale.view(torch.int16), rows, in_features, BLOCK)
    halves = bits.flatten().view(torch.uint8).view(-1, count, 2)
    return torch.cat((halves, codes[:, :, 0] | (codes[:, :, 1] << 4)), dim=-1)


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """Return slices of whole blocks of 16 rows, which bound the memory that repacking takes."""
    step = max(_CHUNK // columns // 16, 1) * 16
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def holds_blocks(activation: Tensor) -> bool:
    """Return whether activations are Q8_1 blocks, and not floats."""
    return activation.dtype == torch.uint8


def quantizing(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a product of Q4_0 and Q8_1 blocks as one that takes floats in place of the latter, too."""

    def run(weight_q: Tensor, activation: Tensor) -> Tensor:
        return product(weight_q, activation if holds_blocks(activation) else torch.ops.lq.quantize_q8_1(activation))

    return run


def quantized(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``x @ w.T`` in x's dtype by a product of blocks ``(N, M)``, of Q4_0 and of what x is quantized to.

    A Q8_1 block has its scale and the sum of its numbers in fp16, which a token of large numbers exceeds, and of which little
    is left where all are small. So tokens are multiplied by powers of two, which changes no other bit, and results are divided.
    """

    def run(x: Tensor, weight_q: Tensor) -> Tensor:
        exponent = _exponents(x)
        y = product(weight_q, torch.ops.lq.quantize_q8_1(torch.ldexp(x.float(), -exponent))).t()
        return torch.ldexp(y, exponent).to(x.dtype).contiguous()

    return run


def _exponents(x: Tensor) -> Tensor:
    """Return ``(M, 1)`` exponents of 2 by which each token of ``(M, K)`` may be divided so that its largest is near 64."""
    if not x.numel():
        return x.new_zeros(x.shape[0], 1, dtype=torch.float32)
    largest = x.float().abs().amax(1, keepdim=True)
    exponent = torch.frexp(largest).exponent.float() - 7
    # Powers that a float32 holds, as their inverses; the largest token has 121.
    return torch.where(largest.isfinite() & (largest > 0), exponent, 0.0).clamp_(-126.0, 126.0)


def _int4(problem: Problem) -> Problem:
    int4 = replace(problem, op="preshuffled", spec=spec(problem.k))
    return replace(int4, dtype=torch.bfloat16, activation=Q8_1) if problem.op == "q4_0_q8_1" else int4

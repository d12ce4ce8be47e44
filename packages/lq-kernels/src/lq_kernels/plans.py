"""How a kernel would run a problem: its cut, its time, and whether that was measured or comes from the cost model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lq_formats.layouts.fragment import BLOCK_ROWS

from lq_kernels import cost
from lq_kernels.cuda import constraints
from lq_kernels.cuda.variant import Variant
from lq_kernels.problem import Problem
from lq_kernels.tuned.lookup import Choice, Measured, measurements
from lq_kernels.tuned.table import Weight

MODEL = "model"
_DECODE_POWER = 1 / 3
"""Of what decode's model says that fewer tokens take less than measured ones, for logarithms: 0.23 to 0.38 fit 472 times of 56
weights, of 8 to 64 tokens, at once, with an error of 1 to 3% instead of 4 to 12% (H200); 31 times of 4 to 12 tokens would take
0.8 and more."""


@dataclass(frozen=True)
class Plan:
    """What a kernel would do with a problem.

    Attributes:
        us: Predicted microseconds.
        cut: Its configuration, for people; empty for a kernel that has none.
        source: Where ``us`` comes from: :data:`MODEL`, or the name of a tuning table.
    """

    us: float
    cut: str = ""
    source: str = MODEL


def decode(problem: Problem) -> Plan:
    """Plan the Hopper decode kernel."""
    from lq_kernels.cuda import decode_a16

    return _plan(problem, decode_a16.choice_of(problem), cost.decode_us, _DECODE_POWER)


def prefill(problem: Problem) -> Plan:
    """Plan the Hopper prefill kernel."""
    from lq_kernels.cuda import prefill_a16

    return _plan(problem, prefill_a16.choice_of(problem), cost.prefill_us)


def a8(problem: Problem) -> Plan:
    """Plan the Hopper kernel for 8-bit tokens; quantizing them is always predicted."""
    from lq_kernels.cuda import linear_a8

    found = _plan(problem, linear_a8.choice_of(problem), linear_a8.predict_us)
    return replace(found, us=found.us + linear_a8.quantize_us(problem))


def dense(problem: Problem) -> Plan:
    """Plan unpacking a weight and the vendor's product."""
    found = None
    if constraints.why_not_fragment(problem) is None:  # no others are in tables
        weight = weight_of(problem)
        found = next(measurements("dequant_blas", problem.m, weight, problem.arch.name, problem.arch.sm_count), None)
    us, source = _time(problem, found, lambda problem: cost.dequantize_us(problem) + cost.dense_us(problem))
    return Plan(us, "", source)


def weight_of(problem: Problem) -> Weight:
    """Return the weight of an int4, int8 or preshuffled problem as tables name it, with activations that are not quantized."""
    spec = problem.spec
    variant = Variant.of(problem.dtype, spec.scale_dtype, spec.bits, problem.group_size, problem.k, not spec.symmetric)
    rows = -(-problem.n // BLOCK_ROWS) * BLOCK_ROWS
    return Weight(spec.bits, variant.groups, variant.zero, variant.scale_bytes, "", rows, problem.k)


def _plan(problem: Problem, choice: Choice[Any] | None, model: Callable[[Problem], float], power: float = 1.0) -> Plan:
    if choice is None:
        return Plan(model(problem))
    near = choice.near if choice.near is not None and choice.near.point.m != problem.m else None
    us, source = _time(problem, choice.measured or near, model, power)
    return Plan(us, str(choice.config), source)


def _time(
    problem: Problem, found: Measured | None, model: Callable[[Problem], float], power: float = 1.0
) -> tuple[float, str]:
    """Return the time of a measurement; at fewer tokens than it had, as many times less as the model says, to a power."""
    if found is None or not found.timed:
        return model(problem), MODEL
    share = 1.0 if found.point.m == problem.m else model(problem) / model(replace(problem, m=found.point.m))
    return found.point.us * min(share, 1.0) ** power, found.table

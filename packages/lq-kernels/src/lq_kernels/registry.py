"""The registry: which kernels there are, which one a problem gets, and why not the others.

Selection is data. A kernel says whether it can run a problem (``why_not``) and how long it would take
(``plan``: measured where a tuning table holds the problem, else by a model); the cheapest that can run is taken, the first of
equals, and where some were measured the cheapest of those. Nothing is timed, nothing falls back silently: a kernel that is
asked for by name runs or raises.

A problem that is batch-invariant gets the first kernel that has a form for it and can run it, whatever the number of tokens.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lq_formats import NoKernelError, SpecError
from torch import Tensor

from lq_kernels.invariance import is_batch_invariant
from lq_kernels.plans import MODEL, Plan
from lq_kernels.problem import Op, Problem, check_op


@dataclass(frozen=True)
class Kernel:
    """One way to compute an operation.

    Attributes:
        name: What users type to force it, unique within ``op``.
        op: The operation it computes.
        why_not: Why it cannot run a problem, or None.
        predict_us: Predicted microseconds.
        run: The launcher. int4: ``(x, qweight, scale, zero, group_size)``; int8: ``(x, qweight, scale)``; preshuffled:
            ``(x, packed, scale, zero, bias, out_features, group_size, bits, residual=None)``; preshuffled_gated: the same
            without a residual; preshuffled_minima: ``(x, packed, scale, minimum, bias, out_features, group_size)``;
            q4_0_q8_1: ``(weight_q, activation)``, Q8_1 blocks or floats ``(M, K)``; dynamic activations: see
            :mod:`lq_kernels.dynamic_kernels`.
            All tensors valid and not empty.
        plan: For a kernel that has cuts or measurements: what ``predict_us`` is taken from.
    """

    name: str
    op: Op
    why_not: Callable[[Problem], str | None]
    predict_us: Callable[[Problem], float]
    run: Callable[..., Tensor]
    plan: Callable[[Problem], Plan] | None = None


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found.

    Attributes:
        problem: The problem in question.
        chosen: The kernel it gets; None if none can run it.
        predicted_us: Predicted microseconds of the chosen kernel.
        cut: Its configuration; empty for a kernel that has none.
        source: Where the time comes from: ``"model"``, or the name of a tuning table.
        rejected: ``(name, reason)`` of every other kernel, in the registry's order.
    """

    problem: Problem
    chosen: str | None
    predicted_us: float
    rejected: tuple[tuple[str, str], ...]
    cut: str = ""
    source: str = MODEL

    def __str__(self) -> str:
        time = f"predicted {self.predicted_us:.1f} us by "
        time += "its cost model" if self.source == MODEL else f"measurements in {self.source}"
        head = [str(self.problem), f"  -> {self.chosen} ({time})" if self.chosen else "  -> no kernel"]
        cut = [f"     {self.cut}"] if self.cut else []
        return "\n".join(head + cut + [f"     not {name}: {reason}" for name, reason in self.rejected])


def kernel_names(op: Op) -> tuple[str, ...]:
    """Return the names that ``kernel=`` takes for an operation, in the registry's order.

    Raises:
        SpecError: If there is no such operation.
    """
    check_op(op)
    return tuple(kernel.name for kernel in _kernels(op))


@functools.lru_cache(maxsize=8192)
def select(problem: Problem, name: str = "") -> Kernel:
    """Return the kernel that runs ``problem``.

    Args:
        problem: What to run.
        name: Force this kernel; empty to choose.

    Raises:
        NoKernelError: If no kernel (or not the forced one) can run it, with every reason.
        SpecError: If it is no :class:`Problem`.
    """
    _check(problem)
    reasons = _reasons(problem)
    if name:
        reasons = [(kernel, reason) for kernel, reason in reasons if kernel.name == name]
        if not reasons:
            known = ", ".join(kernel_names(problem.op))
            raise NoKernelError(str(problem), [(name, f"there is no such kernel; choose one of {known}")])
    able = [kernel for kernel, reason in reasons if reason is None]
    if not able:
        raise NoKernelError(str(problem), [(kernel.name, reason or "") for kernel, reason in reasons])
    if problem.batch_invariant:
        return able[0]
    plans = {kernel.name: _plan(kernel, problem) for kernel in able}
    chosen = _cheapest(plans)
    return next(kernel for kernel in able if kernel.name == chosen)


def explain(problem: Problem) -> Explanation:
    """Say which kernel a problem gets, and for every other kernel why not; ``str()`` of it is for people.

    Inside :class:`lq_kernels.batch_invariant`, it says what the problem gets in that mode.

    Raises:
        SpecError: If it is no :class:`Problem`.
    """
    _check(problem)
    if is_batch_invariant():
        problem = replace(problem, batch_invariant=True)
    reasons = _reasons(problem)
    plans = {kernel.name: _plan(kernel, problem) for kernel, reason in reasons if reason is None}
    chosen = (next(iter(plans)) if problem.batch_invariant else _cheapest(plans)) if plans else None
    best = plans[chosen] if chosen else Plan(float("nan"))

    def slower(plan: Plan) -> str:
        if problem.batch_invariant:
            return f"comes after {chosen}: the choice does not depend on the tokens"
        faster = plan.us < best.us  # by its model, which does not count beside measurements
        return f"not measured, predicted {plan.us:.1f} us" if faster else f"predicted slower, {plan.us:.1f} us"

    rejected = tuple(
        (kernel.name, reason or slower(plans[kernel.name])) for kernel, reason in reasons if kernel.name != chosen
    )
    return Explanation(problem, chosen, best.us, rejected, best.cut, best.source)


def _check(problem: object) -> None:
    if not isinstance(problem, Problem):
        raise SpecError(f"problem is of type {type(problem).__name__}: expected lq_kernels.Problem")


def _reasons(problem: Problem) -> list[tuple[Kernel, str | None]]:
    """Return every kernel of an operation with why it cannot run the problem; in the mode, the forms that it has for that."""
    kernels = _kernels(problem.op)
    if not problem.batch_invariant:
        return [(kernel, kernel.why_not(problem)) for kernel in kernels]
    known = {kernel.name: kernel for kernel in _invariant(problem.op)}
    variant = "its results depend on the number of tokens (batch-invariant mode)"
    return [
        (known[kernel.name], known[kernel.name].why_not(problem)) if kernel.name in known else (kernel, variant)
        for kernel in kernels
    ]


def _plan(kernel: Kernel, problem: Problem) -> Plan:
    return Plan(kernel.predict_us(problem)) if kernel.plan is None else kernel.plan(problem)


def _cheapest(plans: Mapping[str, Plan]) -> str:
    """Return the kernel with the least time, of those that were measured where some were: a model may flatter the others."""
    measured = {name: plan for name, plan in plans.items() if plan.source != MODEL} or plans
    return min(measured, key=lambda name: measured[name].us)


@functools.cache
def _kernels(op: Op) -> tuple[Kernel, ...]:
    from lq_kernels.catalog import KERNELS

    return tuple(kernel for kernel in KERNELS if kernel.op == op)


@functools.cache
def _invariant(op: Op) -> tuple[Kernel, ...]:
    from lq_kernels.invariant_kernels import KERNELS

    return tuple(kernel for kernel in KERNELS if kernel.op == op)

"""Eager products with a weight that was multiplied before, without PyTorch's dispatcher and the checks of arguments.

An operator that is implemented in Python costs tens of microseconds of CPU time a call: more than the GPU takes for a
token. A function that has checked its arguments and called its operator once keeps the weight's tensors here. The next
call with the very same tensors, unchanged, compares a few numbers and launches the kernel that the registry selects, as
the operator would: results are the same, bit for bit.

Whoever could see the operator still does: under torch.compile, a dispatch mode, a function transform, a profiler, or
where a gradient is wanted, the operator is called.
"""

import functools
import weakref
from collections.abc import Callable

import torch
from lq_formats import QuantSpec
from torch import Tensor
from torch.autograd import forward_ad

from lq_kernels.invariance import is_batch_invariant
from lq_kernels.problem import Arch, Op, Problem
from lq_kernels.registry import Kernel, select


def invisible(x: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether nobody would see an operator that is called with these: its result is all that counts."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and (bias is None or isinstance(bias, Tensor))
        and not ((x.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled())
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and not torch._C._autograd._profiler_enabled()
        and torch._C._get_tracing_state() is None
    )


class _Family:
    """The problems that differ in the number of tokens only; one object for equal ones, so that it is its own hash."""

    def __init__(self, op: Op, n: int, k: int, spec: QuantSpec, dtype: torch.dtype, arch: Arch) -> None:
        self._rest = (n, k, spec, dtype, arch)
        self._op: Op = op

    def problem(self, m: int, batch_invariant: bool) -> Problem:
        return Problem(self._op, m, *self._rest, batch_invariant=batch_invariant)


_family = functools.lru_cache(maxsize=4096)(_Family)


@functools.lru_cache(maxsize=16384)
def _selected(family: _Family, m: int, batch_invariant: bool) -> Kernel:
    return select(family.problem(m, batch_invariant))


class _Known:
    """A weight that was checked: its tensors as they were, and what runs with them."""

    def __init__(
        self,
        op: Op,
        tensors: tuple[Tensor | None, ...],
        values: tuple[int, ...],
        n: int,
        k: int,
        spec: QuantSpec,
        dtype: torch.dtype,
    ) -> None:
        first, *rest = tensors
        assert first is not None
        # The first tensor owns this entry; the others belong to the same weight.
        self.weight = weakref.ref(first, _forgetter(id(first)))
        self.rest = tuple(rest)
        self.values = values
        self.stamps = tuple(_stamp(tensor) for tensor in tensors)
        self._device = first.device
        self._dtype = dtype
        self._in_features = k
        self._family = _family(op, n, k, spec, dtype, Arch.of(first.device))
        self._bound: dict[tuple[str, bool], Callable[[Tensor], Tensor]] = {}

    def multiply(self, x: Tensor, first: Tensor) -> Tensor | None:
        """Return the product, or None where activations are of another kind than before."""
        k = self._in_features
        shape = x.shape
        if not shape or shape[-1] != k or x.dtype != self._dtype or x.device != self._device:
            return None
        m = x.numel() // k
        if m == 0:
            return None
        mode = is_batch_invariant()
        kernel = _selected(self._family, m, mode)
        matrix = x if len(shape) == 2 else x.reshape(m, k)
        key = (kernel.name, mode)
        bound = self._bound.get(key)
        if bound is None and hasattr(kernel.run, "bind"):
            bound = self._bound[key] = kernel.run.bind(k, first, *self.rest, *self.values)
        y = kernel.run(matrix, first, *self.rest, *self.values) if bound is None else bound(matrix)
        return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[1])


_known: dict[int, _Known] = {}


def recall(x: Tensor, first: Tensor, rest: tuple[Tensor | None, ...], values: tuple[int, ...]) -> Tensor | None:
    """Return the product of ``x`` with a weight that :func:`remember` was told of; None if the operator has to run.

    Args:
        x: Activations for which :func:`invisible` holds.
        first: The first tensor of the weight.
        rest: The others, the same objects as then.
        values: Its group size and the like.
    """
    known = _known.get(id(first))
    if known is None or known.weight() is not first or known.values != values:
        return None
    stamps = known.stamps
    if _stamp(first) != stamps[0]:
        return None
    for i, tensor in enumerate(rest):
        if tensor is not known.rest[i] or (tensor is not None and _stamp(tensor) != stamps[i + 1]):
            return None
    return known.multiply(x, first)


def remember(
    op: Op,
    tensors: tuple[Tensor | None, ...],
    values: tuple[int, ...],
    n: int,
    k: int,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> None:
    """Keep a weight whose tensors have been checked, until its first tensor ends or is seen changed.

    Args:
        op: Which operation.
        tensors: Of the weight, in the order of the kernels' launchers.
        values: What launchers take after them.
        n: Out features, as :class:`Problem` has them.
        k: In features.
        spec: How the weight is quantized.
        dtype: dtype of the activations.
    """
    if n == 0 or tensors[0] is None or tensors[0].is_meta:
        return  # Nothing to run.
    if any(
        type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_inference()
        for tensor in tensors
        if tensor is not None
    ):
        return  # Changes of inference tensors cannot be noticed cheaply.
    known = _Known(op, tensors, values, n, k, spec, dtype)
    _known[id(tensors[0])] = known


def _forgetter(key: int) -> Callable[["weakref.ref[Tensor]"], None]:
    """Return what a weight's end calls. It does not hold the entry, and needs nothing of a module that may be gone by then."""
    known = _known

    def forget(reference: "weakref.ref[Tensor]") -> None:
        entry = known.get(key)
        if entry is not None and entry.weight is reference:
            known.pop(key, None)

    return forget


def _stamp(tensor: Tensor | None) -> tuple[int, int]:
    """Return what changes when a tensor is written to, and when it gets another storage."""
    return (0, 0) if tensor is None else (tensor._version, tensor.data_ptr())

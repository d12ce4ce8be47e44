"""Derivatives that an operator's backward does not give: forward mode, and the transforms of ``torch.func``.

PyTorch has no way to register them for an operator, and where one is met it takes the result for a constant: tangents of zero.
Functions that multiply call their operator through :func:`differentiable`, which gives its result the derivatives of the dense
product there. An operator that is called by other means raises :class:`lq_formats.UnsupportedError` for a tangent.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lq_formats import UnsupportedError
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch
_TRANSFORMS = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)


def differentiable(operator: Callable[..., Tensor], dense: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Return ``operator(*inputs)``; where PyTorch would not find its derivatives, with those of ``dense(*inputs)``.

    Args:
        operator: Calls an operator of :mod:`lq_kernels.ops`.
        dense: Computes the same by functions that PyTorch differentiates: the product with the dequantized weight.
        inputs: What derivatives are taken of.
    """
    if not differentiated(*inputs):
        return operator(*inputs)
    fixed = (None if each is None else each.detach() for each in inputs)
    y: Tensor = _Derivatives.apply(operator(*fixed), dense(*inputs))
    return y


def differentiated(*tensors: Tensor | None) -> bool:
    """Return whether forward mode, or a transform of ``torch.func``, differentiates what is computed of these here and now."""
    if torch.compiler.is_compiling():
        return False
    level = _functorch.maybe_current_level()
    if level is None and forward_ad._current_level < 0:
        return False
    if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality):
        return False  # inside of an operator, whose derivatives are taken outside
    if level is not None:
        return any(each.key() in _TRANSFORMS for each in _functorch.get_interpreter_stack())
    return has_tangent(tensors)


def wants_gradient(x: Tensor) -> bool:
    """Return whether derivatives are taken of ``x``, in any mode: then what has none must not multiply it."""
    return (x.requires_grad and torch.is_grad_enabled()) or differentiated(x)


def has_tangent(values: Iterable[Any]) -> bool:
    """Return whether one of some values is a tensor with a tangent of forward mode."""
    tensors = (value for value in values if isinstance(value, Tensor))
    return any(torch._VF._unpack_dual(tensor, level=0)[1] is not None for tensor in tensors)


class _Derivatives(torch.autograd.Function):
    """The value of its first argument, and the derivatives of its second."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, dense: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, Any]:
        return None, grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[1].clone()


class DifferentiableLibrary(torch.library.Library):
    """A library whose operators with a backward refuse tangents by name, where PyTorch would drop them."""

    def impl(self, op_name: Any, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        """Register an implementation, as :class:`torch.library.Library` does."""
        kernel = _refusing(op_name, fn) if dispatch_key == "Autograd" else fn
        super().impl(op_name, kernel, dispatch_key, **options)  # type: ignore[no-untyped-call]


def _refusing(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def run(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and has_tangent(args):
            raise UnsupportedError(
                f"the operator lq::{name} has no forward-mode derivative; call the function of lq_kernels, which has one, "
                "outside of torch.compile"
            )
        return kernel(keyset, *args)

    return run

"""The epilogue of a merged gate and up product: ``silu(gate) * up``, in one place for a kernel to take over."""

from torch import Tensor, nn

_SILU = (("torch.nn.modules.activation", "SiLU"), ("transformers.activations", "SiLUActivation"))


def silu_and_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, each operation rounded to the operands' dtype as in the model's own code.

    Args:
        gate: ``(..., N)``, a part of a merged product: rows lie apart.
        up: The same of the other part.
    """
    return nn.functional.silu(gate) * up


def is_plain_silu(activation: nn.Module) -> bool:
    """Return whether a module computes SiLU and nothing watches it."""
    kind = type(activation)
    watched = activation._forward_hooks or activation._forward_pre_hooks
    return (kind.__module__, kind.__qualname__) in _SILU and not watched and not getattr(activation, "inplace", False)

"""The epilogue of a merged gate and up product: ``silu(gate) * up``, by itself or in the product's kernel."""

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
    plain = (kind.__module__, kind.__qualname__) in _SILU and not getattr(activation, "inplace", False)
    return plain and not watched(activation)


def watched(module: nn.Module) -> bool:
    """Return whether hooks of a module want to see its input or result."""
    return bool(module._forward_hooks or module._forward_pre_hooks)

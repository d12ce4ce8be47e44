"""Hooks of a layer that something else would take the place of, where they would be lost."""

from typing import Final

from torch import nn

_HOOKS: Final = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def has_hooks(layer: nn.Module) -> bool:
    """Return whether a layer, or one of its own parameters, has hooks."""
    parameters = [parameter for parameter in layer._parameters.values() if parameter is not None]
    return any(getattr(layer, hooks, None) for hooks in _HOOKS) or any(p._backward_hooks for p in parameters)

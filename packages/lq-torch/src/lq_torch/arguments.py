"""Arguments that many functions take, and the named errors for what they are not."""

import torch
from lq_formats import DeviceError, SpecError
from torch import nn


def check_module(model: object, task: str) -> None:
    """Raise SpecError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise SpecError(f"{task} got a {type(model).__name__} for a model: expected a torch.nn.Module")


def parse_device(device: torch.device | str) -> torch.device:
    """Return a device.

    Raises:
        DeviceError: If PyTorch knows none of that name, or there is no such GPU here.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise DeviceError(f"device={device!r}: expected for example 'cpu', 'cuda' or 'cuda:1'") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device={device!r}: torch finds {torch.cuda.device_count()} CUDA GPUs here")
    return found

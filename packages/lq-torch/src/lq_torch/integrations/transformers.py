"""Build a Hugging Face model from its config.json, without weights. Imports transformers when called."""

from pathlib import Path
from typing import Any

import torch
from lq_formats import FormatError, MissingPackageError
from torch import nn


def build_model(folder: Path) -> nn.Module:
    """Return the causal language model that ``folder/config.json`` describes, with its parameters on ``meta``.

    Buffers (rotary frequencies, for instance) are computed as usual: they are small and not part of checkpoints.

    Raises:
        MissingPackageError: If transformers is not installed.
        FormatError: If the folder has no config.json.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise MissingPackageError(
            "transformers", "Loading a model without passing one", "pip install 'lq-torch[hf]'"
        ) from None
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder} has no config.json; pass the model to load into")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with _ParametersOnMeta():
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


class _ParametersOnMeta:
    """While active, every new nn.Parameter is on ``meta``; buffers are made as usual."""

    def __enter__(self) -> None:
        self._register = nn.Module.register_parameter

        def register(module: nn.Module, name: str, parameter: Any) -> None:
            self._register(module, name, parameter)
            if parameter is not None and parameter.device.type != "meta":
                kept = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                module._parameters[name] = kept

        nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]

    def __exit__(self, *details: object) -> None:
        nn.Module.register_parameter = self._register  # type: ignore[method-assign]

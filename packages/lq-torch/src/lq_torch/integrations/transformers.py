"""Build a Hugging Face model from its configuration, without weights. Imports transformers when called."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lq_formats import FormatError, MissingPackageError
from torch import nn


def build_model(folder: Path) -> nn.Module:
    """Return the model that ``folder/config.json`` describes, with its parameters on ``meta``.

    Its class is the one that the config names under ``architectures``, else the causal language model of its type.
    Buffers (rotary frequencies, for instance) are computed as usual: they are small and not all of them are saved.

    Raises:
        MissingPackageError: If transformers is not installed.
        FormatError: If the folder has no config.json, or transformers does not know its model.
    """
    transformers = _import()
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder} has no config.json; pass the model to load into")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with _ParametersOnMeta():
            model: nn.Module = _build(transformers, config)
    except Exception as error:  # whatever transformers makes of a config from anywhere
        raise FormatError(f"{folder}/config.json: transformers cannot build this model: {error}") from error
    if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        generation = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        model.generation_config = generation
    return model


def build_causal_lm(values: Mapping[str, Any]) -> nn.Module:
    """Return the causal language model of a configuration given as its values, as :func:`build_model` does.

    Raises:
        MissingPackageError: If transformers is not installed.
        FormatError: If transformers does not take the values.
    """
    transformers = _import()
    try:
        config = transformers.AutoConfig.for_model(**values)
        with _ParametersOnMeta():
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of values from anywhere
        raise FormatError(f"transformers cannot build the model of {dict(values)}: {error}") from error
    return model


def _import() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingPackageError(
            "transformers", "Loading a model without passing one", "pip install 'lq-torch[hf]'"
        ) from None
    return transformers


def _build(transformers: Any, config: Any) -> Any:
    names = getattr(config, "architectures", None) or []
    kind: Any = getattr(transformers, str(names[0]), None) if len(names) == 1 else None
    # A config may name anything; only a model class is called.
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if known and kind.config_class is type(config):
        return kind._from_config(config)
    return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


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

"""Which format a configuration is of, and which formats can be written."""

from collections.abc import Mapping
from typing import Any

from lq_formats.errors import FormatError, SpecError, UnsupportedError
from lq_formats.interop.auto_round import AutoRoundFormat
from lq_formats.interop.awq import AWQFormat
from lq_formats.interop.checkpoint_format import CheckpointFormat
from lq_formats.interop.compressed_tensors import CompressedTensorsFormat
from lq_formats.interop.gptq import GPTQFormat
from lq_formats.interop.hqq import HQQFormat

_METHODS: dict[str, type[CheckpointFormat]] = {
    "auto-round": AutoRoundFormat,
    "awq": AWQFormat,
    "compressed-tensors": CompressedTensorsFormat,
    "gptq": GPTQFormat,
    "hqq": HQQFormat,
}
EXPORTS: dict[str, CheckpointFormat] = {
    "auto-round": AutoRoundFormat(),
    "awq": AWQFormat(),
    "compressed-tensors": CompressedTensorsFormat(),
    "gptq": GPTQFormat("gptq"),
    "gptq_v2": GPTQFormat("gptq_v2"),
    "hqq": HQQFormat(),
}


def read_format(config: Mapping[str, Any]) -> CheckpointFormat:
    """Return the format of a checkpoint from its ``quantization_config``.

    Configurations without ``quant_method`` are those of AutoGPTQ's ``quantize_config.json`` and AutoAWQ's
    ``quant_config.json``.

    Raises:
        FormatError: If it is no configuration, or contradicts its method.
        UnsupportedError: If the method, or something it says, is none that this release reads.
    """
    if not isinstance(config, Mapping):
        raise FormatError(f"quantization_config is a {type(config).__name__}: expected a map")
    method = method_of(config)
    if method is None:
        raise UnsupportedError(f"quant_method {config.get('quant_method')!r}: expected one of {', '.join(_METHODS)}")
    return _METHODS[method].from_config(config)


def method_of(config: Mapping[str, Any]) -> str | None:
    """Return which method a ``quantization_config`` is of, or None if :func:`read_format` reads no such method."""
    method = config.get("quant_method")
    if method is None:
        method = "awq" if "w_bit" in config else "gptq" if "bits" in config else None
    name = str(method).lower().removeprefix("intel/").replace("_", "-")
    return name if name in _METHODS else None


def export_format(name: str) -> CheckpointFormat:
    """Return the format to write by its name.

    Raises:
        SpecError: If there is none of that name.
    """
    if not isinstance(name, str) or name not in EXPORTS:
        raise SpecError(f"format={name!r}: expected one of {', '.join(EXPORTS)}")
    return EXPORTS[name]

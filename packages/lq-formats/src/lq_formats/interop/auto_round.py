"""AutoRoundFormat: checkpoints of AutoRound, whose layers are GPTQ's or AWQ's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from lq_formats.errors import UnsupportedError
from lq_formats.interop.awq import AWQFormat
from lq_formats.interop.checkpoint_format import (
    CheckpointFormat,
    LayerScheme,
    Shapes,
    boolean,
    integer,
    split_schemes,
)
from lq_formats.interop.gptq import GPTQFormat
from lq_formats.layouts import AffineWeight

# What auto_round/inference/backend.py calls GPTQ_FORMAT (zeros minus one), GPTQ_FORMAT_NO_ZP and AWQ_FORMAT, and the names
# that older versions wrote as "backend".
_MINUS_ONE = ("auto_round:auto_gptq", "auto_round:gptq", "auto_round:gptq:exllamav2", "auto_round:gptq:tritonv2")
_AS_IT_IS = ("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2", "auto_round:tritonv2", "auto_round:triton")
_AWQ = ("auto_round:auto_awq", "auto_round:awq")


@dataclass(frozen=True)
class AutoRoundFormat(CheckpointFormat):
    """GPTQ's tensors (without ``g_idx``) or AWQ's, as ``packing_format`` says.

    Attributes:
        packing_format: ``"auto_round:auto_gptq"``, ``"auto_round"`` or another of AutoRound's names.
        layers: The format of the layers.
    """

    packing_format: str = "auto_round:auto_gptq"
    layers: GPTQFormat | AWQFormat = GPTQFormat("gptq")  # noqa: RUF009  (frozen)
    name = "auto-round"
    marker = "qweight"

    @property
    def tensor_names(self) -> frozenset[str]:  # type: ignore[override]
        """Those of the layers' format."""
        return self.layers.tensor_names

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read ``packing_format`` (or ``backend``), ``data_type`` and ``sym``; see :meth:`CheckpointFormat.from_config`."""
        packing = str(config.get("packing_format") or config.get("backend") or _MINUS_ONE[0])
        packing = packing.replace("autoround", "auto_round").replace("auto-round", "auto_round")
        kind, activations = config.get("data_type", "int"), config.get("act_bits")
        if kind != "int" or activations not in (None, 16, 32):
            raise UnsupportedError(
                f"AutoRound checkpoint of data_type {kind!r} with activations of {activations} bits: "
                "expected integer weights and floating point activations"
            )
        integer(config, "bits")
        # Single layers may differ from the rest.
        symmetric = True if boolean(config, "sym", True) and not config.get("extra_config") else None
        if packing in _AWQ:
            return cls(packing, AWQFormat(symmetric is True))
        if packing not in (*_MINUS_ONE, *_AS_IT_IS):
            raise UnsupportedError(
                f"AutoRound checkpoint in the packing {packing!r}: expected one of "
                f"{', '.join((*_MINUS_ONE, *_AS_IT_IS, *_AWQ))}"
            )
        return cls(packing, GPTQFormat("gptq" if packing in _MINUS_ONE else "gptq_v2", symmetric))

    def expected_shapes(self, out_features: int, in_features: int, shapes: Shapes) -> Shapes:
        """See :meth:`CheckpointFormat.expected_shapes`."""
        return self.layers.expected_shapes(out_features, in_features, shapes)

    def unpack(self, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """See :meth:`CheckpointFormat.unpack`."""
        return self.layers.unpack(tensors)

    def pack(self, weight: AffineWeight) -> dict[str, Tensor]:
        """See :meth:`CheckpointFormat.pack`.

        Raises:
            UnsupportedError: If the weight has a ``g_idx``, which AutoRound does not.
        """
        if weight.g_idx is not None:
            raise UnsupportedError("auto-round has no g_idx: export the weight as gptq")
        tensors = self.layers.pack(weight)
        return {name: tensor for name, tensor in tensors.items() if name != "g_idx"}

    def to_config(self, schemes: Mapping[str, LayerScheme], dense: Iterable[str]) -> dict[str, Any]:
        """See :meth:`CheckpointFormat.to_config`; layers that differ are listed one by one."""
        common, others = split_schemes({path: replace(scheme, act_order=False) for path, scheme in schemes.items()})
        extra: dict[str, dict[str, Any]] = {path: {"bits": 16, "data_type": "float"} for path in dense}
        extra |= {path: _settings(scheme) for path, scheme in others.items()}
        config = {"quant_method": "auto-round", "packing_format": self.packing_format, **_settings(common)}
        return {**config, "extra_config": extra} if extra else config


def _settings(scheme: LayerScheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric, "data_type": "int"}

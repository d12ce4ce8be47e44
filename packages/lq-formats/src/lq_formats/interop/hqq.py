"""HQQFormat: checkpoints that transformers saves of models quantized with hqq."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from lq_formats.errors import FormatError, UnsupportedError
from lq_formats.interop.checkpoint_format import (
    CheckpointFormat,
    LayerScheme,
    Shapes,
    only_scheme,
    shape_of,
    simplest_zero,
)
from lq_formats.layouts import HQQ, AffineWeight

_SETTINGS = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "compute_dtype"),
    *("channel_wise", "optimize", "round_zero", "quant_scale", "quant_zero", "offload_meta"),
    *("stores_quant_config", "encoded_state_dict"),
)


@dataclass(frozen=True)
class HQQFormat(CheckpointFormat):
    """``W_q``, ``scale``, ``zero`` and numbers as tensors (:class:`lq_formats.layouts.HQQLayout`), zeros floating point."""

    name = "hqq"
    marker = "W_q"
    tensor_names = frozenset({"W_q", "scale", "zero", "scale_q", "zero_q", *_SETTINGS})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read ``quant_config``; see :meth:`CheckpointFormat.from_config`."""
        settings = config.get("quant_config")
        if not isinstance(settings, Mapping):
            raise FormatError("hqq configuration has no map quant_config")
        weights = settings.get("weight_quant_params", {})
        if isinstance(weights, Mapping) and weights.get("axis", 1) == 0:
            raise UnsupportedError(
                "HQQ checkpoint with axis=0: its groups run along the out features, and no row has scales of its own; "
                "quantize with axis=1"
            )
        return cls()

    def expected_shapes(self, out_features: int, in_features: int, shapes: Shapes) -> Shapes:
        """See :meth:`CheckpointFormat.expected_shapes`."""
        rows, size = shape_of(shapes, "W_q", self.name)
        scales, _ = shape_of(shapes, "scale", self.name)
        if rows == 0 or scales == 0 or scales % rows or 8 % (scales // rows) or size == 0 or in_features % size:
            raise UnsupportedError(
                f"hqq layer of {rows} rows of bytes, groups of {size} and {scales} scales for {in_features} in features: "
                "groups must run along the in features of one row, in 1, 2, 4 or 8 bits"
            )
        return HQQ.packed_shape(out_features, in_features, in_features // size, 8 // (scales // rows))

    def unpack(self, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """See :meth:`CheckpointFormat.unpack`."""
        return simplest_zero(HQQ.unpack(tensors))

    def pack(self, weight: AffineWeight) -> dict[str, Tensor]:
        """See :meth:`CheckpointFormat.pack`."""
        return HQQ.pack(weight)

    def to_config(self, schemes: Mapping[str, LayerScheme], dense: Iterable[str]) -> dict[str, Any]:
        """See :meth:`CheckpointFormat.to_config`."""
        sizes = {path: LayerScheme(scheme.bits, scheme.group_size, False) for path, scheme in schemes.items()}
        scheme = only_scheme(sizes, self.name)
        return {
            "quant_method": "hqq",
            "quant_config": {
                "weight_quant_params": {
                    "nbits": scheme.bits,
                    "group_size": None if scheme.group_size == -1 else scheme.group_size,
                    "axis": 1,
                    "channel_wise": True,
                    "optimize": True,
                    "round_zero": False,
                    "view_as_float": False,
                },
                "scale_quant_params": None,
                "zero_quant_params": None,
                "offload_meta": False,
            },
            "skip_modules": sorted(dense),
        }

"""CompressedTensorsFormat: ``pack-quantized`` checkpoints of llm-compressor and everything that writes like it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from lq_formats.errors import FormatError, UnsupportedError
from lq_formats.interop.checkpoint_format import (
    CheckpointFormat,
    LayerScheme,
    Shapes,
    shape_of,
    simplest_zero,
    split_schemes,
)
from lq_formats.layouts import COMPRESSED_TENSORS, AffineWeight
from lq_formats.layouts.fields import expect_shape, take

_PACKED = "pack-quantized"
_ZERO = "weight_zero_point"


@dataclass(frozen=True)
class CompressedTensorsFormat(CheckpointFormat):
    """``weight_packed``, ``weight_scale``, ``weight_shape`` and, where there is need, ``weight_zero_point``, ``weight_g_idx``.

    See :class:`lq_formats.layouts.CompressedTensorsLayout`. A layer's bits follow from its shapes, so that the groups of a
    configuration (``config_groups``) need no matching of names. Old versions stored zero points as int8 ``(N, G)``.

    Attributes:
        widths: The bits that layers may have: with up to four in features shapes do not tell 4 from 8.
    """

    widths: tuple[int, ...] = (4, 8)

    name = "compressed-tensors"
    marker = "weight_packed"
    tensor_names = frozenset({"weight_packed", "weight_scale", "weight_shape", _ZERO, "weight_g_idx"})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read ``format`` and ``config_groups``; see :meth:`CheckpointFormat.from_config`."""
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            raise FormatError("compressed-tensors configuration has no map config_groups of maps")
        for key in ("transform_config", "sparsity_config"):
            extra = config.get(key)
            if extra and not (isinstance(extra, Mapping) and extra.get("format") == "dense"):
                raise UnsupportedError(f"compressed-tensors checkpoint with a {key}: lq reads quantized weights alone")
        for name, group in groups.items():
            form = group.get("format") or config.get("format")
            weights = group.get("weights")
            if form != _PACKED or not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
                raise UnsupportedError(
                    f"compressed-tensors group {name!r} in the format {form!r}: expected integers in {_PACKED!r}"
                )
            if group.get("input_activations") or group.get("output_activations"):
                raise UnsupportedError(
                    f"compressed-tensors group {name!r} quantizes activations: load it as weights alone by removing "
                    "input_activations and output_activations from its configuration"
                )
            if weights.get("num_bits") not in (4, 8) or weights.get("strategy") not in ("group", "channel", None):
                raise UnsupportedError(
                    f"compressed-tensors group {name!r} has {weights.get('num_bits')} bits, strategy "
                    f"{weights.get('strategy')!r}: expected 4 or 8 bits by group or channel"
                )
        return cls(tuple(sorted({group["weights"]["num_bits"] for group in groups.values()})) or cls.widths)

    def expected_shapes(self, out_features: int, in_features: int, shapes: Shapes) -> Shapes:
        """See :meth:`CheckpointFormat.expected_shapes`."""
        _, groups = shape_of(shapes, "weight_scale", self.name)
        bits = self._bits(in_features, shape_of(shapes, "weight_packed", self.name)[1])
        expected = COMPRESSED_TENSORS.packed_shape(out_features, in_features, groups, bits, symmetric=False)
        if shapes.get(_ZERO) == (out_features, groups):
            expected[_ZERO] = (out_features, groups)
        return {**expected, "weight_g_idx": (in_features,)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """See :meth:`CheckpointFormat.unpack`."""
        packed = take(tensors, "weight_packed", self.name, (torch.int32,), 2)
        shape = take(tensors, "weight_shape", self.name, (torch.int64, torch.int32), 1)
        # Of other lengths the layout says what is wrong.
        bits = self._bits(int(shape[1]), packed.shape[1]) if shape.numel() == 2 else 4
        zero = tensors.get(_ZERO)
        if zero is None or zero.dtype != torch.int8:
            return simplest_zero(COMPRESSED_TENSORS.unpack(tensors, bits))
        weight = COMPRESSED_TENSORS.unpack({name: t for name, t in tensors.items() if name != _ZERO}, bits)
        expect_shape(zero, _ZERO, self.name, tuple(weight.scale.shape))
        unsigned = zero.to(torch.int16) + (1 << (bits - 1))
        if bool((unsigned < 0).any()) or bool((unsigned >= 1 << bits).any()):
            raise FormatError(
                f"{self.name} tensor {_ZERO!r} holds {int(zero.min())} to {int(zero.max())}: not {bits} bits"
            )
        return simplest_zero(replace(weight, zero=unsigned.to(torch.uint8)))

    def pack(self, weight: AffineWeight) -> dict[str, Tensor]:
        """See :meth:`CheckpointFormat.pack`."""
        return COMPRESSED_TENSORS.pack(weight)

    def to_config(self, schemes: Mapping[str, LayerScheme], dense: Iterable[str]) -> dict[str, Any]:
        """See :meth:`CheckpointFormat.to_config`; layers that differ are listed in groups of their own."""
        common, others = split_schemes(schemes)
        targets = {common: ["Linear"]}
        for path, scheme in others.items():
            targets.setdefault(scheme, []).append(path)
        return {
            "quant_method": "compressed-tensors",
            "format": _PACKED,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": {
                    "targets": names,
                    "weights": _settings(scheme),
                    "input_activations": None,
                    "output_activations": None,
                }
                for number, (scheme, names) in enumerate(targets.items())
            },
            "ignore": sorted(dense),
            "kv_cache_scheme": None,
        }

    def _bits(self, in_features: int, words: int) -> int:
        found = [bits for bits in self.widths if words == -(-in_features * bits // 32)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UnsupportedError(
                f"{self.name} layer of {in_features} in features among layers of 4 and of 8 bits: its shapes do not tell which "
                "it has; leave it dense"
            )
        raise FormatError(
            f"{self.name} tensor 'weight_packed' has {words} words a row: {in_features} in features take "
            f"{-(-in_features // 8)} with 4 bits and {-(-in_features // 4)} with 8"
        )


def _settings(scheme: LayerScheme) -> dict[str, Any]:
    grouped = scheme.group_size != -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size if grouped else None,
        "actorder": "group" if scheme.act_order else None,
        "dynamic": False,
    }

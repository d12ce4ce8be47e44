"""GPTQFormat: checkpoints of AutoGPTQ, GPTQModel and everything that writes like them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from lq_formats.errors import FormatError, UnsupportedError
from lq_formats.interop.checkpoint_format import (
    CheckpointFormat,
    LayerScheme,
    Shapes,
    boolean,
    integer,
    shape_of,
    simplest_zero,
    split_schemes,
)
from lq_formats.layouts import GPTQ, GPTQ_V2, AffineWeight

_LAYOUTS = {"gptq": GPTQ, "gptq_v2": GPTQ_V2}


@dataclass(frozen=True)
class GPTQFormat(CheckpointFormat):
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` (:class:`lq_formats.layouts.GPTQLayout`).

    A layer's bits follow from its shapes, so configurations that differ from layer to layer (``dynamic``) need no
    matching of names: their patterns, regular expressions from a file, are never run.

    Attributes:
        version: ``"gptq"``, which stores zeros minus one, or ``"gptq_v2"``.
        symmetric: Every layer must be; None where layers may differ.
    """

    version: str = "gptq"
    symmetric: bool | None = None
    marker = "qweight"
    tensor_names = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    @property
    def name(self) -> str:  # type: ignore[override]
        """The version."""
        return self.version

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read ``checkpoint_format`` (or ``format``) and ``sym``; see :meth:`CheckpointFormat.from_config`."""
        version = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        if version not in _LAYOUTS or config.get("is_marlin_format"):
            raise UnsupportedError(
                f"GPTQ checkpoint in the format {version!r}: expected gptq or gptq_v2; others are the orders of one "
                "kernel, save it again in one of these"
            )
        integer(config, "bits", "w_bit")
        symmetric = boolean(config, "sym", True)
        # Where layers differ, some may be asymmetric although most are not.
        return cls(version, True if symmetric and not config.get("dynamic") else None)

    def expected_shapes(self, out_features: int, in_features: int, shapes: Shapes) -> Shapes:
        """See :meth:`CheckpointFormat.expected_shapes`."""
        groups, _ = shape_of(shapes, "scales", self.name)
        _, words = shape_of(shapes, "qzeros", self.name)
        return _LAYOUTS[self.version].packed_shape(out_features, in_features, groups, self._bits(out_features, words))

    def unpack(self, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """See :meth:`CheckpointFormat.unpack`."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        _, out_features = shape_of(shapes, "scales", self.name)
        _, words = shape_of(shapes, "qzeros", self.name)
        bits = self._bits(out_features, words)
        return simplest_zero(_LAYOUTS[self.version].unpack(tensors, bits, symmetric=self.symmetric is True))

    def pack(self, weight: AffineWeight) -> dict[str, Tensor]:
        """See :meth:`CheckpointFormat.pack`.

        Raises:
            UnsupportedError: In version 1, also if a zero is 0, which its readers understand differently.
        """
        if self.version == "gptq" and weight.zero is not None and bool((weight.zero == 0).any()):
            raise UnsupportedError(
                "gptq (version 1) stores zero - 1, and readers disagree on a zero of 0, which this weight has: export "
                "it as gptq_v2"
            )
        return _LAYOUTS[self.version].pack(weight)

    def to_config(self, schemes: Mapping[str, LayerScheme], dense: Iterable[str]) -> dict[str, Any]:
        """See :meth:`CheckpointFormat.to_config`; layers that differ get rules of their own."""
        common, others = split_schemes(schemes)
        rules: dict[str, dict[str, Any]] = {f"-:^{re.escape(path)}$": {} for path in dense if path != "lm_head"}
        for path, scheme in others.items():
            rules[f"+:^{re.escape(path)}$"] = _settings(scheme)
        config = {
            "quant_method": "gptq",
            **_settings(common),
            "checkpoint_format": self.version,
            "lm_head": "lm_head" in schemes,
            "pack_dtype": "int32",
        }
        return {**config, "dynamic": rules} if rules else config

    def _bits(self, out_features: int, words: int) -> int:
        """Return the bits of a layer whose zeros of a group take this many words."""
        if out_features == 0 or words * 32 % out_features:
            raise FormatError(f"{self.name} qzeros have {words} words for {out_features} out features: no whole bits")
        return words * 32 // out_features


def _settings(scheme: LayerScheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": scheme.act_order,
    }

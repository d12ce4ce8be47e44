"""AWQFormat: checkpoints of AutoAWQ in its GEMM version, and what others write like it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from lq_formats.errors import UnsupportedError
from lq_formats.interop.checkpoint_format import (
    CheckpointFormat,
    LayerScheme,
    Shapes,
    boolean,
    integer,
    only_scheme,
    shape_of,
    simplest_zero,
)
from lq_formats.layouts import AWQ, AffineWeight


@dataclass(frozen=True)
class AWQFormat(CheckpointFormat):
    """``qweight``, ``qzeros`` and ``scales`` (:class:`lq_formats.layouts.AWQLayout`), 4 bits.

    Attributes:
        symmetric: Every zero must be the midpoint (``"zero_point": false``).
    """

    symmetric: bool = False
    name = "awq"
    marker = "qweight"
    tensor_names = frozenset({"qweight", "qzeros", "scales"})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read ``version``, ``bits`` and ``zero_point``; see :meth:`CheckpointFormat.from_config`."""
        version = str(
            config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
        ).lower()
        if version != "gemm" or config.get("backend") == "llm-awq":
            raise UnsupportedError(
                f"AWQ checkpoint of version {version!r}: expected gemm; the others order their words for one kernel, "
                "save it again in this version"
            )
        bits = integer(config, "bits", "w_bit", default=4)
        if bits != 4:
            raise UnsupportedError(f"AWQ checkpoint of {bits} bits: the format has 4")
        return cls(not boolean(config, "zero_point", True))

    def expected_shapes(self, out_features: int, in_features: int, shapes: Shapes) -> Shapes:
        """See :meth:`CheckpointFormat.expected_shapes`."""
        groups, _ = shape_of(shapes, "scales", self.name)
        return AWQ.packed_shape(out_features, in_features, groups)

    def unpack(self, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """See :meth:`CheckpointFormat.unpack`."""
        return simplest_zero(AWQ.unpack(tensors, symmetric=self.symmetric))

    def pack(self, weight: AffineWeight) -> dict[str, Tensor]:
        """See :meth:`CheckpointFormat.pack`."""
        return AWQ.pack(weight)

    def to_config(self, schemes: Mapping[str, LayerScheme], dense: Iterable[str]) -> dict[str, Any]:
        """See :meth:`CheckpointFormat.to_config`; zeros are stored always, and some readers insist on them."""
        sizes = {path: LayerScheme(scheme.bits, scheme.group_size, False) for path, scheme in schemes.items()}
        scheme = only_scheme(sizes, self.name)
        return {
            "quant_method": "awq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": sorted(dense) or None,
        }

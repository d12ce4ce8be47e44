"""QuantSpec: what a group-wise integer quantization is, as one validated, JSON round-trippable value."""

import json
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from lq_formats.errors import GroupSizeError, ShapeError, SpecError

Granularity: TypeAlias = Literal["tensor", "row", "group"]

MIN_GROUP_SIZE = 8
_SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SCALE_DTYPE_NAMES = {dtype: name for name, dtype in _SCALE_DTYPES.items()}


@dataclass(frozen=True)
class QuantSpec:
    """How the weights ``w: (N, K)`` of one linear layer become integers.

    ``w ~= (u - zero) * scale`` with unsigned codes ``u`` in ``[0, 2**bits - 1]``. Symmetric quantization has no zero
    tensor: its zero is the midpoint ``2**(bits - 1)`` (so the signed code is ``u - midpoint``).

    Attributes:
        bits: Bits per code, 1 to 8.
        granularity: What shares one scale: the whole ``tensor``, a ``row`` (one out feature) or a ``group`` of
            ``group_size`` consecutive in features of a row.
        group_size: In features per scale; at least 8. Only with ``granularity="group"``.
        symmetric: No zero point; the representable range is centred on 0.
        scale_dtype: float16, bfloat16 or float32.

    Raises:
        SpecError: If the attributes contradict each other.
        GroupSizeError: If ``group_size`` is below 8.
    """

    bits: int = 4
    granularity: Granularity = "group"
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 1 <= self.bits <= 8:
            raise SpecError(f"bits={self.bits!r}: expected an integer from 1 to 8")
        if not isinstance(self.symmetric, bool):
            raise SpecError(f"symmetric={self.symmetric!r}: expected True or False")
        if self.symmetric and self.bits == 1:
            raise SpecError("bits=1 with symmetric=True has no code but zero above it; use symmetric=False")
        if self.granularity not in get_args(Granularity):
            raise SpecError(f"granularity={self.granularity!r}: expected one of {', '.join(get_args(Granularity))}")
        if self.granularity == "group":
            if not isinstance(self.group_size, int) or isinstance(self.group_size, bool):
                raise SpecError(f"group_size={self.group_size!r}: granularity='group' needs an integer group size")
            if self.group_size < MIN_GROUP_SIZE:
                raise GroupSizeError(f"group_size={self.group_size}: expected at least {MIN_GROUP_SIZE}")
        elif self.group_size is not None:
            raise SpecError(f"group_size={self.group_size} goes with granularity='group', not {self.granularity!r}")
        if not isinstance(self.scale_dtype, torch.dtype) or self.scale_dtype not in _SCALE_DTYPE_NAMES:
            raise SpecError(f"scale_dtype={self.scale_dtype}: expected one of {', '.join(_SCALE_DTYPES)}")

    @property
    def midpoint(self) -> int:
        """The implicit zero point of symmetric codes, ``2**(bits - 1)``."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest unsigned code, ``2**bits - 1``."""
        return (1 << self.bits) - 1

    def resolve_group_size(self, in_features: int) -> int:
        """Return the number of in features that share a scale in a row of ``in_features``.

        Raises:
            ShapeError: If ``in_features`` is not positive.
            GroupSizeError: If ``group_size`` does not divide ``in_features``.
        """
        if in_features <= 0:
            raise ShapeError(f"in_features={in_features}: expected a positive number of in features")
        if self.group_size is None:
            return in_features
        if in_features % self.group_size:
            raise GroupSizeError(
                f"group_size={self.group_size} does not divide in_features={in_features}; "
                "choose a divisor, or -1 or granularity='row'"
            )
        return self.group_size

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the shape of the scale (and zero) tensor of an ``(out_features, in_features)`` weight."""
        if self.granularity == "tensor":
            return (1, 1)
        return (out_features, in_features // self.resolve_group_size(in_features))

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary of JSON values; :meth:`from_dict` reads it back."""
        return {
            "bits": self.bits,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": _SCALE_DTYPE_NAMES[self.scale_dtype],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "QuantSpec":
        """Build a spec from :meth:`to_dict`'s output.

        Raises:
            SpecError: If a key is missing or unknown, or a value is not allowed.
        """
        expected = set(cls.__dataclass_fields__)
        if not isinstance(data, dict) or set(data) != expected:
            came = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise SpecError(f"a quantization spec has the keys {sorted(expected)}; got {came}")
        dtype = data["scale_dtype"]
        if not isinstance(dtype, str) or dtype not in _SCALE_DTYPES:
            raise SpecError(f"scale_dtype={dtype!r}: expected one of {', '.join(_SCALE_DTYPES)}")
        return cls(**{**data, "scale_dtype": _SCALE_DTYPES[dtype]})

    def to_json(self) -> str:
        """Return the spec as a JSON object."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "QuantSpec":
        """Build a spec from :meth:`to_json`'s output.

        Raises:
            SpecError: If the text is not JSON or not a spec.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError) as error:
            raise SpecError(f"not a JSON quantization spec: {error}") from None
        return cls.from_dict(data)

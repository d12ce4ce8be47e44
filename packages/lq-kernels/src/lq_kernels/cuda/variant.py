"""Variant: what a Hopper kernel for fragment-ordered weights is compiled for."""

import functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from lq_formats.layouts.fragment import BLOCK_ROWS

TYPES = {torch.bfloat16: "Bf16", torch.float16: "Fp16", torch.float32: "Fp32"}
"""Names of dtypes in the sources."""

EPILOGUES = MappingProxyType(
    {
        "none": (),
        "transposed": ("LQ_TRANSPOSED=1",),
        "residual": ("LQ_RESIDUAL=1",),
        "silu_mul": ("LQ_GATED=1",),
    }
)
"""What becomes of a product on its way out: macros by name."""


class Scales(NamedTuple):
    """What a kernel reads and keeps for the scales of a weight.

    Attributes:
        groups: Groups in a K step; 0 for one scale a row.
        zero: Whether there are zero points, or minima.
        sums: Whether these multiply sums of the tokens, so that none is rounded: minima, and zeros that are not of x's dtype.
            Zeros that are take the place of the codes' middle.
        bytes: Of scales and zeros, beside the codes of a block of 16 rows and a K step.
    """

    groups: int
    zero: bool
    sums: bool
    bytes: int


@dataclass(frozen=True)
class Variant:
    """One compilation of a source: everything that is a constant in it.

    Attributes:
        x: dtype of activations and results, bf16 or fp16.
        scale: dtype of scales and zeros.
        bits: 4 or 8.
        groups: Groups in a K step, 128 in features of 4 bits and 64 of 8, whose scales lie together: 1 (also where they are
            longer, or end within a step), 2, 4 and so on; 0 for one scale a row.
        zero: Whether there are zero points, or minima.
        minimum: Whether they are minima: a weight is ``u * scale + minimum``. 4 bits in groups.
    """

    x: torch.dtype
    scale: torch.dtype
    bits: int
    groups: int
    zero: bool
    minimum: bool = False

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(
        x: torch.dtype, scale: torch.dtype, bits: int, group_size: int, k: int, zero: bool, minimum: bool = False
    ) -> "Variant":
        """Return the variant for a weight with K = ``k`` and groups of ``group_size``."""
        step = 512 // bits
        groups = 0 if group_size == k else step // group_size if step % group_size == 0 else 1
        return Variant(x, scale, bits, groups, zero, minimum)

    @functools.cached_property
    def unfused(self) -> bool:
        """Whether it takes two operations to make a weight of an int4 code of a group: with zeros, and in fp16."""
        return self.bits == 4 and self.groups > 0 and not self.minimum and (self.zero or self.x != torch.bfloat16)

    @functools.cached_property
    def scale_bytes(self) -> int:
        """Bytes of scales and zeros beside the codes of a block of 16 rows and a K step."""
        return self.groups * BLOCK_ROWS * self.scale.itemsize * (2 if self.zero else 1)

    @functools.cached_property
    def scales(self) -> Scales:
        """What the scales and zeros of a weight take."""
        sums = self.zero and (self.minimum or self.scale != self.x)
        return Scales(self.groups, self.zero, sums, self.scale_bytes)

    @functools.cached_property
    def defines(self) -> tuple[str, ...]:
        """``NAME=VALUE`` of the macros."""
        return (
            f"LQ_BITS={self.bits}",
            f"LQ_X={TYPES[self.x]}",
            f"LQ_SCALE={TYPES[self.scale]}",
            f"LQ_GROUPS={self.groups}",
            f"LQ_ZERO={2 if self.minimum else int(self.zero)}",
        )

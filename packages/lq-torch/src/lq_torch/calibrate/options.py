"""How calibration goes about it: frozen, validated options."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from lq_formats import SpecError


@dataclass(frozen=True)
class GPTQOptions:
    """Options of GPTQ.

    Attributes:
        damping: Share of the mean Hessian diagonal added to it; tenfold, up to three times, where H has no Cholesky
            factor without.
        activation_order: Fix the columns with the largest inputs first. Costs nothing at run time: groups are static.
        sweeps: Passes of descent on codes, scales and zeros after GPTQ. The output error falls with each.
        correct_inputs: Share, 0 to 1, of the difference between the float model's and the quantized model's inputs that
            the weight makes up for (the asymmetric calibration of GPTAQ). 0: none, and the float model need not run
            alongside.
    """

    damping: float = 0.01
    activation_order: bool = True
    sweeps: int = 3
    correct_inputs: float = 0.5

    def __post_init__(self) -> None:
        if not _number(self.damping) or not 0 < self.damping <= 1:
            raise SpecError(f"damping={self.damping!r}: expected a share of the mean diagonal, above 0 and at most 1")
        if type(self.activation_order) is not bool:
            raise SpecError(f"activation_order={self.activation_order!r}: expected True or False")
        if type(self.sweeps) is not int or self.sweeps < 0:
            raise SpecError(f"sweeps={self.sweeps!r}: expected a number of passes, 0 for none")
        if not _number(self.correct_inputs) or not 0 <= self.correct_inputs <= 1:
            raise SpecError(f"correct_inputs={self.correct_inputs!r}: expected a share from 0 to 1")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class AWQOptions:
    """Options of AWQ.

    Attributes:
        points: How many exponents from 0 to 1 are tried for the scale of an input channel.
    """

    points: int = 20

    def __post_init__(self) -> None:
        if type(self.points) is not int or self.points < 1:
            raise SpecError(f"points={self.points!r}: expected at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

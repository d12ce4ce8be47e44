"""What calibration did, layer by layer, as values and as JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One Linear layer.

    Attributes:
        path: Its name in the model.
        algorithm: What chose its codes: ``"gptq"``, ``"awq"``, ``"awq+gptq"``, ``"imatrix"``, or ``"data-free"``
            where that was impossible; ``note`` then says why.
        tokens: Calibration tokens that reached it.
        error: Change of its outputs over those tokens, ``|y - y_float|^2 / |y_float|^2``; None if no token did.
        bits_per_weight: True bits, scales and zeros included.
        damping: Share of the mean Hessian diagonal that was added to it; None if nothing was factorised.
        exponent: AWQ's for its input channels, 0 if scaling them did not help; None where nothing before the layer absorbs
            a scale.
        note: What was out of the ordinary, else empty.
    """

    path: str
    algorithm: str
    tokens: int
    error: float | None
    bits_per_weight: float
    damping: float | None = None
    exponent: float | None = None
    note: str = ""


@dataclass(frozen=True)
class CalibrationReport:
    """The whole run.

    Attributes:
        layers: In the order in which they were quantized.
        seconds: Time taken; of an interrupted run, the time since it was resumed.
        resumed_blocks: Blocks that an earlier run had finished.
    """

    layers: tuple[LayerReport, ...]
    seconds: float = 0.0
    resumed_blocks: int = 0

    @property
    def fallbacks(self) -> tuple[LayerReport, ...]:
        """Layers that were quantized without data."""
        return tuple(layer for layer in self.layers if layer.algorithm == "data-free")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the report as a JSON object."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers in {self.seconds:.0f} s"]
        measured = [layer for layer in self.layers if layer.error is not None]
        if measured:
            worst = max(measured, key=lambda layer: layer.error or 0.0)
            lines.append(f"largest output error {worst.error:.2%}: {worst.path}")
        lines += [f"{layer.path}: {layer.note}" for layer in self.layers if layer.note]
        return "\n".join(lines)

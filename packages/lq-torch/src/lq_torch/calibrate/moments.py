"""What calibration keeps of a layer's inputs: their second moments, and the factor that GPTQ needs of them.

``H = sum x x^T`` over tokens is accumulated in float32 (products of fp16 and bf16 are exact there) and factorised in
float64. With the float model's inputs ``x_float`` beside the quantized model's ``x``, ``sum (x_float - x) x^T`` says what
an error-correcting weight has to make up for.
"""

from dataclasses import dataclass, field

import torch
from lq_formats import NonFiniteError
from torch import Tensor

DAMPING_STEPS = 3  # times ten each


@dataclass
class Moments:
    """Second moments of the inputs ``x: (tokens, K)`` that one or several Linear layers share.

    Attributes:
        hessian: ``(K, K) float32``, ``sum x x^T``; None before the first token.
        drift: ``(K, K) float32``, ``sum (x_float - x) x^T``; None if there is no float input to compare with, or it is
            not of the same tokens (an expert that the quantized model's router gives others).
        tokens: Number of tokens.
        members: Paths of the layers.
    """

    hessian: Tensor | None = None
    drift: Tensor | None = None
    tokens: int = 0
    members: list[str] = field(default_factory=list)

    def add(self, x: Tensor, x_float: Tensor | None = None) -> None:
        """Add inputs ``(..., K)``, and what the float model has in their place."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if not rows.shape[0]:
            return
        comparable = x_float is not None and x_float.shape == x.shape and (self.drift is not None or not self.tokens)
        self.tokens += rows.shape[0]
        self.hessian = _accumulate(self.hessian, rows, rows)
        if x_float is not None and comparable:
            self.drift = _accumulate(self.drift, x_float.detach().reshape(rows.shape) - rows, rows)
        else:
            self.drift = None

    def check_finite(self) -> None:
        """Raise NonFiniteError, naming the layers, if an input was NaN or infinite (or too large to square)."""
        if self.hessian is not None and not bool(torch.isfinite(self.hessian).all()):
            raise NonFiniteError(
                f"{', '.join(self.members)}: the activations that enter hold NaN or infinity, or their squares overflow "
                "float32; check the model (does it run in this dtype?) and the calibration tokens"
            )


def factor_inverse(hessian: Tensor, damping: float) -> tuple[Tensor, float] | None:
    """Return the upper triangular ``U (K, K) float64`` with ``U^T U = (H + d mean(diag H) I)^-1``, and the ``d`` used.

    ``d`` is ``damping``, or up to three times tenfold that; None if even that leaves H without a Cholesky factor.
    With J the reversal of the order, ``J H J = L L^T`` gives ``H = R R^T`` with ``R = J L J`` upper triangular, and
    ``U = R^-1``: one factorisation and one triangular inverse.
    """
    flipped = hessian.double().flip(0, 1)
    mean = flipped.diagonal().mean()
    identity = torch.eye(flipped.shape[0], dtype=torch.float64, device=flipped.device)
    for attempt in range(DAMPING_STEPS + 1):
        used = damping * 10**attempt
        lower, info = torch.linalg.cholesky_ex(flipped + used * mean * identity)
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return upper, used
    return None


def _accumulate(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        product = torch.mm(left.t(), right, out_dtype=torch.float32)  # tensor cores, sums in float32
    else:
        product = left.t().float() @ right.float()
    return product if total is None else total.add_(product)

"""Mixed precision: which bits and groups each layer gets, so that a budget of bits is spent where it is felt.

1. Sensitivity (:mod:`lq_torch.calibrate.sensitivity`): one layer at a time is quantized coarsely, by the algorithm that will
   quantize it, and the Kullback-Leibler divergence of the model's predictions on calibration text is measured.
2. Divergence grows with the squared error of a weight, so a candidate's is that measurement times the ratio of the errors
   that rounding to the candidate and to the coarse codes makes on a sample of rows.
3. Allocation: every layer starts at its cheapest candidate; the step that lowers the summed divergence most per bit is
   taken, again and again, as long as it fits. The sum of all codes, scales and zeros never exceeds the budget.
"""

import heapq
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from lq_formats import GroupSizeError, SpecError
from torch import Tensor, nn

from lq_torch.calibrate.blocks import split_batches
from lq_torch.calibrate.options import GPTQOptions
from lq_torch.calibrate.resume import SensitivityFile
from lq_torch.calibrate.sensitivity import COARSE, sensitivity
from lq_torch.calibrate.stages import kind
from lq_torch.config import Int4WeightOnlyConfig, WeightConfig
from lq_torch.config_intx import IntxWeightOnlyConfig
from lq_torch.quantize import FilterFn, check_linear, named, select_linears, why_none
from lq_torch.tensors import LowBitTensor

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128, 256)
_ROWS = 128  # of a weight, in the sample for errors


@dataclass(frozen=True)
class Candidate:
    """What a layer may become.

    Attributes:
        config: Its configuration.
        nbytes: Of codes, scales and zeros.
        divergence: Estimated, in nats a token.
    """

    config: WeightConfig
    nbytes: int
    divergence: float


def mixed_precision(
    model: nn.Module,
    tokens: Tensor,
    target_bits: float,
    *,
    gptq: GPTQOptions | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
    filter_fn: FilterFn | None = None,
    batch_size: int = 8,
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, WeightConfig]:
    """Choose a configuration for every layer within a budget.

    Args:
        model: Dense, on the device where it runs; unchanged afterwards.
        tokens: Calibration windows ``(windows, length)`` of token ids. Divergence is measured on about 4096 tokens of them.
        target_bits: Bits a weight on average, scales and zeros included. Never exceeded.
        gptq: Options of the GPTQ that will quantize the layers, which spares some of them much more than others; None if
            they will be rounded without data.
        symmetric: No zero points.
        scale_dtype: dtype of the scales; None for each weight's.
        filter_fn: Which layers; the default is that of :func:`lq_torch.quantize_`.
        batch_size: Windows at a time.
        resume: A folder that keeps what has been measured; also for other budgets.
        progress: Called with layers measured and layers in all.

    Returns:
        Configurations by path, for :func:`lq_torch.calibrate.gptq` and its siblings.

    Raises:
        SpecError: If the budget is no positive number or below the cheapest choice, or there is no layer, or ``resume``
            holds the state of another run.
        LQError: As :func:`lq_torch.quantize_` for a layer that cannot be quantized.
    """
    number = isinstance(target_bits, int | float) and not isinstance(target_bits, bool)
    if not (number and math.isfinite(target_bits) and target_bits > 0):
        raise SpecError(f"target_bits={target_bits!r}: expected a positive number of bits a weight")
    layers = dict(select_linears(model, filter_fn))
    if not layers:
        raise SpecError(f"there is no Linear layer to quantize: {why_none(model, filter_fn)}")
    for path, layer in layers.items():
        check_linear(path, layer)
    split_batches(tokens, batch_size)
    kept = SensitivityFile(resume, model, tokens, gptq)
    measured = fill_unreached(sensitivity(model, layers, tokens, gptq, batch_size, kept, progress))
    candidates = {
        path: _candidates(path, layer.weight.detach(), measured[path], symmetric, scale_dtype)
        for path, layer in layers.items()
    }
    weights = sum(layer.weight.numel() for layer in layers.values())
    return {path: chosen.config for path, chosen in allocate(candidates, int(target_bits * weights / 8)).items()}


def fill_unreached(measured: Mapping[str, float]) -> dict[str, float]:
    """Give layers that no token reached (idle experts, exactly 0) the median of layers whose paths differ in numbers only."""
    alike: dict[str, list[float]] = {}
    for path, value in measured.items():
        if value > 0:
            alike.setdefault(kind(path), []).append(value)
    return {path: value or median(alike.get(kind(path), [0.0])) for path, value in measured.items()}


def allocate(candidates: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, Candidate]:
    """Choose one candidate for each layer with little divergence in all, in at most ``budget`` bytes.

    Raises:
        SpecError: If the cheapest choice is larger.
    """
    chosen = {path: min(options, key=lambda option: option.nbytes) for path, options in candidates.items()}
    left = budget - sum(candidate.nbytes for candidate in chosen.values())
    if left < 0:
        raise SpecError(
            f"{budget} bytes were asked for: the least these layers take is {budget - left}; raise --target-bits"
        )
    steps: list[tuple[float, str, int]] = []

    def offer(path: str) -> None:
        """Put the affordable step that buys most a byte among the steps."""
        now = chosen[path]
        rates = [
            ((now.divergence - option.divergence) / (option.nbytes - now.nbytes), number)
            for number, option in enumerate(candidates[path])
            if 0 < option.nbytes - now.nbytes <= left and option.divergence < now.divergence
        ]
        if rates:
            rate, number = max(rates)
            heapq.heappush(steps, (-rate, path, number))

    for path in candidates:
        offer(path)
    while steps:
        _, path, number = heapq.heappop(steps)
        step = candidates[path][number]
        cost = step.nbytes - chosen[path].nbytes
        if cost <= left:
            left -= cost
            chosen[path] = step
        offer(path)
    return chosen


def _candidates(
    path: str, w: Tensor, measured: float, symmetric: bool, scale_dtype: torch.dtype | None
) -> list[Candidate]:
    sample = w[:: max(1, w.shape[0] // _ROWS)]
    coarse = _squared_error(sample, COARSE.quantize(sample))
    found = []
    with named(path):
        for bits in BITS:
            for group_size in GROUPS:
                if w.shape[1] % group_size:
                    continue
                config: WeightConfig = (
                    Int4WeightOnlyConfig(group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
                    if bits == 4
                    else IntxWeightOnlyConfig(
                        bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype
                    )
                )
                packed = config.quantize(sample)
                nbytes = packed.packed_nbytes // max(sample.shape[0], 1) * w.shape[0]
                ratio = _squared_error(sample, packed) / coarse if coarse else 0.0
                found.append(Candidate(config, nbytes, measured * ratio))
        if not found:
            raise GroupSizeError(
                f"no group size of {', '.join(map(str, GROUPS))} divides in_features={w.shape[1]}; leave it out"
            )
    return found


def _squared_error(w: Tensor, packed: LowBitTensor) -> float:
    return float((packed.dequantize(torch.float32) - w.float()).square().sum())

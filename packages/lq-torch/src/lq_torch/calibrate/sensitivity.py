"""How much a model's predictions suffer from rounding one layer: the Kullback-Leibler divergence, measured.

How much of the rounding GPTQ can make up for differs a lot between layers (by a factor of 18 on the bundled model: inputs of
a value projection that hardly vary leave it free), so what is measured is what the algorithm that will be used leaves.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from lq_formats import NonFiniteError
from torch import Tensor, nn

from lq_torch.calibrate.blocks import checked_lookups, evaluation, find_blocks, record_stream, split_batches
from lq_torch.calibrate.layers import quantize_together
from lq_torch.calibrate.options import GPTQOptions
from lq_torch.calibrate.resume import SensitivityFile
from lq_torch.calibrate.stages import measure
from lq_torch.calibrate.target import target_of
from lq_torch.config_intx import IntxWeightOnlyConfig
from lq_torch.quantize import named

COARSE = IntxWeightOnlyConfig(bits=3, group_size=-1, symmetric=False)
_SAMPLE, _LENGTH = 4096, 512  # tokens that divergence is measured on, and of a window at most


def sensitivity(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    tokens: Tensor,
    gptq: GPTQOptions | None,
    batch_size: int,
    kept: SensitivityFile,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Return KL(model || model with one layer at 3 bits), in nats a token, for every layer.

    Args:
        model: Dense, on the device where it runs; unchanged afterwards.
        layers: By path.
        tokens: Calibration windows.
        gptq: Quantize by GPTQ with these options, but no descent; None to round without data.
        batch_size: Windows at a time.
        kept: What has been measured before, and where to keep the rest.
        progress: Called with layers measured and layers in all.

    Raises:
        NonFiniteError: If activations or predictions hold NaN or infinity.
        UnsupportedError: With ``gptq``, if the model is no chain of blocks.
    """
    length = min(tokens.shape[1], _LENGTH)
    sample = split_batches(tokens[: -(-_SAMPLE // length), :length], 1)
    missing = {path: layer for path, layer in layers.items() if path not in kept.known}
    with torch.no_grad(), evaluation(model):
        with checked_lookups(model):
            expected = [_log_probabilities(model, window) for window in sample] if missing else []
        if any(bool(log_p.isnan().any()) for log_p in expected):
            raise NonFiniteError(
                "the model's predictions for the calibration text hold NaN; does it run in this dtype?"
            )
        for path, coarse in _coarse_weights(model, missing, split_batches(tokens, batch_size), gptq):
            layer = missing[path]
            exact, layer.weight.data = layer.weight.data, coarse
            try:
                total = sum(_divergence(log_p, model, window) for window, log_p in zip(sample, expected, strict=True))
            finally:
                layer.weight.data = exact
            if not math.isfinite(total):
                raise NonFiniteError(f"{path}: with its weight at 3 bits, the model's predictions hold NaN or infinity")
            kept.add(path, max(total, 0.0) / (len(sample) * length))
            if progress is not None:
                progress(len(layers.keys() & kept.known.keys()), len(layers))
    return {path: kept.known[path] for path in layers}


def _coarse_weights(
    model: nn.Module, layers: Mapping[str, nn.Linear], batches: Sequence[Tensor], gptq: GPTQOptions | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield each layer's coarse weight; the model between two of them is as it was."""
    calibrated = set()
    if gptq is not None and layers:
        for path, weight in _calibrated(model, layers, batches, replace(gptq, sweeps=0, correct_inputs=0)):
            yield path, weight
            calibrated.add(path)
    for path, layer in layers.items():
        if path not in calibrated:
            yield path, COARSE.quantize(layer.weight.detach()).dequantize()


def _calibrated(
    model: nn.Module, layers: Mapping[str, nn.Linear], batches: Sequence[Tensor], gptq: GPTQOptions
) -> Iterator[tuple[str, Tensor]]:
    """Yield what GPTQ makes of the layers of a model's blocks that tokens reach, given the float model's activations."""
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    stream = record_stream(model, blocks, batches, device, device)
    for number, (path, block) in enumerate(blocks):
        inside = {name: layer for name, layer in block.named_modules() if f"{path}.{name}" in layers}
        linears = {name: layer for name, layer in inside.items() if isinstance(layer, nn.Linear)}
        with named(path):
            found = measure(linears, stream.runs(number, block)) if linears else []
        for moments in found:
            for name in moments.members:
                weight = linears[name].weight.detach()
                outcomes = quantize_together({name: weight}, moments, target_of(COARSE, weight.dtype), gptq)
                if outcomes is not None:
                    yield f"{path}.{name}", outcomes[name].weight.dequantize()
        if number < len(blocks) - 1:
            stream.advance(number, path, block)


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    output = model(ids.to(next(model.parameters()).device), **options)
    return torch.log_softmax(getattr(output, "logits", output).float(), dim=-1)


def _divergence(log_p: Tensor, model: nn.Module, ids: Tensor) -> float:
    """Return the summed divergence of a window's predictions from ``log_p``."""
    impossible = log_p == -torch.inf  # for both models: tokens that padded the vocabulary
    terms = (log_p - _log_probabilities(model, ids)) * log_p.exp()
    return float(terms.masked_fill_(impossible, 0.0).sum())

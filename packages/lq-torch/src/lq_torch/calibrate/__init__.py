"""Calibration: choose codes by what they do to a model's activations on a text. GPTQ, AWQ, both in turn; ggml's blocks."""

import os
from collections.abc import Mapping
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from lq_torch.calibrate.mixed import mixed_precision
from lq_torch.calibrate.options import AWQOptions, GPTQOptions
from lq_torch.calibrate.report import CalibrationReport, LayerReport
from lq_torch.calibrate.sequential import Progress, calibrate
from lq_torch.config import WeightConfig
from lq_torch.quantize import FilterFn

__all__ = [
    "AWQOptions",
    "CalibrationReport",
    "GPTQOptions",
    "LayerReport",
    "RunOptions",
    "awq",
    "awq_gptq",
    "gptq",
    "imatrix",
    "mixed_precision",
]


class RunOptions(TypedDict, total=False):
    """How a calibration runs; none of this changes what is computed, apart from the batch size's rounding.

    Attributes:
        filter_fn: ``(module, path) -> bool``; which ``nn.Linear`` layers. Default as for :func:`lq_torch.quantize_`.
        batch_size: Windows at a time.
        device: Where blocks compute, one at a time; default: where the model is.
        offload: Keep activations in host memory, all but a batch.
        resume: Folder for the state of a run that may be interrupted; finished blocks in it are not computed again.
        progress: Called as ``progress(layers done, layers in all, report of the layer)``.
    """

    filter_fn: FilterFn | None
    batch_size: int
    device: torch.device | str | None
    offload: bool
    resume: str | os.PathLike[str] | None
    progress: Progress | None


def gptq(
    model: nn.Module,
    tokens: Tensor,
    config: WeightConfig | Mapping[str, WeightConfig],
    options: GPTQOptions | None = None,
    **run: Unpack[RunOptions],
) -> CalibrationReport:
    """Quantize a decoder model in place by GPTQ (Frantar et al., 2022), then descent on codes, scales and zeros.

    Args:
        model: A dense causal language model of chained decoder blocks.
        tokens: Calibration windows ``(windows, length)`` of token ids.
        config: ``Int4WeightOnlyConfig`` or ``IntxWeightOnlyConfig``; weights become what ``quantize_`` makes of it. Or
            one for each layer, by path (:func:`mixed_precision` finds them).
        options: Of the algorithm.
        run: See :class:`RunOptions`.

    Returns:
        What was done to every layer. Layers that no token reaches, or whose Hessian cannot be factorised, are quantized
        without data, and say so there.

    Raises:
        SpecError: If an argument is not what it should be, or the resume folder holds another run.
        NonFiniteError: If weights or activations hold NaN or infinity; the layer is named.
        UnsupportedError: If the model is no chain of blocks, or the configuration has no codes to choose.
        LQError: As :func:`lq_torch.quantize_` for a layer that cannot be quantized so; the model is then as it was.
    """
    return calibrate(model, tokens, config, gptq=options or GPTQOptions(), awq=None, **run)


def awq(
    model: nn.Module,
    tokens: Tensor,
    config: WeightConfig | Mapping[str, WeightConfig],
    options: AWQOptions | None = None,
    **run: Unpack[RunOptions],
) -> CalibrationReport:
    """Quantize a decoder model in place by AWQ (Lin et al., 2023): scale salient channels up, then search ranges.

    Arguments, result and errors are those of :func:`gptq`.
    """
    return calibrate(model, tokens, config, gptq=None, awq=options or AWQOptions(), **run)


def awq_gptq(
    model: nn.Module,
    tokens: Tensor,
    config: WeightConfig | Mapping[str, WeightConfig],
    awq_options: AWQOptions | None = None,
    gptq_options: GPTQOptions | None = None,
    **run: Unpack[RunOptions],
) -> CalibrationReport:
    """Scale channels as :func:`awq` does, then choose codes as :func:`gptq` does.

    Arguments, result and errors are those of :func:`gptq`.
    """
    return calibrate(model, tokens, config, gptq=gptq_options or GPTQOptions(), awq=awq_options or AWQOptions(), **run)


def imatrix(
    model: nn.Module,
    tokens: Tensor,
    config: WeightConfig | Mapping[str, WeightConfig],
    **run: Unpack[RunOptions],
) -> CalibrationReport:
    """Quantize a decoder model in place to ggml blocks, scales searched by the mean square of what enters each column.

    This is llama.cpp's "importance matrix", with what the quantized blocks in front of a layer make of the text.

    Args:
        model: A dense causal language model of chained decoder blocks.
        tokens: Calibration windows ``(windows, length)`` of token ids.
        config: ``GGMLWeightOnlyConfig`` of a type with a search (q4_0, iq4_nl, q4_k, q5_k, q6_k), or one for each layer, by
            path.
        run: See :class:`RunOptions`.

    Returns:
        What was done to every layer. Layers that no token reaches are quantized without an importance, and say so there.

    Raises:
        UnsupportedError: If the model is no chain of blocks, or the configuration takes no importance.
        LQError: Otherwise as :func:`gptq`.
    """
    return calibrate(model, tokens, config, gptq=None, awq=None, **run)

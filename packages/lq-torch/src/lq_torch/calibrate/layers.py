"""Quantizing Linear layers that share their inputs, from the moments of these: GPTQ, searched scales, ggml blocks."""

from dataclasses import dataclass

import torch
from lq_formats import choose_qparams, search_qparams
from torch import Tensor

from lq_torch.calibrate.moments import Moments, factor_inverse
from lq_torch.calibrate.options import GPTQOptions
from lq_torch.calibrate.solve import Quantized, descend, gptq_codes, nearest_codes, output_error
from lq_torch.calibrate.target import Target
from lq_torch.tensors import GGMLTensor, LowBitTensor


@dataclass(frozen=True)
class Outcome:
    """A quantized weight and what is to be said of it.

    Attributes:
        weight: The tensor subclass.
        error: ``|y - y_float|^2 / |y_float|^2`` over the calibration tokens.
        damping: What was added to the Hessian, as a share of its mean diagonal; None without a factorisation.
        note: What was out of the ordinary.
    """

    weight: LowBitTensor
    error: float
    damping: float | None = None
    note: str = ""


def quantize_together(
    weights: dict[str, Tensor], moments: Moments, target: Target, options: GPTQOptions | None
) -> dict[str, Outcome] | None:
    """Quantize the weights of layers with one input.

    Args:
        weights: ``(N_i, K)`` by path.
        moments: Of their input, at least one token.
        target: What they become.
        options: GPTQ's; None to search scales by what enters, and round to nearest.

    Returns:
        What became of each; None if the Hessian has no Cholesky factor even with the largest damping.
    """
    assert moments.hessian is not None
    hessian = moments.hessian / moments.tokens
    wanted = torch.cat([w.detach().float() for w in weights.values()])
    dead = hessian.diagonal() == 0
    w = wanted.masked_fill(dead, 0.0)
    hessian.diagonal().masked_fill_(dead, 1.0)
    notes = (
        [f"{int(dead.sum())} of {len(dead)} inputs are always 0: their weights were taken for 0"]
        if bool(dead.any())
        else []
    )
    damping = None
    if options is None:
        found = _searched(w, hessian.diagonal(), target)
    else:
        solved = _gptq(w, hessian, moments, target, options)
        if solved is None:
            return None
        found, damping = solved
        if damping > options.damping:
            notes.append(f"the Hessian had no Cholesky factor: damping was raised to {damping:g}")
    hessian.diagonal().masked_fill_(dead, 0.0)
    errors = output_error(found.values(), wanted, hessian)
    norms = output_error(torch.zeros_like(wanted), wanted, hessian)
    parts = found.stored(target.spec)
    outcomes = {}
    start = 0
    for path, weight in weights.items():
        rows = slice(start, start + weight.shape[0])
        start = rows.stop
        codes, scale, zero = (None if part is None else part[rows].contiguous() for part in parts)
        assert codes is not None
        assert scale is not None
        built = target.build(codes, scale, zero, weight.dtype)
        norm = float(norms[rows].sum())
        outcomes[path] = Outcome(built, float(errors[rows].sum()) / norm if norm else 0.0, damping, "; ".join(notes))
    return outcomes


def quantize_blocks_together(weights: dict[str, Tensor], moments: Moments, ggml_type: str) -> dict[str, Outcome]:
    """Quantize the weights of layers with one input to ggml blocks, whose scales are searched by what enters each column.

    Args:
        weights: ``(N_i, K)`` by path.
        moments: Of their input, at least one token. Their diagonal is the importance.
        ggml_type: A type with a search.
    """
    assert moments.hessian is not None
    hessian = moments.hessian / moments.tokens
    outcomes = {}
    for path, weight in weights.items():
        built = GGMLTensor.from_hp(weight, ggml_type, hessian.diagonal())
        wanted = weight.float()
        error = float(output_error(built.dequantize(torch.float32), wanted, hessian).sum())
        norm = float(output_error(torch.zeros_like(wanted), wanted, hessian).sum())
        outcomes[path] = Outcome(built, error / norm if norm else 0.0)
    return outcomes


def _searched(w: Tensor, importance: Tensor, target: Target) -> Quantized:
    spec = target.spec
    if not w.shape[0]:
        scale, zero = choose_qparams(w, spec)
    else:
        scale, zero = search_qparams(w, spec, "mse", importance)
    middle = torch.full_like(scale, spec.midpoint, dtype=torch.float32) if zero is None else zero.float()
    return nearest_codes(w, scale.float(), middle, spec)


def _gptq(
    w: Tensor, hessian: Tensor, moments: Moments, target: Target, options: GPTQOptions
) -> tuple[Quantized, float] | None:
    diagonal = hessian.diagonal()
    order = torch.arange(len(diagonal), device=w.device)
    if options.activation_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    factored = factor_inverse(hessian[order][:, order], options.damping)
    if factored is None:
        return None
    upper, damping = factored
    damped = hessian.clone()
    damped.diagonal().add_(damping * diagonal.mean())
    if options.correct_inputs and moments.drift is not None:
        w = w + options.correct_inputs * _correction(w, moments.drift / moments.tokens, upper, order)
    # 1 / U_ii^2 is what an error in column i costs after the columns behind it have made up for it.
    cost = torch.empty_like(diagonal)
    cost[order] = upper.diagonal().square().reciprocal().float()
    start = _searched(w, cost, target)
    found = gptq_codes(w, start.scale, start.zero, target.spec, upper.float(), order)
    return descend(found, w, damped, target.spec, sweeps=options.sweeps), damping


def _correction(w: Tensor, drift: Tensor, upper: Tensor, order: Tensor) -> Tensor:
    """Return ``w (sum (x_float - x) x^T) H^-1``: what w must add for the quantized inputs to give the float outputs."""
    target = (w @ drift)[:, order].double()
    solved = target @ upper.t() @ upper
    back = torch.empty_like(solved)
    back[:, order] = solved
    return back.float()

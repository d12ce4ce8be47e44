"""How far a quantized model is from the float one: KL divergence and top-1 agreement, token by token.

``KL(float || quantized) = sum_v p_float(v) (log p_float(v) - log p_quantized(v))`` in nats, averaged over the same
positions that the perplexity protocol scores. Unlike perplexity it cannot improve by chance: it is 0 only for equal
distributions. Top-1 agreement is the share of positions where both models would greedily choose the same token.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from lq_formats import SpecError
from torch import Tensor, nn

from lq_eval.perplexity import (
    PROTOCOLS,
    Accumulator,
    Perplexity,
    Protocol,
    batches,
    forward,
    model_input,
)


@dataclass(frozen=True)
class Divergence:
    """Distance of one model's predictions from the reference model's.

    Attributes:
        kl: Mean KL(reference || model) in nats.
        kl_stderr: Its standard error over windows; NaN with a single window.
        top1: Share of positions with the same most likely token, 0 to 1.
        positions: Number of positions compared.
    """

    kl: float
    kl_stderr: float
    top1: float
    positions: int


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        reference: Perplexity of the reference model.
        perplexity: Perplexity of every candidate.
        divergence: Divergence of every candidate from the reference.
    """

    reference: Perplexity
    perplexity: Mapping[str, Perplexity]
    divergence: Mapping[str, Divergence]


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) in nats of two tensors of log probabilities ``(..., vocabulary)`` in float32: ``(...)``."""
    p = log_p.exp()
    # What cannot come counts 0, whatever the other model says of it: where both exclude it, it would be infinity less infinity.
    # The sum is at least 0; rounding may leave it a few 1e-8 below for equal models.
    return (log_p - log_q).mul_(p).masked_fill_(p == 0, 0).sum(dim=-1).clamp_(min=0)


def compare(
    reference: nn.Module,
    candidates: Mapping[str, nn.Module],
    windows: Tensor,
    *,
    batch_size: int = 4,
    rules: Protocol = PROTOCOLS["windows"],
    bos: int | None = None,
    progress: Callable[[int], None] | None = None,
    seconds: float = math.inf,
) -> Comparison:
    """Measure perplexity and divergence of several models in one pass over the windows.

    The reference runs once a batch, whatever the number of candidates, and no logits are kept between batches.

    Args:
        reference: The unquantized model.
        candidates: Models with the same vocabulary, on the same device, by name.
        windows: ``(windows, seq_len) int64``.
        batch_size: Windows at a time.
        rules: The perplexity protocol.
        bos: The tokenizer's BOS token, for the protocols that use it.
        progress: Called with the number of windows after each forward pass of any model.
        seconds: Start no further batch after this time: every model has then seen the same first windows.

    Raises:
        SpecError: If ``batch_size`` is not positive, the protocol lacks its BOS token, or a candidate has another
            vocabulary than the reference.
    """
    for name, model in candidates.items():
        _check_vocabulary(name, _vocabulary(model), _vocabulary(reference))
    device = next(reference.parameters()).device
    total = Accumulator()
    totals = {name: Accumulator() for name in candidates}
    kl: dict[str, list[float]] = {name: [] for name in candidates}
    agreed = dict.fromkeys(candidates, 0)
    positions = 0

    with torch.inference_mode():
        deadline = time.monotonic() + seconds
        for batch in batches(windows, batch_size):
            if positions and time.monotonic() > deadline:
                break
            ids = model_input(batch.to(device), rules, bos)
            log_p, best, scores, seconds = _predict(reference, ids)
            total.add(scores, ids.numel(), seconds)
            positions += best.numel()
            if progress is not None:
                progress(batch.shape[0])
            for name, model in candidates.items():
                log_q, choice, scores, seconds = _predict(model, ids)
                _check_vocabulary(name, log_q.shape[-1], log_p.shape[-1])
                totals[name].add(scores, ids.numel(), seconds)
                kl[name] += kl_divergence(log_p, log_q).double().mean(dim=1).tolist()
                # NaN is no choice, though argmax takes it for the largest.
                agreed[name] += int((choice == best).logical_and_(scores.isnan().logical_not_()).sum())
                if progress is not None:
                    progress(batch.shape[0])

    return Comparison(
        total.result(),
        {name: accumulator.result() for name, accumulator in totals.items()},
        {name: _divergence(kl[name], agreed[name] / positions, positions) for name in candidates},
    )


def _vocabulary(model: nn.Module) -> int | None:
    """Return how many tokens a model knows, if its configuration says so."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def _check_vocabulary(name: str, size: int | None, expected: int | None) -> None:
    if size is not None and expected is not None and size != expected:
        raise SpecError(
            f"the model {name!r} knows {size} tokens and its reference {expected}: KL divergence compares models of one "
            "vocabulary; give the float model that it was made of"
        )


def _predict(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return log probabilities ``(B, T - 1, V)``, best tokens and scores ``(B, T - 1)``, and the seconds it took."""
    logits, seconds = forward(model, ids)
    logits = logits[:, :-1].float()
    log_q = torch.log_softmax(logits, dim=-1)
    scores = -log_q.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return log_q, logits.argmax(dim=-1), scores, seconds


def _divergence(means: list[float], top1: float, positions: int) -> Divergence:
    values = torch.tensor(means, dtype=torch.float64)
    stderr = float(values.std()) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Divergence(float(values.mean()), stderr, top1, positions)

"""Perplexity by named protocols, with its standard error.

A protocol fixes everything that changes the figure. Both of these cut the text into consecutive windows of ``seq_len``
tokens that do not overlap, tokenized once without special tokens, and average the negative log likelihood over all
scored tokens (not over windows)::

    windows       w1 w2 w3 ... wT    w2 ... wT are scored: T - 1 a window, each from its predecessors in the window
    windows-bos   <bos> w1 ... wT    w1 ... wT are scored: T a window

``windows`` is what the figures of lq's documentation use: the bundled model on the bundled text has perplexity 23.651
over the first 51,200 tokens (200 windows of 256, 51,000 scored).

The standard error treats windows as independent: it is the standard error of the mean of the window means, carried
through the exponential (``ppl * se``). Two models on the same windows differ by much less than this error, because their
errors are the same; compare those by :mod:`lq_eval.divergence`.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from lq_formats import SpecError
from torch import Tensor, nn


@dataclass(frozen=True)
class Protocol:
    """How a text becomes scored tokens.

    Attributes:
        name: The name users type.
        bos: Prefix each window with the tokenizer's beginning-of-sequence token and score the window's first token.
    """

    name: str
    bos: bool


PROTOCOLS = MappingProxyType({p.name: p for p in (Protocol("windows", False), Protocol("windows-bos", True))})


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how it came about.

    Attributes:
        value: ``exp`` of the mean negative log likelihood.
        stderr: Its standard error; NaN with a single window.
        scored: Number of scored tokens.
        windows: Number of windows.
        tokens: Number of tokens that went through the model.
        seconds: Time spent in the model, without scoring.
        tokens_per_second: Median over batches of the tokens that went through the model per second (prefill: whole
            windows at once). The median leaves out the first batch's allocations and what else the machine did.
    """

    value: float
    stderr: float
    scored: int
    windows: int
    tokens: int
    seconds: float
    tokens_per_second: float


def protocol(name: str) -> Protocol:
    """Return the protocol called ``name``.

    Raises:
        SpecError: If there is none.
    """
    found = PROTOCOLS.get(name)
    if found is None:
        raise SpecError(f"unknown perplexity protocol {name!r}: expected one of {', '.join(PROTOCOLS)}")
    return found


def batches(windows: Tensor, batch_size: int) -> list[Tensor]:
    """Cut ``windows: (W, T)`` into consecutive batches of at most ``batch_size`` windows.

    Raises:
        SpecError: If ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise SpecError(f"batch_size={batch_size}: expected at least 1")
    return [windows[start : start + batch_size] for start in range(0, windows.shape[0], batch_size)]


def model_input(batch: Tensor, rules: Protocol, bos: int | None) -> Tensor:
    """Return what the model reads for windows ``(B, T)``: ``(B, T)``, or ``(B, T + 1)`` with a BOS token.

    Raises:
        SpecError: If the protocol needs a BOS token and the tokenizer has none.
    """
    if not rules.bos:
        return batch
    if bos is None:
        raise SpecError(f"the protocol {rules.name!r} needs a tokenizer with a BOS token; use 'windows'")
    return torch.cat([batch.new_full((batch.shape[0], 1), bos), batch], dim=1)


def forward(model: nn.Module, ids: Tensor) -> tuple[Tensor, float]:
    """Run the model on ``ids: (B, T)``.

    Returns:
        Logits ``(B, T, vocabulary)`` and the seconds it took (the GPU is waited for).
    """
    # A causal LM of transformers would otherwise build a key-value cache that nobody reads.
    options: dict[str, Any] = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    _wait(ids.device)
    start = time.perf_counter()
    output = model(ids, **options)
    _wait(ids.device)
    seconds = time.perf_counter() - start
    logits: Tensor = getattr(output, "logits", output)
    return logits, seconds


def negative_log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """Return ``-log p(ids[:, t + 1] | ids[:, : t + 1])`` in float32: ``(B, T) -> (B, T - 1)``."""
    scores = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    return scores.view(ids.shape[0], -1)


class Accumulator:
    """Sums window by window what a :class:`Perplexity` needs."""

    def __init__(self) -> None:
        self._windows: list[float] = []
        self._scored = 0
        self._tokens = 0
        self._seconds: list[float] = []
        self._rates: list[float] = []

    def add(self, scores: Tensor, tokens: int, seconds: float) -> None:
        """Add the scores ``(B, T - 1)`` of one batch."""
        self._windows += scores.double().mean(dim=1).tolist()
        self._scored += scores.numel()
        self._tokens += tokens
        self._seconds.append(seconds)
        self._rates.append(tokens / max(seconds, 1e-9))

    def result(self) -> Perplexity:
        """Return the perplexity over everything that was added (windows are equally long)."""
        means = torch.tensor(self._windows, dtype=torch.float64)
        try:
            value = math.exp(float(means.mean()))
        except OverflowError:  # a broken model's
            value = math.inf
        stderr = value * float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else math.nan
        return Perplexity(
            value,
            stderr,
            self._scored,
            len(means),
            self._tokens,
            sum(self._seconds),
            statistics.median(self._rates),
        )


def measure_perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    batch_size: int = 4,
    rules: Protocol = PROTOCOLS["windows"],
    bos: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a causal language model.

    Args:
        model: Maps token ids ``(B, T)`` to logits ``(B, T, vocabulary)``, or to an object that has them as ``logits``.
        windows: ``(windows, seq_len) int64``, from :func:`lq_eval.corpus.make_windows`.
        batch_size: Windows at a time.
        rules: The protocol.
        bos: The tokenizer's BOS token, for the protocols that use it.
        progress: Called with the number of windows after each batch.

    Raises:
        SpecError: If ``batch_size`` is not positive, or the protocol lacks its BOS token.
    """
    device = next(model.parameters()).device
    total = Accumulator()
    with torch.inference_mode():
        for batch in batches(windows, batch_size):
            ids = model_input(batch.to(device), rules, bos)
            logits, seconds = forward(model, ids)
            total.add(negative_log_likelihood(logits, ids), ids.numel(), seconds)
            if progress is not None:
                progress(batch.shape[0])
    return total.result()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

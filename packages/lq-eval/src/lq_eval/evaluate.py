"""Evaluating one model under several schemes: the work behind ``lq-eval demo`` and ``lq-eval ppl``."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lq_torch import WeightConfig, quantize_
from torch import Tensor, nn

from lq_eval.bench.model import decode_tokens_per_second
from lq_eval.divergence import Divergence, compare
from lq_eval.models import ModelSize, model_size
from lq_eval.perplexity import PROTOCOLS, Perplexity, Protocol, measure_perplexity

DECODE_PROMPT = 64  # tokens, or a whole window where that is shorter


@dataclass(frozen=True)
class Evaluation:
    """One row of the table.

    Attributes:
        scheme: Name of the scheme; ``"float"`` for the unquantized model.
        size: What the model takes.
        perplexity: On the windows given.
        change_percent: Change of perplexity against the float model, or None without one.
        divergence: Distance from the float model, or None if it was not measured.
        decode_tokens_per_second: Greedy decoding of one sequence, or None if it was not measured.
    """

    scheme: str
    size: ModelSize
    perplexity: Perplexity
    change_percent: float | None
    divergence: Divergence | None
    decode_tokens_per_second: float | None

    def row(self) -> dict[str, Any]:
        """Return the row as flat JSON values."""
        size = {**asdict(self.size), "bits_per_weight": self.size.bits_per_weight}
        score = asdict(self.perplexity)
        return {
            "scheme": self.scheme,
            **size,
            "perplexity": score.pop("value"),
            "prefill_tokens_per_second": score.pop("tokens_per_second"),
            **score,
            "change_percent": self.change_percent,
            **(asdict(self.divergence) if self.divergence else {}),
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    Attributes:
        batch_size: Windows at a time.
        rules: The perplexity protocol.
        bos: The tokenizer's BOS token.
        decode_tokens: Tokens to decode for the decoding speed; 0 not to measure it.
        dense_bytes: Bytes at which unquantized parameters are counted.
        seconds: Stop :func:`evaluate_together` after this time, with the windows done so far.
    """

    batch_size: int = 4
    rules: Protocol = PROTOCOLS["windows"]
    bos: int | None = None
    decode_tokens: int = 0
    dense_bytes: int = 2
    seconds: float = math.inf


def quantized_copy(model: nn.Module, config: WeightConfig) -> nn.Module:
    """Return a quantized copy of ``model``, which is left as it is."""
    duplicate = copy.deepcopy(model)
    quantize_(duplicate, config, progress=False)
    return duplicate


def evaluate_together(
    model: nn.Module,
    configs: Mapping[str, WeightConfig],
    windows: Tensor,
    settings: Settings,
    progress: Callable[[int], None] | None = None,
) -> list[Evaluation]:
    """Evaluate a float model and quantized copies of it side by side: perplexity, divergence, size and speed.

    All copies are in memory at once and each batch runs through every one of them, so the float model runs only once.
    Meant for small models; see :func:`evaluate_in_turn` for others.

    Args:
        model: The float model.
        configs: lq_torch configurations by name.
        windows: ``(windows, seq_len) int64``.
        settings: How to evaluate.
        progress: Called with the number of windows after each forward pass.
    """
    copies = {name: quantized_copy(model, config) for name, config in configs.items()}
    found = compare(
        model,
        copies,
        windows,
        batch_size=settings.batch_size,
        rules=settings.rules,
        bos=settings.bos,
        progress=progress,
        seconds=settings.seconds,
    )
    rows = [_evaluation("float", model, found.reference, None, None, windows, settings)]
    for name, quantized in copies.items():
        rows.append(
            _evaluation(
                name, quantized, found.perplexity[name], found.reference, found.divergence[name], windows, settings
            )
        )
    return _with_float_size(rows, settings)


def evaluate_in_turn(
    model: nn.Module,
    configs: Mapping[str, WeightConfig],
    windows: Tensor,
    settings: Settings,
    *,
    divergence: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[Evaluation]:
    """Evaluate a float model, then one scheme after another; at most one quantized copy is in memory.

    Args:
        model: The float model. Without ``divergence``, the last scheme is quantized in place to save memory.
        configs: lq_torch configurations by name.
        windows: ``(windows, seq_len) int64``.
        settings: How to evaluate.
        divergence: Also run the float model beside each scheme, for KL divergence and agreement.
        progress: Called with the number of windows after each forward pass.
    """
    options: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "rules": settings.rules,
        "bos": settings.bos,
        "progress": progress,
    }
    reference = measure_perplexity(model, windows, **options)
    rows = [_evaluation("float", model, reference, None, None, windows, settings)]
    last = list(configs)[-1] if configs else None
    for name, config in configs.items():
        if not divergence and name == last:
            quantize_(model, config, progress=False)
            quantized = model
        else:
            quantized = quantized_copy(model, config)
        if divergence:
            found = compare(model, {name: quantized}, windows, **options)
            score, distance = found.perplexity[name], found.divergence[name]
        else:
            score, distance = measure_perplexity(quantized, windows, **options), None
        rows.append(_evaluation(name, quantized, score, reference, distance, windows, settings))
        del quantized
    return _with_float_size(rows, settings)


def evaluate_one(
    model: nn.Module,
    name: str,
    windows: Tensor,
    settings: Settings,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate one model as it is (one that was saved quantized, for example)."""
    score = measure_perplexity(
        model, windows, batch_size=settings.batch_size, rules=settings.rules, bos=settings.bos, progress=progress
    )
    return _evaluation(name, model, score, None, None, windows, settings)


def evaluate_against(
    model: nn.Module,
    name: str,
    baseline: nn.Module,
    windows: Tensor,
    settings: Settings,
    progress: Callable[[int], None] | None = None,
) -> list[Evaluation]:
    """Evaluate a model as it is beside the float model that it was made of, which comes first in the result."""
    found = compare(
        baseline,
        {name: model},
        windows,
        batch_size=settings.batch_size,
        rules=settings.rules,
        bos=settings.bos,
        progress=progress,
    )
    rows = [_evaluation("float", baseline, found.reference, None, None, windows, settings)]
    rows.append(
        _evaluation(name, model, found.perplexity[name], found.reference, found.divergence[name], windows, settings)
    )
    return _with_float_size(rows, settings)


def document(rows: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the last row as the JSON values of ``lq-eval ppl --json``; null where something was not measured.

    ``baseline_perplexity`` is that of the float model, if it was evaluated too.
    """
    last = rows[-1]
    reference = next((row.perplexity.value for row in rows if row.scheme == "float"), None)
    return {
        "scheme": last.scheme,
        "perplexity": _finite(last.perplexity.value),
        "perplexity_stderr": _finite(last.perplexity.stderr),
        "baseline_perplexity": _finite(reference),
        "change_percent": _finite(last.change_percent),
        "kl_divergence": _finite(last.divergence.kl) if last.divergence else None,
        "top1_agreement": last.divergence.top1 if last.divergence else None,
        "tokens": last.perplexity.tokens,
        "tokens_per_second": last.perplexity.tokens_per_second,
        "bits_per_weight": _finite(last.size.bits_per_weight),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _evaluation(
    name: str,
    model: nn.Module,
    score: Perplexity,
    reference: Perplexity | None,
    distance: Divergence | None,
    windows: Tensor,
    settings: Settings,
) -> Evaluation:
    speed = None
    if settings.decode_tokens:
        speed = decode_tokens_per_second(model, windows[:1, :DECODE_PROMPT], settings.decode_tokens)
    change = None if reference is None else (score.value / reference.value - 1) * 100
    return Evaluation(name, model_size(model, settings.dense_bytes), score, change, distance, speed)


def _with_float_size(rows: list[Evaluation], settings: Settings) -> list[Evaluation]:
    """Give the float model's row the size of those linear weights that the schemes quantize."""
    if len(rows) < 2:
        return rows
    weights = rows[1].size.linear_weights
    size = replace(rows[0].size, linear_bytes=weights * settings.dense_bytes, linear_weights=weights)
    return [replace(rows[0], size=size), *rows[1:]]


def window_passes(windows: Tensor, schemes: int, *, together: bool, divergence: bool = True) -> int:
    """Return how many windows go through a model in all, for a progress bar."""
    passes = 1 + schemes if together or not divergence else 1 + 2 * schemes
    return windows.shape[0] * passes


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")

"""Decoding speed of a whole model: one token at a time with a key-value cache.

Prefill speed needs no benchmark of its own: it is what :class:`lq_eval.perplexity.Perplexity` reports.
"""

import statistics
import time

import torch
from lq_formats import SpecError
from torch import Tensor, nn


def decode_tokens_per_second(model: nn.Module, prompt: Tensor, new_tokens: int = 32) -> float:
    """Return the tokens per second of greedy decoding, from the median time of a step (the prompt is not counted).

    Args:
        model: A causal language model of transformers, on its device.
        prompt: ``(B, T) int64``; B sequences are decoded together.
        new_tokens: Steps to time, at least 2.

    Raises:
        SpecError: If ``new_tokens`` is below 2.
    """
    if new_tokens < 2:
        raise SpecError(f"new_tokens={new_tokens}: expected at least 2")
    device = next(model.parameters()).device
    if device.type == "cuda":
        _steps(model, prompt, device, new_tokens)  # the first pass loads a kernel at nearly every cache length
    return prompt.shape[0] / statistics.median(_steps(model, prompt, device, new_tokens))


def _steps(model: nn.Module, prompt: Tensor, device: torch.device, new_tokens: int) -> list[float]:
    """Return the seconds of each step of a greedy decode, without the first."""
    times: list[float] = []
    with torch.inference_mode():
        output = model(prompt.to(device), use_cache=True)
        for step in range(new_tokens + 1):
            token = output.logits[:, -1:].argmax(dim=-1)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if step:  # the first step compiles and allocates
                times.append(time.perf_counter() - start)
    return times

"""The model and texts that ship inside lq-eval, so that it needs no network. ``README.md`` here says what they are."""

from importlib.resources import files
from pathlib import Path

from lq_formats import UnsupportedError


def tiny_llama_path() -> Path:
    """Return the folder of the bundled 4.2M-parameter LLaMA (Hugging Face layout, bf16 safetensors)."""
    return _bundled("tiny-llama")


def eval_text_path() -> Path:
    """Return the bundled evaluation text: 52,245 tokens of the bundled tokenizer, not seen in training."""
    return _bundled("text", "eval.txt")


def calibration_text_path() -> Path:
    """Return the bundled calibration text, disjoint from the evaluation text."""
    return _bundled("text", "calibration.txt")


def _bundled(*parts: str) -> Path:
    found = files(__name__).joinpath(*parts)
    if not isinstance(found, Path) or not found.exists():
        raise UnsupportedError(
            f"the bundled data {'/'.join(parts)!r} is not a file on disk ({found}); install lq-eval unpacked, "
            "with its package data (a wheel or a source checkout, not a zip archive)"
        )
    return found

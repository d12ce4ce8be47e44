"""The errors that only lq-eval raises; the others are those of :mod:`lq_formats`."""

from lq_formats import LQError


class TextTooShortError(LQError, ValueError):
    """A text has fewer tokens than were asked for, or not even one window of them."""


class ModelLoadError(LQError, OSError):
    """A model, its tokenizer or a text cannot be read."""


class BenchError(LQError, RuntimeError):
    """A benchmark could not be run to its end."""

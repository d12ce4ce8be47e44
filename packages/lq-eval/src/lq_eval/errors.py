"""The errors that only lq-eval raises; the others are those of :mod:`lq_formats`."""

from lq_formats import LQError


class TextTooShortError(LQError, ValueError):
    """A text has fewer tokens than were asked for, or not even one window of them."""


class ModelLoadError(LQError, OSError):
    """A model, its tokenizer or a text cannot be read."""


class BenchError(LQError, RuntimeError):
    """A benchmark could not be run to its end."""


def last_line(error: BaseException) -> str:
    """Return what a row of results says about an error: the last line of its message, at most 200 characters."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1].strip()[:200]

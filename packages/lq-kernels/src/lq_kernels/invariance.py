"""The batch-invariant mode: a token's result is the same bits whatever other tokens it is multiplied with, and how many.

By default lq chooses kernels and their cuts by the number of tokens, so the order in which K is added up, and with it the last
bits of a result, may change with the batch. In this mode every product takes one kernel, for all numbers of tokens, that adds
up each result in an order that depends on the weight's sizes and the processor alone. See ``docs/batch-invariance.md``.

A product is batch-invariant if the mode is on when it is called or traced, or when it runs: operators carry the former in their
``kernel`` argument, so an exported program or a CUDA graph keeps what it was made in. ``torch.compile`` guards on the mode.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar, cast

from lq_formats import SpecError, UnsupportedError

_F = TypeVar("_F", bound=Callable[..., Any])

_PREFIX = "batch-invariant:"


class _Thread(threading.local):
    """What a thread has chosen (None: what the process has), and before; in ``__init__``: torch.compile guards on it."""

    def __init__(self) -> None:
        self.chosen: bool | None = None
        self.before: list[bool | None] = []


_thread = _Thread()
_process = False


def is_batch_invariant() -> bool:
    """Return whether products called here and now are batch-invariant."""
    chosen = _thread.chosen
    return _process if chosen is None else chosen


def set_batch_invariant(enabled: bool) -> None:
    """Switch the mode on or off for all threads of the process, except inside :class:`batch_invariant`.

    Raises:
        SpecError: If ``enabled`` is no bool.
    """
    global _process
    _process = _checked(enabled)


def _checked(enabled: object) -> bool:
    if not isinstance(enabled, bool):
        decorated = "; a decorator is written with parentheses, @batch_invariant()" if callable(enabled) else ""
        raise SpecError(f"enabled={enabled!r}: expected True or False{decorated}")
    return enabled


class batch_invariant(contextlib.ContextDecorator):  # noqa: N801  (used like a function)
    """Make lq's products batch-invariant in this thread: a context manager, or a decorator of a function.

    Row i of every product's result then depends on row i of the activations and on the weight alone, bit for bit, and a product
    that no kernel can compute so raises :class:`lq_formats.errors.NoKernelError`. May be nested and works inside and outside
    compiled functions. Gradients, attention and norms are not lq's products.

    A generator function that is decorated has the mode whenever it runs, and not while its consumer does. Coroutine functions
    and asynchronous generators cannot be decorated: the mode is a thread's, and so would be that of other tasks while one
    awaits. For the same reason let no ``with`` block hold an ``await`` or a ``yield``.

    Example:
        >>> with lq_kernels.batch_invariant():
        ...     logits = model(tokens)
    """

    def __init__(self, enabled: bool = True) -> None:
        """Take whether to switch the mode on, or off.

        Raises:
            SpecError: If ``enabled`` is no bool, but a function, say.
        """
        self._enabled = _checked(enabled)

    def __enter__(self) -> None:
        """Switch the mode, for this thread."""
        _thread.before.append(_thread.chosen)
        _thread.chosen = self._enabled

    def __exit__(self, *exception: object) -> None:
        """Switch back."""
        _thread.chosen = _thread.before.pop()

    def __call__(self, function: _F) -> _F:
        """Return ``function`` with the mode switched for as long as it runs; a generator function, whenever it is resumed.

        Raises:
            UnsupportedError: If it is a coroutine function or an asynchronous generator function.
        """
        inner = getattr(function, "__func__", function)  # of a static method
        if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner):
            name = getattr(function, "__qualname__", repr(function))
            raise UnsupportedError(
                f"batch_invariant() cannot decorate {name!r}, which is asynchronous: other tasks of the thread would run in "
                "the mode while it awaits; write 'with batch_invariant():' around the calls in its body"
            )
        if not inspect.isgeneratorfunction(inner):
            return super().__call__(function)

        @functools.wraps(function)
        def resumed(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            generator = function(*args, **kwargs)
            resume = functools.partial(next, generator)
            while True:
                try:
                    with self:
                        value = resume()
                except StopIteration as stop:
                    return stop.value
                try:
                    sent = yield value
                except BaseException as error:  # GeneratorExit too: close() is a throw
                    resume = functools.partial(generator.throw, error)
                else:
                    resume = functools.partial(generator.send, sent)

        return cast("_F", resumed)


def ask(kernel: str | None) -> str:
    """Return what an operator is asked for: a kernel's name or "", and the mode."""
    if kernel is not None and not isinstance(kernel, str):
        raise SpecError(f"kernel={kernel!r}: expected the name of a kernel (lq_kernels.kernel_names), or None")
    name = kernel or ""
    return _PREFIX + name if is_batch_invariant() else name


def asked(kernel: str) -> tuple[str, bool]:
    """Return the kernel's name, and whether in the mode, of what :func:`ask` returned."""
    return kernel.removeprefix(_PREFIX), kernel.startswith(_PREFIX)

"""The exceptions of all four lq packages.

Every error a user can cause is an :class:`LQError` and also the built-in exception that a careful caller would
expect (``ValueError``, ``TypeError``, ...), so that both ``except LQError`` and ``except ValueError`` work. A message
says what came, what was expected and what to do about it.
"""

from collections.abc import Sequence


class LQError(Exception):
    """Base class of every error that lq raises on purpose."""


class ShapeError(LQError, ValueError):
    """A tensor has the wrong rank, or its sizes do not fit each other or the format."""


class GroupSizeError(ShapeError):
    """A group size does not divide the in features, or is outside of what a format or kernel takes."""


class SizeOverflowError(LQError, OverflowError):
    """A product of sizes does not fit the integer type that must hold it."""


class DTypeError(LQError, TypeError):
    """A tensor has a dtype that the operation does not take."""


class DeviceError(LQError, RuntimeError):
    """Tensors are on different devices, or on a device that cannot do what was asked."""


class StorageError(LQError, RuntimeError):
    """Someone asked for the one block of memory behind a tensor, and a quantized weight is several tensors."""


class OutOfRangeError(LQError, IndexError):
    """An index is negative, or beyond the rows that there are."""


class NonFiniteError(LQError, ValueError):
    """A weight holds NaN or infinity, which no quantized format can represent."""


class SpecError(LQError, ValueError):
    """A quantization spec or configuration contradicts itself or names an unknown option."""


class FormatError(LQError, ValueError):
    """A file or a block of bytes is not what it claims to be: truncated, oversized, foreign or inconsistent."""


class UnknownVersionError(FormatError):
    """A file was written in a format version that this release does not know."""


class UnsupportedError(LQError, NotImplementedError):
    """The request is meaningful, but this release (or this GPU) does not provide it."""


class CompileError(LQError, RuntimeError):
    """A kernel could not be compiled or loaded."""


class LaunchError(LQError, RuntimeError):
    """The driver refused to launch a compiled kernel."""


class MissingPackageError(LQError, ImportError):
    """An optional package is not installed.

    Args:
        package: Distribution that is missing, for example ``"gemlite"``.
        purpose: What needs it, as the start of a sentence, for example ``"int4_packing_format='gemlite'"``.
        install: What to type to get it, for example ``"pip install 'lq-torch[gemlite]'"``.
    """

    def __init__(self, package: str, purpose: str, install: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}, which is not installed; run: {install}")
        self.package = package
        self.install = install


class NoKernelError(LQError, RuntimeError):
    """No kernel can run a problem (or the kernel that was forced cannot).

    Args:
        problem: Description of the problem.
        reasons: ``(kernel name, why it cannot run)`` for every kernel that was considered.
    """

    def __init__(self, problem: str, reasons: Sequence[tuple[str, str]]) -> None:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons) or "  (no kernel is registered)"
        super().__init__(f"no kernel can run {problem}:\n{lines}")
        self.reasons = tuple(reasons)

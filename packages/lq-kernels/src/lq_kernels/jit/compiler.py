"""Compile CUDA C++ to a cubin with NVRTC: no nvcc, no GPU and no driver needed.

One source file is one compilation unit; headers are found under ``cuda/include`` and nowhere else, so that a result
depends on nothing but this package, the compiler and the target.
"""

import functools
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lq_formats import CompileError, MissingPackageError

CUDA_FOLDER = Path(__file__).parent.parent / "cuda"
INCLUDE_FOLDER = CUDA_FOLDER / "include"
SOURCE_FOLDER = CUDA_FOLDER / "src"
STANDARD = "c++17"

_COMPILER_PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")

_import_lock = threading.Lock()

_USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<store>\d+) bytes spill stores, "
    r"(?P<load>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel: registers a thread, and bytes of stack and spills."""

    registers: int
    stack: int
    spills: int


@dataclass(frozen=True)
class Compiled:
    """A cubin, and the compiler's log."""

    cubin: bytes
    log: str

    def usage(self) -> dict[str, Usage]:
        """Return ptxas's report by kernel name."""
        return {
            found["name"]: Usage(int(found["registers"]), int(found["stack"]), int(found["store"]) + int(found["load"]))
            for found in _USAGE.finditer(self.log)
        }


def cuda_core() -> Any:
    """Return the module ``cuda.core``, whose first import is not safe from several threads at once.

    Raises:
        MissingPackageError: If it is not installed.
    """
    try:
        with _import_lock:
            from cuda import core
    except ImportError as error:
        raise MissingPackageError(
            "cuda-core", "Compiling CUDA kernels", "pip install cuda-core cuda-bindings"
        ) from error
    return core


def architecture(capability: tuple[int, int]) -> str:
    """Return the compiler's name of a compute capability; Hopper's own instructions need ``sm_90a``."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


@functools.cache
def source(name: str) -> str:
    """Return the text of ``cuda/src/NAME.cu``."""
    return (SOURCE_FOLDER / f"{name}.cu").read_text(encoding="utf-8")


@functools.cache
def headers() -> str:
    """Return the text of every header, in the order of their paths, for cache keys."""
    paths = sorted(INCLUDE_FOLDER.rglob("*.cuh"))
    return "\n".join(f"// {path.relative_to(INCLUDE_FOLDER)}\n{path.read_text(encoding='utf-8')}" for path in paths)


@functools.cache
def compiler_version() -> str:
    """Return the versions of the packages that bring the compiler, or NVRTC's own where it comes from elsewhere.

    Of packages it is read without loading NVRTC, which takes longer than loading what is compiled already.

    Raises:
        MissingPackageError: If cuda-core or NVRTC is not installed.
    """
    found = [f"{name}-{version}" for name in _COMPILER_PACKAGES if (version := _version(name))]
    if found:
        return " ".join(found)
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MissingPackageError(
            "cuda-bindings", "Compiling CUDA kernels", "pip install cuda-core cuda-bindings"
        ) from error
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def compile_source(text: str, arch: str, name: str, defines: tuple[str, ...] = ()) -> Compiled:
    """Compile CUDA C++ for one architecture.

    Args:
        text: The source; it may include ``lq/*.cuh``.
        arch: For example ``"sm_90a"``.
        name: Shown in error messages.
        defines: ``NAME=VALUE`` of macros.

    Raises:
        CompileError: With the compiler's log.
        MissingPackageError: If cuda-core is not installed.
    """
    import io

    core = cuda_core()
    log = io.StringIO()
    options = core.ProgramOptions(
        arch=arch,
        std=STANDARD,
        include_path=[str(INCLUDE_FOLDER)],
        define_macro=list(defines) or None,
        device_as_default_execution_space=True,  # NVRTC 13.0 takes a generic lambda for a host function
        ptxas_options=["-v"],
        name=f"{name}.cu",
    )
    try:
        code = core.Program(text, "c++", options).compile("cubin", logs=log)
    except Exception as error:
        macros = f" with {', '.join(defines)}" if defines else ""
        raise CompileError(f"{name}.cu does not compile for {arch}{macros}:\n{error}\n{log.getvalue()}") from error
    return Compiled(bytes(code.code), log.getvalue())

"""Compile CUDA C++ to a cubin with NVRTC: no nvcc, no GPU and no driver needed.

One source file is one compilation unit; headers are found under ``cuda/include`` and nowhere else, so that a result
depends on nothing but this package, the compiler and the target.

Threads compile at once, but for NVRTC's parser, which is locked: 22 ms a source. So other processes help
(:mod:`lq_kernels.jit.processes`).
"""

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lq_formats import CompileError

from lq_kernels.jit import nvrtc, processes

CUDA_FOLDER = Path(__file__).parent.parent / "cuda"
INCLUDE_FOLDER = CUDA_FOLDER / "include"
SOURCE_FOLDER = CUDA_FOLDER / "src"
_MINIMAL_SINCE = (12, 4)
STANDARD = "c++17"

_COMPILER_PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")

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
        MissingPackageError: If NVRTC is not installed.
    """
    found = [f"{name}-{version}" for name in _COMPILER_PACKAGES if (version := _version(name))]
    if found:
        return " ".join(found)
    major, minor = nvrtc.version()
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
        MissingPackageError: If NVRTC is not installed.
    """
    options = (
        f"-arch={arch}",
        "--ptxas-options=-v",
        *(f"--define-macro={macro}" for macro in defines),
        f"--include-path={INCLUDE_FOLDER}",
        f"--std={STANDARD}",
        "--device-as-default-execution-space",  # NVRTC 13.0 takes a generic lambda for a host function
        # No textures and no cudart, whose declarations take as long to parse as most kernels: the code is the same.
        *(("--minimal",) if nvrtc.version() >= _MINIMAL_SINCE else ()),
    )
    cubin, log = processes.compile_program(text, f"{name}.cu", [os.fsencode(option) for option in options])
    if cubin is None:
        macros = f" with {', '.join(defines)}" if defines else ""
        raise CompileError(f"{name}.cu does not compile for {arch}{macros}:\n{log}")
    return Compiled(cubin, log)

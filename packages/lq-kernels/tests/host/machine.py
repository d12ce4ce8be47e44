"""The CUDA kernels without a GPU: compiled by g++ and run by ``device.cpp``, through the launchers as they are.

Only the last step of a launch is replaced. Tensors that a kernel sees end at a page that may not be touched, and it runs in a
child process, so that an access out of bounds, like anything else that ``device.cpp`` complains about, is a :class:`HostError`.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cuda_host.translate import translate
from lq_kernels.cuda import (
    decode_a16,
    dequantize_fragment,
    gemm_q4_0_q8_1,
    linear_a8,
    prefill_a16,
    quantize_q8_1,
    quantize_tokens,
)
from lq_kernels.jit import driver, tensor_map
from lq_kernels.jit.compiler import SOURCE_FOLDER
from lq_kernels.jit.workspace import Workspace

_FOLDER = Path(__file__).parent
_INCLUDE = SOURCE_FOLDER.parent / "include"
_PAGE = mmap.PAGESIZE
_SLACK = 0xA5
_MAGIC = 0x726569727261626D
_COMPILER = ("g++", "-std=c++17", "-fno-strict-aliasing", "-ffp-contract=off", "-shared", "-fPIC", "-w", "-Wno-psabi")
_true_empty = torch.empty


class HostError(Exception):
    """What was wrong with a kernel's run."""


def why_not() -> str | None:
    """Return why kernels cannot run on this host, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "kernels run on the host where it is x86-64 Linux"
    if shutil.which("g++") is None:
        return "kernels run on the host where g++ compiles them"
    return None


class _Memory:
    """Bytes that a child process shares, between two pages that may not be touched; they begin at a multiple of 16."""

    def __init__(self, size: int) -> None:
        self.size = size
        pages = -(-size // _PAGE) + 2
        self.map = mmap.mmap(-1, pages * _PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        libc = ctypes.CDLL(None)
        for page in (base, base + (pages - 1) * _PAGE):
            assert libc.mprotect(ctypes.c_void_p(page), _PAGE, 0) == 0
        self.offset = (pages - 1) * _PAGE - -(-size // 16) * 16
        self.address = base + self.offset
        end = base + (pages - 1) * _PAGE
        self._slack = (
            (base + _PAGE, self.address - base - _PAGE),
            (self.address + size, end - self.address - size),
        )
        for at, count in self._slack:
            ctypes.memset(at, _SLACK, count)
        ctypes.memset(self.address, 0xFF, size)

    def check(self) -> None:
        if any(ctypes.string_at(at, count) != bytes([_SLACK]) * count for at, count in self._slack):
            raise HostError("a tensor is written beyond its ends")


class _Matrix(ctypes.Structure):
    """As ``device.h`` has it."""

    _fields_ = (
        ("magic", ctypes.c_ulonglong),
        ("address", ctypes.c_void_p),
        ("rows", ctypes.c_longlong),
        ("columns", ctypes.c_longlong),
        ("element", ctypes.c_longlong),
        ("pitch", ctypes.c_longlong),
        ("box_rows", ctypes.c_longlong),
        ("box_columns", ctypes.c_longlong),
    )


def _encode(dtype: str, address: int, rows: int, columns: int, pitch: int, box_rows: int, box_columns: int) -> Any:
    space = (ctypes.c_char * 192)()
    encoded = (ctypes.c_char * 128).from_buffer(space, -ctypes.addressof(space) % 64)
    matrix = _Matrix(_MAGIC, address, rows, columns, 1 if dtype == "uint8" else 2, pitch, box_rows, box_columns)
    ctypes.memmove(encoded, ctypes.byref(matrix), ctypes.sizeof(matrix))
    return encoded


def _made(target: Path, make: Callable[[Path], None]) -> Path:
    """Return a file that is made if it is not there, by one process; it appears when it is complete."""
    import fcntl

    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = Path(f"{target}.part")
            make(part)
            part.rename(target)
    return target


@functools.cache
def _device(folder: Path) -> ctypes.CDLL:
    def make(library: Path) -> None:
        subprocess.run([*_COMPILER, "-O2", _FOLDER / "device.cpp", "-o", library], check=True)

    return ctypes.CDLL(str(_made(folder / "device.so", make)), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _library(folder: Path, source: Path, defines: tuple[str, ...]) -> ctypes.CDLL:
    def make(library: Path) -> None:
        macros = [f"-D{define}" for define in ("__CUDA_ARCH__=900", *defines)]
        preprocess = ["g++", "-E", "-P", "-x", "c++", *macros, f"-I{_INCLUDE}", source]
        text = subprocess.run(preprocess, capture_output=True, text=True, check=True).stdout
        # What the source defines is its own, whatever libraries call theirs. Optimizing takes longer than it saves.
        options = ["-O0", "-Wl,-Bsymbolic", f"-I{_FOLDER}", "-x", "c++", "-"]
        subprocess.run([*_COMPILER, *options, "-o", library], input=translate(text), text=True, check=True)

    _device(folder)
    name = hashlib.sha256(repr((str(source), defines)).encode()).hexdigest()[:24]
    return ctypes.CDLL(str(_made(folder / f"{name}.so", make)))


class Host:
    """A machine for kernels.

    Attributes:
        seed: Says in which order threads run and copies land. Of three seeds in a row one has copies land at once, one as late
            as can be, and one in between.
        kernels: What was launched.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.seed = 0
        self.kernels: list[str] = []
        self._folder = folder
        self._memory: dict[int, _Memory] = {}
        self._workspace: Workspace | None = None

    def install(self, monkeypatch: Any) -> None:
        """Let all launchers of the package launch here, and allocate their results here."""
        host = self

        class Launch:
            def __init__(
                self,
                index: int,
                name: str,
                kernel: str,
                grid: tuple[int, int, int],
                threads: int,
                shared: int,
                pointers: int,
                sizes: Sequence[int],
                cluster: int = 0,
                dependent: bool = False,
                defines: tuple[str, ...] = (),
            ) -> None:
                self._where = (SOURCE_FOLDER / f"{name}.cu", kernel, grid, threads, shared, max(cluster, 1), defines)
                self._pointers, self._sizes = pointers, sizes

            def __call__(self, *pointers: Any) -> None:
                assert len(pointers) == self._pointers
                values = [each if isinstance(each, int) else each.address for each in pointers]
                host.run(*self._where, [*values, *self._sizes])

        for module in (decode_a16, prefill_a16):
            monkeypatch.setattr(module, "Launch", Launch)
        for module in (dequantize_fragment, gemm_q4_0_q8_1, linear_a8, quantize_q8_1, quantize_tokens):
            monkeypatch.setattr(module, "launch", self.launch)
        for module in (linear_a8, prefill_a16):
            monkeypatch.setattr(module, "workspace", self._scratch)
        monkeypatch.setattr(driver, "encode_tensor_map", _encode)
        monkeypatch.setattr(torch, "empty", lambda *a, **b: self.guard(_true_empty(*a, **b), poison=True))
        true_new_empty = torch.Tensor.new_empty
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **b: self.guard(true_new_empty(*a, **b), poison=True))

    def guard(self, tensor: torch.Tensor, poison: bool = False) -> torch.Tensor:
        """Return a copy that ends, up to 15 bytes, at a page that may not be touched; or one filled with 0xFF bytes."""
        if tensor.numel() == 0:
            return tensor
        memory = _Memory(tensor.numel() * tensor.element_size())
        flat = torch.frombuffer(memory.map, dtype=torch.uint8, count=memory.size, offset=memory.offset)
        copy = flat.view(tensor.dtype).view(tensor.shape)
        if not poison:
            copy.copy_(tensor)
        self._memory[memory.address] = memory
        return copy

    def launch(
        self,
        name: str,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        device: torch.device,
        *arguments: Any,
        cluster: int = 0,
        dependent: bool = False,
        defines: tuple[str, ...] = (),
    ) -> None:
        """Stand in for :func:`lq_kernels.jit.launcher.launch`. Tensors that are not guarded are, for this launch."""
        tensors = [
            a for a in arguments if isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() not in self._memory
        ]
        copies = {id(tensor): self.guard(tensor.as_strided((_extent(tensor),), (1,))) for tensor in tensors}
        values = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                values.append(copies.get(id(argument), argument).data_ptr())
            else:
                values.append(argument if isinstance(argument, int) else argument.address)
        source = SOURCE_FOLDER / f"{name}.cu"
        self.run(source, kernel, grid, threads, shared, max(cluster, 1), defines, values)
        for tensor in tensors:
            tensor.as_strided((_extent(tensor),), (1,)).copy_(copies[id(tensor)])
            del self._memory[copies[id(tensor)].data_ptr()]

    def run(
        self,
        source: Path,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        cluster: int,
        defines: tuple[str, ...],
        values: Sequence[int],
    ) -> None:
        """Run a kernel of a source in a child process.

        Raises:
            HostError: If something is wrong with what it does.
        """
        library, device = _library(self._folder, source, defines), _device(self._folder)
        self.kernels.append(kernel)
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # The child runs one C function and ends: locks that other threads hold do not concern it.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                os.dup2(writer, 2)
                device.host_run(
                    getattr(library, f"host_{kernel}"),
                    kernel.encode(),
                    *(ctypes.c_int(each) for each in (*grid, threads, cluster)),
                    *(ctypes.c_longlong(each) for each in (shared, self.seed)),
                    (ctypes.c_longlong * len(values))(*values),
                )
                os._exit(0)
            finally:
                os._exit(2)
        os.close(writer)
        with os.fdopen(reader) as messages:
            message = messages.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            raise HostError(f"seed {self.seed}: {message.strip() or f'the run ended with {status}'}")
        for memory in self._memory.values():
            memory.check()
        if self._workspace is not None and self._workspace.counters.any():
            raise HostError("the counters of the workspace are not left at zero")

    def _scratch(self, device: torch.device, partials: int, counters: int) -> Workspace:
        found = self._workspace
        if found is None or found.partials.numel() < partials or found.counters.numel() < counters:
            self._workspace = found = Workspace(
                self.guard(_true_empty(partials, dtype=torch.float32), poison=True),
                self.guard(torch.zeros(counters, dtype=torch.int32)),
            )
        return found


def forget() -> None:
    """Drop what launchers have kept for this host."""
    for kept in (decode_a16._prepare, prefill_a16._prepare, tensor_map._encode):
        kept.cache_clear()


def _extent(tensor: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))

"""gemlite's kernels: import on first use, calls, and the file of tuned configurations.

Importing gemlite initialises CUDA, so nothing here imports it before a kernel is really needed. Packing, saving and
loading of weights do not come here at all.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lq_formats import DeviceError, FormatError, MissingPackageError, SpecError, UnknownVersionError
from torch import Tensor

KERNELS = ("GEMV", "GEMV_REVSPLITK", "GEMV_SPLITK", "GEMM_SPLITK", "GEMM")
"""gemlite's kernels. Left to itself it takes a GEMV up to 2 or 4 tokens, GEMM_SPLITK below 64, GEMM from 64 on."""

_FORMAT = "lq-gemlite-kernel-cache"
_VERSION = 1
_UNREAD: dict[torch.device, Tensor] = {}
# A plain global, in all threads: torch.compile guards on it, and cannot trace a ContextVar (torch 2.11).
_forced: str | None = None


def check_kernel(name: str | None) -> None:
    """Raise SpecError unless ``name`` is one of :data:`KERNELS` or None."""
    if name is not None and name not in KERNELS:
        raise SpecError(f"kernel={name!r}: gemlite has {', '.join(KERNELS)}; None leaves the choice to it")


@contextlib.contextmanager
def force_kernel(name: str | None) -> Iterator[None]:
    """Run every gemlite weight inside the ``with`` block by one kernel, whatever the number of tokens.

    It holds for the whole process, all threads.

    Args:
        name: One of :data:`KERNELS`; None restores the choice by the number of tokens.

    Raises:
        SpecError: If there is no such kernel.
    """
    global _forced
    check_kernel(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def current_kernel(kernel: str | None) -> str | None:
    """Return ``kernel``, or else the one of :func:`force_kernel`, or else None."""
    return kernel or _forced


def load_gemlite() -> Any:
    """Return the module ``gemlite.core``.

    Raises:
        MissingPackageError: If gemlite is not installed.
        DeviceError: If there is no CUDA GPU.
    """
    if "gemlite.core" in sys.modules:
        return sys.modules["gemlite.core"]
    if importlib.util.find_spec("gemlite") is None:
        raise MissingPackageError("gemlite", "A gemlite kernel", "pip install 'lq-torch[gemlite]'")
    if not torch.cuda.is_available():
        raise DeviceError(
            "gemlite's kernels need a CUDA GPU and this process has none; weights on the CPU work without"
        )
    return importlib.import_module("gemlite.core")


def gemlite_linear(
    x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], meta: Sequence[int], kernel: str | None = None
) -> Tensor:
    """Return ``x (..., K) @ W.T + bias`` by gemlite.

    Args:
        x: ``(..., K)`` on the GPU of the tensors.
        bias: ``(N,)`` or None.
        tensors: gemlite's packed codes, scales and zeros.
        meta: gemlite's twelve integers (``GemLiteLinear.get_meta_args``).
        kernel: One of :data:`KERNELS`; None for the one of :func:`force_kernel`, or else gemlite's own choice.
    """
    core = load_gemlite()
    name = current_kernel(kernel)
    matmul_type = -1 if name is None else int(core.GEMLITE_MATMUL_TYPES_MAPPING[name])
    meta_scale = _unread(x.device)
    # gemlite's operator has no derivative: a bias that is being trained is added outside of it.
    outside = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        y: Tensor = core.forward_functional(
            x, None if outside else bias, [*tensors, meta_scale], [int(value) for value in meta], matmul_type
        )
    return y if bias is None or not outside else y + bias


def _unread(device: torch.device) -> Tensor:
    """Return the fourth tensor, which only NVFP4 reads. Made once a device: filling it costs a kernel launch a call."""
    if torch.compiler.is_compiling():
        return torch.zeros((), dtype=torch.float32, device=device)
    if device not in _UNREAD:
        _UNREAD[device] = torch.zeros((), dtype=torch.float32, device=device)
    return _UNREAD[device]


def save_kernel_cache(path: str | Path) -> None:
    """Write the configurations that gemlite has tuned in this process to a JSON file, atomically.

    The file is stamped with the GPU and the versions of triton and gemlite: :func:`load_kernel_cache` refuses it
    elsewhere.

    Raises:
        MissingPackageError, DeviceError: As :func:`load_gemlite`.
    """
    core = load_gemlite()
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        tuned = Path(folder) / "gemlite.json"
        core.GemLiteLinearTriton.cache_config(str(tuned))
        record = {"format": _FORMAT, "version": _VERSION, **_stamp(), "configs": json.loads(tuned.read_text())}
        whole = Path(folder) / "lq.json"
        whole.write_text(json.dumps(record, sort_keys=True))
        os.replace(whole, path)


def load_kernel_cache(path: str | Path) -> None:
    """Give gemlite the configurations that :func:`save_kernel_cache` wrote, so that it does not tune them again.

    Raises:
        FormatError: If the file is not such a file, is damaged, or was made on another GPU or by other versions.
        UnknownVersionError: If its format version is unknown.
        MissingPackageError, DeviceError: As :func:`load_gemlite`.
        OSError: If the file cannot be read.
    """
    record = _read(Path(path))
    core = load_gemlite()
    for key, here in _stamp().items():
        if record.get(key) != here:
            raise FormatError(
                f"{path} was made with {key} {record.get(key)!r}, this is {here!r}; run warmup and save anew"
            )
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "gemlite.json"
        plain.write_text(json.dumps(record["configs"]))
        if not core.GemLiteLinearTriton.load_config(str(plain), print_error=False):
            raise FormatError(f"gemlite does not take the configurations of {path}; run warmup and save anew")


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise FormatError(f"{path} is not a kernel cache of lq; write one with save_kernel_cache")
    if record.get("version") != _VERSION:
        raise UnknownVersionError(f"{path} has format version {record.get('version')!r}: this release reads {_VERSION}")
    configs = record.get("configs")
    if not isinstance(configs, dict) or not all(
        name in KERNELS and isinstance(entries, dict) and all(_is_config(entry) for entry in entries.values())
        for name, entries in configs.items()
    ):
        raise FormatError(f"{path}: 'configs' does not map gemlite's kernels to their configurations")
    return record


def _is_config(entry: object) -> bool:
    plain = (int, float, str, bool, type(None))
    return isinstance(entry, dict) and all(isinstance(value, plain) for value in entry.values())


def _stamp() -> dict[str, str]:
    if not torch.cuda.is_available():
        raise DeviceError("a kernel cache belongs to a GPU and this process has none")
    # The caller has imported gemlite, so both are loaded.
    versions = {name: str(importlib.import_module(name).__version__) for name in ("gemlite", "triton")}
    return {"gpu": torch.cuda.get_device_name(), **versions}

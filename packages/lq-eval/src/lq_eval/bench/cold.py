"""Cold start: what a process waits for the first time it uses a model, with an empty cache of kernels and with a full one.

Every figure comes from a fresh process (:mod:`lq_eval.bench.cold_process`). The first finds empty caches (lq's, Triton's and
the driver's, all in one temporary folder), the second what the first left, and so does the third, which does not warm up: its
slowest call is the first of all. The GPU's context and the vendor's library are
set up before the clock starts: a dense model waits for those as well. So is lq's bytecode, as by an installation.
"""

import compileall
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lq_formats
import lq_kernels
import lq_torch

import lq_eval
from lq_eval.errors import BenchError

STATES = ("empty", "warm", "no warmup")
NEW_MS = (1, 2, 3, 5, 8, 13, 17, 24, 33, 64, 65, 100, 128, 200, 256, 300, 512, 1000, 2048, 4096)


@dataclass(frozen=True)
class ColdOptions:
    """What to start.

    Attributes:
        shapes: Layers of the model, as :func:`lq_eval.bench.shapes.parse_shapes` reads them.
        scheme: How they are quantized, see :mod:`lq_eval.schemes`.
        dtype: dtype of x by name.
        device: Where to run.
        batch_sizes: Numbers of tokens that ``warmup`` is given; without any it is not called.
        new_ms: Numbers of tokens of the calls after it.
    """

    shapes: str
    scheme: str
    dtype: str
    device: str
    batch_sizes: tuple[int, ...]
    new_ms: tuple[int, ...] = NEW_MS

    def to_json(self) -> str:
        """Return the options as a JSON object."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "ColdOptions":
        """Return the options that :meth:`to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return ColdOptions(**{**fields, **{name: tuple(fields[name]) for name in ("batch_sizes", "new_ms")}})


@dataclass(frozen=True)
class ColdRow:
    """One start.

    Attributes:
        shapes: Layers of the model.
        scheme: How they are quantized.
        dtype: dtype of x.
        cache: ``"empty"`` or ``"warm"``; ``"no warmup"`` for full caches and no ``warmup``.
        layers: Distinct layers.
        batch_sizes: Numbers of tokens that ``warmup`` was given.
        quantize_s: Seconds of ``quantize_``.
        warmup_s: Seconds of ``lq_torch.warmup``, to the last result.
        warmup_cpu_s: Seconds that all processors together spent on it.
        compile_s: Seconds of it until the last of the kernels that are compiled ahead was loaded; 0 if there are none.
        rerun_s: Seconds of the same ``warmup`` once more: what it takes to multiply, without any compiling.
        first_call_s: The longest of the calls after it, each a number of tokens for a layer, to its result.
        first_call_m: The number of tokens of that call.
    """

    shapes: str
    scheme: str
    dtype: str
    cache: str
    layers: int
    batch_sizes: tuple[int, ...]
    quantize_s: float
    warmup_s: float
    warmup_cpu_s: float
    compile_s: float
    rerun_s: float
    first_call_s: float
    first_call_m: int

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return {**asdict(self), "batch_sizes": list(self.batch_sizes)}


def run_cold(options: ColdOptions, *, timeout_s: float = 300.0) -> Iterator[ColdRow]:
    """Start a process with empty caches, one with those that it filled, and one more that does not warm up.

    Raises:
        BenchError: If a process fails or takes longer than ``timeout_s``.
    """
    for package in (lq_formats, lq_kernels, lq_torch, lq_eval):
        # Of a checkout it may be missing; where it can be written, every process but the first would find it anyway.
        compileall.compile_dir(package.__path__[0], quiet=2)
    with tempfile.TemporaryDirectory(prefix="lq-cold-") as folder:
        for state in STATES:
            chosen = replace(options, batch_sizes=()) if state == "no warmup" else options
            yield ColdRow(
                shapes=options.shapes,
                scheme=options.scheme,
                dtype=options.dtype,
                cache=state,
                batch_sizes=chosen.batch_sizes,
                **_start(chosen, Path(folder), timeout_s),
            )


def child_environment(folder: Path) -> dict[str, str]:
    """Return this process's environment with every cache of kernels inside ``folder``, and its import path."""
    return {
        **os.environ,
        "LQ_CACHE_DIR": str(folder / "lq"),
        "LQ_DISABLE_CACHE": "0",
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "CUDA_CACHE_PATH": str(folder / "cuda"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def _start(options: ColdOptions, folder: Path, timeout_s: float) -> Mapping[str, Any]:
    answer = folder / "answer.json"
    command = [sys.executable, "-m", "lq_eval.bench.cold_process", options.to_json(), str(answer)]
    try:
        done = subprocess.run(
            command, env=child_environment(folder), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"the process that starts {options.shapes} cold was not done in {timeout_s:g} s") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise BenchError(f"the process that starts {options.shapes} cold failed: {said[-1]}")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    answer.unlink()
    return found

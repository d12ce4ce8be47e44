"""What this machine has and which kernels it gets: the content of ``lq-eval doctor``."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lq_formats import QuantSpec, SpecError
from lq_kernels import Arch, Explanation, Problem, explain
from lq_kernels.cuda.constraints import why_not_compile
from lq_kernels.jit.compiler import compiler_version
from lq_kernels.problem import Q4_0_SPEC

from lq_eval.results import PACKAGES, environment, version

OPTIONAL = {
    "triton": "portable GPU kernels",
    "gemlite": "int4_packing_format='gemlite': pip install 'lq-torch[gemlite]'",
    "gguf": "transformers' tokenizer from a GGUF file (lq needs it for none): pip install 'lq-torch[gguf]'",
    "transformers": "models",
    "accelerate": "loading models straight to a GPU: pip install 'lq-torch[hf]'",
    "datasets": "WikiText-2: pip install 'lq-eval[datasets]'",
    "matplotlib": "plots",
}


@dataclass(frozen=True)
class Fact:
    """One line of the report.

    Attributes:
        name: What it is about.
        value: What was found.
        ok: Whether nothing is missing.
    """

    name: str
    value: str
    ok: bool = True


def machine_facts() -> Iterator[Fact]:
    """Yield versions, GPUs, caches and optional packages."""
    found = environment()
    for name in PACKAGES:
        yield Fact(name, found[name] or "not installed (run from a checkout)")
    yield Fact("python", f"{found['python']} on {found['platform']}")
    cuda = f"CUDA {found['cuda']}" if found["cuda"] else "no CUDA"
    yield Fact("torch", f"{found['torch']} ({cuda}, {found['cpu_threads']} CPU threads)")
    if found["gpu"]:
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = gpu.total_memory / 2**30
            capability = f"sm_{gpu.major}{gpu.minor}"
            yield Fact(f"GPU {index}", f"{gpu.name}, {capability}, {gpu.multi_processor_count} SMs, {memory:.0f} GiB")
        yield Fact("driver", found["driver"] or "unknown (nvidia-smi does not answer)")
    else:
        yield Fact("GPU", "none found by torch; everything runs on the CPU")
    yield Fact("kernel cache", _cache())
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    yield Fact("Hugging Face hub", "offline (HF_HUB_OFFLINE)" if offline else "online: models may be named")
    reason = why_not_compile()
    yield Fact("NVRTC", reason or compiler_version(), reason is None)
    for package, purpose in OPTIONAL.items():
        installed = version(package)
        yield Fact(package, installed or f"missing; it is for {purpose}", installed is not None)


def representative_problems(device: torch.device) -> Iterator[Problem]:
    """Yield the problems that the report explains: a 4096x4096 layer, from decoding to prefill."""
    arch = Arch.of(device)
    dtype = torch.bfloat16
    specs = (
        ("int4", QuantSpec(4, "group", 128, True, dtype), dtype),
        ("int4", QuantSpec(4, "group", 128, False, dtype), dtype),
        ("int4", QuantSpec(4, "row", None, True, torch.float32), torch.float32),
        ("int8", QuantSpec(8, "row", None, True, torch.float32), dtype),
        ("q4_0_q8_1", Q4_0_SPEC, torch.float32),
        ("ggml", QuantSpec(4, "group", 32, False, torch.float16), dtype),
    )
    for op, spec, activations in specs:
        for m in (1, 16, 256, 4096):
            yield Problem(op, m, 4096, 4096, spec, activations, arch)  # type: ignore[arg-type]


def explanations(device: torch.device) -> list[Explanation]:
    """Explain every representative problem."""
    return [explain(problem) for problem in representative_problems(device)]


def _cache() -> str:
    from lq_kernels import env

    try:
        folder = Path(env.cache_dir())
    except SpecError as error:  # it says what to set
        return f"none: {error}"
    if env.cache_disabled():
        return f"disabled (LQ_DISABLE_CACHE=1); it would be {folder}"
    try:
        if not folder.is_dir():
            return f"{folder} (empty)"
        files = [path for path in folder.rglob("*") if path.is_file()]
        return f"{folder} ({len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB)"
    except OSError as error:
        return f"{folder} cannot be read ({error.strerror or error}): set LQ_CACHE_DIR to a folder that can"

"""Every CUDA source compiles with NVRTC for every architecture, without a GPU, and to the code that it should."""

import builtins
import re
import subprocess
import sys

import pytest
from lq_formats import CompileError, MissingPackageError
from lq_kernels.cuda import constraints
from lq_kernels.cuda.gemm_q4_0_q8_1 import _STAGES, _TOKEN_STAGE, _WEIGHT_STAGE
from lq_kernels.cuda.sources import COLUMN_TILES, SOURCES
from lq_kernels.jit import compiler, nvrtc

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")
CASES = [(name, arch) for name in SOURCES for arch in ARCHITECTURES]


@pytest.fixture(scope="module")
def build():
    """Compile a source once a module."""
    done = {}

    def build(name, arch):
        if (name, arch) not in done:
            done[name, arch] = compiler.compile_source(compiler.source(name), arch, name)
        return done[name, arch]

    return build


@pytest.mark.nvrtc
@pytest.mark.parametrize(("name", "arch"), CASES, ids=[f"{name}-{arch}" for name, arch in CASES])
def test_compiles_to_the_kernels_it_declares_without_spills(build, name, arch):
    result = build(name, arch)
    assert result.cubin[:4] == b"\x7fELF"
    usage = result.usage()
    assert set(usage) == set(SOURCES[name])
    for kernel, used in usage.items():
        assert used.spills == 0, kernel
        assert used.stack == 0, kernel
        assert 0 < used.registers <= 255, kernel
        assert kernel.encode() in result.cubin


def by_kernel(sass):
    """Return the SASS of each kernel."""
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+).*$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_gemm_runs_on_integer_tensor_cores_without_converting_integers(build, disassemble, arch):
    sass = by_kernel(disassemble(build("gemm_q4_0_q8_1", arch).cubin))
    assert set(sass) == set(SOURCES["gemm_q4_0_q8_1"])
    for kernel, text in sass.items():
        assert re.search(r"\bIMMA\.16832\.S8\.S8\b", text), kernel
        # A sum becomes a float by the magic number in the accumulator.
        assert not re.search(r"\bI2FP?\b", text), kernel
        assert not re.search(r"\b(LDL|STL)\b", text), kernel
        # Aligned rows arrive by cp.async in pieces of 16 bytes.
        assert bool(re.search(r"\bLDGSTS\.E\.\S*128\b", text)) is not kernel.endswith("_unaligned"), kernel


def test_the_pipeline_of_the_launcher_is_that_of_the_source():
    declared = re.findall(
        r"^LQ_KERNEL\((\w+), (\d+), (\d+), (true|false)\)$", compiler.source("gemm_q4_0_q8_1"), re.MULTILINE
    )
    assert {name for name, *_ in declared} == set(SOURCES["gemm_q4_0_q8_1"])
    assert set(_STAGES) == set(COLUMN_TILES)
    for name, tiles, stages, aligned in declared:
        assert name == f"gemm_q4_0_q8_1_c{tiles}" + ("" if aligned == "true" else "_unaligned")
        assert int(stages) == (_STAGES[int(tiles)] if aligned == "true" else 2)
        shared = int(stages) * (_WEIGHT_STAGE + 8 * int(tiles) * _TOKEN_STAGE)
        assert shared <= 99 << 10, f"{name} needs more shared memory than sm_89 has"
        # The warps' partial sums reuse it at the end.
        assert shared >= 8 * 32 * 8 * int(tiles) * 4, name


@pytest.mark.nvrtc
def test_a_syntax_error_is_an_error_with_the_log():
    with pytest.raises(CompileError, match=r"broken\.cu does not compile for sm_80") as caught:
        compiler.compile_source('extern "C" __global__ void broken() { undeclared = 1; }', "sm_80", "broken")
    assert "undeclared" in str(caught.value)
    assert re.search(r"broken\.cu\(1\)", str(caught.value))
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.nvrtc
def test_compiling_does_not_import_what_takes_longer_than_that():
    code = (
        "import sys\n"
        "from lq_kernels.cuda.constraints import why_not_compile\n"
        "from lq_kernels.jit.compiler import compile_source\n"
        "before = set(sys.modules)\n"
        "assert why_not_compile() is None\n"
        "compiled = compile_source('extern \"C\" __global__ void f() {}', 'sm_80', 'f')\n"
        "assert list(compiled.usage()) == ['f']\n"
        "found = {'cuda.bindings', 'triton'} & (set(sys.modules) - before)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.nvrtc
def test_a_header_that_is_not_ours_is_not_found():
    with pytest.raises(CompileError, match="nowhere"):
        compiler.compile_source('#include "nowhere.cuh"', "sm_80", "includes")


@pytest.mark.nvrtc
def test_an_unknown_architecture_is_an_error():
    with pytest.raises(CompileError, match="does not compile for sm_10"):
        compiler.compile_source(compiler.source("quantize_q8_1"), "sm_10", "quantize_q8_1")


@pytest.mark.nvrtc
def test_spills_and_stack_are_reported():
    text = """
    extern "C" __global__ void __launch_bounds__(1024) stack(float* out, int i) {
      float values[64];
      for (int j = 0; j < 64; ++j) values[j] = out[j] * out[j + i];
      out[0] = values[i] + values[out[5] > 3 ? 7 : int(out[9])];
    }
    """
    usage = compiler.compile_source(text, "sm_80", "stack").usage()
    assert set(usage) == {"stack"}
    assert usage["stack"].stack > 0


@pytest.mark.nvrtc
def test_the_compiler_has_a_version(monkeypatch):
    assert re.fullmatch(r"nvidia-cuda-nvrtc\S*-\d+\.\d+\S*|\d+\.\d+", compiler.compiler_version())
    monkeypatch.setattr(compiler, "_version", lambda package: None)  # it came with a toolkit
    forget()
    try:
        assert re.fullmatch(r"\d+\.\d+", compiler.compiler_version())
    finally:
        compiler.compiler_version.cache_clear()


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_cuda(name, *args, **kwargs):
        if name == "cuda" or name.startswith("cuda."):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    def without_nvrtc(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(builtins, "__import__", without_cuda)
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", without_nvrtc)
    forget()
    with pytest.raises(
        MissingPackageError,
        match="'nvidia-cuda-nvrtc', which is not installed; run: pip install cuda-pathfinder nvidia-cuda-nvrtc",
    ):
        compiler.compile_source("", "sm_80", "nothing")
    monkeypatch.setattr(compiler, "_version", lambda package: None)
    with pytest.raises(MissingPackageError, match="'nvidia-cuda-nvrtc', which is not installed"):
        compiler.compiler_version()
    reason = constraints.why_not_compile()
    assert reason == "NVRTC, CUDA's compiler, is not installed; run: pip install cuda-pathfinder nvidia-cuda-nvrtc"
    forget()


def forget():
    for found in (nvrtc._nvrtc, compiler.compiler_version, constraints.why_not_compile):
        found.cache_clear()


@pytest.mark.nvrtc
def test_the_library_that_torch_has_not_loaded_is_found(monkeypatch):
    real, asked = nvrtc.ctypes.CDLL, []

    def library(name, **options):
        if not options and "nvrtc" in name:  # pathfinder asks with them, and for another library when it is imported
            asked.append(name)
            if "/" not in name:
                raise OSError("not loaded")
        return real(name, **options)

    monkeypatch.setattr(nvrtc.ctypes, "CDLL", library)
    forget()
    assert constraints.why_not_compile() is None
    assert nvrtc.version() >= (12, 0)
    assert len(asked) == 2
    forget()


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 0), "sm_120")]
)
def test_architecture(capability, expected):
    assert compiler.architecture(capability) == expected

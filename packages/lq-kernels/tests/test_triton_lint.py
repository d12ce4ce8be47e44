"""What the Triton kernels compile to, for GPUs that are not here: no spills, tensor cores, no conversion of each weight.

The launchers run on meta tensors with the kernels replaced by recorders, so every launch is compiled exactly as it would
be made: its block sizes, its warps and stages, and what Triton specializes on.
"""

import os
import re
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lq_formats.layouts import GGML_PLANES
from lq_kernels import Arch

if find_spec("triton") is None:
    pytest.skip("the package 'triton' is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled", allow_module_level=True)

import triton
from lq_kernels.triton import columns, ggml, int4, int8, launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
if not DISASSEMBLER.exists():
    pytest.skip("this Triton ships no nvdisasm", allow_module_level=True)

ARCHITECTURES = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0)}
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 58, "sm_90": 132}
# What one block may use: 163, 99 and 227 KB.
SHARED_BYTES = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}
N = K = 4096


class Case(NamedTuple):
    """A launcher and what to call it with; ``group`` 0 is a scale a row, -1 (int8) one in all; ``op`` may be a ggml type."""

    op: str
    launcher: str
    m: int
    dtype: torch.dtype
    group: int = 0
    symmetric: bool = True

    def __str__(self) -> str:
        group = {0: "row", -1: "tensor"}.get(self.group, f"g{self.group}")
        kind = "sym" if self.symmetric else "asym"
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        return f"{self.op}-{self.launcher}-M{self.m}-{dtype}-{group}-{kind}"


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DOT = [
    Case("int4", "splitk", 1, BF16, 128),
    Case("int4", "splitk", 1, FP16, 128, False),
    Case("int4", "splitk", 64, BF16, 128, False),
    Case("int4", "splitk", 64, FP16, 16),
    Case("int4", "gemm", 1000, BF16, 128),
    Case("int4", "gemm", 1000, FP16, 128, False),
    Case("int4", "gemm", 1000, BF16, 16, False),
    Case("int4", "gemm", 1000, BF16),
    Case("int8", "splitk", 1, BF16),
    Case("int8", "splitk", 64, FP16),
    Case("int8", "gemm", 1000, BF16),
    Case("int8", "gemm", 1000, FP16, -1),
]
OTHER = [
    Case("int4", "gemm", 64, FP32, 128),
    Case("int8", "gemm", 64, FP32),
    Case("int4", "gemv", 1, BF16, 128),
    Case("int4", "gemv", 1, FP16, 128, False),
    Case("int4", "dequantize", 0, BF16, 128),
    Case("int8", "gemv", 1, BF16),
    Case("int8", "dequantize", 0, BF16),
]


class Launch(NamedTuple):
    """A kernel with the arguments of one launch."""

    kernel: object
    arguments: dict[str, object]
    options: dict[str, int]


def record(case, arch, monkeypatch):
    """Return the kernels that a launcher launches, by name."""
    found = {}

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                name = self.kernel.fn.__name__
                arguments = dict(zip(self.kernel.arg_names, args, strict=False))
                arguments.update({key: options.pop(key) for key in list(options) if key in self.kernel.arg_names})
                assert set(arguments) == set(self.kernel.arg_names)
                assert "enable_fp_fusion" in options, "its default is about to change in Triton"
                found[name] = Launch(self.kernel, arguments, options)

            return launch

    class FakeArch:
        @staticmethod
        def of(device):
            return Arch("cuda", ARCHITECTURES[arch], "fake", MULTIPROCESSORS[arch])

    for module in (int4, int8, ggml, columns, launch):
        if hasattr(module, "Arch"):
            monkeypatch.setattr(module, "Arch", FakeArch)
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(value))

    def meta(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x = meta(case.m, K, dtype=case.dtype)
    if case.op == "int4":
        group = case.group or K
        scale = meta(N, K // group, dtype=case.dtype)
        zero = None if case.symmetric else meta(N, K // group, dtype=torch.uint8)
        weight = (meta(N, K // 8, dtype=torch.int32), scale, zero, group)
        if case.launcher == "dequantize":
            int4.dequantize_int4(*weight, K, case.dtype)
        else:
            getattr(int4, case.launcher)(x, *weight)
    elif case.op == "columns":
        codes, corner, scale = (meta(*shape, dtype=FP32) for shape in ((128, N), (128, 128), (1, N)))
        if case.launcher == "fix_columns":
            columns.fix_columns(codes, codes, scale, scale, meta(128, dtype=torch.int64), corner, 15)
        else:
            columns.improve_columns(codes, codes, scale, corner, 15)
    elif case.op in GGML_PLANES:
        layout = GGML_PLANES[case.op]
        words, scales = layout.packed_shape(N, K)
        high = None if layout.high_dtype is None else meta(*words, dtype=layout.high_dtype)
        weight = (meta(*words, dtype=torch.int32), high, meta(*scales, dtype=torch.int32))
        if case.launcher == "dequantize":
            ggml.dequantize_ggml(*weight, case.op, K, case.dtype)
        else:
            getattr(ggml, case.launcher)(x, *weight, meta(N, dtype=case.dtype), case.op)
    else:
        weight = (meta(N, K, dtype=torch.int8), meta(*(() if case.group else (N,)), dtype=torch.float32))
        if case.launcher == "dequantize":
            int8.dequantize_int8(*weight, case.dtype)
        else:
            getattr(int8, case.launcher)(x, *weight)
    return found


POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


def compile_launch(launch, arch):
    """Return Triton's result and the SASS of a recorded launch."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (
            value == 1 if isinstance(value, int) and not parameter.do_not_specialize else False
        ):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 1 << 31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    major, minor = ARCHITECTURES[arch]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(result.asm["cubin"])
        sass = subprocess.run([DISASSEMBLER, "-c", "-ndf", path], capture_output=True, text=True, check=True).stdout
    return result, sass


def count(sass, *opcodes):
    return sum(len(re.findall(rf"\b{opcode}\b", sass)) for opcode in opcodes)


def check_resources(name, result, sass, arch):
    assert count(sass, "LDL", "STL") == 0, f"{name} spills to local memory"
    assert result.metadata.shared <= SHARED_BYTES[arch], f"{name} needs {result.metadata.shared} bytes of shared memory"


# Known: where a block lies in one group and has a zero a row, Triton loads and converts one for each weight, and spills.
@pytest.mark.exhaustive(where=lambda case, arch: (DOT.index(case) + list(ARCHITECTURES).index(arch)) % 2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", DOT, ids=str)
def test_dot_kernels_use_the_tensor_cores(case, arch, monkeypatch):
    launches = record(case, arch, monkeypatch)
    assert "_dot_kernel" in launches
    for name, launched in launches.items():
        result, sass = compile_launch(launched, arch)
        check_resources(name, result, sass, arch)
        if name != "_dot_kernel":
            continue
        assert count(sass, "HGMMA" if arch == "sm_90" else "HMMA") > 0
        # Weights arrive by asynchronous copies: loads overlap with arithmetic.
        assert count(sass, "LDGSTS", "UTMALDG") > 0
        check_conversions(case, launched, sass)


def check_conversions(case, launched, sass):
    """Codes become floats by bit tricks; what remains converts zeros and divides indices."""
    sizes = launched.arguments
    threads = 32 * launched.options["num_warps"]
    weights = sizes["BN"] * sizes["BK"] // threads
    conversions = count(sass, "I2F", "I2FP")
    # A division of indices converts its divisor; one pipelined loop has at most a few copies of it.
    divisions = 4 if case.op == "int4" else 0
    if case.symmetric:
        assert conversions <= divisions
    elif case.group % 32 == 0:  # one zero for each row of the block
        assert conversions <= divisions + weights // 4
    else:  # a zero for each weight is converted: groups smaller than a block
        assert conversions <= divisions + weights


@pytest.mark.exhaustive(where=lambda case, arch: arch == "sm_89")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", OTHER, ids=str)
def test_other_kernels_do_not_spill(case, arch, monkeypatch):
    launches = record(case, arch, monkeypatch)
    assert launches
    for name, launched in launches.items():
        result, sass = compile_launch(launched, arch)
        check_resources(name, result, sass, arch)
        assert count(sass, "HMMA", "HGMMA") == 0, "float32 and GEMV multiply in float32, not in TF32"
        if case.launcher != "dequantize":
            assert count(sass, "FFMA") > 0
        # Far fewer than the weights of a thread: scale indices are divided, codes are not converted.
        assert count(sass, "I2F", "I2FP") <= 6


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_split_k_is_added_by_a_kernel_of_its_own_without_atomics(arch, monkeypatch):
    launches = record(Case("int4", "splitk", 1, BF16, 128), arch, monkeypatch)
    assert set(launches) == {"_dot_kernel", "_reduce_kernel"}
    for launched in launches.values():
        _, sass = compile_launch(launched, arch)
        assert count(sass, "ATOM", "ATOMG", "RED", "REDG") == 0


# Tokens of every tile, scales of every kind; the types that are left out differ from one of these in a constant.
GGML = [
    (Case("q4_0", "splitk", 1, BF16), "sm_90"),
    (Case("q8_0", "splitk", 64, FP16), "sm_90"),
    (Case("q5_1", "splitk", 32, BF16), "sm_90"),
    (Case("q5_k", "splitk", 8, BF16), "sm_90"),
    (Case("q4_k", "splitk", 16, BF16), "sm_90"),
    (Case("q4_k", "splitk", 8, BF16), "sm_90"),
    (Case("q6_k", "splitk", 8, BF16), "sm_80"),
    (Case("q3_k", "splitk", 8, BF16), "sm_89"),
    (Case("q5_0", "splitk", 8, FP16), "sm_89"),
    (Case("q4_1", "splitk", 16, BF16), "sm_80"),
    (Case("q4_k", "splitk", 64, BF16), "sm_89"),
    (Case("q6_k", "splitk", 64, BF16), "sm_80"),
]
GGML_OTHER = [
    (Case("q4_k", "gemv", 1, BF16), "sm_90"),
    (Case("q6_k", "gemv", 1, FP32), "sm_80"),
    (Case("q5_0", "splitk", 16, FP32), "sm_89"),
    (Case("q2_k", "dequantize", 0, BF16), "sm_89"),
]


@pytest.mark.parametrize(("case", "arch"), GGML, ids=str)
def test_ggml_weights_go_to_the_tensor_cores_from_registers(case, arch, monkeypatch):
    if (case.op, arch) == ("q5_k", "sm_90") and triton.__version__.startswith("3.6."):
        pytest.skip("Triton 3.6 multiplies these by mma.sync, and weights pass through shared memory")
    launched = record(case, arch, monkeypatch)["_dot_kernel"]
    result, sass = compile_launch(launched, arch)
    check_resources("_dot_kernel", result, sass, arch)
    assert count(sass, "HGMMA" if arch == "sm_90" and launched.arguments["BN"] == 64 else "HMMA") > 0
    assert count(sass, "LDGSTS") > 0
    # Codes, scales and minima become floats by bit tricks; halves are converted exactly, at full rate.
    assert count(sass, "I2F", "I2FP") == 0
    # Nothing moves between threads but the result, once: neither weights nor scales nor sums of x. A single warp decodes a
    # scale a row and hands each on once, with its minimum, for every field.
    scales = 32 // launched.arguments["low_bits"] if launched.options["num_warps"] == 1 else 0
    assert count(sass, "SHFL") == 0
    assert count(sass, "STS", "STSM") <= max(4, launched.arguments["BM"] // 2) + 3 * scales


@pytest.mark.parametrize(("case", "arch"), GGML_OTHER, ids=str)
def test_other_ggml_kernels_do_not_spill(case, arch, monkeypatch):
    (name, launched), *_ = record(case, arch, monkeypatch).items()
    result, sass = compile_launch(launched, arch)
    check_resources(name, result, sass, arch)
    assert count(sass, "HMMA", "HGMMA", "I2F", "I2FP") == 0
    if case.launcher == "gemv":  # x, codes and scales meet in registers: barriers are those of the final sum
        assert count(sass, "BAR") <= 2


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("launcher", ["fix_columns", "improve_columns"])
def test_loops_over_columns_stay_in_the_registers_of_a_warp(launcher, arch, monkeypatch):
    (name, launched), *_ = record(Case("columns", launcher, 0, FP32), arch, monkeypatch).items()
    result, sass = compile_launch(launched, arch)
    check_resources(name, result, sass, arch)
    assert launched.options["num_warps"] == 1
    # A column is taken out by two steps between threads; nothing of the state is reloaded.
    assert count(sass, "SHFL") == 2
    assert count(sass, "LDG") < 2 * 128 * 8 // 32
    specialized = {parameter.name for parameter in launched.kernel.params if not parameter.do_not_specialize}
    assert specialized == {parameter.name for parameter in launched.kernel.params if parameter.is_constexpr}

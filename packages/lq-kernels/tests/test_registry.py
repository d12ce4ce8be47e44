"""Selection as data: which kernel a problem gets, decided on a CPU for GPUs that are not here."""

import re

import pytest
import torch
from lq_formats import NoKernelError, QuantSpec, ShapeError, SpecError
from lq_kernels import Arch, Problem, explain, kernel_names, select
from lq_kernels.cuda import constraints as cuda_constraints
from lq_kernels.triton import constraints as triton_constraints
from lq_kernels.tuned import lookup

CPU = Arch("cpu")
H200 = Arch("cuda", (9, 0), "NVIDIA H200", 132)
TURING = Arch("cuda", (7, 5), "Tesla T4", 40)
OTHER = Arch("cuda", (8, 9), "NVIDIA L4", 58)
TRITON = ("triton-gemv", "triton-splitk", "triton-gemm")
HOPPER = ("cuda-decode", "cuda-prefill")


@pytest.fixture(autouse=True)
def _packages_installed(monkeypatch):
    monkeypatch.setattr(triton_constraints, "_installed", lambda: True)
    monkeypatch.setattr(cuda_constraints, "why_not_compile", lambda: None)
    monkeypatch.setattr(lookup, "_loaded", lambda device, sm_count: ())  # the models alone; tables: test_tuned.py
    lookup.forget()
    yield
    lookup.forget()


def int4(m, arch, *, n=4096, k=4096, group=128, symmetric=True, dtype=torch.bfloat16, scale_dtype=torch.bfloat16):
    return Problem("int4", m, n, k, QuantSpec(4, "group", group, symmetric, scale_dtype), dtype, arch)


def int8(m, arch, *, granularity="row", k=4096, dtype=torch.bfloat16):
    return Problem("int8", m, 4096, k, QuantSpec(8, granularity, None, True, torch.float32), dtype, arch)


def q4_0(m, arch):
    return Problem("q4_0_q8_1", m, 4096, 4096, QuantSpec(4, "group", 32, True, torch.float16), torch.float32, arch)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        pytest.param(int4(1, CPU), "aten-cpu", id="int4-cpu-M1"),
        pytest.param(int4(1024, CPU), "dequant-blas", id="int4-cpu-M1024"),
        pytest.param(int4(1, CPU, symmetric=False), "dequant-blas", id="int4-cpu-asym-M1"),
        pytest.param(int4(1, CPU, group=16), "dequant-blas", id="int4-cpu-g16-M1"),
        pytest.param(int8(1, CPU), "aten-cpu", id="int8-cpu-M1"),
        pytest.param(int8(1, CPU, granularity="tensor"), "dequant-blas", id="int8-cpu-tensor-M1"),
        pytest.param(q4_0(8, CPU), "dequant-blas", id="q4_0-cpu-M8"),
        pytest.param(int4(8192, H200), "cuda-prefill", id="int4-h200-M8192"),
        pytest.param(int4(1, TURING), "dequant-blas", id="int4-sm75-M1"),
        pytest.param(int8(8192, H200), "cuda-prefill", id="int8-h200-M8192"),
        pytest.param(q4_0(8, H200), "cuda-decode", id="q4_0-h200-M8"),
        pytest.param(q4_0(8, TURING), "dequant-blas", id="q4_0-sm75-M8"),
    ],
)
def test_choice(problem, expected):
    assert select(problem).name == expected


@pytest.mark.parametrize("make", [int4, int8], ids=["int4", "int8"])
@pytest.mark.parametrize("arch", [H200, OTHER], ids=["h200", "l4"])
def test_a_few_tokens_on_a_gpu_get_a_packed_kernel(make, arch):
    packed = HOPPER if arch is H200 else TRITON
    assert select(make(1, arch)).name in packed
    assert select(make(16, arch)).name in packed


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 16, 17, 64, 100, 128, 256, 1000, 4096])
@pytest.mark.parametrize("arch", [CPU, H200, TURING, OTHER], ids=["cpu", "h200", "sm75", "l4"])
def test_the_choice_can_run_is_the_cheapest_and_explain_agrees(arch, m):
    for problem in (int4(m, arch), int4(m, arch, group=8), int4(m, arch, n=33), int8(m, arch, k=100), q4_0(m, arch)):
        chosen = select(problem)
        assert chosen.why_not(problem) is None
        explanation = explain(problem)
        assert explanation.chosen == chosen.name
        assert explanation.predicted_us == chosen.predict_us(problem) > 0
        names = kernel_names(problem.op)
        assert [name for name, _ in explanation.rejected] == [name for name in names if name != chosen.name]
        for name in names:
            other = next(k for k in (select(problem, name),)) if _can(problem, name) else None
            assert other is None or other.predict_us(problem) >= explanation.predicted_us


def _can(problem, name):
    try:
        select(problem, name)
    except NoKernelError:
        return False
    return True


def test_a_forced_kernel_that_cannot_run_says_why_and_nothing_replaces_it():
    with pytest.raises(NoKernelError, match="triton-gemm: needs a GPU") as caught:
        select(int4(1, CPU), "triton-gemm")
    assert caught.value.reasons == (("triton-gemm", "needs a GPU"),)
    with pytest.raises(NoKernelError, match="no such kernel; choose one of cuda-decode") as caught:
        select(int4(1, CPU), "fastest")
    with pytest.raises(NoKernelError, match="takes groups of 32, 64, 128, 256, not 16"):
        select(int4(1, CPU, group=16), "aten-cpu")


def test_what_is_no_problem_is_named():
    spec = int4(1, CPU).spec
    for ask in (select, explain):
        with pytest.raises(SpecError, match="problem is of type int: expected lq_kernels"):
            ask(3)
    for ask in (kernel_names, lambda op: Problem(op, 1, 16, 128, spec, torch.bfloat16, CPU)):
        with pytest.raises(SpecError, match="op='int3': expected one of int4, int8, preshuffled"):
            ask("int3")
    with pytest.raises(ShapeError, match="m='1', n=16, k=128: expected integers"):
        Problem("int4", "1", 16, 128, spec, torch.bfloat16, CPU)


@pytest.mark.parametrize("make", [int4, int8], ids=["int4", "int8"])
def test_an_old_gpu_is_declined_with_its_capability(make):
    rejected = dict(explain(make(1, TURING)).rejected)
    for name in TRITON:
        assert rejected[name] == "needs compute capability 8.0, this GPU has 7.5"
    assert dict(explain(q4_0(1, TURING)).rejected)["cuda-mma"] == "needs compute capability 8.0, this GPU has 7.5"


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setattr(triton_constraints, "_installed", lambda: False)
    monkeypatch.setattr(cuda_constraints, "why_not_compile", lambda: "NVRTC is not installed")
    for problem, names in ((int4(1, H200), TRITON), (int8(1, H200), TRITON), (q4_0(1, H200), ("cuda-mma",))):
        rejected = dict(explain(problem).rejected)
        assert all("is not installed" in rejected[name] for name in names)
        assert select(problem).name == "dequant-blas"


def test_rocm_gets_triton_and_not_cuda():
    rocm = Arch("rocm", (0, 0), "AMD Instinct MI300X", 304)
    assert select(int4(1, rocm), "triton-gemv").name == "triton-gemv"
    with pytest.raises(NoKernelError, match="cuda-mma: needs an NVIDIA GPU"):
        select(q4_0(1, rocm), "cuda-mma")


def test_when_none_fits_every_reason_is_listed(monkeypatch):
    import dataclasses

    from lq_kernels import catalog, registry

    kernels = tuple(dataclasses.replace(k, why_not=lambda problem: "broken") for k in catalog.KERNELS if k.op == "int4")
    monkeypatch.setattr(registry, "_kernels", lambda op: kernels)
    with pytest.raises(NoKernelError) as caught:
        select(int4(1, CPU))
    assert [name for name, _ in caught.value.reasons] == [kernel.name for kernel in kernels]
    explanation = explain(int4(1, CPU))
    assert explanation.chosen is None
    assert "no kernel" in str(explanation)


def test_equals_are_decided_by_order(monkeypatch):
    import dataclasses

    from lq_kernels import catalog, registry

    kernels = [k for k in catalog.KERNELS if k.name in ("dequant-blas", "reference") and k.op == "int4"]
    same = tuple(dataclasses.replace(k, predict_us=lambda problem: 1.0, plan=None) for k in kernels)
    monkeypatch.setattr(registry, "_kernels", lambda op: same)
    assert select(int4(1, CPU)).name == same[0].name
    assert explain(int4(1, CPU)).chosen == same[0].name


def test_explanation_reads_like_a_sentence():
    text = str(explain(int4(1, CPU)))
    assert text.splitlines()[0] == "int4 m=1 n=4096 k=4096 g=128 sym bfloat16 on cpu"
    assert re.search(r"-> aten-cpu \(predicted [\d.]+ us by its cost model\)", text)
    assert "not triton-gemv: needs a GPU" in text
    assert re.search(r"not dequant-blas: predicted slower, [\d.]+ us", text)


def test_names_are_unique_and_every_operation_ends_with_the_reference():
    for op in ("int4", "int8", "q4_0_q8_1"):
        names = kernel_names(op)
        assert len(set(names)) == len(names)
        assert names[-1] == "reference"
        assert "dequant-blas" in names


@pytest.mark.parametrize("group", [8, 16, 24, 48, 96])
def test_groups_that_no_hopper_kernel_takes_have_kernels(group):
    h200 = Arch("cuda", (9, 0), "NVIDIA H200", 132)
    problem = Problem("int4", 4, 96, 192, QuantSpec(4, "group", group, True, torch.bfloat16), torch.bfloat16, h200)
    found = explain(problem)
    assert found.chosen is not None
    assert not found.chosen.startswith("cuda-")

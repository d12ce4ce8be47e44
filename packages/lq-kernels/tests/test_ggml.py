"""ggml_linear: every type and kernel against float64 on dequantized operands, the operators, selection and errors."""

import pytest
import torch
from lq_formats import DeviceError, DTypeError, NoKernelError, ShapeError, SpecError
from lq_formats.layouts import GGML_PLANES, GGMLPlanes
from lq_kernels import Arch, explain, ggml_dequantize, ggml_linear, kernel_names, select
from lq_kernels.ggml_kernels import make_problem, predict_gemv_us, predict_splitk_us
from lq_kernels.triton.ggml_config import SPLITS, dot_config, gemv_config, tile_m

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = tuple(GGML_PLANES)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the norm of the exact product: fp32 sums and one rounding of the result; dequant-blas rounds weights as well.
BOUNDS = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
H200 = Arch("cuda", (9, 0), "NVIDIA H200", 132)
L4 = Arch("cuda", (8, 9), "NVIDIA L4", 58)


def random_blocks(ggml_type, rows, count):
    """Return random codes and 6-bit or 8-bit scales under small random fp16 factors."""
    form = GGML_PLANES[ggml_type].form
    blocks = torch.randint(0, 256, (rows, count, form.type_size), dtype=torch.uint8)
    for at in form.halves:
        blocks[..., at : at + 2] = (0.01 * torch.randn(rows, count, 1)).half().view(torch.uint8)
    if ggml_type == "mxfp4":
        blocks[..., 0] = blocks[..., 0] % 16 + 112
    return blocks


def weight(ggml_type, rows, in_features, device="cpu"):
    """Return planes and the float32 weight of random blocks."""
    layout = GGML_PLANES[ggml_type]
    blocks = random_blocks(ggml_type, rows, in_features // layout.form.block_size).to(device)
    return layout.pack(blocks), layout.form.dequantize(blocks)


def error(y, reference, typical=0.0):
    """Return the relative error, of a result at least as large as ``typical`` results: a single one may come out near 0."""
    return float((y.double() - reference).norm() / max(reference.norm(), typical * y.numel() ** 0.5))


@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.parametrize("kernel", kernel_names("ggml"))
@pytest.mark.parametrize("device", DEVICES)
def test_every_kernel_against_float64(device, kernel, ggml_type):
    if device == "cpu" and kernel.startswith("triton"):
        pytest.skip("in Triton's interpreter: test_ggml_interpreter.py")
    torch.manual_seed(0)
    block = GGML_PLANES[ggml_type].form.block_size
    shapes = [(40, 3 * block, (1, 5), DTYPES)]
    if device == "cuda":
        # Triton takes seconds for each dtype and tile of tokens, and again where N is 1 or a multiple of 16. Every dtype
        # meets every tile once, with tails of N and K, and one dtype each every other kind of shape.
        tokens = (1, 2, 8, 9, 16, 17, 33, 64, 65, 200)
        shapes = [
            (130, 4096 + block, tokens, DTYPES),
            (40, 3 * block, (1, 5), (torch.float32,)),
            (1, block, (1, 8, 16), (torch.float16,)),
            (4096, 2048, (1, 16), (torch.bfloat16,)),
        ]
    for n, k, tokens, dtypes in shapes:
        planes, w = weight(ggml_type, n, k, device)
        for dtype in dtypes:
            bias = torch.randn(n, device=device).to(dtype)
            for m in tokens:
                x = torch.randn(m, k, device=device).to(dtype)
                y = ggml_linear(x, planes, ggml_type=ggml_type, bias=bias, kernel=kernel)
                assert y.dtype == dtype
                assert y.shape == (m, n)
                reference = x.double() @ w.double().t() + bias.double()
                typical = float(x.double().square().mean().sqrt() * w.double().norm(dim=1).mean())
                assert error(y, reference, typical) < 2 * BOUNDS[dtype], f"N={n} K={k} M={m} {dtype}"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_dequantized_is_the_value_of_the_blocks_to_the_bit(device, ggml_type, dtype):
    k = 5 * GGML_PLANES[ggml_type].form.block_size
    planes, w = weight(ggml_type, 37, k, device)
    assert torch.equal(ggml_dequantize(planes, ggml_type=ggml_type, in_features=k, dtype=dtype), w.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("ggml_type", TYPES)
def test_extreme_bytes_on_a_gpu(ggml_type):
    """Any bytes but infinite factors: the dequantizer agrees with the codec on subnormal, negative and zero factors."""
    form = GGML_PLANES[ggml_type].form
    blocks = torch.randint(0, 256, (64, 2048 // form.block_size, form.type_size), dtype=torch.uint8)
    for at in form.halves:
        high = blocks[..., at + 1]
        high[high & 0x7C == 0x7C] &= 0xFB
    planes = GGML_PLANES[ggml_type].pack(blocks.cuda())
    found = ggml_dequantize(planes, ggml_type=ggml_type, in_features=2048).cpu()
    torch.testing.assert_close(found, form.dequantize(blocks), rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton-gemv", "triton-splitk"])
def test_products_are_reproducible_and_rows_independent(kernel):
    planes, _ = weight("q4_k", 1000, 4096, "cuda")
    x = torch.randn(3, 4096, device="cuda", dtype=torch.bfloat16)
    first = ggml_linear(x, planes, ggml_type="q4_k", kernel=kernel)
    for _ in range(5):
        torch.empty(1 << 20, device="cuda").fill_(float("nan"))
        assert torch.equal(ggml_linear(x, planes, ggml_type="q4_k", kernel=kernel), first)
    part = GGMLPlanes(planes.codes[128:256], None, planes.scale[128:256])
    reference = x.double() @ ggml_dequantize(part, ggml_type="q4_k", in_features=4096).double().t()
    assert error(ggml_linear(x, part, ggml_type="q4_k", kernel=kernel), reference) < BOUNDS[torch.bfloat16]


@pytest.mark.gpu
def test_non_finite_activations_do_not_look_finite():
    planes, _ = weight("q6_k", 64, 1024, "cuda")
    x = torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16)
    x[1, 700] = torch.nan
    for kernel in ("triton-gemv", "triton-splitk"):
        y = ggml_linear(x, planes, ggml_type="q6_k", kernel=kernel)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("ggml_type", ["q5_0", "q4_k"])
@pytest.mark.parametrize("device", DEVICES)
def test_operators_gradients_and_compilation(device, ggml_type):
    planes, w = weight(ggml_type, 24, 512, device)
    x = torch.randn(2, 3, 512, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, requires_grad=True)
    y = ggml_linear(x, planes, ggml_type=ggml_type, bias=bias)
    assert y.shape == (2, 3, 24)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ w, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))
    arguments = (x.detach().reshape(6, 512).requires_grad_(), *planes, bias.detach(), ggml_type, "")
    torch.library.opcheck(torch.ops.lq.ggml_linear.default, arguments)
    torch.library.opcheck(torch.ops.lq.ggml_dequantize.default, (*planes, ggml_type, 512, torch.float16))
    compiled = torch.compile(
        lambda x: ggml_linear(x, planes, ggml_type=ggml_type, bias=bias), fullgraph=True, backend="aot_eager"
    )
    for m in (1, 3, 4):
        a = torch.randn(m, 512, device=device)
        assert torch.equal(compiled(a), ggml_linear(a, planes, ggml_type=ggml_type, bias=bias))


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_and_no_rows(device):
    planes, _ = weight("q8_0", 8, 96, device)
    assert ggml_linear(torch.empty(0, 96, device=device), planes, ggml_type="q8_0").shape == (0, 8)
    none = GGML_PLANES["q8_0"].pack(random_blocks("q8_0", 0, 3).to(device))
    assert ggml_linear(torch.empty(2, 96, device=device), none, ggml_type="q8_0").shape == (2, 0)
    assert ggml_dequantize(none, ggml_type="q8_0", in_features=96).shape == (0, 96)


@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.parametrize("arch", [H200, L4], ids=["h200", "l4"])
def test_up_to_64_tokens_stay_packed_and_more_go_to_the_vendor(arch, ggml_type):
    for n, k in ((4096, 4096), (4096, 14336), (14336, 4096), (1024, 4096)):
        for m in (1, 2, 7, 8, 16, 33, 64):
            chosen = select(make_problem(m, n, k, ggml_type, torch.bfloat16, arch)).name
            assert chosen in ("triton-gemv", "triton-splitk"), f"M={m} N={n} K={k}"
    for m in (65, 128, 4096):
        assert select(make_problem(m, 4096, 14336, ggml_type, torch.bfloat16, arch)).name == "dequant-blas"


def test_the_choice_explains_itself():
    cpu = explain(make_problem(1, 64, 256, "q4_k", torch.float32, Arch("cpu")))
    assert cpu.chosen == "dequant-blas"
    assert dict(cpu.rejected)["triton-splitk"] == "needs a GPU"
    turing = explain(make_problem(1, 64, 256, "q4_k", torch.float32, Arch("cuda", (7, 5), "NVIDIA T4", 40)))
    assert "7.5" in dict(turing.rejected)["triton-gemv"]
    assert str(cpu.problem) == "ggml m=1 n=64 k=256 g=32 asym float32 on cpu"
    assert make_problem(1, 64, 256, "q6_k", torch.float32, Arch("cpu")).group_size == 16


@pytest.mark.parametrize("k", [32, 768, 4096, 14336, 28672])
@pytest.mark.parametrize("n", [1, 100, 1024, 4096, 14336, 128256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("sm_count", [0, 1, 58, 132])
def test_configurations_fill_the_gpu_and_leave_work_for_each_share(n, k, itemsize, sm_count):
    for name, layout in GGML_PLANES.items():
        chunks = -(-k // layout.chunk)
        for m in (1, 8, 9, 16, 17, 33, 64, 100):
            config = dot_config(m, n, k, layout, itemsize, sm_count)
            assert config.block_m == (16 if itemsize == 4 else tile_m(m))
            assert (config.block_n, config.num_warps) in ((32, 1), (32, 2), (64, 4), (32, 8))
            assert config.split_k == 1 or config.split_k * 2 <= chunks
            tiles = -(-n // config.block_n) * -(-m // config.block_m)
            if config.split_k * 4 <= chunks and config.split_k < SPLITS[-1]:
                assert 2 * tiles * config.split_k >= sm_count, f"{name} M={m}: multiprocessors are idle"
        config = gemv_config(n, k, layout, sm_count)
        assert config.block_chunks <= 8
        assert config.block_chunks < 2 * chunks
        assert config.block_n == config.num_warps


def test_k_is_shared_as_was_measured_to_be_best_and_not_where_there_are_rows_enough():
    for layout in GGML_PLANES.values():
        for m in (1, 16, 32, 64):
            assert dot_config(m, 4096, 4096, layout, 2, 132).split_k == 4
            assert dot_config(m, 4096, 14336, layout, 2, 132).split_k == (4 if layout.chunk == 256 else 8)
            assert dot_config(m, 128256, 4096, layout, 2, 132).split_k == 1


def test_the_tile_of_tokens_alone_decides_on_a_configuration():
    """A new number of tokens compiles nothing once its tile is known."""
    assert [tile_m(m) for m in (1, 8, 9, 16, 17, 32, 33, 64, 65, 5000)] == [8, 8, 16, 16, 32, 32, 64, 64, 64, 64]
    for layout in GGML_PLANES.values():
        found = {(tile_m(m), dot_config(m, 4096, 4096, layout, 2, 132)) for m in range(1, 65)}
        assert len(found) == 4


# What was measured on an H200 (benchmarks/results/h200/ggml-sweep.jsonl), in the configurations that are launched; for Q6_K,
# 14336, 8 with K in 12 shares instead of 8.
MEASURED = {
    ("q4_1", 4096): {"gemv": 8.4, 8: 11.5, 16: 13.1, 32: 14.6, 64: 18.8},
    ("q4_1", 14336): {"gemv": 23.8, 8: 28.8, 16: 34.2, 32: 38.9, 64: 52.0},
    ("q5_0", 4096): {"gemv": 9.7, 8: 12.8, 16: 13.6, 32: 15.0, 64: 18.8},
    ("q5_0", 14336): {"gemv": 27.5, 8: 30.7, 16: 32.8, 32: 38.7, 64: 55.2},
    ("q8_0", 4096): {"gemv": 8.9, 8: 11.1, 16: 12.2, 32: 13.0, 64: 16.3},
    ("q8_0", 14336): {"gemv": 25.6, 8: 25.9, 16: 28.5, 32: 30.9, 64: 44.5},
    ("q4_k", 4096): {"gemv": 9.4, 8: 11.5, 16: 13.0, 32: 15.3, 64: 18.9},
    ("q4_k", 14336): {"gemv": 27.0, 8: 27.1, 16: 32.7, 32: 40.4, 64: 52.5},
    ("q6_k", 4096): {"gemv": 11.8, 8: 13.8, 16: 15.1, 32: 16.6, 64: 22.6},
    ("q6_k", 14336): {"gemv": 35.0, 8: 35.6, 16: 40.5, 32: 44.4, 64: 64.4},
}


@pytest.mark.parametrize(("name", "k"), MEASURED, ids=str)
def test_predictions_are_near_what_was_measured(name, k):
    for m, us in MEASURED[name, k].items():
        if m == "gemv":
            predicted = predict_gemv_us(make_problem(1, 4096, k, name, torch.bfloat16, H200))
        else:
            predicted = predict_splitk_us(make_problem(m, 4096, k, name, torch.bfloat16, H200))
        assert predicted == pytest.approx(us, rel=0.15), f"M={m}"


def test_what_does_not_fit_is_named():
    planes, _ = weight("q5_0", 8, 64)
    x = torch.randn(2, 64)
    with pytest.raises(SpecError, match="q9"):
        ggml_linear(x, planes, ggml_type="q9")
    with pytest.raises(ShapeError, match="activations"):
        ggml_linear(x, planes, ggml_type="q8_1")
    with pytest.raises(ShapeError, match="multiple of 32"):
        ggml_linear(torch.randn(2, 65), planes, ggml_type="q5_0")
    with pytest.raises(ShapeError, match="no plane 'high'"):
        ggml_linear(x, planes, ggml_type="q4_0")
    with pytest.raises(ShapeError, match="codes has shape"):
        ggml_linear(torch.randn(2, 512), planes, ggml_type="q5_0")
    with pytest.raises(DTypeError, match="codes has dtype"):
        ggml_linear(x, planes._replace(codes=planes.codes.float()), ggml_type="q5_0")
    with pytest.raises(DTypeError, match="float64"):
        ggml_linear(x.double(), planes, ggml_type="q5_0")
    with pytest.raises(DTypeError, match="bias"):
        ggml_linear(x, planes, ggml_type="q5_0", bias=torch.zeros(8, dtype=torch.bfloat16))
    with pytest.raises(ShapeError, match="bias"):
        ggml_linear(x, planes, ggml_type="q5_0", bias=torch.zeros(9))
    with pytest.raises(DeviceError, match="codes is on cpu"):
        ggml_linear(x.to("meta"), planes, ggml_type="q5_0")
    with pytest.raises(NoKernelError, match="needs a GPU"):
        ggml_linear(x, planes, ggml_type="q5_0", kernel="triton-gemv")
    with pytest.raises(DTypeError, match="int32"):
        ggml_dequantize(planes, ggml_type="q5_0", in_features=64, dtype=torch.int32)
    with pytest.raises(ShapeError, match="positive"):
        ggml_dequantize(planes, ggml_type="q5_0", in_features=0)

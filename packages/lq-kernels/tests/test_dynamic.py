"""Products with activations quantized to 8 bits: their definition on the CPU, and every kernel against it."""

import pytest
import torch
from lq_formats import (
    DTypeError,
    NoKernelError,
    QuantSpec,
    ShapeError,
    SpecError,
    choose_qparams,
    pack_int4,
    quantize_affine,
    quantize_weight_per_channel,
)
from lq_kernels import (
    Arch,
    Problem,
    explain,
    int4_dequantize,
    int4_dynamic_dequantize,
    int4_dynamic_linear,
    int8_dynamic_linear,
    kernel_names,
    pack_int4_dynamic,
    quantize_tokens,
    restore_int4_dynamic,
    select,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ["int8", "fp8"]
TOPS = {"int8": 127, "fp8": 448}
H200 = Arch("cuda", (9, 0), "NVIDIA H200", 132)


def floats(*shape, dtype=FP32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def int8_weight(n, k, activation, device="cpu"):
    """Return codes and scales, and the float64 weight they stand for."""
    w = floats(n, k, seed=n + k, device=device) * 0.02
    codes, scale = quantize_weight_per_channel(w) if activation == "int8" else quantize_tokens(w, "fp8")
    return codes, scale, codes.double() * scale.double()[:, None]


def int4_weight(n, k, activation, group_size=128, device="cpu", lowest=False):
    """Return the packed weight and scales, whether -8 occurs, and the float64 weight."""
    group_size = k if group_size == -1 else group_size
    spec = QuantSpec(4, "group", group_size, True, BF16)
    w = floats(n, k, seed=n + k, device=device) * 0.02
    scale, _ = choose_qparams(w, spec)
    if lowest:
        scale = scale * 0.5  # so that weights are clipped at -8 and 7
    qweight = pack_int4(quantize_affine(w, scale, None, spec))
    packed = pack_int4_dynamic(qweight, scale, group_size=group_size, in_features=k, activation=activation)
    return *packed, int4_dequantize(qweight, scale, group_size=group_size, in_features=k, dtype=torch.float64)


def product(x, w, activation, bias=None):
    """Return the definition in float64."""
    codes, scale = quantize_tokens(x, activation)
    y = codes.double() * scale.double().unsqueeze(-1) @ w.t()
    return y if bias is None else y + bias.double()


def close(y, exact, dtype):
    relative = float((y.double() - exact).norm() / exact.norm())
    # dequant-blas rounds both operands, the Hopper kernel's e4m3 sums lose bits.
    assert relative < {BF16: 8e-3, FP16: 4e-3, FP32: 1e-5}[dtype], relative


# ---- tokens ----


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_codes_are_the_nearest_and_the_largest_is_reached(activation, dtype):
    x = floats(50, 300, dtype=dtype) * torch.logspace(-3, 3, 50)[:, None].to(dtype)
    codes, scale = quantize_tokens(x, activation)
    assert codes.dtype == (torch.int8 if activation == "int8" else torch.float8_e4m3fn)
    assert scale.dtype == FP32
    torch.testing.assert_close(scale.double(), x.double().abs().amax(1) / TOPS[activation], rtol=1e-6, atol=0)
    assert bool((codes.double().abs().amax(1) == TOPS[activation]).all())
    error = (codes.double() * scale.double()[:, None] - x.double()).abs()
    if activation == "int8":
        bound = 0.50001 * scale.double()[:, None].expand_as(error)
    else:  # three bits after the first, down to a unit of 2**-9
        bound = torch.maximum(x.double().abs() * 2.0**-4, 2.0**-10 * scale.double()[:, None]) * 1.0001
    assert bool((error <= bound).all())


def test_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_tokens(x, "int8")[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10]])
    assert quantize_tokens(x, "fp8")[0].float().tolist() == [[448, 16, 20, -16, 0, 2.0**-8]]


@pytest.mark.parametrize("activation", KINDS)
def test_awkward_tokens(activation):
    big, tiny = torch.finfo(FP32).max, 2.0**-149
    x = torch.tensor(
        [[0.0, 0.0], [torch.nan, 1.0], [1.0, torch.inf], [-torch.inf, 0.0], [big, -big], [tiny, -tiny], [1, -1]]
    )
    codes, scale = quantize_tokens(x, activation)
    top = TOPS[activation]
    assert codes.float().tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [top, -top], [0, 0], [top, -top]]
    assert scale.isnan().tolist() == [False, True, True, True, False, False, False]
    assert bool((scale[[0, 4, 5, 6]] > 0).all())


@pytest.mark.parametrize("activation", KINDS)
def test_any_leading_dimensions_and_none(activation):
    x = floats(2, 3, 40)
    codes, scale = quantize_tokens(x, activation)
    assert (codes.shape, scale.shape) == (x.shape, x.shape[:-1])
    flat = quantize_tokens(x.view(6, 40), activation)
    assert torch.equal(codes.view(6, 40).view(torch.uint8), flat[0].view(torch.uint8))
    codes, scale = quantize_tokens(x[:, :0], activation)
    assert (codes.shape, scale.shape) == ((2, 0, 40), (2, 0))


# ---- products ----


@pytest.mark.parametrize("kernel", [None, "dequant-blas", "reference"])
@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_products_are_as_defined(kernel, activation, dtype):
    x, bias = floats(2, 7, 256, dtype=dtype), floats(40, dtype=dtype)
    codes, scale, w = int8_weight(40, 256, activation)
    close(int8_dynamic_linear(x, codes, scale, bias, kernel=kernel), product(x, w, activation, bias), dtype)
    for group_size in (128, 32, -1):
        packed, scales, lowest, w = int4_weight(40, 256, activation, group_size)
        assert not lowest
        options = {"group_size": 256 if group_size == -1 else group_size, "out_features": 40, "activation": activation}
        y = int4_dynamic_linear(x, packed, scales, bias, lowest=lowest, kernel=kernel, **options)
        close(y, product(x, w, activation, bias), dtype)


@pytest.mark.parametrize("activation", KINDS)
def test_nothing_is_lost_in_packing(activation):
    for lowest in (False, True):
        packed, scales, found, w = int4_weight(33, 384, activation, lowest=lowest)
        assert found is (lowest and activation == "fp8")
        sizes = {"group_size": 128, "out_features": 33, "in_features": 384, "activation": activation}
        assert torch.equal(int4_dynamic_dequantize(packed, scales, dtype=torch.float64, **sizes), w)
        qweight, scale = restore_int4_dynamic(packed, scales, **sizes)
        assert torch.equal(int4_dequantize(qweight, scale, group_size=128, in_features=384, dtype=torch.float64), w)


@pytest.mark.parametrize("activation", KINDS)
def test_a_token_that_is_not_finite_makes_its_row_nan_and_no_other(activation):
    x = floats(4, 64)
    x[1, 5], x[3, 0] = torch.nan, torch.inf
    codes, scale, w = int8_weight(24, 64, activation)
    y = int8_dynamic_linear(x, codes, scale)
    assert y.isnan().all(1).tolist() == [False, True, False, True]
    close(y[[0, 2]], product(x[[0, 2]], w, activation), FP32)


@pytest.mark.parametrize("activation", KINDS)
def test_gradients_pass_straight_through(activation):
    x, bias = floats(3, 128).requires_grad_(), floats(24).requires_grad_()
    codes, scale, w = int8_weight(24, 128, activation)
    grad = floats(3, 24, seed=1)
    int8_dynamic_linear(x, codes, scale, bias).backward(grad)
    torch.testing.assert_close(x.grad, (grad.double() @ w).float())
    torch.testing.assert_close(bias.grad, grad.sum(0))
    packed, scales, lowest, w = int4_weight(24, 128, activation)
    x.grad = None
    options = {"group_size": 128, "out_features": 24, "activation": activation, "lowest": lowest}
    int4_dynamic_linear(x, packed, scales, **options).backward(grad)
    torch.testing.assert_close(x.grad, (grad.double() @ w).float())


@pytest.mark.parametrize("activation", KINDS)
def test_operators_trace(activation):
    codes, scale, _ = int8_weight(24, 128, activation)
    packed, scales, lowest, _ = int4_weight(24, 128, activation)
    x, bias = floats(3, 128), floats(24)
    ops = torch.ops.lq
    # The checker itself cannot compare float8 tensors.
    utils = ("test_schema", "test_faketensor") if activation == "int8" else ("test_faketensor",)
    torch.library.opcheck(ops.quantize_tokens.default, (x, activation), test_utils=utils)
    torch.library.opcheck(ops.int8_dynamic_linear.default, (x, codes, scale, bias, ""), test_utils=utils)
    arguments = (x, packed, scales, bias, 128, 24, activation, lowest, "")
    torch.library.opcheck(ops.int4_dynamic_linear.default, arguments, test_utils=utils)

    def both(x):
        y = int4_dynamic_linear(x, packed, scales, group_size=128, out_features=24, activation=activation)
        return y + int8_dynamic_linear(x, codes, scale, bias)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), both(x))
    assert int8_dynamic_linear(x[:0], codes, scale).shape == (0, 24)


# ---- selection and errors ----


def problem(op, activation, m=2048, n=4096, k=4096, group_size=None, dtype=BF16, arch=H200, symmetric=True):
    bits = 4 if op == "int4_dynamic" else 8
    spec = QuantSpec(bits, "group" if group_size else "row", group_size, symmetric, BF16)
    return Problem(op, m, n, k, spec, dtype, arch, activation)


@pytest.mark.parametrize("activation", KINDS)
def test_the_hopper_kernel_is_chosen_where_it_can_run(activation):
    for op, group_size in (("int8_dynamic", None), ("int4_dynamic", 128), ("int4_dynamic", None)):
        assert kernel_names(op) == ("cuda-a8", "dequant-blas", "reference")
        for m in (1, 64, 2048):
            assert select(problem(op, activation, m, group_size=group_size)).name == "cuda-a8"
        found = explain(problem(op, activation, group_size=group_size))
        assert activation in str(found)
        assert 20 < found.predicted_us < 200
        assert select(problem(op, activation, arch=Arch("cpu"), group_size=group_size)).name == "dequant-blas"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"op": "int4_dynamic", "group_size": 64}, "groups of multiples of 128"),
        ({"op": "int4_dynamic", "k": 4100}, "divisible by 8"),
        ({"op": "int8_dynamic", "k": 4104}, "divisible by 16"),
        ({"op": "int8_dynamic", "k": 65552}, "up to 65536"),
        ({"op": "int8_dynamic", "dtype": FP32}, "bfloat16 and float16"),
        ({"op": "int4_dynamic", "symmetric": False}, "symmetric"),
        ({"op": "int8_dynamic", "arch": Arch("cuda", (8, 9), "NVIDIA L40S", 142)}, "Hopper"),
    ],
)
def test_what_the_hopper_kernel_declines(options, reason):
    found = dict(explain(problem(activation="fp8", **options)).rejected)
    assert reason in found["cuda-a8"]


def test_errors():
    x = floats(3, 128)
    codes, scale, _ = int8_weight(24, 128, "int8")
    packed, scales, _, _ = int4_weight(24, 128, "fp8")
    options = {"group_size": 128, "out_features": 24, "activation": "fp8"}
    with pytest.raises(SpecError, match="activation='int4'"):
        quantize_tokens(x, "int4")
    with pytest.raises(DTypeError, match="weight has dtype"):
        int8_dynamic_linear(x, codes.float(), scale)
    with pytest.raises(ShapeError, match="weight has shape"):
        int8_dynamic_linear(x, codes[:, :64], scale)
    with pytest.raises(ShapeError, match="one a row"):
        int8_dynamic_linear(x, codes, scale[0])
    with pytest.raises(ShapeError, match="bias"):
        int8_dynamic_linear(x, codes, scale, floats(23))
    with pytest.raises(ShapeError, match="packed has shape"):
        int4_dynamic_linear(x, packed[:0], scales, **options)
    with pytest.raises(ShapeError, match="scale has shape"):
        int4_dynamic_linear(x, packed, scales[:, :8], **options)
    with pytest.raises(ShapeError, match="group_size"):
        int4_dynamic_linear(x, packed, scales, **(options | {"group_size": 100}))
    with pytest.raises(DTypeError, match="packed has dtype"):
        int4_dynamic_linear(x, packed.float(), scales, **options)
    with pytest.raises(NoKernelError, match="needs a Hopper GPU"):
        int4_dynamic_linear(x, packed, scales, kernel="cuda-a8", **options)


# ---- on a GPU ----


def another_gpu():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)


@pytest.mark.gpu
@pytest.mark.skipif("another_gpu()", reason="needs compute capability 9.0")
class TestOnHopper:
    @pytest.mark.parametrize("activation", KINDS)
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    @pytest.mark.parametrize("k", [8, 24, 128, 1000, 1024, 2048, 4096, 8192, 14336, 32768, 65536])
    def test_tokens_have_the_bytes_of_the_cpu(self, activation, dtype, k):
        x = floats(37, k, dtype=dtype, seed=k) * torch.logspace(-4, 2, 37)[:, None].to(dtype)
        x[3], x[5, k // 2], x[7, k - 1], x[9, 0] = 0, torch.nan, torch.inf, -torch.inf
        x[11] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        x[13, :8] = torch.finfo(dtype).max
        x[15] = torch.arange(k).remainder(255).sub(127).to(dtype) * 0.5  # ties
        codes, scale = quantize_tokens(x.cuda(), activation)
        expected = quantize_tokens(x, activation)
        assert torch.equal(codes.cpu().view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(scale.cpu().view(torch.int32), expected[1].view(torch.int32))

    def test_every_bf16_and_fp16_number_is_quantized_as_on_the_cpu(self):
        for dtype in (BF16, FP16):
            every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
            every = every[every.isfinite() & (every.abs() <= 100)]
            x = every[: every.numel() // 64 * 64].view(-1, 64).clone()
            x[:, 0] = torch.linspace(100, 30000, x.shape[0]).to(dtype)
            for activation in KINDS:
                codes, _ = quantize_tokens(x.cuda(), activation)
                assert torch.equal(codes.cpu().view(torch.uint8), quantize_tokens(x, activation)[0].view(torch.uint8))

    @pytest.mark.parametrize("activation", KINDS)
    @pytest.mark.parametrize("dtype", [BF16, FP16])
    @pytest.mark.parametrize("m", [0, 1, 2, 16, 17, 64, 100, 300, 1000, 2049])
    def test_products(self, activation, dtype, m):
        x, bias = floats(m, 1024, dtype=dtype, device="cuda"), floats(520, dtype=dtype, device="cuda")
        codes, scale, w = int8_weight(520, 1024, activation, "cuda")
        y = int8_dynamic_linear(x, codes, scale, bias, kernel="cuda-a8")
        assert y.shape == (m, 520)
        if m:
            close(y, product(x, w, activation, bias), dtype)
        for group_size, with_lowest in ((128, False), (256, True), (-1, False), (-1, True)):
            packed, scales, lowest, w = int4_weight(520, 1024, activation, group_size, "cuda", with_lowest)
            size = 1024 if group_size == -1 else group_size
            options = {"group_size": size, "out_features": 520, "activation": activation, "lowest": lowest}
            y = int4_dynamic_linear(x, packed, scales, bias, kernel="cuda-a8", **options)
            if m:
                close(y, product(x, w, activation, bias), dtype)
                again = int4_dynamic_linear(x, packed, scales, bias, kernel="cuda-a8", **options)
                assert torch.equal(y, again)

    @pytest.mark.parametrize("activation", KINDS)
    def test_strided_and_batched_tokens(self, activation):
        codes, scale, _ = int8_weight(256, 512, activation, "cuda")
        wide = torch.full((2, 50, 2048), torch.nan, device="cuda", dtype=BF16)
        wide[..., 512:1024] = floats(2, 50, 512, dtype=BF16, device="cuda")
        x = wide[..., 512:1024]
        expected = int8_dynamic_linear(x.contiguous(), codes, scale)
        assert torch.equal(int8_dynamic_linear(x, codes, scale), expected)
        assert torch.equal(int8_dynamic_linear(wide[0, :, 512:1024], codes, scale), expected[0])
        odd = torch.empty(50 * 512 + 1, device="cuda", dtype=BF16)[1:].view(50, 512).copy_(x[0])
        assert torch.equal(int8_dynamic_linear(odd, codes, scale), expected[0])
        transposed = x[0].t().contiguous().t()
        assert torch.equal(int8_dynamic_linear(transposed, codes, scale), expected[0])

    @pytest.mark.parametrize("activation", KINDS)
    @pytest.mark.parametrize("m", [5, 300])
    def test_tokens_that_are_not_finite(self, activation, m):
        x = floats(m, 1024, dtype=BF16, device="cuda")
        x[1, 5], x[m - 1, 1023] = torch.nan, -torch.inf
        codes, scale, _ = int8_weight(264, 1024, activation, "cuda")
        packed, scales, lowest, _ = int4_weight(264, 1024, activation, device="cuda")
        options = {"group_size": 128, "out_features": 264, "activation": activation, "lowest": lowest}
        for y in (int8_dynamic_linear(x, codes, scale), int4_dynamic_linear(x, packed, scales, **options)):
            assert y.isnan().all(1).nonzero().flatten().tolist() == [1, m - 1]
            assert y.isnan().any(1).nonzero().flatten().tolist() == [1, m - 1]

    @pytest.mark.parametrize("activation", KINDS)
    def test_chains_of_launches_and_graphs(self, activation):
        # Each kernel starts before the one it depends on has ended.
        codes, scale, _ = int8_weight(1024, 1024, activation, "cuda")
        packed, scales, lowest, _ = int4_weight(1024, 1024, activation, device="cuda")
        options = {"group_size": 128, "out_features": 1024, "activation": activation, "lowest": lowest}

        def chain(x):
            for _ in range(5):
                x = int8_dynamic_linear(x, codes, scale)
                x = int4_dynamic_linear(x, packed, scales, **options)
            return x

        for m in (1, 64, 512):
            x = floats(m, 1024, dtype=BF16, device="cuda")
            expected = chain(x)
            assert bool(expected.isfinite().all())
            for _ in range(20):
                assert torch.equal(chain(x), expected)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = chain(x)
            for _ in range(20):
                y.fill_(torch.nan)
                graph.replay()
                assert torch.equal(y, expected)

    def test_model_weights(self):
        x = floats(2048, 4096, dtype=BF16, device="cuda")
        for activation in KINDS:
            for n, k in ((4096, 4096), (14336, 4096)):
                codes, scale, w = int8_weight(n, k, activation, "cuda")
                close(int8_dynamic_linear(x, codes, scale), product(x, w, activation), BF16)
                packed, scales, lowest, w = int4_weight(n, k, activation, device="cuda")
                options = {"group_size": 128, "out_features": n, "activation": activation, "lowest": lowest}
                close(int4_dynamic_linear(x, packed, scales, **options), product(x, w, activation), BF16)

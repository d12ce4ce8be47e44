"""Weights in fragment order: lossless, and right by every kernel, against float64 references."""

import pytest
import torch
from lq_formats import (
    DeviceError,
    DTypeError,
    GroupSizeError,
    NoKernelError,
    OutOfRangeError,
    ShapeError,
    dequantize_q4_0,
    pack_int4,
    quantize_q4_0,
)
from lq_kernels import (
    Arch,
    kernel_names,
    preshuffle_int4,
    preshuffle_int8,
    preshuffle_q4_0,
    preshuffled_dequantize,
    preshuffled_linear,
    q4_0,
    reads_fragments,
    restore_int4,
    restore_int8,
    restore_q4_0,
)
from lq_kernels.cuda import constraints

FORMATS = [
    pytest.param(4, 128, False, torch.bfloat16, id="int4-g128-sym"),
    pytest.param(4, 32, False, torch.float16, id="int4-g32-sym"),
    pytest.param(4, 64, True, torch.bfloat16, id="int4-g64-asym"),
    pytest.param(4, 256, True, torch.float32, id="int4-g256-asym-fp32"),
    pytest.param(4, -1, False, torch.float32, id="int4-row-sym"),
    pytest.param(4, -1, True, torch.bfloat16, id="int4-row-asym"),
    pytest.param(8, -1, False, torch.float32, id="int8-row"),
]
DTYPES = [pytest.param(torch.bfloat16, 8e-3, id="bf16"), pytest.param(torch.float16, 1.5e-3, id="fp16")]
TOKENS = (1, 2, 3, 5, 8, 16, 17, 64, 100, 128, 256, 1000)


def make(n, k, bits, group, zero, scale_dtype, device="cpu", seed=0):
    """Return canonical tensors, the weight in fragment order and the float64 weight."""
    generator = torch.Generator().manual_seed(seed)
    size = k if group == -1 else group
    scale = (torch.rand(n, k // size, generator=generator) * 0.02 + 0.001).to(scale_dtype)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, scale.shape, generator=generator, dtype=torch.uint8) if zero else None
    offset = zeros.double() if zero else torch.full(scale.shape, float(1 << (bits - 1)), dtype=torch.float64)
    w = (codes.double() - offset.repeat_interleave(size, 1)) * scale.double().repeat_interleave(size, 1)
    if bits == 4:
        canonical = (pack_int4(codes), scale, zeros)
        weight = preshuffle_int4(*canonical, group_size=size, in_features=k)
    else:
        canonical = ((codes ^ 0x80).view(torch.int8), scale[:, 0].contiguous(), None)
        weight = (*preshuffle_int8(*canonical[:2]), None)
    weight = tuple(None if t is None else t.to(device) for t in weight)
    return canonical, weight, w.to(device), size


def error(y, x, w, bias=None):
    exact = x.double() @ w.t() + (0 if bias is None else bias.double())
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("bits", "group", "zero", "scale_dtype"), FORMATS)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (100, 1280), (17, 256)])
def test_nothing_is_lost(n, k, bits, group, zero, scale_dtype):
    canonical, (packed, scale, zeros), w, size = make(n, k, bits, group, zero, scale_dtype)
    if bits == 4:
        codes, scales, back = restore_int4(packed, scale, zeros, group_size=size, out_features=n, in_features=k)
        assert back is None if canonical[2] is None else torch.equal(back, canonical[2].to(scale_dtype))
    else:
        codes, scales = restore_int8(packed, scale, out_features=n, in_features=k)
    assert torch.equal(codes, canonical[0])
    assert torch.equal(scales, canonical[1])
    dense = preshuffled_dequantize(
        packed, scale, zeros, bits=bits, group_size=size, out_features=n, in_features=k, dtype=torch.float32
    )
    assert torch.equal(dense, w.to(torch.float32)) or float((dense - w).abs().max()) < 1e-7


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", [8, 16, 24, 40, 48, 80])
def test_nor_with_groups_that_end_within_a_k_step(group, zero, device):
    canonical, (packed, scale, zeros), w, _ = make(33, 240, 4, group, zero, torch.float16, device)
    sizes = {"group_size": group, "out_features": 33, "in_features": 240}
    codes, scales, back = restore_int4(packed, scale, zeros, **sizes)
    assert torch.equal(codes.cpu(), canonical[0])
    assert torch.equal(scales.cpu(), canonical[1])
    assert back is None if canonical[2] is None else torch.equal(back.cpu(), canonical[2].to(torch.float16))
    dense = preshuffled_dequantize(packed, scale, zeros, bits=4, **sizes, dtype=torch.float32)
    assert float((dense - w).abs().max()) < 1e-7


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("n", "k"), [(0, 64), (1, 32), (7, 32), (17, 96), (40, 160), (100, 1056), (64, 512)])
def test_q4_0_comes_back_byte_for_byte(n, k, device, monkeypatch):
    blocks = torch.randint(0, 256, (n, k // 32, 18), dtype=torch.uint8)
    special = torch.tensor([0.0, -0.0, 6e-8, torch.inf, torch.nan], dtype=torch.float16).view(torch.uint8).view(5, 2)
    nans = torch.tensor([[0x01, 0x7C], [0xFF, 0xFF], [0x00, 0xFE]], dtype=torch.uint8)
    odd = torch.cat((special, nans))
    blocks[: n // 2, :, :2] = odd[torch.randint(0, 8, (n // 2, k // 32))]
    blocks = blocks.to(device)
    for chunk in (q4_0._CHUNK, 1):  # all at once, and 16 rows at a time
        monkeypatch.setattr(q4_0, "_CHUNK", chunk)
        packed, scale = preshuffle_q4_0(blocks)
        assert scale.dtype == torch.float16
        assert torch.equal(restore_q4_0(packed, scale, out_features=n, in_features=k), blocks)
    rows = torch.randint(0, max(n, 1), (min(n, 50),), device=device)
    assert torch.equal(restore_q4_0(packed, scale, out_features=n, in_features=k, rows=rows), blocks[rows])


@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 96), (100, 1056)])
def test_q4_0_is_a_weight_in_groups_of_32(n, k):
    blocks = quantize_q4_0(torch.randn(n, k))
    weight, w = preshuffle_q4_0(blocks), dequantize_q4_0(blocks, torch.float64)
    sizes = {"bits": 4, "group_size": 32, "out_features": n}
    dense = preshuffled_dequantize(*weight, **sizes, in_features=k)
    assert torch.equal(dense, dequantize_q4_0(blocks))
    x = torch.randn(3, k)
    assert error(preshuffled_linear(x, *weight, **sizes), x, w) < 1e-5


def test_what_is_no_q4_0_is_named():
    packed, scale = preshuffle_q4_0(quantize_q4_0(torch.randn(16, 128)))
    with pytest.raises(DTypeError, match="expected uint8 Q4_0 blocks"):
        preshuffle_q4_0(torch.zeros(16, 4, 18))
    with pytest.raises(ShapeError, match=r"\(16, 4, 20\): expected \(N, K / 32, 18\)"):
        preshuffle_q4_0(torch.zeros(16, 4, 20, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="packed has shape"):
        restore_q4_0(packed, scale, out_features=17, in_features=128)
    with pytest.raises(DTypeError, match="float16 scales"):
        restore_q4_0(packed, scale.float(), out_features=16, in_features=128)
    with pytest.raises(ShapeError, match="in_features=120"):
        restore_q4_0(packed, scale, out_features=16, in_features=120)


def test_rows_of_q4_0_are_rows_of_the_weight():
    blocks = quantize_q4_0(torch.randn(20, 64))  # 32 rows in fragment order
    packed, scale = preshuffle_q4_0(blocks)

    def restore(rows):
        return restore_q4_0(packed, scale, out_features=20, in_features=64, rows=rows)

    assert torch.equal(restore(torch.tensor([19, 0], dtype=torch.int32)), blocks[[19, 0]])
    for rows in ([20], [25], [3, -1], [40]):
        with pytest.raises(OutOfRangeError, match=r"rows from -?\d+ to \d+: this weight has rows 0 to 19"):
            restore(torch.tensor(rows))
    for rows, error_, why in (
        (torch.tensor([1.0]), DTypeError, "rows have dtype torch.float32"),
        (torch.tensor([[1]]), ShapeError, r"rows have shape \(1, 1\)"),
        (torch.tensor([1], device="meta"), DeviceError, "rows are on meta"),
        ([1], DTypeError, "rows is of type list"),
    ):
        with pytest.raises(error_, match=why):
            restore(rows)


def test_hopper_with_its_compiler_reads_fragments(monkeypatch):
    monkeypatch.setattr(constraints, "why_not_compile", lambda: None)
    assert constraints.why_not_hopper(Arch("cuda", (9, 0))) is None
    for other in (Arch("cpu"), Arch("cuda", (8, 0)), Arch("cuda", (10, 0)), Arch("rocm")):
        assert "9.0" in constraints.why_not_hopper(other)
    assert not reads_fragments(torch.device("cpu"))
    monkeypatch.setattr(constraints, "why_not_compile", lambda: "no compiler")
    assert constraints.why_not_hopper(Arch("cuda", (9, 0))) == "no compiler"


@pytest.mark.parametrize("kernel", [None, "dequant-blas", "reference"])
@pytest.mark.parametrize(("bits", "group", "zero", "scale_dtype"), FORMATS)
def test_products_on_the_cpu(bits, group, zero, scale_dtype, kernel):
    n, k = 100, 512
    _, (packed, scale, zeros), w, size = make(n, k, bits, group, zero, scale_dtype)
    x, bias = torch.randn(2, 3, k), torch.randn(n)
    y = preshuffled_linear(
        x, packed, scale, zeros, bits=bits, group_size=size, out_features=n, bias=bias, kernel=kernel
    )
    assert tuple(y.shape) == (2, 3, n)
    assert error(y.view(-1, n), x.view(-1, k), w, bias) < 1e-5


def test_no_tokens_give_an_empty_result():
    _, (packed, scale, zeros), _, size = make(32, 128, 4, 32, False, torch.float32)
    y = preshuffled_linear(torch.zeros(0, 128), packed, scale, zeros, bits=4, group_size=size, out_features=32)
    assert tuple(y.shape) == (0, 32)


def test_the_gradient_is_that_of_the_dense_weight():
    _, (packed, scale, zeros), w, size = make(32, 128, 4, 32, True, torch.float32)
    x = torch.randn(4, 128, requires_grad=True)
    bias = torch.randn(32, requires_grad=True)
    preshuffled_linear(x, packed, scale, zeros, bits=4, group_size=size, out_features=32, bias=bias).sum().backward()
    assert torch.allclose(x.grad.double(), w.sum(0).expand(4, -1), atol=1e-5)
    assert torch.equal(bias.grad, torch.full((32,), 4.0))


def test_opcheck():
    _, (packed, scale, zeros), _, size = make(32, 128, 4, 32, True, torch.float32)
    x = torch.randn(3, 128, requires_grad=True)
    torch.library.opcheck(torch.ops.lq.preshuffled_linear, (x, packed, scale, zeros, None, 4, size, 32, ""))
    torch.library.opcheck(torch.ops.lq.preshuffled_dequantize, (packed, scale, zeros, 4, size, 32, 128, torch.float32))


def test_bad_arguments_are_named():
    _, (packed, scale, zeros), _, size = make(32, 256, 4, 64, True, torch.float32)
    x = torch.randn(2, 256)
    arguments = {"bits": 4, "group_size": size, "out_features": 32}
    with pytest.raises(ShapeError, match="packed has shape"):
        preshuffled_linear(torch.randn(2, 512), packed, scale, zeros, **arguments)
    with pytest.raises(ShapeError, match="scale has shape"):
        preshuffled_linear(x, packed, scale[:1].contiguous(), zeros, **arguments)
    with pytest.raises(DTypeError, match="zero has dtype"):
        preshuffled_linear(x, packed, scale, zeros.to(torch.uint8), **arguments)
    with pytest.raises(DTypeError, match="packed has dtype"):
        preshuffled_linear(x, packed.view(torch.float32), scale, zeros, **arguments)
    with pytest.raises(ShapeError, match="bits=3"):
        preshuffled_linear(x, packed, scale, zeros, **{**arguments, "bits": 3})
    with pytest.raises(ShapeError, match="bias has shape"):
        preshuffled_linear(x, packed, scale, zeros, **arguments, bias=torch.zeros(3))
    with pytest.raises(DeviceError, match="residual is on meta and the other tensors on cpu"):
        preshuffled_linear(x, packed, scale, zeros, **arguments, residual=torch.zeros(2, 32, device="meta"))
    with pytest.raises(NoKernelError, match="needs a Hopper GPU"):
        preshuffled_linear(x, packed, scale, zeros, **arguments, kernel="cuda-decode")
    with pytest.raises(GroupSizeError):
        preshuffle_int4(torch.zeros(4, 8, dtype=torch.int32), scale, group_size=48, in_features=64)


def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize(("bits", "group", "zero", "scale_dtype"), FORMATS)
@pytest.mark.parametrize("kernel", kernel_names("preshuffled"))
def test_every_kernel_on_a_gpu(kernel, bits, group, zero, scale_dtype, dtype, bound):
    if kernel.startswith("cuda"):
        hopper()
    for n, k in ((256, 1024), (1000, 2304), (48, 512)):
        _, (packed, scale, zeros), w, size = make(n, k, bits, group, zero, scale_dtype, "cuda", seed=n)
        for m in TOKENS:
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            bias = torch.randn(n, device="cuda", dtype=dtype) if m % 2 else None
            arguments = {"bits": bits, "group_size": size, "out_features": n, "bias": bias, "kernel": kernel}
            if kernel == "cuda-prefill" and dtype == torch.float16 and size != k and scale_dtype != dtype:
                with pytest.raises(NoKernelError, match="may not fit float16"):
                    preshuffled_linear(x, packed, scale, zeros, **arguments)
                continue
            y = preshuffled_linear(x, packed, scale, zeros, **arguments)
            assert error(y, x, w, bias) < bound, (n, k, m)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cuda-decode", "cuda-prefill"])
def test_in_features_that_are_no_multiple_of_a_step(kernel):
    hopper()
    for k in (8, 136, 1000, 4104):
        _, (packed, scale, zeros), w, size = make(80, k, 4, -1, True, torch.float32, "cuda")
        for m in (1, 16, 40):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            y = preshuffled_linear(x, packed, scale, zeros, bits=4, group_size=size, out_features=80, kernel=kernel)
            assert error(y, x, w) < 8e-3, (k, m)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cuda-decode", "cuda-prefill"])
@pytest.mark.parametrize("m", [1, 16, 32, 200])
def test_a_thousand_runs_are_bitwise_equal_into_poisoned_memory(kernel, m):
    hopper()
    n, k = 4096, 4096
    _, (packed, scale, zeros), w, size = make(n, k, 4, 128, False, torch.bfloat16, "cuda")
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    arguments = {"bits": 4, "group_size": size, "out_features": n, "kernel": kernel}
    first = preshuffled_linear(x, packed, scale, zeros, **arguments)
    assert error(first, x, w) < 8e-3
    different = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        poison = torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)
        del poison  # the next result takes its memory
        different += (preshuffled_linear(x, packed, scale, zeros, **arguments) != first).sum()
    assert int(different) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cuda-decode", "cuda-prefill"])
def test_nan_and_infinity_propagate_to_their_token_only(kernel):
    hopper()
    _, (packed, scale, zeros), _, size = make(256, 512, 4, 128, False, torch.bfloat16, "cuda")
    for value in (float("nan"), float("inf")):
        x = torch.randn(20, 512, device="cuda", dtype=torch.bfloat16)
        x[3, 77] = value
        y = preshuffled_linear(x, packed, scale, zeros, bits=4, group_size=size, out_features=256, kernel=kernel)
        assert not bool(torch.isfinite(y[3]).any())
        assert bool(torch.isfinite(torch.cat((y[:3], y[4:]))).all())


@pytest.mark.gpu
def test_a_tokens_result_does_not_depend_on_the_others_in_a_decode_tile():
    hopper()
    _, (packed, scale, zeros), _, size = make(1024, 2048, 4, 128, False, torch.bfloat16, "cuda")
    x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16)
    arguments = {"bits": 4, "group_size": size, "out_features": 1024, "kernel": "cuda-decode"}
    whole = preshuffled_linear(x, packed, scale, zeros, **arguments)
    x[1:] = torch.randn_like(x[1:])
    assert torch.equal(preshuffled_linear(x, packed, scale, zeros, **arguments)[0], whole[0])


@pytest.mark.gpu
def test_graphs_streams_and_strided_activations():
    hopper()
    n, k = 512, 1024
    _, (packed, scale, zeros), w, size = make(n, k, 4, 128, False, torch.bfloat16, "cuda")
    arguments = {"bits": 4, "group_size": size, "out_features": n}
    wide = torch.randn(12, 2 * k, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, :k], wide[:, k:], wide[:, 1 : k + 1], wide.view(24, k)[::3]):
        for kernel in ("cuda-decode", "cuda-prefill"):
            assert error(preshuffled_linear(x, packed, scale, zeros, **arguments, kernel=kernel), x, w) < 8e-3
    x = torch.randn(4, k, device="cuda", dtype=torch.bfloat16)
    expected = preshuffled_linear(x, packed, scale, zeros, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = preshuffled_linear(x, packed, scale, zeros, **arguments)
        z = preshuffled_linear(x * 2, packed, scale, zeros, **arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    assert error(z, x * 2, w) < 8e-3
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results += [preshuffled_linear(x, packed, scale, zeros, **arguments) for _ in range(20)]
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)

"""The kernels for Q4_0 weights and Q8_1 blocks, without a GPU (see ``host/machine.py``)."""

import pytest
import torch
from lq_formats import dequantize_q8_1, quantize_q4_0, quantize_q8_1
from lq_kernels.cuda import gemm_q4_0_q8_1 as gemm_launcher
from lq_kernels.cuda import quantize_q8_1 as quantize_launcher
from lq_kernels.cuda.sources import SOURCES
from lq_kernels.reference import gemm_q4_0_q8_1_reference


def operands(rows, tokens, k):
    torch.manual_seed(rows * 1000 + tokens + k)
    return quantize_q4_0(torch.randn(rows, k)), quantize_q8_1(torch.randn(tokens, k))


def check(y, w, a):
    exact = gemm_q4_0_q8_1_reference(w, a).double()
    error = (y.double() - exact).norm() / exact.norm()
    assert error < 1e-6, f"relative error {error:.1e}"


SHAPES = [
    # Aligned rows (K % 256 == 0): whole and half chunks, more chunks than stages, every column tile, ragged edges.
    (1, 1, 256), (33, 7, 512), (15, 8, 1792), (17, 9, 2048), (32, 16, 1280), (31, 17, 256), (16, 33, 512), (40, 66, 768),
    # Any other K.
    (1, 1, 32), (3, 2, 64), (33, 8, 96), (17, 10, 544), (31, 30, 1056), (32, 65, 288), (2, 5, 1952),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "tokens", "k"), SHAPES, ids=[f"M{m}-N{n}-K{k}" for m, n, k in SHAPES])
def test_the_gemm_multiplies(host, rows, tokens, k):
    w, a = operands(rows, tokens, k)
    y = gemm_launcher.gemm_q4_0_q8_1(w, a)
    check(y, w, a)
    assert host.kernels[0].endswith("_unaligned") is bool(k % 256)


def test_shapes_reach_every_kernel(host):
    for tiles, k in ((t, k) for t in (1, 2, 4, 8) for k in (32, 256)):
        w, a = operands(1, 8 * tiles, k)
        gemm_launcher.gemm_q4_0_q8_1(w, a)
    assert set(host.kernels) == set(SOURCES["gemm_q4_0_q8_1"])


@pytest.mark.parametrize("k", [512, 544])
def test_the_order_of_threads_and_the_other_tokens_do_not_matter(host, k):
    w, a = operands(20, 70, k)
    first = gemm_launcher.gemm_q4_0_q8_1(w, a)
    host.seed = 1
    assert torch.equal(gemm_launcher.gemm_q4_0_q8_1(w, a), first)
    for tokens in (1, 9, 20, 40):
        assert torch.equal(gemm_launcher.gemm_q4_0_q8_1(w, a[:tokens].contiguous()), first[:, :tokens])


@pytest.mark.parametrize("k", [256, 288])
def test_the_gemm_takes_any_bytes(host, k):
    torch.manual_seed(0)
    w = torch.randint(0, 256, (18, k // 32, 18), dtype=torch.uint8)
    a = torch.randint(0, 256, (10, k // 32, 36), dtype=torch.uint8)
    extremes = torch.tensor([0.0, -0.0, 6e-8, 6e-5, 65504.0, -65504.0, 1.0, -1.5], dtype=torch.float16)
    w[..., :2] = extremes[torch.randint(0, 8, w.shape[:2])].unsqueeze(-1).view(torch.uint8)
    for at in (0, 2):
        a[..., at : at + 2] = extremes[torch.randint(0, 8, a.shape[:2])].unsqueeze(-1).view(torch.uint8)
    check(gemm_launcher.gemm_q4_0_q8_1(w, a), w, a)
    a[3, 1, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # an infinite scale, as of an activation that overflowed
    y = gemm_launcher.gemm_q4_0_q8_1(w, a)
    assert not torch.isfinite(y[:, 3]).any()
    assert torch.isfinite(y[:, [0, 1, 2, 4, 5, 6, 7, 8, 9]]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (7, 1056), (2, 2048)], ids=str)
def test_the_quantizer_writes_the_defined_bytes(host, dtype, shape):
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.tensor([1.0, 1e-6, 1e-39, 1e30, 0.0, 1e4, 1e-30])[: shape[0], None]
    if dtype == torch.float16:
        x = x.clamp(-6e4, 6e4)
    x[0, :32] = torch.arange(-254, -222).float() / 2  # ties, and the largest magnitude is negative
    x = x.to(dtype)
    assert torch.equal(quantize_launcher.quantize_q8_1(x), quantize_q8_1(x, check=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_gives_what_the_blocks_stand_for(host, dtype):
    torch.manual_seed(0)
    x = torch.randn(11, 1056) * torch.tensor([1.0, 1e-6, 1e-39, 1e30, 0.0, 1e4, 1e-30, 3e8, 1.0, 1.0, 1.0])[:, None]
    if dtype == torch.float16:
        x = x.clamp(-6e4, 6e4)
    x[0, :32] = torch.arange(-254, -222).float() / 2
    x[8:, 40] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x = x.to(dtype)
    expected = dequantize_q8_1(quantize_q8_1(x, check=False)).to(torch.bfloat16)
    found = quantize_launcher.round_q8_1(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.isfinite(), expected.isfinite())
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert expected[:7].isfinite().all() == (dtype == torch.float16)  # 1e30 overflows an fp16 scale
    assert not expected[8:, 32:64].isfinite().any()
    assert host.kernels == [f"round_q8_1_{str(dtype).removeprefix('torch.')}"]


def test_the_quantizers_take_views(host):
    x = torch.randn(6, 200)
    for view in (x[:, 8:136], x[::2, 1:65], x.view(2, 3, 200)[:, 1, 3:163], x.flatten()[5:69]):
        blocks = quantize_q8_1(view.contiguous())
        assert torch.equal(quantize_launcher.quantize_q8_1(view), blocks)
        assert torch.equal(quantize_launcher.round_q8_1(view), dequantize_q8_1(blocks).to(torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_block_that_is_not_finite_has_a_scale_that_is_not(host, value):
    x = torch.randn(1, 96)
    x[0, 40] = value
    d = quantize_launcher.quantize_q8_1(x)[..., :2].contiguous().view(torch.float16).flatten()
    assert torch.isfinite(d).tolist() == [True, False, True]

"""The oracles against scalar loops that share no code with them."""

import struct

import pytest
import torch
from lq_formats import quantize_q4_0, quantize_q8_1
from lq_kernels import int8_gemm_torch
from lq_kernels.reference import gemm_q4_0_q8_1_reference, int4_linear_reference, int8_linear_reference


def test_int4_is_the_sum_over_codes():
    torch.manual_seed(0)
    n, k, group = 3, 27, 9
    words = torch.randint(-(2**31), 2**31 - 1, (n, 4), dtype=torch.int32)
    scale, zero = torch.rand(n, 3), torch.randint(0, 16, (n, 3), dtype=torch.uint8)
    x = torch.randn(2, k)
    for zeros in (zero, None):
        y = int4_linear_reference(x, words, scale, zeros, group)
        for token in range(2):
            for row in range(n):
                total = 0.0
                for column in range(k):
                    code = (int(words[row, column // 8]) >> 4 * (column % 8)) & 15
                    z = 8 if zeros is None else int(zeros[row, column // group])
                    total += float(x[token, column]) * (code - z) * float(scale[row, column // group])
                assert abs(float(y[token, row]) - total) <= 1e-6 * max(1, abs(total))


def test_int8_is_the_sum_over_codes():
    q = torch.randint(-128, 128, (3, 5), dtype=torch.int8)
    scale, x = torch.rand(3), torch.randn(2, 5)
    y = int8_linear_reference(x, q, scale)
    for token in range(2):
        for row in range(3):
            total = sum(float(x[token, j]) * int(q[row, j]) * float(scale[row]) for j in range(5))
            assert abs(float(y[token, row]) - total) <= 1e-5 * max(1, abs(total))
    assert torch.equal(int8_linear_reference(x, q, scale[0]), int8_linear_reference(x, q, scale[:1].expand(3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_int8_gemm_torch_is_the_reference_in_any_leading_shape(dtype, bias):
    torch.manual_seed(2)
    q, scale = torch.randint(-128, 128, (6, 40), dtype=torch.int8), torch.rand(6)
    x, b = torch.randn(2, 3, 40).to(dtype), torch.randn(6) if bias else None
    y = int8_gemm_torch(x, q, scale, b)
    exact = x.double() @ (q.double() * scale.double()[:, None]).t() + (b.double() if bias else 0)
    assert (y.shape, y.dtype) == ((2, 3, 6), dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    assert (y.double() - exact).norm() <= tolerance * exact.norm()
    assert int8_gemm_torch(x[:0], q, scale, b).shape == (0, 3, 6)
    assert torch.equal(int8_gemm_torch(x, q, scale[0]), int8_gemm_torch(x, q, scale[:1].expand(6)))


def test_q4_0_q8_1_is_the_block_formula_on_raw_bytes():
    torch.manual_seed(1)
    w, a = quantize_q4_0(torch.randn(3, 96)), quantize_q8_1(torch.randn(2, 96))
    y = gemm_q4_0_q8_1_reference(w, a)
    for row in range(3):
        for token in range(2):
            total = 0.0
            for block in range(3):
                (d4,) = struct.unpack("<e", bytes(w[row, block, :2].tolist()))
                d8, s8 = struct.unpack("<ee", bytes(a[token, block, :4].tolist()))
                nibbles = w[row, block, 2:].tolist()
                q4 = [byte & 15 for byte in nibbles] + [byte >> 4 for byte in nibbles]
                q8 = struct.unpack("32b", bytes(a[token, block, 4:].tolist()))
                total += d4 * (d8 * sum(p * q for p, q in zip(q4, q8, strict=True)) - 8 * s8)
            assert abs(float(y[row, token]) - total) <= 1e-6 * max(1, abs(total))

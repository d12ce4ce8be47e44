"""Run lq's CUDA C++ kernels over odd and aligned shapes, for ``compute-sanitizer``.

Usage: ``compute-sanitizer --tool memcheck --report-api-errors no python3 tests/tools/sanitize_cuda.py``. Run it once
without the sanitizer first, so that no compilation happens under it. ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` (set here)
makes every tensor its own allocation, so that an access past its end is seen.
"""

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from lq_formats import quantize_q4_0, quantize_q8_1
from lq_kernels import gemm_q4_0_q8_1, quantize_activation_q8_1
from lq_kernels.reference import gemm_q4_0_q8_1_reference

SHAPES = [(1, 1, 32), (15, 3, 64), (33, 9, 96), (100, 17, 256), (64, 33, 1056), (129, 65, 768), (32, 130, 4096)]


def main() -> None:
    for rows, tokens, k in SHAPES:
        w, x = quantize_q4_0(torch.randn(rows, k)).cuda(), torch.randn(tokens, k)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            a = quantize_activation_q8_1(x.to(dtype).cuda())
            assert torch.equal(a.cpu(), quantize_q8_1(x.to(dtype)))
        y = gemm_q4_0_q8_1(w, a, rows, tokens, k)
        expected = gemm_q4_0_q8_1_reference(w.cpu(), a.cpu())
        assert torch.allclose(y.cpu(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    torch.cuda.synchronize()
    print(f"{len(SHAPES)} shapes are right")


if __name__ == "__main__":
    main()

"""int4 weights through gemlite: kernel by batch size, accuracy against float, compression.

Runs anywhere; without a CUDA GPU or gemlite the product is computed from the dequantized weight.

    python examples/gemlite_int4_example.py
"""

import importlib.util

import torch
from lq_torch import GemliteConfig, Int4GemliteTensor, force_kernel, quantize_, warmup
from torch import nn

BATCH_SIZES = (1, 8, 64)


def main() -> None:
    """Print one line for each batch size."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available() and importlib.util.find_spec("gemlite") is not None
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    if not on_gpu:
        print("No CUDA GPU or no gemlite here: products use the dequantized weight (pip install 'lq-torch[gemlite]').")
    model = nn.Sequential(nn.Linear(1024, 512, bias=False, device=device, dtype=dtype))
    exact = model[0].weight.detach().double()
    quantize_(model, GemliteConfig("int4", group_size=128), progress=False)
    weight = model[0].weight
    assert isinstance(weight, Int4GemliteTensor)
    ratio = exact.numel() * 2 / weight.packed_nbytes
    print(f"compression: {ratio:.2f}x against 16 bits")
    if on_gpu:
        print("tuning (seconds for each batch size) ...")
        warmup(model, BATCH_SIZES)
    for size in BATCH_SIZES:
        x = torch.randn(size, 1024, device=device, dtype=dtype)
        with torch.no_grad():
            y = model(x).double()
            against_float = _relative(y, x.double() @ exact.t())
            against_codes = _relative(y, x.double() @ weight.dequantize(torch.float64).t())
        print(f"batch {size:3}: error {against_float:.4f} against float, {against_codes:.1e} against the same codes")
    if on_gpu:
        with torch.no_grad(), force_kernel("GEMM_SPLITK"):
            print(f"GEMM_SPLITK forced at batch 64: {tuple(model(x).shape)}")


def _relative(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y - reference).norm() / reference.norm())


if __name__ == "__main__":
    main()

"""Random low-bit weights for benchmarks: bits, not quantized values, because kernels take the same time for any."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lq_formats import SpecError, ggml_format
from lq_kernels import int4_linear, int8_gemm, q4_0_linear
from lq_torch import WeightConfig
from torch import Tensor

from lq_eval.bench.timing import Call, copies
from lq_eval.schemes import weight_nbytes


@dataclass(frozen=True)
class Operand:
    """Copies of one low-bit weight and how to multiply with them.

    Attributes:
        nbytes: Bytes of one copy, scales and zeros included.
        calls: From x ``(M, K)`` and a kernel's name (empty: the registry's choice) to one call a copy.
    """

    nbytes: int
    calls: Callable[[Tensor, str], list[Call]]


def int4_operand(
    n: int, k: int, group: int, dtype: torch.dtype, device: torch.device, *, symmetric: bool, cold_bytes: int
) -> Operand:
    """Return canonical int4 weights ``(n, k)`` with scales of ``dtype`` for groups of ``group``.

    Raises:
        SpecError: If ``group`` does not divide ``k``.
    """
    if group < 1 or k % group:
        raise SpecError(f"K={k} is not divisible by the group size {group}")

    def one() -> tuple[Tensor, Tensor, Tensor | None]:
        qweight = torch.randint(-(2**31), 2**31 - 1, (n, -(-k // 8)), device=device, dtype=torch.int32)
        scale = (torch.rand(n, k // group, device=device) * 0.01).to(dtype)
        zero = None if symmetric else torch.randint(0, 16, (n, k // group), device=device, dtype=torch.uint8)
        return qweight, scale, zero

    items = [one() for _ in range(copies(n * k // 2, cold_bytes))]

    def calls(x: Tensor, kernel: str) -> list[Call]:
        return [
            lambda q=q, s=s, z=z: int4_linear(x, q, s, z, group_size=group, kernel=kernel)  # type: ignore[misc]
            for q, s, z in items
        ]

    return Operand(sum(t.numel() * t.element_size() for t in items[0] if t is not None), calls)


def int8_operand(n: int, k: int, device: torch.device, cold_bytes: int) -> Operand:
    """Return int8 weights ``(n, k)`` with a float32 scale a row."""
    count = copies(n * k, cold_bytes)
    codes = [torch.randint(-127, 128, (n, k), device=device, dtype=torch.int8) for _ in range(count)]
    scale = torch.rand(n, device=device) * 0.01

    def calls(x: Tensor, kernel: str) -> list[Call]:
        return [lambda q=q: int8_gemm(x, q, scale, kernel=kernel) for q in codes]  # type: ignore[misc]

    return Operand(n * k + 4 * n, calls)


def q4_0_operand(n: int, k: int, device: torch.device, cold_bytes: int) -> Operand:
    """Return Q4_0 weights ``(n, k)``; a call quantizes the activations too."""
    nbytes = n * k // 32 * 18
    blocks = [random_q4_0(n, k, device) for _ in range(copies(nbytes, cold_bytes))]

    def calls(x: Tensor, kernel: str) -> list[Call]:
        return [lambda b=b: q4_0_linear(x, b, kernel=kernel) for b in blocks]  # type: ignore[misc]

    return Operand(nbytes, calls)


def layer_operand(
    n: int, k: int, dtype: torch.dtype, device: torch.device, config: WeightConfig, cold_bytes: int
) -> Operand:
    """Return weights that ``config`` quantized, multiplied through ``F.linear`` as a layer does; no kernel can be forced.

    Raises:
        LQError: If ``config`` does not take such a weight.
    """
    first = config.quantize(torch.randn(n, k, device=device, dtype=dtype))
    nbytes = weight_nbytes(first)
    packed = [first, *(first.clone() for _ in range(copies(nbytes, cold_bytes) - 1))]

    def calls(x: Tensor, kernel: str) -> list[Call]:
        return [lambda w=w: torch.nn.functional.linear(x, w) for w in packed]  # type: ignore[misc]

    return Operand(nbytes, calls)


def random_blocks(ggml_type: str, n: int, k: int, device: torch.device) -> Tensor:
    """Return random blocks ``(n, k // block size, block bytes) uint8`` of a ggml type, with finite scales and minima.

    Raises:
        SpecError: If there is no such type, or ``k`` is no whole number of its blocks.
    """
    form = ggml_format(ggml_type)
    if k % form.block_size:
        raise SpecError(f"K={k}: {form.name.upper()} needs a multiple of {form.block_size}")
    count = k // form.block_size
    blocks = torch.randint(0, 256, (n, count, form.type_size), device=device, dtype=torch.uint8)
    for at in form.halves:
        scale = (torch.rand(n, count, 1, device=device) * 0.01).to(torch.float16)
        blocks[..., at : at + 2] = scale.view(torch.uint8)
    if form.name == "mxfp4":  # a byte that is an exponent: 2^-16 to 2^-1
        blocks[..., 0] = blocks[..., 0] % 16 + 112
    return blocks


def random_q4_0(n: int, k: int, device: torch.device) -> Tensor:
    """Return random Q4_0 blocks ``(n, k // 32, 18) uint8``; see :func:`random_blocks`."""
    return random_blocks("q4_0", n, k, device)

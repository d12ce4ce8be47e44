"""Weights in fragment order with tokens, and their products in float64."""

from typing import Any

import torch
from lq_formats.layouts import FRAGMENT_INT4, FRAGMENT_INT8
from lq_kernels.cuda import dequantize_fragment
from lq_kernels.cuda.variant import Variant
from lq_kernels.gated import interleave_rows
from torch import Tensor

_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


class Case:
    """Tokens of 16 bits, a weight, an epilogue, and what a kernel is to make of them.

    Attributes:
        exact: The product in float64, of weights as the kernel has them.
        off: How far a result may be off, beside its rounding.
    """

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        bits: int = 4,
        group: int = 128,
        x: torch.dtype = torch.bfloat16,
        scale: torch.dtype = torch.bfloat16,
        zero: str = "",
        epilogue: str = "none",
        bias: bool = True,
        rounded: bool = False,
    ) -> None:
        """Draw one; ``rounded`` says that weights are rounded to x's dtype, as in prefill (but see :meth:`of_prefill`)."""
        draw = torch.Generator().manual_seed(m * 31 + n * 17 + k)
        rows = 2 * n if epilogue == "silu_mul" else n
        self.m, self.n, self.k, self.bits, self.epilogue, self.minimum = m, n, k, bits, epilogue, zero == "minima"
        self.group = group = k if group == -1 else group
        codes = torch.randint(0, 1 << bits, (rows, k), generator=draw, dtype=torch.uint8)
        scales = (torch.rand(rows, -(-k // group), generator=draw) * 0.02 + 0.005).to(scale)
        zeros = None
        if zero == "zeros":
            zeros = torch.randint(0, 16, scales.shape, generator=draw).to(scale)
        elif zero:
            zeros = (-15 * scales.float() * torch.rand(scales.shape, generator=draw)).to(scale)

        def spread(values: Tensor) -> Tensor:
            return values.double().repeat_interleave(group, dim=1)[:, :k]

        w, factor = codes.double() - (1 << (bits - 1)), torch.ones(1, 1, dtype=torch.float64)
        if group == k:
            factor = scales.double().T
            w = w if zeros is None else w + 8 - zeros.double()
        else:
            w = w * spread(scales.to(x) if rounded else scales)
            if zeros is not None:
                scaled = (
                    zeros.double() + 8 * scales.double() if zero == "minima" else (8 - zeros.double()) * scales.double()
                )
                w = w + spread(scaled.float().to(x) if rounded else scaled)
        w = w.to(x).double() if rounded else w
        self.w = w * factor.T  # in the order of the results
        self.x = (torch.randn(m, k, generator=draw) / (w.norm(dim=1) * factor).mean()).to(x)
        self.bias = torch.randn(rows, generator=draw).to(x) if bias else None
        self.residual = torch.randn(m, n, generator=draw).to(x) if epilogue == "residual" else None
        sums = self.x.double() @ w.T * factor + (0 if self.bias is None else self.bias.double())
        off = 2e-6 * (self.x.double().abs() @ w.abs().T * factor) + 1e-6
        if epilogue == "silu_mul":
            (gate, up), (gate_off, up_off) = sums.chunk(2, 1), off.chunk(2, 1)
            sums, off = torch.nn.functional.silu(gate) * up, 2 * (gate_off * (up.abs() + 3) + up_off * (gate.abs() + 3))
            codes, scales = interleave_rows(codes), interleave_rows(scales)
            zeros = None if zeros is None else interleave_rows(zeros)
        elif self.residual is not None:
            sums += self.residual.double()
        elif epilogue == "transposed":
            sums, off = sums.T, off.T
        self.exact, self.off = sums, off
        layout = FRAGMENT_INT4 if bits == 4 else FRAGMENT_INT8
        self.packed, self.scales = layout.pack(codes), layout.arrange_scales(scales, k, group)
        self.zeros = None if zeros is None else layout.arrange_scales(zeros, k, group)
        self.variant = Variant.of(x, scale, bits, group, k, zeros is not None, self.minimum)

    @classmethod
    def of_prefill(cls, config: Any, *sizes: int, **options: Any) -> "Case":
        """Draw one for a cut of prefill: its weights are rounded, unless the sums of groups are scaled."""
        case = cls(*sizes, rounded=True, **options)
        return cls(*sizes, **options) if config.scales_sums(case.variant) else case

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows."""
        return self.packed.shape[1]

    def guard(self, guard: Any) -> "Case":
        """Have every tensor that a kernel reads guarded."""
        for name in ("x", "packed", "scales", "zeros", "bias", "residual"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else guard(tensor))
        return self

    def cuda(self) -> "Case":
        """Have all of it on the GPU."""
        self.exact, self.off = self.exact.cuda(), self.off.cuda()
        return self.guard(torch.Tensor.cuda)

    def run(self, linear: Any, config: Any) -> Tensor:
        """Return the product by a kernel."""
        y: Tensor = linear(
            self.x,
            self.packed,
            self.scales,
            self.zeros,
            self.bias,
            self.n,
            self.group,
            self.bits,
            config,
            transposed=self.epilogue == "transposed",
            residual=self.residual,
            gated=self.epilogue == "silu_mul",
            minimum=self.minimum,
        )
        return y

    def run_over_nan(self, linear: Any, config: Any) -> Tensor:
        """Return the same, in memory that was NaN before."""
        poison = torch.full(self.exact.shape, torch.nan, device=self.x.device, dtype=torch.float32)
        del poison  # what the result will be allocated over
        return self.run(linear, config)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight by the kernel for it."""
        sizes = (self.packed, self.scales, self.zeros, self.n, self.k, self.group, self.bits)
        return dequantize_fragment.dequantize(*sizes, dtype, self.minimum)

    def check(self, y: Tensor) -> None:
        """Compare a product with the exact one."""
        assert y.shape == self.exact.shape
        assert y.dtype == (torch.float32 if self.epilogue == "transposed" else self.x.dtype)
        bound = 1.01 * _ROUNDING[y.dtype] * self.exact.abs() + self.off
        worst = ((y.double() - self.exact).abs() / bound).nan_to_num(torch.inf).max().item()
        assert worst <= 1.0, f"worst error is {worst:.3g} times its bound"

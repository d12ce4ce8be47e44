"""The kernels for 8-bit tokens without a GPU (see ``host/machine.py``)."""

from typing import Any, NamedTuple

import pytest
import torch
from lq_formats.layouts import FRAGMENT_A8_FP8, FRAGMENT_A8_INT8
from lq_kernels.cuda.linear_a8 import A8Config, linear
from lq_kernels.cuda.quantize_tokens import CODE_DTYPES, quantize_tokens
from lq_kernels.dynamic_reference import quantize_tokens_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Product(NamedTuple):
    """A product, its cuts, and what the weight is."""

    m: int
    n: int
    k: int
    cuts: tuple[A8Config, ...]
    options: dict[str, Any]


WHOLE, SHARED = A8Config(16, False, 2, 2, 0, 0), A8Config(16, False, 3, 2, 2, 3)
PAIRS = (A8Config(64, True, 1, 2, 0, 0), A8Config(64, True, 2, 2, 2, 2))
PRODUCTS = {
    "w8a8-int8": Product(19, 140, 400, (WHOLE, SHARED), {"bias": True}),
    "w8a8-int8-multicast": Product(70, 264, 384, PAIRS, {}),
    "w8a8-int8-aside": Product(270, 264, 256, (A8Config(256, True, 1, 1, 0, 0), A8Config(128, False, 4, 2, 3, 4)), {}),
    "w8a8-fp8-aside": Product(200, 200, 384, (A8Config(192, False, 1, 2, 0, 0),), {"activation": "fp8", "bias": True}),
    "w4a8-fp8-aside": Product(
        140, 328, 256, (A8Config(128, True, 1, 2, 0, 0),), {"bits": 4, "group": 128, "activation": "fp8", "scale": BF16}
    ),
    "w8a8-int8-aside-odd": Product(40, 139, 256, (A8Config(128, False, 2, 2, 0, 0),), {}),
    "w8a8-fp8": Product(17, 130, 656, (WHOLE,), {"activation": "fp8", "scale": BF16}),
    "w4a8-int8-groups": Product(18, 137, 384, (SHARED,), {"bits": 4, "group": 128, "scale": BF16, "bias": True}),
    "w4a8-int8-row": Product(90, 200, 264, PAIRS[:1], {"bits": 4, "out": FP16}),
    "w4a8-fp8-groups": Product(13, 70, 512, (WHOLE,), {"bits": 4, "group": 256, "activation": "fp8", "scale": FP16}),
    "w4a8-fp8-row": Product(35, 72, 392, (A8Config(32, False, 1, 1, 0, 0),), {"bits": 4, "activation": "fp8"}),
}  # fmt: skip


class Case:
    """Codes of tokens and of a weight, and their product in float64."""

    def __init__(self, m, n, k, bits=8, activation="int8", group=-1, out=BF16, scale=FP32, bias=False):
        draw = torch.Generator().manual_seed(m * 31 + n * 17 + k)
        self.n, self.group, self.out = n, k if group == -1 else group, out

        def codes(rows, features):
            values = torch.randn(rows, features, generator=draw) * 40
            values = values.round().clamp(-127, 127) if activation == "int8" else values.clamp(-448, 448)
            return values.to(CODE_DTYPES[activation])

        self.whole_x = codes(m, -(-k // 16) * 16)  # rows at multiples of 16 bytes, as the quantizer leaves them
        self.x = self.whole_x[:, :k]
        self.token_scale = torch.rand(m, generator=draw) * 0.05 + 0.01
        scales = (torch.rand(n, 1 if bits == 8 else k // self.group, generator=draw) * 0.02 + 0.005).to(scale)
        self.bias = torch.randn(n, generator=draw).to(out) if bias else None
        if bits == 8:
            self.weight, self.scale = codes(n, k), scales[:, 0].contiguous()
            w = self.weight.double() * scales.double()
        else:
            unsigned = torch.randint(0, 16, (n, k), generator=draw, dtype=torch.uint8)
            layout = FRAGMENT_A8_INT8 if activation == "int8" else FRAGMENT_A8_FP8
            self.weight, self.scale = layout.pack(unsigned), layout.arrange_scales(scales, k, self.group)
            w = (unsigned.double() - 8) * scales.double().repeat_interleave(self.group, dim=1)
        x = self.x.double() * self.token_scale.double()[:, None]
        self.exact, self.magnitude = x @ w.T, x.abs() @ w.abs().T
        if self.bias is not None:
            self.exact += self.bias.double()

    def guard(self, guard):
        for name in ("whole_x", "token_scale", "weight", "scale", "bias"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else guard(tensor))
        self.x = self.whole_x[:, : self.x.shape[1]]
        return self

    def run(self, config, **options):
        sizes = (self.n, self.group, self.out)
        return linear(self.x, self.token_scale, self.weight, self.scale, self.bias, *sizes, config=config, **options)

    def check(self, y):
        assert y.shape == self.exact.shape
        assert y.dtype == self.out
        # Sums of e4m3 are in double here: what tensor cores cut off is not known.
        bound = 1.01 * (2.0**-8 if self.out == BF16 else 2.0**-11) * self.exact.abs() + 1e-6 * self.magnitude + 1e-6
        worst = ((y.double() - self.exact).abs() / bound).nan_to_num(torch.inf).max().item()
        assert worst <= 1.0, f"worst error is {worst:.3g} times its bound"


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products(host, product):
    case = Case(product.m, product.n, product.k, **product.options).guard(host.guard)
    for config in product.cuts:
        host.seed = 0
        first = case.run(config)
        case.check(first)
        for host.seed in (1, 2):
            assert torch.equal(case.run(config), first)


def test_sums_that_are_not_promoted(host):
    case = Case(20, 136, 392, 4, "fp8", scale=FP16).guard(host.guard)
    case.check(case.run(A8Config(32, False, 1, 2, 0, 0), promote=False))


def test_a_token_with_a_nan_scale_is_nan_and_no_other(host):
    case = Case(19, 24, 128).guard(host.guard)
    case.x[7] = 0
    case.token_scale[7] = torch.nan
    y = case.run(WHOLE)
    assert y[7].isnan().all()
    assert not y[torch.arange(19) != 7].isnan().any()


@pytest.mark.parametrize("activation", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_quantizer_writes_the_defined_bytes(host, dtype, activation):
    torch.manual_seed(0)
    for m, k in ((4, 1032), (6, 200)):
        x = (torch.randn(m, k) * torch.tensor([1.0, 1e-6, 300.0, 0.0, 1.0, 1.0])[:m, None]).to(dtype)
        x[0, :16] = torch.arange(16) - 8.5
        x[1, 5:7] = torch.tensor([6e4, -6e4])
        if m > 4:
            x[4, 3], x[5, k - 1] = torch.nan, torch.inf
        expected, scales = quantize_tokens_reference(x, activation)
        for host.seed in (0, 1):
            codes, found = quantize_tokens(host.guard(x), activation)
            torch.testing.assert_close(found, scales, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(codes.contiguous().view(torch.uint8), expected.view(torch.uint8))

"""Byte equality with the ``gguf`` package, the bit-exact oracle of the ggml formats."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy
import pytest
import torch
from lq_formats import GGML_FORMATS
from torch import Tensor

gguf = pytest.importorskip("gguf")
pytest.importorskip("gguf.quants")

# Q8_1 has another size in gguf's table and no codec there. Only these are quantized by gguf as well.
NAMES = tuple(name for name in GGML_FORMATS if name != "q8_1")
EXACT = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")


def _normal(generator: torch.Generator) -> Tensor:
    return torch.randn(96, 256, generator=generator)


def _ties(generator: torch.Generator) -> Tensor:
    """Multiples of half a code step around power-of-two and odd scales: every rounding rule shows."""
    steps = torch.randint(-32, 33, (128, 256), generator=generator).float() / 2
    scale = torch.tensor([1.0, 0.25, 3.0, 0.1, 1 / 3, 1 / 127, 7.0, 1e-3]).repeat(16).unsqueeze(1)
    return steps * scale


def _equal_extremes(generator: torch.Generator) -> Tensor:
    """+a and -a in one block: the first of equal magnitudes sets the sign of d."""
    signs = torch.randint(0, 2, (64, 128), generator=generator).float() * 2 - 1
    return signs * torch.rand(64, 1, generator=generator)


def _int8_ties(generator: torch.Generator) -> Tensor:
    """Half-integers with an extreme of 127: Q8_0 divides by exactly 1 and must round half away from zero."""
    x = torch.randint(-254, 255, (64, 128), generator=generator).float() / 2
    x[:, ::32] = 127.0
    return x


def _tiny(generator: torch.Generator) -> Tensor:
    """Scales among the subnormal fp16 numbers and below the smallest of them."""
    exponents = torch.linspace(-30, -12, 96).unsqueeze(1)
    return torch.randn(96, 256, generator=generator) * 2.0**exponents


def _huge(generator: torch.Generator) -> Tensor:
    """Scales around the largest fp16 number: below, at the rounding boundary and beyond (stored as infinity)."""
    exponents = torch.linspace(14, 26, 96).unsqueeze(1)
    return torch.randn(96, 256, generator=generator) * 2.0**exponents


def _zeros(generator: torch.Generator) -> Tensor:
    """Zero rows, rows of -0.0, and zero blocks between others."""
    x = torch.randn(8, 128, generator=generator)
    x[0], x[1], x[2, 32:64], x[3, :32] = 0.0, -0.0, 0.0, -0.0
    x[4, 5:], x[5, ::2] = 0.0, 0.0
    return x


def _constant(generator: torch.Generator) -> Tensor:
    """Blocks of one value: max - min is 0, so the formats with a minimum have d = 0."""
    return torch.randn(64, 1, generator=generator).expand(64, 64).contiguous()


def _bf16(generator: torch.Generator) -> Tensor:
    return (torch.randn(96, 256, generator=generator) * 0.02).to(torch.bfloat16).float()


def _one_sided(generator: torch.Generator) -> Tensor:
    return torch.rand(64, 128, generator=generator) * torch.tensor([1.0, -1.0]).repeat(32).unsqueeze(1)


DATA: Mapping[str, Callable[[torch.Generator], Tensor]] = {
    "normal": _normal,
    "ties": _ties,
    "equal-extremes": _equal_extremes,
    "int8-ties": _int8_ties,
    "tiny": _tiny,
    "huge": _huge,
    "zeros": _zeros,
    "constant": _constant,
    "bf16": _bf16,
    "one-sided": _one_sided,
}


def _qtype(name: str) -> Any:
    return gguf.GGMLQuantizationType[name.upper()]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on overflowing casts, which "huge" is about
def test_quantize_bytes_equal_gguf(name: str, data: str) -> None:
    x = DATA[data](torch.Generator().manual_seed(7))
    expected = gguf.quants.quantize(x.numpy(), _qtype(name))
    got = GGML_FORMATS[name].quantize(x)
    assert got.shape == (x.shape[0], x.shape[1] // 32, GGML_FORMATS[name].type_size)
    numpy.testing.assert_array_equal(got.reshape(x.shape[0], -1).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", EXACT)
def test_half_input_quantizes_as_its_float32_values(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = gguf.quants.quantize(x.float().numpy(), _qtype(name))
    numpy.testing.assert_array_equal(GGML_FORMATS[name].quantize(x).reshape(16, -1).numpy(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_equals_gguf_on_random_blocks(name: str) -> None:
    generator = torch.Generator().manual_seed(11)
    form = GGML_FORMATS[name]
    data = torch.randint(0, 256, (64, 16, form.type_size), dtype=torch.uint8, generator=generator)
    for offset in form.halves:
        # Any finite fp16: clear one exponent bit where all five are set.
        high = data[..., offset + 1]
        high[high & 0x7C == 0x7C] &= 0xFB
    expected = gguf.quants.dequantize(data.reshape(64, -1).numpy(), _qtype(name))
    numpy.testing.assert_array_equal(form.dequantize(data).numpy(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_of_a_block_dequantizes_as_in_gguf(name: str) -> None:
    form = GGML_FORMATS[name]
    data = torch.arange(256, dtype=torch.uint8).unsqueeze(1).expand(256, form.type_size).clone().unsqueeze(1)
    for offset in form.halves:
        data[..., offset], data[..., offset + 1] = 0x34, 0x2E
    expected = gguf.quants.dequantize(data.reshape(256, -1).numpy(), _qtype(name))
    numpy.testing.assert_array_equal(form.dequantize(data).numpy(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_block_and_type_sizes_agree_with_gguf(name: str) -> None:
    form = GGML_FORMATS[name]
    assert gguf.GGML_QUANT_SIZES[_qtype(name)] == (form.block_size, form.type_size)

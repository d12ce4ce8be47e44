"""The ggml codecs: scalar oracles written from the specification, bad input, shapes, and equality across devices."""

import math
import struct
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lq_formats import (
    GGML_FORMATS,
    DTypeError,
    NonFiniteError,
    ShapeError,
    SpecError,
    UnsupportedError,
    dequantize_q4_0,
    dequantize_q8_1,
    ggml_format,
    quantize_q4_0,
    quantize_q8_0,
    quantize_q8_1,
)
from torch import Tensor

READ = tuple(GGML_FORMATS)
NAMES = tuple(name for name, form in GGML_FORMATS.items() if form.quantizer is not None)


def f32(value: float) -> float:
    """Round a double to float32. A double holds one float32 operation exactly enough to round it correctly."""
    result: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return result


def f16_bytes(value: float) -> bytes:
    """Round to fp16, nearest even, infinity beyond its range."""
    try:
        return struct.pack("<e", value)
    except OverflowError:
        return struct.pack("<e", math.copysign(math.inf, value))


def scalar_q4_0(block: Sequence[float]) -> bytes:
    """Quantize 32 float32 values by the text of the specification, one operation and one rounding at a time."""
    extreme = block[0]
    for value in block:
        if abs(extreme) < abs(value):
            extreme = value
    d = f32(extreme / -8)
    inverse = f32(1 / d) if d else 0.0
    codes = [min(15, math.trunc(f32(f32(value * inverse) + 8.5))) for value in block]
    return f16_bytes(d) + bytes(codes[j] | codes[j + 16] << 4 for j in range(16))


def scalar_q8_1(block: Sequence[float]) -> bytes:
    """Quantize 32 float32 values to d, s = d * sum(q) with the unrounded d, and 32 signed codes."""
    d = f32(max(abs(value) for value in block) / 127)
    inverse = f32(1 / d) if d else 0.0
    codes = []
    for value in block:
        scaled = f32(value * inverse)
        whole = math.floor(abs(scaled))
        codes.append(int(math.copysign(whole + (abs(scaled) - whole >= 0.5), scaled)))
    return f16_bytes(d) + f16_bytes(f32(sum(codes) * d)) + struct.pack("32b", *codes)


SCALAR: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Sequence[float]], bytes]]] = {
    "q4_0": (quantize_q4_0, scalar_q4_0),
    "q8_1": (quantize_q8_1, scalar_q8_1),
}


def _sample(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(24, 64, generator=generator)
    match kind:
        case "normal":
            return normal
        case "ties":
            return torch.randint(-254, 255, (24, 64), generator=generator).float() / 2
        case "third-ties":
            return torch.randint(-16, 17, (24, 64), generator=generator).float() / 2 * (1 / 3)
        case "tiny":
            return normal * 2.0 ** torch.linspace(-40, -12, 24).unsqueeze(1)
        case "huge":
            return normal * 2.0 ** torch.linspace(8, 30, 24).unsqueeze(1)
        case "zero":
            return normal * (torch.arange(24) % 2).unsqueeze(1)
        case "bf16":
            return normal.to(torch.bfloat16).float()
    raise AssertionError(kind)


def random_blocks(name: str, *shape: int) -> Tensor:
    """Return random bytes as blocks ``(*shape, type_size)``, their fp16 fields finite."""
    form = GGML_FORMATS[name]
    data = torch.randint(0, 256, (*shape, form.type_size), dtype=torch.uint8)
    for offset in form.halves:
        data[..., offset + 1] &= 0xBF  # an exponent bit: below 2
    if name == "mxfp4":
        data[..., 0] &= 0x7F
    return data


SAMPLES = ("normal", "ties", "third-ties", "tiny", "huge", "zero", "bf16")


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("name", SCALAR)
def test_bytes_equal_the_scalar_reference(name: str, kind: str) -> None:
    quantize, scalar = SCALAR[name]
    x = _sample(kind)
    expected = b"".join(scalar(block) for block in x.reshape(-1, 32).tolist())
    assert bytes(quantize(x).flatten().tolist()) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=32, max_size=32),
    st.sampled_from(sorted(SCALAR)),
)
def test_any_block_equals_the_scalar_reference(block: list[float], name: str) -> None:
    # Not specified: the codes where 1 / d may overflow, and the sign of d where a zero block starts with -0.0.
    assume(max(map(abs, block)) > 1e-30 or not any(math.copysign(1, value) < 0 or value for value in block))
    quantize, scalar = SCALAR[name]
    assert bytes(quantize(torch.tensor(block)).flatten().tolist()) == scalar(block)


def test_q4_0_bytes_of_a_known_block() -> None:
    # Extreme -8 gives d = 1 (0x3C00); codes are then value + 8, ties up: -0.5 is 8.0 and 0.5 is 9.0.
    x = torch.zeros(32)
    x[0], x[1], x[2], x[16], x[17] = -8.0, -0.5, 0.5, 7.0, -7.5
    data = quantize_q4_0(x)
    assert data.tolist() == [[0x00, 0x3C, 0xF0, 0x18, 0x89, *[0x88] * 13]]


@pytest.mark.parametrize("name", ["q4_0", "q5_0"])
def test_zero_row_has_a_negative_zero_scale(name: str) -> None:
    form = GGML_FORMATS[name]
    data = form.quantize(torch.zeros(2, 64))
    assert data[..., :2].tolist() == [[[0x00, 0x80]] * 2] * 2
    if name == "q4_0":
        assert data[..., 2:].eq(0x88).all()
    values = form.dequantize(data)
    assert values.eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_dequantize_to_zero(name: str) -> None:
    form = GGML_FORMATS[name]
    x = torch.randn(3, 3 * form.block_size)
    x[1] = 0
    values = form.dequantize(form.quantize(x))
    assert values[1].eq(0).all()
    assert values[0].ne(0).any()


def test_equal_magnitudes_take_the_sign_of_the_first() -> None:
    x = torch.zeros(2, 32)
    x[0, 3], x[0, 20] = 4.0, -4.0
    x[1, 3], x[1, 20] = -4.0, 4.0
    d = quantize_q4_0(x)[..., :2].contiguous().view(torch.float16)
    assert d.flatten().tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("name", ["q4_1", "q5_1"])
def test_equal_minima_take_the_sign_of_the_first(name: str) -> None:
    x = torch.ones(2, 32)
    x[0, 3], x[0, 20] = 0.0, -0.0
    x[1, 3], x[1, 20] = -0.0, 0.0
    minimum = GGML_FORMATS[name].quantize(x)[:, 0, 2:4]
    assert minimum.tolist() == [[0x00, 0x00], [0x00, 0x80]]


def test_q8_rounds_half_away_from_zero() -> None:
    x = torch.zeros(32)
    x[:7] = torch.tensor([127.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5])
    expected = [127, 1, -1, 2, -2, 3, -3]
    assert quantize_q8_0(x)[0, 2:9].view(torch.int8).tolist() == expected
    assert quantize_q8_1(x)[0, 4:11].view(torch.int8).tolist() == expected


def test_q8_1_sum_is_of_the_codes_times_the_unrounded_scale() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(6)) + 0.5
    data = quantize_q8_1(x)[:, 0]
    total = data[:, 4:].contiguous().view(torch.int8).sum(dim=-1).float()
    s = data[:, 2:4].contiguous().view(torch.float16).flatten()
    d = x.abs().amax(-1) / torch.full((64,), 127.0)
    assert torch.equal(s, (total * d).to(torch.float16))
    # Neither the sum of the floats nor the product with the stored scale gives these bytes.
    assert not torch.equal(s, x.sum(-1).to(torch.float16))
    assert not torch.equal(s, (total * d.to(torch.float16).float()).to(torch.float16))


@pytest.mark.parametrize("name", [name for name in NAMES if GGML_FORMATS[name].halves])
def test_scales_beyond_fp16_are_stored_as_infinity(name: str) -> None:
    x = torch.linspace(-3e8, 3e8, GGML_FORMATS[name].block_size)
    data = GGML_FORMATS[name].quantize(x)
    at = GGML_FORMATS[name].halves[0]
    assert data[0, at : at + 2].contiguous().view(torch.float16).isinf().all()


@pytest.mark.parametrize("name", NAMES)
def test_values_too_small_for_a_reciprocal_become_zero(name: str) -> None:
    form = GGML_FORMATS[name]
    x = torch.randn(4, 2 * form.block_size) * 1e-39
    values = form.dequantize(form.quantize(x))
    # MXFP4's scales reach 2^-128.
    assert values.eq(0).all() or (name == "mxfp4" and bool((values.abs() <= 2 * x.abs().amax()).all()))
    for offset in form.halves:
        assert not form.quantize(x)[..., offset : offset + 2].contiguous().view(torch.float16).isnan().any()
    if name == "q8_1":
        assert form.quantize(x).eq(0).all()


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1"])
def test_error_is_within_a_code_step(name: str) -> None:
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    form = GGML_FORMATS[name]
    bits = int(name[1])
    span = (x.reshape(32, -1, 32).amax(-1) - x.reshape(32, -1, 32).amin(-1)).clamp_min(
        2 * x.reshape(32, -1, 32).abs().amax(-1) if name.endswith("0") or name == "q8_1" else 0
    )
    # Half a step, a whole one at the end of the one-sided symmetric range, and the rounding of d and m to fp16.
    step = span / (2**bits - 1) * 1.1 + 2e-3
    error = (form.dequantize(form.quantize(x)) - x).reshape(32, -1, 32).abs().amax(-1)
    assert bool((error <= step).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dequantized_dtype_is_the_rounded_float32(name: str, dtype: torch.dtype) -> None:
    form = GGML_FORMATS[name]
    data = form.quantize(torch.randn(4, 2 * form.block_size))
    values = form.dequantize(data, dtype)
    assert values.dtype == dtype
    assert torch.equal(values, form.dequantize(data).to(dtype))


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (2, 3, 3), (0, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_round_trip(name: str, shape: tuple[int, ...]) -> None:
    form = GGML_FORMATS[name]
    blocks, shape = shape, (*shape[:-1], shape[-1] * form.block_size)
    data = form.quantize(torch.randn(shape))
    assert data.shape == (*blocks, form.type_size)
    assert data.dtype == torch.uint8
    assert data.is_contiguous()
    assert form.dequantize(data).shape == shape


@pytest.mark.parametrize("name", NAMES)
def test_strided_input_gives_the_same_bytes(name: str) -> None:
    form = GGML_FORMATS[name]
    x = torch.randn(64, 3 * form.block_size)
    strided = x.t().contiguous().t()
    wide = torch.cat((x, x), dim=1)[:, : 3 * form.block_size]
    assert torch.equal(form.quantize(strided), form.quantize(x))
    assert torch.equal(form.quantize(wide), form.quantize(x))
    data = form.quantize(x)
    view = torch.cat((data, data), dim=-1)[..., : form.type_size]
    assert torch.equal(form.dequantize(view), form.dequantize(data))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_accepted_and_left_alone(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 2 * GGML_FORMATS[name].block_size))
    before = weight.detach().clone()
    data = GGML_FORMATS[name].quantize(weight)
    assert not data.requires_grad
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("k", [0, 1, 31, 33, 48])
@pytest.mark.parametrize("name", NAMES)
def test_ragged_k_is_a_shape_error(name: str, k: int) -> None:
    with pytest.raises(ShapeError, match=f"multiple of {GGML_FORMATS[name].block_size}"):
        GGML_FORMATS[name].quantize(torch.zeros(2, k))


@pytest.mark.parametrize("name", NAMES)
def test_scalar_input_is_a_shape_error(name: str) -> None:
    with pytest.raises(ShapeError):
        GGML_FORMATS[name].quantize(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_input_that_is_not_floating_is_a_dtype_error(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(DTypeError, match="float16, bfloat16, float32"):
        GGML_FORMATS[name].quantize(torch.zeros(2, 32, dtype=dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_input_is_named(name: str, bad: float) -> None:
    x = torch.randn(3, 256)
    x[1, 40] = bad
    with pytest.raises(NonFiniteError, match=rf"quantize_{name}.*index \(1, 40\)"):
        GGML_FORMATS[name].quantize(x)


@pytest.mark.parametrize("name", NAMES)
def test_float64_beyond_float32_is_refused(name: str) -> None:
    x = torch.zeros(2, 256, dtype=torch.float64)
    x[1, 7] = 1e300
    with pytest.raises(NonFiniteError, match="as float32"):
        GGML_FORMATS[name].quantize(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unchecked_q8_1_keeps_non_finite_visible(bad: float) -> None:
    x = torch.randn(2, 64)
    x[0, 3] = bad
    data = quantize_q8_1(x, check=False)
    d = data[..., :2].contiguous().view(torch.float16).squeeze(-1)
    assert not d[0, 0].isfinite()
    assert torch.equal(data[1], quantize_q8_1(x[1]))
    assert torch.equal(data[0, 1], quantize_q8_1(x[0, 32:])[0])


@pytest.mark.parametrize("name", READ)
def test_wrong_block_bytes_are_errors(name: str) -> None:
    form = GGML_FORMATS[name]
    with pytest.raises(ShapeError, match=str(form.type_size)):
        form.dequantize(torch.zeros(2, 2, form.type_size + 1, dtype=torch.uint8))
    with pytest.raises(ShapeError):
        form.dequantize(torch.zeros(form.type_size, dtype=torch.uint8))
    with pytest.raises(DTypeError, match="uint8"):
        form.dequantize(torch.zeros(2, 2, form.type_size, dtype=torch.int8))
    with pytest.raises(DTypeError, match="cannot be dequantized"):
        form.dequantize(torch.zeros(2, 2, form.type_size, dtype=torch.uint8), torch.int32)


@pytest.mark.parametrize("name", READ)
def test_dequantize_compiles_into_one_graph(name: str) -> None:
    form = GGML_FORMATS[name]
    data = random_blocks(name, 4, 2)
    compiled = torch.compile(form.dequantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(data), form.dequantize(data))


def test_registry_lists_every_format_with_its_size() -> None:
    sizes = {name: form.type_size for name, form in GGML_FORMATS.items()}
    legacy = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34, "q8_1": 36, "iq4_nl": 18, "mxfp4": 17}
    large = {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210}
    assert sizes == legacy | large
    assert all(form.name == name for name, form in GGML_FORMATS.items())
    assert all(form.block_size == (256 if name in large else 32) for name, form in GGML_FORMATS.items())
    assert GGML_FORMATS["q4_0"].bits_per_weight == GGML_FORMATS["q4_k"].bits_per_weight == 4.5
    assert ggml_format("Q4_0") is GGML_FORMATS["q4_0"]
    with pytest.raises(SpecError, match=r"q9_7.*q4_0"):
        ggml_format("q9_7")


@pytest.mark.parametrize("name", [name for name in READ if name not in NAMES])
def test_formats_that_are_only_read_say_so(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"lq reads {name}.*quantizes to.*q4_k"):
        GGML_FORMATS[name].quantize(torch.randn(2, 256))


def test_registry_is_read_only() -> None:
    with pytest.raises(TypeError):
        GGML_FORMATS["q4_0"] = GGML_FORMATS["q8_0"]  # type: ignore[index]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("name", NAMES)
def test_cuda_bytes_equal_cpu_bytes(name: str, kind: str) -> None:
    form = GGML_FORMATS[name]
    x = _sample(kind).reshape(6, 256)
    data = form.quantize(x)
    assert torch.equal(form.quantize(x.cuda()).cpu(), data)
    values = form.dequantize(data)
    assert torch.equal(form.dequantize(data.cuda()).cpu().nan_to_num(7e7), values.nan_to_num(7e7))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_bytes_equal_cpu_bytes_on_many_random_blocks(name: str) -> None:
    # A division turned into a multiplication shows in about one block in ten: 32k blocks cannot miss it.
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(2))
    form = GGML_FORMATS[name]
    assert torch.equal(form.quantize(x.cuda()).cpu(), form.quantize(x))


@pytest.mark.gpu
def test_cuda_equal_extremes_take_the_first() -> None:
    signs = torch.randint(0, 2, (512, 256), generator=torch.Generator().manual_seed(4)).float() * 2 - 1
    assert torch.equal(quantize_q4_0(signs.cuda()).cpu(), quantize_q4_0(signs))
    assert torch.equal(dequantize_q4_0(quantize_q4_0(signs.cuda())).cpu(), dequantize_q4_0(quantize_q4_0(signs)))
    assert dequantize_q8_1(quantize_q8_1(signs.cuda())).is_cuda

"""The Hopper kernels where 32-bit offsets would wrap: results, weights and tokens of more than 2**31 elements or bytes.

Every result is compared, in chunks, with float64 on dequantized operands; memory is poisoned before.
"""

from contextlib import contextmanager

import pytest
import torch
from lq_formats.layouts import FRAGMENT_A8_INT8, FRAGMENT_INT4, FRAGMENT_INT8
from lq_kernels import (
    int4_dynamic_linear,
    int8_dynamic_linear,
    interleave_rows,
    preshuffled_gated_linear,
    preshuffled_linear,
)
from lq_kernels.cuda import decode_a16, prefill_a16
from lq_kernels.dynamic_reference import dequantize_tokens_reference, quantize_tokens_reference

BF16 = torch.bfloat16
MANY_ROWS = 131089
"""Out features: odd, and no whole number of blocks of 16."""
WRAP = 1 << 31
GROUP = 128


def needs(gib):
    """Skip where so much GPU memory is not free."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} are free")


@pytest.fixture(autouse=True)
def give_memory_back():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def poisoned():
    """Fill what is allocated meanwhile with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random(shape, seed=0, dtype=BF16, device="cuda"):
    return torch.empty(shape, dtype=dtype, device=device).normal_(generator=torch.Generator(device).manual_seed(seed))


def weight(rows, k, bits=4, group=GROUP, scale=BF16, device="cuda"):
    """Return random codes ``(rows, k)``, scales and the float64 weight."""
    generator = torch.Generator(device).manual_seed(1)
    codes = torch.randint(0, 1 << bits, (rows, k), generator=generator, device=device, dtype=torch.uint8)
    scales = (torch.rand(rows, k // group, generator=generator, device=device) * 0.02 + 0.005).to(scale)
    w = (codes.double() - (1 << (bits - 1))) * scales.double().repeat_interleave(group, dim=1)
    return codes, scales, w


def check(found, expected, far=0.02):
    """Compare chunks of ``found`` and ``expected``: no number is ``far`` off, and all are close as a whole."""
    wrong, power = 0.0, 0.0
    for y, exact in zip(found, expected, strict=True):
        difference = (y.double() - exact).abs_()
        typical = float(exact.square().mean().sqrt())
        assert bool((difference <= 0.02 * exact.abs() + far * typical).all())  # false of NaN
        wrong += float(difference.square_().sum())
        power += float(exact.square().sum())
    assert wrong < (8e-3) ** 2 * power


# ---- more results than 2**31 ----


def gated(x, w):
    gate, up = (x.double() @ w.T).chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


RESULTS = ["cuda-decode", "cuda-prefill", "cuda-decode-residual", "cuda-prefill-residual", "cuda-decode-silu_mul"]
RESULTS += ["cuda-prefill-silu_mul", "cuda-a8"]


def many_results(kind, m, n, k, device="cuda"):
    """Return ``(y, tokens, exact)``: a kernel's ``(m, n)`` result, and the exact one of a slice of tokens."""
    kernel, epilogue = kind.rsplit("-", 1) if kind.count("-") == 2 else (kind, "none")
    kernel = kernel if device == "cuda" else "reference"
    codes, scales, w = weight(2 * n if epilogue == "silu_mul" else n, k, device=device)
    x = random((m, k), device=device)
    if kind.endswith("a8"):
        packed = FRAGMENT_A8_INT8.pack(codes), FRAGMENT_A8_INT8.arrange_scales(scales, k, GROUP)
        sizes = {"group_size": GROUP, "out_features": n, "activation": "int8"}
        with poisoned():
            y = int4_dynamic_linear(x, *packed, **sizes, kernel="cuda-a8" if device == "cuda" else "reference")
        tokens = dequantize_tokens_reference(*quantize_tokens_reference(x, "int8"), torch.float64)
        return y, lambda part: tokens[part] @ w.T
    sizes = {"bits": 4, "group_size": GROUP, "out_features": n, "kernel": kernel}
    if epilogue == "silu_mul":
        x *= 1 / float(w.norm(dim=1).mean())  # gates of about 1
        codes, scales = interleave_rows(codes), interleave_rows(scales)
    packed = FRAGMENT_INT4.pack(codes), FRAGMENT_INT4.arrange_scales(scales, k, GROUP)
    if epilogue == "silu_mul":
        with poisoned():
            y = preshuffled_gated_linear(x, *packed, **sizes)
        return y, lambda part: gated(x[part], w)
    residual = random((m, n), 2, device=device) if epilogue == "residual" else None
    with poisoned():
        y = preshuffled_linear(x, *packed, **sizes, residual=residual)
    return y, lambda part: x[part].double() @ w.T + (0 if residual is None else residual[part].double())


def slices(m, size):
    return [slice(start, min(start + size, m)) for start in range(0, m, size)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", RESULTS)
def test_more_than_two_to_the_31_results(kind):
    needs(20)
    m, n, k = 16400, MANY_ROWS, 256
    assert m * n > WRAP
    y, exact = many_results(kind, m, n, k)
    parts = slices(m, 256)
    # A product of two sums has rarer and larger errors.
    check((y[part] for part in parts), (exact(part) for part in parts), 0.15 if "silu_mul" in kind else 0.02)


@pytest.mark.parametrize("kind", RESULTS)
def test_the_expected_results_are_those_of_the_reference(kind):
    y, exact = many_results(kind, 40, 53, 256, "cpu")
    check((y[part] for part in slices(40, 16)), (exact(part) for part in slices(40, 16)))
    y[39, 52] += 2 * y.abs().max()
    with pytest.raises(AssertionError):
        check((y[part] for part in slices(40, 16)), (exact(part) for part in slices(40, 16)))


@pytest.mark.gpu
@pytest.mark.parametrize("module", [decode_a16, prefill_a16], ids=["decode", "prefill"])
def test_more_than_two_to_the_31_transposed_results(module):
    needs(20)
    m, n, k, group = 16400, MANY_ROWS, 128, 32
    codes, scales, w = weight(n, k, group=group, scale=torch.float16)
    packed = FRAGMENT_INT4.pack(codes), FRAGMENT_INT4.arrange_scales(scales, k, group)
    x = random((m, k))
    with poisoned():
        y = module.linear(x, *packed, None, None, n, group, 4, transposed=True)
    assert y.shape == (n, m)
    parts = slices(m, 256)
    check((y[:, part].T for part in parts), (x[part].double() @ w.T for part in parts))


# ---- weights of more than 2 GiB ----


def in_blocks(layout, packed, scale, rows, k, group):
    """Yield slices of rows of a packed weight, and their codes and scales."""
    for part in slices(packed.shape[1], 256):
        here = slice(16 * part.start, min(16 * part.stop, rows))
        count = here.stop - here.start
        codes = layout.unpack(packed[:, part].contiguous(), count, k)
        yield (
            here,
            codes,
            layout.restore_scales(scale[:, 16 * part.start : 16 * part.stop].contiguous(), count, k, group),
        )


def large_weight(kind, m, rows, k, device="cuda"):
    """Return a kernel's result with a random weight, and the exact columns, a slice of rows of the weight after the other."""
    bits, kernel = (8 if "int8" in kind else 4), kind.removesuffix("-int4").removesuffix("-int8")
    kernel = kernel if device == "cuda" else "reference"
    generator = torch.Generator(device).manual_seed(3)
    group = k if bits == 8 else GROUP
    x = random((m, k), device=device)
    if kind == "cuda-a8-int8":
        w = torch.randint(-127, 128, (rows, k), generator=generator, device=device, dtype=torch.int8)
        scale = torch.rand(rows, generator=generator, device=device) * 0.02 + 0.005
        with poisoned():
            y = int8_dynamic_linear(x, w, scale, kernel=kernel)
        tokens = dequantize_tokens_reference(*quantize_tokens_reference(x, "int8"), torch.float64)
        parts = slices(rows, 4096)
        return y, ((part, tokens @ (w[part].double() * scale[part, None].double()).T) for part in parts)
    layout = FRAGMENT_INT8 if bits == 8 else FRAGMENT_A8_INT8 if kind == "cuda-a8-int4" else FRAGMENT_INT4
    # Any bits are codes.
    packed = torch.randint(
        -(1 << 31), 1 << 31, layout.packed_shape(rows, k), generator=generator, device=device, dtype=torch.int32
    )
    shape = layout.scale_shape(rows, k, group)
    scale = (torch.rand(shape, generator=generator, device=device) * 0.02 + 0.005).to(
        torch.float32 if bits == 8 else BF16
    )
    if kind == "cuda-a8-int4":
        sizes = {"group_size": group, "out_features": rows, "activation": "int8"}
        with poisoned():
            y = int4_dynamic_linear(x, packed, scale, **sizes, kernel=kernel)
        tokens = dequantize_tokens_reference(*quantize_tokens_reference(x, "int8"), torch.float64)
    else:
        with poisoned():
            y = preshuffled_linear(x, packed, scale, bits=bits, group_size=group, out_features=rows, kernel=kernel)
        tokens = x.double()

    def columns():
        for here, codes, scales in in_blocks(layout, packed, scale, rows, k, group):
            w = (codes.double() - (1 << (bits - 1))).view(len(codes), -1, group) * scales.double()[:, :, None]
            yield here, tokens @ w.view(len(codes), k).T

    return y, columns()


WEIGHTS = [
    "cuda-decode-int4",
    "cuda-prefill-int4",
    "cuda-decode-int8",
    "cuda-prefill-int8",
    "cuda-a8-int4",
    "cuda-a8-int8",
]


def check_columns(y, columns):
    seen = 0
    for here, exact in columns:
        assert here.start == seen
        check([y[:, here]], [exact])
        seen = here.stop
    assert seen == y.shape[1]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_more_than_2_gib(kind):
    needs(12)
    k = 257 * (64 if "int8" in kind else 128)
    assert MANY_ROWS * k * (8 if "int8" in kind else 4) // 8 > WRAP
    check_columns(*large_weight(kind, 5 if "decode" in kind else 40, MANY_ROWS, k))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_expected_columns_are_those_of_the_reference(kind):
    y, columns = large_weight(kind, 3, 4100, 256, "cpu")
    check_columns(y, columns)


# ---- more numbers in the tokens than 2**31 ----


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["cuda-decode", "cuda-prefill", "cuda-a8"])
def test_tokens_of_more_than_two_to_the_31_numbers(kernel):
    needs(14)
    m, n, k = 65600, 40, 257 * 128
    assert m * k > WRAP
    codes, scales, w = weight(n, k)
    x = random((m, k))
    layout = FRAGMENT_A8_INT8 if kernel == "cuda-a8" else FRAGMENT_INT4
    packed = layout.pack(codes), layout.arrange_scales(scales, k, GROUP)
    with poisoned():
        if kernel == "cuda-a8":
            sizes = {"group_size": GROUP, "out_features": n, "activation": "int8"}
            y = int4_dynamic_linear(x, *packed, **sizes, kernel=kernel)
        else:
            y = preshuffled_linear(x, *packed, bits=4, group_size=GROUP, out_features=n, kernel=kernel)

    def exact(part):
        if kernel != "cuda-a8":
            return x[part].double() @ w.T
        return dequantize_tokens_reference(*quantize_tokens_reference(x[part], "int8"), torch.float64) @ w.T

    parts = slices(m, 2048)
    check((y[part] for part in parts), (exact(part) for part in parts))

"""ggml weights in Triton: GEMV and split-K over the planes of :mod:`lq_formats.layouts.ggml`, and the dequantizer.

A field of a chunk's words is one group of weights under one scale, a BN x 32 tile (BN x 16 for scales of 16 weights) of
consecutive in features. Its codes are cut out where they are and become exact integers by two operations a weight: a mask with
the exponent of ``2**23``, and a multiply-add that moves them to the units and takes the zero away.

Accuracy. The tensor cores multiply exact integers with x, and scales (products of the stored scales, rounded once to fp32)
multiply the fp32 sum of each group; minima multiply the fp32 sum of x. No weight is rounded. float32 activations multiply in
IEEE fp32. The bias is added in fp32.

Determinism: every kernel adds in a fixed order; partial sums of split-K go through an fp32 workspace and are added in the order
of K. No atomics.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from lq_formats.layouts import GGML_PLANES
from torch import Tensor

from lq_kernels.problem import Arch
from lq_kernels.triton.config import INVARIANT_TOKENS
from lq_kernels.triton.ggml_config import dot_config, gemv_config
from lq_kernels.triton.launch import in_chunks, reduce_split, same_device, triton_dtype


@dataclass(frozen=True)
class _Type:
    """What the kernels must know of a ggml type beyond its layout.

    Attributes:
        zero: What is subtracted from a code.
        scales: How the bytes of scales are decoded: ``half``, ``pair``, ``exponent`` or the type's name.
        table: The values of 16 codes, plus 128, four bytes an int32; empty where values are codes.
    """

    zero: int
    scales: str
    table: tuple[int, int, int, int] = (0, 0, 0, 0)


def _table(*values: int) -> tuple[int, int, int, int]:
    words = [sum(value + 128 << 8 * byte for byte, value in enumerate(values[at : at + 4])) for at in (0, 4, 8, 12)]
    a, b, c, d = (word - (1 << 32) if word >> 31 else word for word in words)
    return a, b, c, d


_TYPES = {
    "q4_0": _Type(8, "half"),
    "q4_1": _Type(0, "pair"),
    "q5_0": _Type(16, "half"),
    "q5_1": _Type(0, "pair"),
    "q8_0": _Type(128, "half"),
    "iq4_nl": _Type(128, "half", _table(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
    "mxfp4": _Type(128, "exponent", _table(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)),
    "q2_k": _Type(0, "q2_k"),
    "q3_k": _Type(4, "q3_k"),
    "q4_k": _Type(0, "q4_k"),
    "q5_k": _Type(0, "q4_k"),
    "q6_k": _Type(32, "q6_k"),
}


@triton.jit
def _values(
    words, high, field: tl.constexpr, low_bits: tl.constexpr, high_bits: tl.constexpr, zero: tl.constexpr,
    has_table: tl.constexpr, t0: tl.constexpr, t1: tl.constexpr, t2: tl.constexpr, t3: tl.constexpr,
):  # fmt: skip
    """Return the float32 integers ``u - zero`` of one field of ``words``, upper bits from ``high``; both int32."""
    per_half: tl.constexpr = 16 // low_bits
    at: tl.constexpr = field % per_half * low_bits
    half = words if field < per_half else words >> 16
    unit: tl.constexpr = 1.0 if has_table else 1.0 / (1 << at)
    if has_table:
        code = half >> at
        upper = tl.where((code & 4) != 0, t3, t2)
        lower = tl.where((code & 4) != 0, t1, t0)
        entry = tl.where((code & 8) != 0, upper, lower)
        bits = (entry >> ((code & 3) << 3)) & 0xFF
    else:
        bits = half & (((1 << low_bits) - 1) << at)
        if high_bits > 0:
            shift: tl.constexpr = at + low_bits - field * high_bits
            mask: tl.constexpr = ((1 << high_bits) - 1) << (at + low_bits)
            if shift >= 0:
                bits |= (high << shift) & mask
            else:
                bits |= (high >> -shift) & mask
    # 2**23 + bits; what is multiplied and subtracted is exact, fused or not.
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) * unit - (8388608.0 * unit + zero)


@triton.jit
def _small(code):
    """Turn an integer in [0, 2**23) into float32 without the slow conversion."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _half(word, upper: tl.constexpr):
    """Return one of the two fp16 numbers in an int32, as float32."""
    bits = word >> 16 if upper else word
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_scales(scale, mask, chunk, kind: tl.constexpr, count: tl.constexpr):
    """Load the words that hold a chunk's scales, ``scale`` pointing to each row's first; what kind has not repeats the last."""
    if kind == "q6_k":  # two chunks share a block of five words
        at = scale + chunk // 2 * 5
        own = at + chunk % 2 * 2
        d = tl.load(at + 4, mask=mask, other=0)
        return tl.load(own, mask=mask, other=0), tl.load(own + 1, mask=mask, other=0), d, d, d, d, d, d
    at = scale + chunk * count
    return (
        tl.load(at, mask=mask, other=0),
        tl.load(at + min(1, count - 1), mask=mask, other=0),
        tl.load(at + min(2, count - 1), mask=mask, other=0),
        tl.load(at + min(3, count - 1), mask=mask, other=0),
        tl.load(at + min(4, count - 1), mask=mask, other=0),
        tl.load(at + min(5, count - 1), mask=mask, other=0),
        tl.load(at + min(6, count - 1), mask=mask, other=0),
        tl.load(at + min(7, count - 1), mask=mask, other=0),
    )


@triton.jit
def _decode(w, i: tl.constexpr, kind: tl.constexpr):
    """Return the float32 scale of field ``i`` and what its group adds to each weight, from :func:`_load_scales`."""
    byte: tl.constexpr = 8 * (i % 4)
    low = 0.0
    if kind == "half":
        s = _half(w[i // 2], i % 2 == 1)
    elif kind == "pair":
        s = _half(w[i], False)
        low = _half(w[i], True)
    elif kind == "exponent":
        e = (w[i // 4] >> byte) & 0xFF
        s = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)
    elif kind == "q2_k":
        code = w[i // 4] >> byte
        s = _half(w[4], False) * _small(code & 15)
        low = -_half(w[4], True) * _small((code >> 4) & 15)
    elif kind == "q3_k":
        code = (w[i % 8 // 4] >> (byte + i // 8 * 4)) & 15
        code |= ((w[2] >> (byte + i // 4 * 2)) & 3) << 4
        s = _half(w[3], False) * (_small(code) - 32.0)
    elif kind == "q4_k":
        if i < 4:
            code, other = (w[1] >> byte) & 63, (w[2] >> byte) & 63
        else:
            code = ((w[3] >> byte) & 15) | (((w[1] >> (byte + 6)) & 3) << 4)
            other = ((w[3] >> (byte + 4)) & 15) | (((w[2] >> (byte + 6)) & 3) << 4)
        s = _half(w[0], False) * _small(code)
        low = -_half(w[0], True) * _small(other)
    else:  # q6_k
        s = _half(w[2], False) * (_small(((w[i // 4] >> byte) & 0xFF) ^ 0x80) - 128.0)
    return s, low


@triton.jit(do_not_specialize=["m"])
def _dot_kernel(
    x, codes, high, scale, bias, out, m, n, k, words, scale_words, chunks_per_split,
    dtype: tl.constexpr, has_bias: tl.constexpr, kind: tl.constexpr, count: tl.constexpr,
    low_bits: tl.constexpr, high_bits: tl.constexpr, zero: tl.constexpr, has_low: tl.constexpr, has_table: tl.constexpr,
    t0: tl.constexpr, t1: tl.constexpr, t2: tl.constexpr, t3: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BN x BM tile of ``w @ x.T`` over a share of K. ``out`` is y, or the workspace (SPLIT, m, n)."""
    FIELDS: tl.constexpr = 32 // low_bits
    pid_n, pid_m, pid_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = pid_n * BN + tl.arange(0, BN)
    tokens = pid_m * BM + tl.arange(0, BM)
    lanes = tl.arange(0, GROUP)
    row_ok, token_ok = rows < n, tokens < m
    from_row = rows.to(tl.int64)[:, None] * words + lanes[None, :]
    from_token = tokens.to(tl.int64)[:, None] * k + lanes[None, :]
    from_scale = scale + rows.to(tl.int64) * scale_words
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    ones = tl.full((BN, GROUP), 1.0, dtype=dtype)
    chunks = words // GROUP
    first = pid_k * chunks_per_split
    last = tl.minimum(first + chunks_per_split, chunks)
    following = _load_scales(from_scale, row_ok, tl.minimum(first, chunks - 1), kind, count)
    for chunk in range(first, last):
        # One chunk ahead: nothing but the tensor cores' operands is pipelined by the compiler.
        w = following
        following = _load_scales(from_scale, row_ok, tl.minimum(chunk + 1, chunks - 1), kind, count)
        packed = tl.load(codes + from_row + chunk * GROUP, mask=row_ok[:, None], other=0)
        upper = packed
        if high_bits > 0:
            upper = tl.load(high + from_row + chunk * GROUP, mask=row_ok[:, None], other=0).to(tl.int32)
        for i in tl.static_range(FIELDS):
            start = (chunk * FIELDS + i) * GROUP
            a = tl.load(x + from_token + start, mask=token_ok[:, None] & (start + lanes < k)[None, :], other=0.0)
            values = _values(packed, upper, i, low_bits, high_bits, zero, has_table, t0, t1, t2, t3)
            part = tl.dot(values.to(dtype), tl.trans(a), input_precision="ieee")
            s, low = _decode(w, i, kind)
            acc += part * s[:, None]
            if (
                has_low
            ):  # sums of x by the tensor cores come in the layout of acc; tl.sum would pass them through shared memory
                acc += tl.dot(ones, tl.trans(a), input_precision="ieee") * low[:, None]
    if has_bias:
        b = tl.load(bias + rows, mask=rows < tl.where(pid_k == 0, n, 0), other=0.0).to(tl.float32)
        acc += b[:, None]
    at = (pid_k.to(tl.int64) * m + tokens.to(tl.int64))[:, None] * n + rows[None, :]
    tl.store(out + at, tl.trans(acc).to(out.dtype.element_ty), mask=token_ok[:, None] & row_ok[None, :])


@triton.jit(do_not_specialize=["m"])
def _gemv_kernel(
    x, codes, high, scale, bias, out, m, n, k, words, scale_words,
    has_bias: tl.constexpr, kind: tl.constexpr, count: tl.constexpr,
    low_bits: tl.constexpr, high_bits: tl.constexpr, zero: tl.constexpr, has_low: tl.constexpr, has_table: tl.constexpr,
    t0: tl.constexpr, t1: tl.constexpr, t2: tl.constexpr, t3: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """BN rows of ``w @ x[token]`` with fp32 multiply-adds, BC chunks at a time; no tensor cores."""
    FIELDS: tl.constexpr = 32 // low_bits
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, GROUP)[None, None, :]
    row_ok = rows < n
    chunks = words // GROUP
    from_row = rows.to(tl.int64)[:, None, None] * words + lanes
    from_scale = scale + rows.to(tl.int64)[:, None, None] * scale_words
    acc = tl.zeros((BN, BC, GROUP), dtype=tl.float32)
    for begin in range(0, chunks, BC):
        each = (begin + tl.arange(0, BC))[None, :, None]
        here = row_ok[:, None, None] & (each < chunks)
        packed = tl.load(codes + from_row + each * GROUP, mask=here, other=0)
        upper = packed
        if high_bits > 0:
            upper = tl.load(high + from_row + each * GROUP, mask=here, other=0).to(tl.int32)
        w = _load_scales(from_scale, here, each, kind, count)
        for i in tl.static_range(FIELDS):
            # As many addresses as weights: the compiler then keeps x in the weights' layout, in registers.
            ks = tl.broadcast_to((each * FIELDS + i) * GROUP + lanes, (BN, BC, GROUP))
            a = tl.load(x + token * k + ks, mask=ks < k, other=0.0).to(tl.float32)
            values = _values(packed, upper, i, low_bits, high_bits, zero, has_table, t0, t1, t2, t3)
            s, low = _decode(w, i, kind)
            if has_low:
                acc += (values * s + low) * a
            else:
                acc += values * s * a
    y = tl.sum(tl.sum(acc, axis=2), axis=1)
    if has_bias:
        y += tl.load(bias + rows, mask=row_ok, other=0.0).to(tl.float32)
    tl.store(out + token * n + rows, y.to(out.dtype.element_ty), mask=row_ok)


@triton.jit
def _dequantize_kernel(
    codes, high, scale, out, n, k, words, scale_words,
    kind: tl.constexpr, count: tl.constexpr,
    low_bits: tl.constexpr, high_bits: tl.constexpr, zero: tl.constexpr, has_low: tl.constexpr, has_table: tl.constexpr,
    t0: tl.constexpr, t1: tl.constexpr, t2: tl.constexpr, t3: tl.constexpr,
    BN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A chunk of BN rows of the dense weight, rounded once from fp32."""
    FIELDS: tl.constexpr = 32 // low_bits
    chunk = tl.program_id(0)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    lanes = tl.arange(0, GROUP)
    row_ok = rows < n
    at = rows.to(tl.int64)[:, None] * words + (chunk * GROUP + lanes)[None, :]
    packed = tl.load(codes + at, mask=row_ok[:, None], other=0)
    upper = packed
    if high_bits > 0:
        upper = tl.load(high + at, mask=row_ok[:, None], other=0).to(tl.int32)
    w = _load_scales(scale + rows.to(tl.int64) * scale_words, row_ok, chunk, kind, count)
    for i in tl.static_range(FIELDS):
        ks = (chunk * FIELDS + i) * GROUP + lanes
        values = _values(packed, upper, i, low_bits, high_bits, zero, has_table, t0, t1, t2, t3)
        s, low = _decode(w, i, kind)
        values *= s[:, None]
        if has_low:
            values += low[:, None]
        mask = row_ok[:, None] & (ks < k)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * k + ks[None, :], values.to(out.dtype.element_ty), mask=mask)


def gemv(x: Tensor, codes: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, ggml_type: str) -> Tensor:
    """Return ``x (M, K) @ w.T + bias`` without tensor cores: best for one token, right for any number."""
    m, k = x.shape
    n, words = codes.shape
    config = gemv_config(n, k, GGML_PLANES[ggml_type], Arch.of(x.device).sm_count)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    with same_device(x):
        _gemv_kernel[(triton.cdiv(n, config.block_n), m)](
            x.contiguous(), codes, codes if high is None else high, scale, x if bias is None else bias, out,
            m, n, k, words, scale.shape[1], bias is not None, **_constants(ggml_type),
            BN=config.block_n, BC=config.block_chunks, num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def splitk(x: Tensor, codes: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, ggml_type: str) -> Tensor:
    """Return ``x (M, K) @ w.T + bias`` with K shared among programs: best for a few tokens, right for any number."""
    return _dot(x, codes, high, scale, bias, ggml_type, x.shape[0])


def invariant(
    x: Tensor, codes: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, ggml_type: str
) -> Tensor:
    """Return ``x (M, K) @ w.T + bias`` by one split-K configuration for any number of tokens: no row depends on the others."""
    return in_chunks(x, lambda part: _dot(part, codes, high, scale, bias, ggml_type, INVARIANT_TOKENS))


def _dot(
    x: Tensor, codes: Tensor, high: Tensor | None, scale: Tensor, bias: Tensor | None, ggml_type: str, tokens: int
) -> Tensor:
    m, k = x.shape
    n, words = codes.shape
    layout = GGML_PLANES[ggml_type]
    chunks = words // layout.group
    config = dot_config(tokens, n, k, layout, x.element_size(), Arch.of(x.device).sm_count)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    parts = out if config.split_k == 1 else torch.empty((config.split_k, m, n), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), config.split_k)
    with same_device(x):
        _dot_kernel[grid](
            x.contiguous(), codes, codes if high is None else high, scale, x if bias is None else bias, parts,
            m, n, k, words, scale.shape[1], triton.cdiv(chunks, config.split_k),
            triton_dtype(x.dtype), bias is not None, **_constants(ggml_type),
            BM=config.block_m, BN=config.block_n,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        if parts is not out:
            reduce_split(parts, out)
    return out


def dequantize_ggml(
    codes: Tensor, high: Tensor | None, scale: Tensor, ggml_type: str, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Return the dense ``(N, in_features)`` weight in ``dtype``, rounded once from the fp32 value of ggml."""
    n, words = codes.shape
    out = torch.empty((n, in_features), dtype=dtype, device=codes.device)
    if n == 0:
        return out
    with same_device(codes):
        # Without fused multiply-adds: in float32 the value is that of ggml to the bit.
        _dequantize_kernel[(words // GGML_PLANES[ggml_type].group, triton.cdiv(n, 16))](
            codes, codes if high is None else high, scale, out, n, in_features, words, scale.shape[1],
            **_constants(ggml_type), BN=16, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _constants(ggml_type: str) -> dict[str, int | bool | str]:
    layout, kind = GGML_PLANES[ggml_type], _TYPES[ggml_type]
    t0, t1, t2, t3 = kind.table
    per_chunk = layout.chunk * layout.block_scale_bytes // layout.form.block_size // 4
    return {
        "kind": kind.scales,
        "count": per_chunk,
        "low_bits": layout.low.bits,
        "high_bits": 0 if layout.upper is None else layout.upper.bits,
        "zero": kind.zero,
        "has_low": kind.scales in ("pair", "q2_k", "q4_k"),
        "has_table": any(kind.table),
        "t0": t0, "t1": t1, "t2": t2, "t3": t3,
        "GROUP": layout.group,
    }  # fmt: skip

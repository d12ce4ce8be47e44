"""The kernels that can be tuned: which cuts they take for a weight, in the order of their models, and what is compiled."""

import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from lq_formats import SpecError
from lq_formats.layouts.fragment import BLOCK_ROWS

from lq_kernels.cuda import decode_a16, decode_cuts, linear_a8, prefill_cuts
from lq_kernels.cuda.variant import EPILOGUES, Variant
from lq_kernels.prepare import Unit
from lq_kernels.tuned.table import Q8_1, Cut, Weight, cut_of

DTYPE = torch.bfloat16
"""dtype of the activations that are timed; fp16 takes as long."""


def weight(bits: int, group_size: int, n: int, k: int, *, symmetric: bool = True, activation: str = "") -> Weight:
    """Return a weight as tables name it, with scales as lq's layers have them: bf16, and float32 of 8-bit weights.

    Args:
        bits: 4 or 8.
        group_size: In features per scale, -1 for one scale a row (8-bit weights have no other).
        n: Out features.
        k: In features.
        symmetric: Whether there are no zero points.
        activation: ``"int8"`` or ``"fp8"`` where tokens are quantized, ``"q8_1"`` where they are like Q8_1 blocks (4
            bits in groups of 32, whose scales are fp16: ggml's Q4_0), else empty.

    Raises:
        SpecError: If there is no kernel for it to tune.
    """
    size = k if group_size == -1 or group_size == k or bits == 8 else group_size
    divisor = 16 if activation and bits == 8 else 8
    grouped, of_8_bits = size != k, activation in ("int8", "fp8")
    if (
        bits not in (4, 8)
        or activation not in ("", "int8", "fp8", Q8_1)
        or k % divisor
        or (grouped and (k % size or (size not in (32, 64) and size % 128) or (of_8_bits and size % 128)))
        or (not symmetric and (activation or bits == 8))
        or (activation == Q8_1 and (bits, size) != (4, 32))
    ):
        raise SpecError(
            f"no kernel to tune for int{bits}, groups of {size}, {activation or '16-bit'} tokens, {n}x{k}"
            f"{'' if symmetric else ', with zeros'}: expected 4 or 8 bits, in features divisible by {divisor}, and groups of "
            "32, 64 or a multiple of 128 that divides them (8 bits: one scale a row; 8-bit tokens: multiples of 128; q8_1: 4 "
            "bits in groups of 32)"
        )
    variant = Variant.of(DTYPE, torch.bfloat16, bits, size, k, not symmetric)
    rows = -(-n // BLOCK_ROWS) * BLOCK_ROWS
    return Weight(bits, variant.groups, variant.zero, variant.scale_bytes, activation, rows, k)


def group_size(weight: Weight) -> int:
    """Return in features per scale; the smallest of those that share a table's entry."""
    return 512 // weight.bits // weight.groups if weight.groups else weight.k


def scale_dtype(weight: Weight) -> torch.dtype:
    """Return the dtype of the scales: of their size where they are read with the codes; Q4_0's are fp16."""
    if weight.activation == Q8_1:
        return torch.float16
    if not weight.groups:
        return torch.float32 if weight.bits == 8 or weight.activation else torch.bfloat16
    size = weight.scale_bytes // (BLOCK_ROWS * weight.groups * (2 if weight.zero else 1))
    return torch.float32 if size == 4 else torch.bfloat16


def variant_of(weight: Weight) -> Variant:
    """Return what the kernels for 16-bit tokens are compiled for."""
    return Variant.of(DTYPE, scale_dtype(weight), weight.bits, group_size(weight), weight.k, weight.zero)


def epilogue_of(weight: Weight) -> tuple[str, ...]:
    """Return the macros of what becomes of products: ggml's are ``(N, M) float32``."""
    return EPILOGUES["transposed" if weight.activation == Q8_1 else "none"]


def _int8_tokens(weight: Weight) -> bool:
    return weight.activation == Q8_1 and weight.groups > 0


class Tunable(Protocol):
    """A kernel, as the tuner sees it.

    Attributes:
        same: Fields by which a cut is found again at another number of tokens.
    """

    same: tuple[str, ...]

    def useful(self, weight: Weight, m: int) -> bool:
        """Return whether it may be the fastest for ``m`` tokens, or what that is compared with."""
        ...

    def ranked(self, weight: Weight, m: int, sm_count: int) -> list[Any]:
        """Return every configuration, the one that the model chooses first; ``[None]`` for a kernel without cuts."""
        ...

    def orders(self, weight: Weight, m: int, config: Any) -> Iterable[Any]:
        """Return what takes the tiles of a configuration in another order, of which the model knows nothing."""
        ...

    def unit(self, weight: Weight, m: int, config: Any) -> Unit:
        """Return what a configuration compiles for ``m`` tokens."""
        ...


class _Decode:
    same: tuple[str, ...] = decode_cuts.SAME

    def useful(self, weight: Weight, m: int) -> bool:
        return weight.activation in ("", Q8_1) and m <= 128

    def ranked(self, weight: Weight, m: int, sm_count: int) -> list[Any]:
        blocks, sizes = weight.n // BLOCK_ROWS, (weight.k, weight.bits)
        scales = variant_of(weight).scales
        cuts = decode_cuts.candidates(m, blocks, *sizes, scales, sm_count, q8_1=_int8_tokens(weight))
        return sorted(cuts, key=lambda config: decode_cuts.cost(config, m, blocks, *sizes, sm_count))

    def orders(self, weight: Weight, m: int, config: Any) -> Iterable[Any]:
        return ()

    def unit(self, weight: Weight, m: int, config: Any) -> Unit:
        tokens = decode_a16.q8_1_defines(config.form, m, DTYPE) if _int8_tokens(weight) else ()
        return Unit("decode_a16", (*variant_of(weight).defines, *config.defines, *epilogue_of(weight), *tokens))


class _Prefill:
    same: tuple[str, ...] = prefill_cuts.SAME

    def useful(self, weight: Weight, m: int) -> bool:
        return weight.activation in ("", Q8_1)

    def ranked(self, weight: Weight, m: int, sm_count: int) -> list[Any]:
        sizes = (m, weight.n, weight.k, weight.bits)
        cuts = prefill_cuts.candidates(*sizes, weight.scale_bytes, sm_count)
        return sorted(cuts, key=lambda config: prefill_cuts.cost(config, *sizes, sm_count))

    def orders(self, weight: Weight, m: int, config: Any) -> Iterable[Any]:
        return prefill_cuts.orders(config, m, weight.n)

    def unit(self, weight: Weight, m: int, config: Any) -> Unit:
        return Unit("prefill_a16", (*config.macros(variant_of(weight)), *epilogue_of(weight)))


class _A8:
    same: tuple[str, ...] = linear_a8.SAME

    def useful(self, weight: Weight, m: int) -> bool:
        return weight.activation in ("int8", "fp8")

    def ranked(self, weight: Weight, m: int, sm_count: int) -> list[Any]:
        promote = linear_a8.promotes(weight.activation, weight.groups > 0)
        sizes = (m, weight.n, weight.k, weight.bits, promote)
        cuts = linear_a8.candidates(*sizes, sm_count)
        return sorted(cuts, key=lambda config: linear_a8.cost(config, *sizes, weight.scale_bytes, sm_count))

    def orders(self, weight: Weight, m: int, config: Any) -> Iterable[Any]:
        return linear_a8.orders(config, m, weight.n)

    def unit(self, weight: Weight, m: int, config: Any) -> Unit:
        grouped = weight.groups > 0
        promote = linear_a8.promotes(weight.activation, grouped)
        scale = scale_dtype(weight)
        variant = linear_a8.A8Variant(weight.bits, weight.activation, DTYPE, scale, grouped, False, promote)
        return Unit("linear_a8", (*variant.defines, *config.defines))


class _Dense:
    same: tuple[str, ...] = ()

    def useful(self, weight: Weight, m: int) -> bool:
        return not weight.activation and m >= 128

    def ranked(self, weight: Weight, m: int, sm_count: int) -> list[Any]:
        return [None]

    def orders(self, weight: Weight, m: int, config: Any) -> Iterable[Any]:
        return ()

    def unit(self, weight: Weight, m: int, config: Any) -> Unit:
        defines = tuple(each.replace("LQ_X=", "LQ_OUT=") for each in variant_of(weight).defines)
        return Unit("dequantize_fragment", defines)


TUNABLES: Mapping[str, Tunable] = MappingProxyType(
    {"decode_a16": _Decode(), "prefill_a16": _Prefill(), "linear_a8": _A8(), "dequant_blas": _Dense()}
)
"""By their names in tables."""


def config_of(kernel: str, weight: Weight, m: int, sm_count: int, cut: Cut) -> Any:
    """Return the configuration with these fields, one of the kernel's own; None for a kernel without cuts.

    Raises:
        SpecError: If the kernel does not take it.
    """
    tunable = TUNABLES[kernel]
    ranked = tunable.ranked(weight, m, sm_count)
    orders = itertools.chain.from_iterable(tunable.orders(weight, m, config) for config in ranked)
    for config in itertools.chain(ranked, orders):
        if fields_of(config) == cut:
            return config
    raise SpecError(f"{kernel} does not take {dict(cut)} for {weight} and {m} tokens")


def fields_of(config: Any) -> Cut:
    """Return a configuration's fields as tables hold them."""
    return () if config is None else cut_of(config)

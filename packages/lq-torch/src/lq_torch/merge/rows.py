"""Rows of weights, joined and cut: exact for every format whose inner tensors are stored row by row.

Scales and zero points of such formats belong to one row (one out feature), so stacking weights that take the same input
stacks their inner tensors, and no value changes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lq_formats import UnsupportedError
from torch import Tensor

from lq_torch.tensors import GGMLTensor, LowBitTensor

_ROW_KINDS = frozenset({"int4", "int8", "int4_preshuffled", "int8_preshuffled", "int8_dynamic", "intx", "ggml"})
"""Kinds whose tensors in files are stored row by row; what is in a kernel's order is brought into theirs and back."""


def cat_rows(weights: Sequence[Tensor]) -> Tensor:
    """Stack weights ``(N_i, K)`` into one ``(sum of N_i, K)``, bit for bit.

    Raises:
        UnsupportedError: If they are not equally quantized, or their packing mixes rows.
    """
    if reason := why_not_cat({f"weight {number}": weight for number, weight in enumerate(weights)}):
        raise UnsupportedError(reason)
    first = weights[0]
    if not isinstance(first, LowBitTensor):
        return torch.cat([weight.detach() for weight in weights])
    parts = [_row_tensors(weight) for weight in weights if isinstance(weight, LowBitTensor)]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return _from_rows(first, tensors, sum(weight.shape[0] for weight in weights))


def slice_rows(weight: Tensor, start: int, stop: int) -> Tensor:
    """Return rows ``start`` to ``stop`` of a weight ``(N, K)``, sharing its memory where the format stores plain rows.

    Raises:
        UnsupportedError: If the packing mixes rows.
    """
    if not isinstance(weight, LowBitTensor):
        return weight[start:stop]
    if weight.kind not in _ROW_KINDS:
        raise UnsupportedError(f"the packing of a {type(weight).__name__} mixes rows: it cannot be cut")
    # A scale without dimensions holds for the whole tensor, so for each of its rows.
    tensors = {name: t if t.dim() == 0 else t[start:stop] for name, t in _row_tensors(weight).items()}
    return _from_rows(weight, tensors, stop - start)


def why_not_cat(weights: Mapping[str, Tensor]) -> str | None:
    """Say why weights, by name, cannot be stacked without changing a bit, or return None."""
    described: dict[str, tuple[Any, ...]] = {}
    for name, weight in weights.items():
        if isinstance(weight, LowBitTensor):
            if weight.kind not in _ROW_KINDS:
                return f"{name} is a {type(weight).__name__}, whose packing mixes rows; merge before quantizing to it"
            tensors = _row_tensors(weight)
            if any(tensor.dim() == 0 for tensor in tensors.values()):
                return f"{name} has one scale for the whole tensor; quantize with one scale a row"
            inner = tuple((key, str(t.dtype), *t.shape[1:]) for key, t in sorted(tensors.items()))
            how: tuple[Any, ...] = (type(weight).__name__, tuple(weight.attributes().items()), inner)
        elif type(weight.data) is not Tensor:
            return f"{name} is a {type(weight.data).__name__}: expected an ordinary or a quantized weight"
        else:
            how = ("dense",)
        if weight.dim() != 2:
            return f"{name} has shape {tuple(weight.shape)}: expected (out_features, in_features)"
        described[name] = (f"{weight.shape[1]} in features", str(weight.dtype), str(weight.device), *how)
    (first, expected), *others = described.items()
    for name, found in others:
        if found != expected:
            return f"{first} and {name} differ: {_differences(expected, found)}"
    return None


def _row_tensors(weight: LowBitTensor) -> dict[str, Tensor]:
    """Return tensors whose rows are the weight's: those of files, or of ggml blocks and planes the ones that are held."""
    return weight.inner_tensors() if _holds_rows(weight) else weight.to_tensors()


def _from_rows(like: LowBitTensor, tensors: dict[str, Tensor], rows: int) -> LowBitTensor:
    shape = [rows, like.shape[1]]
    if _holds_rows(like):
        return type(like)(tensors, like.attributes(), shape, like.dtype)
    return LowBitTensor.from_tensors(tensors, {**like.spec_json(), "shape": shape})


def _holds_rows(weight: LowBitTensor) -> bool:
    return isinstance(weight, GGMLTensor) and weight.fragments() is None


def _differences(expected: tuple[Any, ...], found: tuple[Any, ...]) -> str:
    pairs = [(a, b) for a, b in zip(expected, found, strict=False) if a != b]
    return "; ".join(f"{a} and {b}" for a, b in pairs)

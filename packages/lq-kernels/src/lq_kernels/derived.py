"""Tensors derived from a packed weight, kept as long as the weight's storage lives.

Some kernels read a packing of their own. It is made from the canonical bits on first use, once a weight, and found again
by the identity of the storage and the view of it: a temporary view (the int32 words of an int8 packing, a detached
alias) finds what an earlier one made, and ``tensor.data = other`` does not. An in-place change (the version counter
moves) discards it; the storage's end frees it.

Tensors made in inference mode have no version counter: a copy of the weight is kept and compared instead, which costs
one read of the weight a call. Not noticed are writes that hide from torch, through
``tensor.data`` or NumPy, nor any write where the product is given ``tensor.data``, an alias with a version counter of its own.
"""

import threading
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_Stamp: TypeAlias = int | Tensor

_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()


def derived(weight: Tensor, key: str, make: Callable[[], Tensor]) -> Tensor:
    """Return ``make()`` for this weight and key, computed once.

    Args:
        weight: Canonical packed tensor that the result depends on, and the only one.
        key: Which derived form, for example ``"aten-cpu"``.
        make: Computes it; the result must not share memory with the weight.
    """
    storage = weight.untyped_storage()
    where = (key, weight.dtype, weight.storage_offset(), weight.shape, weight.stride())
    with _lock:
        entries = _cache.get(storage)  # type: ignore[no-untyped-call]
        if entries is None:
            entries = _cache[storage] = {}
        found = entries.get(where)
    if found is not None and _unchanged(weight, found[0]):
        result: Tensor = found[1]
        return result
    stamp: _Stamp = weight.clone() if weight.is_inference() else weight._version
    result = make()
    with _lock:
        entries[where] = (stamp, result)
    return result


def has_derived(weight: Tensor, key: str) -> bool:
    """Return whether :func:`derived` would find what it made before."""
    where = (key, weight.dtype, weight.storage_offset(), weight.shape, weight.stride())
    with _lock:
        entries = _cache.get(weight.untyped_storage())  # type: ignore[no-untyped-call]
        found = None if entries is None else entries.get(where)
    return found is not None and _unchanged(weight, found[0])


def _unchanged(weight: Tensor, stamp: _Stamp) -> bool:
    if isinstance(stamp, Tensor):
        return weight.is_inference() and torch.equal(weight, stamp)
    return not weight.is_inference() and weight._version == stamp

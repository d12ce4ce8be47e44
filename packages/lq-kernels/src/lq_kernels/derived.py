"""Tensors derived from a packed weight, kept as long as the weight lives.

Some kernels read a packing of their own. It is made from the canonical bits on first use, once a weight, and found again
by the identity of the canonical tensor. An in-place change of the weight (its version counter moves) discards it; the
weight's end frees it.
"""

import threading
from collections.abc import Callable

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = threading.Lock()


def derived(weight: Tensor, key: str, make: Callable[[], Tensor]) -> Tensor:
    """Return ``make()`` for this weight and key, computed once.

    Args:
        weight: Canonical packed tensor that the result depends on.
        key: Which derived form, for example ``"aten-int4-cpu"``.
        make: Computes it.
    """
    version = -1 if weight.is_inference() else weight._version
    with _lock:
        entries = _cache.get(weight)  # type: ignore[no-untyped-call]
        if entries is None:
            entries = _cache[weight] = {}
        found = entries.get(key)
    if found is not None and found[0] == version:
        result: Tensor = found[1]
        return result
    result = make()
    with _lock:
        entries[key] = (version, result)
    return result

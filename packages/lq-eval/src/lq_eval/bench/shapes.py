"""The linear layers of well-known models: (out features, in features) of each projection, separate and merged.

Serving engines merge q, k, v into one product and gate, up into another; training code and transformers do not. Both are
listed, because a merged product is larger and favours other kernels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

from lq_formats import SpecError


@dataclass(frozen=True)
class Shape:
    """One weight.

    Attributes:
        label: For example ``"llama-3-8b.down"``.
        n: Out features.
        k: In features.
    """

    label: str
    n: int
    k: int


@dataclass(frozen=True)
class ModelDimensions:
    """Sizes of one decoder model that determine its linear layers.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the feed-forward layer (of one expert).
        kv: Out features of k, and of v: key-value heads times their width.
        layers: Blocks.
        q: Out features of q: heads times their width, which need not be ``hidden``; 0 if it is.
        experts: Feed-forward experts a block; 0 for a dense model. Their weights are called w1, w3, w2 (gate, up, down).
    """

    hidden: int
    intermediate: int
    kv: int
    layers: int
    q: int = 0
    experts: int = 0

    def shapes(self, name: str, *, merged: bool) -> tuple[Shape, ...]:
        """Return the layers of one block (one of its experts), with q/k/v and gate/up merged or separate."""
        hidden, inner, kv, q = self.hidden, self.intermediate, self.kv, self.q or self.hidden
        gate, up, down, gate_up = ("w1", "w3", "w2", "w13") if self.experts else ("gate", "up", "down", "gate_up")
        if merged:
            layers = {"qkv": (q + 2 * kv, hidden), "o": (hidden, q), gate_up: (2 * inner, hidden)}
        else:
            layers = {
                "q": (q, hidden),
                "k": (kv, hidden),
                "v": (kv, hidden),
                "o": (hidden, q),
                gate: (inner, hidden),
                up: (inner, hidden),
            }
        layers[down] = (hidden, inner)
        return tuple(Shape(f"{name}.{layer}", n, k) for layer, (n, k) in layers.items())


MODELS = MappingProxyType(
    {
        "llama-3.2-1b": ModelDimensions(2048, 8192, 512, 16),
        "llama-3-8b": ModelDimensions(4096, 14336, 1024, 32),
        "llama-3-70b": ModelDimensions(8192, 28672, 1024, 80),
        "qwen3-8b": ModelDimensions(4096, 12288, 1024, 36),
        "qwen3-32b": ModelDimensions(5120, 25600, 1024, 64, q=8192),
        "mixtral-8x7b": ModelDimensions(4096, 14336, 1024, 32, experts=8),
    }
)


def check_tokens(ms: Iterable[int]) -> None:
    """Raise SpecError unless every number of tokens is at least 1."""
    for m in ms:
        if m < 1:
            raise SpecError(f"M={m}: expected at least one token")


def check_sizes(n: int, k: int) -> None:
    """Raise SpecError unless a weight has elements."""
    if n < 1 or k < 1:
        raise SpecError(f"a weight of {n}x{k} (out x in features): expected positive sizes")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Read a comma-separated list of shapes.

    An item is a model (``llama-3-8b``: its distinct separate and merged layers), one of its layers
    (``llama-3-8b.gate_up``), a model's merged layers only (``llama-3-8b.merged``), or sizes ``NxK``
    (out x in features: ``14336x4096``).

    Raises:
        SpecError: If an item is none of these.
    """
    found: dict[tuple[int, int], Shape] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        for shape in _parse_item(item):
            # Layers of equal size (k and v, gate and up) are timed once, under the first one's name.
            found.setdefault((shape.n, shape.k), shape)
    if not found:
        raise SpecError(f"no shape in {text!r}: expected for example '4096x4096' or 'llama-3-8b'")
    return tuple(found.values())


def _parse_item(item: str) -> tuple[Shape, ...]:
    sizes = item.lower().split("x")
    if len(sizes) == 2 and all(size.isdecimal() and int(size) > 0 for size in sizes):
        return (Shape(item.lower(), int(sizes[0]), int(sizes[1])),)
    name, layer = item, ""
    if name not in MODELS and "." in item:
        name, _, layer = item.rpartition(".")
    if name not in MODELS:
        raise SpecError(f"unknown shape {item!r}: expected NxK (out x in features) or one of {', '.join(MODELS)}")
    separate, merged = MODELS[name].shapes(name, merged=False), MODELS[name].shapes(name, merged=True)
    if not layer:
        return separate + merged
    if layer == "merged":
        return merged
    chosen = tuple(shape for shape in separate + merged if shape.label == item)
    if not chosen:
        known = ", ".join(dict.fromkeys(shape.label.rpartition(".")[2] for shape in separate + merged))
        raise SpecError(f"{name} has no layer {layer!r}: expected one of {known}, merged")
    return chosen[:1]

"""Other libraries beside lq's kernels: gemlite, humming-kernels and PyTorch's own int4 product. They run on a GPU only.

``gemlite`` and ``humming`` need their packages. Both compile and tune on the first call for a new size; those calls are
made before the clock starts, and their seconds are no part of a result.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from lq_formats import DeviceError, MissingPackageError, UnsupportedError
from lq_torch import GemliteConfig, WeightConfig
from torch import Tensor

from lq_eval.bench.products import Product
from lq_eval.bench.shapes import Shape
from lq_eval.bench.timing import Call, copies
from lq_eval.schemes import parse_scheme

Calls: TypeAlias = Callable[[Tensor], Sequence[Call]]

# humming's layers quantize the weight themselves, one after another, so fewer copies are made of a small one.
_HUMMING_COPIES = 32


@dataclass(frozen=True)
class Peer:
    """Another library.

    Attributes:
        package: The distribution it comes in.
        ops: Products that it has.
        prepare: From a product, a weight's shape, a dtype, a device and the bytes of a cold round to a function from x
            ``(M, K)`` to the calls to time.
    """

    package: str
    ops: tuple[str, ...]
    prepare: Callable[[Product, Shape, torch.dtype, torch.device, int], Calls]


def peer_calls(
    peer: str, product: Product, shape: Shape, dtype: torch.dtype, device: torch.device, cold_bytes: int
) -> Calls:
    """Prepare copies of a weight packed for another library.

    Args:
        peer: One of ``PEERS``.
        product: What to multiply.
        shape: The weight.
        dtype: dtype of x.
        device: A CUDA device.
        cold_bytes: Bytes of weights in a round, see :mod:`lq_eval.bench.timing`.

    Returns:
        A function from x ``(M, K)`` to the calls to time.

    Raises:
        DeviceError: If ``device`` is no GPU.
        MissingPackageError: If the library is not installed.
        UnsupportedError: If it has no such product.
        LQError: If it does not take this weight.
    """
    found = PEERS[peer]
    if product.op not in found.ops:
        raise UnsupportedError(f"{peer} is timed for {', '.join(found.ops)}, not for {product.op}")
    if device.type != "cuda":
        raise DeviceError(f"{peer} runs on a CUDA GPU only, not on {device}")
    return found.prepare(product, shape, dtype, device, cold_bytes)


def _layers(config: WeightConfig, shape: Shape, dtype: torch.dtype, device: torch.device, count: int) -> Calls:
    first = config.quantize(torch.randn(shape.n, shape.k, device=device, dtype=dtype))
    packed = [first, *(first.clone() for _ in range(count - 1))]

    def calls(x: Tensor) -> list[Call]:
        return [lambda w=w: torch.nn.functional.linear(x, w) for w in packed]  # type: ignore[misc]

    return calls


def _tinygemm(product: Product, shape: Shape, dtype: torch.dtype, device: torch.device, cold_bytes: int) -> Calls:
    group = "row" if product.group_size == -1 else f"g{product.group_size}"
    config = parse_scheme(f"int4-{group}:tile_packed_to_4d")
    return _layers(config, shape, dtype, device, copies(shape.n * shape.k // 2, cold_bytes))


def _gemlite(product: Product, shape: Shape, dtype: torch.dtype, device: torch.device, cold_bytes: int) -> Calls:
    count = copies(shape.n * shape.k * product.bits() // 8, cold_bytes)
    return _layers(gemlite_config(product), shape, dtype, device, count)


def gemlite_config(product: Product) -> GemliteConfig:
    """Return gemlite's way of computing a product."""
    weight, activation = f"int{product.bits()}", product.op.partition("a8-")[2] or "none"
    if weight == "int8" and activation == "fp8":
        weight = "fp8"  # gemlite has no int8 weights with fp8 activations
    if activation != "none":
        return GemliteConfig(weight, activation)
    return GemliteConfig(weight, group_size=product.group_size if weight == "int4" else -1)


def _humming(product: Product, shape: Shape, dtype: torch.dtype, device: torch.device, cold_bytes: int) -> Calls:
    try:
        layer = importlib.import_module("humming.layer").HummingLayer
    except ImportError as error:
        raise MissingPackageError("humming-kernels", "the humming peer", "pip install humming-kernels") from error
    weight_config, input_config = humming_configs(product)
    count = copies(shape.n * shape.k * product.bits() // 8, cold_bytes, _HUMMING_COPIES)
    weight = torch.randn(shape.n, shape.k, device=device, dtype=dtype)
    layers: list[Callable[[Tensor], object]] = []
    with torch.device(device):
        for _ in range(count):
            made = layer(
                shape_n=shape.n,
                shape_k=shape.k,
                weight_config=dict(weight_config),
                input_config=None if input_config is None else dict(input_config),
                torch_dtype=dtype,
            ).to(device)
            made.load_from_unquantized(weight)
            made.transform()
            layers.append(made)

    def calls(x: Tensor) -> list[Call]:
        return [lambda layer=layer: layer(x) for layer in layers]  # type: ignore[misc]

    return calls


def humming_configs(product: Product) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Return humming's descriptions of the weight and, where they are quantized, of the activations."""
    weight: dict[str, Any] = {"dtype": f"int{product.bits()}"}
    if product.bits() == 4 and product.group_size != -1:
        weight["group_size"] = product.group_size
    activation = {"fp8": "float8e4m3", "int8": "int8"}.get(product.op.partition("a8-")[2])
    return weight, None if activation is None else {"dtype": activation}


PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        "gemlite": Peer("gemlite", ("int4", "int8", "w4a8-fp8", "w4a8-int8", "w8a8-int8", "w8a8-fp8"), _gemlite),
        "humming": Peer("humming-kernels", ("int4", "int8", "w4a8-fp8", "w4a8-int8", "w8a8-int8"), _humming),
        "tinygemm": Peer("torch", ("int4",), _tinygemm),
    }
)

"""Other 4-bit libraries beside lq's kernels, through the packings that lq_torch has for them.

``gemlite`` needs the gemlite package; ``tinygemm`` is part of PyTorch. Both run on a GPU only.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType

import torch
from lq_formats import DeviceError
from torch import Tensor

from lq_eval.bench.shapes import Shape
from lq_eval.bench.timing import Call
from lq_eval.schemes import parse_scheme

PEERS = MappingProxyType({"gemlite": "gemlite", "tinygemm": "tile_packed_to_4d"})


def peer_calls(
    peer: str, shape: Shape, dtype: torch.dtype, group_size: int, device: torch.device, count: int
) -> Callable[[Tensor], Sequence[Call]]:
    """Prepare ``count`` copies of a weight packed for another library.

    Args:
        peer: ``"gemlite"`` or ``"tinygemm"``.
        shape: The weight.
        dtype: dtype of x.
        group_size: In features per scale; -1 for one a row.
        device: A CUDA device.
        count: Number of copies.

    Returns:
        A function from x ``(M, K)`` to the calls to time.

    Raises:
        DeviceError: If ``device`` is no GPU.
        LQError: If the library is missing or does not take this weight.
    """
    if device.type != "cuda":
        raise DeviceError(f"{peer} runs on a CUDA GPU only, not on {device}")
    group = "row" if group_size == -1 else f"g{group_size}"
    config = parse_scheme(f"int4-{group}:{PEERS[peer]}")
    weight = torch.randn(shape.n, shape.k, device=device, dtype=dtype)
    first = config.quantize(weight)
    del weight
    packed = [first, *(first.clone() for _ in range(count - 1))]

    def calls(x: Tensor) -> list[Call]:
        return [lambda w=w: torch.nn.functional.linear(x, w) for w in packed]  # type: ignore[misc]

    return calls

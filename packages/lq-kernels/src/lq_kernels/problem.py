"""Problem: everything that kernel selection may look at, and nothing else."""

import functools
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from lq_formats import QuantSpec, ShapeError, SpecError

from lq_kernels.validation import INTEGERS

Op: TypeAlias = Literal[
    "int4",
    "int8",
    "preshuffled",
    "preshuffled_gated",
    "preshuffled_minima",
    "q4_0",
    "q4_0_q8_1",
    "int4_dynamic",
    "int8_dynamic",
    "ggml",
]

OPS: tuple[Op, ...] = get_args(Op)


def check_op(op: object) -> None:
    """Raise SpecError unless there is such an operation."""
    if op not in OPS:
        raise SpecError(f"op={op!r}: expected one of {', '.join(OPS)}")


Q4_0_SPEC = QuantSpec(4, "group", 32, True, torch.float16)
"""How a Q4_0 weight is quantized, in the terms of int4."""


@dataclass(frozen=True)
class Arch:
    """The processor a problem runs on.

    Attributes:
        kind: ``"cpu"``, ``"cuda"`` or ``"rocm"``.
        capability: CUDA compute capability ``(major, minor)``; ``(0, 0)`` elsewhere.
        name: Device name as the driver reports it, for the tables in ``tuned/``; empty on a CPU.
        sm_count: Streaming multiprocessors (compute units); 0 on a CPU.
    """

    kind: Literal["cpu", "cuda", "rocm"]
    capability: tuple[int, int] = (0, 0)
    name: str = ""
    sm_count: int = 0

    @staticmethod
    def of(device: torch.device | str) -> "Arch":
        """Return the architecture of a torch device (cached per device)."""
        device = torch.device(device)
        if device.type != "cuda":
            return CPU
        return _cuda_arch(torch.cuda.current_device() if device.index is None else device.index)


CPU = Arch("cpu")


@functools.cache
def _cuda_arch(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    kind: Literal["cuda", "rocm"] = "rocm" if torch.version.hip else "cuda"
    capability = (0, 0) if kind == "rocm" else (properties.major, properties.minor)
    return Arch(kind, capability, properties.name, properties.multi_processor_count)


@dataclass(frozen=True)
class Problem:
    """One low-bit matrix product ``y (m, n) = x (m, k) @ w (n, k).T``.

    Attributes:
        op: Which family of formats the weights are in.
        m: Tokens (rows of x).
        n: Out features (rows of w; of a gated product, which has half as many results, gates and ups).
        k: In features.
        spec: How the weights are quantized.
        dtype: dtype of x (and of y).
        arch: Where it runs.
        activation: What x is quantized to, ``"int8"`` or ``"fp8"``; ``"q8_1"`` where it is quantized like Q8_1 blocks, right
            before the product or in it; empty where it is not.
        batch_invariant: Whether no row of the result may depend on the others (:class:`lq_kernels.batch_invariant`).

    Raises:
        ShapeError: If a size is no integer, or less than 1: an empty product needs no kernel.
        SpecError: If there is no such operation.
    """

    op: Op
    m: int
    n: int
    k: int
    spec: QuantSpec
    dtype: torch.dtype
    arch: Arch
    activation: str = ""
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        check_op(self.op)
        if not all(isinstance(size, INTEGERS) for size in (self.m, self.n, self.k)):
            raise ShapeError(f"m={self.m!r}, n={self.n!r}, k={self.k!r}: expected integers")
        if self.m < 1 or self.n < 1 or self.k < 1:
            raise ShapeError(
                f"m={self.m}, n={self.n}, k={self.k}: expected at least 1 each; an empty product needs no kernel"
            )

    @property
    def group_size(self) -> int:
        """In features that share a scale."""
        return self.spec.resolve_group_size(self.k)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        where = self.arch.name or self.arch.kind
        kind = "sym" if self.spec.symmetric else "asym"
        op = f"{self.op} ({self.activation})" if self.activation else self.op
        mode = ", batch-invariant" if self.batch_invariant else ""
        return f"{op} m={self.m} n={self.n} k={self.k} g={self.group_size} {kind} {name} on {where}{mode}"

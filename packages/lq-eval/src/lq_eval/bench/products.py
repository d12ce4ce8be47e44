"""The products that benchmarks time, by name: how the weight is quantized and what multiplies with it.

::

    int4  int8  q4_0                                   weights of 4 or 8 bits, activations as they are
    w4a8-fp8  w4a8-int8  w8a8-int8  w8a8-fp8           activations quantized per token on each call
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch
from lq_formats import NoKernelError, QuantSpec, SpecError
from lq_kernels import Arch, Problem, explain, kernel_names, select
from lq_kernels.problem import Q4_0_SPEC

from lq_eval.bench.operands import Operand, int4_operand, int8_operand, layer_operand, q4_0_operand
from lq_eval.bench.shapes import Shape
from lq_eval.schemes import parse_scheme

KERNEL_OPS = MappingProxyType({"int4": "int4", "int8": "int8", "q4_0": "q4_0_q8_1"})
DYNAMIC_OPS = ("w4a8-fp8", "w4a8-int8", "w8a8-int8", "w8a8-fp8")
OPS = (*KERNEL_OPS, *DYNAMIC_OPS)
AUTO = "auto"


@dataclass(frozen=True)
class Product:
    """One kind of low-bit product.

    Attributes:
        op: One of ``OPS``.
        group_size: In features per scale of 4-bit weights; -1 for one a row. 8-bit weights have one a row.
        symmetric: Whether int4 is symmetric.
    """

    op: str
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise SpecError(f"unknown op {self.op!r}: expected one of {', '.join(OPS)}")

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels that can be forced; none where layers choose for themselves."""
        return kernel_names(KERNEL_OPS[self.op]) if self.op in KERNEL_OPS else ()  # type: ignore[arg-type]

    def check(self, shape: Shape) -> None:
        """Raise SpecError if a weight of this shape cannot be quantized so."""
        if self.op == "q4_0" and shape.k % 32:
            raise SpecError(f"{shape.label}: K={shape.k} is no multiple of 32, which q4_0 needs; leave it out of --ops")
        grouped = self.op.startswith(("int4", "w4")) and self.group_size != -1
        if grouped and (self.group_size < 8 or shape.k % self.group_size):
            raise SpecError(f"{shape.label}: K={shape.k} is not divisible by the group size {self.group_size}")

    def group(self, shape: Shape) -> int:
        """Return the in features per scale, as rows of results name them; 0 for one scale a row of 8 bits."""
        if self.op.startswith(("int8", "w8")):
            return 0
        if self.op == "q4_0":
            return 32
        return shape.k if self.group_size == -1 else self.group_size

    def bits(self) -> int:
        """Return the bits of a code."""
        return 8 if self.op.startswith(("int8", "w8")) else 4

    def operand(self, shape: Shape, dtype: torch.dtype, device: torch.device, cold_bytes: int) -> Operand:
        """Return enough copies of a weight.

        Raises:
            LQError: If this lq has no such product.
        """
        n, k = shape.n, shape.k
        if self.op == "int4":
            group = self.group(shape)
            return int4_operand(n, k, group, dtype, device, symmetric=self.symmetric, cold_bytes=cold_bytes)
        if self.op == "int8":
            return int8_operand(n, k, device, cold_bytes)
        if self.op == "q4_0":
            return q4_0_operand(n, k, device, cold_bytes)
        weights, _, activations = self.op.partition("a8-")
        group_name = "" if weights == "w8" else "-row" if self.group_size == -1 else f"-g{self.group_size}"
        scheme = f"{'int8' if weights == 'w8' else 'int4'}{group_name}-a8-{activations}"
        return layer_operand(n, k, dtype, device, parse_scheme(scheme), cold_bytes)

    def ran(self, shape: Shape, m: int, dtype: torch.dtype, arch: Arch, kernel: str = AUTO) -> str:
        """Return the name of the kernel that runs ``m`` tokens.

        Raises:
            NoKernelError: If none can, or not the forced one.
        """
        if self.op not in KERNEL_OPS:
            return kernel
        problem = self._problem(shape, m, dtype, arch)
        return explain(problem).chosen or "" if kernel == AUTO else select(problem, kernel).name

    def cannot(self, shape: Shape, m: int, dtype: torch.dtype, arch: Arch, kernel: str) -> bool:
        """Return whether a kernel cannot run this."""
        try:
            self.ran(shape, m, dtype, arch, kernel)
        except NoKernelError:
            return True
        return False

    def _problem(self, shape: Shape, m: int, dtype: torch.dtype, arch: Arch) -> Problem:
        # The Q4_0 product sees quantized activations and returns float32, whatever x was.
        seen = torch.float32 if self.op == "q4_0" else dtype
        return Problem(KERNEL_OPS[self.op], m, shape.n, shape.k, self._spec(dtype), seen, arch)  # type: ignore[arg-type]

    def _spec(self, dtype: torch.dtype) -> QuantSpec:
        if self.op == "int8":
            return QuantSpec(8, "row", None, True, torch.float32)
        if self.op == "q4_0":
            return Q4_0_SPEC
        if self.group_size == -1:
            return QuantSpec(4, "row", None, self.symmetric, dtype)
        return QuantSpec(4, "group", self.group_size, self.symmetric, dtype)

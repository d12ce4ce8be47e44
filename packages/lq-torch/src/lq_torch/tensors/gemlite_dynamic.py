"""GemliteTensor: weights whose activations gemlite quantizes on the fly, fp8 weights and MXFP4/MXFP8 weights."""

import math
from typing import ClassVar, Self

import torch
from lq_formats import (
    DTypeError,
    FormatError,
    GroupSizeError,
    LQError,
    QuantSpec,
    ShapeError,
    UnsupportedError,
    check_finite,
    choose_qparams,
    pack_bits,
    pack_int4,
    quantize_affine,
    unpack_bits,
)
from lq_formats.layouts import GEMLITE
from lq_kernels.derivatives import wants_gradient
from lq_kernels.validation import check_dense_dtype
from torch import Tensor

from lq_torch.integrations.gemlite import current_kernel, gemlite_linear
from lq_torch.tensors import gemlite_meta as meta
from lq_torch.tensors.base import SCALE_DTYPES, LowBitTensor, SharedValue
from lq_torch.tensors.saved import SavedWeight

COMBINATIONS: dict[tuple[str, str], tuple[int, int]] = {
    ("int8", "int8"): (8, 0),
    ("fp8", "fp8"): (8, 9),
    ("int4", "int8"): (8, 0),
    ("int4", "fp8"): (8, 9),
    ("mxfp8", "none"): (8, 9),
    ("mxfp4", "none"): (8, 9),
    ("mxfp8", "mxfp8"): (8, 9),
    ("mxfp4", "mxfp8"): (8, 9),
    ("mxfp4", "mxfp4"): (10, 0),
}
"""``(weight, activation)`` that gemlite multiplies, and the compute capability each needs."""

_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MX_BLOCK = 32


class GemliteTensor(LowBitTensor):
    """A weight ``(N, K)`` for gemlite's products with low-bit activations.

    On the CPU, and where x requires a gradient, the weight is dequantized and x is used as it is, without quantizing it.

    Files hold the canonical codes and scales of int4 (``(N, K / 8) int32``, ``(N, G)``) and int8 (``(N, K)``, ``(N,)``), as
    :class:`Int4Tensor` and :class:`Int8Tensor` do. lq has no canonical form of fp8 and mxfp: those are saved as they are here.

    Attributes:
        qdata: int8 and fp8 ``(N, K)``; int4 ``(K / 8, N) int32``; mxfp8 ``(N, K)``; mxfp4 ``(N, K / 2) uint8``, the
            low nibble first.
        scale: ``(G, N)``: fp32 (the sums are beyond fp16), or the exponent bytes of E8M0 for mxfp.
        weight: ``"int8"``, ``"fp8"``, ``"int4"``, ``"mxfp8"`` or ``"mxfp4"``.
        activation: ``"none"``, ``"int8"``, ``"fp8"``, ``"mxfp8"`` or ``"mxfp4"``.
        group_size: In features per scale.
        exponent: For int4 groups with fp8, else 0: ``scale`` holds the scales times ``2**exponent``. gemlite rounds the
            scaled weights to e4m3, whose normal numbers begin at 1/64, above most weights of a language model; this
            puts the largest between 1 and 2. y is multiplied by ``2**-exponent``.
    """

    tensor_names: ClassVar = ("qdata", "scale")
    attribute_names: ClassVar = ("weight", "activation", "group_size", "exponent")
    value_names: ClassVar = ("exponent",)
    kind: ClassVar = "gemlite"
    qdata: Tensor
    scale: Tensor
    weight: str
    activation: str
    group_size: int
    exponent: int = SharedValue()  # type: ignore[assignment]

    @classmethod
    def from_hp(cls, w: Tensor, weight: str, activation: str, group_size: int | None = None) -> Self:
        """Quantize a floating point weight; needs neither gemlite nor a GPU.

        Args:
            w: ``(N, K)`` fp16, bf16 or fp32 (mxfp: not fp32), K a multiple of 32.
            weight: Format of the weight.
            activation: Format to which gemlite quantizes x on each call; see :data:`COMBINATIONS`.
            group_size: For int4 with fp8, a divisor of K from 16 up; None and -1 take what the format prescribes, one
                scale a row for int and fp8. Grouped int4 is rounded to fp8 after scaling, by gemlite; rows are exact.

        Raises:
            UnsupportedError: If gemlite has no such combination, or the GPU of ``w`` cannot run it.
            ShapeError, GroupSizeError, DTypeError, NonFiniteError: If ``w`` cannot be quantized so.
        """
        size = cls.check_shape(w, weight, activation, group_size)
        check_finite(w, "w")
        rows, columns = w.shape
        values = w.float()
        exponent = 0
        if weight in ("int8", "fp8"):
            limit = 127.0 if weight == "int8" else torch.finfo(torch.float8_e4m3fn).max
            scale = (values.abs().amax(1, keepdim=True) / limit).clamp_min(1e-6)
            scaled = (values / scale).clamp(-limit, limit)
            qdata = scaled.round().to(torch.int8) if weight == "int8" else scaled.to(torch.float8_e4m3fn)
        elif weight == "int4":
            spec = QuantSpec(4, "group", size, True, torch.float32)
            scale, _ = choose_qparams(w, spec)
            qdata = meta.from_canonical(pack_int4(quantize_affine(w, scale, None, spec)), 32)
            if size < columns:
                # Within the exponents of float32, so that it is undone exactly.
                exponent = min(max(1 - math.frexp(8 * float(scale.max()))[1], -126), 126)
                scale = scale * 2.0**exponent
        else:
            qdata, scale = _quantize_mx(values, weight)
        tensors = {"qdata": qdata, "scale": scale.t().contiguous()}
        attributes = {"weight": weight, "activation": activation, "group_size": size, "exponent": exponent}
        return cls(tensors, attributes, (rows, columns), w.dtype)

    @staticmethod
    def check_shape(w: Tensor, weight: str, activation: str, group_size: int | None = None) -> int:
        """Return the resolved group size, or raise why ``w`` cannot be quantized so; its values are not read."""
        check_combination(weight, activation)
        if w.dtype not in SCALE_DTYPES or (weight.startswith("mx") and w.dtype == torch.float32):
            raise DTypeError(f"w has dtype {w.dtype}: gemlite's {weight} takes float16 or bfloat16")
        if w.dim() != 2 or 0 in w.shape or w.shape[1] % 32:
            raise ShapeError(f"w has shape {tuple(w.shape)}: expected (N, K) with K a multiple of 32")
        if w.is_cuda:
            check_gpu(weight, activation, w.device)
        natural = _MX_BLOCK if weight.startswith("mx") else w.shape[1]
        if group_size in (None, -1, natural):
            return natural
        if (weight, activation) != ("int4", "fp8") or type(group_size) is not int:
            raise GroupSizeError(
                f"group_size={group_size!r}: gemlite's {weight} x {activation} has {natural}; pass None"
            )
        if reason := meta.why_not_group(w.shape[1], group_size):
            raise GroupSizeError(f"group_size={group_size}: {reason}")
        return group_size

    def meta_args(self) -> list[int]:
        """Return gemlite's twelve integers for this weight."""
        output = meta.FLOATS[self.dtype]
        mx = self.weight.startswith("mx")
        row = self.group_size == self.shape[1] and not mx
        code_mode, channel = meta.CODE_AS_IS, meta.SCALE_BOTH
        if self.weight == "int4":
            code_mode = meta.CODE_SHIFT if row else meta.CODE_SHIFT_SCALE
            channel = meta.SCALE_BOTH if row else meta.SCALE_ACTIVATION
        elif mx and self.activation == "none":
            code_mode, channel = meta.CODE_SCALE, meta.SCALE_NONE
            output = meta.MXFP16 if self.dtype == torch.float16 else meta.MXBF16
        elif mx:
            channel = meta.SCALE_BLOCKS if self.activation == "mxfp4" else meta.SCALE_ACTIVATION
        inputs = {"int8": meta.INT8, "fp8": meta.FP8, "mxfp8": meta.MXFP8, "mxfp4": meta.MXFP4, "none": output}
        return meta.meta_args(
            bits=4 if self.weight in ("int4", "mxfp4") else 8,
            group_size=self.group_size,
            per_item={"int4": 8, "mxfp4": 2}.get(self.weight, 1),
            input_dtype=inputs[self.activation],
            output_dtype=output,
            meta_dtype=meta.UINT8 if mx else meta.FLOATS[self.scale.dtype],
            channel_scale_mode=channel,
            code_mode=code_mode,
            contiguous=self.weight == "int4",
            scaled_activations=self.activation != "none",
        )

    def gemlite_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return gemlite's codes, scales and zeros: views of the inner tensors in gemlite's orientation."""
        if self.weight == "int4":
            return self.qdata, self.scale, torch.full((), 8, dtype=torch.int32, device=self.device)
        none = torch.empty((1, 0), dtype=torch.int32, device=self.device)
        return self.qdata.t(), self.scale.t() if self.weight.startswith("mx") else self.scale, none

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype`` (default: this tensor's dtype)."""
        check_dense_dtype(dtype or self.dtype)
        scale = self.scale.t()
        if self.weight.startswith("mx"):
            scale = torch.exp2(scale.float() - 127)
        if self.weight == "int4":
            values = GEMLITE.unpack(self.qdata, 4).float() - 8
        elif self.weight == "mxfp4":
            table = torch.tensor((*_FP4_VALUES, *(-value for value in _FP4_VALUES)), device=self.device)
            values = table[unpack_bits(self.qdata, 4, self.shape[1]).long()]
        else:
            values = self.qdata.float()
        scale = scale.float() * 2.0**-self.exponent
        groups = values.reshape(self.shape[0], -1, self.group_size) * scale.unsqueeze(-1)
        return groups.reshape(self.shape).to(dtype or self.dtype)

    def why_not_batch_invariant(self) -> str | None:
        """Return why: kernels of another library."""
        return "it is multiplied by gemlite, whose results depend on the number of tokens; quantize to another packing format"

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ self.T + bias``; see the class for which way."""
        if not x.is_cuda or x.numel() == 0 or wants_gradient(x):
            return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)
        check_gpu(self.weight, self.activation, x.device)
        if self.weight != "int4" or self.group_size == self.shape[1]:
            return gemlite_linear(x, bias, self.gemlite_tensors(), self.meta_args())
        columns = self.shape[1]
        kernel = meta.safe_kernel(current_kernel(None), x.numel() // columns, 4, columns, self.group_size)
        y = gemlite_linear(x, None, self.gemlite_tensors(), self.meta_args(), kernel) * 2.0**-self.exponent
        return y if bias is None else y + bias

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors fit the shape and the attributes."""
        rows, columns = saved.matrix()
        weight, activation, size, exponent = (saved.attributes[name] for name in cls.attribute_names)
        template = torch.empty(saved.shape, dtype=saved.dtype, device="meta")
        try:
            expected = cls.check_shape(template, str(weight), str(activation), size)
        except LQError as error:
            raise FormatError(str(error)) from None
        if type(size) is not int or size != expected:
            raise FormatError(f"group_size={size!r}: expected {expected}")
        if type(exponent) is not int or abs(exponent) > (126 if weight == "int4" else 0):
            raise FormatError(f"exponent={exponent!r}: expected an integer from -126 to 126, 0 but for int4 groups")
        shape, dtype = {
            "int8": ((rows, columns), torch.int8),
            "int4": ((rows, columns // 8), torch.int32),
            "mxfp4": ((rows, columns // 2), torch.uint8),
        }.get(weight, ((rows, columns), torch.float8_e4m3fn))
        saved.expect("qdata", shape, dtype)
        groups = {"int8": (rows,), "int4": (rows, columns // size)}.get(weight, (columns // size, rows))
        saved.expect("scale", groups, torch.uint8 if weight.startswith("mx") else torch.float32)

    @classmethod
    def from_saved(cls, saved: SavedWeight) -> Self:
        """Put canonical int4 and int8 in gemlite's order; other formats are saved in it."""
        qdata, scale = saved.tensors["qdata"], saved.tensors["scale"]
        if saved.attributes["weight"] == "int4":
            qdata = meta.from_canonical(qdata, 32)
            scale = scale.t().contiguous() * 2.0 ** saved.attributes["exponent"]
        elif saved.attributes["weight"] == "int8":
            scale = scale.unsqueeze(0)
        return cls({"qdata": qdata, "scale": scale}, saved.attributes, saved.shape, saved.dtype)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what files hold; see the class."""
        if self.weight == "int4":
            # Exact: the exponent put the largest scale between 1/8 and 1/4.
            scale = self.scale.t().contiguous() * 2.0**-self.exponent
            return {"qdata": meta.to_canonical(self.qdata), "scale": scale}
        return {"qdata": self.qdata, "scale": self.scale.squeeze(0) if self.weight == "int8" else self.scale}


def check_combination(weight: str, activation: str) -> None:
    """Raise UnsupportedError unless gemlite multiplies this weight by this activation."""
    if (weight, activation) not in COMBINATIONS:
        known = ", ".join(f"{w} x {a}" for w, a in COMBINATIONS)
        raise UnsupportedError(
            f"gemlite has no product of {weight} weights with {activation} activations; it has {known}"
        )


def check_gpu(weight: str, activation: str, device: torch.device) -> None:
    """Raise UnsupportedError if the GPU cannot run the combination."""
    needed, found = COMBINATIONS[weight, activation], torch.cuda.get_device_capability(device)
    if found < needed:
        raise UnsupportedError(
            f"{weight} weights with {activation} activations need compute capability {needed[0]}.{needed[1]}; "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
        )


def _quantize_mx(values: Tensor, weight: str) -> tuple[Tensor, Tensor]:
    """Return the codes and E8M0 exponent bytes ``(N, K / 32)`` by the rule of the OCP microscaling format."""
    rows, columns = values.shape
    blocks = values.reshape(rows, -1, _MX_BLOCK)
    largest, top = (6.0, 2) if weight == "mxfp4" else (448.0, 8)
    # frexp's exponent is one above floor(log2), exactly, subnormals included; an empty block keeps the scale 1.
    amax = blocks.abs().amax(-1)
    exponent = torch.where(amax > 0, torch.frexp(amax).exponent - 1 - top, 0).clamp(-127, 127)
    scaled = torch.ldexp(blocks, -exponent.unsqueeze(-1)).clamp(-largest, largest)
    scale = (exponent + 127).to(torch.uint8)
    if weight == "mxfp8":
        return scaled.to(torch.float8_e4m3fn).reshape(rows, columns), scale
    grid = torch.tensor(_FP4_VALUES, device=values.device)
    bounds = (grid[1:] + grid[:-1]) / 2
    magnitude = scaled.abs()
    # Ties go to the even code: below a bound whose lower code is even, above one whose lower code is odd.
    index = torch.bucketize(magnitude, bounds)
    tie = (magnitude.unsqueeze(-1) == bounds[1::2]).any(-1)
    codes = (index + tie.to(index.dtype) + 8 * torch.signbit(scaled)).to(torch.uint8)
    return pack_bits(codes.reshape(rows, columns), 4, torch.uint8), scale

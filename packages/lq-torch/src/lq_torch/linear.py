"""Low-bit replacements of ``nn.Linear`` as plain modules: buffers, no tensor subclass.

Buffers exist from the start, so ``load_state_dict(strict=True)`` works on a new module, and a state dict holds plain
tensors that safetensors can write.
"""

import warnings
from typing import Any, Self

import torch
from lq_formats import (
    DeviceError,
    DTypeError,
    GroupSizeError,
    ShapeError,
    SpecError,
    UnsupportedError,
    check_matrix,
    dequantize_weight_int8,
    quantize_i4_pack8,
    quantize_weight_per_channel,
)
from lq_kernels import int4_dequantize, int8_gemm, matmul_bf16_i4
from torch import Tensor, nn

from lq_torch.hooks import has_hooks
from lq_torch.merge.modules import MergedLinear
from lq_torch.quantize import FilterFn, check_linear, named, select_linears, why_none
from lq_torch.tensors import LowBitTensor
from lq_torch.tensors.base import autocast, autocasts


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale an out feature: ``y = x @ (weight * scale).T + bias``.

    A new layer has weight 0 and scale 1; :meth:`quantize_weights` or ``load_state_dict`` fill it.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether there is a bias.
        device: Of the buffers.
        dtype: Of the bias; activations must have it too where there is a bias.

    Attributes:
        weight: ``(N, K) int8`` buffer.
        scale: ``(N,) float32`` buffer.
        bias: ``(N,)`` buffer or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @torch.no_grad()
    def quantize_weights(self, w: Tensor) -> Self:
        """Quantize ``w: (N, K)`` into this layer and return it.

        Raises:
            ShapeError: If ``w`` is not ``(out_features, in_features)``.
            DTypeError, NonFiniteError: If ``w`` is not finite floats.
        """
        _check_weight(w, self.out_features, self.in_features)
        q, scale = quantize_weight_per_channel(w)
        self.weight.copy_(q)
        self.scale.copy_(scale)
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype``."""
        return dequantize_weight_int8(self.weight, self.scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., N)`` for ``x: (..., K)``, in x's dtype."""
        return autocast(self._multiply, x, self.bias) if autocasts(x) else self._multiply(x, self.bias)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return int8_gemm(x, self.weight, self.scale, bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # .half() and .to(dtype) convert floating point buffers: scales stay float32, they are part of the format.
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedLinear(Int8Linear):
    """An :class:`Int8Linear` made from an ``nn.Linear``."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Return the int8 counterpart of ``linear``, on its device; ``linear`` is not changed.

        Raises:
            DTypeError, NonFiniteError: If the weight is not finite fp16, bf16 or fp32.
            UnsupportedError, ShapeError: If ``linear`` computes its weight, or has none yet.
            SpecError: If ``linear`` is no nn.Linear.
        """
        _check_source(linear)
        w = linear.weight.detach()
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device=w.device, dtype=w.dtype)
        layer.quantize_weights(w)
        if linear.bias is not None and layer.bias is not None:
            layer.bias.copy_(linear.bias.detach())
        return layer.train(linear.training)


class Int4PackedLinear(nn.Module):
    """A linear layer with symmetric int4 weights in lq's canonical packing (:func:`lq_formats.quantize_i4_pack8`).

    Args:
        in_features: K, divisible by 8.
        out_features: N.
        bias: Whether there is a bias.
        group_size: In features per scale, a divisor of K from 8 up; -1 for one scale a row.
        device: Of the buffers.
        dtype: Of the bias; activations must have it too where there is a bias.

    Attributes:
        packed: ``(N, K // 8) int32`` buffer.
        scales: ``(N, K // group_size) float32`` buffer.
        bias: ``(N,)`` buffer or None.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int = 256,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features)
        resolved = _resolve_group(in_features, group_size)
        self.in_features, self.out_features, self.group_size = in_features, out_features, resolved
        # Eight codes of 8: a new layer's weight is zero.
        zeros = torch.full((out_features, in_features // 8), -0x77777778, dtype=torch.int32, device=device)
        self.register_buffer("packed", zeros)
        self.register_buffer("scales", torch.ones(out_features, in_features // resolved, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 256) -> Self:
        """Return the int4 counterpart of ``linear``, on its device; ``linear`` is not changed.

        Raises:
            GroupSizeError, ShapeError, DTypeError, NonFiniteError, UnsupportedError: If the weight cannot be quantized so.
            SpecError: If ``linear`` is no nn.Linear.
        """
        _check_source(linear)
        w = linear.weight.detach()
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, group_size, device=w.device, dtype=w.dtype
        )
        layer.quantize_weights(w)
        if linear.bias is not None and layer.bias is not None:
            layer.bias.copy_(linear.bias.detach())
        return layer.train(linear.training)

    @torch.no_grad()
    def quantize_weights(self, w: Tensor) -> Self:
        """Quantize ``w: (N, K)`` into this layer and return it; errors as :meth:`Int8Linear.quantize_weights`."""
        _check_weight(w, self.out_features, self.in_features)
        packed, scales = quantize_i4_pack8(w, self.group_size)
        self.packed.copy_(packed)
        self.scales.copy_(scales)
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the ``(N, K)`` weight in ``dtype``."""
        return int4_dequantize(
            self.packed, self.scales, group_size=self.group_size, in_features=self.in_features, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., N)`` for ``x: (..., K)``, in x's dtype."""
        return autocast(self._multiply, x, self.bias) if autocasts(x) else self._multiply(x, self.bias)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return matmul_bf16_i4(x, self.packed, self.scales, self.group_size, bias=bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}"
        )


def replace_linear_with_int4(model: nn.Module, group_size: int = 256, filter_fn: FilterFn | None = None) -> nn.Module:
    """Replace the Linear layers of a model by :class:`Int4PackedLinear`, in place, and return the model.

    Everything is validated first: on any error the model is as it was.

    Args:
        model: Any module; if it is itself an ``nn.Linear`` that matches, its replacement is returned.
        group_size: In features per scale; -1 for one scale a row.
        filter_fn: Which layers, as for :func:`lq_torch.quantize_`.

    Raises:
        LQError: The named error of the first layer that cannot be quantized, with its path; UnsupportedError for one that is
            more than an ``nn.Linear`` (a subclass, hooks, a forward of its own), which would be lost;
            :func:`lq_torch.quantize_` keeps the layer.
    """
    targets = select_linears(model, filter_fn)
    if not targets:
        warnings.warn(f"replace_linear_with_int4 found no Linear layer: {why_none(model, filter_fn)}", stacklevel=2)
        return model
    for path, linear in targets:
        check_linear(path, linear)
        _check_replaced(path or "the model", linear)
        with named(f"{path}.weight" if path else "weight"):
            _resolve_group(linear.in_features, group_size)
    # A module may be registered at several places: each of them gets the one replacement.
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, name))
    for _, linear in targets:
        layer = Int4PackedLinear.from_linear(linear, group_size)
        if linear is model:
            return layer
        for parent, name in places[id(linear)]:
            parent._modules[name] = layer
    return model


def _check_source(linear: nn.Linear) -> None:
    if not isinstance(linear, nn.Linear):
        raise SpecError(f"linear is of type {type(linear).__name__}: expected an nn.Linear")
    if not isinstance(linear._parameters.get("weight"), LowBitTensor):  # which has an error of its own
        check_linear("", linear)


def _check_replaced(name: str, linear: nn.Linear) -> None:
    """Refuse a layer of which more than its weight and bias would be lost."""
    kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
    more = set(linear._parameters) != {"weight", "bias"} or linear._buffers or linear._modules
    reasons = (
        (type(linear) not in (nn.Linear, MergedLinear), f"is a {kind}, not an nn.Linear"),
        ("forward" in vars(linear), "has a forward that was replaced on the instance"),
        (has_hooks(linear), "has hooks"),
        (more, "holds more than a weight and a bias"),
    )
    reason = next((reason for held, reason in reasons if held), None)
    if reason is not None:
        raise UnsupportedError(
            f"{name} {reason}, which an Int4PackedLinear in its place would not have; quantize_ keeps the layer, or leave it "
            "out by filter_fn"
        )


def _check_sizes(in_features: int, out_features: int) -> None:
    sizes = (in_features, out_features)
    if any(type(size) is not int for size in sizes) or in_features <= 0 or out_features < 0:
        raise ShapeError(f"in_features={in_features!r}, out_features={out_features!r}: expected positive integers")


def _resolve_group(in_features: int, group_size: int) -> int:
    """Return the in features per scale of an Int4PackedLinear, or raise."""
    if in_features % 8:
        raise GroupSizeError(f"in_features={in_features} is not divisible by the 8 codes of an int32 word")
    resolved = in_features if group_size == -1 else group_size
    if type(resolved) is not int or resolved < 8 or in_features % resolved:
        raise GroupSizeError(
            f"group_size={group_size!r}: expected a divisor of in_features={in_features} from 8 up, or -1"
        )
    return resolved


def _check_weight(w: Tensor, out_features: int, in_features: int) -> None:
    if isinstance(w, LowBitTensor):
        raise UnsupportedError(f"weight is a {type(w).__name__}, quantized already; pass weight.dequantize()")
    if w.is_meta:
        raise DeviceError("weight is on meta and has no values to quantize; load the model's weights first")
    if not w.dtype.is_floating_point:
        raise DTypeError(f"weight has dtype {w.dtype}: expected floating point")
    if check_matrix(w) != (out_features, in_features):
        raise ShapeError(f"weight has shape {tuple(w.shape)}: expected ({out_features}, {in_features})")

"""LowBitTensor: what every quantized weight of lq is as a tensor.

A LowBitTensor has the shape, dtype and device of the weight it stands for, so modules, optimizers and checkpoint code
see an ordinary parameter, while its storage is a few inner tensors (codes, scales, zeros). ``F.linear`` (and ``x @ w.t()``,
see :mod:`lq_torch.tensors.transposed`) runs a low-bit kernel; ``detach``, ``clone``, ``.to``, ``copy.deepcopy`` act on
the inner tensors; ``dequantize`` gives the weight back. Any other operator raises
:class:`lq_formats.UnsupportedError`: nothing is turned into a dense weight behind the user's back.

A subclass lists its inner tensors and attributes, and says how to multiply and to dequantize. Everything else is here.

Inner tensors may be in a kernel's own order. Files are not: they hold canonical tensors, to which ``to_tensors`` goes and
from which ``from_tensors`` comes, without losing a bit. Where a subclass keeps canonical tensors these are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from lq_formats import DeviceError, DTypeError, FormatError, NoKernelError, ShapeError, StorageError, UnsupportedError
from lq_kernels import is_batch_invariant
from torch import Tensor, nn

from lq_torch.tensors.saved import SavedWeight

aten = torch.ops.aten
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class SharedValue:
    """An attribute that a weight has in common with its aliases, as it has its inner tensors (``value_names``)."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, weight: "LowBitTensor | None", owner: type) -> Any:
        return self if weight is None else weight._shared[self._name]

    def __set__(self, weight: "LowBitTensor", value: Any) -> None:
        weight.__dict__.setdefault("_shared", {})[self._name] = value


class LowBitTensor(torch.Tensor):
    """Base class of quantized weights; see the module docstring.

    Attributes:
        tensor_names: Names of the inner tensors, in constructor order. One that is None is absent.
        attribute_names: Names of the plain values (JSON scalars) that complete the inner tensors.
        value_names: Those of them that depend on the values of a weight, not on how it is quantized: copies take them over.
        saved_names: Names of the tensors in files, where these differ from the inner ones.
        kind: Name of this class in checkpoints.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ()
    attribute_names: ClassVar[tuple[str, ...]] = ()
    value_names: ClassVar[tuple[str, ...]] = ()
    saved_names: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = ""
    _shared: dict[str, Any]
    _kinds: ClassVar[dict[str, type["LowBitTensor"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("kind"):  # a class that inherits its kind is the same weight to files, which its parent loads
            LowBitTensor._kinds[cls.kind] = cls
        if cls.kind:
            # torch.save works as for any state dict; torch.load(weights_only=True) refuses classes it does not know.
            torch.serialization.add_safe_globals([cls])

    def __new__(  # noqa: D102
        cls,
        tensors: Mapping[str, Tensor | None] | Self,
        attributes: Mapping[str, Any] | None = None,
        shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        *,
        requires_grad: bool = False,
    ) -> Self:
        if isinstance(tensors, LowBitTensor):  # as accelerate makes a parameter of what it has moved
            parameter: Any = nn.Parameter(tensors, requires_grad)
            return parameter  # type: ignore[no-any-return]
        device = next(tensor.device for tensor in tensors.values() if tensor is not None)
        self: Self = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=False
        )
        for name in cls.tensor_names:
            setattr(self, name, tensors.get(name))
        for name in cls.attribute_names:
            setattr(self, name, (attributes or {})[name])
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    # What a subclass provides.

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight as a dense tensor of ``dtype`` (default: this tensor's dtype)."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x (..., K) @ self.T + bias`` in x's dtype; x has been checked."""
        raise NotImplementedError

    def why_not_batch_invariant(self) -> str | None:
        """Return why :meth:`linear` cannot be batch-invariant (:class:`lq_kernels.batch_invariant`), or None."""
        return None

    @classmethod
    def check_saved(cls, saved: SavedWeight) -> None:
        """Raise FormatError unless the tensors of a file fit the shape and attributes; their values are not read."""
        raise NotImplementedError

    @classmethod
    def from_saved(cls, saved: SavedWeight) -> Self:
        """Build from what :meth:`check_saved` accepted; a subclass in a kernel's own order repacks here.

        Loading keeps below 1.15 times a model's size: repacking may hold a second copy of one weight, not its codes.
        """
        return cls(saved.tensors, saved.attributes, saved.shape, saved.dtype)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the canonical tensors that files hold, by name; the inverse of :meth:`from_saved`, bit for bit."""
        return self.inner_tensors()

    # Storage and checkpoints: tensors and JSON values, no pickle.

    def inner_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that this weight consists of, by name, in the order of its kernel."""
        return {name: getattr(self, name) for name in self.tensor_names if getattr(self, name) is not None}

    def attributes(self) -> dict[str, Any]:
        """Return the plain values by name (JSON scalars)."""
        return {name: getattr(self, name) for name in self.attribute_names}

    def spec_json(self) -> dict[str, Any]:
        """Return a dictionary of JSON values from which, with :meth:`to_tensors`, the tensor can be rebuilt."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attributes": self.attributes(),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> "LowBitTensor":
        """Rebuild a tensor from :meth:`to_tensors` and :meth:`spec_json`. Nothing is quantized.

        Raises:
            FormatError: If the spec is not one, or the tensors do not fit it.
        """
        cls, saved = _parse(tensors, spec)
        return cls.from_saved(saved)

    @staticmethod
    def check_tensors(tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the shape of the weight that :meth:`from_tensors` would build; the tensors may be on ``meta``.

        Raises:
            FormatError: As :meth:`from_tensors` would.
        """
        return _parse(tensors, spec)[1].shape

    # PyTorch's protocols.

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        # torch.compile guards on what is returned, and does not see that a product reads the mode.
        return list(self.inner_tensors()), (tuple(self.attributes().items()), self.dtype, is_batch_invariant())

    def _stable_hash_for_caching(self) -> str:
        inner = [(name, tuple(t.shape), t.dtype) for name, t in self.inner_tensors().items()]
        mode = is_batch_invariant()
        return repr((type(self).__qualname__, tuple(self.shape), self.dtype, self.attributes(), inner, mode))

    @classmethod
    def __tensor_unflatten__(cls, tensors: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Self:
        attributes, dtype, _ = context
        return cls(tensors, dict(attributes), size, dtype)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Inside, reading a shape or a dtype of this tensor does not come back here.
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.nn.functional.linear:
                return linear(*args, **kwargs)
            if func == _SET_DATA:
                return _set_data(*args)
            if func is torch.Tensor.storage:  # what writers of safetensors ask for
                raise StorageError(
                    f"a quantized weight ({cls.__name__}) is several tensors, not one block of memory, which "
                    "Hugging Face's save_pretrained and safetensors write: save the model with "
                    "lq_torch.save_pretrained(model, folder), or with theirs after lq_torch.dequantize_(model)"
                )
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = DISPATCH.get(func)
        if handler is None:
            # In inference mode operators that are made of others come here whole: .to(), matmul, attention.
            result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
            raise UnsupportedError(
                f"{func} is not defined for a quantized weight ({cls.__name__}); use F.linear(x, weight), or "
                "weight.dequantize() where a dense tensor is really meant"
            )
        return handler(*args, **(kwargs or {}))

    def _map(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Self:
        tensors = {name: function(tensor) for name, tensor in self.inner_tensors().items()}
        return type(self)(tensors, self.attributes(), self.shape, dtype or self.dtype)

    def _alias(self) -> Self:
        """Return another weight of the same inner tensors: a write to one is a write to both."""
        # Autograd lets a view be an inference tensor exactly where its base is one, whatever the mode.
        with torch.inference_mode(self.is_inference()):
            alias = self._map(lambda tensor: tensor)
        if self.value_names:
            alias._shared = self._shared
        return alias

    def _like(self, target: "LowBitTensor") -> Self:
        """Return this weight with the inner tensors that ``target`` has, where there is more than one form."""
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        values = ", ".join(f"{name}={value}" for name, value in self.attributes().items())
        inner = ", ".join(f"{name}: {tuple(t.shape)} {t.dtype}" for name, t in self.inner_tensors().items())
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {values}; {inner})"

    def share_memory_(self) -> Self:
        """Move the inner tensors to shared memory (the wrapper itself has no storage to share)."""
        for tensor in self.inner_tensors().values():
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        return self

    def is_shared(self) -> bool:
        """Return whether every inner tensor is in shared memory."""
        return all(tensor.is_shared() for tensor in self.inner_tensors().values())  # type: ignore[no-untyped-call]

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the inner tensors: what this weight really takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.inner_tensors().values())

    @property
    def saved_nbytes(self) -> int:
        """Bytes of the format, without what a kernel's order pads or adds, where that is known."""
        return self.packed_nbytes


def check_weight(w: Tensor) -> None:
    """Raise DTypeError unless a weight to quantize is fp16, bf16 or fp32."""
    if w.dtype not in SCALE_DTYPES:
        raise DTypeError(f"w has dtype {w.dtype}: expected float16, bfloat16 or float32")


def _parse(tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> tuple[type[LowBitTensor], SavedWeight]:
    kind = spec.get("kind")
    cls = LowBitTensor._kinds.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise FormatError(f"unknown kind of weight {kind!r}: expected one of {', '.join(sorted(LowBitTensor._kinds))}")
    saved = SavedWeight.parse(tensors, spec)
    if set(saved.attributes) != set(cls.attribute_names):
        raise FormatError(f"attributes {saved.attributes!r}: {kind} has {', '.join(cls.attribute_names) or 'none'}")
    names = cls.saved_names or cls.tensor_names
    if not set(saved.tensors) <= set(names):
        raise FormatError(f"tensors {sorted(saved.tensors)}: {kind} has {', '.join(names)}")
    cls.check_saved(saved)
    return cls, saved


def autocasts(x: Tensor) -> bool:
    """Return whether autocast, here and now, would cast ``x`` for a dense product."""
    kind = x.device.type
    # Asking of a device without autocast, as meta is one, is an error.
    if kind not in ("cuda", "cpu") and not torch.amp.is_autocast_available(kind):
        return False
    return torch.is_autocast_enabled(kind) and x.dtype in SCALE_DTYPES


def autocast(product: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``product(x, bias)`` of what autocast makes of them for a dense product; see :func:`autocasts`."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind)
    # Inside, a reference in float32 must not be cast again.
    with torch.autocast(kind, enabled=False):
        return product(x.to(dtype), None if bias is None else bias.to(dtype))


def linear(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    product: Callable[[Tensor, Tensor | None], Tensor] | None = None,
) -> Tensor:
    """Check the operands of ``F.linear(input, weight, bias)`` against a quantized weight, and multiply.

    Args:
        input: ``(..., K)``.
        weight: ``(N, K)``.
        bias: ``(N,)`` or None.
        product: What multiplies; ``weight.linear`` by default.

    Raises:
        ShapeError, DTypeError, DeviceError: If the operands do not fit each other. Under autocast x and bias are cast.
        NoKernelError: In the batch-invariant mode, if a weight of this kind has no such product.
    """
    if isinstance(input, LowBitTensor) or not isinstance(weight, LowBitTensor):
        raise UnsupportedError("F.linear takes a quantized weight as its second argument only")
    shape, device = weight.shape, input.device
    if len(shape) != 2:
        raise ShapeError(f"a quantized weight of shape {tuple(shape)} is not a matrix")
    if input.dim() == 0 or input.shape[-1] != shape[1]:
        raise ShapeError(f"x has shape {tuple(input.shape)}: a weight of shape {tuple(shape)} needs (..., {shape[1]})")
    if bias is not None and tuple(bias.shape) != (shape[0],):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}: expected ({shape[0]},)")
    if weight.device != device:
        raise DeviceError(f"x is on {device} and the quantized weight on {weight.device}; move one of them with .to()")
    if bias is not None and bias.device != device:
        raise DeviceError(f"x is on {device} and bias on {bias.device}; move one of them with .to()")
    if is_batch_invariant() and (reason := weight.why_not_batch_invariant()) is not None:
        raise NoKernelError(f"a batch-invariant product with a {type(weight).__name__}", [(weight.kind, reason)])
    product = weight.linear if product is None else product
    if autocasts(input):
        return autocast(product, input, bias)
    if input.dtype != weight.dtype:
        raise DTypeError(
            f"x has dtype {input.dtype} and the quantized weight {weight.dtype}; convert x, or the model with .to(dtype)"
        )
    if bias is not None and bias.dtype != input.dtype:
        raise DTypeError(f"bias has dtype {bias.dtype} and x {input.dtype}: convert one of them")
    return product(input, bias)


def _to_copy(
    tensor: LowBitTensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
) -> LowBitTensor:
    if dtype is not None and dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise DTypeError(f"a quantized weight cannot become {dtype}: expected float16, bfloat16 or float32")
    non_blocking = bool(kwargs.get("non_blocking", False))
    # The nominal dtype changes; codes and scales are kept as they are, so that no precision is lost on the way.
    return tensor._map(lambda t: t.to(device=device, non_blocking=non_blocking, copy=True), dtype)


def _empty_like(
    tensor: LowBitTensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any
) -> LowBitTensor:
    if dtype is not None and dtype != tensor.dtype:
        raise UnsupportedError(f"empty_like of a {type(tensor).__name__} keeps its dtype {tensor.dtype}")
    return tensor._map(lambda t: torch.empty_like(t, device=device))


def _clone(tensor: LowBitTensor, *, memory_format: Any = None) -> LowBitTensor:
    return tensor._map(torch.clone)


def _copy_(target: LowBitTensor, source: Tensor, non_blocking: bool = False) -> LowBitTensor:
    source = _checked(target, source, "copy")
    # Some weights are arranged for their device, and torch.load leaves them as they were arranged for another.
    source = source._alias() if target.device == source.device else _to_copy(source, device=target.device)
    source = source._like(target)
    _check_inner(target, source, "copy")
    for name, tensor in target.inner_tensors().items():
        tensor.copy_(getattr(source, name), non_blocking)
        # A write in here does not count as one, and what kernels keep of a weight goes by that count. Tensors of inference
        # mode have none.
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
    for name in target.value_names:
        setattr(target, name, getattr(source, name))
    return target


def _set_data(target: LowBitTensor, source: Tensor) -> None:
    """Do what ``target.data = source`` does: take over the other's inner tensors, and with them its dtype and device."""
    source = _checked(target, source, "assign")._alias()
    _check_inner(target, source._like(target), "assign")
    _SET_DATA(target, source)  # what the wrapper says of itself
    for name in target.tensor_names:
        setattr(target, name, getattr(source, name))
    if target.value_names:
        target._shared = source._shared


def _checked(target: LowBitTensor, source: Tensor, verb: str) -> LowBitTensor:
    """Return the source of a copy, or raise unless it is a weight of the same kind and shape."""
    if type(target) is type(source) and target.shape == source.shape:
        return source
    raise UnsupportedError(
        f"cannot {verb} {type(source).__name__} {tuple(source.shape)} into {type(target).__name__} "
        f"{tuple(target.shape)}: only an equally quantized weight of the same shape; quantize the model alike first, or use "
        "load_state_dict(..., assign=True)"
    )


def _check_inner(target: LowBitTensor, source: LowBitTensor, verb: str) -> None:
    """Raise unless two weights are equally quantized: attributes, and shapes and dtypes of inner tensors."""
    described = []
    for weight in (source, target):
        values = {name: value for name, value in weight.attributes().items() if name not in weight.value_names}
        inner = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in weight.inner_tensors().items()}
        described.append({**values, **inner})
    found, expected = described
    if found != expected:
        names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
        what = " into ".join(", ".join(f"{name} {each.get(name)}" for name in names) for each in described)
        raise UnsupportedError(f"cannot {verb} {what} of a {type(target).__name__}: only an equally quantized weight")


DISPATCH: dict[Any, Callable[..., Any]] = {
    aten.detach.default: LowBitTensor._alias,
    aten.alias.default: LowBitTensor._alias,
    aten.clone.default: _clone,
    aten.empty_like.default: _empty_like,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.is_pinned.default: lambda tensor, device=None: all(t.is_pinned() for t in tensor.inner_tensors().values()),
    aten._pin_memory.default: lambda tensor, device=None: tensor._map(torch.Tensor.pin_memory),
}
"""Operators that a LowBitTensor has, and their implementations; :mod:`lq_torch.tensors.transposed` adds products."""

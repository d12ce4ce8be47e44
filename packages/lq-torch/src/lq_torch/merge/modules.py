"""The modules of a merged layer: one product, its parts, and the class of their parent.

A parent ``forward(self, x)`` that calls ``self.q_proj(x)``, ``self.k_proj(x)``, ``self.v_proj(x)`` and reads nothing else of x
(:mod:`lq_torch.merge.source` shows it) becomes an instance of a subclass, whose forward multiplies first::

    y = self.qkv_proj(x)          one product, MergedLinear
    base.forward(self, y)         the code of the base class, unchanged
        self.q_proj(y)            y[..., :Nq], MergedPart
        self.k_proj(y)            y[..., Nq:Nq + Nk]

Everything is a function of the arguments: nothing is kept between calls or shared by two of them, so re-entrance, threads,
exceptions, gradients, autocast, graph capture and ``torch.compile`` meet nothing but ordinary code.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lq_formats import ShapeError, UnsupportedError
from torch import Tensor, nn

from lq_torch.merge.gated import is_plain_silu, silu_and_multiply, watched
from lq_torch.merge.rows import cat_rows, slice_rows, why_not_cat
from lq_torch.merge.source import Gate, SharedInput
from lq_torch.tensors import GatedTensor, Int4PreshuffledTensor, Int8PreshuffledTensor
from lq_torch.tensors.gated import gated_form, gated_linear


@dataclass(frozen=True)
class Group:
    """Sibling layers merged into one.

    Attributes:
        name: Of the merged layer, in the parent.
        members: Names of the siblings, in the order of their rows.
        input: The argument of the parent's forward that they share.
        gate: The other layers of a gated MLP, if the parent is one.
    """

    name: str
    members: tuple[str, ...]
    input: SharedInput
    gate: Gate | None = None


class MergedLinear(nn.Linear):
    """The product of all parts: an ``nn.Linear`` like any other, to quantize, convert and move.

    Its parent saves and loads it under the names of the parts.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)


class MergedPart(nn.Module):
    """Rows of a merged product; takes the place of the layer that they were.

    Attributes:
        start: First out feature of this part in the product.
        out_features: Their number.
        total: Out features of the whole product.
        in_features: Of the layer this was.
        has_bias: Whether that had a bias.
    """

    def __init__(self, origin: nn.Linear, start: int, total: int) -> None:
        super().__init__()
        self.start, self.total = start, total
        self.in_features, self.out_features = origin.in_features, origin.out_features
        self.has_bias = origin.bias is not None
        # The layer itself, emptied, for unmerge_linears to fill again. In a tuple it is no child of this module.
        origin._parameters.update(weight=None, bias=None)
        self._origin = (origin,)
        self.training = origin.training

    def forward(self, y: Tensor) -> Tensor:
        """Return ``y[..., start:start + out_features]`` of the product ``y: (..., total)``."""
        if y.shape[-1] != self.total:
            raise ShapeError(
                f"a part of a merged layer got {tuple(y.shape)}: expected the product (..., {self.total}); call the "
                "module that holds it, or unmerge_linears first"
            )
        if y.requires_grad and torch.is_grad_enabled():
            # Parts with versions of their own, as layers apart have: what autograd keeps of one may be used after another has
            # been changed in place. No two have memory in common.
            sizes = [self.start, self.out_features, self.total - self.start - self.out_features]
            return torch.unsafe_split_with_sizes(y, sizes, -1)[1]
        return y.narrow(-1, self.start, self.out_features)

    def restore(self, merged: MergedLinear) -> nn.Linear:
        """Return the layer that this was, with its rows of ``merged`` in memory of their own."""
        (origin,) = self._origin
        stop = self.start + self.out_features
        weight = slice_rows(merged.weight.detach(), self.start, stop).clone()
        origin.weight = nn.Parameter(weight, requires_grad=merged.weight.requires_grad)
        if self.has_bias:
            bias = merged.bias.detach()[self.start : stop].clone()
            origin.bias = nn.Parameter(bias, requires_grad=merged.bias.requires_grad)
        return origin.train(self.training)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"this layer is merged with its siblings and has no {name}; unmerge_linears restores it"
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):  # which nothing would read: torch.func.functional_call sets them, for one
            raise UnsupportedError(
                f"this layer is merged with its siblings and its {name} cannot be set: set that of the merged layer, "
                "whose name named_parameters() gives, or call unmerge_linears first"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The rows that this part is."""
        return f"out features {self.start} to {self.start + self.out_features} of {self.total}"


class MergingModule(nn.Module):
    """What :func:`merging_class` adds to the class of a parent: canonical names in state dicts, copies and pickles."""

    _lq_base: ClassVar[type[nn.Module]]
    _lq_group: ClassVar[Group]

    def merged_linear(self) -> MergedLinear:
        """Return the merged layer.

        Raises:
            UnsupportedError: If another module has been put in its place, or this one was made something else since.
        """
        if type(self) is not merging_class(self._lq_base, self._lq_group):
            raise UnsupportedError(f"the class of the module was changed to {type(self).__name__} after merging")
        merged = getattr(self, self._lq_group.name)
        if not isinstance(merged, MergedLinear):
            raise UnsupportedError(f"{self._lq_group.name} was replaced by a {type(merged).__name__} after merging")
        return merged

    def parts(self) -> dict[str, MergedPart]:
        """Return the parts by name."""
        parts = {member: getattr(self, member) for member in self._lq_group.members}
        for member, part in parts.items():
            if not isinstance(part, MergedPart):
                raise UnsupportedError(f"{member} was replaced by a {type(part).__name__} after merging")
        return parts

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict, with the parts' names in place of the merged layer's."""
        state = super().state_dict(*args, **kwargs)
        name = self._lq_group.name
        if isinstance(self._modules[name], MergedLinear):
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            for key in ("weight", "bias"):
                state.pop(f"{prefix}{name}.{key}", None)
        return state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        merged = self._modules[self._lq_group.name]
        if not isinstance(merged, MergedLinear):
            return  # Another module took its place (an adapter, say) and saves itself, under the name of the merged layer.
        weight, bias = (t if keep_vars or t is None else t.detach() for t in (merged.weight, merged.bias))
        for member, part in self.parts().items():
            stop = part.start + part.out_features
            destination[f"{prefix}{member}.weight"] = slice_rows(weight, part.start, stop)
            if part.has_bias:
                destination[f"{prefix}{member}.bias"] = bias[part.start : stop]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            if isinstance(self._modules[self._lq_group.name], MergedLinear):
                self._join(state_dict, prefix)
        except UnsupportedError as error:
            error_msgs.append(f"{prefix}{self._lq_group.name}: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _join(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Replace the parts' entries of a state dict (load_state_dict's own copy) by those of the merged layer."""
        parts = self.parts()
        names = [f"{member}.weight" for member in parts]
        names += [f"{member}.bias" for member, part in parts.items() if part.has_bias]
        absent = [name for name in names if prefix + name not in state_dict]
        if len(absent) == len(names):
            return  # Reported as missing, under the name of the merged layer.
        if absent:
            raise UnsupportedError(f"merged layers are loaded together, and {', '.join(absent)} is not there")
        values = {name: state_dict.pop(prefix + name) for name in names}
        for member, part in parts.items():
            shape = (part.out_features, part.in_features)
            if tuple(values[f"{member}.weight"].shape) != shape:
                raise UnsupportedError(
                    f"{member}.weight is {tuple(values[f'{member}.weight'].shape)}: expected {shape}"
                )
            if part.has_bias and tuple(values[f"{member}.bias"].shape) != shape[:1]:
                raise UnsupportedError(
                    f"{member}.bias is {tuple(values[f'{member}.bias'].shape)}: expected {shape[:1]}"
                )
        if reason := why_not_cat({member: values[f"{member}.weight"] for member in parts}):
            raise UnsupportedError(reason)
        name = prefix + self._lq_group.name
        weight = cat_rows([values[f"{member}.weight"] for member in parts])
        fused = isinstance(self.merged_linear().weight, GatedTensor)
        if fused and isinstance(weight, Int4PreshuffledTensor | Int8PreshuffledTensor):
            weight = gated_form(weight)
        state_dict[f"{name}.weight"] = weight
        bias = cat_bias([(part.out_features, values.get(f"{member}.bias")) for member, part in parts.items()])
        if bias is not None:
            state_dict[f"{name}.bias"] = bias

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: copies and pickles name what it is made from.
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *state = reduced
        return (_revive, (self._lq_base, self._lq_group), *state)


def merging_class(base: type[nn.Module], group: Group) -> type[MergingModule]:
    """Return the subclass of ``base`` whose forward multiplies with the merged layer first.

    Name, module and signature are those of ``base``: to code that looks, the parent is what it was. The same arguments
    give the same class, so that layers of a model share compiled code.
    """
    return _merging_class(base, group)  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _merging_class(base: Any, group: Group) -> type[MergingModule]:
    inner = base.forward
    name, position, linear = group.input.name, group.input.position, group.name

    @functools.wraps(inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if name in kwargs:
            kwargs = {**kwargs, name: getattr(self, linear)(kwargs[name])}
        elif 0 <= position < len(args):
            args = (*args[:position], getattr(self, linear)(args[position]), *args[position + 1 :])
        return inner(self, *args, **kwargs)

    @functools.wraps(inner)
    def gated_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert group.gate is not None
        given = (*args, *kwargs.values())
        if len(given) != 1 or not kwargs.keys() <= {name} or not is_plain_silu(getattr(self, group.gate.activation)):
            return forward(self, *args, **kwargs)
        merged, parts = getattr(self, linear), [getattr(self, member) for member in group.members]
        down = getattr(self, group.gate.down)
        fused = type(merged) is MergedLinear and isinstance(merged.weight, GatedTensor)
        if fused and not any(watched(module) for module in (merged, *parts)):
            return down(gated_linear(given[0], merged.weight, merged.bias))
        y = merged(given[0])
        gate, up = (part(y) for part in parts)
        return down(silu_and_multiply(gate, up))

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": gated_forward if group.gate else forward,
        "_lq_base": base,
        "_lq_group": group,
    }
    return type(base.__name__, (MergingModule, base), namespace)


def _revive(base: type[nn.Module], group: Group) -> nn.Module:
    cls = merging_class(base, group)
    return cls.__new__(cls)


def cat_bias(biases: Sequence[tuple[int, Tensor | None]]) -> Tensor | None:
    """Stack biases, given with their lengths; zeros for one that is None, and None if all are."""
    given = [bias.detach() for _, bias in biases if bias is not None]
    if not given:
        return None
    return torch.cat([given[0].new_zeros(size) if bias is None else bias.detach() for size, bias in biases])

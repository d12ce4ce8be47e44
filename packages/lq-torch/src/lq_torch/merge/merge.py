"""merge_linears: sibling Linear layers that take the same input become one, losslessly.

At one token a decoder is bound by launches as much as by memory: one product for q, k and v and one for gate and up save
three launches a layer. :mod:`lq_torch.merge.modules` says how the code of the model stays as it is,
:mod:`lq_torch.merge.source` how it is made sure that the result is the same function.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from lq_formats import SpecError, UnsupportedError
from torch import Tensor, nn

from lq_torch.arguments import check_module
from lq_torch.hooks import has_hooks
from lq_torch.merge.gated import is_plain_silu
from lq_torch.merge.modules import Group, MergedLinear, MergedPart, MergingModule, cat_bias, merging_class
from lq_torch.merge.rows import cat_rows, slice_rows, why_not_cat
from lq_torch.merge.source import gate_of, shared_input
from lq_torch.tensors import Int4PreshuffledTensor, Int8PreshuffledTensor, LowBitTensor
from lq_torch.tensors.gated import gated_form

DEFAULT_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Names in LLaMA, Qwen2, Qwen3, Mistral and their kin."""


def merge_linears(
    model: nn.Module, patterns: Mapping[str, Sequence[str]] | None = None, *, fuse_epilogue: bool = False
) -> list[str]:
    """Merge sibling Linear layers that take the same input, in place: one product where there were several.

    Codes, scales, zero points and biases are stacked, so every weight keeps its bits. State dicts and checkpoints keep the
    names of the separate layers; :func:`unmerge_linears` restores them. Groups that cannot be merged are left as they
    are, and one warning names each with the reason.

    Weights move into new parameters: make optimizers afterwards. What a sibling returns is a slice of the product, so it is
    not contiguous: a forward that makes one dimension of its last and another one must do so by ``reshape``, not ``view``.

    Args:
        model: Any module; quantized (int4, int8 with a scale a row, ggml) or dense weights.
        patterns: Name of the merged layer -> names of the siblings, at least two, in the order of their rows. None:
            ``{"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}``.
        fuse_epilogue: Compute silu(gate) * up in the kernel of the merged product, where a gated MLP has that activation
            and its weights are preshuffled, int4 or int8; those merged before as well. One launch less; the result is
            rounded once where layers apart round four times. One warning names the gated MLPs that cannot.

    Returns:
        Paths of the merged layers, for example ``"model.layers.0.self_attn.qkv_proj"``.

    Raises:
        SpecError: If ``patterns`` does not map names to two names or more, or ``model`` is no module.
    """
    check_module(model, "merge_linears")
    wanted = _check_patterns(DEFAULT_PATTERNS if patterns is None else patterns)
    shared = _shared_parameters(model)
    plan: list[tuple[str, nn.Module, Group]] = []
    refused: dict[str, list[str]] = {}
    merged_before = False
    taken: set[int] = set()
    for path, parent, name, members in _candidates(model, wanted):
        if isinstance(parent, MergingModule) and parent._lq_group.members == members:
            merged_before = True
            continue
        try:
            if isinstance(parent, MergingModule) or id(parent) in taken:
                raise UnsupportedError("another group of the same module is merged")
            group = _check_group(parent, name, members, shared)
        except UnsupportedError as error:
            refused.setdefault(f"{', '.join(members)}: {error}", []).append(path or "the model")
            continue
        taken.add(id(parent))
        plan.append((path, parent, group))
    if refused:
        lines = "".join(f"\n  {' and '.join(_some(paths))}: {reason}" for reason, paths in refused.items())
        warnings.warn(f"merge_linears left layers apart:{lines}", stacklevel=2)
    elif not plan and not merged_before:
        sought = "; ".join(", ".join(members) for members in wanted.values())
        warnings.warn(f"merge_linears found no module of {type(model).__name__} with {sought}", stacklevel=2)
    for _, parent, group in plan:
        _merge(parent, group)
    if fuse_epilogue:
        _fuse_epilogues(model)
    return [f"{path}.{group.name}" if path else group.name for path, _, group in plan]


def unmerge_linears(model: nn.Module) -> list[str]:
    """Undo :func:`merge_linears`, in place: the modules that were merged are back, with the same bits.

    Returns:
        Paths of the layers that are separate again.

    Raises:
        UnsupportedError: If a merged layer was replaced, or quantized to a packing that mixes rows; nothing is changed.
        SpecError: If ``model`` is no module.
    """
    check_module(model, "unmerge_linears")
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, MergingModule)]
    # Whatever cannot be cut is refused before anything is put back.
    restored = []
    for path, parent in found:
        merged = parent.merged_linear()
        slice_rows(merged.weight, 0, 0)
        restored.append((path, parent, merged, parent.parts()))
    for _, parent, merged, parts in restored:
        for member, part in parts.items():
            parent._modules[member] = part.restore(merged)
        del parent._modules[parent._lq_group.name]
        parent.__class__ = parent._lq_base  # type: ignore[assignment]
    return [f"{path}.{member}" if path else member for path, _, _, parts in restored for member in parts]


def refuse_merged(model: nn.Module, task: str) -> None:
    """Raise UnsupportedError if a model holds merged layers, for code that assigns weights by their names."""
    for path, module in model.named_modules():
        if isinstance(module, MergingModule):
            raise UnsupportedError(
                f"{task} needs separate layers, and {path or 'the model'} holds merged ones: unmerge_linears(model) first"
            )


def _check_patterns(patterns: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    if not isinstance(patterns, Mapping):
        raise SpecError(
            f"patterns is a {type(patterns).__name__}: expected a map such as {{'qkv_proj': ('q_proj', 'k_proj', 'v_proj')}}"
        )
    checked = {}
    for name, members in patterns.items():
        names = tuple(members) if isinstance(members, Sequence) and not isinstance(members, str) else ()
        if len(names) < 2 or len({name, *names}) != len(names) + 1:
            raise SpecError(f"pattern {name!r}: {members!r}: expected a new name and two or more different layer names")
        for word in (name, *names):
            if not isinstance(word, str) or not word.isidentifier():
                raise SpecError(f"pattern {name!r}: {members!r}: {word!r} is not the name of a layer")
        checked[name] = names
    if not checked:
        raise SpecError("patterns is empty: expected, for example, {'qkv_proj': ('q_proj', 'k_proj', 'v_proj')}")
    return checked


def _candidates(
    model: nn.Module, patterns: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, nn.Module, str, tuple[str, ...]]]:
    """Yield every module that holds siblings of a pattern, two or more, with its path."""
    for path, parent in model.named_modules():
        for name, members in patterns.items():
            if sum(parent._modules.get(member) is not None for member in members) > 1:
                yield path, parent, name, members


def _shared_parameters(model: nn.Module) -> set[int]:
    """Return the ids of parameters that two modules hold, or that share memory with another one."""
    holders: Counter[int] = Counter()
    memory: dict[tuple[str, int], int] = {}
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            holders[id(parameter)] += 1
            for tensor in _stored(parameter):
                if tensor.device.type == "meta" or tensor.numel() == 0:
                    continue
                first = memory.setdefault((str(tensor.device), tensor.data_ptr()), id(parameter))
                if first != id(parameter):
                    shared |= {first, id(parameter)}
    return shared | {key for key, count in holders.items() if count > 1}


def _stored(parameter: Tensor) -> list[Tensor]:
    if isinstance(parameter, LowBitTensor):
        return [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
    return [parameter] if type(parameter.data) is Tensor else []


def _check_group(parent: nn.Module, name: str, members: tuple[str, ...], shared: set[int]) -> Group:
    """Return the group to merge, or raise UnsupportedError with the reason why not."""
    if missing := [member for member in members if parent._modules.get(member) is None]:
        raise UnsupportedError(f"it has no {', '.join(missing)}")
    if hasattr(parent, name):
        raise UnsupportedError(f"it has something called {name} already")
    if "forward" in vars(parent):
        raise UnsupportedError("its forward was replaced on the instance (accelerate's hooks do that), remove it first")
    layers = {member: parent.get_submodule(member) for member in members}
    for member, layer in layers.items():
        _check_layer(member, layer, shared)
    linears = {member: layer for member, layer in layers.items() if isinstance(layer, nn.Linear)}
    if len({id(layer) for layer in linears.values()}) != len(members):
        raise UnsupportedError("one layer is there under two names")
    if reason := why_not_cat({member: layer.weight for member, layer in linears.items()}):
        raise UnsupportedError(reason)
    _check_training(linears)
    total = sum(layer.out_features for layer in linears.values())
    (in_features,) = {layer.in_features for layer in linears.values()}
    if total == in_features:
        # A part tells the product from the parent's input by its size, should anything else call it.
        raise UnsupportedError(f"the product would be as wide as its input ({total})")
    forward = type(parent).forward
    return Group(name, members, shared_input(forward, members), gate_of(forward, members))


def _check_training(linears: Mapping[str, nn.Linear]) -> None:
    """Refuse what one parameter cannot stand for: rows that are trained beside rows that are not."""
    biases = [layer.bias for layer in linears.values() if layer.bias is not None]
    for kind, parameters in (("weights", [layer.weight for layer in linears.values()]), ("biases", biases)):
        if len({parameter.requires_grad for parameter in parameters}) > 1:
            raise UnsupportedError(f"some of their {kind} require gradients and some do not")
    if len({(bias.dtype, bias.device) for bias in biases}) > 1:
        raise UnsupportedError("their biases differ in dtype or device")
    if biases and len(biases) < len(linears) and biases[0].requires_grad:
        raise UnsupportedError(
            "some have a bias and some have none, whose zeros would be trained; model.requires_grad_(False) first"
        )


def _check_layer(member: str, layer: nn.Module, shared: set[int]) -> None:
    if type(layer) is not nn.Linear:
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise UnsupportedError(
            f"{member} is a {kind}, not an nn.Linear; an adapter must be merged into its weight first"
        )
    if "forward" in vars(layer):
        raise UnsupportedError(f"the forward of {member} was replaced (accelerate's hooks do that), remove it first")
    if set(layer._parameters) != {"weight", "bias"} or layer._buffers or layer._modules:
        raise UnsupportedError(f"{member} holds more than a weight and a bias")
    parameters = [parameter for parameter in layer._parameters.values() if parameter is not None]
    if has_hooks(layer):
        raise UnsupportedError(f"{member} has hooks, which would no longer run; remove them first")
    if any(id(parameter) in shared for parameter in parameters):
        raise UnsupportedError(f"a parameter of {member} is shared with another layer, which would lose it")
    if any(parameter.grad is not None for parameter in parameters):
        raise UnsupportedError(f"{member} has accumulated gradients; model.zero_grad() first")


def _merge(parent: nn.Module, group: Group) -> None:
    layers = {member: parent.get_submodule(member) for member in group.members}
    linears = [layer for layer in layers.values() if isinstance(layer, nn.Linear)]
    weight = cat_rows([layer.weight for layer in linears])
    bias = cat_bias([(layer.out_features, layer.bias) for layer in linears])
    merged = MergedLinear(weight, bias).train(linears[0].training)
    merged.weight.requires_grad_(linears[0].weight.requires_grad)
    if bias is not None:
        merged.bias.requires_grad_(any(layer.bias is not None and layer.bias.requires_grad for layer in linears))
    cls: type[nn.Module] = merging_class(type(parent), group)
    start = 0
    for member, layer in zip(group.members, linears, strict=True):
        parent._modules[member] = MergedPart(layer, start, weight.shape[0])
        start += layer.out_features
    parent._modules[group.name] = merged
    parent.__class__ = cls


def _fuse_epilogues(model: nn.Module) -> None:
    """Bring the weights of merged gates and ups into the order of the kernels that end as silu(gate) * up."""
    refused: dict[str, list[str]] = {}
    for path, parent in model.named_modules():
        if isinstance(parent, MergingModule) and parent._lq_group.gate is not None:
            try:
                _fuse_epilogue(parent, parent._lq_group.gate.activation)
            except UnsupportedError as error:
                refused.setdefault(str(error), []).append(path or "the model")
    if refused:
        lines = "".join(f"\n  {' and '.join(_some(paths))}: {reason}" for reason, paths in refused.items())
        warnings.warn(f"merge_linears left epilogues apart:{lines}", stacklevel=3)


def _fuse_epilogue(parent: MergingModule, activation: str) -> None:
    merged, parts = parent.merged_linear(), parent.parts()
    weight = merged.weight
    if not is_plain_silu(parent.get_submodule(activation)):
        raise UnsupportedError(f"its {activation} is a {type(parent.get_submodule(activation)).__name__}, or has hooks")
    if not isinstance(weight, Int4PreshuffledTensor | Int8PreshuffledTensor):
        raise UnsupportedError(f"its weight is a {type(weight).__name__}, not preshuffled; quantize to that format")
    if len({part.out_features for part in parts.values()}) != 1:
        raise UnsupportedError("its gates and ups are not as many")
    merged.weight = nn.Parameter(gated_form(weight), requires_grad=weight.requires_grad)


def _some(paths: Sequence[str]) -> list[str]:
    return list(paths) if len(paths) < 4 else [*paths[:2], f"{len(paths) - 2} more"]

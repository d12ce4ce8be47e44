"""AWQ: make the input channels that matter large before rounding, and take it back in the module before.

Multiplying column i of a weight by ``s_i`` and dividing its input by ``s_i`` changes nothing, until the weight is rounded:
then the channel's error shrinks with ``s_i``. ``s = rms(x)^alpha``, alpha by search. The division costs nothing at run time
where the module that makes the input can absorb it: a norm into its weight, a Linear into its rows (up -> down: the gated
product is linear in up; v -> o: attention mixes tokens, not channels).

Which module that is, is found by trying: factors are folded into a candidate, the block runs, and neither what the layers
return may change nor what the block adds to the hidden states. No architecture is known here, and nothing is folded that
does not hold.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lq_formats import choose_qparams
from torch import Tensor, nn

from lq_torch.calibrate.blocks import hidden_states
from lq_torch.calibrate.moments import Moments
from lq_torch.calibrate.options import AWQOptions
from lq_torch.calibrate.solve import nearest_codes, output_error
from lq_torch.calibrate.stages import measure
from lq_torch.calibrate.target import Target

_SAME = 0.02  # relative change of a token that rounding (bf16 norms of 1 + weight) may make; a wrong fold makes about 1
_SAMPLE = 256  # out features of a layer that are looked at, for want of memory


@dataclass(frozen=True)
class Fold:
    """A module that can absorb the division of some layers' input.

    Attributes:
        source: The module.
        offset: What its weight is short of the factor it applies: 1 for norms that multiply by 1 + weight, else 0.
        members: The Linear layers that take its output (or what is proportional to it).
    """

    source: nn.Module
    offset: float
    members: tuple[nn.Linear, ...]

    def apply(self, factors: Tensor) -> None:
        """Divide the source's output channels by ``factors: (K,)``, multiply the members' columns."""
        weight = self.source.weight
        assert isinstance(weight, Tensor)
        by = factors if weight.dim() == 1 else factors.unsqueeze(1)
        _set(weight, (weight.float() + self.offset) / by - self.offset)
        bias = getattr(self.source, "bias", None)
        if isinstance(bias, Tensor):
            _set(bias, bias.float() / factors)
        for member in self.members:
            _set(member.weight, member.weight.float() * factors)

    def holds(self, block: nn.Module, run: Callable[[], Tensor]) -> bool:
        """Return whether powers of two can be folded; the weights are as before.

        Args:
            block: What the modules are in.
            run: Runs the block on a few tokens and returns its output.
        """
        tensors = [self.source.weight, getattr(self.source, "bias", None), *(m.weight for m in self.members)]
        kept = [(tensor, tensor.detach().clone()) for tensor in tensors if isinstance(tensor, Tensor)]
        before = _made(block, self.members, run)
        columns = self.members[0].in_features
        powers = torch.arange(columns, device=self.members[0].weight.device) * 5 % 7 % 3 - 1
        self.apply(torch.exp2(powers.float()))
        try:
            after = _made(block, self.members, run)
        finally:
            for tensor, value in kept:
                tensor.data.copy_(value)
        return len(after) == len(before) and all(map(_same, after, before))


def find_folds(block: nn.Module, shared: set[int], run: Callable[[], Tensor]) -> list[Fold]:
    """Return the exact folds of a block.

    Args:
        block: Dense.
        shared: Ids of parameters that several modules of the model have; they are not touched.
        run: Runs the block on a few tokens and returns its output.
    """
    outputs: list[tuple[nn.Module, Tensor]] = []
    groups: list[tuple[Tensor, list[nn.Linear], list[nn.Module]]] = []

    def entered(module: nn.Module, args: tuple[Any, ...]) -> None:
        group = next((members for x, members, _ in groups if x is args[0]), None)
        if group is None:
            groups.append((args[0], [module], [source for source, _ in outputs]))  # type: ignore[list-item]
        else:
            group.append(module)  # type: ignore[arg-type]

    handles = []
    for module in block.modules():
        if not list(module.children()) and isinstance(getattr(module, "weight", None), nn.Parameter):
            handles.append(module.register_forward_hook(lambda m, _, output: outputs.append((m, output))))
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(entered))
    run()
    for handle in handles:
        handle.remove()

    found = []
    for x, members, before in groups:
        weights = [member.weight for member in members]
        if len({id(member) for member in members}) < len(members) or any(
            id(w) in shared or type(w.data) is not Tensor for w in weights
        ):
            continue
        for fold in _candidates(x, tuple(members), before, outputs):
            if id(fold.source.weight) not in shared and fold.holds(block, run):
                found.append(fold)
                break
    return found


def smooth(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    runs: Sequence[Callable[[], Tensor]],
    shared: set[int],
    targets: Mapping[str, Target],
    options: AWQOptions,
) -> dict[str, float]:
    """Scale the input channels of a block's layers wherever that folds exactly; the block's function stays.

    Args:
        block: Dense.
        linears: The layers that will be quantized, by path.
        runs: Each runs the block on one batch.
        shared: Ids of parameters that several modules have.
        targets: What each layer becomes.
        options: Of the search.

    Returns:
        The exponent that was chosen, by path; 0 where no scaling is better than any. Layers without a fold are missing.
    """
    folds = find_folds(block, shared, runs[0])
    paths = {id(layer): path for path, layer in linears.items()}
    chosen: dict[str, float] = {}
    for moments in measure(linears, runs):
        first = linears[moments.members[0]]
        fold = next((fold for fold in folds if any(member is first for member in fold.members)), None)
        if fold is None:
            continue
        layers = {path: linears[path].weight.detach() for path in moments.members}
        exponent, factors = _search(layers, moments, targets, options)
        if exponent:
            fold.apply(factors)
        chosen.update({paths[id(linears[path])]: exponent for path in layers})
    return chosen


def shared_parameters(model: nn.Module) -> set[int]:
    """Return the ids of parameters that more than one module has."""
    owners = Counter(id(item) for module in model.modules() for item in module._parameters.values() if item is not None)
    return {key for key, count in owners.items() if count > 1}


@dataclass(frozen=True)
class _Made:
    """What a layer returned or a block added, ``(..., N)``, and how much of it may be rounding, ``(..., 1)``."""

    value: Tensor
    rounding: Tensor


def _made(block: nn.Module, members: Sequence[nn.Module], run: Callable[[], Tensor]) -> list[_Made]:
    """Run a block; return what each call of some of its layers made, and last what the block adds to the hidden states."""
    entered: list[Tensor] = []
    found: list[_Made] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_states(args, kwargs)
        if isinstance(hidden, Tensor):
            entered.append(hidden.clone())  # a block may add to it in place

    def add(output: Tensor, base: Tensor | float = 0.0) -> None:
        value = output.float()
        rounding = torch.finfo(output.dtype).eps * value.norm(dim=-1, keepdim=True)
        found.append(_Made(value - base, rounding))  # no view of what may be changed in place later

    def sample(_: nn.Module, __: Any, output: Tensor) -> None:
        add(output[..., :: max(1, output.shape[-1] // _SAMPLE)])

    handles = [member.register_forward_hook(sample) for member in members]
    handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    # A block whose output is of another shape adds to nothing: its output is what it makes.
    chained = bool(entered) and entered[0].shape == output.shape
    add(output, entered[0] if chained else 0.0)
    return found


def _same(after: _Made, before: _Made) -> bool:
    """Return whether nothing but rounding changed, each token by its own size: a massive one hides nothing in the others.

    The mean of squares, so that a few tokens (of an expert) that change by all they are cannot pass, as in a median.
    """
    if after.value.shape != before.value.shape:
        return False
    allowed = _SAME * before.value.norm(dim=-1, keepdim=True) + before.rounding
    change = (after.value - before.value).norm(dim=-1, keepdim=True)
    change /= allowed.clamp_min(torch.finfo(torch.float32).tiny)
    return not change.numel() or bool(change.square().mean() < 1)


def _candidates(
    x: Tensor, members: tuple[nn.Linear, ...], before: list[nn.Module], outputs: list[tuple[nn.Module, Tensor]]
) -> list[Fold]:
    """Return what may have made the layers' input: the norm whose output it is, else any Linear as wide, last first."""
    made = [module for module, output in outputs if output is x]
    norms = [module for module in made if isinstance(module.weight, Tensor) and module.weight.dim() == 1]
    folds = [Fold(module, offset, members) for module in norms for offset in (0.0, 1.0)]
    if made:
        return folds
    wide = [m for m in before if isinstance(m, nn.Linear) and m.out_features == x.shape[-1] and m not in members]
    return [Fold(module, 0.0, members) for module in reversed(wide)]


def _search(
    layers: Mapping[str, Tensor], moments: Moments, targets: Mapping[str, Target], options: AWQOptions
) -> tuple[float, Tensor]:
    """Return the exponent and factors ``(K,)`` with the least output error of rounding to nearest."""
    assert moments.hessian is not None
    hessian = moments.hessian / moments.tokens
    size = hessian.diagonal().sqrt()
    size = torch.where(size > 0, size, size[size > 0].mean() if bool((size > 0).any()) else torch.ones_like(size))
    weights = {path: weight.float() for path, weight in layers.items()}
    best, least = (0.0, torch.ones_like(size)), torch.inf
    for point in range(options.points + 1):
        exponent = point / options.points
        factors = (size / size.log().mean().exp()).pow(exponent)
        errors = [
            output_error(_nearest(w * factors, targets[path]) / factors, w, hessian).sum()
            for path, w in weights.items()
        ]
        error = float(torch.stack(errors).sum())
        if error < least:
            best, least = (exponent, factors), error
    return best


def _nearest(w: Tensor, target: Target) -> Tensor:
    """Return the values that ``w: (N, K)`` is rounded to."""
    scale, zero = choose_qparams(w, target.spec)
    middle = torch.full_like(scale, target.spec.midpoint, dtype=torch.float32) if zero is None else zero.float()
    return nearest_codes(w, scale.float(), middle, target.spec).values()


def _set(tensor: Tensor, value: Tensor) -> None:
    tensor.data.copy_(value)

"""What a rotation touches: the norms and layers around the residual stream, and the values of attention.

Found by running the modules, not by their names: a layer reads the residual stream if its input is the output of a norm,
and writes to it if it is as wide and does not read. Whether that is the whole story, a trial on a copy shows: rotated, it
must do to a rotated stream what the original does to the stream itself.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lq_formats import LQError, UnsupportedError
from torch import Tensor, nn

from lq_torch.calibrate.blocks import Stream, map_tensors

_SAME = 1e-3  # relative change of what a block adds to the stream; anything forgotten makes about 1


@dataclass(frozen=True)
class Fold:
    """A norm whose scale goes into the layers behind it.

    Attributes:
        norm: Its path.
        offset: What its weight is short of the factor it applies: 1 for norms that multiply by 1 + weight, else 0.
        readers: Paths of the layers.
    """

    norm: str
    offset: float
    readers: tuple[str, ...]

    def apply(self, parent: nn.Module, rotation: Tensor) -> None:
        """Make the norm's scale 1, and the layers read a rotated stream: ``W <- W diag(scale) Q``."""
        norm = parent.get_submodule(self.norm)
        assert isinstance(norm.weight, Tensor)
        scale = norm.weight.double() + self.offset
        for path in self.readers:
            weight = parent.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            weight.data.copy_(weight.double() * scale @ rotation)
        norm.weight.data.fill_(1 - self.offset)


@dataclass(frozen=True)
class BlockPlan:
    """What changes in a block; paths are relative to it.

    Attributes:
        folds: Norms and the readers behind them.
        writers: Layers whose output is added to the stream.
        heads: The layers that make values and mix the heads' outputs, ``(v, o)``, or None.
    """

    folds: tuple[Fold, ...]
    writers: tuple[str, ...]
    heads: tuple[str, str] | None = None

    def apply(self, block: nn.Module, rotation: Tensor, head_rotation: Tensor | None) -> None:
        """Rotate the weights of a block; each is rounded to its dtype once, at the end.

        Args:
            block: The block.
            rotation: ``Q (hidden, hidden) float64`` on its device: the stream becomes ``x Q``.
            head_rotation: ``(head, head) float64`` of every head's values, or None.
        """
        touched = {*self.writers, *(path for fold in self.folds for path in fold.readers)}
        with _in_float64([block.get_submodule(path) for path in touched]):
            for fold in self.folds:
                fold.apply(block, rotation)
            for path in self.writers:
                rotate_outputs(block.get_submodule(path), rotation)
            if self.heads is not None and head_rotation is not None:
                v, o = self.heads
                rotate_heads(block.get_submodule(v), block.get_submodule(o), head_rotation)


def rotate_outputs(layer: nn.Module, rotation: Tensor) -> None:
    """Rotate what a Linear returns: ``W <- Q^T W``, ``b <- b Q``."""
    for value in (layer.weight, getattr(layer, "bias", None)):
        if isinstance(value, Tensor):
            value.data.copy_((value.double().t() @ rotation).t())


def rotate_heads(v: nn.Module, o: nn.Module, rotation: Tensor) -> None:
    """Rotate the values of every head, and take it back where heads are mixed."""
    size = rotation.shape[0]
    for value in (v.weight, getattr(v, "bias", None)):
        if isinstance(value, Tensor):
            heads = value.double().reshape(-1, size, value.numel() // value.shape[0])
            value.data.copy_((rotation.t() @ heads).view(value.shape))
    assert isinstance(o.weight, Tensor)
    o.weight.data.copy_((o.weight.double().reshape(-1, size) @ rotation).view(o.weight.shape))


def plan_block(
    path: str, block: nn.Module, stream: Stream, number: int, rotation: Tensor, head_rotation: Tensor | None
) -> BlockPlan:
    """Return what to change in a block, once it is certain that its function stays.

    Args:
        path: Of the block, for errors.
        block: Dense; not changed.
        stream: What enters it, one batch.
        number: Of the block in the stream.
        rotation: Of the residual stream.
        head_rotation: Of each head's values, or None to leave them.

    Raises:
        UnsupportedError: If the block cannot take a rotated stream, has no values to rotate, or does not run in float64.
    """
    with _trial(path):
        return _plan(path, block, stream, number, rotation, head_rotation)


def _plan(
    path: str, block: nn.Module, stream: Stream, number: int, rotation: Tensor, head_rotation: Tensor | None
) -> BlockPlan:
    trial, entering = _widened(block, stream)
    (run,) = entering.runs(number, trial)
    width = rotation.shape[0]
    modules = dict(trial.named_modules())
    folds = find_folds(path, modules, width, run)
    readers = {reader for fold in folds for reader in fold.readers}
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    writers = tuple(name for name, layer in linears.items() if layer.out_features == width and name not in readers)
    plan = BlockPlan(folds, writers)
    if head_rotation is not None:
        plan = BlockPlan(folds, writers, _find_heads(path, linears, plan, run, head_rotation))
    before, behind = entering.hidden[0], run()
    plan.apply(trial, rotation, head_rotation)
    entering.hidden[0] = before @ rotation
    (run,) = entering.runs(number, trial)
    change = (run() - behind @ rotation).norm() / (behind - before).norm()
    if not bool(change < _SAME):
        fed = {fold.norm for fold in folds}
        stray = [name for name, module in modules.items() if name not in fed and _is_norm(module, width)]
        hint = f" (no Linear layer takes the output of {', '.join(stray)} as it is)" if stray else ""
        raise UnsupportedError(
            f"{path}: it does not do to a rotated residual stream what it does to the stream{hint}; rotation needs RMS "
            "norms in front of Linear layers, and Linear layers in front of what is added"
        )
    return plan


def find_folds(path: str, modules: Mapping[str, nn.Module], width: int, run: Callable[[], object]) -> tuple[Fold, ...]:
    """Return norms and the Linear layers that take their outputs.

    Args:
        path: Of the module that all are in, for errors.
        modules: Where to look, by path relative to it.
        width: Of the residual stream.
        run: Runs them once.

    Raises:
        UnsupportedError: If such a norm does more than divide by the root mean square and multiply by a weight, or does not
            run in float64.
    """
    made: list[tuple[str, Tensor]] = []
    taken: list[tuple[str, Tensor]] = []
    handles = []
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: taken.append((name, args[0]))))
        elif _is_norm(module, width):
            handles.append(module.register_forward_hook(lambda _, __, y, name=name: made.append((name, y))))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    # Views (a reshape, the last position) share their storage; the lists keep it alive, so addresses are unique.
    norms = {y.untyped_storage().data_ptr(): name for name, y in made}
    readers: dict[str, list[str]] = {}
    for name, x in taken:
        norm = norms.get(x.untyped_storage().data_ptr())
        if norm is not None and name not in readers.setdefault(norm, []):
            readers[norm].append(name)
    return tuple(
        Fold(norm, _offset(f"{path}.{norm}".lstrip("."), modules[norm], width), tuple(names))
        for norm, names in readers.items()
    )


def _offset(path: str, norm: nn.Module, width: int) -> float:
    """Return what an RMS norm adds to its weight, 0 or 1, having tried that it commutes with rotations."""
    with _trial(path):
        return _try_norm(path, norm, width)


def _try_norm(path: str, norm: nn.Module, width: int) -> float:
    trial = copy.deepcopy(norm).double()
    weight = trial.weight
    assert isinstance(weight, Tensor)
    if isinstance(getattr(trial, "bias", None), Tensor):
        raise UnsupportedError(f"{path} has a bias (a LayerNorm?), which cannot be rotated: rotation needs RMS norms")
    device = weight.device
    x = torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device) + 1
    # A reflection that leaves no coordinate alone; of the mean it makes something else.
    u = torch.nn.functional.normalize(torch.linspace(1, -2, width, dtype=torch.float64, device=device), dim=0)
    reflected = x - 2 * (x @ u).unsqueeze(-1) * u
    weight.data.zero_()
    offset = 0.0 if not bool(trial(x).any()) else 1.0
    weight.data.fill_(1 - offset)
    y = trial(x)
    change = (trial(reflected) - (y - 2 * (y @ u).unsqueeze(-1) * u)).norm() / y.norm()
    if not bool(change < _SAME):
        raise UnsupportedError(
            f"{path} ({type(norm).__name__}) does not commute with rotations (it subtracts the mean?): rotation needs RMS "
            "norms"
        )
    return offset


def _find_heads(
    path: str, linears: dict[str, nn.Linear], plan: BlockPlan, run: Callable[[], Tensor], rotation: Tensor
) -> tuple[str, str]:
    """Return the layers whose output and input heads can be rotated without changing the block: values and their mix."""
    size = rotation.shape[0]
    mixed: list[Tensor] = []
    readers = [name for fold in plan.folds for name in fold.readers]
    for v, o in ((v, o) for o in plan.writers for v in reversed(readers)):
        made, taken = linears[v].out_features, linears[o].in_features
        if made % size or taken % made:
            continue
        tensors = [value for value in (linears[v].weight, linears[v].bias, linears[o].weight) if value is not None]
        kept = [value.detach().clone() for value in tensors]
        handle = linears[o].register_forward_hook(lambda _, __, y: mixed.append(y))
        run()
        rotate_heads(linears[v], linears[o], rotation)
        run()
        handle.remove()
        for value, old in zip(tensors, kept, strict=True):
            value.data.copy_(old)
        after, before = mixed.pop(), mixed.pop()
        if bool((after - before).norm() < _SAME * before.norm()):
            return v, o
    raise UnsupportedError(
        f"{path}: no pair of layers makes and mixes values in heads of {size} (q, k and v in one layer?); rotate the residual "
        "stream only: heads=False, or lq quantize --rotate-stream"
    )


@contextmanager
def _trial(path: str) -> Iterator[None]:
    """Give whatever fails inside, but for want of memory, the name of what was tried."""
    try:
        yield
    except (LQError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
        raise UnsupportedError(
            f"{path}: rotations are tried in float64, where it fails ({reason}); quantize without rotating"
        ) from error


@contextmanager
def _in_float64(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While active, the modules' own parameters are float64."""
    values = [(value, value.dtype) for module in modules for value in module.parameters(recurse=False)]
    for value, _ in values:
        value.data = value.data.double()
    try:
        yield
    finally:
        for value, dtype in values:
            value.data = value.data.to(dtype)


def _widened(block: nn.Module, stream: Stream) -> tuple[nn.Module, Stream]:
    """Return copies of a block and of what enters it, in float64: float32 products may be those of TF32."""

    def wide(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    trial = copy.deepcopy(block)
    for value in (*trial.parameters(), *trial.buffers()):
        value.data = wide(value.data)
    return trial, Stream([wide(x) for x in stream.hidden], map_tensors(stream.extras, wide), stream.device)


def _is_norm(module: nn.Module, width: int) -> bool:
    """Return whether a module has a weight like that of a norm of the residual stream."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.shape == (width,)

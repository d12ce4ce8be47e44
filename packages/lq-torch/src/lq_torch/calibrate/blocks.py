"""Decoder blocks: where they are in a model, what enters them, and running one by itself.

Nothing here knows an architecture. The blocks are the modules of that ``nn.ModuleList`` which holds most of the model's
Linear weights. What a model passes to each block beside the hidden states (rotary embeddings, masks, positions) is
recorded for each batch, and kept once where batches share it, while every block hands its input on unchanged: the model's
own code up to the last block runs, the work of the blocks does not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from lq_formats import NonFiniteError, SpecError, UnsupportedError
from torch import Tensor, nn

_HIDDEN = "hidden_states"
Extras: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class _LastBlock(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a recorded forward: nothing behind the last block is needed."""


@dataclass
class Stream:
    """Hidden states on their way through the blocks of a model.

    Attributes:
        hidden: What enters the next block, one tensor ``(B, T, ...)`` a batch, where activations are kept.
        extras: For each block, of each batch: its other arguments ``(args, kwargs)``.
        device: Where blocks compute.
    """

    hidden: list[Tensor]
    extras: list[list[Extras]]
    device: torch.device

    def copy(self) -> "Stream":
        """Return a stream that goes its own way from here."""
        return Stream(list(self.hidden), self.extras, self.device)

    def runs(self, number: int, block: nn.Module) -> list[Callable[[], Tensor]]:
        """Return one function a batch that runs block ``number`` on it and returns the hidden states behind."""
        return [partial(self._run, number, block, i, hidden) for i, hidden in enumerate(self.hidden)]

    def advance(self, number: int, path: str, block: nn.Module) -> None:
        """Replace the hidden states by those behind block ``number``, batch by batch.

        Raises:
            NonFiniteError: If they hold NaN or infinity.
        """
        for i, hidden in enumerate(self.hidden):
            behind = self._run(number, block, i, hidden)
            if not bool(torch.isfinite(behind).all()):
                raise NonFiniteError(f"{path}: its outputs for calibration batch {i} hold NaN or infinity")
            self.hidden[i] = behind.to(hidden.device)

    def _run(self, number: int, block: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        # A copy, because a block may add to its input in place, and will see the same batch again.
        return _first(_call(block, hidden.to(self.device, copy=True), self.extras[number][batch]))


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the ``(path, module)`` pairs of a model's decoder blocks, in order.

    Raises:
        UnsupportedError: If the model has no list of blocks.
    """
    best: list[tuple[str, nn.Module]] = []
    most = 0
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        # Lists inside blocks (experts) hold less than the list of the blocks that they are in.
        held = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
        if held > most:
            best = [(f"{path}.{name}" if path else name, block) for name, block in module.named_children()]
            most = held
    if not best:
        raise UnsupportedError(
            f"{type(model).__name__} has no nn.ModuleList of blocks with Linear layers, by which calibration and rotation go; "
            "quantize_ needs none"
        )
    return best


def record_stream(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    batches: Sequence[Tensor],
    device: torch.device,
    storage: torch.device,
) -> Stream:
    """Run the model in front of its blocks, and record what enters each.

    Args:
        model: A causal language model that maps token ids to anything; dense.
        blocks: From :func:`find_blocks`.
        batches: Token ids ``(B, T) int64``.
        device: Where blocks compute.
        storage: Where activations are kept.

    Raises:
        SpecError: If a token is beyond the vocabulary.
        UnsupportedError: If a block does not take the output of the one before it.
    """
    found = Stream([], [[] for _ in blocks], device)
    last: list[Tensor] = []
    shape: list[Callable[[Tensor], Any]] = []

    def receive(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = _HIDDEN in kwargs
        hidden = hidden_states(args, kwargs)
        if not isinstance(hidden, Tensor) or (number and hidden is not last[0]):
            raise UnsupportedError(
                f"{blocks[number][0]} does not take the output of the block before it as its first argument; "
                "calibration needs a chain of blocks"
            )
        if number == 0:
            found.hidden.append(hidden.to(storage))
            last[:] = [hidden]
        rest = {**kwargs, _HIDDEN: None} if named else kwargs
        extras = (args if named else args[1:], rest)
        before = found.extras[number]
        alike = (each for each in (*before[:1], *before[-1:]) if _same(each, extras))
        before.append(next(alike, None) or map_tensors(extras, lambda tensor: tensor.to(storage)))
        if number == len(blocks) - 1:
            raise _LastBlock
        if not shape:
            # A copy, as in Stream._run: this is what the first batch starts from.
            shape.append(_output_shape(blocks[0][1], hidden.to(device, copy=True), extras))
        return shape[0](hidden)

    options: dict[str, Any] = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    where = next(model.parameters()).device
    for batch in batches:
        try:
            with checked_lookups(model), _replaced([block for _, block in blocks], receive):
                model(batch.to(where), **options)
        except _LastBlock:
            continue
        raise UnsupportedError(f"{type(model).__name__} does not run {blocks[-1][0]}, its last block")
    return found


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return which of a block's arguments its hidden states are; None if there is none."""
    return kwargs[_HIDDEN] if _HIDDEN in kwargs else args[0] if args else None


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return tuples, lists and dictionaries with ``function`` of each of their tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, function) for item in value)
    return value


def _same(one: Any, other: Any) -> bool:
    """Return whether arguments of a block are alike, tensor for tensor."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        one = one.to(other.device)
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool | int | float | str) and one == other


@contextmanager
def checked_lookups(model: nn.Module) -> Iterator[None]:
    """Raise SpecError where a model looks up a row that an embedding does not have; a GPU would be lost to this process."""

    def check(path: str, module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows, last = args[0] if args else kwargs["input"], module.num_embeddings - 1
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) <= last:
            worst = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
            raise SpecError(
                f"tokens: {path} has the rows 0 to {last}, and {worst} is asked for; use the tokenizer of the model, and "
                "windows within its context"
            )

    embeddings = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    hooks = [
        module.register_forward_pre_hook(partial(check, path or "the model"), with_kwargs=True)
        for path, module in embeddings
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode (no dropout), and back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def split_batches(tokens: Tensor, batch_size: int) -> list[Tensor]:
    """Cut calibration windows ``(W, T)`` into batches.

    Raises:
        SpecError: If ``tokens`` are no windows of token ids, or there is none, or ``batch_size`` is no positive number.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        came = f"{tuple(tokens.shape)} {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise SpecError(f"tokens is {came}: expected calibration windows (windows, length) of integer token ids")
    if tokens.numel() == 0:
        raise SpecError(f"tokens has shape {tuple(tokens.shape)}: expected at least one window of one token")
    if type(batch_size) is not int or batch_size < 1:
        raise SpecError(f"batch_size={batch_size!r}: expected a number of windows, at least 1")
    return list(torch.split(tokens, batch_size))


def _call(block: nn.Module, hidden: Tensor, extras: Extras) -> Any:
    args, kwargs = map_tensors(extras, lambda tensor: tensor.to(hidden.device))
    if _HIDDEN in kwargs:
        return block(*args, **{**kwargs, _HIDDEN: hidden})
    return block(hidden, *args, **kwargs)


def _first(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _output_shape(block: nn.Module, hidden: Tensor, extras: Extras) -> Callable[[Tensor], Any]:
    """Run a block once; return a function that wraps hidden states as its output does."""
    home = next(block.parameters()).device
    block.to(hidden.device)
    with _original(block):
        output = _call(block, hidden, extras)
    block.to(home)
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    return lambda hidden: (hidden, *output[1:])


@contextmanager
def _replaced(modules: Sequence[nn.Module], receive: Callable[..., Any]) -> Iterator[None]:
    """While active, calling ``modules[i]`` calls ``receive(i, args, kwargs)`` instead of its forward."""

    def forward(number: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: receive(number, args, kwargs)

    for number, module in enumerate(modules):
        module.__dict__["forward"] = forward(number)
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


@contextmanager
def _original(module: nn.Module) -> Iterator[None]:
    replaced = module.__dict__.pop("forward")
    try:
        yield
    finally:
        module.__dict__["forward"] = replaced

"""The Linear layers of a block in the order in which they see data, and what enters them.

Layers that take the same tensor (q, k, v; gate, up) are one stage and share their moments; so are experts: layers of one
shape whose paths differ in numbers only. A stage is measured after the stages before it have been quantized.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from lq_torch.calibrate.moments import Moments


class _AllSeen(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a forward: nothing behind the last layer of the stage is needed."""


def find_stages(linears: Mapping[str, nn.Linear], run: Callable[[], object]) -> list[list[str]]:
    """Return the paths of a block's layers in stages, by running it once.

    Args:
        linears: The layers by path.
        run: Runs the block on some tokens. Layers that none of these reach join their like (other experts), or come last.
    """
    calls: list[tuple[str, Tensor]] = []
    with _Hooks(linears, lambda path, x: calls.append((path, x))):
        run()
    stages: dict[str, list[str]] = {}
    entered: dict[int, str] = {}  # which stage took this tensor first; calls keeps the tensors alive, so ids are unique
    stage_of: dict[str, str] = {}
    for path, x in calls:
        like = _like(path, linears[path])
        stage = stage_of.setdefault(like, entered.get(id(x), like))
        entered.setdefault(id(x), stage)
        members = stages.setdefault(stage, [])
        if path not in members:
            members.append(path)
    for path, linear in linears.items():
        members = stages.setdefault(stage_of.get(_like(path, linear), ""), [])
        if path not in members:
            members.append(path)
    # What nothing reached is last: "" was inserted after all others.
    return [members for members in stages.values() if members]


def measure(
    linears: Mapping[str, nn.Linear],
    runs: Sequence[Callable[[], object]],
    float_linears: Mapping[str, nn.Module] | None = None,
    float_runs: Sequence[Callable[[], object]] = (),
) -> list[Moments]:
    """Return the moments of what enters some layers of a block; layers that share an input share them.

    Args:
        linears: The layers by path.
        runs: Each runs the block on one batch.
        float_linears: The same layers of the float block, to measure how far its inputs are from the quantized ones.
        float_runs: Each runs the float block on the same batch of the float model's hidden states.

    Raises:
        NonFiniteError: If an input holds NaN or infinity; the layers are named.
    """
    collector = _Collector(set(linears))
    for number, run in enumerate(runs):
        if float_linears is not None:
            with _Hooks(float_linears, collector.receive_float):
                float_runs[number]()
        with _Hooks(linears, collector.receive), suppress(_AllSeen):
            run()
        collector.end_batch()
    return collector.finish()


class _Collector:
    """Adds up moments over batches, and finds out which layers share an input."""

    def __init__(self, paths: set[str]) -> None:
        self._paths = paths
        self._moments: dict[str, Moments] = {}
        self._entered: list[tuple[Tensor, Moments]] = []  # by layers seen for the first time in this batch
        self._seen: list[str] = []
        self._floats: dict[str, list[Tensor]] = {}
        self._early = False

    def receive(self, path: str, x: Tensor) -> None:
        self._seen.append(path)
        moments = self._moments.get(path)
        if moments is None:
            moments = next((found for tensor, found in self._entered if tensor is x), None) or Moments()
            self._entered.append((x, moments))
            self._moments[path] = moments
            moments.members.append(path)
        if moments.members[0] == path:
            waiting = self._floats.get(path)
            moments.add(x, waiting.pop(0) if waiting else None)
        if self._early and len(self._seen) == len(self._paths):
            raise _AllSeen

    def receive_float(self, path: str, x: Tensor) -> None:
        self._floats.setdefault(path, []).append(x)

    def end_batch(self) -> None:
        # Where every layer was called once, the next batch may end as soon as it has been.
        self._early = sorted(self._seen) == sorted(self._paths)
        self._entered, self._seen, self._floats = [], [], {}

    def finish(self) -> list[Moments]:
        unique = list({id(moments): moments for moments in self._moments.values()}.values())
        for moments in unique:
            moments.check_finite()
        return unique


class _Hooks:
    """While active, ``receive(path, x)`` is called with the input of every layer."""

    def __init__(self, linears: Mapping[str, nn.Module], receive: Callable[[str, Tensor], Any]) -> None:
        self._linears = linears
        self._receive = receive
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for path, linear in self._linears.items():
            self._handles.append(
                linear.register_forward_pre_hook(lambda _, args, path=path: self._receive(path, args[0]))
            )

    def __exit__(self, *details: object) -> None:
        for handle in self._handles:
            handle.remove()


def _like(path: str, linear: nn.Linear) -> str:
    """Return what experts of one kind share; the layers of an nn.Sequential, up and down, have two shapes."""
    return f"{kind(path)} {tuple(linear.weight.shape)}"


def kind(path: str) -> str:
    """Return the path with its numbers blanked out: experts of one kind have one.

    Only whole parts of a path count their like; fc1 and fc2, or w1 and w3, are layers of two kinds.
    """
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))

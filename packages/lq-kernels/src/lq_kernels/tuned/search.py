"""Search the fastest cut of every kernel for a weight and a number of tokens; what times them is the caller's.

The kernels' models put the cuts in order. The best of them, and those that were fastest at numbers of tokens nearby, are timed
twice: all of them shortly, then the fastest few for longer, in turn. Then the order of the fastest one's tiles, where a kernel
has several. A cut that fails is reported and left out.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from lq_kernels.prepare import Unit
from lq_kernels.tuned.kernels import TUNABLES, config_of, fields_of
from lq_kernels.tuned.lookup import alike
from lq_kernels.tuned.table import Q8_1, Cut, Point, Weight

CANDIDATES = 12
_BEHIND = 2
"""Times as many where a product stands behind another launch: the models know less of that."""
SHORT, LONG = 3, 9
"""Replays of a cut in each round."""
_FINALISTS = 3


class Timer(Protocol):
    """What times cuts."""

    def times(self, weight: Weight, m: int, cuts: Sequence[tuple[str, Cut]], replays: int) -> list[float | str]:
        """Return microseconds of each cut ``(kernel, fields)``, or why it cannot be timed."""
        ...


@dataclass(frozen=True)
class Found:
    """The fastest cut of one kernel.

    Attributes:
        kernel: Its name in tables.
        point: Tokens, time and cut.
        model_us: Time of the cut that the kernel's model chooses; None if that one failed.
        tried: Cuts that were timed.
    """

    kernel: str
    point: Point
    model_us: float | None
    tried: int


@dataclass(frozen=True)
class Failed:
    """A cut that could not be timed, and why."""

    kernel: str
    cut: Cut
    reason: str


Known = Mapping[str, Sequence[Cut]]
"""Cuts by kernel, as they were at other numbers of tokens."""


def proposals(
    weight: Weight,
    m: int,
    sm_count: int,
    *,
    candidates: int = CANDIDATES,
    kernels: Iterable[str] = tuple(TUNABLES),
    known: Known = MappingProxyType({}),
) -> Iterator[tuple[str, Cut, Unit]]:
    """Yield what is timed: of each kernel the cuts that its model finds fastest, the fastest first, then known ones."""
    for kernel in kernels:
        tunable = TUNABLES[kernel]
        if tunable.useful(weight, m):
            ranked = tunable.ranked(weight, m, sm_count)
            most = candidates * (_BEHIND if weight.activation == Q8_1 else 1)
            again = (alike(cut, ranked, tunable.same) for cut in known.get(kernel, ()))
            for config in dict.fromkeys([*ranked[:most], *(config for config in again if config is not None)]):
                yield kernel, fields_of(config), tunable.unit(weight, m, config)


def search(
    weight: Weight,
    m: int,
    timer: Timer,
    sm_count: int,
    *,
    candidates: int = CANDIDATES,
    kernels: Iterable[str] = tuple(TUNABLES),
    known: Known = MappingProxyType({}),
) -> tuple[list[Found], list[Failed]]:
    """Return the fastest cut of each kernel, and what failed.

    Args:
        weight: What is multiplied.
        m: Tokens.
        timer: Times cuts.
        sm_count: Multiprocessors of the GPU that it has.
        candidates: Cuts that are timed of each kernel, at most.
        kernels: Which of :data:`lq_kernels.tuned.kernels.TUNABLES`.
        known: Cuts of this weight at other numbers of tokens, which are timed as well: what was fastest for more tokens bounds
            the time of fewer.
    """
    options = {"candidates": candidates, "kernels": kernels, "known": known}
    proposed = [(kernel, cut) for kernel, cut, _ in proposals(weight, m, sm_count, **options)]  # type: ignore[arg-type]
    short, failed = _time(timer, weight, m, proposed, SHORT)
    finalists: list[tuple[str, Cut]] = []
    first = dict(reversed(proposed))  # by kernel, the model's choice
    for kernel in first:
        times = {cut: us for (name, cut), us in short.items() if name == kernel}
        best = sorted(times, key=lambda cut: times[cut])[:_FINALISTS]
        chosen = [first[kernel]] if first[kernel] in times else []
        finalists += [(kernel, cut) for cut in dict.fromkeys(best + chosen)]
    long, late = _time(timer, weight, m, finalists, LONG)
    found = []
    for kernel in dict.fromkeys(kernel for kernel, _ in long):
        cuts = {cut: us for (name, cut), us in long.items() if name == kernel}
        best_cut = min(cuts, key=lambda cut: cuts[cut])
        point = Point(m, cuts[best_cut], best_cut)
        config = config_of(kernel, weight, m, sm_count, best_cut)
        orders = [fields_of(each) for each in TUNABLES[kernel].orders(weight, m, config)]
        if orders:
            again, more = _time(timer, weight, m, [(kernel, cut) for cut in (best_cut, *orders)], LONG)
            late += more
            (_, order), us = min(again.items(), key=lambda item: item[1], default=((kernel, best_cut), 0.0))
            if order != best_cut and (kernel, best_cut) in again:
                # By how much it is faster is what counts: a time of another minute is another time.
                point = Point(m, cuts[best_cut] * us / again[kernel, best_cut], order)
        tried = sum(name == kernel for name, _ in short) + len(orders)
        found.append(Found(kernel, point, cuts.get(first[kernel]), tried))
    return found, failed + late


def _time(
    timer: Timer, weight: Weight, m: int, cuts: Sequence[tuple[str, Cut]], replays: int
) -> tuple[Mapping[tuple[str, Cut], float], list[Failed]]:
    if not cuts:
        return {}, []
    answers = dict(zip(cuts, timer.times(weight, m, cuts, replays), strict=True))
    times = {key: us for key, us in answers.items() if not isinstance(us, str) and us > 0}
    failed = [
        Failed(*key, why if isinstance(why, str) else f"took {why} us")
        for key, why in answers.items()
        if key not in times
    ]
    return times, failed

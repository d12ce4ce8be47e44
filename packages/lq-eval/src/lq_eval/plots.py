"""Figures drawn from records. matplotlib is imported when the first one is drawn.

The background is transparent and every colour stands out from white and from a dark page alike, so that one file serves a
page in light and in dark mode.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lq_formats import MissingPackageError, SpecError

from lq_eval.points import check_points, microseconds, speedup
from lq_eval.results import check_target

INK = "#777777"
LQ_COLOR = "#e8590c"
PEER_COLORS: Mapping[str, str] = MappingProxyType({"gemlite": "#2f81f7", "humming": "#1a9850", "tinygemm": "#a371f7"})
OTHER_COLORS = ("#c2549d", "#0f8f9c", "#8a7a1f", "#6f77c9")

_PANEL = (3.0, 2.6)
_LEGEND = 4.5  # inches that two labels a line need
_COLUMNS = 4
_FONT_SIZE = 9
_MOST_MARKERS = 20
# Text stays text, and the same records give the same bytes.
_STYLE = MappingProxyType({"svg.fonttype": "none", "svg.hashsalt": "lq", "font.size": _FONT_SIZE})


FORMATS = (".svg", ".png", ".pdf")


def check_figure(path: str | Path) -> None:
    """Raise SpecError unless a figure can be written at ``path``: before what it shows is measured. Nothing is created."""
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise SpecError(f"cannot write a figure to {str(target)!r}: its name must end in {', '.join(FORMATS)}")
    check_target(target)


@dataclass(frozen=True)
class Series:
    """One line of a panel.

    Attributes:
        label: For the legend.
        ours: Whether it is the registry's choice, which is drawn thick.
        values: Speedups or microseconds by number of tokens, ascending.
        dense: Whether it is the dense product, which is drawn dashed.
    """

    label: str
    ours: bool
    values: Mapping[int, float]
    dense: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a product and a shape.

    Attributes:
        title: The shape and the product.
        series: lq first, the dense product last.
    """

    title: str
    series: tuple[Series, ...]


def panels(
    rows: Iterable[Mapping[str, Any]],
    ops: Collection[str] = (),
    sizes: Collection[tuple[int, int]] = (),
    *,
    times: bool = False,
    baseline: str = "dense",
) -> tuple[Panel, ...]:
    """Group rows into panels by product and shape, in the order of their first rows.

    Args:
        rows: Rows of the ``gemm``, ``sweep`` or ``ggml`` benchmark; rows without a time are left out, and of a repeated
            point the last counts.
        ops: Keep these products; all if empty.
        sizes: Keep these ``(N, K)``; all if empty.
        times: Microseconds instead of speedups, and the dense product that lq's rows were measured beside as a series.
        baseline: What the dense product was.

    Raises:
        FormatError: If a row with a time lacks sizes, or has anything else for a number.
    """
    value = microseconds if times else speedup
    kept = [row for row in rows if value(row)]
    check_points(kept, "rows to draw")
    kept = [row for row in kept if (not ops or _op(row) in ops) and (not sizes or (row["n"], row["k"]) in sizes)]
    dtypes = {row.get("dtype", "") for row in kept}
    found: dict[tuple[str, int, int], dict[tuple[int, str], dict[int, float]]] = {}
    names: dict[tuple[int, int], str] = {}
    for row in kept:
        size = (row["n"], row["k"])
        names.setdefault(size, _shape(row))
        kernel = row.get("kernel") or "auto"
        rank = 0 if kernel == "auto" else 1
        dtype = f" {row.get('dtype', '')}".rstrip() if len(dtypes) > 1 else ""
        lines = found.setdefault((_op(row), *size), {})
        lines.setdefault((rank, ("lq", kernel)[rank] + dtype), {})[row["m"]] = float(value(row) or 0.0)
        if times and rank == 0 and row.get("dense_us"):
            lines.setdefault((2, baseline + dtype), {})[row["m"]] = float(row["dense_us"])
    order = list(dict.fromkeys(op for op, _, _ in found))
    return tuple(
        Panel(
            f"{names[n, k]}, {op}",
            tuple(
                Series(label, rank == 0, dict(sorted(lines[rank, label].items())), rank == 2)
                for rank, label in sorted(lines)
            ),
        )
        for (op, n, k), lines in sorted(found.items(), key=lambda item: order.index(item[0][0]))
    )


def plot_speedup(
    rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    title: str = "",
    *,
    ops: Collection[str] = (),
    sizes: Collection[tuple[int, int]] = (),
    baseline: str = "dense",
) -> Path:
    """Draw the speedup over the dense product against the number of tokens, one panel a shape and product.

    lq is a thick line, other libraries and forced kernels are thin ones, and the dense product is a line at 1.

    Args:
        rows: Rows of the ``gemm``, ``sweep`` or ``ggml`` benchmark; rows without a time are left out.
        path: File to write; its ending says the format (svg, png, pdf).
        title: Above the panels, for example the GPU's name.
        ops: Draw these products; all if empty.
        sizes: Draw these ``(N, K)``; all if empty.
        baseline: What the dense product was, for example ``"cuBLAS"``.

    Returns:
        The path.

    Raises:
        FormatError: If a row with a time lacks sizes, or has anything else for a number.
        SpecError: If no row has a time, the file format is unknown, or the file cannot be written.
        MissingPackageError: If matplotlib is not installed.
    """
    return _figure(panels(rows, ops, sizes), path, title, baseline, times=False)


def plot_times(
    rows: Iterable[Mapping[str, Any]],
    path: str | Path,
    title: str = "",
    *,
    ops: Collection[str] = (),
    sizes: Collection[tuple[int, int]] = (),
    baseline: str = "dense",
) -> Path:
    """Draw microseconds against the number of tokens, both logarithmic, one panel a shape and product.

    lq is a thick line, other libraries and forced kernels are thin ones, the dense product of lq's rows is a dashed one.
    Arguments, result and errors are those of :func:`plot_speedup`.
    """
    return _figure(panels(rows, ops, sizes, times=True, baseline=baseline), path, title, baseline, times=True)


def _figure(chosen: Sequence[Panel], path: str | Path, title: str, baseline: str, *, times: bool) -> Path:
    check_figure(path)
    if not chosen:
        raise SpecError("there is nothing to plot: no row has a time")
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("matplotlib", "a plot", "pip install matplotlib") from error

    colors = _colors(chosen)
    columns = min(_COLUMNS, len(chosen))
    lines = -(-len(chosen) // columns)
    target = Path(path)
    with matplotlib.rc_context(dict(_STYLE)):
        figure = Figure(figsize=(max(_PANEL[0] * columns, _LEGEND), _PANEL[1] * lines + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, columns, squeeze=False)
        for index, (axis, panel) in enumerate(zip(axes.flat, chosen, strict=False)):
            _draw(axis, panel, colors)
            if times:
                _scale_times(axis, panel)
            else:
                axis.axhline(1, color=INK, linewidth=1.0, linestyle="--", label=baseline)
                axis.set_ylim(bottom=0)
            if index % columns == 0:
                axis.set_ylabel("microseconds" if times else f"speedup over {baseline}", color=INK)
        for axis in list(axes.flat)[len(chosen) :]:
            axis.set_visible(False)
        handles = {
            label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        ordered = [label for label in dict.fromkeys((*colors, baseline)) if label in handles]
        figure.legend(
            [handles[label] for label in ordered],
            ordered,
            loc="outside lower center",
            ncols=min(len(ordered), 2 * columns),
            frameon=False,
            labelcolor=INK,
        )
        if title:
            figure.suptitle(title, color=INK)
        metadata = {"metadata": {"Date": None}} if target.suffix.lower() == ".svg" else {}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(target, dpi=150, transparent=True, **metadata)
        except (OSError, ValueError) as error:
            raise SpecError(f"cannot write {str(target)!r}: {error}") from error
    return target


def _draw(axis: Any, panel: Panel, colors: Mapping[str, str]) -> None:
    for series in reversed(panel.series):  # lq last, on top
        axis.plot(
            list(series.values),
            list(series.values.values()),
            color=colors[series.label],
            linewidth=2.6 if series.ours else 1.1,
            linestyle="--" if series.dense else "-",
            marker="o" if len(series.values) <= _MOST_MARKERS and not series.dense else "",
            markersize=3.0 if series.ours else 2.0,
            label=series.label,
        )
    axis.set_xscale("log", base=2)
    ms = [m for series in panel.series for m in series.values]
    ticks = [8**power for power in range(6) if min(ms) <= 8**power <= max(ms)] or sorted(set(ms))
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_title(panel.title, fontsize=_FONT_SIZE, color=INK)
    axis.set_xlabel("tokens (M)", color=INK)
    axis.grid(visible=True, color=INK, alpha=0.25, linewidth=0.6)
    axis.tick_params(colors=INK)
    for spine in axis.spines.values():
        spine.set_color(INK)


def _scale_times(axis: Any, panel: Panel) -> None:
    """Make the vertical axis logarithmic, with whole steps of 1, 2 and 5 around the times."""
    found = [value for series in panel.series for value in series.values.values()]
    steps = [step * 10**power for power in range(-1, 8) for step in (1, 2, 5)]
    first = max((index for index, step in enumerate(steps) if step <= min(found)), default=0)
    last = min((index for index, step in enumerate(steps) if step >= max(found)), default=len(steps) - 1)
    ticks = steps[first : last + 1]
    axis.set_yscale("log")
    axis.set_ylim(ticks[0], ticks[-1])
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def _colors(chosen: Sequence[Panel]) -> dict[str, str]:
    """Return a colour for each label, lq's first and the dense product's last; a library has the same one in every figure."""
    series = [series for panel in chosen for series in panel.series]
    labels = dict.fromkeys((not one.ours, one.label) for one in series if not one.dense)
    ours = [label for other, label in labels if not other]
    rest = [label for other, label in labels if other]
    spare = itertools.cycle(OTHER_COLORS)
    colors: dict[str, str] = {}
    for index, label in enumerate(ours):
        colors[label] = LQ_COLOR if index == 0 else next(spare)
    for label in rest:
        colors[label] = PEER_COLORS.get(label.split()[0]) or next(spare)
    return colors | {one.label: INK for one in series if one.dense}


def _op(row: Mapping[str, Any]) -> str:
    return str(row.get("op") or "q4_0")


def _shape(row: Mapping[str, Any]) -> str:
    size = f"{row['n']}x{row['k']}"
    name = row.get("shape") or size
    return size if name == size else f"{name} {size}"

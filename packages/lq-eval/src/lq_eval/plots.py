"""Figures drawn from records. matplotlib is imported when the first one is drawn."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lq_formats import MissingPackageError, SpecError

_PANEL = (4.2, 3.2)
_COLUMNS = 3


def plot_speedup(rows: Iterable[Mapping[str, Any]], path: str | Path, title: str = "") -> Path:
    """Draw the speedup over the dense product against the number of tokens, one panel a shape.

    Args:
        rows: Rows of the ``gemm`` or ``ggml`` benchmark; rows without a time are left out.
        path: File to write; its ending says the format (png, svg, pdf).
        title: Above the panels, for example the GPU's name.

    Returns:
        The path.

    Raises:
        SpecError: If no row has a time, or the file format is unknown.
        MissingPackageError: If matplotlib is not installed.
    """
    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.get("speedup"):
            shape = f"{row.get('shape') or 'q4_0 x q8_1'} ({row['n']}x{row['k']})"
            parts = (row.get("op", "q4_0"), row.get("kernel", ""), row.get("dtype", ""))
            panels[shape][" ".join(filter(None, parts))].append((row["m"], row["speedup"]))
    if not panels:
        raise SpecError("there is nothing to plot: no row has a time")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("matplotlib", "a plot", "pip install matplotlib") from error

    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, (shape, series) in zip(axes.flat, panels.items(), strict=False):
        for label, values in series.items():
            ordered = sorted(values)
            axis.plot([m for m, _ in ordered], [s for _, s in ordered], marker="o", markersize=3, label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(shape, fontsize="small")
        axis.set_xlabel("tokens (M)")
        axis.set_ylabel("speedup over dense")
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize="x-small")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    if title:
        figure.suptitle(title)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(target, dpi=150)
    except ValueError as error:
        raise SpecError(f"cannot write {target.name!r}: {error}") from error
    return target

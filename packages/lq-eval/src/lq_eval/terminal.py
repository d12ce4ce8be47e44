"""The terminal's side of every command: tables to standard output, progress to standard error, records to a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from lq_formats import SpecError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperCommand

from lq_eval.bench.shapes import check_tokens
from lq_eval.plots import check_figure
from lq_eval.results import append_record, check_target

STDOUT = Path("-")


def _recordable(path: Path | None) -> Path | None:
    """Refuse a file that no record can be appended to, before anything is measured."""
    if path == STDOUT:
        raise SpecError("--json -: the table goes to standard output; expected a file, for example results.jsonl")
    return _recordable_or_stdout(path)


def _recordable_or_stdout(path: Path | None) -> Path | None:
    if path not in (None, STDOUT):
        check_target(path)
    return path


def _drawable(path: Path | None) -> Path | None:
    """Refuse a file that no figure can be written to, before anything is measured."""
    if path is not None:
        check_figure(path)
    return path


def _limit(seconds: float | None) -> float | None:
    """Refuse what is no time: nothing is later than NaN, so no limit would be kept."""
    if seconds is not None and not seconds >= 0:
        raise SpecError(f"--seconds {seconds:g}: expected 0 or more")
    return seconds


Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU where there is one.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", callback=_recordable, help="Append a record of the result to this JSONL file."),
]
PrintJson = Annotated[
    Path | None,
    typer.Option(
        "--json",
        callback=_recordable_or_stdout,
        help="Alone: print one JSON document as the last line. FILE: append a record to it.",
    ),
]
Plot = Annotated[Path | None, typer.Option(callback=_drawable, help="Draw the speedup to this file (svg, png, pdf).")]
Figure = Annotated[Path, typer.Argument(callback=_drawable, help="The figure to write (svg, png, pdf).")]
Seconds = Annotated[float | None, typer.Option(callback=_limit, help="Stop starting new points after this time.")]
DemoSeconds = Annotated[
    float, typer.Option(callback=_limit, help="Evaluate no longer than this; fewer tokens on a slow machine.")
]


class BareJsonCommand(TyperCommand):
    """A command whose ``--json`` may stand alone: ``ppl OUT --json`` prints a document, ``--json FILE`` records."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a ``--json`` without a file the value :data:`STDOUT`."""
        following = [*args[1:], "--"]
        bare = [arg == "--json" and after.startswith("-") for arg, after in zip(args, following, strict=True)]
        return super().parse_args(
            ctx, [f"--json={STDOUT}" if alone else arg for arg, alone in zip(args, bare, strict=True)]
        )


def console() -> Console:
    """Return the console for tables."""
    terminal = Console()
    # A pipe or a CI log has no width; 80 columns would fold every table.
    return terminal if terminal.is_terminal else Console(width=160)


def progress_bar() -> Progress:
    """Return a progress bar that vanishes when it is done, and does not appear in a log."""
    terminal = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)


def save(path: Path | None, bench: str, rows: Sequence[dict[str, Any]]) -> None:
    """Append a record to ``path``, if there is one."""
    if path is not None:
        append_record(path, bench, rows)


def split(text: str) -> tuple[str, ...]:
    """Read a comma-separated list, which may be empty."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def listed(text: str, what: str) -> tuple[str, ...]:
    """Read a comma-separated list of at least one item.

    Args:
        text: The list.
        what: What an item is, for the error.

    Raises:
        SpecError: If there is no item: a command that measures nothing has not succeeded.
    """
    found = split(text)
    if not found:
        raise SpecError(f"no {what} in {text!r}: expected at least one, separated by commas")
    return found


def token_counts(text: str) -> tuple[int, ...]:
    """Read a comma-separated list of numbers of tokens.

    Raises:
        SpecError: If an item is no integer or below 1, or there is none.
    """
    try:
        found = tuple(int(part) for part in listed(text, "number of tokens"))
    except ValueError as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{text!r}: expected integers separated by commas") from None
    check_tokens(found)
    return found


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()

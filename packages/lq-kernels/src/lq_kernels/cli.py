"""The ``lq-kernels`` command: ``lq-kernels tune`` measures which cuts of the kernels are fastest on this GPU.

A named error ends it with one line on standard error and exit status 2. Results go to standard output, progress to standard
error.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lq_formats import CompileError, DeviceError, LQError, SpecError

from lq_kernels import env
from lq_kernels.prepare import Unit, compile_units, into_cache
from lq_kernels.problem import Arch
from lq_kernels.tuned import run
from lq_kernels.tuned.lookup import shipped, user_path
from lq_kernels.tuned.search import CANDIDATES
from lq_kernels.tuned.shapes import model_shapes, parse_counts, parse_shapes
from lq_kernels.tuned.table import check_target
from lq_kernels.tuned.worker import WorkerTimer

_DESCRIPTION = """\
Measure which cuts of the Hopper kernels are fastest on this GPU, and write them to a table that lq reads from then on
(the folder 'tuned' of lq's cache, LQ_CACHE_DIR). Products that no table holds go by lq's cost models. Nothing else changes:
results are the same whether a weight was tuned or not, but for the order of sums.

  lq-kernels tune --model path/to/model            the linear layers of a transformers model, from its config.json
  lq-kernels tune --shape 4096x4096,llama-3-8b     sizes (out x in features) and models by name
  lq-kernels tune --device-preset h200 --budget 500 --output h200.json
                                                   what the table that ships for H200s holds, the most important first

A run adds to what the file holds: measured points are not measured again unless --again is given, so a run that was
interrupted, or ran out of its budget, goes on when the same command is given again. Points that were measured with other
sources of a kernel are dropped. Cuts run in a process of their own: one that fails, hangs or gives other results than the
rest is reported and left out.
"""

_FORMS = {
    "bits": "4",
    "group_size": "128",
    "zeros": "no",
    "activation": "none",
    "tokens": ",".join(map(str, run.TOKENS)),
}
"""Options that say in which forms shapes are measured, and what holds where they are not given."""

_BROKEN_PIPE = 128 + 13
"""What a shell reports of a command that SIGPIPE ended."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with status 2 on a named error and on wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        _tune(options)
        sys.stdout.flush()  # what is still in the buffer has no reader either, if the last line had none
    except LQError as error:
        if options.debug:
            raise
        sys.stderr.write(f"lq-kernels: {type(error).__name__}: {error}\n")
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader of the results, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
        raise SystemExit(_BROKEN_PIPE) from None
    except KeyboardInterrupt:
        sys.stderr.write("\nlq-kernels: stopped; what was measured has been written\n")
        raise SystemExit(130) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lq-kernels", description="Matrix products with low-bit weights.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "tune",
        help="measure the fastest cuts on this GPU",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--shape", action="append", default=[], metavar="NxK,...", help="sizes (out x in features), names of models")
    add("--model", action="append", default=[], type=Path, metavar="PATH", help="a model's folder or config.json")
    add("--device-preset", choices=("h200", "h100"), help="the shapes and forms of the table that ships for this class")
    add("--bits", metavar="LIST", help="of the weights: 4, 8 or both (default: 4)")
    add("--group-size", metavar="LIST", help="of 4-bit weights; -1: one scale a row (default: 128)")
    add("--zeros", choices=("no", "yes", "both"), help="4-bit weights with zero points (default: no)")
    add(
        "--activation",
        metavar="LIST",
        help="what tokens are quantized to: none, int8, fp8, q8_1 (default: none)",
    )
    add("--tokens", metavar="LIST", help="numbers of tokens (default: 1 to 4096, 16 of them)")
    add("--budget", type=float, metavar="SECONDS", help="start no new measurement after so long (default: no limit)")
    add("--candidates", type=int, default=CANDIDATES, metavar="N", help="cuts of each kernel (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write here (default: the user's table of this GPU)")
    add("--again", action="store_true", help="measure again what the file holds")
    add("--list", action="store_true", help="print what would be measured, and stop; needs no GPU")
    add("--debug", action="store_true", help="show tracebacks of named errors")
    return parser


def _tune(options: argparse.Namespace) -> None:
    started = time.monotonic()
    tasks = _tasks(options)
    if options.candidates < 1:
        raise SpecError(f"--candidates {options.candidates}: expected at least 1")
    if options.budget is not None and not (math.isfinite(options.budget) and options.budget >= 0):
        raise SpecError(f"--budget {options.budget:g}: expected a finite number of seconds, at least 0")
    if options.list:
        sys.stdout.writelines(f"{weight} M={m}\n" for weight, m in tasks)
        return
    if options.output is None and env.cache_disabled():
        raise SpecError(
            "LQ_DISABLE_CACHE=1: lq would not read the user's table; pass --output, or unset LQ_DISABLE_CACHE"
        )
    check_target(options.output or user_path("this GPU"))  # whose name the worker finds out
    with WorkerTimer() as timer:
        device = timer.device
        if options.device_preset and shipped(device.name)[:1] != (options.device_preset,):
            raise DeviceError(f"--device-preset {options.device_preset}: this GPU is {device.name}")
        path = options.output or user_path(device.name)
        table = run.opened(path, device.name, device.sm_count)
        if not options.again:
            tasks = run.without_measured(tasks, table, device.sm_count)
        _say(f"{device.name}, {device.sm_count} multiprocessors; {len(tasks)} products to measure, into {path.name}")
        if not tasks:
            return
        deadline = started + options.budget if options.budget is not None else float("inf")
        stamp = run.stamp(device.name, device.sm_count, device.torch, device.driver)
        job = run.Run(table, path, stamp, timer, options.candidates, options.again)
        units = run.compilations(tasks, device.sm_count, options.candidates, job.kernels)
        arch = Arch("cuda", device.capability, device.name, device.sm_count)
        compile_units(
            units, _lenient(into_cache(arch)), progress=lambda done, total, what: _bar(done, total, f"compiled {what}")
        )
        _clear()
        reported, done = 0, 0
        for done, (weight, m), found in job.measure(tasks, deadline):
            _clear()
            for one in found:
                model = f"(model's cut {one.model_us:.2f})" if one.model_us else "(model's cut failed)"
                sys.stdout.write(f"{weight} M={m} {one.kernel} {one.point.us:.2f} us {model}\n")
            for failed_weight, failed_m, failure in job.failures[reported:]:
                cut = " ".join(f"{name}={value}" for name, value in failure.cut)
                _say(f"{failed_weight} M={failed_m} {failure.kernel} {cut}: {failure.reason}")
            sys.stdout.flush()
            reported = len(job.failures)
            _bar(done, len(tasks), f"{time.monotonic() - started:.0f} s")
        _clear()
        left = len(tasks) - done
        rest = f"; {left} left, give the same command again to go on" if left else ""
        _say(f"{done} products measured, {len(job.failures)} cuts failed, in {path.name}{rest}")


def _tasks(options: argparse.Namespace) -> list[run.Task]:
    if options.device_preset:
        given = [name for name in ("shape", "model", *_FORMS) if getattr(options, name) not in (None, [])]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise SpecError(f"--device-preset says what is measured; leave out {names}")
        return run.device_preset()
    shapes = [shape for text in options.shape for shape in parse_shapes(text)]
    shapes += [shape for path in options.model for shape in model_shapes(path)]
    if not shapes:
        raise SpecError("nothing to tune; give --shape, --model or --device-preset")
    form = {name: usual if (given := getattr(options, name)) is None else given for name, usual in _FORMS.items()}
    activations = ["" if each == "none" else each for each in form["activation"].split(",")]
    tasks, skipped = run.requested(
        tuple(dict.fromkeys(shapes)),
        parse_counts(form["tokens"], "--tokens"),
        bits=parse_counts(form["bits"], "--bits"),
        group_sizes=parse_counts(form["group_size"], "--group-size", or_row=True),
        symmetric={"no": (True,), "yes": (False,), "both": (True, False)}[form["zeros"]],
        activations=activations,
    )
    for reason in skipped:
        _say(f"left out: {reason}")
    return tasks


def _lenient(compiler: Callable[[Unit], object]) -> Callable[[Unit], None]:
    """Let what does not compile fail, and be reported, where it is timed."""

    def compile_one(unit: Unit) -> None:
        with contextlib.suppress(CompileError):
            compiler(unit)

    return compile_one


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _bar(done: int, total: int, what: str) -> None:
    """Show progress: a line that is written over on a terminal, and one line in ten steps elsewhere."""
    if sys.stderr.isatty():
        filled = 30 * done // total
        sys.stderr.write(f"\r\x1b[K[{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {what}")
        sys.stderr.flush()
    elif done == total or done % max(1, total // 10) == 0:
        _say(f"{done}/{total} {what}")


def _clear() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")

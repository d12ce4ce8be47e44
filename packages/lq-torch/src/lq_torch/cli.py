"""The ``lq`` command: ``lq quantize MODEL OUT`` makes an lq checkpoint of a Hugging Face model.

A named error ends it with one line on standard error and exit status 1. Results go to standard output, progress to
standard error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lq_formats import LQError

from lq_torch.cli_quantize import ALGORITHMS, DTYPES, SCHEMES, quantize


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with status 1 on a named error and 2 on wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        quantize(options)
    except LQError as error:
        if options.debug:
            raise
        sys.stderr.write(f"lq: {type(error).__name__}: {error}\n")
        raise SystemExit(1) from None


def _name(text: str) -> str:
    """Refuse the empty text of an unset variable: as a path it would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def _path(text: str) -> Path:
    return Path(_name(text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lq", description="Low-bit weights for PyTorch language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "quantize",
        help="quantize a Hugging Face model into a folder",
        description="Quantize every Linear layer of a Hugging Face model but its output head, and save it.",
    )
    add = command.add_argument
    add("model", metavar="MODEL", type=_name, help="a model's folder, or its name on the hub")
    add("out", metavar="OUT", type=_path, help="the folder to write")
    add("--scheme", choices=SCHEMES, help="bits of a weight, or a ggml type; int8 has one scale a row (default: int4)")
    add("--group-size", type=int, help="in features per scale; -1: one scale a row (default: 128)")
    add("--target-bits", type=float, metavar="BITS", help="instead: bits and groups by layer, so many bits on average")
    add("--asymmetric", action="store_true", help="with zero points")
    add("--algorithm", choices=ALGORITHMS, help="what chooses the codes (default: mse)")
    add(
        "--calibration",
        type=_path,
        metavar="FILE",
        help="a UTF-8 text like what the model will read: for gptq, awq, --target-bits and the "
        "ggml types that search their scales (q4_0, iq4_nl, q4_k, q5_k, q6_k)",
    )
    rotate = command.add_mutually_exclusive_group()
    rotate.add_argument(
        "--rotate", action="store_const", const="heads", help="first rotate the residual stream and the heads' values"
    )
    rotate.add_argument(
        "--rotate-stream", action="store_const", const="stream", dest="rotate", help="the residual stream only"
    )
    add("--windows", type=int, metavar="N", help="calibration windows (default: 128, or as many as the text has)")
    add("--window-length", type=int, metavar="T", help="tokens in each (default: 2048, or the model's context)")
    add("--batch-size", type=int, metavar="N", help="windows at a time (default: 8)")
    add("--exclude", metavar="REGEX", help="leave out layers whose path has a match")
    add("--scale-dtype", choices=tuple(DTYPES), help="of scales and zeros (default: the weights')")
    add("--dtype", choices=tuple(DTYPES), help="load and compute in this dtype (default: the one it was saved in)")
    add("--device", help="where to compute (default: the GPU where there is one)")
    add("--offload", action="store_true", help="keep activations in host memory while calibrating")
    add("--resume", type=_path, metavar="FOLDER", help="keep finished blocks here, and go on from them")
    add("--debug", action="store_true", help="show tracebacks of named errors")
    return parser

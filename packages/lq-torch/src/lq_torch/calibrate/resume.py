"""The state of an interrupted calibration: one lq checkpoint per finished block, in a folder that the user names.

    calibration.json            what the run is: configuration, options, tokens, model (a sample of the bits of its weights)
    sensitivity.json            what mixed precision has measured, layer by layer, and of which model and tokens
    block-00000/                written under a name of its own, then renamed: a block is there whole or not at all
        lq.json, model-...safetensors
        report.json             the reports of its layers

Activations are not stored: running the finished blocks again gives the same ones. Processes of the same run may share a
folder: they make the same bits, and the first to finish a block keeps it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any

from lq_formats import FormatError, SpecError
from torch import Tensor, nn

from lq_torch.calibrate.options import AWQOptions, GPTQOptions
from lq_torch.calibrate.report import LayerReport
from lq_torch.checkpoint import load, save_pretrained
from lq_torch.config import WeightConfig

_STATE, _REPORT, _SENSITIVITY, _VERSION = "calibration.json", "report.json", "sensitivity.json", 1
_SAMPLE = 4096  # values of every parameter that go into the model's fingerprint


def _make(folder: Path) -> None:
    """Make the folder that keeps a state, with those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"resume={str(folder)!r} cannot be made a folder: {error.strerror or error}") from None


class ResumeFolder:
    """A folder of finished blocks.

    Args:
        folder: Made if needed.
        model: The dense model.
        tokens: Calibration windows.
        configs: What each layer becomes.
        gptq: Options of GPTQ, or None.
        awq: Options of AWQ, or None.

    Raises:
        SpecError: If the folder holds the state of another run.
        FormatError: If its state cannot be read, or is missing where there are blocks.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        tokens: Tensor,
        configs: Mapping[str, WeightConfig],
        gptq: GPTQOptions | None,
        awq: AWQOptions | None,
    ) -> None:
        self._folder = Path(folder)
        _make(self._folder)
        described = {path: config.to_dict() for path, config in configs.items()}
        state = {
            "version": _VERSION,
            "config": hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest(),
            "gptq": gptq and gptq.to_dict(),
            "awq": awq and awq.to_dict(),
            "tokens": _digest(tokens),
            "model": _model_digest(model),
        }
        file = self._folder / _STATE
        blocks = sorted(self._folder.glob("block-*"))  # before the state: other processes write that first
        if file.exists():
            _check_state(file, _read(file), state)
            return
        if blocks:
            raise FormatError(
                f"{self._folder} holds {blocks[0].name}, but no {_STATE}, which says of what model, tokens and options; delete "
                "the blocks, or name an empty folder"
            )
        _write(file, json.dumps(state, indent=1) + "\n")

    def has(self, number: int) -> bool:
        """Return whether a block is finished."""
        return self._block(number).is_dir()

    def load(self, number: int, block: nn.Module) -> list[LayerReport]:
        """Put the weights of a finished block into ``block``; return its reports."""
        folder = self._block(number)
        reports = _read(folder / _REPORT)
        try:
            found = [LayerReport(**report) for report in reports]
        except TypeError as error:
            raise FormatError(f"{folder / _REPORT}: not the report of a block ({error}); delete {folder}") from None
        load(folder, block, device=next(block.parameters()).device)
        return found

    def save(self, number: int, block: nn.Module, reports: Sequence[LayerReport]) -> None:
        """Write a finished block, unless another process of this run has."""
        partial = self._folder / f"partial-{number:05d}-{token_hex(8)}"
        try:
            save_pretrained(block, partial)
            (partial / _REPORT).write_text(json.dumps([asdict(report) for report in reports]), encoding="utf-8")
            partial.rename(self._block(number))
        except Exception:  # also where the other one has removed the partial folder, below
            if not self.has(number):
                shutil.rmtree(partial, ignore_errors=True)
                raise
        # The block is there: nobody needs what others are writing of it, or left when they were killed.
        for left in self._folder.glob(f"partial-{number:05d}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _block(self, number: int) -> Path:
        return self._folder / f"block-{number:05d}"


class SensitivityFile:
    """What has been measured of each layer, kept as it is measured.

    Args:
        folder: Made if needed; None keeps nothing.
        model: The dense model.
        tokens: What it is measured on.
        gptq: Options of GPTQ, or None.

    Attributes:
        known: Nats a token by path.

    Raises:
        SpecError: If the folder holds measurements of another model, or on other tokens.
        FormatError: If they cannot be read.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, model: nn.Module, tokens: Tensor, gptq: GPTQOptions | None
    ) -> None:
        self.known: dict[str, float] = {}
        self._file = None if folder is None else Path(folder) / _SENSITIVITY
        if self._file is None:
            return
        _make(self._file.parent)
        self._state = {
            "version": _VERSION,
            "gptq": gptq and gptq.to_dict(),
            "tokens": _digest(tokens),
            "model": _model_digest(model),
        }
        if not self._file.exists():
            return
        saved = _read(self._file)
        _check_state(self._file, saved, self._state)
        layers = saved.get("layers")
        if not isinstance(layers, dict) or not all(type(value) is float and value >= 0 for value in layers.values()):
            raise FormatError(f"{self._file}: its layers are no measurements; delete it")
        self.known.update(layers)

    def add(self, path: str, value: float) -> None:
        """Keep the measurement of a layer."""
        self.known[path] = value
        if self._file is not None:
            _write(self._file, json.dumps({**self._state, "layers": self.known}, indent=1) + "\n")


def _check_state(file: Path, saved: Any, state: Mapping[str, Any]) -> None:
    differs = [name for name in state if not isinstance(saved, dict) or saved.get(name) != state[name]]
    if differs:
        raise SpecError(
            f"{file.parent} holds the state of another calibration run: {', '.join(differs)} differ; resume with the same "
            "model, tokens and options, or name an empty folder"
        )


def _write(file: Path, text: str) -> None:
    """Write a file whole or not at all, whoever else writes it."""
    partial = file.with_name(f"{file.name}.{token_hex(8)}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous()
    return hashlib.sha256(f"{tuple(content.shape)}".encode() + content.numpy().tobytes()).hexdigest()


def _model_digest(model: nn.Module) -> str:
    """Return a fingerprint of names, shapes, dtypes and a sample of the values of all parameters.

    Of their bits: weights that were made anew and differ by rounding are another model, such as those of a rotation on
    another processor or with another number of threads.
    """
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)].float().cpu()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{file}: not the state of a calibration run ({error}); delete its folder") from None

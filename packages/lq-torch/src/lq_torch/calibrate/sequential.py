"""Calibration block by block: each is quantized with what the quantized blocks before it make of the calibration text.

Of the model, one block at a time is on the computing device, with its activations (or a batch of them, where they are
offloaded). A block that is done is written to the resume folder, if there is one; a run that starts with that folder
loads it instead of quantizing again, and goes on with the same bits as if it had never stopped.
"""

import copy
import os
import time
from collections.abc import Callable, Mapping

import torch
from lq_formats import SpecError
from torch import Tensor, nn

from lq_torch.arguments import check_module, parse_device
from lq_torch.calibrate.blocks import Stream, evaluation, find_blocks, record_stream, split_batches
from lq_torch.calibrate.layers import quantize_blocks_together, quantize_together
from lq_torch.calibrate.moments import Moments
from lq_torch.calibrate.options import AWQOptions, GPTQOptions
from lq_torch.calibrate.report import CalibrationReport, LayerReport
from lq_torch.calibrate.resume import ResumeFolder
from lq_torch.calibrate.smoothing import shared_parameters, smooth
from lq_torch.calibrate.stages import find_stages, measure
from lq_torch.calibrate.target import Target, searched_type, target_of
from lq_torch.config import WeightConfig
from lq_torch.quantize import FilterFn, check_linear, named, select_linears, why_none
from lq_torch.tensors import LowBitTensor

IMATRIX = "imatrix"
Progress = Callable[[int, int, LayerReport], None]


def calibrate(
    model: nn.Module,
    tokens: Tensor,
    config: WeightConfig | Mapping[str, WeightConfig],
    *,
    gptq: GPTQOptions | None,
    awq: AWQOptions | None,
    filter_fn: FilterFn | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    offload: bool = False,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Quantize a decoder model in place with calibration data; see :func:`lq_torch.calibrate.gptq`.

    Without options of an algorithm, weights become ggml blocks; see :func:`lq_torch.calibrate.imatrix`.
    """
    started = time.monotonic()
    check_module(model, "calibration")
    for options, kind in ((gptq, GPTQOptions), (awq, AWQOptions)):
        if options is not None and not isinstance(options, kind):
            raise SpecError(f"options are a {type(options).__name__}: expected {kind.__name__}(...)")
    batches = split_batches(tokens, batch_size)
    layers, configs = _checked(model, config, filter_fn, blocks=gptq is None and awq is None)
    blocks = find_blocks(model)
    home = next(blocks[0][1].parameters()).device
    where = home if device is None else parse_device(device)
    folder = None if resume is None else ResumeFolder(resume, model, tokens, configs, gptq, awq)
    calibration = _Calibration(configs, gptq, awq, shared_parameters(model), progress)
    resumed = 0
    with torch.no_grad(), evaluation(model):
        stream = record_stream(model, blocks, batches, where, torch.device("cpu") if offload else where)
        exact = stream.copy() if gptq is not None and gptq.correct_inputs else None
        for number, (path, block) in enumerate(blocks):
            inside = {
                name: layers.pop(f"{path}.{name}") for name, _ in block.named_modules() if f"{path}.{name}" in layers
            }
            block.to(where)
            last = number == len(blocks) - 1
            behind = None if exact is None or last else exact.copy()
            if behind is not None:
                behind.advance(
                    number, path, block
                )  # before anything is folded, so that a resumed run sees the same bits
            if folder is not None and folder.has(number):
                for report in folder.load(number, block):
                    calibration.report(report)
                resumed += 1
            else:
                before = len(calibration.reports)
                calibration.quantize_block(number, path, block, inside, stream, exact)
                if folder is not None:
                    folder.save(number, block, calibration.reports[before:])
            if not last:
                stream.advance(number, path, block)
            exact = behind
            block.to(home)
        for path, layer in layers.items():
            calibration.without_data(path, layer, 0, "it is outside of the decoder blocks")
    return CalibrationReport(tuple(calibration.reports), time.monotonic() - started, resumed)


class _Calibration:
    """The settings of a run, and the reports of what is done."""

    def __init__(
        self,
        configs: Mapping[str, WeightConfig],
        gptq: GPTQOptions | None,
        awq: AWQOptions | None,
        shared: set[int],
        progress: Progress | None,
    ) -> None:
        self.reports: list[LayerReport] = []
        self._configs, self._gptq, self._awq = configs, gptq, awq
        self._shared = shared
        self._progress = progress
        names = [name for name, options in (("awq", awq), ("gptq", gptq)) if options is not None]
        self._algorithm = "+".join(names) or IMATRIX

    def report(self, layer: LayerReport) -> None:
        """Add the report of a layer that is done."""
        self.reports.append(layer)
        if self._progress is not None:
            self._progress(len(self.reports), len(self._configs), layer)

    def quantize_block(
        self,
        number: int,
        path: str,
        block: nn.Module,
        linears: Mapping[str, nn.Linear],
        stream: Stream,
        exact: Stream | None,
    ) -> None:
        """Quantize the layers of one block, stage by stage, with what enters them, and what would in the float model."""
        runs = stream.runs(number, block)
        exponents: dict[str, float] = {}
        stages = find_stages(linears, runs[0]) if linears else []
        if self._awq is not None and linears:
            targets = {name: self._target(f"{path}.{name}", layer) for name, layer in linears.items()}
            with named(path):
                exponents = smooth(block, linears, runs, self._shared, targets, self._awq)
        float_block = None if exact is None else copy.deepcopy(block)
        for stage in stages:
            members = {name: linears[name] for name in stage}
            with named(path):
                if exact is None or float_block is None:
                    found = measure(members, runs)
                else:
                    originals = {name: float_block.get_submodule(name) for name in stage}
                    found = measure(members, runs, originals, exact.runs(number, float_block))
            for moments in found:
                same: dict[WeightConfig, dict[str, nn.Linear]] = {}
                for name in moments.members:
                    same.setdefault(self._configs[f"{path}.{name}"], {})[name] = members.pop(name)
                for layers in same.values():
                    self._quantize(path, layers, moments, exponents)
            for name, layer in members.items():
                self.without_data(f"{path}.{name}", layer, 0, "no calibration token reaches it")

    def without_data(self, path: str, layer: nn.Linear, tokens: int, reason: str) -> None:
        """Quantize a layer as quantize_ does, and say why."""
        with named(path):
            weight = self._configs[path].quantize(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        note = f"{reason}: quantized without data"
        self.report(LayerReport(path, "data-free", tokens, None, _bits(weight), note=note))

    def _quantize(
        self, path: str, layers: Mapping[str, nn.Linear], moments: Moments, exponents: Mapping[str, float]
    ) -> None:
        """Quantize layers of a block that share their input and their configuration."""
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        first, layer = next(iter(layers.items()))
        with named(f"{path}.{first}"):
            outcomes = (
                quantize_blocks_together(weights, moments, searched_type(self._configs[f"{path}.{first}"]))
                if self._algorithm == IMATRIX
                else quantize_together(weights, moments, self._target(f"{path}.{first}", layer), self._gptq)
            )
        for name, layer in layers.items():
            if outcomes is None:
                reason = "the Hessian of its inputs has no Cholesky factor, however damped"
                self.without_data(f"{path}.{name}", layer, moments.tokens, reason)
                continue
            done = outcomes[name]
            layer.weight = nn.Parameter(done.weight, requires_grad=False)
            self.report(
                LayerReport(
                    path=f"{path}.{name}",
                    algorithm=self._algorithm,
                    tokens=moments.tokens,
                    error=done.error,
                    bits_per_weight=_bits(done.weight),
                    damping=done.damping,
                    exponent=exponents.get(name),
                    note=done.note,
                )
            )

    def _target(self, path: str, layer: nn.Linear) -> Target:
        return target_of(self._configs[path], layer.weight.dtype)


def _bits(weight: LowBitTensor) -> float:
    return weight.saved_nbytes * 8 / max(weight.numel(), 1)


def _checked(
    model: nn.Module,
    config: WeightConfig | Mapping[str, WeightConfig],
    filter_fn: FilterFn | None,
    *,
    blocks: bool,
) -> tuple[dict[str, nn.Linear], dict[str, WeightConfig]]:
    """Return the layers to quantize and their configurations by path, once it is certain that all can be quantized."""
    if isinstance(config, Mapping):
        if filter_fn is not None:
            raise SpecError("a configuration for each layer says which layers: leave filter_fn out")
        wanted = config
        layers = dict(select_linears(model, lambda _, path: path in wanted))
        if missing := sorted(wanted.keys() - layers.keys()):
            raise SpecError(f"config names {missing[0]!r}, which is no dense Linear layer of the model")
        configs = {path: wanted[path] for path in layers}
    else:
        layers = dict(select_linears(model, filter_fn))
        configs = dict.fromkeys(layers, config)
    if not layers:
        raise SpecError(f"there is no Linear layer to calibrate: {why_none(model, filter_fn)}")
    for path, layer in layers.items():
        if not isinstance(chosen := configs[path], WeightConfig):
            raise SpecError(f"config is a {type(chosen).__name__}: expected one such as Int4WeightOnlyConfig()")
        check_linear(path, layer)
        with named(path):
            if blocks:
                searched_type(chosen)
            else:
                target_of(chosen, layer.weight.dtype)
            chosen.validate(layer.weight)
    return layers, configs

"""Loading the models that are evaluated, and counting what they take.

A model is a folder in the Hugging Face layout, a folder written by :func:`lq_torch.save_pretrained`, one that another
library quantized (:func:`lq_torch.import_pretrained`), a GGUF file (:func:`lq_torch.load_gguf`), or a name on the hub. A folder
is never looked up on the network.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lq_formats import DTypeError, LQError, SpecError, UnsupportedError
from lq_torch import import_pretrained, load, load_gguf
from lq_torch.integrations.causal_lm import first_sentence
from lq_torch.interop import is_foreign
from torch import nn

from lq_eval.errors import ModelLoadError
from lq_eval.schemes import weight_nbytes

_LQ_INDEX = "lq.json"  # what lq_torch.save_pretrained writes beside the weights
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer.

    Attributes:
        name: What the user asked for.
        model: In evaluation mode, on the device it runs on.
        tokenizer: Its tokenizer.
        quantized: Whether it was saved quantized.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    quantized: bool


@dataclass(frozen=True)
class ModelSize:
    """What a model takes.

    Attributes:
        linear_bytes: Bytes of the quantized linear weights (codes, scales and zeros).
        linear_weights: Number of weights in them.
        total_bytes: Bytes of all parameters and saved buffers; dense floats counted at ``dense_bytes`` each.
    """

    linear_bytes: int
    linear_weights: int
    total_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """True bits of a quantized weight; NaN if none is quantized."""
        return self.linear_bytes * 8 / self.linear_weights if self.linear_weights else float("nan")


def default_device(device: str | None = None) -> torch.device:
    """Return the device to run on: the one asked for, else the GPU where there is one, else the CPU.

    Raises:
        SpecError: If ``device`` is not a device, is of another type than cpu and cuda, or is a GPU that this machine lacks.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SpecError(f"unknown device {device!r}: expected for example cpu, cuda or cuda:1") from error
    if chosen.type not in DEVICE_TYPES:
        raise SpecError(f"device {device!r}: lq-eval measures on {' and '.join(DEVICE_TYPES)} only; use --device cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise SpecError(f"device {device!r}: torch finds {torch.cuda.device_count()} CUDA GPUs here; use --device cpu")
    return chosen


def default_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of activations: the one asked for, else bfloat16 on a GPU and float32 on a CPU.

    Raises:
        DTypeError: If the name is unknown.
    """
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise DTypeError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_model(
    source: str | Path, *, device: torch.device, dtype: torch.dtype, float_model: str | Path | None = None
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        source: A folder, a GGUF file, or a name on the Hugging Face hub.
        device: Where to put it.
        dtype: dtype of its weights and activations. Codes and scales of an lq folder stay as they were saved.
        float_model: What a quantized model was made of, with a tokenizer for it where it has none of its own.

    Raises:
        ModelLoadError: If it cannot be found or read, or its files lack weights or have them in other sizes than its
            configuration says.
        LQError: If a quantized folder is damaged or of an unknown version.
    """
    local = os.path.isdir(source)
    if saved_quantized(source):
        return _load_quantized(Path(source), device, dtype, float_model)
    if local and not (Path(source) / "config.json").is_file():
        raise ModelLoadError(f"cannot load the folder {str(source)!r}: it has no config.json")
    if not local and str(source).endswith(".gguf"):
        raise ModelLoadError(f"there is no file {str(source)!r}")
    if not local and str(source).startswith(("/", ".", "~")):
        raise ModelLoadError(f"there is no folder {str(source)!r}; give a model's folder or its name on the hub")
    where = f"the folder {str(source)!r}" if local else f"the hub name {str(source)!r} (there is no such folder)"
    with _quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=local)
            model, report = AutoModelForCausalLM.from_pretrained(
                str(source), dtype=dtype, local_files_only=local, ignore_mismatched_sizes=True, output_loading_info=True
            )
        except LQError:
            raise
        except Exception as error:  # a damaged file raises what its reader raises: a dozen unrelated classes
            raise ModelLoadError(f"cannot load {where}: {first_sentence(error)}") from error
    if problem := _unloaded(report):
        raise ModelLoadError(f"cannot load {where}: {problem}; take config.json and the weights of one model")
    return LoadedModel(str(source), model.to(device).eval(), _unlimited(tokenizer), quantized=False)


def saved_quantized(source: str | Path) -> bool:
    """Return whether ``source`` is a GGUF file, or a folder with quantized weights: one that lq saved, or another library."""
    folder = Path(source)
    # Of a hub's name, or one that is too long for a file's, it says no; Path.is_dir raises.
    return _is_gguf(folder) or (os.path.isdir(folder) and ((folder / _LQ_INDEX).is_file() or is_foreign(folder)))


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens a model can read at once, if its configuration says so; more than that has no meaning to it."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name in _CONTEXT_NAMES:
            size = getattr(part, name, None)
            if type(size) is int and size > 0:
                return max(size, _stretched(part, size))
    return None


def _stretched(config: Any, size: int) -> int:
    """Return the context that scaled rotary embeddings reach; ``size`` may be the one before scaling."""
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor")
    if not isinstance(factor, int | float):  # none, or other parameters for each type of layer
        return size
    original = rope.get("original_max_position_embeddings")
    return int(factor * (original if type(original) is int else size))


def _unloaded(report: Mapping[str, Any]) -> str:
    """Say which weights transformers left at random values, if any: their files lack them, or have other sizes."""
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        found, expected = ("x".join(map(str, shape)) for shape in (found, expected))
        more = f" ({len(mismatched) - 1} more weights differ)" if len(mismatched) > 1 else ""
        return f"{name} is {found} in the files and {expected} by config.json{more}"
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"the files lack {missing[0]}{more}, which config.json asks for"
    return ""


def _is_gguf(source: Path) -> bool:
    return source.suffix == ".gguf" and os.path.isfile(source)


def _load_quantized(
    source: Path, device: torch.device, dtype: torch.dtype, float_model: str | Path | None
) -> LoadedModel:
    with _quiet_transformers():
        tokenizer = _tokenizer_of(source, float_model)
        if _is_gguf(source):
            model = load_gguf(source, device=device, dtype=dtype)
        else:
            ours = (source / _LQ_INDEX).is_file()
            model = (load if ours else import_pretrained)(source, device=device, dtype=dtype)
    return LoadedModel(str(source), model.eval(), _unlimited(tokenizer), quantized=True)


def _tokenizer_of(source: Path, float_model: str | Path | None) -> Any:
    from transformers import AutoTokenizer

    place, options = (source.parent, {"gguf_file": source.name}) if _is_gguf(source) else (source, {})
    try:
        return AutoTokenizer.from_pretrained(str(place), local_files_only=True, **options)
    except Exception as error:  # as above
        if float_model is not None:
            try:
                return AutoTokenizer.from_pretrained(str(float_model), local_files_only=os.path.isdir(float_model))
            except Exception as other:
                raise ModelLoadError(
                    f"neither {str(source)!r} nor {str(float_model)!r} has a tokenizer that can be read "
                    f"({first_sentence(other)}); save it beside the weights with tokenizer.save_pretrained"
                ) from other
        raise ModelLoadError(
            f"{str(source)!r} holds quantized weights, but no tokenizer that can be read ({first_sentence(error)}); "
            "save it beside them with tokenizer.save_pretrained, or name the float model that has one (lq-eval ppl --baseline)"
        ) from error


def model_size(model: nn.Module, dense_bytes: int = 2) -> ModelSize:
    """Count a model's bytes as they are saved: quantized weights as they are, other floats at ``dense_bytes`` each.

    A parameter that several modules share (tied embeddings) counts once; so do buffers that are saved.
    """
    linear = weights = total = 0
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for tensor in (*model.parameters(), *(buffer for buffer in model.buffers() if id(buffer) in saved)):
        if hasattr(tensor, "packed_nbytes"):
            nbytes = weight_nbytes(tensor)
            linear, weights, total = linear + nbytes, weights + tensor.numel(), total + nbytes
        else:
            total += tensor.numel() * (dense_bytes if tensor.is_floating_point() else tensor.element_size())
    return ModelSize(linear, weights, total)


def read_weight(source: str | Path, name: str) -> torch.Tensor:
    """Read one weight of a model folder without loading the rest.

    Args:
        source: A folder with ``*.safetensors``.
        name: The parameter's name, for example ``"model.layers.0.mlp.down_proj.weight"``.

    Raises:
        ModelLoadError: If there are no such files or no such weight (similar names are listed).
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(source)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"no *.safetensors in {str(folder)!r}; --model takes a model's folder")
    known: list[str] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
                if name in names:
                    weight: torch.Tensor = tensors.get_tensor(name)
                    return weight
        except SafetensorError as error:
            raise ModelLoadError(f"cannot read {file.name} in {str(folder)!r}: {error}") from error
        known += names
    last = name.rpartition(".weight")[0].rpartition(".")[2] or name
    similar = [other for other in known if last in other][:4] or known[:4]
    raise ModelLoadError(f"no weight {name!r} in {str(folder)!r}; there are {len(known)}, such as {', '.join(similar)}")


def _unlimited(tokenizer: Any) -> Any:
    """Texts are tokenized whole and cut into windows afterwards: no reason to warn of the context's length."""
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Loading draws its own progress bars and prints advice; neither helps here."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise UnsupportedError(f"transformers cannot be imported: {error}") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()

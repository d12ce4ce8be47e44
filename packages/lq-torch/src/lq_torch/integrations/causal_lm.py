"""Load a dense Hugging Face causal language model and its tokenizer. Imports transformers when called."""

import os
from pathlib import Path
from typing import Any

import torch
from lq_formats import FormatError, MissingPackageError, SpecError
from torch import Tensor, nn

from lq_torch.checkpoint_index import INDEX_NAME


def load_dense(source: str, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """Return a model on the CPU, in evaluation mode, and its tokenizer. Code that comes with a model is not run.

    Args:
        source: A folder, or a name on the Hugging Face hub. A folder is never looked up on the network.
        dtype: dtype of the weights; None for the one they were saved in.

    Raises:
        MissingPackageError: If transformers is not installed.
        SpecError: If the folder holds a model that lq has quantized, or does not exist, or this is a GGUF file.
        FormatError: If transformers cannot read it.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise MissingPackageError("transformers", "Loading a model by name", "pip install 'lq-torch[hf]'") from None
    local = os.path.isdir(source)
    if local and (Path(source) / INDEX_NAME).is_file():
        raise SpecError(f"{source} is quantized already; give the dense model")
    if source.endswith(".gguf"):
        raise SpecError(
            f"{source} is a GGUF file: expected a model in Hugging Face's layout; lq_torch.load_gguf runs such files packed"
        )
    if local and not (Path(source) / "config.json").is_file():
        raise FormatError(f"cannot load the folder {source!r}: it has no config.json")
    if not local and source.startswith(("/", ".", "~")):
        raise SpecError(f"there is no folder {source!r}; give a model's folder or its name on the hub")
    logging.disable_progress_bar()
    options = {"local_files_only": local, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = "the folder" if local else "the hub name (there is no such folder)"
        raise FormatError(f"cannot load {where} {source!r}: {first_sentence(error)}") from error
    return model.eval(), tokenizer


def first_sentence(error: Exception) -> str:
    """Return what an error of transformers says first: a line, and all of a list that it announces."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


def token_windows(tokenizer: Any, text: str, windows: int | None, length: int) -> Tensor:
    """Cut a text into calibration windows of tokens, consecutive and without special tokens.

    Args:
        tokenizer: Of the model.
        text: The whole text.
        windows: How many; None for as many as there are, up to 128.
        length: Tokens in each.

    Returns:
        ``(windows, length) int64``.

    Raises:
        SpecError: If the text is shorter than asked for, or than one window.
    """
    tokenizer.model_max_length = 1 << 60  # texts are tokenized whole: no reason to warn of the context's length
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    available = tokens.numel() // length
    wanted = min(available, 128) if windows is None else windows
    if available < max(wanted, 1):
        raise SpecError(
            f"the calibration text has {tokens.numel()} tokens, {available} windows of {length}: expected at least "
            f"{max(wanted, 1)}; give a longer text, or ask for fewer or shorter windows"
        )
    return tokens[: wanted * length].view(wanted, length)

"""Texts to evaluate on: a file, the bundled text, or WikiText-2; and their division into windows of tokens."""

import io
from pathlib import Path
from typing import Any, Protocol

import torch
from lq_formats import LQError, MissingPackageError, SpecError
from torch import Tensor

from lq_eval.errors import ModelLoadError, TextTooShortError

WIKITEXT2_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_SPLITS = ("test", "validation", "train")


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    bos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool = ...) -> Any:
        """Return a mapping with ``input_ids``."""
        ...


def load_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        ModelLoadError: If the file is missing or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"cannot read the text {str(path)!r} as UTF-8: {error}") from error


def load_wikitext2(split: str = "test", directory: str | Path | None = None) -> str:
    r"""Return a split of WikiText-2 (raw) as one text, its rows joined by blank lines.

    That is the customary form for perplexity: ``"\n\n".join(rows)``, empty rows included.

    Args:
        split: ``"test"``, ``"validation"`` or ``"train"``.
        directory: A local copy instead of the hub. Either files named ``<split>-*.parquet`` (as on the hub, also one
            folder down in ``wikitext-2-raw-v1/``), or ``wiki.<split>.raw`` or ``<split>.txt`` (as in the original
            archive, where a row is a line). Parquet needs the ``datasets`` package too.

    Raises:
        SpecError: If there is no such split.
        ModelLoadError: If the local copy lacks it, or the hub cannot be reached.
        MissingPackageError: If the ``datasets`` package is needed and missing.
    """
    if split not in _SPLITS:
        raise SpecError(f"WikiText-2 has no split {split!r}: expected one of {', '.join(_SPLITS)}")
    rows = _hub_rows(split) if directory is None else _local_rows(Path(directory), split)
    return "\n\n".join(rows)


def _local_rows(directory: Path, split: str) -> list[str]:
    for folder in (directory, directory / WIKITEXT2_HUB[1], directory / "wikitext-2-raw"):
        for name in (f"wiki.{split}.raw", f"wiki.{'valid' if split == 'validation' else split}.raw", f"{split}.txt"):
            if (folder / name).is_file():
                return _raw_rows(load_text(folder / name))
        shards = sorted(folder.glob(f"{split}-*.parquet"))
        if shards:
            return _rows(_datasets().load_dataset("parquet", data_files=[str(s) for s in shards], split="train"))
    raise ModelLoadError(
        f"no WikiText-2 split {split!r} in {str(directory)!r}: expected {split}-*.parquet, wiki.{split}.raw or {split}.txt"
    )


def _raw_rows(text: str) -> list[str]:
    """Cut the original archive's text into the rows of the hub's table: a line with its end, blank ones empty."""
    # Not splitlines: it would also cut at the form feeds and Unicode separators that are part of the text.
    return [line if line.strip() else "" for line in io.StringIO(text, newline="\n")]


def _hub_rows(split: str) -> list[str]:
    datasets = _datasets()
    name, configuration = WIKITEXT2_HUB
    try:
        return _rows(datasets.load_dataset(name, configuration, split=split))
    except LQError:
        raise
    except Exception as error:  # the library raises a dozen unrelated classes for "no network"
        raise ModelLoadError(
            f"cannot load {name} ({configuration}) from the hub: {error}; give a local copy with --dataset-dir"
        ) from error


def _rows(table: Any) -> list[str]:
    return [str(row) for row in table["text"]]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError("datasets", "WikiText-2", "pip install 'lq-eval[datasets]'") from error
    return datasets


def tokenize(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return the tokens of ``text`` without any special token: ``(tokens,) int64``."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def make_windows(tokens: Tensor, seq_len: int, limit: int | None = None) -> Tensor:
    """Cut a token sequence into consecutive windows that do not overlap; a shorter rest at the end is dropped.

    Args:
        tokens: ``(tokens,) int64``.
        seq_len: Tokens in a window, at least 2.
        limit: Use the first ``limit`` tokens only (rounded down to whole windows); None for all.

    Returns:
        ``(windows, seq_len) int64``.

    Raises:
        SpecError: If ``seq_len`` or ``limit`` leaves nothing to predict.
        TextTooShortError: If there are fewer than ``limit`` tokens, or no whole window.
    """
    if seq_len < 2:
        raise SpecError(f"seq_len={seq_len}: a window needs at least 2 tokens, one to read and one to predict")
    if limit is not None and limit < seq_len:
        raise SpecError(f"{limit} tokens were asked for: at least one window of seq_len={seq_len} is needed")
    available = tokens.numel()
    needed = seq_len if limit is None else limit
    if available < needed:
        raise TextTooShortError(
            f"the text has {available} tokens and {needed} are needed; ask for fewer tokens, shorter windows or give "
            "a longer text"
        )
    windows = needed // seq_len if limit is not None else available // seq_len
    return tokens[: windows * seq_len].view(windows, seq_len)

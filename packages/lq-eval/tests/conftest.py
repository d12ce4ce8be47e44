"""Fixtures of lq-eval's tests: the bundled model, loaded once, and the command line."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lq_eval.corpus import load_text, make_windows, tokenize
from lq_eval.data import eval_text_path, tiny_llama_path
from lq_eval.models import LoadedModel, load_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Test workers that share two cores lose an order of magnitude when each spins with two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    return load_model(tiny_llama_path(), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="session")
def tokens(tiny: LoadedModel) -> torch.Tensor:
    return tokenize(tiny.tokenizer, load_text(eval_text_path()))


@pytest.fixture(scope="session")
def windows(tokens: torch.Tensor) -> torch.Tensor:
    return make_windows(tokens, 256, 1024)


@pytest.fixture
def lq_eval(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run ``lq-eval ARGUMENTS`` without a network; returns typer's result."""
    testing = pytest.importorskip("typer.testing")
    from lq_eval.cli import app

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda *arguments: testing.CliRunner().invoke(app, [str(argument) for argument in arguments])

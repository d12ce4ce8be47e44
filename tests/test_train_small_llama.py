"""``benchmarks/train_small_llama.py``: what it writes is a model that the four packages take, and that learnt its text."""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from lq_torch import Int4WeightOnlyConfig, quantize_

transformers = pytest.importorskip("transformers")

VOCABULARY, WINDOW = 320, 32
SMALL = f"--hidden 64 --layers 1 --vocabulary {VOCABULARY} --window {WINDOW} --batch 8 --device cpu".split()


def _train(root: Path, text: Path, out: Path, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script as a command, in this process: transformers is imported once."""
    script = str(root / "benchmarks" / "train_small_llama.py")
    monkeypatch.setattr(
        sys, "argv", [script, "--text", str(text), "--out", str(out), "--seconds", str(seconds), *SMALL]
    )
    runpy.run_path(script, run_name="__main__")


def _sentences(count: int) -> str:
    """Return sentences of the same eight words, in any order."""
    words = ["one", "group", "scale", "weight", "column", "nibble", "rounding", "activation"]
    return "".join(" ".join(random.sample(words, 8)) + ".\n" for _ in range(count))


def test_trains_a_model_that_loads_quantizes_and_knows_its_text(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "model"
    held_out = _sentences(100)
    text.write_text(_sentences(1500) + "<|endoftext|>\n" + _sentences(1500) + held_out, encoding="utf-8")
    _train(root, text, out, 2.0, monkeypatch)
    facts = json.loads(capsys.readouterr().out)
    # Untrained: ln 301 = 5.7 nats. Two seconds of one core reach 1.8, half a second 3.2; the text itself has 1.2.
    assert max(facts["loss"], facts["held_out_loss"]) < 4
    assert facts["tokens"] == facts["steps"] * 8 * WINDOW

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokens = torch.tensor(tokenizer(held_out).input_ids)
    assert tokenizer.decode(tokens) == held_out
    assert len(tokenizer) == model.config.vocab_size <= VOCABULARY
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.inference_mode():
        loss = model(input_ids=windows, labels=windows).loss.item()
        assert loss == pytest.approx(facts["held_out_loss"], abs=0.2)  # saved in bf16, measured with autocast
        quantize_(model, Int4WeightOnlyConfig(group_size=32))
        assert model(input_ids=windows, labels=windows).loss.item() == pytest.approx(loss, abs=0.2)


def test_refuses_a_text_shorter_than_a_window(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(_sentences(20), encoding="utf-8")
    with pytest.raises(SystemExit, match=f"windows take {WINDOW}"):
        _train(root, text, tmp_path / "model", 1.0, monkeypatch)
    assert not (tmp_path / "model").exists()

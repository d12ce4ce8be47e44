"""Train a small LLaMA from a plain-text file in a given time: a model to check quantization on that nothing was tuned to.

    python benchmarks/train_small_llama.py --text TRAIN.txt --out MODEL --seconds 150

Writes a folder in the Hugging Face layout: bf16 safetensors and a byte-level BPE tokenizer, both made from the text alone.
The default has 6.8M parameters (13 MiB) and inputs of 256 or 1024 features to every Linear, so that all group sizes divide
them. Needs torch, transformers and tokenizers; runs on a GPU where there is one. Documents in the text may be separated by
a line ``<|endoftext|>``. The end of the text is held out: its loss is printed beside that of text trained on, and tells
whether the text was too short for the time. The clock decides the number of steps, so two runs give models of the same
kind, not the same bits.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
WARMUP = 0.02  # of the time
FINAL_RATE = 0.02  # of the peak
PIECE = 1 << 16  # characters that are tokenized at a time, which lets the tokenizer use every core


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        seconds: From the end of the first step, which compiles, to the end of the last.
        batch: Windows a step.
        window: Tokens in each.
        rate: Peak learning rate of AdamW.
        compiled: Whether to use ``torch.compile``.
    """

    seconds: float
    batch: int
    window: int
    rate: float
    compiled: bool


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of ``vocabulary`` tokens, the first of which is the end of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END), trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: str) -> Tensor:
    """Return the tokens of the text: ``(tokens,) int64``. A token never crosses the pieces, which end with lines."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return torch.cat([torch.tensor(piece.ids) for piece in tokenizer.encode_batch(pieces)])


def build(options: argparse.Namespace, vocabulary: int) -> LlamaForCausalLM:
    """Return an untrained model: grouped queries, SwiGLU, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=options.hidden,
            intermediate_size=4 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=2 * options.window,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def learning_rate(share: float, peak: float) -> float:
    """Return the rate after a share of the time, 0 to 1: a linear warm-up, then a cosine."""
    if share < WARMUP:
        return peak * (share + 1e-3) / WARMUP
    cosine = (1 + math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP)))) / 2
    return peak * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss of next-token prediction in nats; ``windows``: ``(batch, window + 1) int64``."""
    with torch.autocast(windows.device.type, torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def train(model: nn.Module, tokens: Tensor, settings: Settings) -> dict[str, float]:
    """Train on windows from random places until the time is over.

    Args:
        model: On the device of ``tokens``, in float32.
        tokens: ``(tokens,) int64``.
        settings: How.

    Returns:
        ``steps``, ``tokens`` and ``epochs`` done.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    free = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}],
        lr=settings.rate,
        betas=(0.9, 0.95),
        fused=tokens.is_cuda,
    )
    step_loss: Any = torch.compile(loss_of) if settings.compiled else loss_of
    span = torch.arange(settings.window + 1, device=tokens.device)
    started, steps, share = math.inf, 0, 0.0
    while share < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, settings.rate)
        starts = torch.randint(len(tokens) - settings.window, (settings.batch, 1), device=tokens.device)
        loss = step_loss(model, tokens[starts + span])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if steps % 8 == 0:  # waiting for the GPU now and then keeps the clock honest
            loss_now = loss.item()
        if steps % 256 == 0:
            sys.stderr.write(f"step {steps:6}  {share:6.1%}  loss {loss_now:.4f}\n")
        steps += 1
        if steps == 1:
            started = time.monotonic()
        share = (time.monotonic() - started) / settings.seconds
    seen = steps * settings.batch * settings.window
    return {"steps": steps, "tokens": seen, "epochs": seen / len(tokens)}


def evaluate(model: nn.Module, tokens: Tensor, settings: Settings) -> float:
    """Return the mean loss in nats on consecutive windows of ``tokens``, at most half a million of them."""
    windows = tokens[:500_000].unfold(0, settings.window + 1, settings.window)
    with torch.inference_mode():
        losses = [loss_of(model, batch) * len(batch) for batch in torch.split(windows, settings.batch)]
    return float(torch.stack(losses).sum()) / len(windows)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, window: int) -> None:
    """Write weights in bf16, the configuration and the tokenizer."""
    model.to(dtype=torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=2 * window
    ).save_pretrained(folder)


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file to train on")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seconds", type=float, default=150, help="of training (default: 150)")
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 8 (default: 256)")
    parser.add_argument("--layers", type=int, default=6, help="blocks (default: 6)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--window", type=int, default=512, help="tokens a window; the context is twice that")
    parser.add_argument("--batch", type=int, default=128, help="windows a step (default: 128)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of the text, its end (default: 0.02)")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the windows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="use torch.compile: 30 to 60 seconds, then faster")
    return parser.parse_args()


def main() -> None:
    """Train, and print the losses and what was done as one line of JSON."""
    options = parse()
    torch.manual_seed(options.seed)
    settings = Settings(options.seconds, options.batch, options.window, options.rate, options.compile)
    text = options.text.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - options.held_out))
    tokenizer = train_tokenizer(text[:cut], options.vocabulary)
    tokens, held_out = (tokenize(tokenizer, part).to(options.device) for part in (text[:cut], text[cut:]))
    if min(len(tokens), len(held_out)) <= options.window:
        raise SystemExit(
            f"{options.text}: {len(tokens)} tokens and {len(held_out)} held out; windows take {options.window}"
        )
    model = build(options, tokenizer.get_vocab_size()).to(options.device)
    done = train(model, tokens, settings)
    model.eval()
    loss, seen_loss = (evaluate(model, part, settings) for part in (held_out, tokens))
    save(model, tokenizer, options.out, options.window)
    facts = {
        "parameters": model.num_parameters(),
        "text_tokens": len(tokens),
        "seconds": options.seconds,
        **done,
        "loss": seen_loss,
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
    }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()

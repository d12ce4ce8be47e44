"""Which tensor of a model is which in a GGUF file, and whose rows llama.cpp keeps in another order.

transformers rotates element j of a head with element j + d/2, llama.cpp's ``llama`` architecture element 2j with 2j + 1. So its
files hold the rows of q and k so that each pair is adjacent. A block of a quantized type lies within a row: moving rows moves
bits and rounds nothing. ``qwen2`` and ``qwen3`` rotate halves in both.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from lq_formats import UnsupportedError
from torch import Tensor, nn

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
# Of the scaled rotary frequencies, which transformers computes from its configuration.
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: Under ``general.architecture``.
        model_types: Of transformers' configurations.
        interleaved: Whether the rows of q and k are in pairs.
        parts: Names of a layer's modules in files, by the name in transformers.
    """

    name: str
    model_types: tuple[str, ...]
    interleaved: bool
    parts: dict[str, str]

    def file_name(self, path: str) -> str:
        """Return the name in a file of a model's tensor.

        Raises:
            UnsupportedError: If the architecture has no such tensor.
        """
        if path in _WHOLE:
            return _WHOLE[path]
        match = _LAYER.fullmatch(path)
        if match is None or match[2] not in self.parts:
            raise UnsupportedError(
                f"the model's tensor {path!r} has no place in a GGUF file of architecture {self.name}: expected a "
                f"{' or '.join(self.model_types)} causal language model of transformers, without adapters"
            )
        return f"blk.{match[1]}.{self.parts[match[2]]}.{match[3]}"

    def heads(self, path: str, config: Any) -> int | None:
        """Return how many heads share the rows of a tensor that files hold in pairs; None for all other tensors."""
        if not self.interleaved:
            return None
        module = path.rpartition(".")[0]
        if module.endswith(".q_proj"):
            return int(config.num_attention_heads)
        return int(config.num_key_value_heads) if module.endswith(".k_proj") else None


ARCHITECTURES = (
    Architecture("llama", ("llama", "mistral"), True, _PARTS),
    Architecture("qwen2", ("qwen2",), False, _PARTS),
    Architecture("qwen3", ("qwen3",), False, _PARTS | _HEAD_NORMS),
)


def architecture_of(model: nn.Module) -> Architecture:
    """Return the architecture of a transformers model.

    Raises:
        UnsupportedError: If it is none that lq knows.
    """
    found = getattr(getattr(model, "config", None), "model_type", None)
    for architecture in ARCHITECTURES:
        if found in architecture.model_types:
            return architecture
    known = ", ".join(item for architecture in ARCHITECTURES for item in architecture.model_types)
    raise UnsupportedError(
        f"{type(model).__name__} is of model type {found!r}: GGUF files are read and written for {known} models of transformers"
    )


def pair_rows(value: Tensor, heads: int) -> Tensor:
    """Return rows in the order of files: of each head, row j and row j + d/2 adjacent. ``value: (heads * d, ...)``."""
    rows = torch.arange(value.shape[0], device=value.device)
    return value.index_select(0, rows.view(heads, 2, -1).transpose(1, 2).reshape(-1))


def split_rows(value: Tensor, heads: int) -> Tensor:
    """Undo :func:`pair_rows`."""
    rows = torch.arange(value.shape[0], device=value.device)
    return value.index_select(0, rows.view(heads, -1, 2).transpose(1, 2).reshape(-1))


def check_heads(path: str, rows: int, heads: int) -> None:
    """Raise UnsupportedError unless ``rows`` are those of ``heads`` heads, each of an even size."""
    if heads < 1 or rows % (2 * heads):
        raise UnsupportedError(f"{path} has {rows} rows for {heads} heads: expected an even number of rows for each")

"""GGUF files of the LLaMA family: into a transformers model and back, packed."""

from lq_torch.gguf.loading import load_gguf
from lq_torch.gguf.saving import save_gguf

__all__ = ["load_gguf", "save_gguf"]

"""Checkpoints of other libraries (GPTQ, AWQ, compressed-tensors, HQQ, AutoRound) into lq's weights, and back."""

from lq_torch.interop.exporting import export_pretrained
from lq_torch.interop.folder import is_foreign
from lq_torch.interop.importing import import_pretrained

__all__ = ["export_pretrained", "import_pretrained", "is_foreign"]

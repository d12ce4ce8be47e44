"""``F.embedding`` of a weight in ggml blocks: rows are gathered packed, and only those that are asked for are dequantized.

llama.cpp's files quantize the token embedding, and models that tie it multiply by the same tensor at their end. So one packed
weight serves both an ``nn.Embedding`` and an ``nn.Linear``.
"""

from lq_formats import UnsupportedError
from torch import Tensor

from lq_torch.tensors.base import DISPATCH, LowBitTensor, aten
from lq_torch.tensors.ggml import GGMLTensor


def _embedding(
    weight: LowBitTensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Return the rows ``(*indices.shape, K)`` of ``weight: (N, K)`` in its dtype; the other arguments are for gradients."""
    if not isinstance(weight, GGMLTensor):
        raise UnsupportedError(
            f"an embedding looks up rows of a dense weight or of ggml blocks, not of a {type(weight).__name__}"
        )
    return weight.dequantize_rows(indices)


DISPATCH[aten.embedding.default] = _embedding

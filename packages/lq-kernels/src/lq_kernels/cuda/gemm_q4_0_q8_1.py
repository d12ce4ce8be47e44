"""Launch the Q4_0 x Q8_1 product of ``src/gemm_q4_0_q8_1.cu``."""

import torch
from lq_formats import SizeOverflowError
from torch import Tensor

from lq_kernels.cuda.sources import COLUMN_TILES
from lq_kernels.jit.launcher import launch

_ROWS = 32
_THREADS = 256
_WEIGHT_STAGE = _ROWS * (16 * 18 + 16)
_TOKEN_STAGE = 16 * 36 + 16
# Stages of the pipeline by column tiles; the same numbers as in the source. All fit the 99 KB of sm_89.
_STAGES = {1: 6, 2: 4, 4: 3, 8: 2}
_MAX_GRID_Y = 65535


def gemm_q4_0_q8_1(weight_q: Tensor, activation_q: Tensor) -> Tensor:
    """Multiply raw blocks on the tensor cores.

    Args:
        weight_q: ``(M, B, 18) uint8``, contiguous, on a CUDA device.
        activation_q: ``(N, B, 36) uint8``, contiguous, on the same device.

    Returns:
        ``(M, N) float32``; bitwise reproducible.

    Raises:
        SizeOverflowError: If there are more than 4 million tokens.
    """
    rows, blocks, _ = weight_q.shape
    tokens = activation_q.shape[0]
    tiles = next((tiles for tiles in COLUMN_TILES if tokens <= 8 * tiles), COLUMN_TILES[-1])
    columns = -(-tokens // (8 * tiles))
    if columns > _MAX_GRID_Y:
        raise SizeOverflowError(f"N={tokens} tokens in one product: expected at most {_MAX_GRID_Y * 64}; split them")
    aligned = blocks % 8 == 0 and weight_q.data_ptr() % 16 == 0 and activation_q.data_ptr() % 16 == 0
    if weight_q.data_ptr() % 2 or activation_q.data_ptr() % 4:
        weight_q, activation_q = weight_q.clone(), activation_q.clone()
    stages = _STAGES[tiles] if aligned else 2
    shared = stages * (_WEIGHT_STAGE + 8 * tiles * _TOKEN_STAGE)
    out = torch.empty((rows, tokens), dtype=torch.float32, device=weight_q.device)
    launch(
        "gemm_q4_0_q8_1",
        f"gemm_q4_0_q8_1_c{tiles}{'' if aligned else '_unaligned'}",
        (-(-rows // _ROWS), columns, 1),
        _THREADS,
        shared,
        weight_q.device,
        weight_q,
        activation_q,
        out,
        rows,
        tokens,
        blocks,
    )
    return out

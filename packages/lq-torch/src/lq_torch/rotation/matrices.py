"""Orthogonal matrices that spread every coordinate over all: Hadamard matrices with random signs, or random ones.

A Hadamard matrix has entries +-1 and orthogonal rows, ``H H^T = n I``. Two are known for orders that matter here:

- Sylvester: ``H_2n = [[H_n, H_n], [H_n, -H_n]]``, and in general the Kronecker product of two is one.
- Paley (1933): for a prime q, the quadratic residues modulo q give one of order ``q + 1`` if q = 3 modulo 4 (12, 20, 24, 44,
  ...) and of order ``2 q + 2`` if q = 1 modulo 4 (12, 28, 36, 60, ...).

Together they cover the widths of language models: 2560 = 128 x 20, 3072 = 256 x 12, 3584 = 128 x 28, 5120 = 256 x 20.
"""

from typing import Literal

import torch
from lq_formats import SpecError
from torch import Tensor

MatrixKind = Literal["hadamard", "orthogonal"]


def hadamard(order: int) -> Tensor:
    """Return a Hadamard matrix ``(order, order) float64``, entries +-1.

    Raises:
        SpecError: If no construction here has that order.
    """
    small = order
    while small > 0:
        matrix = _paley(small)
        if matrix is not None:
            break
        if small % 2:
            raise SpecError(
                f"no Hadamard matrix of order {order} is known here (a power of two times a Paley matrix is needed); use a "
                "random orthogonal one: matrix='orthogonal'"
            )
        small //= 2
    else:
        raise SpecError(f"order={order}: expected a positive number")
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.kron(two, matrix)
    return matrix


def random_rotation(size: int, matrix: MatrixKind = "hadamard", seed: int = 0) -> Tensor:
    """Return an orthogonal matrix ``(size, size) float64``, told by its seed.

    A Hadamard matrix is the same on every machine, bit for bit. A random one is so up to rounding: LAPACK's sums, and with
    them the last bits, depend on the processor and on the number of threads.

    Args:
        size: Of the space.
        matrix: ``"hadamard"``: a Hadamard matrix whose rows have random signs, so that every entry is ``+-size**-0.5``.
            ``"orthogonal"``: uniform over all (Haar), for any size.
        seed: Of the signs, or of the matrix.

    Raises:
        SpecError: If there is no Hadamard matrix of that size, or no such kind.
    """
    generator = torch.Generator().manual_seed(seed)
    if matrix == "hadamard":
        signs = torch.randint(2, (size, 1), generator=generator).double() * 2 - 1
        return hadamard(size).mul_(signs).div_(size**0.5)
    if matrix == "orthogonal":
        q: Tensor
        q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        return q.mul_(r.diagonal().sign())  # Haar only with the signs that make R's diagonal positive
    raise SpecError(f"matrix={matrix!r}: expected 'hadamard' or 'orthogonal'")


def _paley(order: int) -> Tensor | None:
    """Return the Hadamard matrix of an order that a prime makes, or 1 or 2; else None."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    if _prime(order - 1) and (order - 1) % 4 == 3:
        return _conference(order - 1, -1) + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if order % 2 == 0 and _prime(half - 1) and (half - 1) % 4 == 1:
        symmetric = _conference(half - 1, 1)
        two = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
        other = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
        return torch.kron(symmetric, two) + torch.kron(torch.eye(half, dtype=torch.float64), other)
    return None


def _conference(q: int, sign: int) -> Tensor:
    """Return C ``(q + 1, q + 1)`` with zero diagonal, other entries +-1, ``C C^T = q I`` and ``C^T = sign C``."""
    numbers = torch.arange(q)
    residue = torch.full((q,), -1.0, dtype=torch.float64)
    residue[numbers * numbers % q] = 1.0
    residue[0] = 0.0
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, float(sign)
    matrix[1:, 1:] = residue[(numbers.unsqueeze(0) - numbers.unsqueeze(1)) % q]
    return matrix


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))

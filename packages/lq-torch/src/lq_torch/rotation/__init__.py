"""Rotations of a model's own coordinates, which leave its function and cost nothing, and make weights easier to round."""

from lq_torch.rotation.matrices import hadamard, random_rotation
from lq_torch.rotation.rotate import Rotation, rotate_

__all__ = ["Rotation", "hadamard", "random_rotation", "rotate_"]

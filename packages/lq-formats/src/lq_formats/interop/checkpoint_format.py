"""CheckpointFormat: what every format of another library can do with the tensors of one linear layer."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from lq_formats.errors import FormatError, ShapeError, UnsupportedError
from lq_formats.layouts.affine_weight import AffineWeight

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, order=True)
class LayerScheme:
    """How one layer is quantized, as configurations say it.

    Attributes:
        bits: Bits per code.
        group_size: In features per scale; -1 for one scale a row.
        symmetric: No zeros.
        act_order: Groups are not runs of consecutive in features.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool = False

    @classmethod
    def of(cls, weight: AffineWeight) -> Self:
        """Return the scheme of a weight."""
        group_size = -1 if weight.groups == 1 else weight.group_size
        return cls(weight.bits, group_size, weight.zero is None, weight.g_idx is not None)


class CheckpointFormat(ABC):
    """A format of checkpoints: names, conventions and configuration; frozen, and without any tensor.

    Attributes:
        name: What the format is called in arguments and messages.
        marker: The tensor that every quantized layer has, and no other layer.
        tensor_names: The tensors that stand for a layer's weight, after its path and a dot.
    """

    name: str
    marker: str
    tensor_names: frozenset[str]

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``quantization_config``.

        Raises:
            FormatError: If it is not one of this format.
            UnsupportedError: If it says something that this release does not read.
        """

    @abstractmethod
    def expected_shapes(self, out_features: int, in_features: int, shapes: Shapes) -> Shapes:
        """Return the shapes that the tensors of a layer must have, given those they have (for groups and bits).

        Raises:
            LQError: If there are no such shapes.
        """

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """Read the tensors of a layer, by their names without its path.

        Zeros that all are the midpoint are dropped, floating point zeros that all are codes become integers: the same
        numbers in fewer bytes.

        Raises:
            LQError: The named error of what does not fit.
        """

    @abstractmethod
    def pack(self, weight: AffineWeight) -> dict[str, Tensor]:
        """Return the tensors of a layer; the inverse of :meth:`unpack`.

        Raises:
            LQError: If the format cannot hold the weight exactly.
        """

    @abstractmethod
    def to_config(self, schemes: Mapping[str, LayerScheme], dense: Iterable[str]) -> dict[str, Any]:
        """Return the ``quantization_config`` of a model.

        Args:
            schemes: How each quantized layer is quantized, by path; at least one.
            dense: Paths of the linear layers that are not.

        Raises:
            UnsupportedError: If the format has no words for this mixture.
        """

    def check_shapes(self, out_features: int, in_features: int, shapes: Shapes) -> None:
        """Raise unless tensors of these shapes can be a layer of this size; no tensor is needed.

        Raises:
            FormatError: If a tensor is missing.
            ShapeError: If a shape is another.
        """
        if self.marker not in shapes:
            raise FormatError(f"{self.name} layer has no tensor {self.marker!r}: it has {sorted(shapes)}")
        for name, expected in self.expected_shapes(out_features, in_features, shapes).items():
            if name in shapes and tuple(shapes[name]) != tuple(expected):
                raise ShapeError(
                    f"{self.name} tensor {name!r} has shape {tuple(shapes[name])}: a layer of {out_features} out and "
                    f"{in_features} in features needs {tuple(expected)}"
                )


def shape_of(shapes: Shapes, name: str, layout: str) -> tuple[int, int]:
    """Return the shape of a matrix among the tensors of a layer.

    Raises:
        FormatError: If it is missing.
        ShapeError: If it is not a matrix.
    """
    if name not in shapes:
        raise FormatError(f"{layout} layer has no tensor {name!r}: it has {sorted(shapes)}")
    if len(shapes[name]) != 2:
        raise ShapeError(f"{layout} tensor {name!r} has shape {tuple(shapes[name])}: expected 2 dimensions")
    return shapes[name][0], shapes[name][1]


def simplest_zero(weight: AffineWeight) -> AffineWeight:
    """Return the same weight with zeros that cost least: none where all are the midpoint, uint8 where all are codes."""
    zero, most = weight.zero, (1 << weight.bits) - 1
    if zero is None:
        return weight
    if not bool((zero != 1 << (weight.bits - 1)).any()):
        return replace(weight, zero=None)
    if zero.dtype == torch.uint8 or not torch.equal(zero.round().clamp(0, most), zero):
        return weight
    return replace(weight, zero=zero.to(torch.uint8))


def split_schemes(schemes: Mapping[str, LayerScheme]) -> tuple[LayerScheme, dict[str, LayerScheme]]:
    """Return the commonest scheme, and the layers that have another."""
    common = max(Counter(schemes.values()).items(), key=lambda item: (item[1], item[0]))[0]
    return common, {path: scheme for path, scheme in sorted(schemes.items()) if scheme != common}


def only_scheme(schemes: Mapping[str, LayerScheme], layout: str) -> LayerScheme:
    """Return the scheme of all layers.

    Raises:
        UnsupportedError: If there are several.
    """
    common, others = split_schemes(schemes)
    if others:
        path, other = next(iter(others.items()))
        raise UnsupportedError(f"{layout} has one scheme for all layers; {path} has {other}, most have {common}")
    return common


def integer(config: Mapping[str, Any], key: str, *names: str, default: int | None = None) -> int:
    """Return an integer of a configuration, by any of its names.

    Raises:
        FormatError: If it is missing or not an integer.
    """
    value = next((config[name] for name in (key, *names) if config.get(name) is not None), default)
    if type(value) is not int:
        raise FormatError(f"quantization_config has {key}={value!r}: expected an integer")
    return value


def boolean(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a boolean of a configuration.

    Raises:
        FormatError: If it is something else.
    """
    value = config.get(key, default)
    if type(value) is not bool:
        raise FormatError(f"quantization_config has {key}={value!r}: expected true or false")
    return value

"""rotate_: turn the residual stream, and the values of every attention head, by orthogonal matrices; the function stays.

A residual stream ``x`` may be ``x Q`` instead, if what writes to it is multiplied by Q and what reads from it by Q^T. Both are
Linear layers (and the embedding), so that Q disappears in their weights; the RMS norms in between commute with Q once
their scales have moved into the layers behind them. A few channels of a language model are much larger than the others;
turned by a Hadamard matrix they are spread over all, and less is lost when weights, or activations, are rounded.

The matrices called R1 (residual stream) and R2 (values of heads) by SpinQuant (arXiv:2405.16406), after QuaRot
(arXiv:2404.00456): those of its rotations that cost nothing at run time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from lq_formats import UnsupportedError
from torch import Tensor, nn

from lq_torch.arguments import check_module
from lq_torch.calibrate.blocks import evaluation, find_blocks, record_stream
from lq_torch.calibrate.smoothing import shared_parameters
from lq_torch.quantize import check_linear
from lq_torch.rotation.matrices import MatrixKind, random_rotation
from lq_torch.rotation.plan import BlockPlan, Fold, find_folds, plan_block

_PROBE = (2, 16)  # windows and tokens that the structure is tried on
_ROWS = 8192  # of the embedding at a time in float64
_ROUNDED = 0.02  # relative change of embeddings that rounding to 16 bits may make; positions beside them make about 1


@dataclass(frozen=True)
class Rotation:
    """What :func:`rotate_` did.

    Attributes:
        width: Of the residual stream.
        heads: The layers whose values were rotated, ``(v, o)`` a block; empty without.
        untied: Whether the output head got a weight of its own.
    """

    width: int
    heads: tuple[tuple[str, str], ...]
    untied: bool


def rotate_(
    model: nn.Module, *, matrix: MatrixKind = "hadamard", heads: bool = True, untie: bool = False, seed: int = 0
) -> Rotation:
    """Rotate a language model's residual stream and heads in place, fused into its weights: logits stay, up to rounding.

    Do it before quantizing. Products are made in float64 and rounded once to each weight's dtype. No architecture is known
    here: what to rotate is found by running the model on a few random tokens, and tried on copies, one block at a time.
    On an error the model is as it was.

    Args:
        model: A dense causal language model of chained decoder blocks with RMS norms in front of Linear layers.
        matrix: ``"hadamard"`` (random signs) or ``"orthogonal"`` (uniformly random, for any size).
        heads: Also rotate the values of every head; the layer that mixes heads takes it back.
        untie: Give the output head a weight of its own where it shares the embedding's: rotated, they differ, because the
            last norm's scale moves into the head. Takes ``vocabulary x width`` weights more.
        seed: Of the matrices.

    Returns:
        What was rotated.

    Raises:
        UnsupportedError: If the architecture does not allow it (norms that subtract a mean or have a bias or whose output no
            Linear layer takes, learned positions, shared weights, tied embeddings without ``untie``, a block that does not
            run in float64), or the model is quantized.
        SpecError: If there is no Hadamard matrix of a size, or ``model`` is no module.
        LQError: The named error of a weight that is not a finite matrix.
    """
    check_module(model, "rotate_")
    with torch.no_grad(), evaluation(model):
        return _Rotating(model, matrix, heads, untie, seed).run()


class _Rotating:
    """One call of :func:`rotate_`: everything is found and tried before anything is changed."""

    def __init__(self, model: nn.Module, matrix: MatrixKind, heads: bool, untie: bool, seed: int) -> None:
        self._model = model
        self._blocks = find_blocks(model)
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                check_linear(path, module)
        self._embedding_path, self._embedding = _find_embedding(model)
        self._rotation = random_rotation(self._embedding.embedding_dim, matrix, seed)
        self._head_rotation = random_rotation(_head_size(model), matrix, seed + 1) if heads else None
        generator = torch.Generator().manual_seed(seed)
        self._probe = torch.randint(self._embedding.num_embeddings, _PROBE, generator=generator)
        self._end = self._find_end()
        self._untied = self._check_shared(untie)

    def run(self) -> Rotation:
        rotated = self._rotated_embedding()
        plans = self._plan_blocks(rotated)
        # Nothing has been changed so far, and nothing fails from here on.
        if self._untied:
            _untie(self._model, self._end.readers)
        self._embedding.weight.data = rotated
        for plan, (_, block) in zip(plans, self._blocks, strict=True):
            plan.apply(block, *self._matrices(block))
        self._end.apply(self._model, self._matrices(self._model.get_submodule(self._end.norm))[0])
        found = [
            (f"{path}.{plan.heads[0]}", f"{path}.{plan.heads[1]}")
            for plan, (path, _) in zip(plans, self._blocks, strict=True)
            if plan.heads is not None
        ]
        return Rotation(self._rotation.shape[0], tuple(found), self._untied)

    def _find_end(self) -> Fold:
        """Return the last norm, with the output head behind it."""
        last_path, last = self._blocks[-1]
        inside = tuple(f"{path}." for path, _ in self._blocks)
        outside = {name: module for name, module in self._model.named_modules() if not f"{name}.".startswith(inside)}
        folds = find_folds("", outside, self._rotation.shape[0], self._forward)
        if len(folds) == 1:
            seen: list[Tensor] = []
            norm = self._model.get_submodule(folds[0].norm)
            handles = [
                last.register_forward_hook(lambda _, __, y: seen.append(y if isinstance(y, Tensor) else y[0])),
                norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
            ]
            self._forward()
            for handle in handles:
                handle.remove()
            if torch.equal(seen[0].to(seen[1].device), seen[1]):
                return folds[0]
        raise UnsupportedError(
            f"{type(self._model).__name__}: expected one RMS norm, and a Linear output head, behind {last_path}, the last "
            "block; rotation turns what is in front of them"
        )

    def _check_shared(self, untie: bool) -> bool:
        """Return whether the head is to be untied, once it is certain that no other weight is shared."""
        shared = shared_parameters(self._model)
        tied = False
        for path, module in self._model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if module.weight is self._embedding.weight and path in self._end.readers:
                tied = True
            elif id(module.weight) in shared:
                raise UnsupportedError(
                    f"{path}.weight is shared with another module, which rotation would change twice"
                )
            check_linear(path, module)
        if tied and not untie:
            raise UnsupportedError(
                f"{self._end.readers[0]}.weight is that of {self._embedding_path} (tied embeddings), and rotated they "
                f"differ; untie=True gives it its own, {self._embedding.weight.numel():,} weights more"
            )
        return tied

    def _plan_blocks(self, rotated: Tensor) -> list[BlockPlan]:
        where = next(self._blocks[0][1].parameters()).device
        rotation, head_rotation = self._matrices(self._blocks[0][1])
        stream = record_stream(self._model, self._blocks, [self._probe], where, where)
        kept = self._embedding.weight.data
        self._embedding.weight.data = rotated
        try:
            turned = record_stream(self._model, self._blocks, [self._probe], where, where).hidden[0].double()
        finally:
            self._embedding.weight.data = kept
        expected = stream.hidden[0].double() @ rotation
        if not bool((turned - expected).norm() < _ROUNDED * expected.norm()):
            raise UnsupportedError(
                f"what enters {self._blocks[0][0]} is not the output of {self._embedding_path} alone (learned positions, or a "
                "norm?): it cannot be rotated"
            )
        plans = []
        for number, (path, block) in enumerate(self._blocks):
            home = next(block.parameters()).device
            block.to(where)
            try:
                plans.append(plan_block(path, block, stream, number, rotation, head_rotation))
                if number < len(self._blocks) - 1:
                    stream.advance(number, path, block)
            finally:
                block.to(home)
        return plans

    def _rotated_embedding(self) -> Tensor:
        weight = self._embedding.weight.data
        rotation = self._rotation.to(weight.device)
        return torch.cat([(rows.double() @ rotation).to(weight.dtype) for rows in torch.split(weight, _ROWS)])

    def _matrices(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return the rotations where a module is."""
        where = next(module.parameters()).device
        return self._rotation.to(where), None if self._head_rotation is None else self._head_rotation.to(where)

    def _forward(self) -> None:
        caches = hasattr(getattr(self._model, "config", None), "use_cache")
        self._model(self._probe.to(self._embedding.weight.device), **({"use_cache": False} if caches else {}))


def _find_embedding(model: nn.Module) -> tuple[str, nn.Embedding]:
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    if len(found) != 1:
        names = ", ".join(path for path, _ in found) or "none"
        raise UnsupportedError(
            f"{type(model).__name__}: expected one nn.Embedding, of tokens, and found {names}; rotation has no place for "
            "learned positions"
        )
    return found[0]


def _head_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    size = getattr(config, "head_dim", None)
    if size is None and getattr(config, "num_attention_heads", None) and getattr(config, "hidden_size", None):
        size = config.hidden_size // config.num_attention_heads
    if type(size) is not int or size < 1:
        raise UnsupportedError(
            f"{type(model).__name__} has no config with head_dim, or hidden_size and num_attention_heads; leave heads as "
            "they are: heads=False"
        )
    return size


def _untie(model: nn.Module, heads: tuple[str, ...]) -> None:
    """Give output heads a copy of their weight, and tell a Hugging Face model's configuration."""
    for path in heads:
        head = model.get_submodule(path)
        assert isinstance(head.weight, nn.Parameter)
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        known = getattr(model, "all_tied_weights_keys", None)
        if isinstance(known, dict):
            known.pop(f"{path}.weight", None)
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False

"""What an importance ("imatrix") is worth on trained weights: the bundled model in ggml's formats."""

import copy

import pytest
import torch
from lq_eval.corpus import load_text, make_windows, tokenize
from lq_eval.data import calibration_text_path
from lq_eval.models import LoadedModel
from lq_torch import GGMLTensor
from torch import Tensor, nn


@pytest.fixture(scope="module")
def importances(tiny: LoadedModel) -> dict[str, Tensor]:
    """Return the mean square of what enters each column of each layer, over 2048 tokens of the calibration text."""
    sums: dict[str, Tensor] = {}

    def count(name: str) -> object:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(rows.shape[1])) + rows.square().sum(0)

        return hook

    layers = {name: m for name, m in tiny.model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    hooks = [module.register_forward_pre_hook(count(name)) for name, module in layers.items()]
    with torch.no_grad():
        tiny.model(make_windows(tokenize(tiny.tokenizer, load_text(calibration_text_path())), 256, 2048))
    for hook in hooks:
        hook.remove()
    return {name: total / 2048 for name, total in sums.items()}


def log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(tokens).logits, dim=-1)


# Measured over 4096 tokens: q4_0 0.075 and 0.058, q4_k 0.050 and 0.032, iq4_nl 0.047 and 0.037, q6_k 0.0028 and 0.0021.
@pytest.mark.exhaustive(where=lambda ggml_type: ggml_type in ("q4_k", "iq4_nl", "q6_k"))
@pytest.mark.parametrize(
    ("ggml_type", "share"), [("q4_0", 0.9), ("q4_k", 0.8), ("iq4_nl", 0.9), ("q6_k", 0.9)], ids=lambda value: str(value)
)
def test_an_importance_brings_the_model_nearer_to_its_float_self(
    ggml_type: str, share: float, tiny: LoadedModel, windows: Tensor, importances: dict[str, Tensor]
) -> None:
    reference = log_probabilities(tiny.model, windows)
    divergences = []
    for weigh in (False, True):
        model = copy.deepcopy(tiny.model)
        for name, importance in importances.items():
            layer = model.get_submodule(name)
            weight = GGMLTensor.from_hp(layer.weight.detach(), ggml_type, importance if weigh else None)
            layer.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        found = log_probabilities(model, windows)
        divergences.append(float((reference.exp() * (reference - found)).sum(-1).mean()))
    plain, weighted = divergences
    assert weighted < share * plain

import math

import pytest
import torch
from lq_eval.corpus import make_windows
from lq_eval.divergence import compare
from lq_eval.evaluate import quantized_copy
from lq_eval.perplexity import PROTOCOLS, Accumulator, measure_perplexity, protocol
from lq_eval.schemes import parse_scheme
from lq_formats import SpecError


class Fixed(torch.nn.Module):
    """A "model" whose logits for the next token depend on the current token only."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    found = measure_perplexity(Fixed(torch.zeros(7, 7)), torch.randint(0, 7, (6, 5)), batch_size=4)
    assert found.value == pytest.approx(7, rel=1e-6)
    assert found.stderr == pytest.approx(0, abs=1e-5)
    assert (found.scored, found.windows, found.tokens) == (6 * 4, 6, 6 * 5)


def test_value_and_standard_error_by_hand():
    table = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    windows = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 0, 0]])
    scores = torch.log(torch.tensor([[2, 4 / 3], [2, 2], [4, 2]])).double()
    means = scores.mean(dim=1)
    found = measure_perplexity(Fixed(table), windows)
    assert found.value == pytest.approx(math.exp(scores.mean()), rel=1e-6)
    assert found.stderr == pytest.approx(found.value * float(means.std()) / math.sqrt(3), rel=1e-5)


def test_a_broken_model_has_an_infinite_perplexity():
    scores = Accumulator()
    scores.add(torch.full((2, 3), 800.0), 8, 1.0)
    assert scores.result().value == math.inf


def test_bos_scores_the_first_token_too():
    table = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    found = measure_perplexity(Fixed(table), torch.tensor([[1, 1]]), rules=PROTOCOLS["windows-bos"], bos=0)
    assert found.value == pytest.approx(math.sqrt(2 * 4 / 3), rel=1e-6)
    assert (found.scored, found.tokens) == (2, 3)
    assert math.isnan(found.stderr)


def test_protocols_are_named():
    assert protocol("windows") is PROTOCOLS["windows"]
    with pytest.raises(SpecError, match="windows-bos"):
        protocol("sliding")
    with pytest.raises(SpecError, match="BOS"):
        measure_perplexity(
            Fixed(torch.zeros(2, 2)), torch.zeros(1, 2, dtype=torch.int64), rules=PROTOCOLS["windows-bos"]
        )
    with pytest.raises(SpecError, match="batch_size=0"):
        measure_perplexity(Fixed(torch.zeros(2, 2)), torch.zeros(1, 2, dtype=torch.int64), batch_size=0)


def test_the_batch_size_does_not_change_the_figure(tiny, windows):
    one = measure_perplexity(tiny.model, windows, batch_size=1)
    four = measure_perplexity(tiny.model, windows, batch_size=4)
    assert one.value == pytest.approx(four.value, rel=1e-5)


@pytest.mark.exhaustive(where=lambda text: text > 10_240)
@pytest.mark.parametrize(
    ("text", "perplexity", "more", "divergence"), [(10_240, 25.342, 0.1276, 0.128), (51_200, 23.651, 0.1298, 0.131)]
)
def test_the_documented_figures_of_the_bundled_model(tiny, tokens, text, perplexity, more, divergence):
    """The whole text's are documented: float, and int4 symmetric round to nearest, groups of 128, float32 scales."""
    quantized = quantized_copy(tiny.model, parse_scheme("int4-g128", torch.float32))
    found = compare(tiny.model, {"q": quantized}, make_windows(tokens, 256, text))
    assert found.reference.value == pytest.approx(perplexity, abs=0.005)
    assert found.reference.scored == text // 256 * 255
    change = found.perplexity["q"].value / found.reference.value - 1
    assert change == pytest.approx(more, abs=0.001)
    assert found.divergence["q"].kl == pytest.approx(divergence, abs=0.002)

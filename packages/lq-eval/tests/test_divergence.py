import pytest
import torch
from lq_eval.divergence import compare, kl_divergence
from lq_eval.evaluate import quantized_copy
from lq_eval.perplexity import measure_perplexity
from lq_eval.schemes import parse_scheme
from lq_formats import SpecError


def test_kl_equals_pytorchs_in_float64():
    p, q = torch.randn(2, 5, 33, dtype=torch.float64).log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), expected)


def test_kl_of_equal_distributions_is_zero_and_never_negative():
    p = torch.randn(100, 333).log_softmax(-1)
    assert kl_divergence(p, p).max() == 0
    assert kl_divergence(p, (p + 1e-7 * torch.randn_like(p)).log_softmax(-1)).min() >= 0


def test_kl_where_tokens_are_excluded():
    """A token that the reference excludes counts 0; one that only the other model excludes makes it infinite."""
    p, q = (torch.randn(8).log_softmax(-1) for _ in range(2))
    excluded = torch.tensor([-torch.inf])
    both = kl_divergence(torch.cat([p, excluded]), torch.cat([q, excluded]))
    torch.testing.assert_close(both, kl_divergence(p, q))
    masked = torch.where(torch.arange(8) == 3, -torch.inf, p).log_softmax(-1)
    assert kl_divergence(masked, q).isfinite()
    assert kl_divergence(q, masked) == torch.inf
    assert kl_divergence(p, torch.full_like(p, torch.nan)).isnan()


class Constant(torch.nn.Module):
    """Says the same of every token, and no configuration tells how many it knows."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, ids):
        return self.logits.expand(*ids.shape, -1)


def test_a_model_of_nan_agrees_with_nothing(windows):
    """argmax takes NaN for the largest, here at the token that the reference chooses."""
    chosen = torch.zeros(4096)
    chosen[0] = 1
    found = compare(Constant(chosen), {"nan": Constant(chosen * torch.nan), "same": Constant(chosen)}, windows)
    assert (found.divergence["nan"].top1, found.divergence["same"].top1) == (0, 1)
    assert torch.tensor(found.divergence["nan"].kl).isnan()


def test_a_model_does_not_diverge_from_itself(tiny, windows):
    found = compare(tiny.model, {"same": tiny.model}, windows)
    assert found.divergence["same"].kl == 0
    assert found.divergence["same"].top1 == 1
    assert found.perplexity["same"].value == found.reference.value
    assert found.reference.value == pytest.approx(measure_perplexity(tiny.model, windows).value, rel=1e-6)


def test_more_bits_diverge_less(tiny, windows):
    names = ("int8", "int4-g32", "int4-g256")
    copies = {name: quantized_copy(tiny.model, parse_scheme(name)) for name in names}
    seen = []
    found = compare(tiny.model, copies, windows, progress=seen.append)
    kl = [found.divergence[name].kl for name in names]
    assert 0 < kl[0] < 0.01 < kl[1] < kl[2]
    assert found.divergence["int8"].top1 > 0.95 > found.divergence["int4-g256"].top1
    assert found.divergence["int8"].positions == 4 * 255
    assert sum(seen) == 4 * 4


def test_models_of_another_vocabulary_are_refused(windows):
    with pytest.raises(SpecError, match="the model 'wide' knows 5000 tokens and its reference 4096"):
        compare(Constant(torch.zeros(4096)), {"wide": Constant(torch.zeros(5000))}, windows)


def test_out_of_time_every_model_has_seen_the_same_windows(tiny, windows):
    found = compare(tiny.model, {"same": tiny.model}, windows, batch_size=1, seconds=-1.0)
    assert found.reference.windows == found.perplexity["same"].windows == 1
    assert found.divergence["same"].kl == 0

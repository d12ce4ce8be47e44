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
    class Model(torch.nn.Module):
        """Any number of logits, which no configuration tells."""

        def __init__(self, tokens):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(tokens))

        def forward(self, ids):
            return self.bias.expand(*ids.shape, -1)

    with pytest.raises(SpecError, match="the model 'wide' knows 5000 tokens and its reference 4096"):
        compare(Model(4096), {"wide": Model(5000)}, windows)


def test_out_of_time_every_model_has_seen_the_same_windows(tiny, windows):
    found = compare(tiny.model, {"same": tiny.model}, windows, batch_size=1, seconds=-1.0)
    assert found.reference.windows == found.perplexity["same"].windows == 1
    assert found.divergence["same"].kl == 0

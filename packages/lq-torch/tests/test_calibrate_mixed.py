"""Bits where they are felt: the measurement, the allocation and its budget."""

import copy
import itertools
import json

import pytest
import torch
from lq_formats import FormatError, NonFiniteError, SpecError
from lq_torch import Int4Tensor, Int4WeightOnlyConfig, IntxTensor, LowBitTensor, quantize_
from lq_torch.calibrate import GPTQOptions, gptq, mixed_precision
from lq_torch.calibrate.mixed import Candidate, allocate, fill_unreached
from lq_torch.calibrate.resume import SensitivityFile
from lq_torch.calibrate.sensitivity import COARSE, sensitivity
from lq_torch.quantize import select_linears
from torch import nn


class Block(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.up = nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)
        self.gain = gain

    def forward(self, x):
        return x + self.gain * self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """The first block hardly matters for what is predicted, the second does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 64)
        self.blocks = nn.ModuleList([Block(0.1), Block(3.0)])
        self.lm_head = nn.Linear(64, 40)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


@pytest.fixture
def tokens():
    return torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(1))


def nbytes(model):
    found = [p for p in model.parameters() if isinstance(p, LowBitTensor)]
    return sum(p.packed_nbytes for p in found), sum(p.numel() for p in found)


@pytest.mark.parametrize("options", [None, GPTQOptions()], ids=["data-free", "gptq"])
def test_sensitivity_is_the_divergence_of_the_model_with_one_layer_at_three_bits(options, tokens):
    model = Model()
    layers = dict(select_linears(model))
    before = {path: layer.weight.clone() for path, layer in layers.items()}
    found = sensitivity(model, layers, tokens, options, 3, SensitivityFile(None, model, tokens, options))
    assert all(torch.equal(layer.weight, before[path]) for path, layer in layers.items())
    log_p = model(tokens).detach().double().log_softmax(-1)
    for path in layers:
        coarse = copy.deepcopy(model)
        if options is None:
            quantize_(coarse, COARSE, lambda _, name, path=path: name == path)
        else:
            gptq(coarse, tokens, {path: COARSE}, GPTQOptions(sweeps=0, correct_inputs=0))
        log_q = coarse(tokens).detach().double().log_softmax(-1)
        assert found[path] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=2e-3, abs=1e-7)
    assert min(found["blocks.1.up"], found["blocks.1.down"]) > 30 * max(found["blocks.0.up"], found["blocks.0.down"])


def test_predictions_that_are_not_finite_are_refused_but_for_tokens_that_never_come(tokens):
    padded, broken, late = Model(), Model(), Model()
    padded.lm_head.bias.data[-3:] = -torch.inf
    model = Model()
    model.lm_head = nn.Linear(64, 37)
    model.lm_head.weight.data, model.lm_head.bias.data = padded.lm_head.weight[:-3].data, padded.lm_head.bias[:-3].data
    found, expected = (
        sensitivity(one, dict(select_linears(one)), tokens, None, 4, SensitivityFile(None, one, tokens, None))
        for one in (padded, model)
    )
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
    broken.embed.weight.data[tokens[0, 0]] = torch.nan
    with pytest.raises(NonFiniteError, match="predictions for the calibration text"):
        mixed_precision(broken, tokens, 4.5)
    late.blocks[1].up.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.up"):
        mixed_precision(late, tokens, 4.5)


def test_an_idle_expert_is_taken_for_one_of_its_like():
    measured = {"a.0.up": 3.0, "a.1.up": 0.0, "a.2.up": 1.0, "a.3.up": 2.0, "a.1.down": 0.0}
    assert fill_unreached(measured) == measured | {"a.1.up": 2.0}
    measured = {"a.0.w1": 3.0, "a.1.w1": 0.0, "a.0.w2": 1.0, "a.1.w2": 0.0, "a.0.w3": 2.0}
    assert fill_unreached(measured) == measured | {"a.1.w1": 3.0, "a.1.w2": 1.0}


def test_what_was_measured_is_kept(tokens, tmp_path):
    """An interrupted measurement goes on where it stopped, and serves every budget."""

    def interrupt(done, total):
        assert total == 4
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mixed_precision(Model(), tokens, 4.5, gptq=GPTQOptions(), resume=tmp_path, progress=interrupt)
    seen = []
    resumed = mixed_precision(
        Model(), tokens, 4.5, gptq=GPTQOptions(), resume=tmp_path, progress=lambda done, _: seen.append(done)
    )
    assert seen == [4]
    assert resumed == mixed_precision(Model(), tokens, 4.5, gptq=GPTQOptions())
    mixed_precision(Model(), tokens, 3.5, gptq=GPTQOptions(), resume=tmp_path, progress=lambda *_: pytest.fail("again"))
    other = Model()
    other.lm_head.weight.data += 1
    for case, named in (
        (lambda: mixed_precision(Model(), tokens, 4.5, resume=tmp_path), "gptq"),
        (lambda: mixed_precision(Model(), tokens.flip(0), 4.5, gptq=GPTQOptions(), resume=tmp_path), "tokens"),
        (lambda: mixed_precision(other, tokens, 4.5, gptq=GPTQOptions(), resume=tmp_path), "model"),
    ):
        with pytest.raises(SpecError, match=f": {named} differ"):
            case()
    file = tmp_path / "sensitivity.json"
    for layers in ([], {"blocks.0.up": -1.0}, {"blocks.0.up": "1"}, None):
        file.write_text("{" if layers is None else json.dumps({**json.loads(file.read_text()), "layers": layers}))
        with pytest.raises(FormatError, match=r"sensitivity\.json"):
            mixed_precision(Model(), tokens, 4.5, gptq=GPTQOptions(), resume=tmp_path)


@pytest.mark.parametrize("target", [2.6, 3.25, 4.5, 7.9])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_the_budget_is_kept_and_used(target, symmetric, tokens):
    model = Model()
    configs = mixed_precision(model, tokens, target, symmetric=symmetric, scale_dtype=torch.float16)
    assert set(configs) == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")}
    report = gptq(model, tokens, configs)
    used, weights = nbytes(model)
    assert used <= target * weights / 8
    # The next step of the smallest layer would not have fitted.
    assert used > (target - 1.5) * weights / 8
    bits = {layer.path: layer.bits_per_weight for layer in report.layers}
    assert bits["blocks.1.up"] + bits["blocks.1.down"] > bits["blocks.0.up"] + bits["blocks.0.down"] + 0.4
    for path, config in configs.items():
        kind = Int4Tensor if isinstance(config, Int4WeightOnlyConfig) else IntxTensor
        assert type(model.get_submodule(path).weight) is kind


@pytest.mark.parametrize("options", [None, GPTQOptions()], ids=["data-free", "gptq"])
def test_a_layer_of_no_out_features_takes_nothing_of_the_budget(options, tokens):
    model, whole = Model(), Model()
    for block in model.blocks:
        block.side = nn.Linear(64, 0)
        block.forward = lambda x, block=block: Block.forward(block, x) + block.side(x).sum()
    configs = mixed_precision(model, tokens, 4.5, gptq=options)
    assert configs.keys() >= {"blocks.0.side", "blocks.1.side"}
    assert configs.items() >= mixed_precision(whole, tokens, 4.5, gptq=options).items()
    gptq(model, tokens, configs)
    used, weights = nbytes(model)
    assert used <= 4.5 * weights / 8


def test_tokens_beyond_the_vocabulary_are_named(tokens):
    with pytest.raises(SpecError, match=f"and {int(tokens.max()) + 1000} is asked for"):
        mixed_precision(Model(), tokens + 1000, 4.0)


def test_a_budget_below_the_cheapest_choice_is_refused(tokens):
    with pytest.raises(SpecError, match="the least these layers take"):
        mixed_precision(Model(), tokens, 2.0)
    for nothing in (0.0, -4.5, float("nan"), float("inf"), "4.5", None, True):
        with pytest.raises(SpecError, match="target_bits"):
            mixed_precision(Model(), tokens, nothing)


def test_allocation_is_the_best_of_all_on_convex_costs():
    """Against every combination, with divergences that fall fourfold a bit, as they do."""
    generator = torch.Generator().manual_seed(2)
    for budget in (24, 30, 41, 48):
        felt = torch.rand(4, generator=generator).tolist()
        options = {
            str(layer): [Candidate(Int4WeightOnlyConfig(), 2 * bits, weight * 4.0**-bits) for bits in (2, 3, 4, 6, 8)]
            for layer, weight in enumerate(felt)
        }
        chosen = allocate(options, budget)
        assert sum(candidate.nbytes for candidate in chosen.values()) <= budget
        fitting = [
            combination
            for combination in itertools.product(*options.values())
            if sum(candidate.nbytes for candidate in combination) <= budget
        ]
        best = min(sum(candidate.divergence for candidate in combination) for combination in fitting)
        # Greedy steps lose at most what the last, unaffordable one would have bought.
        assert sum(candidate.divergence for candidate in chosen.values()) <= 1.35 * best


def test_candidates_that_cost_more_and_give_less_are_never_chosen():
    config = Int4WeightOnlyConfig()
    options = {
        "a": [
            Candidate(config, 10, 1.0),
            Candidate(config, 20, 2.0),
            Candidate(config, 20, 0.6),
            Candidate(config, 30, 0.1),
        ]
    }
    assert allocate(options, 19)["a"] == Candidate(config, 10, 1.0)
    assert allocate(options, 29)["a"] == Candidate(config, 20, 0.6)
    assert allocate(options, 30)["a"] == Candidate(config, 30, 0.1)

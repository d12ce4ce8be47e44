"""Calibration of whole models: what comes out, what is reported, interruptions and bad input.

One long file: all of it is tried on the same small models of many makes, compared by the same few functions.
"""

import copy
import json

import pytest
import torch
from lq_formats import FormatError, NonFiniteError, SpecError, UnsupportedError
from lq_torch import (
    Int4PreshuffledTensor,
    Int4Tensor,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxTensor,
    IntxWeightOnlyConfig,
    LowBitTensor,
    load,
    quantize_,
    save_pretrained,
)
from lq_torch.calibrate import AWQOptions, CalibrationReport, GPTQOptions, awq, awq_gptq, gptq
from lq_torch.calibrate.blocks import find_blocks, record_stream, split_batches
from lq_torch.calibrate.smoothing import find_folds
from lq_torch.calibrate.stages import find_stages, measure
from torch import nn

transformers = pytest.importorskip("transformers")

VOCABULARY, LAYERS = 61, 2
INT4 = Int4WeightOnlyConfig(group_size=32)
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def make(family="Llama", dtype=torch.float32, **changes):
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **changes})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture
def tokens():
    return torch.randint(1, VOCABULARY, (10, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def change(model, reference, tokens):
    """Return the squared change of the logits, as a share."""
    after, before = model(tokens).logits.double(), reference(tokens).logits.double()
    return float((after - before).square().sum() / before.square().sum())


def weights(model):
    found = {path: module.weight for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {path: weight for path, weight in found.items() if isinstance(weight, LowBitTensor)}


def bits(model):
    return {f"{path}:{name}": part for path, w in weights(model).items() for name, part in w.to_tensors().items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Phi3", "GPTNeoX", "OPT"])
def test_models_of_every_make_are_calibrated(family, tokens):
    """No architecture is named in the code: blocks, stages and what enters them are found."""
    changes = {"OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64}, "Gemma2": {"head_dim": 16}}.get(family, {})
    model = make(family, **changes)
    nearest, calibrated = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(nearest, INT4)
    report = gptq(calibrated, tokens, INT4, batch_size=4)
    assert report.fallbacks == ()
    assert {layer.path for layer in report.layers} == set(weights(nearest)) == set(weights(calibrated))
    assert {type(w) for w in weights(calibrated).values()} == {Int4Tensor}
    assert all(layer.tokens == tokens.numel() for layer in report.layers)
    assert change(calibrated, model, tokens) < 0.6 * change(nearest, model, tokens)


@pytest.mark.parametrize("calibrate", [gptq, awq, awq_gptq], ids=["gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Int4WeightOnlyConfig(group_size=32, symmetric=False), Int4Tensor),
        (Int4WeightOnlyConfig(group_size=-1, int4_packing_format="preshuffled"), Int4PreshuffledTensor),
        (IntxWeightOnlyConfig(bits=3, group_size=32), IntxTensor),
    ],
    ids=["int4-g32-asym", "int4-row-preshuffled", "int3-g32-asym"],
)
def test_what_is_made_is_what_quantize_makes_and_survives_saving(calibrate, config, kind, tokens, tmp_path):
    model = make(dtype=torch.bfloat16)
    report = calibrate(model, tokens, config)
    assert {type(w) for w in weights(model).values()} == {kind}
    assert {layer.bits_per_weight for layer in report.layers} == {
        w.packed_nbytes * 8 / w.numel() for w in weights(model).values()
    }
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path)
    assert equal(bits(loaded), bits(model))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_scaled_channels_leave_the_function_and_help():
    """AWQ folds are exact: dense weights after smoothing give the logits of before, so less is lost by rounding."""
    tokens = torch.randint(1, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))
    model = make()
    model.model.embed_tokens.weight.data[:, ::7] *= 12  # some channels matter
    scaled, searched = copy.deepcopy(model), copy.deepcopy(model)
    report = awq(scaled, tokens, INT4)
    awq(searched, tokens, INT4, AWQOptions(points=1))
    exponents = {layer.path.rpartition(".")[2]: layer.exponent for layer in report.layers[:7]}
    assert exponents["o_proj"] is None  # two heads share a row of v
    assert all(
        exponents[name] is not None for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    )
    assert max(exponents[name] for name in ("q_proj", "gate_proj")) > 0
    quantize_(model, INT4)
    reference = make()
    reference.model.embed_tokens.weight.data[:, ::7] *= 12
    assert change(scaled, reference, tokens) < change(model, reference, tokens)


def names_of_folds(block, run, shared=frozenset()):
    names = {id(module): name.rpartition(".")[2] for name, module in block.named_modules()}
    folds = find_folds(block, set(shared), run)
    return [(names[id(fold.source)], tuple(names[id(member)] for member in fold.members)) for fold in folds]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_massive_token_hides_no_wrong_fold(dtype, tokens):
    """q is as wide as what o takes; in the norm of all outputs a change of it is nothing beside one channel of a token."""
    model, cpu = make(dtype=dtype), torch.device("cpu")
    model.model.embed_tokens.weight[tokens[0, 0], 7] = 1e6
    ((_, block), *_) = blocks = find_blocks(model)
    stream = record_stream(model, blocks, [tokens], cpu, cpu)
    before = copy.deepcopy(block.state_dict())
    assert names_of_folds(block, stream.runs(0, block)[0]) == [
        ("input_layernorm", ("q_proj", "k_proj", "v_proj")),
        ("post_attention_layernorm", ("gate_proj", "up_proj")),
        ("up_proj", ("down_proj",)),
    ]
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


class Gelu(nn.Module):
    """A block with a LayerNorm; what comes behind its activation is not proportional to what goes in."""

    def __init__(self, add):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)
        self.norm.bias.data.normal_()
        self.add = add

    def forward(self, x):
        return self.add(x, self.down(nn.functional.gelu(self.up(self.norm(x)))))


@torch.no_grad()
@pytest.mark.parametrize(
    "add",
    [
        lambda x, y: x + y,
        lambda x, y: x.add_(y),
        lambda x, y: 2 * x + y,
        lambda x, y: torch.cat([x, y], dim=-1),
        lambda x, y: torch.cat([x, torch.zeros_like(x)]),
    ],
    ids=["residual", "in-place", "more", "wider", "unused"],
)
def test_folds_are_judged_by_what_layers_return_and_blocks_add(add):
    """However much larger what the block hands on is."""
    block, x = Gelu(add), 100 * torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    assert names_of_folds(block, lambda: block(x.clone())) == [("norm", ("up",))]


@torch.no_grad()
def test_a_norm_that_others_use_too_is_not_folded_into():
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    block = Gelu(lambda x, y: x + y)
    assert names_of_folds(block, lambda: block(x), {id(block.norm.weight)}) == []  # another module's weight, too
    block.add = lambda x, y: x + y + 0.1 * block.norm(x)
    assert names_of_folds(block, lambda: block(x)) == []


@torch.no_grad()
def test_a_layer_norm_is_folded_with_its_bias():
    """The block's function stays, whatever factors are folded."""
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    block = Gelu(lambda x, y: x + y)
    before = block(x)
    (fold,) = find_folds(block, set(), lambda: block(x))
    fold.apply(torch.linspace(0.2, 5, 64))
    torch.testing.assert_close(block(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("calibrate", [gptq, awq_gptq], ids=["gptq", "awq+gptq"])
def test_layers_of_one_input_may_have_bits_of_their_own(calibrate, tokens):
    model = make()
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
    configs = {
        path: IntxWeightOnlyConfig(bits=2 + number % 5, group_size=32, symmetric=False)
        for number, path in enumerate(paths)
    }
    fine = dict.fromkeys(paths, IntxWeightOnlyConfig(bits=8, group_size=32, symmetric=False))
    report = calibrate(model, tokens, configs)
    assert sorted(layer.path for layer in report.layers) == sorted(paths)
    for layer in report.layers:
        assert weights(model)[layer.path].bits == configs[layer.path].bits
        assert layer.bits_per_weight == configs[layer.path].bits + 2 * 32 / 32
    exact = make()
    calibrate(exact, tokens, fine)
    assert change(exact, make(), tokens) < 1e-4 < change(model, make(), tokens)
    with pytest.raises(SpecError, match="filter_fn"):
        calibrate(make(), tokens, fine, filter_fn=lambda *_: True)


def test_a_report_is_json_and_readable(tokens):
    seen = []
    report = gptq(make(), tokens, INT4, progress=lambda done, total, layer: seen.append((done, total, layer)))
    assert isinstance(report, CalibrationReport)
    assert [done for done, _, _ in seen] == list(range(1, 15))
    assert {total for _, total, _ in seen} == {14}
    assert tuple(layer for _, _, layer in seen) == report.layers
    assert all(0 < layer.error < 0.05 and layer.damping == 0.01 for layer in report.layers)
    assert json.loads(report.to_json())["layers"][0]["path"] == "model.layers.0.self_attn.q_proj"
    assert "14 layers" in str(report)


def test_the_same_bits_however_activations_are_kept(tokens):
    plain, offloaded = make(), make()
    gptq(plain, tokens, INT4, batch_size=4)
    gptq(offloaded, tokens, INT4, batch_size=4, offload=True, device="cpu")
    assert equal(bits(plain), bits(offloaded))


@pytest.mark.parametrize("calibrate", [gptq, awq_gptq], ids=["gptq", "awq+gptq"])
def test_an_interrupted_run_goes_on_to_the_same_bits(calibrate, tokens, tmp_path):
    whole, cut = make(), make()
    calibrate(whole, tokens, INT4)

    def interrupt(done, total, layer):
        if done == 9:  # in the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(cut, tokens, INT4, resume=tmp_path, progress=interrupt)
    assert [path.name for path in tmp_path.glob("block-*")] == ["block-00000"]
    resumed = make()
    report = calibrate(resumed, tokens, INT4, resume=tmp_path)
    assert report.resumed_blocks == 1
    assert len(report.layers) == 14
    assert equal(bits(resumed), bits(whole))
    assert torch.equal(resumed(tokens).logits, whole(tokens).logits)


def test_a_block_that_was_being_written_is_made_again(tokens, tmp_path, monkeypatch):
    from lq_torch.calibrate import resume

    def killed(module, folder):
        save_pretrained(module, folder)
        next(folder.glob("*.safetensors")).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            gptq(make(), tokens, INT4, resume=tmp_path)
    whole, resumed = make(), make()
    gptq(whole, tokens, INT4)
    assert gptq(resumed, tokens, INT4, resume=tmp_path).resumed_blocks == 0
    assert equal(bits(resumed), bits(whole))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-00000", "block-00001", "calibration.json"]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_processes_of_one_run_may_share_a_folder(first, tokens, tmp_path, monkeypatch):
    """Another one has every block before this one has written, or renamed, its first."""
    from lq_torch.calibrate import resume

    def overtaken(module, folder):
        monkeypatch.setattr(resume, "save_pretrained", save_pretrained)
        if not first:
            save_pretrained(module, folder)
        assert gptq(make(), tokens, INT4, resume=tmp_path).resumed_blocks == 0
        if first:
            save_pretrained(module, folder)

    monkeypatch.setattr(resume, "save_pretrained", overtaken)
    whole, late = make(), make()
    gptq(whole, tokens, INT4)
    assert gptq(late, tokens, INT4, resume=tmp_path).resumed_blocks == LAYERS - 1
    assert equal(bits(late), bits(whole))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-00000", "block-00001", "calibration.json"]


def test_what_cannot_be_written_is_no_state(tokens, tmp_path, monkeypatch):
    from lq_torch.calibrate import resume

    def full(file, text, **options):
        file.write_bytes(text.encode()[:9])
        raise OSError(28, "No space left on device")

    def half(module, folder):
        save_pretrained(module, folder)
        full(next(folder.glob("*.safetensors")), "half")

    for owner, name, function, left in (
        (resume.Path, "write_text", full, []),
        (resume, "save_pretrained", half, ["calibration.json"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, function)
            with pytest.raises(OSError, match="No space"):
                gptq(make(), tokens, INT4, resume=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == left


def test_blocks_without_a_state_are_refused(tokens, tmp_path):
    """They may be another model's."""
    gptq(make(), tokens, INT4, resume=tmp_path)
    (tmp_path / "calibration.json").unlink()
    model = make(initializer_range=0.1)
    with pytest.raises(FormatError, match=r"holds block-00000, but no calibration\.json"):
        gptq(model, tokens, INT4, resume=tmp_path)
    assert weights(model) == {}


def test_options_of_awq_are_of_a_run(tokens, tmp_path):
    awq(make(), tokens, INT4, AWQOptions(points=2), resume=tmp_path)
    for case in (
        lambda: awq(make(), tokens, INT4, resume=tmp_path),
        lambda: gptq(make(), tokens, INT4, resume=tmp_path),
    ):
        with pytest.raises(SpecError, match="awq"):
            case()


def test_the_state_of_another_run_is_refused(tokens, tmp_path):
    gptq(make(), tokens, INT4, resume=tmp_path)
    for case, named in (
        (
            lambda: gptq(make(), tokens + 0 * tokens[:, :1], Int4WeightOnlyConfig(group_size=16), resume=tmp_path),
            "config",
        ),
        (lambda: gptq(make(), tokens.flip(0), INT4, resume=tmp_path), "tokens"),
        (lambda: gptq(make(), tokens, INT4, GPTQOptions(sweeps=1), resume=tmp_path), "gptq"),
        (lambda: gptq(make(initializer_range=0.1), tokens, INT4, resume=tmp_path), "model"),
    ):
        with pytest.raises(SpecError, match=named):
            case()
    (tmp_path / "block-00001" / "report.json").write_text('[{"path": 1}]')
    with pytest.raises(FormatError, match=r"report\.json"):
        gptq(make(), tokens, INT4, resume=tmp_path)
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(FormatError, match=r"calibration\.json"):
        gptq(make(), tokens, INT4, resume=tmp_path)


class Experts(nn.Module):
    """A layer of experts, of which tokens choose by their first channel; the last is never chosen."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}) for _ in range(3)
        )

    def forward(self, x):
        flat = x.reshape(-1, 64)
        chosen = (flat[:, 0] > 0).long()
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            if len(rows):
                y[rows] = expert["down"](torch.relu(expert["up"](flat[rows])))
        return x + y.view(x.shape)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.project = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Experts() for _ in range(2))
        self.lm_head = nn.Linear(64, VOCABULARY)

    def forward(self, ids):
        x = self.project(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


@torch.no_grad()
def test_a_layer_that_is_called_twice_is_measured_twice_in_every_batch():
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    batches = [torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(number)) for number in range(3)]
    found = measure({"a": a, "b": b}, [lambda x=x: b(a(torch.relu(a(x)))) for x in batches])
    assert {moments.members[0]: moments.tokens for moments in found} == {"a": 30, "b": 15}


@torch.no_grad()
def test_a_block_may_add_in_place(tokens):
    """Its input is the batch's, which other runs of the block take too."""

    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return x.add_(self.layer(x))

    model, cpu = Mixture(), torch.device("cpu")
    model.blocks = nn.ModuleList(Adding() for _ in range(2))
    blocks, batches = find_blocks(model), split_batches(tokens, 4)
    stream = record_stream(model, blocks, batches, cpu, cpu)
    exact = stream.copy()
    for _ in range(2):
        for batch, hidden, run in zip(batches, stream.hidden, stream.runs(0, blocks[0][1]), strict=True):
            entering = model.project(model.embed(batch))
            assert torch.equal(run(), entering + model.blocks[0].layer(entering))
            assert torch.equal(hidden, entering)
    for number, (path, block) in enumerate(blocks):
        stream.advance(number, path, block)
    for batch, hidden, entering in zip(batches, stream.hidden, exact.hidden, strict=True):
        assert torch.equal(entering, model.project(model.embed(batch)))
        torch.testing.assert_close(model.lm_head(hidden), model(batch))


@torch.no_grad()
def test_layers_behind_each_other_are_stages_and_experts_are_one():
    """fc2 is measured with fc1 quantized; experts are measured together, those that no token reaches, too."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(64, 64), nn.Linear(64, 64)
            self.mlp = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
            shapes = {"w1": (64, 96), "w2": (96, 64), "w3": (64, 96)}
            self.experts = nn.ModuleList(
                nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()}) for _ in range(3)
            )

        def forward(self, x):
            x = self.mlp(self.fc2(torch.relu(self.fc1(x))))
            for expert, half in zip(self.experts, x.chunk(2, dim=-2), strict=False):
                x = x + expert["w2"](expert["w1"](half) * expert["w3"](half)).sum()
            return x

    block = Block()
    linears = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    w1, w2, w3 = ([f"experts.{number}.w{i}" for number in range(3)] for i in (1, 2, 3))
    found = find_stages(linears, lambda: block(torch.randn(2, 8, 64)))
    assert [sorted(stage) for stage in found] == [["fc1"], ["fc2"], ["mlp.0"], ["mlp.2"], sorted(w1 + w3), w2]


def test_an_idle_expert_and_what_is_outside_of_blocks_are_quantized_without_data_and_named(tokens):
    model = Mixture()
    report = gptq(model, tokens, INT4, batch_size=3)
    reasons = {layer.path: layer.note for layer in report.fallbacks}
    assert set(reasons) == {"project"} | {f"blocks.{i}.experts.2.{name}" for i in (0, 1) for name in ("up", "down")}
    assert "outside of the decoder blocks" in reasons["project"]
    assert "no calibration token reaches it" in reasons["blocks.0.experts.2.up"]
    assert "blocks.0.experts.2.up: no calibration token" in str(report)
    reached = [layer for layer in report.layers if layer.path.startswith("blocks.0.experts.") and ".up" in layer.path]
    assert sum(layer.tokens for layer in reached) == tokens.numel()
    assert len(weights(model)) == len(report.layers) == 13


def test_a_hessian_without_a_factor_falls_back_and_says_so(tokens, monkeypatch):
    from lq_torch.calibrate import layers

    factor = layers.factor_inverse
    monkeypatch.setattr(layers, "factor_inverse", lambda h, d: None if h.shape[0] == 96 else factor(h, d))
    model, nearest = make(), make()
    report = gptq(model, tokens, INT4)
    quantize_(nearest, INT4)
    assert [layer.path for layer in report.fallbacks] == [f"model.layers.{i}.mlp.down_proj" for i in range(LAYERS)]
    assert all("no Cholesky factor" in layer.note for layer in report.fallbacks)
    path = "model.layers.0.mlp.down_proj"
    assert torch.equal(weights(model)[path].qdata, weights(nearest)[path].qdata)


def test_activations_that_are_not_finite_name_the_layer(tokens):
    model = make()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1: mlp\.gate_proj, mlp\.up_proj"):
        gptq(model, tokens, INT4)


def test_a_layer_that_cannot_be_quantized_leaves_the_model_as_it_was(tokens):
    model = make(intermediate_size=80)
    with pytest.raises(SpecError.__mro__[1], match="down_proj"):
        gptq(model, tokens, INT4)
    assert weights(model) == {}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.zeros(3, 4), INT4), SpecError, "windows"),
        ((torch.zeros(4, dtype=torch.int64), INT4), SpecError, "windows"),
        ((torch.zeros(0, 4, dtype=torch.int64), INT4), SpecError, "at least one"),
        ((torch.ones(1, 4, dtype=torch.int64), Int8WeightOnlyConfig()), UnsupportedError, "Int8WeightOnlyConfig"),
        ((torch.ones(1, 4, dtype=torch.int64), "int4"), SpecError, "config is a str"),
        ((torch.ones(1, 4, dtype=torch.int64), {"nowhere": INT4}), SpecError, "'nowhere'"),
        ((torch.full((1, 4), VOCABULARY), INT4), SpecError, f"embed.* 0 to {VOCABULARY - 1}, and {VOCABULARY} is"),
        ((torch.full((1, 4), -1), INT4), SpecError, "and -1 is"),
        (
            (torch.ones(1, 4, dtype=torch.int64), INT4, {"descend": 1}),
            SpecError,
            "options are a dict: expected GPTQOptions",
        ),
    ],
    ids=["floats", "flat", "empty", "int8", "name", "nowhere", "beyond", "negative", "options"],
)
def test_wrong_arguments_are_named(arguments, error, match):
    model = make()
    with pytest.raises(error, match=match):
        gptq(model, *arguments)
    assert weights(model) == {}
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "2", None, True])
def test_a_batch_size_that_is_no_number_of_windows_is_named(batch_size, tokens):
    with pytest.raises(SpecError, match=f"batch_size={batch_size!r}: expected"):
        gptq(make(), tokens, INT4, batch_size=batch_size)


def test_inference_mode_changes_no_bit(tokens):
    models = [make(num_hidden_layers=1), make(num_hidden_layers=1)]
    gptq(models[0], tokens[:2], INT4)
    with torch.inference_mode():
        gptq(models[1], tokens[:2], INT4)
    assert bits(models[0])
    assert equal(*(bits(model) for model in models))


def test_a_model_without_blocks_is_refused(tokens):
    with pytest.raises(UnsupportedError, match="ModuleList"):
        gptq(nn.Sequential(nn.Embedding(VOCABULARY, 64), nn.Linear(64, 64)), tokens, INT4)


def test_blocks_that_are_no_chain_are_refused(tokens):
    class Parallel(Mixture):
        def forward(self, ids):
            x = self.embed(ids)
            return self.lm_head(sum(block(x + 1) for block in self.blocks))

    with pytest.raises(UnsupportedError, match=r"blocks\.1 does not take the output"):
        gptq(Parallel(), tokens, INT4)


class Anchored(nn.Module):
    """Blocks that take, beside the hidden states, what the tokens are embedded as, and a mask that is always the same."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

        def forward(self, x, anchor, *, scales):
            return 0.5 * x + anchor["embedded"] * scales[0] + self.down(torch.tanh(self.up(x)))

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 64), nn.Linear(64, VOCABULARY)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, ids):
        x = embedded = self.embed(ids)
        for block in self.blocks:
            x = block(x, {"embedded": embedded}, scales=[torch.ones(64), 2])
        return self.head(x)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 4, 10])
def test_every_batch_has_the_arguments_of_its_own_tokens(batch_size, tokens):
    model, cpu = Anchored(), torch.device("cpu")
    blocks, batches = find_blocks(model), split_batches(tokens, batch_size)
    stream = record_stream(model, blocks, batches, cpu, cpu)
    for number, (path, block) in enumerate(blocks):
        stream.advance(number, path, block)
    for batch, hidden in zip(batches, stream.hidden, strict=True):
        torch.testing.assert_close(model.head(hidden), model(batch))
    report = gptq(model, tokens, INT4, batch_size=batch_size)
    assert [layer.error is not None for layer in report.layers] == [True] * 6 + [False]


@torch.no_grad()
def test_arguments_that_batches_share_are_kept_once(tokens):
    model, cpu = make(), torch.device("cpu")
    stream = record_stream(model, find_blocks(model), split_batches(tokens, 4), cpu, cpu)
    for extras in stream.extras:
        assert len(extras) == 3
        assert extras[0] is extras[1]


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0},
        {"damping": float("nan")},
        {"sweeps": -1},
        {"correct_inputs": 2},
        {"activation_order": "false"},
        {"activation_order": 1},
    ],
)
def test_options_are_validated(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        GPTQOptions(**options)
    with pytest.raises(SpecError, match="points"):
        AWQOptions(points=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("calibrate", [gptq, awq_gptq], ids=["gptq", "awq+gptq"])
def test_blocks_compute_on_a_gpu_one_at_a_time(calibrate, dtype, tokens, tmp_path):
    """From host memory with offloaded activations, and on the GPU throughout: both far nearer than nearest codes."""
    reference = make(dtype=dtype).cuda()
    nearest = make(dtype=dtype).cuda()
    quantize_(nearest, INT4)
    limit = 0.7 * change(nearest, reference, tokens.cuda())
    host, device = make(dtype=dtype), make(dtype=dtype).cuda()
    calibrate(host, tokens, INT4, device="cuda", offload=True, resume=tmp_path)
    assert {parameter.device.type for parameter in host.parameters()} == {"cpu"}
    calibrate(device, tokens, INT4)
    assert {parameter.device.type for parameter in device.parameters()} == {"cuda"}
    for model in (host.cuda(), device):
        assert change(model, reference, tokens.cuda()) < limit
